"""Sets of inputs and outputs that a timed launch walks through, so that the state of the last-level cache is known and not hoped for."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

from klab.kernels.contract import Problem, Tensors

# A set is cold again when five caches' worth of other sets lie between its uses. Rotating too few moved latencies by 36%
# (flashinfer issue 4468).
CACHE_MULTIPLE = 5


@dataclass(frozen=True)
class Plan:
    """How many sets there are, and what that makes of the cache: "cold", "warm", "flush" or "unproven"."""

    count: int
    l2_state: str


def set_bytes(problem: Problem) -> tuple[int, int]:
    """(bytes stored, bytes surely touched by a launch) of one set of inputs and outputs, without allocating them."""
    tensors = [*problem.inputs(seed=0, device="meta").values(), *problem.outputs(device="meta").values()]
    stored = sum(t.numel() * t.element_size() for t in tensors)
    # A sliding window reads a part of its cache only: what is not touched evicts nothing.
    return stored, max(1, min(stored, int(problem.bytes_moved())))


def plan(*, stored: int, touched: int, l2: str, l2_bytes: int, memory_bytes: int, max_sets: int, can_flush: bool) -> Plan:
    """As many sets as prove the cache cold: between two uses of a set the others touch more than CACHE_MULTIPLE caches.

    Where memory or `max_sets` does not allow that, the cache is to be flushed between launches, or (where nothing can flush) as many
    sets as fit are used and the state is called unproven.
    """
    if l2 == "warm":
        return Plan(1, "warm")
    needed = math.ceil(CACHE_MULTIPLE * l2_bytes / touched) + 1
    possible = min(max_sets, memory_bytes // max(stored, 1))
    if needed <= possible:
        return Plan(needed, "cold")
    return Plan(1, "flush") if can_flush else Plan(max(1, possible), "unproven")


@dataclass(frozen=True)
class Rotation:
    """The sets, shared by all contestants of one problem, so that they meet the same data at the same addresses.

    Two data sets are drawn at random, `originals`; the first set is the one and the last the other. Those between are copies: what
    matters to a cache is the address, and copying is ten times as fast as drawing. With one set only, the second original lies apart.
    """

    inputs: list[Tensors]
    outputs: list[Tensors]
    originals: tuple[Tensors, ...]
    l2_state: str

    def __len__(self) -> int:
        return len(self.inputs)

    @classmethod
    def make(cls, problem: Problem, how: Plan, *, seed: int, device: str) -> Rotation:
        """Allocate and fill. The seeds lie 1000 apart, because a problem uses seed, seed + 1, ... for its tensors."""
        originals = tuple(problem.inputs(seed=seed + 1000 * i, device=device) for i in range(2))
        between = [{name: t.clone() for name, t in originals[i % 2].items()} for i in range(how.count - 2)]
        inputs = [originals[0], *between, originals[1]][: how.count]
        return cls(inputs, [problem.outputs(device=device) for _ in range(how.count)], originals, how.l2_state)

    @property
    def ends(self) -> dict[int, int]:
        """The sets that are verified, each with the number of the original that it holds: the first and the last."""
        return {0: 0} if len(self) == 1 else {0: 0, len(self) - 1: 1}


def segments(sets: int, launches: int) -> list[list[int]]:
    """Split a walk through all sets into graphs of about `launches` launches each, to be replayed one after another for ever.

    The walk 0, 1, 2, ... (modulo `sets`) never breaks, also where the last graph is followed by the first: the total is a whole number
    of rounds through the sets. (3 sets, 10 launches) -> one graph of 12; (100 sets, 10 launches) -> ten graphs of 10.
    """
    if sets <= launches:
        return [[i % sets for i in range(sets * math.ceil(launches / sets))]]
    pieces = max(1, sets // launches)
    bounds = [round(i * sets / pieces) for i in range(pieces + 1)]
    return [list(range(a, b)) for a, b in itertools.pairwise(bounds)]
