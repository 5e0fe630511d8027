"""Model-guided search with extremely randomised trees from scikit-learn."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from klab.harness.tune.space import Space
from klab.harness.tune.strategies._design import spread
from klab.harness.tune.strategies._features import Features
from klab.harness.tune.strategies._told import Told
from klab.harness.tune.strategy import Ask, Evaluation, Prior, strategy
from klab.kernels.errors import UsageError

Floats = NDArray[np.float64]


@strategy("forest", needs="scikit-learn")
class Forest:
    """Trees predict log-time (failures count as slow) and validity; every other batch polishes around the best found."""

    INIT, LEAST_BATCH, TREES = 10, 4, 24
    SAMPLE, BEST, MOST = 2_000, 6, 1_000

    def __init__(self, space: Space, seed: int, prior: Prior) -> None:
        try:
            from sklearn.ensemble import ExtraTreesRegressor
        except ModuleNotFoundError as error:
            raise UsageError("the strategy 'forest' needs scikit-learn: pip install 'kernel-lab[tune]'") from error
        self._trees = ExtraTreesRegressor
        self._told = Told(space, seed, prior)
        self._features = Features(space)
        self._expected = _expected(prior, len(space))
        self._seed, self._turn = seed, 0
        self._first: list[int] | None = None

    def ask(self) -> Ask:
        """A design that is spread over the space, then what the trees promise; batches grow by a sixth of what is known."""
        told = self._told
        if self._first is None:
            self._first = self._design()
        batch = max(self.LEAST_BATCH, len(told.value) // 6)
        if self._first:
            picked, self._first = self._first[: self.LEAST_BATCH], self._first[self.LEAST_BATCH :]
            return Ask(told.take(picked))
        good = sum(math.isfinite(v) for v in told.value.values())
        if good < 3:
            return Ask(told.start(self.LEAST_BATCH))
        self._turn += 1
        pool = self._pool()
        if not len(pool):
            return Ask()
        score = self._score(pool)
        return Ask(told.take(int(c) for c in pool[np.argsort(-score, kind="stable")[:batch]]))

    def tell(self, evaluations: Sequence[Evaluation]) -> None:
        """Values and failures alike."""
        self._told.hear(evaluations)

    def _design(self) -> list[int]:
        told, size = self._told, len(self._told.space)
        sample = told.rng.choice(size, min(size, 1_000), replace=False)
        pool = np.array([*told.seeds, *(c for c in sample if int(c) not in set(told.seeds))], dtype=np.int64)
        more = spread(self._features.of(pool), range(len(told.seeds)), max(min(self.INIT, size) - len(told.seeds), 0))
        return [*told.seeds, *(int(pool[i]) for i in more)]

    def _pool(self) -> NDArray[np.int64]:
        """Untried neighbours of the best; on even turns and while there are few of them, random candidates as well."""
        told, size = self._told, len(self._told.space)
        best = sorted((c for c, v in told.value.items() if math.isfinite(v)), key=lambda c: (told.value[c], c))[: self.BEST]
        parts = [told.space.neighbours(c) for c in best]
        if self._turn % 2 or sum(map(len, parts)) < 4 * self.LEAST_BATCH:
            parts.append(np.arange(size) if size <= self.SAMPLE else told.rng.integers(size, size=self.SAMPLE))
        pool = np.unique(np.concatenate(parts))
        asked = np.fromiter(told.asked, dtype=np.int64, count=len(told.asked))
        left = np.setdiff1d(pool, asked, assume_unique=False)
        if not len(left) and (drawn := told.fresh()) is not None:
            left = np.array([drawn], dtype=np.int64)
        return left

    def _score(self, pool: NDArray[np.int64]) -> Floats:
        """Expected improvement from the spread of the trees, times the share of trees' leaves that were valid."""
        told = self._told
        known = list(told.value)
        if len(known) > self.MOST:
            known = sorted(known, key=lambda c: (told.value[c], c))[: self.MOST // 2] + known[-self.MOST // 2 :]
        value = np.array([told.value[c] for c in known])
        ok = np.isfinite(value)
        good = np.log(value[ok]) if (value[ok] > 0).all() else value[ok]
        y = np.full(len(value), np.quantile(good, 0.9))
        y[ok] = good
        target = np.stack([(y - y.mean()) / max(float(y.std()), 1e-9), ok.astype(np.float64)], axis=1)
        model = self._trees(
            self.TREES, max_features=1.0, min_samples_leaf=1, random_state=(self._seed * 7919 + self._turn) % 2**31, n_jobs=1
        )
        model.fit(self._inputs(np.array(known)), target)
        x = self._inputs(pool)
        each = np.stack([tree.tree_.predict(x)[:, :, 0] for tree in model.estimators_])
        mean, sd = each[:, :, 0].mean(axis=0), each[:, :, 0].std(axis=0) + 1e-3
        from scipy.special import ndtr

        z = (target[ok, 0].min() - mean) / sd
        improvement = sd * (z * ndtr(z) + np.exp(-0.5 * z * z) / math.sqrt(2 * math.pi))
        score: Floats = improvement * np.clip(each[:, :, 1].mean(axis=0), 0.02, 1.0)
        return score

    def _inputs(self, candidates: NDArray[np.int64]) -> NDArray[np.float32]:
        x = self._features.of(candidates)
        return x if self._expected is None else np.concatenate([x, self._expected[candidates, None]], axis=1)


def _expected(prior: Prior, count: int) -> NDArray[np.float32] | None:
    """What is expected as one more feature, which the trees use as far as it explains what was measured."""
    if prior.expected is None:
        return None
    known = np.isfinite(prior.expected) & (prior.expected > 0)
    if not known.any():
        return None
    logs = np.zeros(count, dtype=np.float32)
    logs[known] = np.log(prior.expected[known])
    logs[~known] = np.median(logs[known])
    return logs
