"""Rows of the feed-forward part: dense, or a mixture of experts."""

from __future__ import annotations

from klab.harness.catalog.architecture import Experts, Mlp
from klab.harness.catalog.matrices import Matrix, expert_matrices, mlp_matrices, shard
from klab.harness.plan.step import Draft, Step, no_kernel


def feed_forward_rows(mlp: Mlp | Experts | None, hidden: int, step: Step) -> list[Draft]:
    """Norm, then the matrices with the activation between them, and the all-reduce."""
    if mlp is None:
        return []
    norm = step.element_wise("norm", "norm", step.tokens, hidden, passes=4, flops=6)
    if isinstance(mlp, Mlp):
        return [norm, *_dense(mlp_matrices(mlp, hidden, step.tp), mlp.gated, step, reduce=True)]
    return [norm, *_mixture(mlp, hidden, step)]


def _dense(matrices: list[Matrix], gated: bool, step: Step, *, reduce: bool) -> list[Draft]:
    """Up, activation, down."""
    up, down = step.matrices(matrices[:1]), step.matrices(matrices[1:], reduce=reduce)
    return [*up, activation("activation", step.rows_of(matrices[0].stream), matrices[1].k, gated, step), *down]


def activation(role: str, rows: int, width: int, gated: bool, step: Step) -> Draft:
    """SwiGLU reads gate and up and writes one; a plain activation reads and writes one."""
    return step.element_wise(role, "gated_activation" if gated else "activation", rows, width, passes=3 if gated else 2, flops=5)


def _mixture(e: Experts, hidden: int, step: Step) -> list[Draft]:
    always = {m.role: m for m in mlp_matrices(e, hidden, step.tp)}
    drafts = step.matrices([always["router"]])
    drafts.append(
        Draft("topk", "topk", {"tokens": step.tokens, "of": e.experts}, 0.0, 4.0 * step.tokens * e.experts, why=no_kernel("topk"))
    )
    shared = [m for role, m in always.items() if role.startswith("shared_") and role != "shared_gate"]
    if shared:  # one all-reduce at the end sums the shared and the routed part
        drafts += _dense(shared, e.gated, step, reduce=False)
    if "shared_gate" in always:
        drafts += step.matrices([always["shared_gate"]])
    # Expert parallelism: each GPU has whole experts and, with balanced routing, its share of the visits.
    spread = step.tp if step.expert_parallel else 1
    local = shard(e.experts, spread, "experts")
    visits = step.tokens * e.top_k / spread
    hit = experts_hit(e, step.tokens) / spread
    matrices = expert_matrices(e, hidden, 1 if step.expert_parallel else step.tp)
    drafts.append(_grouped(matrices[0], step, local, e.top_k, visits, hit))
    rows = max(1, round(visits))
    drafts.append(activation("experts_activation", rows, matrices[1].k, e.gated, step))
    drafts.append(_grouped(matrices[1], step, local, e.top_k, visits, hit))
    drafts.append(step.element_wise("experts_sum", "moe_sum", rows, hidden, passes=1 + 1 / e.top_k, flops=2))
    return drafts + step.all_reduce(step.tokens, hidden)


def experts_hit(e: Experts, tokens: int) -> float:
    """Experts that at least one of `tokens` tokens visits, expected under even routing: E (1 - (1 - k/E)^tokens)."""
    return float(e.experts * (1.0 - (1.0 - e.top_k / e.experts) ** tokens))


def _grouped(matrix: Matrix, step: Step, experts: int, top_k: int, visits: float, hit: float) -> Draft:
    """One matrix per expert, each applied to the tokens that visit it; only the weights of visited experts are read."""
    flops = 2.0 * visits * matrix.n * matrix.k
    moved = step.size * (hit * matrix.n * matrix.k + visits * (matrix.n + matrix.k))
    shape = {"tokens": step.tokens, "experts": experts, "top_k": top_k, "n": matrix.n, "k": matrix.k, "experts_hit": round(hit, 1)}
    return Draft(matrix.role, "grouped_matmul", shape, flops, moved, why=no_kernel("grouped_matmul"))
