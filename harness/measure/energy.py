"""Energy per launch from the board's energy counter, cross-checked with power times time, and refused where it cannot be known.

The counter moves in steps (about every 100 ms on an H100: arXiv 2312.02741), so a window starts and stops at its edges and must span
many. A single sub-millisecond kernel read naively is off by up to 80% (FinGraV, on MI300X).
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from klab.harness.measure.power import PowerMeter
from klab.harness.measure.stats import block_ratio, is_marked
from klab.kernels.contract import Record

RAMP_S = 2.0  # dropped: the power sensor's own rise takes 0.9 s on an H100, and the board warms
RAMP_LIMIT_S = 6.0  # a board that still warms by 1 C a second after this long is measured anyway
MIN_UPDATES = 50
MAX_DISAGREEMENT = 0.05
MAX_MARKED = 0.1
TRACE_POINTS = 200
STATE_EVERY_S = 0.25  # clock, temperature and reasons need not be read at every poll
# Without a calibration a sensor may see 25 ms of every 100 (as on an A100 or H100): 50 updates are 1.25 s of what was really sampled.
LEAST_SAMPLED_S = 1.25
# No sensor is known that averages over more than a second, and a counter that needs more steps than this for LEAST_SAMPLED_S (it would see
# 1 ms of each) cannot be trusted with a kernel's energy: what a calibration's file says beyond them is held to them. Both are guesses.
MOST_RAMP_S = 10.0
MOST_UPDATES = 1250
# Two blocks of five updates are the least for an interval; twice as many make it one that is worth having.
LEAST_UPDATES = 20
# A window ends at the latest after this many times its length: a counter that stands still must not hold up the run.
PATIENCE = 2.5


@dataclass(frozen=True)
class Guard(Record):
    """What an energy window must have on a device: seconds dropped in front, steps of the counter. `source` says where that is from."""

    ramp_s: float = RAMP_S
    updates: int = MIN_UPDATES
    source: str = ""


def guard_for(sensor_window_s: float | None, counter_period_s: float | None, counter_window_s: float | None, source: str) -> Guard:
    """The guard of a device whose sensor is known (None: what is not).

    The ramp lasts until two windows of the power reading have passed, and RAMP_S at least, for the board warms too. Of the counter so many
    updates are wanted that LEAST_SAMPLED_S was really seen: a counter that sees all of its period needs fewer than one that sees a part.
    """
    ramp_s = min(max(RAMP_S, 2.0 * (sensor_window_s or 0.0) + (counter_period_s or 0.0)), MOST_RAMP_S)
    updates = MIN_UPDATES
    if counter_period_s and counter_window_s:
        seen_s = max(min(counter_period_s, counter_window_s), LEAST_SAMPLED_S / MOST_UPDATES)
        updates = max(LEAST_UPDATES, math.ceil(LEAST_SAMPLED_S / seen_s))
    return Guard(round(ramp_s, 3), updates, source)


class Load(Protocol):
    """A launch that can be kept running without gaps. `advance` keeps work queued and returns how many launches have ended so far."""

    def advance(self) -> int:
        """Queue more, wait for the oldest, and return the launches that have ended since the load began."""

    def settle(self) -> None:
        """Wait for everything that is queued."""


@dataclass(frozen=True)
class Window:
    """What one sustained run showed. `edges` are (seconds, launches ended, counter in joules) at each step of the counter."""

    edges: tuple[tuple[float, int, float], ...]
    trace: tuple[tuple[float, float], ...]
    marked_share: float = 0.0
    trouble: str = ""


@dataclass(frozen=True)
class Energy:
    """Joules per launch with its interval, or None with the reason; `power_w` is the mean power under load.

    `power_w` comes from the counter where that is valid, otherwise it is the median of the instantaneous readings.
    """

    energy_j: float | None = None
    low_j: float | None = None
    high_j: float | None = None
    power_w: float | None = None
    reason: str = ""
    trace: tuple[tuple[float, float], ...] = field(default=())


def idle_power(
    meter: PowerMeter, *, settle_s: float = 1.0, seconds: float = 0.5, sleep: Callable[[float], None] = time.sleep
) -> float | None:
    """Median power with nothing running, after `settle_s` of rest; None without a sensor."""
    if meter.power_w() is None:
        return None
    sleep(settle_s)
    readings = []
    for _ in range(max(int(seconds / 0.025), 5)):
        power = meter.power_w()
        if power is not None:
            readings.append(power)
        sleep(0.025)
    return statistics.median(readings) if readings else None


def sustain(
    load: Load,
    meter: PowerMeter,
    *,
    seconds: float,
    updates: int = MIN_UPDATES,
    ramp_s: float = RAMP_S,
    clock: Callable[[], float] = time.perf_counter,
) -> Window:
    """Run the load until `seconds` and `updates` steps of the counter have passed after the ramp; never raises for the sensor's sake."""
    started = clock()
    edges: list[tuple[float, int, float]] = []
    trace: list[tuple[float, float]] = []
    states: list[tuple[float, float | None]] = []
    marks: list[bool] = []
    previous = meter.energy_j()
    ramp_ended: float | None = None
    try:
        while previous is not None:
            ended = load.advance()
            now = clock() - started
            counter = meter.energy_j()
            power = meter.power_w()
            if power is not None:
                trace.append((now, power))
            if not states or now - states[-1][0] >= STATE_EVERY_S:
                state = meter.read()
                states.append((now, state.temperature_c))
                marks.append(is_marked(state.throttle_reasons))
            if counter is None:
                break
            if ramp_ended is None:
                if now >= max(RAMP_LIMIT_S, ramp_s) or (now >= ramp_s and not _warming(states)):
                    ramp_ended = now
            elif counter != previous:
                edges.append((now, ended, counter))
                if now - edges[0][0] >= seconds and len(edges) > updates:
                    break
            if ramp_ended is not None and now - ramp_ended > PATIENCE * seconds + 1.0:
                break
            previous = counter
    finally:
        load.settle()
    gone = previous is None or counter is None
    trouble = f"the energy counter cannot be read ({meter.trouble or 'no reason given'})" if gone else ""
    return Window(tuple(edges), tuple(trace), sum(marks) / len(marks) if marks else 0.0, trouble)


