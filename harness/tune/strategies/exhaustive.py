"""Exhaustive search: every candidate, in the order of the space."""

from __future__ import annotations

from collections.abc import Sequence

from klab.harness.tune.space import Space
from klab.harness.tune.strategy import Ask, Evaluation, Prior, strategy, without


@strategy("exhaustive")
class Exhaustive:
    """Every candidate once: the prior's seeds first, then as the space has them."""

    BATCH = 8

    def __init__(self, space: Space, seed: int, prior: Prior) -> None:
        self._first = without(prior.seeds, set())
        self._seeds = set(self._first)
        self._count, self._at = len(space), 0

    def ask(self) -> Ask:
        """The next few."""
        batch, self._first = self._first[: self.BATCH], self._first[self.BATCH :]
        while len(batch) < self.BATCH and self._at < self._count:
            if self._at not in self._seeds:
                batch.append(self._at)
            self._at += 1
        return Ask(tuple(batch))

    def tell(self, evaluations: Sequence[Evaluation]) -> None:
        """Nothing to learn."""
