"""Rows of the token mixers of a decoder: grouped, latent and linear attention."""

from __future__ import annotations

from dataclasses import replace

from klab.harness.catalog.architecture import Attention, LatentAttention, LinearAttention
from klab.harness.catalog.matrices import kv_shard, mixer_matrices, shard
from klab.harness.plan.step import Draft, Step, no_kernel
from klab.kernels.contract import Problem
from klab.kernels.decode_attention.problem import DecodeAttention
from klab.kernels.dtypes import SIZE_BYTES
from klab.kernels.prefill_attention.problem import PrefillAttention


def attention_rows(a: Attention, hidden: int, step: Step) -> list[Draft]:
    """Projections, norm of queries and keys, rotary positions with the write to the cache, and the attention itself."""
    before, after = _split(step.matrices(mixer_matrices(a, hidden, step.tp)))
    heads, kv_heads = shard(a.heads, step.tp, "attention heads"), kv_shard(a.kv_heads, step.tp)
    drafts = [step.element_wise("norm", "norm", step.tokens, hidden, passes=4, flops=6), *before]
    width = heads * a.head_dim if a.cross else (heads + kv_heads) * a.head_dim
    if a.qk_norm:
        drafts.append(step.element_wise("qk_norm", "norm", step.tokens, width, passes=2, flops=4))
    if a.rotary and not a.cross:
        # Reads q, k, v, writes q and the cache's k and v: v is moved but not turned.
        drafts.append(step.element_wise("rope_and_cache", "rope", step.tokens, width + kv_heads * a.head_dim, passes=2, flops=3))
    elif a.causal and not a.cross:
        drafts.append(step.element_wise("cache_write", "cache_write", step.tokens, 2 * kv_heads * a.head_dim, passes=2, flops=0))
    drafts.append(softmax_attention(a, heads, kv_heads, step))
    if a.output_gate:
        drafts.append(step.element_wise("output_gate", "activation", step.tokens, heads * a.head_dim, passes=3, flops=4))
    return drafts + after


def _split(drafts: list[Draft]) -> tuple[list[Draft], list[Draft]]:
    """What comes before the attention and what after it (the output projection and its all-reduce)."""
    at = next(i for i, draft in enumerate(drafts) if draft.role.endswith(("o_proj", "out_proj")))
    return drafts[:at], drafts[at:]


def softmax_attention(a: Attention, heads: int, kv_heads: int, step: Step) -> Draft:
    """The attention of one rank as the operator that can express it."""
    role = "cross_attention" if a.cross else "attention"
    keys = (a.source_tokens or step.source) if a.cross else step.context
    window = a.window if a.window < keys else 0
    shape = {"heads": heads, "kv_heads": kv_heads, "head_dim": a.head_dim}
    if step.decodes:
        if a.chunk and not a.cross:  # only the tokens of the current chunk are seen
            keys = max((keys - 1) % a.chunk + 1, step.new)
        problem: Problem = DecodeAttention(
            kv_lens=(keys,) * step.batch, **shape, q_len=step.new, page_size=step.page_size, dtype=step.dtype, window=window
        )
        return _drafted(role, problem, {"batch": step.batch, "q_len": step.new, "kv_len": keys, **shape, "window": window})
    if a.cross and keys < step.new:
        # PrefillAttention's queries are the last of its keys, so it cannot have fewer keys than queries.
        pairs, elements = step.tokens * keys, step.tokens * heads + step.batch * keys * kv_heads
        full = {"batch": step.batch, "q_len": step.new, "kv_len": keys, **shape}
        flops, moved = 4.0 * pairs * heads * a.head_dim, 2.0 * step.size * elements * a.head_dim
        return Draft(role, "cross_attention", full, flops, moved, why=no_kernel("cross_attention"))
    pieces = [(step.new, keys - step.new)]
    if a.chunk and keys > a.chunk:
        pieces = _chunks(step.prefix, step.new, a.chunk)
    q_lens = tuple(q for q, _ in pieces) * step.batch
    prefixes = tuple(prefix for _, prefix in pieces) * step.batch
    problem = PrefillAttention(
        q_lens, **shape, prefix_lens=prefixes if any(prefixes) else (), causal=a.causal, dtype=step.dtype, window=window if a.causal else 0
    )
    full_shape = {
        "batch": len(q_lens),
        "q_len": q_lens[0],
        "kv_len": q_lens[0] + prefixes[0],
        **shape,
        "causal": a.causal,
        "window": window,
    }
    return _drafted(role, problem, full_shape)


