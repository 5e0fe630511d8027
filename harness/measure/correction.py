"""Rows of several devices of one kind made comparable: each time divided by how much slower that device's anchor is than the others'.

Boards of one kind differ by more than 5% in what they reach. The level of a device is its anchor's time: from the anchors that ran beside
its rows, or from its calibration where fewer devices have those. The reference is the median of the devices' levels, of the same epoch, so
that a newer library is not taken for a faster board. Only times are corrected, never joules; what is corrected says so in
`build["corrected"]`, and its interval is wider by the anchor's own.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from klab.harness.catalog.chips import find_chip
from klab.harness.measure.anchor import ANCHORS, anchor_times
from klab.harness.measure.calibration import Calibration, device_of
from klab.harness.measure.stats import FLOOR_ROUNDS, median_interval
from klab.harness.plan.roofline import Roofline
from klab.harness.store.result import Result
from klab.kernels.contract import Chip, Json
from klab.kernels.errors import KlabError

# A board that is further from the middle of its kind is not another board but in another state (a foreign load, a fault), and by that
# nothing is corrected. A guess: boards of one kind have been seen 5% apart and more, never by a quarter.
MOST = 1.25
Kind = tuple[str, str, str]
"""(chip, device name, epoch): among these, devices are compared."""


@dataclass(frozen=True)
class Factor:
    """A device's anchor over the reference: above 1, the device is slower than its peers. `source` says where the anchor was taken."""

    value: float
    low: float
    high: float
    anchor: str
    source: str


@dataclass(frozen=True)
class _Level:
    us: float
    low: float
    high: float
    source: str


class Correction:
    """The factors of the devices that these rows come from."""

    def __init__(
        self, rows: Iterable[Result], calibrations: Mapping[str, Calibration] | None = None, chip_of: Callable[[str], Chip] = find_chip
    ) -> None:
        self._chip_of, self._chips = chip_of, dict[str, Chip | None]()
        own: dict[tuple[Kind, str, str], list[_Level]] = defaultdict(list)
        self._devices: dict[Kind, set[str]] = defaultdict(set)
        for row in rows:
            device = device_of(row)
            if not device or row.kind != "measured":
                continue
            self._devices[_kind(row)].add(device)
            for anchor in ANCHORS:
                level = _own(row, anchor)
                if level is not None:
                    own[(_kind(row), device, anchor)].append(level)
        self._levels: dict[tuple[Kind, str], dict[str, _Level]] = {}
        self._in_laps: set[tuple[Kind, str]] = set()
        for kind, devices in self._devices.items():
            for anchor in ANCHORS:
                beside = {d: _beside(own[(kind, d, anchor)]) for d in devices if own[(kind, d, anchor)]}
                calibrated = {d: level for d in devices if (level := _calibrated(kind, (calibrations or {}).get(d), anchor))}
                # Never a mixture: within a contest an anchor may run warmer than in a calibration, on the same device.
                in_laps = len(beside) > 1 and len(beside) >= len(calibrated)
                levels = _alike(beside if in_laps else calibrated)
                if len(levels) > 1:
                    self._levels[(kind, anchor)] = levels
                    self._in_laps |= {(kind, anchor)} if in_laps else set()

    def factor(self, row: Result) -> Factor | None:
        """How much slower the row's device is than its peers in what bounds the row; None where that is not known, or it has no peers."""
        kind = _kind(row)
        if not any((kind, anchor) in self._levels for anchor in ANCHORS):
            return None  # before the chip is looked up: a CPU is probed for it
        anchor = self._anchor(row)
        levels = self._levels.get((kind, anchor), {})
        level = (_own(row, anchor) if (kind, anchor) in self._in_laps else None) or levels.get(device_of(row))
        if level is None:
            return None
        reference = statistics.median(found.us for found in levels.values())
        value, low, high = level.us / reference, level.low / reference, level.high / reference
        return Factor(value, low, high, anchor, level.source) if 1 / MOST < value < MOST else None

    def apply(self, row: Result) -> Result:
        """The row with its time as a typical device of its kind would have it, or the row itself. Samples and energy stay as measured."""
        if row.median_us is None or row.ci_low_us is None or row.ci_high_us is None or "corrected" in row.build:
            return row
        factor = self.factor(row)
        if factor is None:
            return row
        said: dict[str, Json] = {**dataclasses.asdict(factor), "measured_us": row.median_us, "device": device_of(row)}
        return dataclasses.replace(
            row,
            median_us=row.median_us / factor.value,
            q1_us=None if row.q1_us is None else row.q1_us / factor.value,
            q3_us=None if row.q3_us is None else row.q3_us / factor.value,
            ci_low_us=row.ci_low_us / factor.high,
            ci_high_us=row.ci_high_us / factor.low,
            build={**row.build, "corrected": said},
        )

    @property
    def several(self) -> bool:
        """Are there several devices of one kind?"""
        return any(len(devices) > 1 for devices in self._devices.values())

    def notes(self) -> list[str]:
        """Lines for people on every kind of which there are several devices: what is corrected by how much, and what is not."""
        lines = []
        for kind, devices in sorted(self._devices.items()):
            known = [anchor for anchor in ANCHORS if (kind, anchor) in self._levels]
            if len(devices) > 1 and not known:
                lines.append(
                    f"{kind[1]}: results of {len(devices)} devices are compared without a correction, for their anchors in this epoch are "
                    f"not known: klab calibrate takes them"
                )
            for anchor in known:
                levels = self._levels[(kind, anchor)]
                middle = statistics.median(found.us for found in levels.values())
                each = ", ".join(f"{device} x{found.us / middle:.3f}" for device, found in sorted(levels.items()))
                others = (
                    f"; no {anchor} anchor, or one far off: {', '.join(sorted(devices - set(levels)))}" if devices - set(levels) else ""
                )
                lines.append(
                    f"{kind[1]}: times are corrected by the {anchor} anchor over the median of {len(levels)} devices: {each}{others}"
                )
        return lines

    def _anchor(self, row: Result) -> str:
        if row.chip not in self._chips:
            try:
                self._chips[row.chip] = self._chip_of(row.chip)
            except KlabError:
                self._chips[row.chip] = None
        chip = self._chips[row.chip]
        dtype = row.math_dtype or str(row.problem.get("dtype", "bfloat16"))
        if chip is None or not row.bytes_moved or (chip.peak_flops(dtype) is None and chip.peak_flops("float32") is None):
            return "copy"
        return "matmul" if Roofline(chip, dtype).bound(row.flops, row.bytes_moved)[1] == "compute" else "copy"


