"""How tokens choose experts in klab's mixtures of experts: seeded, skewed as asked, and with exact expectations.

Expert e is chosen by a token with the probability `inclusion(...)[e]`, independently of all other tokens, and the experts of one token are
distinct. That makes the expected number of experts that a step visits exact (`experts_hit`), so that bounds are known before any
routing is drawn. It imports without torch.
"""

from __future__ import annotations

from functools import cache
from math import gcd
from typing import TYPE_CHECKING

from klab.kernels.errors import UsageError

if TYPE_CHECKING:
    import torch

GOLDEN = 0.6180339887498949


@cache
def inclusion(experts: int, top_k: int, skew: float) -> tuple[float, ...]:
    """Per expert, the probability that a token chooses it: proportional to rank^-skew (Zipf), at most 1, top_k in sum.

    Popular experts are spread over the indices by a stride near the golden section, so that every shard of them has some.
    """
    stride = max(1, round(experts * GOLDEN))
    while gcd(stride, experts) > 1:
        stride += 1
    weights = [(1.0 + rank) ** -skew for rank in range(experts)]
    by_rank, left, rest = [1.0] * experts, float(top_k), sum(weights)
    for rank, weight in enumerate(weights):
        if left * weight < rest:  # from here on nobody is chosen by every token
            by_rank[rank:] = [left * w / rest for w in weights[rank:]]
            break
        left, rest = left - 1.0, rest - weight
    found = [0.0] * experts
    for rank, probability in enumerate(by_rank):
        found[rank * stride % experts] = probability
    return tuple(found)


def experts_hit(tokens: int, experts: int, top_k: int, skew: float = 0.0, local: int = 0) -> float:
    """Expected number of the first `local` experts (0: of all) that at least one of `tokens` tokens chooses."""
    return sum(1.0 - (1.0 - p) ** tokens for p in inclusion(experts, top_k, skew)[: local or experts])


def local_share(experts: int, top_k: int, skew: float = 0.0, local: int = 0) -> float:
    """Expected number of a token's choices that fall on the first `local` experts (0: on all, which gives top_k)."""
    return sum(inclusion(experts, top_k, skew)[: local or experts])


def draw_experts(tokens: int, experts: int, top_k: int, skew: float, *, seed: int, device: str) -> torch.Tensor:
    """int32 [tokens, top_k]: distinct experts per token, in random order.

    Systematic sampling over a fresh random order of the experts per token: cumulated probabilities that cross u, u + 1, ... are chosen,
    which gives every expert exactly its probability.
    """
    import torch

    generator = torch.Generator(device=device).manual_seed(seed)
    order = torch.rand((tokens, experts), generator=generator, device=device).argsort(dim=1)
    probability = torch.tensor(inclusion(experts, top_k, skew), dtype=torch.float64, device=device)
    ends = probability[order].cumsum(dim=1)
    ends[:, -1] = top_k  # whatever the rounding of the sum
    start = torch.rand((tokens, 1), generator=generator, device=device, dtype=torch.float64)
    crossed = (ends + start).floor()
    chosen = torch.diff(crossed, dim=1, prepend=torch.zeros_like(crossed[:, :1])) > 0
    # Rounding aside exactly top_k are chosen; a stable sort takes the first of them in this token's order either way.
    first = (~chosen).to(torch.uint8).argsort(dim=1, stable=True)[:, :top_k]
    return order.gather(1, first).to(torch.int32)


def with_rows_apart(tensor: torch.Tensor, row_padding: int) -> torch.Tensor:
    """The same values as a view whose rows lie `row_padding` elements further apart than they are long."""
    if not row_padding:
        return tensor
    padded = tensor.new_empty((*tensor.shape[:-1], tensor.shape[-1] + row_padding))
    if tensor.device.type != "meta":
        padded.fill_(7.0)  # no kernel may use it
        padded[..., : tensor.shape[-1]] = tensor
    return padded[..., : tensor.shape[-1]]


def need_choices(operator: str, experts: int, top_k: int) -> None:
    """UsageError unless a token can choose `top_k` distinct experts."""
    if not 1 <= top_k <= experts:
        raise UsageError(f"{operator} needs 1 <= top_k <= experts, not {top_k} of {experts}")


def most_blocks(choices: int, local: int, block_m: int) -> int:
    """The most blocks of block_m rows that sorting can give: every visited expert wastes all but one row of its last block."""
    visited = min(choices, local)
    return visited + (choices - visited) // block_m
