"""What a result is worth by each objective: intervals propagate, what was not measured has no value, prices come from the caller."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st
from made_results import made

from klab.harness.tune.objective import OBJECTIVES, Interval, Objective, as_objective
from klab.kernels.errors import UsageError
from klab.kernels.matmul.problem import Matmul

ROW = dataclasses.replace(
    made(Matmul(16, 256, 128)),
    median_us=100.0,
    ci_low_us=99.0,
    ci_high_us=102.0,
    energy_j=0.05,
    energy_ci_low_j=0.049,
    energy_ci_high_j=0.052,
)


def test_each_objective_in_its_unit():
    assert Objective().interval(ROW) == Interval(100.0, 99.0, 102.0)
    assert Objective("energy").interval(ROW) == Interval(0.05, 0.049, 0.052)
    delay = Objective("energy-delay").interval(ROW)
    assert (delay.median, delay.low, delay.high) == pytest.approx((0.05 * 100e-6, 0.049 * 99e-6, 0.052 * 102e-6))
    # An hour of launches at 3.60 an hour is a ten-thousandth of a cent per 100 us; 0.05 J at 0.36 per kWh is 5e-9.
    cost = Objective("cost", 3.6, 0.36).interval(ROW)
    assert cost.median == pytest.approx(1e-7 + 5e-9) and cost.low == pytest.approx(0.99e-7 + 4.9e-9)
    assert [Objective(n, *((1.0, 1.0) if n == "cost" else ())).unit for n in OBJECTIVES] == ["us", "J", "J s", "USD"]


def test_what_was_not_measured_has_no_value():
    for missing in ({"energy_j": None}, {"energy_ci_low_j": None}):
        row = dataclasses.replace(ROW, **missing)
        assert Objective().value(row) == 100.0
        for objective in (Objective("energy"), Objective("energy-delay"), Objective("cost", 1.0, 1.0), Objective("cost", 1.0, 0.0)):
            assert objective.needs_energy and objective.value(row) is None
    timeless = dataclasses.replace(ROW, median_us=None, samples_us=(1.0,), marked=(0,))
    assert all(Objective(name).value(timeless) is None for name in ("latency", "energy-delay"))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("speed",), "unknown objective 'speed'; known: latency, energy, energy-delay, cost"),
        (("cost",), "needs --usd-per-hour and --usd-per-kwh"),
        (("cost", 2.0), "needs --usd-per-kwh"),
        (("cost", None, 0.1), "needs --usd-per-hour"),
        (("cost", -1.0, 0.1), "--usd-per-hour -1.0 is not a price"),
        (("cost", 1.0, float("nan")), "--usd-per-kwh nan is not a price"),
        (("cost", 0.0, 0.0), "both prices 0"),
        (("energy", 2.0), "--usd-per-hour is for --objective cost, not energy"),
    ],
)
def test_a_bad_objective_is_one_line(words, said):
    with pytest.raises(UsageError) as told:
        Objective.parse(*words)
    assert said in str(told.value) and "\n" not in str(told.value)


def test_by_name_or_as_it_is():
    assert as_objective("energy") == Objective("energy") and as_objective(Objective("energy")) == Objective("energy")
    assert str(Objective.parse(" Cost ", 2.5, 0.12)) == "cost at 2.5 USD/h and 0.12 USD/kWh"


@given(*[st.tuples(st.floats(0.001, 1e6), st.floats(0, 0.5), st.floats(0, 0.5)) for _ in range(2)], st.floats(0, 1), st.floats(0, 1))
def test_sums_and_products_hold_every_value_of_their_parts(a, b, u, v):
    """Whatever two quantities do together, within their intervals."""
    x, y = (Interval(m, m * (1 - low), m * (1 + high)) for m, low, high in (a, b))
    p, q = x.low + u * (x.high - x.low), y.low + v * (y.high - y.low)
    for found, true in ((x * y, p * q), (x + y, p + q)):
        assert found.low * (1 - 1e-12) <= true <= found.high * (1 + 1e-12) and found.low <= found.median <= found.high
