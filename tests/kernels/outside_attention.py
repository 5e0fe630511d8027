"""Stand-ins for attention libraries: their signatures, computed by torch on a CPU, strict about what the real ones are strict about.

Parameters are named and ordered as in the version that the wrapper cites; test_outside.py compares them with the real package where it is
installed.
"""

import types

import torch

INT32, HALF = torch.int32, (torch.float16, torch.bfloat16)


def attend(q, k, v, *, scale, causal, window_left=-1, softcap=0.0, sinks=None):
    """[tokens, heads, dim] of one sequence; masks are aligned to the last key; window_left counts keys before the query's own."""
    rows, keys, heads = q.shape[0], k.shape[0], q.shape[1]
    if not rows or not keys:
        return torch.zeros((rows, heads, v.shape[-1]), dtype=q.dtype)
    group = heads // k.shape[1]
    k, v = (x.float().repeat_interleave(group, dim=1) for x in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q.float(), k) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    behind = torch.arange(rows)[:, None] + keys - rows - torch.arange(keys)[None]
    hidden = behind < 0 if causal else torch.zeros_like(behind, dtype=torch.bool)
    if window_left >= 0:
        hidden = hidden | (behind > window_left)
    scores = scores.masked_fill(hidden, float("-inf"))
    if sinks is not None:
        scores = torch.cat((scores, sinks.float()[:, None, None].expand(-1, rows, 1)), -1)
    weights = scores.softmax(-1)[..., :keys]
    return torch.einsum("hqk,khd->qhd", weights, v).to(q.dtype)


def check_tensor(x, dtypes, ndim):
    assert x.dtype in (dtypes if isinstance(dtypes, tuple) else (dtypes,)), x.dtype
    assert x.ndim == ndim and (x.stride(-1) == 1 or x.shape[-1] == 1), (x.shape, x.stride())


