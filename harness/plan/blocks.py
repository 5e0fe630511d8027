"""Rows of the blocks that only diffusion transformers have."""

from __future__ import annotations

from klab.harness.catalog.architecture import JointAttention, ParallelBlock
from klab.harness.catalog.matrices import mixer_matrices, shard
from klab.harness.plan.feed_forward import activation
from klab.harness.plan.step import Draft, Step
from klab.kernels.prefill_attention.problem import PrefillAttention


def joint_rows(a: JointAttention, hidden: int, step: Step) -> list[Draft]:
    """A double block: image and text tokens apart, but for the attention over both."""
    drafts = step.matrices(mixer_matrices(a, hidden, step.tp))
    intermediate = shard(a.intermediate, step.tp, "intermediate features")
    for stream, prefix in (("tokens", "image_"), ("text", "text_")):
        rows = step.rows_of(stream)
        # Scale and shift by the modulation, twice each.
        drafts.append(step.element_wise(prefix + "norm", "norm", 2 * rows, hidden, passes=2, flops=8))
        drafts.append(activation(prefix + "activation", rows, intermediate, False, step))
    return [*drafts, *_attention(a.heads, a.head_dim, step)]


def parallel_rows(a: ParallelBlock, hidden: int, step: Step) -> list[Draft]:
    """A single block: attention and MLP side by side over image and text tokens."""
    rows = step.rows_of("all")
    return [
        step.element_wise("norm", "norm", rows, hidden, passes=2, flops=8),
        *step.matrices(mixer_matrices(a, hidden, step.tp)),
        activation("activation", rows, shard(a.intermediate, step.tp, "intermediate features"), False, step),
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
        step.element_wise("qk_norm", "norm", rows, 2 * heads * head_dim, passes=2, flops=4),
        step.element_wise("rope", "rope", rows, 2 * heads * head_dim, passes=2, flops=3),
        Draft("attention", problem.operator, shape, problem.flops(), problem.bytes_moved(), problem=problem),
    ]