def _warming(states: Sequence[tuple[float, float | None]]) -> bool:
    """True while the temperature rose by more than 1 C within the last second (or nothing older than that is known)."""
    last_s, last_c = states[-1]
    if last_c is None:
        return False
    older = [c for at, c in states if at <= last_s - 1.0 and c is not None]
    return not older or last_c - older[-1] > 1.0


def judge(windows: Sequence[Window], *, seconds: float, seed: int = 0, guard: Guard | None = None) -> Energy:
    """Energy per launch over all windows together, or why not."""
    guard = guard or Guard()
    trace = _joined(windows)
    inside = [p for w in windows if len(w.edges) > 1 for at, p in w.trace if w.edges[0][0] <= at <= w.edges[-1][0]]
    median_w = statistics.median(inside) if inside else None

    def refuse(reason: str) -> Energy:
        return Energy(power_w=median_w, reason=reason, trace=trace)

    for window in windows:
        if window.trouble:
            return refuse(window.trouble)
    steps = [(b, a) for w in windows for a, b in zip(w.edges, w.edges[1:], strict=False)]
    joules = [b[2] - a[2] for b, a in steps]
    launches = [float(b[1] - a[1]) for b, a in steps]
    span_s = sum(w.edges[-1][0] - w.edges[0][0] for w in windows if w.edges)
    if len(steps) < guard.updates or span_s < seconds:
        return refuse(
            f"too short: {len(steps)} steps of the energy counter in {span_s:.1f} s; {guard.updates} steps and {seconds:.1f} s are needed"
        )
    if min(joules) < 0 or not sum(launches):
        return refuse("the energy counter went backwards" if min(joules) < 0 else "no launch ended within the window")
    if max(w.marked_share for w in windows) > MAX_MARKED:
        return refuse("the hardware throttled for heat or power supply during the window")
    if median_w is None:
        return refuse("power cannot be read, so the counter cannot be cross-checked")
    counter_w = sum(joules) / span_s
    disagreement = abs(median_w - counter_w) / counter_w if counter_w else float("inf")
    if disagreement > MAX_DISAGREEMENT:
        return refuse(f"the counter ({counter_w:.1f} W) and power x time ({median_w:.1f} W) disagree by {disagreement:.1%}")
    value, low, high = block_ratio(joules, launches, seed=seed)
    reason = f"counter over {span_s:.1f} s, {len(steps)} steps; power x time agrees within {disagreement:.1%}"
    if guard.source:
        reason += f"; {guard.updates} steps are enough by the {guard.source}"
    return Energy(value, low, high, counter_w, reason, trace)


def _joined(windows: Sequence[Window]) -> tuple[tuple[float, float], ...]:
    """The traces one behind another, thinned to TRACE_POINTS by taking medians of neighbours."""
    points: list[tuple[float, float]] = []
    offset = 0.0
    for window in windows:
        points += [(offset + at, power) for at, power in window.trace]
        offset = points[-1][0] if points else 0.0
    stride = -(-len(points) // TRACE_POINTS)
    chunks = [points[i : i + stride] for i in range(0, len(points), stride)] if stride else []
    return tuple((round(chunk[0][0], 3), round(statistics.median(p for _, p in chunk), 2)) for chunk in chunks)
