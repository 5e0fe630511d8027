"""What `klab calibrate` found of one device: its power sensor, what a launch costs, and the peaks that it really reaches.

One JSON file per device, `calibration/<device id>.json` below a folder of results; what it replaces goes to `calibration/earlier/`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import re
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from typing import Any, Self

from klab.harness.measure.energy import Guard, guard_for
from klab.harness.store.paths import folder_to_read
from klab.harness.store.result import Result
from klab.kernels.contract import Chip, Json, Record
from klab.kernels.errors import CannotMeasure, KlabError, UsageError

FOLDER = "calibration"
SCHEMA = 1
# A file that somebody else wrote is read whole: a calibration is some kilobytes.
LONGEST_BYTES = 1 << 20


@dataclass(frozen=True)
class Figure(Record):
    """A measured figure with its 95% interval, or None with the reason. `note` says how it was got: a shape, a clock, what it stands on."""

    value: float | None = None
    low: float | None = None
    high: float | None = None
    reason: str = ""
    note: str = ""

    @classmethod
    def missing(cls, reason: str) -> Self:
        """Not measured, and why."""
        return cls(reason=reason or "no reason given")

    def text(self, unit: str = "", digits: int = 4) -> str:
        """For a table: "452.1 (449.8..454) GB/s", or the reason."""
        if self.value is None:
            return self.reason
        low, high = (self.value if x is None else x for x in (self.low, self.high))
        return f"{self.value:,.{digits}g} ({low:,.{digits}g}..{high:,.{digits}g}){' ' if unit else ''}{unit}"


NOT_MEASURED = Figure(reason="not measured")


@dataclass(frozen=True)
class Calibration(Record):
    """The figures of one device. `sensor_*` are of the reading that klab takes as power (NVML's instantaneous field where the board has
    it), `average_*` of the driver's one-second average, `counter_*` of the energy counter. A window that is shorter than its period
    means that the sensor sees a part of the time only. `launch_overhead_us`: a launch that does nothing, one after another;
    `graph_overhead_us`: the same from a CUDA graph. Rates are decimal; `matmul_tflops` by dtype (long names), `anchors` in microseconds.
    `environment`: driver, versions, power limit; `epoch` is theirs.
    """

    device_uuid: str
    device: str
    chip: str
    at: str
    epoch: str
    sensor_period_ms: Figure = NOT_MEASURED
    sensor_window_ms: Figure = NOT_MEASURED
    average_period_ms: Figure = NOT_MEASURED
    average_window_ms: Figure = NOT_MEASURED
    counter_period_ms: Figure = NOT_MEASURED
    counter_window_ms: Figure = NOT_MEASURED
    launch_overhead_us: Figure = NOT_MEASURED
    graph_overhead_us: Figure = NOT_MEASURED
    copy_gb_per_s: Figure = NOT_MEASURED
    matmul_tflops: Mapping[str, Figure] = field(default_factory=dict)
    anchors: Mapping[str, Figure] = field(default_factory=dict)
    environment: Mapping[str, Json] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    seconds: float = 0.0
    schema: int = SCHEMA

    def to_json(self) -> dict[str, Json]:
        """A JSON object; figures that were never looked for are left out."""
        found: dict[str, Json] = {}
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            if isinstance(value, Figure):
                if value != NOT_MEASURED:
                    found[f.name] = value.to_json()
            elif f.name in ("matmul_tflops", "anchors"):
                found[f.name] = {name: figure.to_json() for name, figure in value.items()}
            else:
                found[f.name] = list(value) if isinstance(value, tuple) else value
        return found

    @classmethod
    def from_json(cls, data: Mapping[str, Json]) -> Self:
        """The inverse of `to_json`; UsageError for what is no calibration (fields of a newer klab are passed over)."""
        try:
            if not isinstance(data, Mapping) or int(data.get("schema", 0)) < 1:
                raise ValueError("not a calibration")
            known = {f.name: f for f in dataclasses.fields(cls)}
            values: dict[str, Any] = {name: value for name, value in data.items() if name in known}
            for name in ("device_uuid", "device", "chip", "at", "epoch"):
                if not isinstance(values.get(name), str):
                    raise ValueError(f"{name} is not a text")
                values[name] = _plain(values[name])
            datetime.fromisoformat(values["at"])
            for name, f in known.items():
                if isinstance(f.default, Figure) and name in values:
                    values[name] = _figure(name, values[name])
            for name in ("matmul_tflops", "anchors"):
                values[name] = {_plain(k): _figure(f"{name}.{_plain(k)}", v) for k, v in dict(values.get(name) or {}).items()}
            values["environment"] = dict(values.get("environment") or {})
            values["notes"] = tuple(_plain(note) for note in values.get("notes") or ())
            return cls(**values)
        except (TypeError, ValueError, AttributeError, OverflowError) as error:
            raise UsageError(f"not a calibration: {error}") from None

    def with_figures(self, **changes: Any) -> Self:
        """The same calibration with these fields replaced."""
        return dataclasses.replace(self, **changes)


def measured_any(found: Calibration) -> bool:
    """Does it hold a figure that was measured (or bounded)?"""
    figures = [getattr(found, f.name) for f in dataclasses.fields(found) if isinstance(f.default, Figure)]
    return any(f.value is not None for f in [*figures, *found.matmul_tflops.values(), *found.anchors.values()])


def _figure(name: str, data: Json) -> Figure:
    if not isinstance(data, Mapping):
        raise ValueError(f"{name} is no figure")
    numbers = {key: data.get(key) for key in ("value", "low", "high")}
    for key, value in numbers.items():
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < 0):
            raise ValueError(f"{name}.{key} is not a number of at least 0")
    low, value, high = numbers["low"], numbers["value"], numbers["high"]
    ends = [x for x in (low, value, high) if x is not None]
    if ends != sorted(ends):
        raise ValueError(f"{name} lies outside its interval")
    return Figure(**numbers, reason=_plain(data.get("reason", "")), note=_plain(data.get("note", "")))


def _plain(text: object) -> str:
    """Without what a terminal would obey: the file may be somebody else's."""
    return "".join(c if c.isprintable() else "?" for c in str(text))


