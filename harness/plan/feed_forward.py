"""Rows of the feed-forward part: dense, or a mixture of experts."""

from __future__ import annotations

from klab.harness.catalog.architecture import Experts, Mlp
from klab.harness.catalog.matrices import Matrix, mlp_matrices, shard
from klab.harness.plan.step import Draft, Step, drafted
from klab.kernels.fused_moe.problem import FusedMoe
from klab.kernels.topk_routing.problem import TopkRouting

# gpt-oss clamps gate and up at 7 (swiglu_limit of its configuration).
SWIGLU_LIMIT = 7.0


def feed_forward_rows(mlp: Mlp | Experts | None, hidden: int, step: Step) -> list[Draft]:
    """Norm, then the matrices with the activation between them, and the all-reduce."""
    if mlp is None:
        return []
    norm = step.normed("norm", step.tokens, hidden, residual=True)
    if isinstance(mlp, Mlp):
        return [norm, *_dense(mlp_matrices(mlp, hidden, step.tp), mlp, step, reduce=True)]
    return [norm, *_mixture(mlp, hidden, step)]


def _dense(matrices: list[Matrix], mlp: Mlp | Experts, step: Step, *, reduce: bool) -> list[Draft]:
    """Up, activation, down."""
    up, down = step.matrices(matrices[:1]), step.matrices(matrices[1:], reduce=reduce)
    rows = step.rows_of(matrices[0].stream)
    return [*up, step.activated("activation", rows, matrices[1].k, mlp.activation, gated=mlp.gated), *down]


def _mixture(e: Experts, hidden: int, step: Step) -> list[Draft]:
    always = {m.role: m for m in mlp_matrices(e, hidden, step.tp)}
    drafts = step.matrices([always["router"]])
    routing = TopkRouting(
        step.tokens,
        e.experts,
        e.top_k,
        e.scoring,
        groups=e.groups,
        topk_groups=e.topk_groups,
        renormalize=e.renormalize,
        # Routers with sigmoid scores are balanced by a bias that only the choice sees (DeepSeek V3 and those after it; not Llama 4).
        bias=e.scoring == "sigmoid" and e.renormalize,
        dtype=step.dtype,
    )
    drafts.append(drafted("routing", routing))
    shared = [m for role, m in always.items() if role.startswith("shared_") and role != "shared_gate"]
    if shared:  # one all-reduce at the end sums the shared and the routed part
        drafts += _dense(shared, e, step, reduce=False)
    if "shared_gate" in always:
        drafts += step.matrices([always["shared_gate"]])
    drafts.append(drafted("experts", routed_experts(e, hidden, step)))
    return drafts + step.all_reduce(step.tokens, hidden)


def routed_experts(e: Experts, hidden: int, step: Step) -> FusedMoe:
    """The routed experts of one GPU: with expert parallelism whole experts (and, routed evenly, its share of the visits), else slices."""
    return FusedMoe(
        step.tokens,
        hidden,
        e.intermediate if step.expert_parallel else shard(e.intermediate, step.tp, "intermediate features"),
        e.experts,
        e.top_k,
        dtype=step.dtype,
        local_experts=shard(e.experts, step.tp, "experts") if step.expert_parallel and step.tp > 1 else 0,
        gated=e.gated,
        swiglu_limit=SWIGLU_LIMIT if e.activation == "swiglu_clamped" else 0.0,
    )
