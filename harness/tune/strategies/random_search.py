"""Random search: every candidate with equal chance, none twice. What all others are measured against."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from klab.harness.tune.space import Space
from klab.harness.tune.strategy import Ask, Evaluation, Prior, strategy


@strategy("random")
class RandomSearch:
    """Candidates in random order, each once; no prior knowledge is used."""

    BATCH = 8

    def __init__(self, space: Space, seed: int, prior: Prior) -> None:
        self._order = np.random.default_rng(seed).permutation(len(space))
        self._at = 0

    def ask(self) -> Ask:
        """The next few."""
        batch = self._order[self._at : self._at + self.BATCH]
        self._at += len(batch)
        return Ask(tuple(int(c) for c in batch))

    def tell(self, evaluations: Sequence[Evaluation]) -> None:
        """Nothing to learn."""
