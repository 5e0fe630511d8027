"""Successive halving: many candidates for a short interleaved run, the better part for a longer one, the last few in full."""

from __future__ import annotations

import math
from collections.abc import Sequence

from klab.harness.tune.space import Space
from klab.harness.tune.strategies._told import Told
from klab.harness.tune.strategy import Ask, Evaluation, Prior, strategy


@strategy("halving")
class Halving:
    """Brackets of 32 candidates in short interleaved runs; a quarter goes on to four times as many rounds, and at last to a full run."""

    BRACKET, BATCH, KEEP = 32, 8, 4
    ROUNDS = (2, 8, 0)

    def __init__(self, space: Space, seed: int, prior: Prior) -> None:
        self._told = Told(space, seed, prior)
        self._rung = 0
        self._waiting: list[int] = []
        self._heard: list[tuple[float, int]] = []
        self._open = False

    def ask(self) -> Ask:
        """The next few of this rung; every bracket goes through all rungs before the next begins."""
        if not self._waiting and self._open:
            self._promote()
        if not self._waiting:
            self._rung, self._heard, self._open = 0, [], True
            self._waiting = list(self._told.start(self.BRACKET))
        batch, self._waiting = self._waiting[: self.BATCH], self._waiting[self.BATCH :]
        return Ask(tuple(batch), self.ROUNDS[self._rung])

    def tell(self, evaluations: Sequence[Evaluation]) -> None:
        """Those that failed are out; those that were measured in full already (no shorter run could be had) are not asked again."""
        self._told.hear(evaluations)
        self._heard += [(e.value if e.ok else math.inf, e.candidate) for e in evaluations]

    def _promote(self) -> None:
        while self._rung + 1 < len(self.ROUNDS) and not self._waiting:
            ranked = [(value, c) for value, c in sorted(self._heard) if math.isfinite(value)]
            kept = ranked[: -(-len(ranked) // self.KEEP)]
            self._rung += 1
            self._waiting = [c for _, c in kept if c not in self._told.value]
            # What was measured in full stays in the ranking of the next rung.
            self._heard = [(value, c) for value, c in kept if c in self._told.value]
        self._open = bool(self._waiting)