def measured_chip(chip: Chip, calibration: Calibration) -> Chip:
    """The chip with the peaks that this device reached in place of the specification's; `provenance` says which are which."""
    how = f"measured by klab calibrate on {calibration.device_uuid}, {calibration.at[:10]}"
    peaks, sources = dict(chip.peak_tflops), dict(chip.provenance)
    for dtype, figure in calibration.matmul_tflops.items():
        if figure.value and dtype in peaks:
            peaks[dtype], sources[f"peak_tflops.{dtype}"] = figure.value, f"{how}: {figure.note}"
    bandwidth = calibration.copy_gb_per_s
    if bandwidth.value:
        sources["memory_gb_per_s"] = f"{how}: {bandwidth.note}"
    return dataclasses.replace(chip, peak_tflops=peaks, memory_gb_per_s=bandwidth.value or chip.memory_gb_per_s, provenance=sources)


def is_measured(chip: Chip, dtype: str = "") -> bool:
    """Is this peak (without a dtype: the memory bandwidth) of a `measured_chip` a measured one?"""
    return chip.provenance.get(f"peak_tflops.{dtype}" if dtype else "memory_gb_per_s", "").startswith("measured by klab calibrate")


def device_id(environment: Mapping[str, Json]) -> str:
    """What a device goes by: a GPU's UUID; of a CPU, which has none, its machine's hash ("cpu-1a2b3c4d")."""
    return str(environment.get("uuid") or f"cpu-{environment.get('host') or 'unknown'}")


def device_of(result: Result) -> str:
    """The `device_id` of the device that a row was taken on; "" for a row that names none."""
    if result.device_uuid:
        return result.device_uuid
    return device_id(result.environment) if result.environment.get("host") and result.environment.get("kind") == "cpu" else ""


def calibration_path(folder: Path | str, device_uuid: str) -> Path:
    """Where the calibration of a device lies in a folder of results."""
    return Path(folder) / FOLDER / f"{_safe(device_uuid)}.json"