def _chunks(prefix: int, new: int, chunk: int) -> list[tuple[int, int]]:
    """(new tokens, earlier tokens of the same chunk) of every chunk that tokens prefix..prefix + new - 1 touch."""
    pieces, at = [], prefix
    while at < prefix + new:
        end = min((at // chunk + 1) * chunk, prefix + new)
        pieces.append((end - at, at % chunk))
        at = end
    return pieces


def _drafted(role: str, problem: Problem, shape: dict[str, int]) -> Draft:
    return Draft(role, problem.operator, shape, problem.flops(), problem.bytes_moved(), problem=problem)


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
    drafts = [step.element_wise("norm", "norm", step.tokens, hidden, passes=4, flops=6), *before]
    latent = a.kv_lora_rank + a.rope_dim
    drafts.append(step.element_wise("latent_norm", "norm", step.tokens, a.q_lora_rank + a.kv_lora_rank, passes=2, flops=4))
    drafts.append(step.element_wise("rope_and_cache", "rope", step.tokens, heads * a.rope_dim + latent, passes=2, flops=3))
    if a.index_topk:
        drafts += _indexer(a, step)
    if not absorbed:
        problem = PrefillAttention(
            (step.new,) * step.batch,
            heads,
            heads,
            a.qk_dim,
            prefix_lens=(step.prefix,) * step.batch if step.prefix else (),
            head_dim_v=a.v_dim,
            dtype=step.dtype,
        )
        shape = {"batch": step.batch, "q_len": step.new, "kv_len": step.context, "heads": heads, "kv_heads": heads}
        return [*drafts, _drafted("attention", problem, {**shape, "head_dim": a.qk_dim, "head_dim_v": a.v_dim}), *after]
    operator = "sparse_latent_attention" if sparse else "latent_attention"
    pairs = sum(min(step.prefix + t + 1, a.index_topk or step.context) for t in range(step.new)) * step.batch
    # Each key of the cache is read once; a sparse step of few queries reads only what they picked.
    keys = min(step.batch * step.context, pairs) if sparse else step.batch * step.context
    moved = step.size * (keys * latent + step.tokens * heads * (latent + a.kv_lora_rank))
    full = {"batch": step.batch, "q_len": step.new, "kv_len": step.context, "heads": heads, "latent": a.kv_lora_rank, "rope": a.rope_dim}
    flops = 2.0 * pairs * heads * (latent + a.kv_lora_rank)
    return [
        *drafts,
        _per_head("q_absorb", step, heads, a.kv_lora_rank, a.nope_dim),
        Draft("attention", operator, {**full, "topk": a.index_topk} if sparse else full, flops, moved, why=no_kernel(operator)),
        _per_head("v_absorb", step, heads, a.v_dim, a.kv_lora_rank),
        *after,
    ]


def _per_head(role: str, step: Step, heads: int, n: int, k: int) -> Draft:
    """One small matrix per head: [heads] x (tokens, k) @ (k, n)."""
    m = step.tokens
    moved = float(step.size * heads * (m * k + n * k + m * n))
    shape = {"batch": heads, "m": m, "n": n, "k": k}
    return Draft(role, "batched_matmul", shape, 2.0 * heads * m * n * k, moved, why=no_kernel("batched_matmul"))


def _indexer(a: LatentAttention, step: Step) -> list[Draft]:
    """Scores of every visible key by small heads, then the choice of the best."""
    pairs = step.batch * (step.new * step.prefix + step.new * (step.new + 1) // 2)
    moved = step.size * a.index_dim * (step.batch * step.context + step.tokens * a.index_heads) + 4.0 * pairs
    shape = {"tokens": step.tokens, "kv_len": step.context, "heads": a.index_heads, "head_dim": a.index_dim}
    return [
        Draft("index_scores", "index_scores", shape, 2.0 * pairs * a.index_heads * a.index_dim, moved, why=no_kernel("index_scores")),
        Draft("index_topk", "topk", {"tokens": step.tokens, "of": step.context}, 0.0, 4.0 * pairs, why=no_kernel("topk")),
    ]


def linear_attention_rows(a: LinearAttention, hidden: int, step: Step) -> list[Draft]:
    """Gated delta net: projections, a short convolution, the recurrence, a gated norm."""
    key_heads = shard(a.key_heads, step.tp, "linear-attention key heads")
    heads = shard(a.value_heads, step.tp, "linear-attention value heads")
    before, after = _split(step.matrices(mixer_matrices(a, hidden, step.tp)))
    channels = 2 * key_heads * a.key_dim + heads * a.value_dim
    state = heads * a.key_dim * a.value_dim
    # Per token and head: decay the state, read it at k, add the correction, read it at q: 1 + 2 + 2 + 2 per element of the state.
    flops = 7.0 * step.tokens * state + 2.0 * a.conv_width * step.tokens * channels
    moved = step.size * step.tokens * (channels + heads * (a.value_dim + 2)) + 2.0 * step.batch * state * SIZE_BYTES.get(a.state_dtype, 4)
    shape = {"batch": step.batch, "q_len": step.new, "heads": heads, "key_dim": a.key_dim, "value_dim": a.value_dim}
    return [
        step.element_wise("norm", "norm", step.tokens, hidden, passes=4, flops=6),
        *before,
        Draft("linear_attention", "gated_delta_net", shape, flops, moved, why=no_kernel("gated_delta_net")),
        step.element_wise("gated_norm", "norm", step.tokens, heads * a.value_dim, passes=3, flops=8),
        *after,
    ]
