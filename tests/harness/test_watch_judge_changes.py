"""Change points: found where they are, not where they are not, through gaps and spikes, with intervals that hold."""

import math

import numpy as np
import pytest

from klab.harness.watch.changes import Change, change_points


def course(*levels, nights=20, noise=0.01, seed=0):
    rng = np.random.default_rng(seed)
    return [level * math.exp(noise * rng.normal()) for level in levels for _ in range(nights)]


def test_a_step_is_found_at_its_night_with_its_size():
    (found,) = change_points(course(100.0, 105.0))
    assert isinstance(found, Change) and found.index == 20
    assert found.low < 1.05 < found.high and found.high - found.low < 0.02 and found.ratio == pytest.approx(found.after / found.before)


def test_several_steps_up_and_down():
    found = change_points(course(100.0, 110.0, 95.0, 100.0))
    assert [abs(c.index - at) <= 1 for c, at in zip(found, (20, 40, 60), strict=True)] == [True] * 3
    assert [c.ratio > 1 for c in found] == [True, False, True]


def test_quiet_series_have_no_history():
    told = sum(bool(change_points(course(100.0, nights=60, seed=seed))) for seed in range(100))
    assert told <= 3
    assert sum(bool(change_points(course(100.0, nights=12, seed=seed))) for seed in range(100)) <= 5


def test_small_steps_are_found_in_most_series():
    found = [change_points(course(100.0, 102.0, nights=25, seed=seed)) for seed in range(60)]
    assert sum(len(f) == 1 and abs(f[0].index - 25) <= 5 for f in found) >= 50


def test_the_interval_holds():
    steps = [change_points(course(100.0, 104.0, seed=seed)) for seed in range(80)]
    held = [f[0].low <= 1.04 <= f[0].high for f in steps if len(f) == 1]
    assert len(held) >= 76 and sum(held) >= 0.88 * len(held)


def test_spikes_are_no_levels():
    values = course(100.0, nights=60)
    for night in (5, 17, 30, 31, 59):
        values[night] *= 1.15
    assert change_points(values) == []


def test_gaps_keep_the_places_of_the_nights():
    values = course(100.0, 108.0)
    for night in (3, 4, 18, 19, 20, 33):
        values[night] = math.nan
    (found,) = change_points(values)
    assert found.index == 21


def test_what_is_too_small_to_tell_is_not_told():
    assert change_points(course(100.0, 100.3, noise=0.0001)) == []
    assert len(change_points(course(100.0, 100.3, noise=0.0001), least=0.001)) == 1


@pytest.mark.parametrize("values", [[], [1.0], [1.0] * 50, [math.nan] * 30, [0.0, -1.0, math.inf, 5.0] * 5, [None, 3.0] * 10])
def test_nothing_to_find(values):
    assert change_points(values) == []


def test_exact_values_have_steps_too():
    (found,) = change_points([100.0] * 20 + [106.0] * 20)
    assert found.index == 20 and found.ratio == pytest.approx(1.06)


def test_the_unit_does_not_matter():
    values = course(100.0, 105.0)
    (a,), (b,) = change_points(values), change_points([v * 1e-7 for v in values])
    assert a.index == b.index and a.ratio == pytest.approx(b.ratio)
