"""Rows of the blocks that only diffusion transformers have."""

from __future__ import annotations

from klab.harness.catalog.architecture import JointAttention, ParallelBlock
from klab.harness.catalog.matrices import mixer_matrices, shard
from klab.harness.plan.step import Draft, Step, drafted
from klab.kernels.prefill_attention.problem import PrefillAttention
from klab.kernels.rope_cache.problem import RopeCache


def joint_rows(a: JointAttention, hidden: int, step: Step) -> list[Draft]:
    """A double block: image and text tokens apart, but for the attention over both."""
    drafts = step.matrices(mixer_matrices(a, hidden, step.tp))
    intermediate = shard(a.intermediate, step.tp, "intermediate features")
    for stream, prefix in (("tokens", "image_"), ("text", "text_")):
        rows = step.rows_of(stream)
        # Each is followed by a scale and a shift, which engines fuse into it.
        drafts += [step.normed(prefix + "norm", rows, hidden)] * 2
        drafts.append(step.activated(prefix + "activation", rows, intermediate, "gelu_tanh", gated=False))
    return [*drafts, *_attention(a.heads, a.head_dim, step)]


def parallel_rows(a: ParallelBlock, hidden: int, step: Step) -> list[Draft]:
    """A single block: attention and MLP side by side over image and text tokens."""
    rows = step.rows_of("all")
    return [
        step.normed("norm", rows, hidden),
        *step.matrices(mixer_matrices(a, hidden, step.tp)),
        step.activated("activation", rows, shard(a.intermediate, step.tp, "intermediate features"), "gelu_tanh", gated=False),
        *_attention(a.heads, a.head_dim, step),
    ]


def _attention(all_heads: int, head_dim: int, step: Step) -> list[Draft]:
    """Norm and positions of queries and keys, then full attention over text and image tokens."""
    heads, tokens = shard(all_heads, step.tp, "attention heads"), step.text + step.new
    rows = step.rows_of("all")
    problem = PrefillAttention((tokens,) * step.batch, heads, heads, head_dim, causal=False, dtype=step.dtype)
    shape = {
        "batch": step.batch,
        "q_len": tokens,
        "kv_len": tokens,
        "heads": heads,
        "kv_heads": heads,
        "head_dim": head_dim,
        "causal": False,
    }
    return [
        step.normed("qk_norm", rows * 2 * heads, head_dim, kind="rms"),
        drafted("rope", RopeCache(rows, heads, heads, head_dim, cache=False, interleaved=True, dtype=step.dtype)),
        drafted("attention", problem, shape),
    ]
