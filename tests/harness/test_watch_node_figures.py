"""Figures of a run: intervals that hold what they claim, and falls that a slope does not see."""

import random

import pytest

from klab.harness.watch.node_figures import LEAST_RANKED, counted, dip, figure, slope


def trace(rates):
    return [{"at": float(second), "tflops": rate} for second, rate in enumerate(rates)]


@pytest.mark.parametrize("count", [3, 4, 5, LEAST_RANKED, 10])
def test_the_interval_of_few_values_holds_the_median_in_19_of_20(count):
    """Resampling three values would hold it in 76%."""
    chance = random.Random(count)
    made = [figure([100 * chance.gauss(1, 0.01) for _ in range(count)]) for _ in range(400)]
    held = sum(one.low <= 100 <= one.high for one in made)
    assert held >= 0.915 * 400
    assert all(one.low <= one.value <= one.high for one in made)


def test_too_few_values_have_no_interval():
    assert figure([]) is None
    assert (figure([1.0, 3.0]).value, figure([1.0, 3.0]).low) == (2.0, None)


def test_a_fall_in_the_last_minute_is_a_dip_and_no_slope():
    late = trace([735.0 + second % 3 for second in range(420)] + [480.0] * 60)
    assert abs(slope(late).change) < 0.01
    assert dip(late) == pytest.approx(0.35, abs=0.02)
    assert dip(trace([735.0] * 480)) == 0.0
    assert dip(trace([735.0] * 200 + [0.0] + [735.0] * 200)) == pytest.approx(1 / 30, rel=0.1), "one lost second is none"
    assert dip(trace([735.0])) is None


def test_the_warm_up_does_not_count():
    """A cold device is faster: a fifth of a short run, and a minute of a long one."""
    assert next(line["at"] for line in counted(trace([900.0] * 20 + [735.0] * 81))) == 21.0
    assert next(line["at"] for line in counted(trace([900.0] * 60 + [735.0] * 540))) == 61.0
    assert slope(trace([900.0] * 60 + [735.0] * 541)).change == pytest.approx(0.0, abs=1e-6)
    assert counted([]) == []
