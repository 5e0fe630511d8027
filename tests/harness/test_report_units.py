"""Numbers as people read them: ordinary ones by hand, and those that no measurement gives."""

from __future__ import annotations

import math
import sys

import pytest

from klab.harness.report import units


def test_ordinary_numbers_have_three_digits_and_a_fitting_unit() -> None:
    assert [units.number(value) for value in (0, 0.0123, 4.138, 41.38, 413.8, 41380.0)] == ["0", "0.0123", "4.14", "41.4", "414", "41,380"]
    assert [units.time(us) for us in (0.812, 4.138, 1250.0, 2.1e6, None)] == ["812 ns", "4.14 µs", "1.25 ms", "2.10 s", "not measured"]
    assert [units.energy(j) for j in (2e-5, 0.0123, 3.5, None)] == ["20.0 µJ", "12.3 mJ", "3.50 J", "not measured"]
    assert [units.percent(share) for share in (0.0123, 0.5, 0.985, 1.0, 3.2)] == ["1.2%", "50%", "98.5%", "100%", "320%"]
    assert [units.plain_ratio(ratio) for ratio in (1.2345, 12.345, 1234.5)] == ["1.234", "12.3", "1,234"]
    assert units.interval(4.13, 4.15) == "4.130 to 4.150 µs" and units.interval(3e9, 12345e6) == "3,000 to 12,345 s"


@pytest.mark.parametrize("tell", [units.number, units.time, units.energy, units.percent, units.plain_ratio, units.rate, units.bandwidth])
def test_no_number_runs_over_the_page(tell: object) -> None:
    largest = sys.float_info.max
    for value in (largest, 1e308, 1e300, 1e15, 1e12, -1e12, -1e300, -largest, 5e-324, -5e-324, math.inf, -math.inf):
        text = tell(value)  # type: ignore[operator]
        assert len(text) < 32 and "inf" not in text and "nan" not in text, text
    assert units.number(1e308) == "1.00e+308" and units.number(-1e300) == "-1.00e+300" and units.percent(1e300) == "1.00e+302%"
    assert units.number(-math.inf) == "-∞" and len(units.interval(-1e300, 1e308)) < 40


def test_what_is_no_number_was_not_measured() -> None:
    for tell in (units.number, units.time, units.energy, units.percent):
        assert tell(math.nan) == "not measured"
