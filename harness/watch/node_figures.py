"""Figures of what node_load's processes said: rates with their intervals, the slope under load, and the noise from process to process."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from klab.harness.measure.stats import median_interval
from klab.harness.watch.grade import Figure
from klab.harness.watch.node_runner import Said
from klab.kernels.contract import Json

# Readings are joined to blocks of so many seconds: neighbouring seconds of one device are not independent.
BLOCK_S = 10.0
# Fewer blocks than this give no interval.
LEAST_BLOCKS = 5
# Order statistics of fewer values than this end with their range, which holds the median in 76% (of three) to 93% (of five) and not in 95%.
LEAST_RANKED = 6
# Blocks in a row whose mean is a dip: half a minute.
DIP_BLOCKS = 3
# The part of a sustained run in which the device warms up and is not counted, and at most so much of it.
WARM_SHARE, WARM_S = 0.2, 60.0
# Clock-event reasons by NVML's header; the software power cap (0x4) is the normal state of a large matmul.
HEAT = {0x20: "software thermal slowdown", 0x40: "hardware thermal slowdown"}
SUPPLY = {0x80: "power brake"}
SLOWDOWN = {0x8: "hardware slowdown"}
POWER_CAP = 0x4
SETTING = {0x2: "application clocks"}


@dataclass(frozen=True)
class Slope:
    """The change of a rate over the counted part of a run, as a share of its median; negative is slower."""

    change: float
    low: float | None
    high: float | None
    seconds: float


def trace_of(said: Said) -> list[dict[str, Json]]:
    """The lines of a sustained run, in order."""
    return said.all("tflops")


def counted(trace: Sequence[Mapping[str, Json]]) -> list[Mapping[str, Json]]:
    """Those after the warm-up."""
    if not trace:
        return []
    warm = min(WARM_S, WARM_SHARE * float(trace[-1]["at"]))
    return [line for line in trace if float(line["at"]) > warm]


def blocks(trace: Sequence[Mapping[str, Json]], name: str) -> list[tuple[float, float]]:
    """(second, mean) of every BLOCK_S of a quantity; shorter blocks where the run is short, so that there are LEAST_BLOCKS if it can be."""
    rows = [(float(line["at"]), float(line[name])) for line in trace if line.get(name) is not None]
    if not rows:
        return []
    span = rows[-1][0] - rows[0][0]
    length = max(min(BLOCK_S, span / LEAST_BLOCKS), 1e-9)
    groups: dict[int, list[tuple[float, float]]] = {}
    for at, value in rows:
        groups.setdefault(min(int((at - rows[0][0]) / length), int(max(span / length, 1)) - 1 if span else 0), []).append((at, value))
    return [(statistics.fmean(at for at, _ in group), statistics.fmean(v for _, v in group)) for group in groups.values()]


def sustained(trace: Sequence[Mapping[str, Json]], name: str = "tflops") -> Figure | None:
    """The median over the blocks after the warm-up, with its interval; None where nothing was measured."""
    found = [value for _, value in blocks(counted(trace), name)]
    return figure(found, least=LEAST_BLOCKS)


def figure(values: Sequence[float], *, least: int = 3) -> Figure | None:
    """The median, with a 95% interval from `least` values on."""
    if not values:
        return None
    middle = statistics.median(values)
    if len(values) < least:
        return Figure(middle)
    if len(values) >= LEAST_RANKED:
        return Figure(middle, *median_interval(values))
    from scipy.special import stdtrit

    # The deviation of a median is pi/2 of a mean's, squared.
    half = float(stdtrit(len(values) - 1, 0.975)) * statistics.stdev(values) * math.sqrt(math.pi / 2 / len(values))
    return Figure(middle, middle - half, middle + half)


def slope(trace: Sequence[Mapping[str, Json]]) -> Slope | None:
    """How the rate changed from the end of the warm-up to the end of the run: Theil and Sen's line through the blocks.

    With its 95% interval; None for fewer than LEAST_BLOCKS blocks.
    """
    found = blocks(counted(trace), "tflops")
    if len(found) < LEAST_BLOCKS:
        return None
    from scipy.stats import theilslopes

    at, values = zip(*found, strict=True)
    steepness, _, low, high = theilslopes(values, at, 0.95)
    span = at[-1] - at[0]
    scale = span / statistics.median(values)
    return Slope(float(steepness) * scale, float(low) * scale, float(high) * scale, span)


def dip(trace: Sequence[Mapping[str, Json]]) -> float | None:
    """How far the slowest DIP_BLOCKS blocks in a row lie below the median, as a share of it; None of fewer blocks than LEAST_BLOCKS."""
    found = [value for _, value in blocks(counted(trace), "tflops")]
    if len(found) < LEAST_BLOCKS:
        return None
    lowest = min(statistics.fmean(found[n : n + DIP_BLOCKS]) for n in range(len(found) - DIP_BLOCKS + 1))
    return 1 - lowest / statistics.median(found)


def share(trace: Sequence[Mapping[str, Json]], bits: int) -> float | None:
    """Share of the readings under load in which one of these reasons held; None where none was read."""
    masks = [int(line["reasons"]) for line in trace if line.get("reasons") is not None]
    return sum(bool(mask & bits) for mask in masks) / len(masks) if masks else None


def extreme(trace: Iterable[Mapping[str, Json]], name: str, *, least: bool = False) -> float | None:
    """The largest (or least) reading of a quantity; None where there is none."""
    found = [float(line[name]) for line in trace if line.get(name) is not None]
    return (min(found) if least else max(found)) if found else None


def rounds(said: Said, work: str) -> list[float]:
    """Microseconds per launch of the rounds that count: those in which the hardware did not throttle."""
    lines = [line for line in said.all("work") if line["work"] == work]
    return [us for line in lines for us, mark in zip(line["us"], line["marked"], strict=True) if not mark]


def probe_times(probes: Sequence[Said], work: str) -> list[float]:
    """The median microseconds per launch of each process that has rounds of this work."""
    return [statistics.median(found) for said in probes if (found := rounds(said, work))]


def probe_rates(probes: Sequence[Said], work: str) -> list[float]:
    """The median rate of each process: TFLOP/s of the matmul, GB/s of the copy."""
    done = next((line for said in probes for line in said.all("work") if line["work"] == work), None)
    if done is None:
        return []
    per_us = done["flops"] / 1e6 if work == "matmul" else done["bytes"] / 1e3
    return [per_us / us for us in probe_times(probes, work)]


def noise(rates: Sequence[float]) -> float | None:
    """(greatest - least) / median over fresh processes; None of fewer than two."""
    return (max(rates) - min(rates)) / statistics.median(rates) if len(rates) >= 2 else None


def within(probes: Sequence[Said], work: str) -> float | None:
    """(p80 - p20) / p50 of the rounds of one process, the median over the processes."""
    found = []
    for taken in (rounds(said, work) for said in probes):
        if len(taken) >= LEAST_BLOCKS:
            cut = statistics.quantiles(taken, n=10)
            found.append((cut[7] - cut[1]) / statistics.median(taken))
    return statistics.median(found) if found else None