def write_calibration(calibration: Calibration, folder: Path | str) -> Path:
    """Write it as the newest of its device; of the one that was there a copy stays in `earlier/`.

    CannotMeasure where the folder takes no files.
    """
    path = calibration_path(folder, calibration.device_uuid)
    text = json.dumps(calibration.to_json(), indent=1, sort_keys=True, allow_nan=False) + "\n"
    part = path.with_name(f".{path.stem}-{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(text, encoding="utf-8")
        if path.exists():
            earlier = path.parent / "earlier"
            earlier.mkdir(exist_ok=True)
            changed = datetime.fromtimestamp(path.stat().st_mtime, UTC)
            shutil.copy2(path, _free(earlier / f"{path.stem}-{changed:%Y%m%dT%H%M%SZ}.json"))
        part.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):  # where there is no folder, there is no part either
            part.unlink()
        raise CannotMeasure(f"{path}: {error.strerror or error}") from None
    return path


def _free(path: Path) -> Path:
    """`path`, or the first of `path-2`, `path-3`, ... that is not there: two calibrations of one second keep both."""
    count, free = 2, path
    while free.exists():
        free, count = path.with_stem(f"{path.stem}-{count}"), count + 1
    return free


def read_calibrations(folders: Iterable[Path | str], troubles: list[str] | None = None) -> dict[str, Calibration]:
    """The newest calibration of every device in these folders (and the folders in them). What cannot be read is told in `troubles`."""
    found: dict[str, Calibration] = {}
    for path in sorted({path for folder in folders for path in _files(Path(folder))}):
        try:
            if path.stat().st_size > LONGEST_BYTES:
                raise UsageError("too long for a calibration")
            one = Calibration.from_json(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, RecursionError, UsageError) as error:
            if troubles is not None:
                troubles.append(f"{path}: {error}".splitlines()[0])
            continue
        if one.device_uuid not in found or _age(found[one.device_uuid]) < _age(one):
            found[one.device_uuid] = one
    return found


def read_calibration(device_uuid: str, folder: Path | str | None = None) -> Calibration | None:
    """The newest calibration of a device in a folder of results (default: where results are read from), or None."""
    return read_calibrations([folder_to_read(folder)] if folder is None or Path(folder).exists() else []).get(device_uuid)


def newest_of(chip: str, folders: Iterable[Path | str]) -> Calibration:
    """The newest calibration of any device of a chip; UsageError where there is none."""
    found = [one for one in read_calibrations(folders).values() if one.chip == chip]
    if not found:
        raise UsageError(f"no device of {chip} is calibrated here: klab calibrate --chip {chip} does it, on a machine that has one")
    return max(found, key=_age)


# Folders of results besides the usual ones, in which `guard_of` looks too: where the rows of this process go.
_FURTHER: list[Path] = []


def look_in(folder: Path | str) -> None:
    """Let `guard_of` look in this folder of results too."""
    if Path(folder) not in _FURTHER:
        _FURTHER.append(Path(folder))


def guard_of(environment: Mapping[str, Json]) -> Guard | None:
    """What energy must have on the device of a worker's environment by its calibration; None where there is none with a known sensor."""
    if not environment.get("uuid"):
        return None
    try:
        usual = [folder_to_read()]
    except KlabError:  # no such folder, or an object store that cannot be reached: the run itself will say so
        usual = []
    return _guard(device_id(environment), (*usual, *_FURTHER))


@lru_cache(maxsize=64)
def _guard(device_uuid: str, folders: tuple[Path, ...]) -> Guard | None:
    found = read_calibrations([folder for folder in folders if folder.exists()]).get(device_uuid)
    if found is None:
        return None
    known = [figure.value for figure in (found.sensor_window_ms, found.counter_period_ms, found.counter_window_ms)]
    if not any(known):
        return None
    window_s, period_s, seen_s = (None if x is None else x / 1e3 for x in known)
    return guard_for(window_s, period_s, seen_s, f"calibration of {found.at[:10]}")


def _files(folder: Path) -> Iterable[Path]:
    return folder.glob(f"**/{FOLDER}/*.json") if folder.is_dir() else ()


def _age(one: Calibration) -> datetime:
    at = datetime.fromisoformat(one.at)
    return at if at.tzinfo else at.replace(tzinfo=UTC)


def _safe(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]", "_", text).lstrip(".") or "unknown"