def corrected(rows: Iterable[Result], calibrations: Mapping[str, Calibration] | None = None) -> tuple[list[Result], list[str]]:
    """All rows, those corrected whose device has peers and an anchor; and what is to be said of it."""
    known = list(rows)
    correction = Correction(known, calibrations)
    return [correction.apply(row) for row in known], correction.notes()


def measured_us(row: Result) -> float | None:
    """A row's time as it was measured, before any correction."""
    said = row.build.get("corrected")
    return float(said["measured_us"]) if isinstance(said, Mapping) and "measured_us" in said else row.median_us


def _kind(row: Result) -> Kind:
    return row.chip, row.device, row.epoch


def _own(row: Result, anchor: str) -> _Level | None:
    times = anchor_times(row, anchor)
    if len(times) < FLOOR_ROUNDS:
        return None
    low, high = median_interval(times)
    return _Level(statistics.median(times), low, high, "in the same laps")


def _alike(levels: dict[str, _Level]) -> dict[str, _Level]:
    """Those that are not too far from their middle. Of two, the middle lies half-way, and would let through what is far apart."""
    times = [level.us for level in levels.values()]
    if len(times) == 2 and max(times) >= MOST * min(times):
        return {}
    middle = statistics.median(times) if times else 0.0
    return {device: level for device, level in levels.items() if 1 / MOST < level.us / middle < MOST}


def _calibrated(kind: Kind, calibration: Calibration | None, anchor: str) -> _Level | None:
    figure = calibration.anchors.get(anchor) if calibration and calibration.epoch == kind[2] else None
    if calibration and figure and figure.value and figure.low and figure.high:
        return _Level(figure.value, figure.low, figure.high, f"calibration of {calibration.at[:10]}")
    return None


def _beside(own: list[_Level]) -> _Level:
    """A device's level by the anchors that ran beside its rows."""
    if len(own) < FLOOR_ROUNDS:
        low, high = min(level.low for level in own), max(level.high for level in own)
    else:
        low, high = median_interval([level.us for level in own])
    return _Level(statistics.median(level.us for level in own), low, high, f"anchors beside {len(own)} of its results")
