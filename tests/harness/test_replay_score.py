"""The score and the standings: that random search scores 0, that the optimum at once scores 1, and that intervals mean what they say."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
import pytest
import recorded_spaces
from numpy.typing import NDArray

from klab.harness.tune.replay.recorded import RecordedSpace
from klab.harness.tune.replay.score import LEAST_EVALUATIONS, Baseline, baseline, expected_best
from klab.harness.tune.replay.simulate import Run, Step, candidate_s, run_of, simulate
from klab.harness.tune.replay.standings import Group, Standing, duels, losses
from klab.harness.tune.search import Budget
from klab.harness.tune.space import Space

LIMIT = 100
REPEATS = 50


def random_runs(space: RecordedSpace, repeats: int = REPEATS, limit: int = LIMIT) -> list[Run]:
    return [run_of(space, simulate(space, "random", seed=s, budget=Budget(evaluations=limit)), s) for s in range(repeats)]


def standing(space: RecordedSpace, runs: Sequence[Run], yardstick: Baseline, name: str = "one") -> Standing:
    return Standing(name, "klab", [Group(runs, yardstick, 1e3)], (20, 50, 100))


def only_valid(space: RecordedSpace) -> RecordedSpace:
    """The space without what failed: what a baseline sees that ignores failures."""
    kept = np.flatnonzero(np.isfinite(space.time_us))
    return dataclasses.replace(
        space,
        space=Space(space.space.names, space.space.values, space.space.rows[kept]),
        time_us=space.time_us[kept],
        status=[space.status[i] for i in kept],
        compile_s=space.compile_s[kept],
        benchmark_s=space.benchmark_s[kept],
        samples_us=[space.samples_us[i] for i in kept],
    )


@pytest.fixture(scope="module")
def space() -> RecordedSpace:
    return recorded_spaces.small_space()


@pytest.fixture(scope="module")
def yardstick(space: RecordedSpace) -> Baseline:
    return baseline(space, most_evaluations=LIMIT)


@pytest.mark.parametrize("failing", [0.0, 0.6])
def test_random_search_scores_zero_within_its_interval(failing: float) -> None:
    space = recorded_spaces.small_space(failing=failing)
    found = standing(space, random_runs(space), baseline(space, most_evaluations=LIMIT)).score
    assert found.low <= 0 <= found.high
    assert found.high - found.low < 0.4  # narrow enough that not everything would pass


def test_random_search_with_a_budget_of_seconds_scores_zero_too(space: RecordedSpace) -> None:
    seconds = 60 * float(candidate_s(space).mean())
    runs = [run_of(space, simulate(space, "random", seed=s, budget=Budget(device_s=seconds)), s) for s in range(REPEATS)]
    found = standing(space, runs, baseline(space, most_evaluations=60, by_seconds=True)).score
    assert found.low <= 0 <= found.high


def test_a_baseline_that_ignores_failures_would_not_give_zero() -> None:
    space = recorded_spaces.small_space(failing=0.6)
    blind = baseline(only_valid(space), most_evaluations=LIMIT)
    assert standing(space, random_runs(space), blind).score.high < -0.1


def test_the_optimum_at_once_scores_one_and_nothing_at_all_scores_less_than_random(space: RecordedSpace, yardstick: Baseline) -> None:
    at_once = Run(0, (Step(1, 0.0, space.optimum_us),), 1, 0.0, ())
    nothing = Run(0, (), 5, 20.0, ())
    awful = Run(0, (Step(1, 0.0, yardstick.slowest_us),), 1, 0.0, ())
    assert yardstick.score(at_once) == pytest.approx(1)
    assert yardstick.score(nothing) < 0
    assert yardstick.score(awful) == yardstick.score(nothing)


def test_what_comes_after_the_window_does_not_count(space: RecordedSpace, yardstick: Baseline) -> None:
    late = Run(0, (Step(1, 1.0, yardstick.median_us), Step(90, 1.01 * yardstick.window_s, space.optimum_us)), 90, 1e4, ())
    half = Run(0, (Step(40, 0.5 * yardstick.window_s, space.optimum_us),), 40, 1e4, ())
    assert yardstick.score(late) == pytest.approx(yardstick.score(Run(0, (), 1, 1.0, ())))
    assert yardstick.score(half) > yardstick.score(late)


def test_the_window_does_not_collapse_where_half_the_space_is_good() -> None:
    space = recorded_spaces.small_space(failing=0)
    good = np.arange(len(space.time_us)) % 2 == 0
    space = dataclasses.replace(space, time_us=np.where(good, 100.0, 101.0) + np.arange(len(good)) * 1e-6)
    yardstick = baseline(space, most_evaluations=LIMIT)
    assert yardstick.window_evaluations == LEAST_EVALUATIONS
    score = standing(space, random_runs(space), yardstick).score
    assert score.low <= 0 <= score.high


def test_expected_best_is_exact() -> None:
    worth = np.array([5.0, 1.0, 3.0, 3.0])
    # All 6 pairs: minima 1, 3, 3, 1, 1, 3.
    assert expected_best(worth, 4) == pytest.approx([3.0, 2.0, 1.5, 1.0])


def test_a_space_with_nothing_to_find_has_no_score() -> None:
    space = recorded_spaces.small_space(failing=0)
    flat = dataclasses.replace(space, time_us=np.full(len(space.space), 7.0))
    yardstick = baseline(flat, most_evaluations=LIMIT)
    assert math.isnan(yardstick.score(random_runs(flat, 2)[0]))
    assert math.isnan(standing(flat, random_runs(flat, 2), yardstick).score.value)


def test_failed_until_now_counts_as_the_slowest(space: RecordedSpace, yardstick: Baseline) -> None:
    found = standing(space, [Run(0, (Step(30, 9.0, space.optimum_us),), 30, 9.0, ()), Run(1, (), 7, 9.0, ())], yardstick)
    slowest = yardstick.slowest_us / yardstick.optimum_us
    assert found.mean == pytest.approx([slowest, (1 + slowest) / 2, (1 + slowest) / 2])
    reach = found.reach(0.01)
    assert reach.reached == 0.5
    assert reach.restricted_mean_s == pytest.approx((9.0 + 1e3) / 2)


def made(space: RecordedSpace, yardstick: Baseline, ratios: NDArray[np.float64], name: str, spaces: int = 2) -> Standing:
    """A standing whose runs have these ratios at once."""
    runs = [Run(i, (Step(1, 1.0, float(r) * space.optimum_us),), 100, 50.0, ()) for i, r in enumerate(ratios)]
    return Standing(name, "other", [Group(runs, yardstick, 1e3)] * spaces, (20, 50, 100))


def test_a_duel_tells_a_difference_from_noise(space: RecordedSpace, yardstick: Baseline) -> None:
    rng = np.random.default_rng(0)
    one = made(space, yardstick, 1.05 + 0.02 * rng.random(50), "one")
    same = made(space, yardstick, 1.05 + 0.02 * rng.random(50), "same")
    worse = made(space, yardstick, 1.10 + 0.02 * rng.random(50), "worse")
    won = duels(one, [worse])[0]
    assert won.ratio.value == pytest.approx(1.06 / 1.11, abs=0.005)
    assert won.ratio.low < won.ratio.value < won.ratio.high < 1
    level = duels(one, [worse, same])[0]
    assert level.other == "same"
    assert not level.ratio.excludes_one
    assert [d.ratio.excludes_one for d in duels(worse, [one, same])] == [True] * 3


def test_the_best_of_many_equals_looks_better_than_any_and_the_second_interval_says_so(space: RecordedSpace, yardstick: Baseline) -> None:
    rng = np.random.default_rng(1)
    crowd = [made(space, yardstick, 1 + rng.random(50), f"other {i}") for i in range(8)]
    fought = duels(made(space, yardstick, 1 + rng.random(50), "one"), crowd)[0]
    assert fought.against_any.low > fought.ratio.low
    assert fought.against_any.high > fought.ratio.high


def test_losses_name_the_space_and_the_rival(space: RecordedSpace, yardstick: Baseline) -> None:
    rng = np.random.default_rng(2)
    good, bad = 1.01 + 0.01 * rng.random(20), 1.5 + 0.01 * rng.random(20)
    one, other = made(space, yardstick, good, "one"), made(space, yardstick, bad, "other")
    mixed = Standing("one", "klab", [one.groups[0], other.groups[0]], one.marks)
    found = losses(mixed, [made(space, yardstick, 1.2 + 0.01 * rng.random(20), "rival"), other])
    assert [(x.space, x.mark, x.other) for x in found] == [(1, 20, "rival"), (1, 50, "rival"), (1, 100, "rival")]
    assert all(x.ratio.low > 1 for x in found)
    assert losses(one, [other]) == []
