"""What the sensors showed while a result was measured, in words: mean power, how far the clock moved, what held it down."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from klab.harness.measure.stats import POWER_CAP
from klab.harness.report.units import MOST_DIGITS, number, percent
from klab.harness.store.result import Result
from klab.harness.watch.node_figures import HEAT, SETTING, SLOWDOWN, SUPPLY

# Points of one line, and results that are drawn.
POINTS = 200
RESULTS = 40
# Bits of NVML's mask of clock-event reasons. An idle device, and one that follows others, are not slowed down by anything.
REASONS: Mapping[int, str] = {POWER_CAP: "software power cap"} | HEAT | SUPPLY | SLOWDOWN | SETTING | {0x100: "display clocks"}


def reasons(mask: int | None) -> str:
    """NVML's reasons in words; "" where there was none, or nothing was read."""
    return ", ".join(words for bit, words in REASONS.items() if mask and mask & bit)


def power_limit(row: Result) -> float | None:
    """Watts that the device was allowed while it was measured: what the policy set, else what the driver said; None where not known."""
    for found in (row.policy.get("power_limit_w"), row.environment.get("power_limit_w")):
        if isinstance(found, int | float) and not isinstance(found, bool) and found > 0:
            return float(found)
    return None


def caption(row: Result, left_out: int = 0) -> str:
    """Mean power and its share of the limit, how far the clock moved, how much was throttled; then what the axes mean."""
    parts = [one for one in (_power(row), _clock(row), _heat(row), _throttle(row)) if one]
    if row.clocks_mhz or row.temperatures_c:
        parts.append(
            "When each round ran is not recorded: clock and temperature stand over the time of this result's own launches, read in the "
            "midst of each round, while other candidates ran in between."
        )
    if any(row.marked):
        parts.append("Open marks are rounds that the hardware slowed down; they do not count.")
    if row.power_trace:
        parts.append("Power was sampled in sustained runs after the rounds, which are joined here; the first seconds warm the board up.")
    if max(len(row.power_trace), len(row.samples_us)) > POINTS:
        parts.append(f"Of lines of more than {POINTS} points the least and the greatest of each stretch are drawn.")
    if left_out:
        parts.append(f"Drawn are {RESULTS} results (the most throttled first, then the longest traces); {left_out} more have readings.")
    return " ".join(parts)


def _whole(value: float) -> str:
    return f"{value:.0f}" if abs(value) < MOST_DIGITS else number(value)


def _signed(value: float) -> str:
    return f"{value:+.1f}" if abs(value) < MOST_DIGITS else number(value)


def _power(row: Result) -> str:
    limit = power_limit(row)
    beside = f", {percent(row.power_w / limit)} of its limit of {_whole(limit)} W" if row.power_w and limit else ""
    idle = f", of which {_whole(row.idle_power_w)} W are drawn idle" if row.idle_power_w else ""
    if row.power_w:
        return f"{number(row.power_w)} W on average under load{beside}{idle}{_joules(row)}."
    return "" if row.power_trace else f"Power was not sampled{f' ({row.energy_reason})' if row.energy_reason else ''}."


def _joules(row: Result) -> str:
    if not (row.energy_j and row.energy_ci_low_j and row.energy_ci_high_j):
        return ""
    low, high = (100 * (end / row.energy_j - 1) for end in (row.energy_ci_low_j, row.energy_ci_high_j))
    return f" (energy per launch known to {_signed(low)}% and {_signed(high)}%)"


def _clock(row: Result) -> str:
    known = [value for value, marked in zip(row.clocks_mhz, row.marked or (0,) * len(row.clocks_mhz), strict=False) if value and not marked]
    if len(known) < 2:
        return ""
    part = max(len(known) // 5, 1)
    first, last = (float(np.median(values)) for values in (known[:part], known[-part:]))
    every = [value for value in row.clocks_mhz if value]
    low, high = min(every), max(every)
    if low == high:
        return f"The SM clock stood at {_whole(low)} MHz in all {len(every)} rounds."
    word = "fell" if last < first else "rose"
    moved = f"{word} by {percent(abs(last / first - 1))}, from {_whole(first)} to {_whole(last)} MHz"
    if last == first:
        moved = f"began and ended at {_whole(first)} MHz"
    span = f"{_whole(low)} to {_whole(high)} MHz in all"
    return f"The SM clock {moved} (medians of the first and the last fifth of the rounds that count; {span})."


def _heat(row: Result) -> str:
    known = [value for value in row.temperatures_c if value is not None]
    if not known:
        return ""
    return f"{_whole(min(known))} °C throughout." if min(known) == max(known) else f"{_whole(min(known))} to {_whole(max(known))} °C."


def _throttle(row: Result) -> str:
    known = [mask for mask in row.throttle_reasons if mask is not None]
    if not known:
        return ""
    held = {words: sum(bool(mask & bit) for mask in known) for bit, words in REASONS.items()}
    told = ", ".join(
        f"{words} in {count} of {len(known)} rounds" for words, count in sorted(held.items(), key=lambda one: -one[1]) if count
    )
    marked = sum(row.marked)
    counted = f"{percent(marked / len(row.marked))} of the rounds were slowed down by the hardware and do not count. " if marked else ""
    return f"{counted}{told[:1].upper()}{told[1:]}." if told else "No reason for a lower clock was reported."
