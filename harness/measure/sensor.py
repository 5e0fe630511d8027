"""What a power sensor does, inferred from its readings alone: how often it is updated, and over which window it averages.

A load is switched on and off in pulses of varying length while the sensor is polled (`record`). The period follows from the times between
changes of the reading. The window is the one for which "share of the window in which the load was on" explains the readings best, by least
squares over windows and lags. Vendors document neither; on an H100 the instantaneous reading is an average over 25 ms of every 100 ms, the
other one over a second (arXiv 2312.02741).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from klab.harness.measure.calibration import Figure
from klab.harness.measure.stats import CONFIDENCE, block_ratio
from klab.kernels.contract import Json

Floats = NDArray[np.float64]

# Between two polls; NVML answers in 20 us to some ms.
POLL_S = 0.001
# Pulses from well below the shortest window that is known (25 ms) to near the longest (1 s), in random order, so that every phase between
# load and sensor occurs.
SHORTEST_PULSE_S, LONGEST_PULSE_S = 0.015, 0.7
LEAST_CHANGES = 20
# Updates whose reading happens to repeat are missed: the next interval is a multiple. Of the intervals so many must be one.
REGULAR_SHARE = 0.8
OFF_BY = 0.25
# A window must explain so much of the variance: below it the load was not seen, or the sensor is no moving average.
LEAST_EXPLAINED = 0.8
# With 5% of noise a moving average still explains 99%: what is explained by less is something else, and its interval is that of a likeness.
WELL_EXPLAINED = 0.97
WINDOWS_S = np.geomspace(0.004, 2.0, 90)
LAGS_S = np.concatenate([np.arange(0.0, 0.12, 0.008), np.arange(0.12, 0.5, 0.02)])
# How fast a board's power follows its load (regulators, clocks) is not what the sensor does, and looks much like a longer window.
# Rough ones, and which finer ones are looked at around each. From SLOWEST_RISE_S on, a rise cannot be told from a window.
RISES_S = {
    0.0: np.array([0.0, 0.0007, 0.0014, 0.002, 0.003]),
    0.005: np.array([0.002, 0.003, 0.004, 0.005, 0.006, 0.007, 0.008, 0.009]),
    0.013: np.array([0.008, 0.0095, 0.011, 0.0125, 0.014, 0.016, 0.02, 0.025]),
    0.035: np.array([0.02, 0.025, 0.03, 0.035, 0.04, 0.05, 0.06, 0.08]),
}
SLOWEST_RISE_S = 0.05
# Of a change between two polls that lie further apart than this many usual gaps (a busy host), the moment is not known.
SHARP_GAPS = 2.0
# The load is tabulated in such steps.
STEP_S = 0.0005
MOST_UPDATES = 400
BOOTSTRAPS = 200


class Pulses(Protocol):
    """A load that can be switched. `feed` keeps the device busy for about `ahead_s` seconds; without it the device falls idle."""

    ahead_s: float

    def feed(self) -> None:
        """Queue more where little is left; never waits."""

    def idle(self) -> bool:
        """True when nothing is queued or running."""


@dataclass(frozen=True)
class Observed:
    """What one sensor showed: (poll before, poll, reading) wherever that differed from the last. Seconds, and watts or joules."""

    changes: tuple[tuple[float, float, float], ...]
    polls: int
    seconds: float
    trouble: str = ""

    @property
    def gap_s(self) -> float:
        """Between two polls, usually: the median of those between which a reading changed."""
        if self.changes:
            return float(np.median([at - before for before, at, _ in self.changes]))
        return self.seconds / self.polls if self.polls else 0.0

    @property
    def sharp(self) -> Observed:
        """Without the changes that fell into a pause of the polling: half-way between two polls is then far from when they were."""
        # Long pauses catch more changes than short ones do: the lower quartile still is a usual gap where most changes fell into one.
        widest = SHARP_GAPS * float(np.percentile([at - before for before, at, _ in self.changes] or [0.0], 25))
        return replace(self, changes=tuple(change for change in self.changes if change[1] - change[0] <= widest))

    @property
    def at_s(self) -> Floats:
        """When each new reading appeared: half-way between the two polls."""
        return np.array([(before + at) / 2 for before, at, _ in self.changes], dtype=np.float64)

    @property
    def readings(self) -> Floats:
        """The new readings."""
        return np.array([value for _, _, value in self.changes], dtype=np.float64)


@dataclass(frozen=True)
class Recording:
    """All sensors of a device under one load, and when that was on: (from, to) in seconds."""

    sensors: Mapping[str, Observed]
    busy: tuple[tuple[float, float], ...] = ()
    seconds: float = 0.0

    def to_json(self) -> dict[str, Json]:
        """For the way out of a worker."""
        sensors = {
            name: {"changes": [[round(x, 6) for x in c] for c in o.changes], "polls": o.polls, "seconds": o.seconds, "trouble": o.trouble}
            for name, o in self.sensors.items()
        }
        return {"sensors": sensors, "busy": [list(span) for span in self.busy], "seconds": self.seconds}

    @classmethod
    def from_json(cls, data: Mapping[str, Json]) -> Recording:
        """The inverse of `to_json`."""
        sensors = {
            name: Observed(tuple((c[0], c[1], c[2]) for c in o["changes"]), o["polls"], o["seconds"], o["trouble"])
            for name, o in data["sensors"].items()
        }
        return cls(sensors, tuple((a, b) for a, b in data["busy"]), data["seconds"])


def pulse_lengths(seconds: float, *, seed: int = 0) -> list[float]:
    """Lengths of pauses and pulses in turn (a pause first) that add up to about `seconds`, drawn evenly over their logarithm."""
    draw = np.random.default_rng(seed)
    lengths: list[float] = []
    while math.fsum(lengths) < seconds:
        lengths.append(float(math.exp(draw.uniform(math.log(SHORTEST_PULSE_S), math.log(LONGEST_PULSE_S)))))
    return lengths


@dataclass
class _Watch:
    read: Callable[[], float | None]
    changes: list[tuple[float, float, float]] = field(default_factory=list)
    last: float | None = None
    last_s: float = 0.0
    polls: int = 0
    trouble: str = ""


def record(
    sensors: Mapping[str, Callable[[], float | None]],
    load: Pulses,
    lengths: Sequence[float],
    *,
    clock: Callable[[], float] = time.perf_counter,
    sleep: Callable[[float], None] = time.sleep,
) -> Recording:
    """Poll every sensor while the load is off and on in turn for these lengths. A sensor that stops answering is noted, not raised."""
    started = clock()
    watches = {name: _Watch(read) for name, read in sensors.items()}
    busy: list[tuple[float, float]] = []

    def poll() -> None:
        began = clock()
        for watch in watches.values():
            _poll(watch, lambda: clock() - started)
        left = POLL_S - (clock() - began)
        if left > 0:
            sleep(left)

    def ended(fed: float, still: float, now: float) -> float:
        """Between two polls, of which the middle errs to neither side; but not long after it was fed."""
        return min((still + now) / 2, max(fed + load.ahead_s, still))

    for turn, length in enumerate(lengths):
        begun = clock() - started
        if turn % 2:
            until, fed = begun + length, None
            while (now := clock() - started) < until:
                if fed is not None and load.idle():  # this process was held up, and the load ran dry meanwhile
                    busy.append((begun, ended(fed, fed, now)))
                    begun = now
                load.feed()
                fed = clock() - started
                poll()
            still = fed = begun if fed is None else fed
            while not load.idle():
                still = clock() - started
                poll()
            busy.append((begun, ended(fed, still, clock() - started)))
        else:
            while clock() - started - begun < length:
                poll()
    seconds = clock() - started
    seen = {name: Observed(tuple(w.changes), w.polls, seconds, w.trouble) for name, w in watches.items()}
    return Recording(seen, tuple(busy), seconds)


def _poll(watch: _Watch, now: Callable[[], float]) -> None:
    if watch.trouble:
        return
    value = watch.read()
    at = now()
    if value is None:
        watch.trouble = f"it stopped answering after {watch.polls} readings" if watch.polls else "it cannot be read"
        return
    if watch.last is not None and value != watch.last:
        watch.changes.append((watch.last_s, at, value))
    watch.last, watch.last_s, watch.polls = value, at, watch.polls + 1


def update_period(seen: Observed) -> Figure:
    """Milliseconds between updates, or why they cannot be told."""
    if seen.trouble:
        return Figure.missing(seen.trouble)
    seen = seen.sharp
    if len(seen.changes) < LEAST_CHANGES:
        return Figure.missing(f"the reading changed {len(seen.changes)} times in {seen.seconds:.0f} s, and {LEAST_CHANGES} are needed")
    between = np.diff(seen.at_s)
    polled = f"read every {1e3 * seen.gap_s:.1f} ms"
    if float(np.median(between)) <= 2 * seen.gap_s:
        most_ms = 2e3 * seen.gap_s
        return Figure(None, 0.0, most_ms, f"it changes as often as it is read: every {most_ms:.1f} ms or sooner", polled)
    short = between[between <= 1.5 * np.percentile(between, 20)]
    period = float(np.median(short))
    for _ in range(5):
        counts = np.maximum(np.rint(between / period), 1.0)
        good = np.abs(between / period - counts) <= OFF_BY
        if not good.any():
            break
        period = float(between[good].sum() / counts[good].sum())
    if good.mean() < REGULAR_SHARE:
        spread = np.percentile(between, (10, 50, 90)) * 1e3
        return Figure.missing("it changes at no regular interval: {:.1f}, {:.1f}, {:.1f} ms are its 10%, 50% and 90%".format(*spread))
    value, low, high = (1e3 * x for x in block_ratio(between[good].tolist(), counts[good].tolist()))
    return Figure(value, low, high, note=f"{len(between)} intervals, {polled}")


def averaging_window(seen: Observed, busy: Sequence[tuple[float, float]], *, seed: int = 0) -> Figure:
    """Milliseconds over which one reading of a power sensor is averaged, or why they cannot be told."""
    seen = seen.sharp
    if seen.trouble or len(seen.changes) < LEAST_CHANGES:
        return update_period(seen)
    return _window(seen.at_s, seen.readings, busy, resolution_s=2 * seen.gap_s, seed=seed)


def counter_window(seen: Observed, busy: Sequence[tuple[float, float]], period: Figure, *, seed: int = 0) -> Figure:
    """The same for an energy counter: the window whose power one step of the counter holds. Shorter than the period, the counter sees a
    part of the time only.
    """
    seen = seen.sharp
    if seen.trouble or len(seen.changes) < LEAST_CHANGES or period.value is None:
        return Figure.missing(period.reason or seen.trouble)
    at, joules = seen.at_s, seen.readings
    between = np.diff(at)
    # A counter that starts again from nothing (a wrap, a reloaded driver) makes one step that is none.
    single = (np.abs(between * 1e3 / period.value - 1.0) <= OFF_BY) & (np.diff(joules) >= 0)
    if single.sum() < LEAST_CHANGES:
        return Figure.missing("its steps are too irregular")
    watts = np.diff(joules)[single] / (period.value / 1e3)
    return _window(at[1:][single], watts, busy, resolution_s=2 * seen.gap_s, seed=seed)


def _window(at_s: Floats, watts: Floats, busy: Sequence[tuple[float, float]], *, resolution_s: float, seed: int) -> Figure:
    if not busy:
        return Figure.missing("no load was run")
    stride = -(-len(at_s) // MOST_UPDATES)
    at_s, watts = at_s[::stride], watts[::stride]
    load = _Load(busy, float(at_s[-1]))
    ones = np.ones((len(at_s), 1))
    rough = _grid(WINDOWS_S, LAGS_S, np.array(list(RISES_S)))
    left = _unexplained(load.shares(at_s, *rough), watts, ones)[:, 0]
    # The nearest of each rough rise, and the two best of them looked at more finely and together: a slow rise and a long window are much
    # alike, and the interval must know of both.
    firsts = [int(np.where(rough[2] == rise, left, np.inf).argmin()) for rise in RISES_S]
    fine = [_near(*(float(values[i]) for values in rough)) for i in sorted(firsts, key=lambda i: left[i])[:2]]
    near = [np.concatenate(values) for values in zip(*fine, strict=True)]
    shares = load.shares(at_s, *near)
    left = _unexplained(shares, watts, ones)[:, 0]
    window, lag, rise = (float(values[left.argmin()]) for values in near)
    total = float(((watts - watts.mean()) ** 2).sum())
    explained = 1.0 - float(left.min()) / total if total else 0.0
    if explained < LEAST_EXPLAINED:
        return Figure.missing(f"no averaging window explains the readings: the best explains {explained:.0%} of their variance")
    # Neighbouring readings share their windows: whole blocks of them are drawn.
    block = max(1, min(len(at_s) // 10, math.ceil(window / float(np.median(np.diff(at_s))))))
    draws = np.random.default_rng(seed).integers(0, -(-len(at_s) // block), size=(BOOTSTRAPS, -(-len(at_s) // block)))
    weights = np.stack([np.bincount(draw, minlength=draws.shape[1]).repeat(block)[: len(at_s)] for draw in draws], axis=1).astype(float)
    picks = near[0][_unexplained(shares, watts, weights).argmin(axis=0)]
    tail = 50.0 * (1.0 - CONFIDENCE)
    # The bootstrap's picks lie on a grid: half a step on either side belongs to them.
    step = 1.5 ** (1 / 20)
    low, high = float(np.percentile(picks, tail)) / step**0.5, float(np.percentile(picks, 100.0 - tail)) * step**0.5
    # The load's edges are known to half a gap between two polls, and all alike: no bootstrap shows that.
    low, high = max(min(low, window) - resolution_s / 4, 0.0), max(high, window) + resolution_s / 4
    note = (
        f"{len(at_s)} readings, {len(busy)} pulses; explains {explained:.1%} of the variance; ends {1e3 * lag:.0f} ms before it shows"
        + (f"; the power follows the load within {1e3 * rise:.0f} ms" if rise else "")
        + ("; no plain average fits (a filter, or a board that is slow itself): the nearest one" if explained < WELL_EXPLAINED else "")
    )
    if window <= resolution_s or window <= WINDOWS_S[0] * step:
        most_ms = 1e3 * max(high, resolution_s)
        return Figure(None, 0.0, most_ms, f"shorter than can be told here: {most_ms:.0f} ms at most", note)
    if rise >= SLOWEST_RISE_S and window < 4 * rise:
        reason = f"the board's power follows its load too slowly (more than {1e3 * SLOWEST_RISE_S:.0f} ms) to tell its rise from the window"
        return Figure(None, 0.0, 1e3 * (high + 2 * rise), f"{reason}: {1e3 * (high + 2 * rise):.0f} ms at most", note)
    if window >= WINDOWS_S[-1] / step:
        return Figure(None, 1e3 * low, None, f"longer than can be told here: {1e3 * low:.0f} ms at least", note)
    return Figure(1e3 * window, 1e3 * low, 1e3 * high, note=note)


def _near(window: float, lag: float, rise: float) -> tuple[Floats, Floats, Floats]:
    """The finer hypotheses around a rough one."""
    lags = np.unique(np.maximum(lag + np.linspace(-0.016, 0.016, 9), 0.0))
    return _grid(window * np.geomspace(1 / 1.5, 1.5, 41), lags, RISES_S[rise])


def _grid(windows: Floats, lags: Floats, rises: Floats) -> tuple[Floats, Floats, Floats]:
    """All combinations, each list as long as there are hypotheses."""
    first, second, third = (grid.ravel() for grid in np.meshgrid(windows, lags, rises, indexing="ij"))
    return first, second, third


class _Load:
    """The load as the board's power follows it: 0 off, 1 on, in between an exponential with time constant `rise`; off before the start."""

    def __init__(self, busy: Sequence[tuple[float, float]], end_s: float) -> None:
        self._busy = busy
        self._times = np.arange(0.0, end_s + STEP_S, STEP_S)
        self._until: dict[float, Floats] = {}

    def _busy_until(self, rise: float) -> Floats:
        """The integral of the load up to each of `_times`."""
        if rise not in self._until:
            knots = np.array([0.0, *(t for span in self._busy for t in span)])
            on = np.arange(len(knots)) % 2
            level = np.zeros(len(knots))
            for i in range(1, len(knots)):
                fade = math.exp(-(knots[i] - knots[i - 1]) / rise) if rise else 0.0
                level[i] = on[i - 1] + (level[i - 1] - on[i - 1]) * fade
            whole = np.concatenate([[0.0], np.cumsum(on[:-1] * np.diff(knots))])
            at = np.searchsorted(knots, self._times, side="right") - 1
            since = self._times - knots[at]
            done = whole[at] + on[at] * since
            if rise:  # of s' = (load - s) / rise, the integral of s is the load's less rise x s
                done = done - rise * (on[at] + (level[at] - on[at]) * np.exp(-since / rise))
            self._until[rise] = done
        return self._until[rise]

    def shares(self, at_s: Floats, windows: Floats, lags: Floats, rises: Floats) -> Floats:
        """[hypothesis, reading]: the mean load over the window that ended `lag` before the reading."""
        found = np.empty((len(windows), len(at_s)))
        for rise in np.unique(rises):
            mine = rises == rise
            done = self._busy_until(float(rise))
            end = at_s[None, :] - lags[mine, None]
            found[mine] = (_look_up(done, end) - _look_up(done, end - windows[mine, None])) / windows[mine, None]
        return found


def _look_up(done: Floats, times: Floats) -> Floats:
    """Linear interpolation in a table with a value every STEP_S; its first value before the beginning."""
    place = np.clip(times / STEP_S, 0.0, len(done) - 1.001)
    below = place.astype(np.intp)
    found: Floats = done[below] + (done[below + 1] - done[below]) * (place - below)
    return found


def _unexplained(shares: Floats, watts: Floats, weights: Floats) -> Floats:
    """[hypothesis, weighting]: the weighted squares that `watts = idle + b * share` (b >= 0) leaves."""
    total = weights.sum(axis=0)
    mean_w = watts @ weights / total
    var_w = (watts**2 @ weights) / total - mean_w**2
    mean_s = shares @ weights / total
    var_s = np.maximum((shares**2) @ weights / total - mean_s**2, 1e-12)
    both = np.maximum((shares * watts) @ weights / total - mean_s * mean_w, 0.0)
    left: Floats = (var_w - both**2 / var_s) * total
    return left
