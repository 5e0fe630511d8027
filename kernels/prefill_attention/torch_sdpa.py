"""torch's scaled dot product attention, each of its backends forced on its own: the libraries to beat.

None reads a paged or an fp8 cache: keys and values are copied to packed 16-bit tensors first, which is timed. None knows sinks or caps.

All but the flash backend on a GPU allocate their output, and a launch must write into ours, so one copy of the output is in their time:
134 MB read and written at 8192 tokens x 32 heads x 128 in bf16, by arithmetic about 33 us of 0.9 ms on an H200. A lead over cuDNN of less
than 4% is therefore none.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from klab.kernels.contract import Chip, Config, Launch, Tensors, kernel
from klab.kernels.dtypes import SIZE_BYTES, torch_dtype
from klab.kernels.prefill_attention._torch_cache import Cache
from klab.kernels.prefill_attention.problem import PrefillAttention, offsets

# A mask or a score matrix may take this share of the memory: inputs are rotated through copies beside it.
MEMORY_SHARE = 0.25


@dataclass(frozen=True)
class Call:
    """One call of the library: `batch` sequences of equal lengths, one behind another from token `q_at` and key `kv_at`."""

    batch: int
    q_at: int
    q_len: int
    kv_at: int
    kv_len: int

    def q_rows(self) -> slice:
        """Query tokens in the packed tensors."""
        return slice(self.q_at, self.q_at + self.batch * self.q_len)

    def kv_rows(self) -> slice:
        """Key tokens in the packed tensors."""
        return slice(self.kv_at, self.kv_at + self.batch * self.kv_len)


def calls(problem: PrefillAttention) -> list[Call]:
    """One batched call when all sequences have the same lengths, else one for each sequence that has a query."""
    lens = list(zip(problem.q_lens, problem.kv_lens, strict=True))
    if len(set(lens)) == 1:
        return [Call(len(lens), 0, lens[0][0], 0, lens[0][1])]
    starts = zip(offsets(problem.q_lens), offsets(problem.kv_lens), strict=True)
    return [Call(1, q_at, q, kv_at, kv) for (q_at, kv_at), (q, kv) in zip(starts, lens, strict=False) if q]


def is_plain(problem: PrefillAttention, call: Call) -> bool:
    """Whether the mask is none or torch's `is_causal` (which aligns to the first key, so only without a prefix)."""
    windowed = bool(problem.window) and problem.window < call.kv_len
    return not problem.causal or (not windowed and (call.q_len == 1 or call.q_len == call.kv_len))


def additive_mask(problem: PrefillAttention, call: Call, device: torch.device) -> torch.Tensor:
    """[q_len, kv_len]: 0 where a query sees a key, -inf elsewhere, in the problem's dtype."""
    position = torch.arange(call.kv_len - call.q_len, call.kv_len, device=device)[:, None]
    key = torch.arange(call.kv_len, device=device)[None, :]
    hidden = key > position
    if problem.window:
        hidden = hidden | (key <= position - problem.window)
    return torch.zeros(hidden.shape, dtype=torch_dtype(problem.dtype), device=device).masked_fill_(hidden, float("-inf"))


def forced(problem: PrefillAttention, backend: SDPBackend) -> Launch:
    """The public function with one backend allowed; torch raises where that backend cannot serve. Masks are made at the first call."""
    plan, cache = calls(problem), Cache(problem)
    group = problem.heads // problem.kv_heads
    masks: dict[tuple[int, int, torch.device], torch.Tensor] = {}

    def mask_of(call: Call, device: torch.device) -> torch.Tensor | None:
        if is_plain(problem, call):
            return None
        key = (call.q_len, call.kv_len, device)
        if key not in masks:
            masks[key] = additive_mask(problem, call, device)
        return masks[key]

    def launch(inputs: Tensors, outputs: Tensors) -> None:
        q, out = inputs["q"], outputs["out"]
        k, v = cache.packed(inputs)
        with sdpa_kernel(backend):
            for call in plan:
                result = scaled_dot_product_attention(
                    _heads_first(q[call.q_rows()], call.batch),
                    _heads_first(k[call.kv_rows()], call.batch),
                    _heads_first(v[call.kv_rows()], call.batch),
                    attn_mask=mask_of(call, q.device),
                    is_causal=problem.causal and call.q_len > 1 and is_plain(problem, call),
                    scale=problem.scale,
                    enable_gqa=group > 1,
                )
                _heads_first(out[call.q_rows()], call.batch).copy_(result)

    return launch


def _heads_first(packed: torch.Tensor, batch: int) -> torch.Tensor:
    """[batch * tokens, heads, dim] seen as [batch, heads, tokens, dim]."""
    return packed.view(batch, -1, *packed.shape[1:]).transpose(1, 2)


def mask_too_large(problem: PrefillAttention, chip: Chip) -> str | None:
    """The reason, if explicit masks would fill the memory."""
    shapes = {(c.q_len, c.kv_len) for c in calls(problem) if not is_plain(problem, c)}
    needed = sum(q * kv for q, kv in shapes) * SIZE_BYTES[problem.dtype]
    return _too_large("the masks", needed, chip)


def _too_large(what: str, needed_bytes: int, chip: Chip) -> str | None:
    if needed_bytes <= MEMORY_SHARE * chip.memory_bytes:
        return None
    return f"{what} would take {needed_bytes / 1e9:.0f} GB of the chip's {chip.memory_bytes / 1e9:.0f}"


