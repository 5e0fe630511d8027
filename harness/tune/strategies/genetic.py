"""Genetic search: a population of the best candidates, uniform crossover, mutation of a parameter or two."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from klab.harness.tune.space import ABSENT, Space
from klab.harness.tune.strategies._told import Told
from klab.harness.tune.strategy import Ask, Evaluation, Prior, strategy


@strategy("genetic")
class Genetic:
    """Steady-state genetic algorithm: children of tournament winners replace the worst; an illegal child moves to a legal neighbour."""

    POPULATION, CHILDREN, TOURNAMENT, TRIES = 16, 8, 3, 40

    def __init__(self, space: Space, seed: int, prior: Prior) -> None:
        self._told = Told(space, seed, prior)
        self._sizes = np.array([len(v) for v in space.values])
        self._population: list[int] = []

    def ask(self) -> Ask:
        """The founders, then one brood after another."""
        told = self._told
        if len(told.asked) < self.POPULATION:
            return Ask(told.start(min(self.CHILDREN, self.POPULATION - len(told.asked))))
        brood: list[int] = []
        for _ in range(self.TRIES):
            if len(brood) == self.CHILDREN or len(told.asked) == len(told.space):
                break
            child = self._legal(self._child())
            if child is not None:
                brood += told.take([child])
        while len(brood) < self.CHILDREN and (drawn := told.fresh()) is not None:
            brood += told.take([drawn])
        return Ask(tuple(brood))

    def tell(self, evaluations: Sequence[Evaluation]) -> None:
        """The fittest survive."""
        told = self._told
        told.hear(evaluations)
        alive = dict.fromkeys(
            [*self._population, *(e.candidate for e in evaluations if math.isfinite(told.value.get(e.candidate, math.inf)))]
        )
        self._population = sorted(alive, key=lambda c: (told.value[c], c))[: self.POPULATION]

    def _parent(self) -> NDArray[np.int64]:
        told = self._told
        if self._population:
            # The population is sorted, so the lowest position drawn has won the tournament.
            winner = self._population[int(told.rng.integers(len(self._population), size=self.TOURNAMENT).min())]
        else:
            winner = int(told.rng.integers(len(told.space)))
        row: NDArray[np.int64] = told.space.rows[winner].astype(np.int64)
        return row

    def _child(self) -> NDArray[np.int64]:
        rng = self._told.rng
        mother, father = self._parent(), self._parent()
        child = np.where(rng.random(len(mother)) < 0.5, mother, father)
        changes = rng.random(len(child)) < 1.5 / len(child)
        other = rng.integers(self._sizes)
        step = np.clip(child + rng.choice((-1, 1), len(child)), 0, self._sizes - 1)
        mutant = np.where(rng.random(len(child)) < 0.5, step, other)
        made: NDArray[np.int64] = np.where(changes & (child != ABSENT), mutant, child)
        return made

    def _legal(self, row: NDArray[np.int64]) -> int | None:
        """The row's candidate, or an untried one that differs from it in one parameter."""
        space = self._told.space
        found = int(space.lookup(row[None])[0])
        if found >= 0 and found not in self._told.asked:
            return found
        near = space.neighbours(found) if found >= 0 else self._near(row)
        untried = [int(c) for c in near if int(c) not in self._told.asked]
        return int(self._told.rng.choice(untried)) if untried else None

    def _near(self, row: NDArray[np.int64]) -> NDArray[np.int64]:
        rows = np.repeat(row[None], int(self._sizes.sum()), axis=0)
        columns = np.repeat(np.arange(len(row)), self._sizes)
        rows[np.arange(len(rows)), columns] = np.concatenate([np.arange(s) for s in self._sizes])
        found = self._told.space.lookup(rows[row[columns] != ABSENT])
        near: NDArray[np.int64] = found[found >= 0]
        return near