def packed(cache, table, length):
    """The first `length` tokens of a sequence whose pages are `table`."""
    pages = table[: -(-length // cache.shape[1])]
    assert (pages >= 0).all()
    return cache[pages.long()].flatten(0, 1)[:length]


# FlashInfer


class _Planned:
    def __init__(self, float_workspace_buffer):
        assert float_workspace_buffer.dtype == torch.uint8 and not float_workspace_buffer.any()
        self.planned = None

    def keep(self, indptr, indices, last_page_len, page_size):
        """Sequences' pages as views of `indices`, so that what a later launch fills in is what is read."""
        assert all(t.dtype == INT32 and t.device.type == "cpu" for t in (indptr, indices, last_page_len))
        assert indptr[-1] == len(indices) and len(last_page_len) == len(indptr) - 1
        counts = indptr.diff()
        assert ((last_page_len > 0) == (counts > 0)).all() and (last_page_len <= page_size).all()
        lens = ((counts - 1) * page_size + last_page_len).clamp_min(0).tolist()
        return [(indices[a:b], n) for a, b, n in zip(indptr[:-1].tolist(), indptr[1:].tolist(), lens, strict=True)]


class BatchDecodeWithPagedKVCacheWrapper(_Planned):
    def __init__(
        self, float_workspace_buffer, kv_layout="NHD", use_cuda_graph=False, use_tensor_cores=False, paged_kv_indptr_buffer=None,
        paged_kv_indices_buffer=None, paged_kv_last_page_len_buffer=None, backend="auto",
    ):  # fmt: skip
        super().__init__(float_workspace_buffer)
        assert kv_layout == "NHD" and backend == "fa2" and use_cuda_graph
        self.tensor_cores, self.indices = use_tensor_cores, paged_kv_indices_buffer
        self.buffers = paged_kv_indptr_buffer, paged_kv_last_page_len_buffer

    def plan(
        self, indptr, indices, last_page_len, num_qo_heads, num_kv_heads, head_dim, page_size, *, window_left=-1, logits_soft_cap=None,
        q_data_type=None, kv_data_type=None, sm_scale=None, q_len_per_req=1,
    ):  # fmt: skip
        assert len(indices) <= len(self.indices) and len(self.buffers[0]) == len(indptr) and len(self.buffers[1]) == len(last_page_len)
        assert q_data_type in HALF and kv_data_type == q_data_type and (q_len_per_req == 1 or self.tensor_cores)
        self.shape = (num_qo_heads, num_kv_heads, head_dim, page_size, q_len_per_req, q_data_type)
        self.sequences = self.keep(indptr, self.indices[: len(indices)], last_page_len, page_size)
        self.options = {"scale": sm_scale, "causal": True, "window_left": window_left, "softcap": logits_soft_cap or 0.0}

    def run(self, q, paged_kv_cache, *, out=None):
        heads, kv_heads, dim, page_size, q_len, dtype = self.shape
        k, v = paged_kv_cache
        check_tensor(q, dtype, 3)
        assert q.shape == (len(self.sequences) * q_len, heads, dim) and out.shape == q.shape and out.is_contiguous()
        assert k.shape[1:] == v.shape[1:] == (page_size, kv_heads, dim) and k.stride() == v.stride()
        for i, (pages, length) in enumerate(self.sequences):
            rows = slice(i * q_len, (i + 1) * q_len)
            out[rows] = attend(q[rows], packed(k, pages, length), packed(v, pages, length), **self.options)
        return out


class _Prefill(_Planned):
    def __init__(self, float_workspace_buffer, kv_layout="NHD", *, backend="auto"):
        super().__init__(float_workspace_buffer)
        assert kv_layout == "NHD" and backend in ("fa2", "fa3")

    def set(self, indptr, heads, kv_heads, qk, vo, causal, window_left, softcap, scale, q_type, kv_type):
        assert indptr.dtype == INT32 and q_type in HALF and kv_type == q_type
        self.q_at, self.shape, self.dtype = indptr.tolist(), (heads, kv_heads, qk, vo or qk), q_type
        self.options = {"scale": scale, "causal": causal, "window_left": window_left, "softcap": softcap or 0.0}

    def all(self, q, pairs, out):
        heads, kv_heads, qk, vo = self.shape
        check_tensor(q, self.dtype, 3)
        assert q.shape == (self.q_at[-1], heads, qk) and out.shape == (*q.shape[:2], vo) and out.is_contiguous()
        for i, (k, v) in enumerate(pairs):
            assert k.shape[1:] == (kv_heads, qk) and v.shape[1:] == (kv_heads, vo)
            rows = slice(self.q_at[i], self.q_at[i + 1])
            out[rows] = attend(q[rows], k, v, **self.options)
        return out


class BatchPrefillWithRaggedKVCacheWrapper(_Prefill):
    def plan(
        self, qo_indptr, kv_indptr, num_qo_heads, num_kv_heads, head_dim_qk, head_dim_vo=None, *, causal=False, window_left=-1,
        logits_soft_cap=None, sm_scale=None, q_data_type="float16", kv_data_type=None,
    ):  # fmt: skip
        assert kv_indptr.dtype == INT32
        self.kv_at = kv_indptr.tolist()
        self.set(
            qo_indptr, num_qo_heads, num_kv_heads, head_dim_qk, head_dim_vo, causal, window_left, logits_soft_cap, sm_scale, q_data_type,
            kv_data_type,
        )  # fmt: skip

    def run(self, q, k, v, *, out=None):
        check_tensor(k, self.dtype, 3)
        assert len(k) == len(v) == self.kv_at[-1]
        pairs = [(k[a:b], v[a:b]) for a, b in zip(self.kv_at, self.kv_at[1:], strict=False)]
        return self.all(q, pairs, out)


class BatchPrefillWithPagedKVCacheWrapper(_Prefill):
    def plan(
        self, qo_indptr, paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len, num_qo_heads, num_kv_heads, head_dim_qk, page_size,
        head_dim_vo=None, *, causal=False, sm_scale=None, window_left=-1, logits_soft_cap=None, q_data_type="float16", kv_data_type=None,
    ):  # fmt: skip
        self.sequences, self.page_size = self.keep(paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len, page_size), page_size
        self.set(
            qo_indptr, num_qo_heads, num_kv_heads, head_dim_qk, head_dim_vo, causal, window_left, logits_soft_cap, sm_scale, q_data_type,
            kv_data_type,
        )  # fmt: skip

    def run(self, q, paged_kv_cache, *, out=None):
        k, v = paged_kv_cache
        assert k.shape[1] == self.page_size
        return self.all(q, [(packed(k, pages, n), packed(v, pages, n)) for pages, n in self.sequences], out)


class BatchMLAPagedAttentionWrapper(_Planned):
    def __init__(
        self, float_workspace_buffer, use_cuda_graph=False, qo_indptr=None, kv_indptr=None, kv_indices=None, kv_len_arr=None,
        backend="auto",
    ):  # fmt: skip
        super().__init__(float_workspace_buffer)
        assert use_cuda_graph and backend in ("fa2", "fa3") and len(qo_indptr) == len(kv_indptr) == len(kv_len_arr) + 1
        self.indices = kv_indices

    def plan(
        self, *, qo_indptr=None, kv_indptr=None, kv_indices=None, kv_len_arr=None, num_heads=None, head_dim_ckv=None, head_dim_kpe=None,
        page_size=None, causal=None, sm_scale=None, q_data_type=None, kv_data_type=None,
    ):  # fmt: skip
        assert torch.equal(kv_indptr.diff(), -(-kv_len_arr // page_size)) and len(kv_indices) == kv_indptr[-1]
        assert q_data_type == kv_data_type and head_dim_ckv == 512 and head_dim_kpe == 64
        last = kv_len_arr - (kv_indptr.diff() - 1).clamp_min(0) * page_size
        self.sequences = self.keep(kv_indptr, self.indices, last, page_size)
        self.q_at, self.heads, self.page_size = qo_indptr.tolist(), num_heads, page_size
        self.options = {"scale": sm_scale, "causal": causal}

    def run(self, *, q_nope=None, q_pe=None, ckv_cache=None, kpe_cache=None, out=None):
        assert q_nope.shape == (self.q_at[-1], self.heads, 512) == out.shape and q_pe.shape[-1] == kpe_cache.shape[-1] == 64
        assert ckv_cache.shape[1:] == (self.page_size, 512) and out.is_contiguous()
        for i, (pages, length) in enumerate(self.sequences):
            rows = slice(self.q_at[i], self.q_at[i + 1])
            v = packed(ckv_cache, pages, length)
            k = torch.cat((v, packed(kpe_cache, pages, length)), -1)
            out[rows] = attend(torch.cat((q_nope[rows], q_pe[rows]), -1), k[:, None], v[:, None], **self.options)
        return out


# FlashAttention


def _sequences(q, k, v, cu_q, cu_k, table, lens, page_multiple):
    """(query rows, k, v) of each sequence of a variable-length or a batched call."""
    if cu_q is None:
        check_tensor(q, HALF, 4)
        rows = [(i,) for i in range(len(q))]
    else:
        check_tensor(q, HALF, 3)
        assert cu_q.dtype == INT32
        rows = [slice(a, b) for a, b in zip(cu_q.tolist(), cu_q[1:].tolist(), strict=False)]
    if table is not None:
        assert table.dtype == INT32 and lens.dtype == INT32 and k.ndim == 4 and k.shape[1] % page_multiple == 0
        pairs = [(packed(k, t, n), packed(v, t, n)) for t, n in zip(table, lens.tolist(), strict=True)]
    else:
        assert cu_k.dtype == INT32 and k.ndim == 3
        pairs = [(k[a:b], v[a:b]) for a, b in zip(cu_k.tolist(), cu_k[1:].tolist(), strict=False)]
    return [(r, *pair) for r, pair in zip(rows, pairs, strict=True)]


def _all(q, sequences, out, **options):
    for rows, k, v in sequences:
        out[rows] = attend(q[rows], k, v, **options)
    return out


def flash_attn_varlen_func(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None, causal=False,
    window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False, return_attn_probs=False, block_table=None,
):  # fmt: skip
    assert max_seqlen_q == int(cu_seqlens_q.diff().max()) and max_seqlen_k == int(cu_seqlens_k.diff().max())
    found = _sequences(q, k, v, cu_seqlens_q, cu_seqlens_k, block_table, cu_seqlens_k.diff(), 256)
    out = torch.empty((*q.shape[:-1], v.shape[-1]), dtype=q.dtype)
    return _all(q, found, out, scale=softmax_scale, causal=causal, window_left=window_size[0], softcap=softcap)


def flash_attn_with_kvcache(
    q, k_cache, v_cache, k=None, v=None, rotary_cos=None, rotary_sin=None, cache_seqlens=None, cache_batch_idx=None, cache_leftpad=None,
    block_table=None, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0,
):  # fmt: skip
    found = _sequences(q, k_cache, v_cache, None, None, block_table, cache_seqlens, 256)
    out = torch.empty((*q.shape[:-1], v_cache.shape[-1]), dtype=q.dtype)
    return _all(q, found, out, scale=softmax_scale, causal=causal, window_left=window_size[0], softcap=softcap)


# The schema that hopper/flash_api.cpp registers, without the arguments that follow pack_gqa.
FLASH_ATTN_3_SCHEMA = (
    "fwd(Tensor q, Tensor k, Tensor v, Tensor(k_new!)? k_new = None, Tensor(v_new!)? v_new = None, Tensor? q_v = None,"
    " Tensor(out!)? out = None, Tensor? cu_seqlens_q = None, Tensor? cu_seqlens_k = None, Tensor? cu_seqlens_k_new = None,"
    " Tensor? seqused_q = None, Tensor? seqused_k = None, int? max_seqlen_q = None, int? max_seqlen_k = None, Tensor? page_table = None,"
    " Tensor? kv_batch_idx = None, Tensor? leftpad_k = None, Tensor? rotary_cos = None, Tensor? rotary_sin = None,"
    " Tensor? seqlens_rotary = None, Tensor? q_descale = None, Tensor? k_descale = None, Tensor? v_descale = None,"
    " float? softmax_scale = None, bool is_causal = False, int window_size_left = -1, int window_size_right = -1,"
    " int attention_chunk = 0, float softcap = 0.0, bool is_rotary_interleaved = False, Tensor? scheduler_metadata = None,"
    " int num_splits = 0, bool? pack_gqa = None, int sm_margin = 0) -> (Tensor(out!), Tensor, Tensor, Tensor)"
)


def flash_attn_3_forward(
    q, k, v, k_new, v_new, q_v, out, cu_seqlens_q, cu_seqlens_k, cu_seqlens_k_new, seqused_q, seqused_k, max_seqlen_q, max_seqlen_k,
    page_table, kv_batch_idx, leftpad_k, rotary_cos, rotary_sin, seqlens_rotary, q_descale, k_descale, v_descale, softmax_scale,
    is_causal=False, window_size_left=-1, window_size_right=-1, attention_chunk=0, softcap=0.0, *rest,
):  # fmt: skip
    assert (cu_seqlens_q is None) == (max_seqlen_q is None) and out.is_contiguous()
    found = _sequences(q, k, v, cu_seqlens_q, cu_seqlens_k, page_table, seqused_k, 1)
    _all(q, found, out, scale=softmax_scale, causal=is_causal, window_left=window_size_left, softcap=softcap)
    return out, torch.empty(0), torch.empty(0), torch.empty(0)


def _flash_attn_fwd(
    q, k, v, qv=None, cu_seqlens_q=None, cu_seqlens_k=None, seqused_q=None, seqused_k=None, max_seqlen_q=None, max_seqlen_k=None,
    min_seqlen_k=None, page_table=None, softmax_scale=None, causal=False, softcap=None, window_size_left=None, window_size_right=None,
    learnable_sink=None, *, num_splits=1, out=None,
):  # fmt: skip
    assert page_table is None or cu_seqlens_k is None
    assert softcap is None or softcap > 0
    found = _sequences(q, k, v, cu_seqlens_q, cu_seqlens_k, page_table, seqused_k, 1)
    assert max_seqlen_k == max(len(k) for _, k, _ in found)
    assert out.shape == (*q.shape[:-1], v.shape[-1])
    left = -1 if window_size_left is None else window_size_left
    return _all(q, found, out, scale=softmax_scale, causal=causal, window_left=left, softcap=softcap or 0.0, sinks=learnable_sink)


# xformers


class BlockDiagonalMask:
    causal, window = False, 0

    @classmethod
    def from_seqlens(cls, q_seqlen, kv_seqlen=None, *, device=None):
        assert isinstance(q_seqlen, list) and len(q_seqlen) == len(kv_seqlen) and min(q_seqlen) > 0 and device is not None
        made = cls()
        made.q, made.kv = q_seqlen, kv_seqlen
        return made

    def make_local_attention_from_bottomright(self, window_size):
        made = BlockDiagonalCausalFromBottomRightMask.from_seqlens(self.q, self.kv, device="cpu")
        made.window = window_size
        return made


class BlockDiagonalCausalFromBottomRightMask(BlockDiagonalMask):
    causal = True


def memory_efficient_attention_forward(query, key, value, attn_bias=None, p=0.0, scale=None, *, op=None):
    assert query.shape[0] == key.shape[0] == value.shape[0] == 1 and query.ndim == key.ndim in (4, 5)
    assert query.shape[2:-1] == key.shape[2:-1] == value.shape[2:-1]
    q, k, v = (x[0].flatten(1, -2) for x in (query, key, value))
    out, at, kv_at = torch.empty((*q.shape[:-1], v.shape[-1]), dtype=q.dtype), 0, 0
    for rows, keys in zip(attn_bias.q, attn_bias.kv, strict=True):
        window = attn_bias.window - 1 if attn_bias.window else -1
        one = q[at : at + rows], k[kv_at : kv_at + keys], v[kv_at : kv_at + keys]
        out[at : at + rows] = attend(*one, scale=scale, causal=attn_bias.causal, window_left=window)
        at, kv_at = at + rows, kv_at + keys
    assert at == len(q) and kv_at == len(k)
    return out.view(*query.shape[:-1], v.shape[-1])


def modules():
    """Module name -> stand-in."""
    bias = types.SimpleNamespace(
        BlockDiagonalMask=BlockDiagonalMask, BlockDiagonalCausalFromBottomRightMask=BlockDiagonalCausalFromBottomRightMask
    )
    fmha = types.SimpleNamespace(memory_efficient_attention_forward=memory_efficient_attention_forward, attn_bias=bias)
    wrappers = (BatchDecodeWithPagedKVCacheWrapper, BatchPrefillWithPagedKVCacheWrapper, BatchPrefillWithRaggedKVCacheWrapper)
    return {
        "flashinfer": {w.__name__: w for w in wrappers},
        "flashinfer.mla": {"BatchMLAPagedAttentionWrapper": BatchMLAPagedAttentionWrapper},
        "flash_attn": {f.__name__: f for f in (flash_attn_varlen_func, flash_attn_with_kvcache)},
        "flash_attn.cute": {},
        "flash_attn.cute.interface": {"_flash_attn_fwd": _flash_attn_fwd},
        "flash_attn_3": {},
        "flash_attn_3._C": {},
        "xformers": {},
        "xformers.ops": {"fmha": fmha},
    }
