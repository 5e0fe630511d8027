"""Every strategy keeps the contract of ask and tell, on small spaces of all kinds; and each does what it is for."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from numpy.typing import NDArray

from klab.harness.store.result import Status
from klab.harness.tune.search import Budget, Trace, search
from klab.harness.tune.search_journal import SearchJournal
from klab.harness.tune.space import Space
from klab.harness.tune.strategies.gaussian import GaussianSearch, Options
from klab.harness.tune.strategy import DEFAULT, Ask, Evaluation, Prior, find_strategy, strategies

ALL = list(strategies())
Values = NDArray[np.float64]


def grid(**parameters: tuple[object, ...]) -> list[dict[str, object]]:
    points: list[dict[str, object]] = [{}]
    for name, values in parameters.items():
        points = [{**p, name: v} for p in points for v in values]
    return points


def tiles() -> tuple[Space, Values]:
    """Two kernels of a tiled product: time has interactions, a cliff, plateaus and failures; one kernel lacks a parameter."""
    points = [
        p for p in grid(m=(16, 32, 64, 128), n=(16, 32, 64, 128), warps=(2, 4, 8), mode=("a", "b")) if p["m"] * p["n"] >= 32 * p["warps"]
    ]  # type: ignore[operator]
    points += [{"kernel": "other", "m": m, "depth": d} for m in (16, 32, 64) for d in (1, 2, 3)]
    space = Space.of(points)
    values = []
    for i in range(len(space)):
        p = space.point(i)
        m, n, warps = p["m"], p.get("n", 32), p.get("warps", 4)
        time = 10.0 + abs(math.log2(m * n / (512 * warps))) + (3 if p.get("mode") == "b" and m > 32 else 0) + p.get("depth", 0)
        values.append(math.inf if m * n > 4096 and warps < 8 else round(time))
    return space, np.array(values)


def separable(seed: int, *, failing: bool = False) -> tuple[Space, Values]:
    """1,440 candidates: a product of per-parameter penalties, one interaction, a little noise; `failing` takes a corner away."""
    rng = np.random.default_rng(seed)
    sizes = {"a": (1, 2, 4, 8, 16, 32), "b": (1, 2, 3, 4), "c": (0, 1), "d": (16, 32, 48, 64, 80), "e": ("x", "y", "z"), "f": (0, 1)}
    space = Space.of(grid(**sizes))
    rows = space.rows
    logs = rng.normal(0, 0.03, len(space))
    for column, values in enumerate(space.values):
        logs += (rng.uniform(0.3, 1.0) * np.abs(np.arange(len(values)) - rng.integers(len(values))) / len(values))[rows[:, column]]
    logs += 0.4 * ((rows[:, 0] + rows[:, 1]) % 3 == rng.integers(3))
    values = np.exp(logs)
    if failing:
        values[rows[:, 0] + rows[:, 3] > 4] = np.inf
    return space, values


SPACES: dict[str, Callable[[], tuple[Space, Values]]] = {
    "tiles": tiles,
    "one candidate": lambda: (Space.of([{"a": 1}]), np.array([2.0])),
    "one parameter": lambda: (Space.of(grid(a=tuple(range(25)))), (np.arange(25.0) - 17) ** 2 + 1),
    "all equal": lambda: (Space.of(grid(a=(1, 2, 4, 8), b=(0, 1, 2), c=(False, True))), np.ones(24)),
    "all fail": lambda: (Space.of(grid(a=(1, 2, 4, 8), b=("p", "q", "r"), c=(0, 1))), np.full(24, np.inf)),
    "one is valid": lambda: (Space.of(grid(a=(1, 2, 4), b=(0, 1, 2, 3, 4))), np.where(np.arange(15) == 11, 3.0, np.inf)),
    "negative": lambda: (Space.of(grid(a=(1, 2, 4), b=(-2, -1, 0))), np.arange(9.0) - 4),
    "lists": lambda: (Space.of(grid(a=([1, 2], [2, 1], [4, 4]), b=(None, "s", 3))), np.arange(1.0, 10.0)),
}


def answers(values: Values, status: Status = Status.CRASHED) -> Callable[[Ask], Iterator[Evaluation]]:
    def evaluate(ask: Ask) -> Iterator[Evaluation]:
        for c in ask.candidates:
            spent_s = (ask.rounds or 32) / 32
            yield Evaluation(c, float(values[c]), Status.OK if np.isfinite(values[c]) else status, ask.rounds, spent_s)

    return evaluate


def run(name: str, space: Space, values: Values, seed: int = 0, prior: Prior = Prior(), budget: Budget = Budget()) -> Trace:  # noqa: B008
    return search(find_strategy(name).make(space, seed, prior), answers(values), budget)


@pytest.fixture(autouse=True)
def _packages(request: pytest.FixtureRequest) -> None:
    name = request.node.callspec.params.get("name") if hasattr(request.node, "callspec") else None
    if name and find_strategy(name).needs == "scikit-learn":
        pytest.importorskip("sklearn")


@pytest.mark.parametrize("name", ALL)
class TestContract:
    @pytest.mark.parametrize("kind", SPACES)
    def test_covers_the_space_and_measures_nothing_twice(self, name: str, kind: str) -> None:
        space, values = SPACES[kind]()
        trace = run(name, space, values)
        full = [e.candidate for e in trace.evaluations if not e.rounds]
        assert trace.ended == "exhausted"
        assert len(full) == len(set(full))
        assert {e.candidate for e in trace.evaluations} == set(range(len(space)))
        if np.isfinite(values).any():
            assert trace.best is not None
            # Halving measures in full only what the short runs left, and these short runs are exact.
            assert trace.best.rounds == 0
            assert trace.best.value == values.min()
        else:
            assert trace.best is None

    def test_same_seed_same_search_and_another_seed_another(self, name: str) -> None:
        space, values = separable(1)
        budget = Budget(evaluations=40)
        first, again, other = (run(name, space, values, seed, budget=budget).evaluations for seed in (5, 5, 6))
        assert first == again
        assert name == "exhaustive" or first != other

    def test_goes_on_after_a_kill_as_if_there_was_none(self, name: str, tmp_path) -> None:
        space, values = separable(2, failing=True)
        budget = Budget(evaluations=45 if name != "forest" else 24)
        whole = run(name, space, values, 3, budget=budget).evaluations
        for cut in (1, 22, 44) if name != "forest" else (13,):
            left = cut

            def dying(ask: Ask) -> Iterator[Evaluation]:
                nonlocal left
                for e in answers(values)(ask):
                    if not left:
                        raise KeyboardInterrupt
                    left -= 1
                    yield e

            path = tmp_path / f"{cut}.jsonl"
            make = find_strategy(name).make
            with pytest.raises(KeyboardInterrupt):
                search(make(space, 3, Prior()), dying, budget, SearchJournal(path, {"strategy": name}))
            asked: list[int] = []

            def counting(ask: Ask, asked: list[int] = asked) -> Iterator[Evaluation]:
                asked.extend(ask.candidates)
                return answers(values)(ask)

            resumed = search(make(space, 3, Prior()), counting, budget, SearchJournal(path, {"strategy": name}))
            assert [e.candidate for e in resumed.evaluations] == [e.candidate for e in whole]
            assert len(asked) == len(whole) - cut

    def test_a_budget_cuts_the_last_ask(self, name: str) -> None:
        space, values = separable(3)
        assert run(name, space, values, budget=Budget(evaluations=13)).distinct == 13

    def test_answers_that_never_came_do_no_harm(self, name: str) -> None:
        space, values = separable(6, failing=True)
        made = find_strategy(name).make(space, 0, Prior())
        told: list[Evaluation] = []
        for _ in range(20):
            heard = list(answers(values)(made.ask()))[:-1]
            made.tell(heard)
            told += heard
        assert len({(e.candidate, e.rounds) for e in told}) == len(told)

    def test_seeds_come_first(self, name: str) -> None:
        space, values = separable(4)
        if name == "random":
            pytest.skip("random search uses no prior")
        evaluations = run(name, space, values, prior=Prior(seeds=(700, 3, 700, 99)), budget=Budget(evaluations=8)).evaluations
        assert [e.candidate for e in evaluations[:3]] == [700, 3, 99]

    def test_an_expectation_with_holes_is_no_obstacle(self, name: str) -> None:
        space, values = separable(5)
        expected = values.copy()
        expected[::3], expected[1::7], expected[2::11], expected[5::13] = np.nan, 0, np.inf, -1
        assert run(name, space, values, prior=Prior(expected=expected), budget=Budget(evaluations=30)).distinct == 30
        run(name, space, values, prior=Prior(expected=np.full(len(space), np.nan)), budget=Budget(evaluations=12))


def after(name: str, budget: int, seeds: int, *, failing: bool = False, expected: Callable[[Values], Values] | None = None) -> float:
    """Mean over seeds (each its own space) of log(best found / optimum)."""
    found = []
    for seed in range(seeds):
        space, values = separable(100 + seed, failing=failing)
        prior = Prior(expected=None if expected is None else expected(values))
        best = run(name, space, values, seed, prior, Budget(evaluations=budget)).best
        assert best is not None
        found.append(math.log(best.value / values.min()))
    return float(np.mean(found))


class TestClaims:
    def test_the_default_exists_and_needs_no_package(self) -> None:
        assert find_strategy(DEFAULT).needs == ""

    @pytest.mark.parametrize("failing", [False, True])
    def test_the_default_is_far_better_than_random(self, failing: bool) -> None:
        seeds = 10 if failing else 20
        model, blind = after(DEFAULT, 30, seeds, failing=failing), after("random", 30, seeds, failing=failing)
        assert model < 0.5 * blind

    @pytest.mark.parametrize("name", ["genetic", "local", "forest"])
    def test_so_are_the_others_given_time(self, name: str) -> None:
        seeds, budget = (4, 60) if name == "forest" else (12, 120)
        assert after(name, budget, seeds) < 0.8 * after("random", budget, seeds)

    def test_the_model_learns_where_candidates_fail(self) -> None:
        space, values = separable(7, failing=True)
        share_of_failures = float(np.mean(~np.isfinite(values)))
        later = run(DEFAULT, space, values, budget=Budget(evaluations=60)).evaluations[20:]
        assert share_of_failures > 0.3
        assert np.mean([not e.ok for e in later]) < 0.5 * share_of_failures

    def test_a_right_expectation_helps_and_a_wrong_one_is_forgotten(self) -> None:
        rng = np.random.default_rng(0)
        cold = after(DEFAULT, 12, 12)
        right = after(DEFAULT, 12, 12, expected=lambda v: v * np.exp(rng.normal(0, 0.2, len(v))))
        upside_down = after(DEFAULT, 50, 8, expected=lambda v: 1 / v)
        assert right < 0.7 * cold
        assert upside_down < 0.5 * after("random", 50, 8)

    def test_halving_spends_fewer_device_seconds_than_exhaustive(self) -> None:
        space, values = separable(8)
        halving, exhaustive = run("halving", space, values), run("exhaustive", space, values)
        assert halving.best is not None and halving.best.value == values.min()
        assert halving.spent_s < 0.25 * exhaustive.spent_s

    def test_short_runs_come_before_full_ones(self) -> None:
        space, values = separable(9)
        rounds = [e.rounds for e in run("halving", space, values, budget=Budget(evaluations=32)).evaluations]
        assert rounds[:32] == [2] * 32

    def test_a_large_space_is_sampled(self) -> None:
        """60,000 candidates, pool and sample far smaller: neighbours of the best are looked at although the sample misses them."""
        space = Space.of(grid(**{name: tuple(range(1, 8)) for name in "abcdef"}))
        target = np.array([5, 1, 3, 4, 2, 6])
        values = np.exp(np.abs(space.rows - target).sum(axis=1) / 6)
        made = GaussianSearch(space, 0, Prior(), Options(sample=1_000, pool=200))
        best = search(made, answers(values), Budget(evaluations=120)).best
        assert best is not None and best.value <= math.exp(1 / 6)

    def test_many_points_are_thinned(self) -> None:
        space, values = separable(10)
        made = GaussianSearch(space, 0, Prior(), Options(most=40))
        best = search(made, answers(values), Budget(evaluations=120)).best
        assert best is not None and best.value < 1.05 * values.min()