def cudnn_fits(problem: PrefillAttention, config: Config, chip: Chip) -> str | None:
    """cuDNN's limits as torch 2.11 to 2.13 check them (sdp_utils.cpp)."""
    if lacking := problem.unserved("kv_tokens", "page_size", "kv_dtype"):
        return lacking
    if problem.dtype == "float32":
        return "cuDNN attention takes 16-bit types"
    dims = (problem.head_dim, problem.dim_v)
    # None without cuDNN, as on the machine that plans for another chip.
    version: int = torch.backends.cudnn.version() or 0  # type: ignore[no-untyped-call]
    wide = 256 if version > 92200 else 128
    if max(dims) > wide and dims != (192, 128):
        return f"cuDNN attention takes head dimensions up to {wide}, and 192 with 128 for the values"
    if any(dim % 8 for dim in dims):
        return "cuDNN attention takes head dimensions that are multiples of 8"
    if any(call.kv_len == 1 for call in calls(problem)):
        return "cuDNN attention does not take a single key"
    return mask_too_large(problem, chip)


@kernel(PrefillAttention, backend="torch", fits=cudnn_fits, library=True)
def torch_sdpa_cudnn(problem: PrefillAttention, config: Config, chip: Chip) -> Launch:
    """cuDNN attention through torch; explicit mask for a prefix or a window, and the output is copied once (torch allocates its own)."""
    return forced(problem, SDPBackend.CUDNN_ATTENTION)


def flash_fits(problem: PrefillAttention, config: Config, chip: Chip) -> str | None:
    """FlashAttention 2 in torch: equal head dimensions, on a GPU at most 256 and 16 bits."""
    if lacking := problem.unserved("kv_tokens", "page_size", "kv_dtype"):
        return lacking
    if problem.head_dim != problem.dim_v:
        return "torch's flash attention takes values of the same head dimension only"
    if chip.kind == "cpu":
        return mask_too_large(problem, chip)
    if problem.dtype == "float32":
        return "torch's flash attention takes 16-bit types on a GPU"
    if problem.head_dim > 256 or problem.head_dim % 8:
        return "torch's flash attention takes head dimensions that are multiples of 8, up to 256"
    return None


@kernel(PrefillAttention, backend="torch", fits=flash_fits, library=True, kinds=("cuda", "cpu"))
def torch_sdpa_flash(problem: PrefillAttention, config: Config, chip: Chip) -> Launch:
    """torch's flash attention: on a GPU one call of its variable-length entry; on a CPU explicit masks for a prefix or a window."""
    if chip.kind == "cpu":
        return forced(problem, SDPBackend.FLASH_ATTENTION)
    # Writes into our output; a torch that lacks it pays for a copy.
    in_place: Callable[..., torch.Tensor] | None = getattr(torch.ops.aten, "_flash_attention_forward_no_dropout_inplace", None)
    window = {"window_size_left": problem.window - 1, "window_size_right": 0} if problem.window else {}
    lens = (max(problem.q_lens), max(problem.kv_lens))
    cache = Cache(problem)

    def launch(inputs: Tensors, outputs: Tensors) -> None:
        tensors = (inputs["q"], *cache.packed(inputs), inputs["q_offsets"], inputs["kv_offsets"])
        options = (*lens, 0.0, problem.causal, False)
        if in_place is not None:
            in_place(outputs["out"], *tensors, *options, scale=problem.scale, **window)
        else:
            outputs["out"].copy_(torch.ops.aten._flash_attention_forward(*tensors, *options, scale=problem.scale, **window)[0])

    return launch


def efficient_fits(problem: PrefillAttention, config: Config, chip: Chip) -> str | None:
    """Rows of 16 bytes."""
    if lacking := problem.unserved("kv_tokens", "page_size", "kv_dtype"):
        return lacking
    if any(dim * SIZE_BYTES[problem.dtype] % 16 for dim in (problem.head_dim, problem.dim_v)):
        return "memory-efficient attention takes heads of a multiple of 16 bytes"
    return None


@kernel(PrefillAttention, backend="torch", fits=efficient_fits, library=True)
def torch_sdpa_efficient(problem: PrefillAttention, config: Config, chip: Chip) -> Launch:
    """torch's memory-efficient attention, one variable-length call; with GQA it needs keys and values repeated, which is timed too."""
    group = problem.heads // problem.kv_heads
    cache = Cache(problem)
    lower_right_causal = 2 if problem.causal else 0
    lens = (max(problem.q_lens), max(problem.kv_lens))

    def launch(inputs: Tensors, outputs: Tensors) -> None:
        k, v = (x if group == 1 else x.repeat_interleave(group, dim=1) for x in cache.packed(inputs))
        result = torch.ops.aten._efficient_attention_forward(
            inputs["q"][None], k[None], v[None], None, inputs["q_offsets"], inputs["kv_offsets"], *lens, 0.0, lower_right_causal,
            scale=problem.scale, window_size=problem.window or None,
        )  # fmt: skip
        outputs["out"].copy_(result[0][0])

    return launch


def math_fits(problem: PrefillAttention, config: Config, chip: Chip) -> str | None:
    """The scores exist in memory, in float32, about three times at once (scores, weights, and one of them on its way)."""
    if lacking := problem.unserved("kv_tokens", "page_size", "kv_dtype"):
        return lacking
    largest = max(call.batch * call.q_len * call.kv_len for call in calls(problem))
    return _too_large("the score matrices", 3 * 4 * problem.heads * largest, chip)


@kernel(PrefillAttention, backend="torch", fits=math_fits, library=True, kinds=("cuda", "cpu"))
def torch_sdpa_math(problem: PrefillAttention, config: Config, chip: Chip) -> Launch:
    """Attention as separate products and a softmax, with the scores in memory: what flash attention is compared with."""
    return forced(problem, SDPBackend.MATH)
