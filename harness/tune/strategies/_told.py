"""What the strategies without a model share: what was asked, what is known, and how to draw what was not asked yet."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np

from klab.harness.tune.space import Space
from klab.harness.tune.strategy import Evaluation, Prior, without

# Random draws in a row that may hit candidates already asked, before the rest is enumerated.
_DRAWS = 64


class Told:
    """A candidate is `asked` from the moment it is put into an ask; `value` holds full measurements, infinite where they failed."""

    def __init__(self, space: Space, seed: int, prior: Prior) -> None:
        self.space = space
        self.rng = np.random.default_rng(seed)
        self.asked: set[int] = set()
        self.value: dict[int, float] = {}
        self.seeds = without(prior.seeds, set())
        if prior.expected is not None:
            known = np.where(np.isfinite(prior.expected), prior.expected, np.inf)
            best = np.argsort(known, kind="stable")[:4]
            self.seeds = without([*self.seeds, *(int(c) for c in best if np.isfinite(known[c]))], set())

    def take(self, candidates: Iterable[int]) -> tuple[int, ...]:
        """Those not asked before, now asked."""
        fresh = tuple(without(candidates, self.asked))
        self.asked.update(fresh)
        return fresh

    def hear(self, evaluations: Sequence[Evaluation]) -> None:
        """Note full measurements."""
        self.value.update({e.candidate: e.value if e.ok else math.inf for e in evaluations if not e.rounds})

    def fresh(self) -> int | None:
        """A candidate not asked yet, at random; None when all were."""
        count = len(self.space)
        if len(self.asked) >= count:
            return None
        for _ in range(_DRAWS):
            drawn = int(self.rng.integers(count))
            if drawn not in self.asked:
                return drawn
        left = np.ones(count, dtype=bool)
        left[list(self.asked)] = False
        return int(self.rng.choice(np.flatnonzero(left)))

    def start(self, count: int) -> tuple[int, ...]:
        """Seeds first, then random candidates, `count` or as many as there are; they are asked now."""
        first = list(self.take(without(self.seeds, self.asked)[:count]))
        while len(first) < count and (drawn := self.fresh()) is not None:
            first += self.take([drawn])
        return tuple(first)
