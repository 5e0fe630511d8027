"""What the search itself takes per evaluation, in a space of 20,000 candidates and 11 parameters (aim: below 5 ms over 400 evaluations).

pytest ci/overheads/test_search_overhead.py --benchmark-enable --benchmark-columns=min,mean,rounds
"""

from __future__ import annotations

import time
from collections.abc import Iterator

import numpy as np
import pytest

from klab.harness.tune.search import Budget, search
from klab.harness.tune.space import Space
from klab.harness.tune.strategy import Ask, Evaluation, Prior, Strategy, find_strategy, strategies

EVALUATIONS = 400
CANDIDATES = 20_000


@pytest.fixture(scope="module")
def recorded() -> tuple[Space, list[float]]:
    rng = np.random.default_rng(0)
    sizes = np.array([5, 8, 2, 2, 4, 6, 3, 7, 2, 4, 3])
    rows = np.unique(rng.integers(0, sizes, (3 * CANDIDATES, len(sizes))), axis=0)
    rows = rng.permutation(rows)[:CANDIDATES]
    space = Space.of({f"p{c}": 2 ** int(v) for c, v in enumerate(row)} for row in rows)
    logs = (rng.gamma(1, 0.4, len(sizes)) * np.abs(rows - rng.integers(0, sizes)) / sizes).sum(axis=1)
    logs += 0.3 * ((rows[:, 0] * rows[:, 1]) % 3) + rng.normal(0, 0.02, len(rows))
    return space, np.where(rows[:, 1] + rows[:, 7] > 10, np.inf, np.exp(logs)).tolist()


# CPU time: what else the machine does is not the search's.
@pytest.mark.benchmark(timer=time.process_time)
@pytest.mark.parametrize("name", list(strategies()))
def test_overhead_per_evaluation(name: str, recorded: tuple[Space, list[float]], benchmark) -> None:
    space, values = recorded
    if find_strategy(name).needs == "scikit-learn":
        pytest.importorskip("sklearn")

    def evaluate(ask: Ask) -> Iterator[Evaluation]:
        for c in ask.candidates:
            yield Evaluation(c, values[c], rounds=ask.rounds)

    def fresh() -> tuple[tuple[Strategy], dict[str, object]]:
        return (find_strategy(name).make(space, 0, Prior()),), {}

    def whole(made: Strategy) -> int:
        return search(made, evaluate, Budget(evaluations=EVALUATIONS)).distinct

    distinct = benchmark.pedantic(whole, setup=fresh, rounds=2)
    assert distinct == EVALUATIONS
    if benchmark.stats is not None:
        benchmark.extra_info["ms_per_evaluation"] = 1e3 * benchmark.stats["min"] / EVALUATIONS
