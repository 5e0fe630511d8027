"""Numbers as people read them, with their unit."""

from __future__ import annotations

import math

# From here on nobody reads digits one by one.
MOST_DIGITS = 1e12


def time(us: float | None) -> str:
    """Microseconds with a fitting unit: `812 ns`, `4.14 us`, `1.25 ms`, `2.1 s`."""
    if us is None:
        return "not measured"
    for scale, unit in ((1e6, "s"), (1e3, "ms"), (1.0, "µs")):
        if us >= scale:
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
    if abs(value) >= MOST_DIGITS:
        return f"{value:.2e}" if math.isfinite(value) else "∞"
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
    low, high = (f"{us / scale:#.4g}".rstrip(".") for us in (low_us, high_us))
    return f"{low} to {high} {unit}"


def energy(joules: float | None) -> str:
    """Joules with a fitting unit."""
    if joules is None:
        return "not measured"
    for scale, unit in ((1.0, "J"), (1e-3, "mJ")):
        if joules >= scale:
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
    whole = 0.1 <= share < 0.98 or share == 1 or share >= 1.1
    return f"{share * 100:.0f}%" if whole else f"{share * 100:.1f}%"


def plain_ratio(ratio: float) -> str:
    """Three decimals where differences of a few per cent are told, fewer for large ones."""
    return f"{ratio:.3f}" if ratio < 10 else f"{ratio:.1f}" if ratio < MOST_DIGITS else number(ratio)


def times(ratio: float) -> str:
    """A ratio of two times: `1.25x`."""
    return f"{plain_ratio(ratio)}×"
