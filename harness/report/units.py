"""Numbers as people read them, with their unit."""

from __future__ import annotations

import math

# From here on nobody reads digits one by one.
MOST_DIGITS = 1e12


def time(us: float | None) -> str:
    """Microseconds with a fitting unit: `812 ns`, `4.14 us`, `1.25 ms`, `2.1 s`."""
    if us is None or math.isnan(us):
        return "not measured"
    for scale, unit in ((1e6, "s"), (1e3, "ms"), (1.0, "µs")):
        if abs(us) >= scale:
            return f"{number(us / scale)} {unit}"
    return f"{number(us * 1e3)} ns"


def sum_time(us: float, left_out: int) -> str:
    """The time of a sum, as a lower bound (`>= 1.25 ms`) while `left_out` of its terms are not known."""
    return f"{'>= ' if left_out else ''}{time(us)}" if us else "not measured"


def speed_up(library_us: float | None, us: float, left_out: int) -> str:
    """`1.25x`, or how many terms are missing for a comparison; empty where there is nothing to compare with."""
    if left_out:
        return f"{left_out} problem{'' if left_out == 1 else 's'} not measured"
    return times(library_us / us) if library_us and us else ""


def number(value: float) -> str:
    """Three significant digits, never in powers of ten where a person would not."""
    if value == 0:
        return "0"
    if math.isnan(value):
        return "not measured"
    if abs(value) >= MOST_DIGITS:
        return f"{value:.2e}" if math.isfinite(value) else "∞" if value > 0 else "-∞"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    if abs(value) >= 100:
        return f"{value:.0f}"
    if abs(value) >= 0.01:
        digits = 2 if abs(value) < 10 else 1
        return f"{value:.{digits}f}" if abs(value) >= 1 else f"{value:.3g}"
    return f"{value:.2e}"


def interval(low_us: float, high_us: float) -> str:
    """`4.13 to 4.15 µs`: both ends in the unit of the upper, with one digit more than a single value has."""
    scale, unit = next(((scale, unit) for scale, unit in ((1e6, "s"), (1e3, "ms"), (1.0, "µs")) if high_us >= scale), (1e-3, "ns"))
    low, high = (_finer(us / scale) for us in (low_us, high_us))
    return f"{low} to {high} {unit}"


def fine_time(us: float) -> str:
    """`120.3 µs`: a time beside its interval, with the digits that the interval has."""
    return interval(us, us).partition(" to ")[2]


def _finer(value: float) -> str:
    """Four significant digits where they are not all before the point."""
    return f"{value:#.4g}".rstrip(".") if abs(value) < 1000 else number(value)


def energy_interval(low: float, high: float) -> str:
    """`19.0 to 21.0 mJ`: both ends in the unit of the upper."""
    scale, unit = next(((scale, unit) for scale, unit in ((1.0, "J"), (1e-3, "mJ")) if high >= scale), (1e-6, "µJ"))
    return f"{number(low / scale)} to {number(high / scale)} {unit}"


def energy(joules: float | None) -> str:
    """Joules with a fitting unit."""
    if joules is None or math.isnan(joules):
        return "not measured"
    for scale, unit in ((1.0, "J"), (1e-3, "mJ")):
        if abs(joules) >= scale:
            return f"{number(joules / scale)} {unit}"
    return f"{number(joules * 1e6)} µJ"


def rate(tflops: float) -> str:
    """TFLOP/s, or GFLOP/s where that reads better."""
    return f"{number(tflops)} TFLOP/s" if tflops >= 1 else f"{number(tflops * 1e3)} GFLOP/s"


def bandwidth(gb_per_s: float) -> str:
    """GB/s, or TB/s where that reads better."""
    return f"{number(gb_per_s / 1e3)} TB/s" if gb_per_s >= 1000 else f"{number(gb_per_s)} GB/s"


def percent(share: float) -> str:
    """A share as a percentage."""
    if not abs(share) < MOST_DIGITS:
        return "not measured" if math.isnan(share) else f"{number(100 * share)}%"
    whole = 0.1 <= share < 0.98 or share == 1 or share >= 1.1
    return f"{share * 100:.0f}%" if whole else f"{share * 100:.1f}%"


def plain_ratio(ratio: float) -> str:
    """Three decimals where differences of a few per cent are told, fewer for large ones, and no 0.000."""
    if 0 < ratio < 0.01:
        return f"{ratio:.2g}"
    return f"{ratio:.3f}" if abs(ratio) < 10 else f"{ratio:.1f}" if abs(ratio) < 1000 else number(ratio)


def times(ratio: float) -> str:
    """A ratio of two times: `1.25x`."""
    return f"{plain_ratio(ratio)}×"
