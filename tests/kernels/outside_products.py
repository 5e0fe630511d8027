"""Stand-ins for other people's norms, activations and products, and for two languages of tiles; see outside_attention.py."""

import itertools
import types

import torch

FP8, BLOCK = torch.float8_e4m3fn, 128
HALF = (torch.float16, torch.bfloat16)


# Norms and activations


def _rows(x, dense=False):
    assert x.ndim == 2 and x.dtype in HALF and x.stride(1) == 1 and x.shape[1] * x.element_size() % 16 == 0
    assert not dense or x.is_contiguous()
    return x.float()


def _rms(x, weight, eps):
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight.float()


def rmsnorm(input, weight, eps=1e-6, out=None, enable_pdl=None):
    out.copy_(_rms(_rows(input), weight, eps))


def fused_add_rmsnorm(input, residual, weight, eps=1e-6, enable_pdl=None):
    h = _rows(input) + _rows(residual)
    residual.copy_(h)
    input.copy_(_rms(h, weight, eps))


def rms_norm(out, input, weight, epsilon):
    out.copy_(_rms(_rows(input), weight, epsilon))


def fused_add_rms_norm(input, residual, weight, epsilon):
    fused_add_rmsnorm(input, residual, weight, epsilon)


def _rmsnorm_fwd(
    x, weight, out, bias=None, rstd=None, mean=None, residual=None, residual_out=None, eps=1e-6, is_layernorm=False, weight_offset=0.0
):
    h = x.float()
    if residual is not None:
        h = h + residual.float()
        residual_out.copy_(h)
    normed = _rms(h - h.mean(-1, keepdim=True) if is_layernorm else h, weight, eps)
    out.copy_(normed if bias is None else normed + bias.float())


def _gated(act):
    def apply(input, out=None, enable_pdl=None):
        half = _rows(input, dense=True).shape[1] // 2
        assert out.shape == (len(input), half) and out.is_contiguous()
        out.copy_(act(input[:, :half].float()) * input[:, half:].float())

    return apply


silu_and_mul = _gated(torch.nn.functional.silu)
gelu_and_mul = _gated(torch.nn.functional.gelu)
gelu_tanh_and_mul = _gated(lambda x: torch.nn.functional.gelu(x, approximate="tanh"))
GATED = {"silu_and_mul": silu_and_mul, "gelu_and_mul": gelu_and_mul, "gelu_tanh_and_mul": gelu_tanh_and_mul}


# Scaled products


