"""Rows of the token mixers of a decoder: grouped, latent and linear attention."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from klab.harness.catalog.architecture import Attention, LatentAttention, LinearAttention
from klab.harness.catalog.matrices import kv_shard, mixer_matrices, shard
from klab.harness.plan.step import Draft, Step, drafted
from klab.kernels.batched_matmul.problem import BatchedMatmul
from klab.kernels.causal_conv1d.problem import CausalConv1d
from klab.kernels.contract import Problem
from klab.kernels.decode_attention.problem import DecodeAttention
from klab.kernels.gated_delta_rule.problem import GatedDeltaRule
from klab.kernels.index_scores.problem import IndexScores
from klab.kernels.latent_attention.problem import LatentAttention as LatentProblem
from klab.kernels.prefill_attention.problem import PrefillAttention
from klab.kernels.rope_cache.problem import RopeCache
from klab.kernels.sparse_latent_attention.problem import SparseLatentAttention
from klab.kernels.topk_select.problem import TopkSelect

# FlashMLA's pages and those of the engines that use it, whatever the pages of other layers.
LATENT_PAGE = 64


def attention_rows(a: Attention, hidden: int, step: Step) -> list[Draft]:
    """Projections, norm of queries and keys, rotary positions with the write to the cache, and the attention itself."""
    before, after = _split(step.matrices(mixer_matrices(a, hidden, step.tp)))
    heads, kv_heads = shard(a.heads, step.tp, "attention heads"), kv_shard(a.kv_heads, step.tp)
    drafts = [step.normed("norm", step.tokens, hidden, residual=True), *before]
    if a.qk_norm:
        # Whole heads of queries and keys; of cross-attention's keys the norm is taken once, with their projection.
        drafts.append(step.normed("qk_norm", step.tokens * (heads if a.cross else heads + kv_heads), a.head_dim, kind="rms"))
    if (a.rotary or a.causal) and not a.cross:
        drafts.append(_positions(a, heads, kv_heads, step))
    drafts.append(softmax_attention(a, heads, kv_heads, step))
    if a.output_gate:
        drafts.append(step.activated("output_gate", step.tokens, heads * a.head_dim, "sigmoid", gated=True))
    return drafts + after


def _positions(a: Attention, heads: int, kv_heads: int, step: Step) -> Draft:
    """Queries and keys turned; where later tokens will read them, keys and values written to the cache."""
    features: dict[str, Any] = {"rotary_dim": a.rotary_dim, "dtype": step.dtype}
    if not a.causal:
        return drafted("rope", RopeCache(step.tokens, heads, kv_heads, a.head_dim, cache=False, **features))
    features |= {"page_size": step.page_size, "kv_dtype": step.kv_dtype, "rotary": a.rotary}
    return drafted("rope_and_cache" if a.rotary else "cache_write", RopeCache(step.tokens, heads, kv_heads, a.head_dim, **features))


def _split(drafts: list[Draft]) -> tuple[list[Draft], list[Draft]]:
    """What comes before the attention and what after it (the output projection and its all-reduce)."""
    at = next(i for i, draft in enumerate(drafts) if draft.role.endswith(("o_proj", "out_proj")))
    return drafts[:at], drafts[at:]


def softmax_attention(a: Attention, heads: int, kv_heads: int, step: Step) -> Draft:
    """The attention of one rank as the operator that can express it."""
    role = "cross_attention" if a.cross else "attention"
    keys = (a.source_tokens or step.source) if a.cross else step.context
    window = a.window if a.window < keys else 0
    shape: dict[str, Any] = {"heads": heads, "kv_heads": kv_heads, "head_dim": a.head_dim}
    features: dict[str, Any] = {"dtype": step.dtype, "window": window, "sinks": a.sinks, "softcap": a.softcap, "kv_dtype": step.kv_dtype}
    if step.decodes:
        if a.chunk and not a.cross:  # only the tokens of the current chunk are seen
            keys = max((keys - 1) % a.chunk + 1, step.new)
        # A window or a chunk hides the beginning, where a shared prefix lies; caches share whole pages.
        shared = 0 if a.cross or window or a.chunk else min(step.shared_prefix, keys - step.new) // step.page_size * step.page_size
        problem: Problem = DecodeAttention(
            kv_lens=(keys,) * step.batch, **shape, q_len=step.new, page_size=step.page_size, shared_prefix=shared, **features
        )
        return drafted(role, problem, {"batch": step.batch, "q_len": step.new, "kv_len": keys, **shape, "window": window})
    if a.cross:
        crossed = PrefillAttention((step.new,) * step.batch, **shape, kv_tokens=(keys,) * step.batch, causal=False, dtype=step.dtype)
        return drafted(role, crossed, {"batch": step.batch, "q_len": step.new, "kv_len": keys, **shape, "causal": False})
    pieces = [(step.new, keys - step.new)]
    if a.chunk and keys > a.chunk:
        pieces = _chunks(step.prefix, step.new, a.chunk)
    q_lens = tuple(q for q, _ in pieces) * step.batch
    prefixes = tuple(prefix for _, prefix in pieces) * step.batch
    cached = any(prefixes)
    if not a.causal:
        features["window"] = 0
    if not a.causal or (not cached and not step.kv_dtype):
        features["kv_dtype"] = ""
    # Behind a cached prefix the keys are read where they lie: in the pages of the cache.
    problem = PrefillAttention(
        q_lens,
        **shape,
        prefix_lens=prefixes if cached else (),
        causal=a.causal,
        page_size=step.page_size if cached else 0,
        **features,
    )
    full_shape = {
        "batch": len(q_lens),
        "q_len": q_lens[0],
        "kv_len": q_lens[0] + prefixes[0],
        **shape,
        "causal": a.causal,
        "window": features["window"],
    }
    return drafted(role, problem, full_shape)


def _chunks(prefix: int, new: int, chunk: int) -> list[tuple[int, int]]:
    """(new tokens, earlier tokens of the same chunk) of every chunk that tokens prefix..prefix + new - 1 touch."""
    pieces, at = [], prefix
    while at < prefix + new:
        end = min((at // chunk + 1) * chunk, prefix + new)
        pieces.append((end - at, at % chunk))
        at = end
    return pieces


def latent_rows(a: LatentAttention, hidden: int, step: Step) -> list[Draft]:
    """Multi-head latent attention: spread out to full heads in prefill, on the latents themselves in decode.

    Where an indexer picks fewer keys than there are, the latents are attended to sparsely, in prefill too.
    """
    heads = shard(a.heads, step.tp, "attention heads")
    sparse = bool(a.index_topk) and step.context > a.index_topk
    absorbed = step.decodes or sparse
    matrices = [m for m in mixer_matrices(a, hidden, step.tp) if not (absorbed and m.role == "kv_b_proj")]
    # In prefill the latents of the whole context are spread out, those of a cached prefix again.
    before, after = _split(replace(step, source=step.context).matrices(matrices))
    drafts = [step.normed("norm", step.tokens, hidden, residual=True), *before]
    drafts += [step.normed("latent_norm", step.tokens, rank, kind="rms") for rank in (a.q_lora_rank, a.kv_lora_rank) if rank]
    cache = RopeCache(
        step.tokens,
        heads,
        1,
        a.rope_dim,
        latent=a.kv_lora_rank,
        interleaved=True,
        page_size=LATENT_PAGE,
        kv_dtype="" if a.index_topk else step.kv_dtype,
        dtype=step.dtype,
    )
    drafts.append(drafted("rope_and_cache", cache))
    if a.index_topk:
        drafts += _indexer(a, step)
    if not absorbed:
        problem: Problem = PrefillAttention(
            (step.new,) * step.batch,
            heads,
            heads,
            a.qk_dim,
            prefix_lens=(step.prefix,) * step.batch if step.prefix else (),
            head_dim_v=a.v_dim,
            dtype=step.dtype,
        )
        shape = {"batch": step.batch, "q_len": step.new, "kv_len": step.context, "heads": heads, "kv_heads": heads}
        return [*drafts, drafted("attention", problem, {**shape, "head_dim": a.qk_dim, "head_dim_v": a.v_dim}), *after]
    ranks: dict[str, Any] = {
        "heads": heads,
        "kv_lora_rank": a.kv_lora_rank,
        "rope_dim": a.rope_dim,
        "qk_dim": a.qk_dim,
        "page_size": LATENT_PAGE,
    }
    if sparse:
        problem = SparseLatentAttention(step.tokens, step.context, a.index_topk, **ranks, sequences=step.batch, dtype=step.dtype)
    else:
        problem = LatentProblem((step.context,) * step.batch, **ranks, q_len=step.new, dtype=step.dtype, kv_dtype=step.kv_dtype)
    full = {"batch": step.batch, "q_len": step.new, "kv_len": step.context, "heads": heads, "latent": a.kv_lora_rank, "rope": a.rope_dim}
    return [
        *drafts,
        _per_head("q_absorb", step, heads, a.kv_lora_rank, a.nope_dim),
        drafted("attention", problem, {**full, "topk": a.index_topk} if sparse else full),
        _per_head("v_absorb", step, heads, a.v_dim, a.kv_lora_rank),
        *after,
    ]


def _per_head(role: str, step: Step, heads: int, n: int, k: int) -> Draft:
    """One small matrix per head: [heads] x (tokens, k) @ (k, n)."""
    return drafted(role, BatchedMatmul(heads, step.tokens, n, k, step.dtype))


def _indexer(a: LatentAttention, step: Step) -> list[Draft]:
    """Scores of every visible key by small heads, then the choice of the best."""
    # DeepSeek V3.2 scores in fp8, over pages of its own cache.
    scores = IndexScores(step.batch, step.new, step.context, a.index_heads, a.index_dim, step.dtype, format="fp8", page_size=LATENT_PAGE)
    drafts = [drafted("index_scores", scores)]
    if step.context > a.index_topk:
        # Of one sequence, each row sees one key more than the row before.
        triangle = not step.decodes and step.batch == 1
        drafts.append(drafted("index_topk", TopkSelect(step.tokens, step.context, a.index_topk, causal=triangle)))
    return drafts


def linear_attention_rows(a: LinearAttention, hidden: int, step: Step) -> list[Draft]:
    """Gated delta net: projections, a short convolution, the recurrence, a gated norm."""
    key_heads = shard(a.key_heads, step.tp, "linear-attention key heads")
    heads = shard(a.value_heads, step.tp, "linear-attention value heads")
    before, after = _split(step.matrices(mixer_matrices(a, hidden, step.tp)))
    channels = 2 * key_heads * a.key_dim + heads * a.value_dim
    lens = (step.new,) * step.batch
    shape = {"batch": step.batch, "q_len": step.new}
    recurrence = GatedDeltaRule(lens, key_heads, heads, a.key_dim, a.value_dim, dtype=step.dtype, state_dtype=a.state_dtype)
    heads_shape = {"heads": heads, "key_dim": a.key_dim, "value_dim": a.value_dim}
    return [
        step.normed("norm", step.tokens, hidden, residual=True),
        *before,
        drafted("short_conv", CausalConv1d(lens, channels, a.conv_width, dtype=step.dtype), {**shape, "channels": channels}),
        drafted("linear_attention", recurrence, {**shape, **heads_shape}),
        step.normed("gated_norm", step.tokens * heads, a.value_dim, kind="rms", gated=True),
        *after,
    ]
