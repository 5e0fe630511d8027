"""Iterated local search: descend to a minimum by first improvement, then jump a few parameters away from it and descend again."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from klab.harness.tune.space import ABSENT, Space
from klab.harness.tune.strategies._told import Told
from klab.harness.tune.strategy import Ask, Evaluation, Prior, strategy


@strategy("local")
class LocalSearch:
    """Multi-start local search with kicks: adjacent values first, then every value of one parameter; start anew when kicks stop helping."""

    START, BATCH, KICKS = 8, 4, 6

    def __init__(self, space: Space, seed: int, prior: Prior) -> None:
        self._told = Told(space, seed, prior)
        self._here: int | None = None
        self._home: int | None = None
        self._ahead: list[int] = []
        self._failed_kicks = 0
        self._started = False

    def ask(self) -> Ask:
        """A few neighbours of where the search stands; where none is left, candidates at a distance."""
        told = self._told
        if not self._started:
            self._started = True
            return Ask(told.start(self.START))
        if self._here is None:
            return Ask(told.start(self.BATCH))
        batch = told.take(self._ahead[: self.BATCH])
        while not batch:
            self._ahead = self._ahead[self.BATCH :]
            if not self._ahead:
                return self._leave()
            batch = told.take(self._ahead[: self.BATCH])
        return Ask(batch)

    def tell(self, evaluations: Sequence[Evaluation]) -> None:
        """Move to the best of them if it is better than here."""
        told = self._told
        told.hear(evaluations)
        best = min((e.candidate for e in evaluations), key=lambda c: (told.value.get(c, math.inf), c), default=None)
        if best is None or not math.isfinite(told.value.get(best, math.inf)):
            return
        if self._here is None or told.value[best] < told.value[self._here]:
            self._stand(best)

    def _stand(self, candidate: int) -> None:
        """Adjacent steps first, the rest of the neighbourhood after; each in random order."""
        space, rng = self._told.space, self._told.rng
        self._here = candidate
        close = space.neighbours(candidate, adjacent=True)
        all_of = space.neighbours(candidate)
        rest = np.setdiff1d(all_of, close)
        self._ahead = [int(c) for c in (*rng.permutation(np.unique(close)), *rng.permutation(rest)) if int(c) not in self._told.asked]

    def _leave(self) -> Ask:
        """A minimum: kick from the best known one, or start anew after kicks that did not help."""
        told = self._told
        here = self._here
        assert here is not None
        if self._home is None or told.value[here] < told.value[self._home]:
            self._home, self._failed_kicks = here, 0
        else:
            self._failed_kicks += 1
        self._here = None
        if self._failed_kicks >= self.KICKS:
            self._home, self._failed_kicks = None, 0
            return Ask(told.start(self.START))
        kicked = [c for c in (self._kick(self._home) for _ in range(self.BATCH)) if c is not None]
        return Ask(told.take(kicked) or told.start(self.BATCH))

    def _kick(self, candidate: int) -> int | None:
        """A legal untried candidate that differs in two or three parameters."""
        space, rng = self._told.space, self._told.rng
        row = space.rows[candidate].astype(np.int64)
        present = np.flatnonzero(row != ABSENT)
        for _ in range(20):
            changed: NDArray[np.int64] = row.copy()
            for column in rng.choice(present, min(int(rng.integers(2, 4)), len(present)), replace=False):
                changed[column] = rng.integers(len(space.values[column]))
            found = int(space.lookup(changed[None])[0])
            if found >= 0 and found not in self._told.asked:
                return found
        return None