def _spread(scale, rows, columns):
    """Scales of whole blocks, repeated to [rows, columns]."""
    high, wide = -(-rows // scale.shape[0]), -(-columns // scale.shape[1])
    return scale.float().repeat_interleave(high, 0)[:rows].repeat_interleave(wide, 1)[:, :columns]


def _cutlass(a, b, a_scales, b_scales, kinds):
    """a [m, k] rows dense; b [k, n] columns dense; one scale per tensor, per row and column, or per block."""
    (m, k), n = a.shape, b.shape[1]
    assert a.dtype == b.dtype in kinds and a.stride(1) == 1 and b.stride(0) == 1 and b.shape[0] == k and k % 16 == n % 16 == 0
    assert a.stride(0) % 16 == b.stride(1) % 16 == 0 and a_scales.dtype == b_scales.dtype == torch.float32
    if a_scales.ndim == 2 and a_scales.shape[1] > 1:
        assert a_scales.shape == (m, k // BLOCK) and a_scales.stride(0) == 1 and m % 4 == 0 and a.dtype == FP8
        assert b_scales.shape == (k // BLOCK, n // BLOCK) and b_scales.stride(0) == 1
        return (a.float() * _spread(a_scales, m, k)) @ (b.float() * _spread(b_scales, k, n))
    assert a_scales.is_contiguous() and b_scales.is_contiguous() and a_scales.numel() in (1, m) and b_scales.numel() in (1, n)
    return (a.double() @ b.double()) * a_scales.view(-1, 1) * b_scales.view(1, -1)


def cutlass_scaled_mm(out, a, b, a_scales, b_scales, bias):
    assert bias is None and out.dtype in HALF
    out.copy_(_cutlass(a, b, a_scales, b_scales, (FP8, torch.int8)))


def _sgl(kind, per_block):
    def multiply(mat_a, mat_b, scales_a, scales_b, out_dtype):
        assert per_block or (scales_a.numel(), scales_b.numel()) == (len(mat_a), mat_b.shape[1])
        assert per_block == (scales_a.shape[1] > 1 or scales_a.shape[1] == mat_a.shape[1] // BLOCK)
        return _cutlass(mat_a, mat_b, scales_a, scales_b, (kind,)).to(out_dtype)

    return multiply


fp8_scaled_mm, int8_scaled_mm = _sgl(FP8, False), _sgl(torch.int8, False)
fp8_blockwise_scaled_mm = _sgl(FP8, True)


def _tma(*tensors):
    for x in tensors:
        assert x.stride(-1) == 1 and all(stride * x.element_size() % 16 == 0 for stride in x.stride()[:-1]), x.stride()


def fp8_gemm_nt(a, b, d, c=None, *, disable_ue8m0_cast=False):
    (x, x_scale), (w, w_scale) = a, b
    _tma(x, w, d)
    assert disable_ue8m0_cast and x.dtype == w.dtype == FP8 and d.dtype == torch.bfloat16 and w_scale.is_contiguous()
    assert x_scale.shape == (len(x), x.shape[1] // BLOCK) and w_scale.shape == (-(-len(w) // BLOCK), x.shape[1] // BLOCK)
    wide = w_scale.repeat_interleave(BLOCK, 0)[: len(w)].repeat_interleave(BLOCK, 1)
    d.copy_((x.float() * _spread(x_scale, *x.shape)) @ (w.float() * wide).T)


def bf16_gemm_nt(a, b, d, c=None):
    _tma(a, b, d)
    assert a.dtype == b.dtype == d.dtype == torch.bfloat16
    d.copy_(a.float() @ b.float().T)


def _groups(m_indices, rows):
    """(rows of a tile, its group), which it reads from the tile's first row; -1 is skipped."""
    assert m_indices.dtype == torch.int32 and m_indices.shape == (rows,) and rows % BLOCK == 0
    for first in range(0, rows, BLOCK):
        group = int(m_indices[first])
        assert (m_indices[first : first + BLOCK] == group).all(), "a group does not begin at a multiple of 128 rows"
        if group >= 0:
            yield slice(first, first + BLOCK), group


def m_grouped_fp8_gemm_nt_contiguous(a, b, d, m_indices, *, disable_ue8m0_cast=False):
    (x, x_scale), (w, w_scale) = a, b
    for rows, group in _groups(m_indices, len(x)):
        fp8_gemm_nt((x[rows], x_scale[rows]), (w[group], w_scale[group]), d[rows], disable_ue8m0_cast=disable_ue8m0_cast)


def m_grouped_bf16_gemm_nt_contiguous(a, b, d, m_indices):
    for rows, group in _groups(m_indices, len(a)):
        bf16_gemm_nt(a[rows], b[group], d[rows])


def fp8_w8a8_moe_quant_config(w1_scale, w2_scale, a1_scale=None, a2_scale=None, *, block_shape=None):
    assert block_shape == [BLOCK, BLOCK]
    return w1_scale, w2_scale


def fused_experts(hidden_states, w1, w2, topk_weights, topk_ids, *, quant_config=None, global_num_experts=-1, expert_map=None):
    assert hidden_states.is_contiguous() and w1.stride(-1) == w2.stride(-1) == 1 and topk_weights.dtype == torch.float32
    assert topk_ids.shape == topk_weights.shape and (global_num_experts > 0) == (expert_map is not None)
    ids = topk_ids if expert_map is None else expert_map[topk_ids.long()]
    assert int(ids.max()) < len(w1)
    x, half = _through(hidden_states.float(), quant_config), w1.shape[1] // 2
    out = torch.zeros(hidden_states.shape, dtype=torch.float32)
    for e in range(len(w1)):
        token, slot = (ids == e).nonzero(as_tuple=True)
        first, second = w1[e].float(), w2[e].float()
        if quant_config:
            first, second = (w * _spread(s[e], *w.shape) for w, s in zip((first, second), quant_config, strict=True))
        up = x[token] @ first.T
        acted = _through(torch.nn.functional.silu(up[:, :half]) * up[:, half:], quant_config)
        out.index_add_(0, token, (acted @ second.T) * topk_weights[token, slot][:, None])
    return out.to(hidden_states.dtype)


def _through(rows, quantised):
    if not quantised:
        return rows
    blocks = rows.unflatten(1, (-1, BLOCK))
    scale = blocks.abs().amax(-1, keepdim=True).clamp_min(1e-10) / 448
    return ((blocks / scale).to(FP8).float() * scale).flatten(1)


# Languages of tiles


class CudaTile(types.SimpleNamespace):
    """cuda.tile, one block after another; tiles beyond an array's edge are padded with NaN unless zeros are asked for."""

    def __init__(self):
        super().__init__(float32=torch.float32, Constant={bool: bool, int: int}, PaddingMode=types.SimpleNamespace(ZERO=0.0))
        self.kernel = lambda function: function

    def launch(self, stream, grid, kernel, args):
        for self.block in itertools.product(*map(range, grid)):
            kernel(*args)

    def bid(self, axis):
        return self.block[axis]

    @staticmethod
    def cdiv(a, b):
        return -(-a // b)

    @staticmethod
    def full(shape, value, dtype):
        return torch.full(shape, value, dtype=dtype)

    def load(self, array, index, shape, *, order=(0, 1), padding_mode=float("nan")):
        part = self._part(array.permute(order), index, shape)
        tile = torch.full(shape, padding_mode, dtype=array.dtype)
        tile[: part.shape[0], : part.shape[1]] = part
        return tile

    def store(self, array, index, tile):
        part = self._part(array, index, tile.shape)
        part.copy_(tile[: part.shape[0], : part.shape[1]])

    @staticmethod
    def _part(array, index, shape):
        starts = [i * s for i, s in zip(index, shape, strict=True)]
        assert all(start < size for start, size in zip(starts, array.shape, strict=True)), "a tile outside the array"
        return array[starts[0] : starts[0] + shape[0], starts[1] : starts[1] + shape[1]]

    @staticmethod
    def mma(x, y, acc):
        assert x.dtype == y.dtype and acc.dtype == torch.float32
        return acc + x.float() @ y.float()

    @staticmethod
    def astype(tile, dtype):
        return tile.to(dtype)


class _Place:
    """A global tensor whose element access names the place where a copy begins."""

    def __init__(self, tensor):
        self.tensor = tensor

    def __getitem__(self, start):
        return self.tensor, start


class TileLang(types.SimpleNamespace):
    """tilelang.language, one block after another; a tile's elements beyond an edge are zeros, and are not stored."""

    def __init__(self):
        super().__init__(prim_func=lambda function: function)

    def compile(self, program, *, target):
        assert target["kind"] == "cuda"

        def run(**tensors):
            self.blocks, self.number = None, 0
            while self.blocks is None or self.number < len(self.blocks):
                program(**{name: _Place(tensor) for name, tensor in tensors.items()})
                self.number += 1

        def call(*tensors):
            names = program.__annotations__
            for tensor, (shape, strides) in zip(tensors, names.values(), strict=True):
                assert tuple(tensor.shape) == shape and tensor.stride() in (strides, tensor.stride() if 1 in shape else None)
            run(**dict(zip(names, tensors, strict=True)))

        return call

    def Kernel(self, *grid, threads):
        assert threads % 128 == 0
        self.blocks = self.blocks or list(itertools.product(*map(range, grid)))
        return self

    def __enter__(self):
        return self.blocks[self.number]

    def __exit__(self, *error):
        return None

    StridedTensor = staticmethod(lambda shape, strides, dtype: (shape, strides))
    Tensor = staticmethod(lambda shape, dtype: (shape, (shape[1], 1)))
    ceildiv = staticmethod(lambda a, b: -(-a // b))
    alloc_shared = staticmethod(lambda shape, dtype: torch.full(shape, float("nan"), dtype=getattr(torch, dtype)))
    alloc_fragment = alloc_shared
    use_swizzle = staticmethod(lambda size: None)
    clear = staticmethod(lambda tile: tile.zero_())
    Pipelined = staticmethod(lambda count, num_stages: range(count))

    @staticmethod
    def copy(source, target):
        if isinstance(source, tuple):
            tensor, (row, column) = source
            part = tensor[row : row + target.shape[0], column : column + target.shape[1]]
            target.zero_()[: part.shape[0], : part.shape[1]] = part
        else:
            tensor, (row, column) = target
            part = tensor[row : row + source.shape[0], column : column + source.shape[1]]
            part.copy_(source[: part.shape[0], : part.shape[1]])

    @staticmethod
    def gemm(a, b, c, transpose_B=False):
        c += a.float() @ (b.float().T if transpose_B else b.float())


def modules():
    """Module name -> stand-in."""
    norms = {"rmsnorm": rmsnorm, "fused_add_rmsnorm": fused_add_rmsnorm}
    scaled = {"fp8_scaled_mm": fp8_scaled_mm, "int8_scaled_mm": int8_scaled_mm, "fp8_blockwise_scaled_mm": fp8_blockwise_scaled_mm}
    deep = (fp8_gemm_nt, bf16_gemm_nt, m_grouped_fp8_gemm_nt_contiguous, m_grouped_bf16_gemm_nt_contiguous)
    language = TileLang()
    tile = CudaTile()
    moe = "vllm.model_executor.layers.fused_moe"
    return {
        "flashinfer.norm": norms,
        "flashinfer.activation": GATED,
        "sgl_kernel": norms | GATED | scaled,
        "vllm": {},
        "vllm._custom_ops": {"rms_norm": rms_norm, "fused_add_rms_norm": fused_add_rms_norm},
        "vllm.model_executor": {},
        "vllm.model_executor.layers": {},
        moe: {"fused_experts": fused_experts},
        f"{moe}.config": {"fp8_w8a8_moe_quant_config": fp8_w8a8_moe_quant_config},
        "quack": {},
        "quack.rmsnorm": {"_rmsnorm_fwd": _rmsnorm_fwd},
        "deep_gemm": {f.__name__: f for f in deep},
        "cuda": {},
        "cuda.tile": {name: getattr(tile, name) for name in dir(tile) if not name.startswith("_")},
        "tilelang": {"compile": language.compile},
        "tilelang.language": {name: getattr(language, name) for name in dir(language) if not name.startswith("_")},
    }
