"""T4, the open format of auto-tuning results, as Kernel Tuner's schema 1.0.0 has it.

`{schema_version, metadata, results: [{timestamp, configuration, times: {compilation, benchmark, framework, search_algorithm, validation,
runtimes[]}, invalidity, correctness, measurements: [{name, value, unit}], objectives[]}]}`. Times are in the unit that metadata.timeunit
names, a measurement in its own. A parameter that does not apply is absent from the configuration. Source: kernel_tuner/file_utils.py and
kernel_tuner/schema/T4/1.0.0.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from klab.harness.store.result import Status
from klab.harness.tune.replay.assemble import Candidate, assemble
from klab.harness.tune.replay.decimal_text import number, numbers, text, thawed, without, words
from klab.harness.tune.replay.document import Document
from klab.harness.tune.replay.recorded import RecordedSpace
from klab.kernels.contract import Json
from klab.kernels.errors import UsageError

VERSION = "1.0.0"
OURS = "klab"
# T4's words for a failure -> ours, and back; the exact one of ours is kept as a measurement called "status".
INVALIDITY = {
    "correct": Status.OK,
    "timeout": Status.TIMEOUT,
    "compile": Status.COMPILE_ERROR,
    "runtime": Status.CRASHED,
    "correctness": Status.INCORRECT,
    "constraints": Status.UNSUPPORTED,
}
_WORD = {status: word for word, status in INVALIDITY.items()} | {
    Status.SCREENED: "constraints",
    Status.OUT_OF_MEMORY: "runtime",
    Status.THROTTLED: "runtime",
}
_FAILED_STATUSES = {s.value for s in Status} - {Status.OK.value}
# Powers of ten from a unit to seconds.
UNITS = {"seconds": 0, "s": 0, "milliseconds": -3, "ms": -3, "microseconds": -6, "us": -6, "nanoseconds": -9, "ns": -9}
_COLUMNS = {"sm_clock_mhz": ("core_freq", "MHz"), "power_w": ("nvml_power", "W"), "energy_j": ("nvml_energy", "J")}
# The unit that a metric of klab's has in its name.
_UNIT_OF = {"us": "us", "w": "W", "c": "C"}
_NOT_METRICS = {"time", "status", "reason", "clocks_mhz", *_COLUMNS, *(theirs for theirs, _ in _COLUMNS.values())}


def read(document: Document) -> RecordedSpace:
    """UsageError for results that are none, an unknown unit of time, or no valid candidate."""
    path, notes = document.path, list(document.notes)
    metadata = document.fields.get("metadata")
    metadata = metadata if isinstance(metadata, dict) else {}
    ours = metadata.get(OURS)
    ours = ours if isinstance(ours, dict) else {}
    unit = metadata.get("timeunit")
    if unit is None:
        notes.append("it does not say its unit of time; taken for milliseconds")
    power = _power(unit or "milliseconds", f"{path}: timeunit")
    if document.dropped_bytes:
        notes.append(f"{document.dropped_bytes} bytes are torn or damaged and were dropped; {len(document.entries)} results are whole")
    entries = [e for e in document.entries if isinstance(e.get("configuration"), dict) and isinstance(e.get("times") or {}, dict)]
    if len(entries) < len(document.entries):
        notes.append(f"{len(document.entries) - len(entries)} results have no configuration and were left out")
    return assemble(
        (_candidate(e, power, str(path)) for e in entries),
        name=words(ours.get("name")) or path.name.split(".")[0],
        where=str(path),
        device=words(metadata.get("device_name")),
        kernel=words(metadata.get("kernel_name")),
        kind=words(ours.get("kind")) or "reference",
        problem_size=metadata.get("problem_size"),
        about=about if isinstance(about := ours.get("about"), dict) else {},
        notes=notes,
    )


def _power(unit: Json, what: str) -> int:
    if words(unit) not in UNITS:
        raise UsageError(f"{what} {str(unit)[:40]!r} is unknown; known are {', '.join(UNITS)}")
    return UNITS[unit]


def _candidate(entry: dict[str, Json], power: int, where: str) -> Candidate:
    times: dict[str, Json] = entry.get("times") or {}
    listed = entry.get("measurements")
    measured = {words(m.get("name")): m for m in listed if isinstance(m, dict)} if isinstance(listed, list) else {}

    def value(name: str) -> Json:
        return measured.get(name, {}).get("value")

    samples = numbers(times.get("runtimes"), power + 6)
    time_us = float(np.mean(samples)) if samples else None
    if "time" in measured:
        unit = measured["time"].get("unit")
        time_us = number(value("time"), (_power(unit, f"{where}: a time's unit") if unit else power) + 6)
    status = INVALIDITY.get(str(entry.get("invalidity", "correct")), Status.CRASHED)
    if words(value("status")) in _FAILED_STATUSES and status is not Status.OK:
        status = Status(value("status"))
    benchmark, validation = number(times.get("benchmark"), power), number(times.get("validation"), power)
    compilation = times.get("compilation", times.get("compilation_time"))
    seen = {ours: number(value(ours) if ours in measured else value(theirs)) for ours, (theirs, _) in _COLUMNS.items()}
    return Candidate(
        thawed(entry["configuration"]),
        status,
        time_us,
        compile_s=number(compilation, power),
        benchmark_s=None if benchmark is None and validation is None else (benchmark or 0.0) + (validation or 0.0),
        verification_s=validation,
        samples_us=samples,
        clocks_mhz=numbers(value("clocks_mhz"), 0),
        sm_clock_mhz=seen["sm_clock_mhz"],
        power_w=seen["power_w"],
        energy_j=seen["energy_j"],
        reason=words(value("reason")),
        recorded_at=words(entry.get("timestamp")),
        metrics={k: found for k, m in measured.items() if k not in _NOT_METRICS and (found := number(m.get("value"))) is not None},
    )


def write(recorded: RecordedSpace) -> Iterator[str]:
    """The file's text in pieces. UsageError for a metric whose name stands for something else."""
    clashing = sorted({*recorded.metrics} & _NOT_METRICS)
    if clashing:
        raise UsageError(f"{recorded.name}: a T4 file cannot have a metric called {clashing[0]}")
    environment = recorded.about.get("environment")
    metadata: dict[str, Json] = {
        "timeunit": "milliseconds",
        "device_name": recorded.device,
        "kernel_name": recorded.kernel,
        "problem_size": recorded.problem_size,
        "hardware": {"hardware_description": [recorded.device]},
        **({"environment": environment} if isinstance(environment, dict) else {}),
        OURS: {"name": recorded.name, "kind": recorded.kind, "about": dict(recorded.about)},
    }
    yield f'{{"schema_version": "{VERSION}",\n"metadata": {_dumps(metadata)},\n"results": ['
    for candidate in range(len(recorded.space)):
        fields = ", ".join(f"{json.dumps(k)}: {v}" for k, v in _entry(recorded, candidate))
        yield f"{',' if candidate else ''}\n{{{fields}}}"
    yield "\n]}\n"


def _entry(recorded: RecordedSpace, c: int) -> Iterator[tuple[str, str]]:
    status = recorded.status[c]
    verification_s = 0.0 if recorded.verification_s is None else float(recorded.verification_s[c])
    if recorded.recorded_at and recorded.recorded_at[c]:
        yield "timestamp", json.dumps(recorded.recorded_at[c])
    yield "configuration", _dumps(recorded.space.point(c))
    times = {
        "compilation": text(float(recorded.compile_s[c]), 3),
        "benchmark": text(without(float(recorded.benchmark_s[c]), verification_s), 3),
        # The search's own time: a recording has none, and readers of T4 add these up.
        "framework": "0",
        "search_algorithm": "0",
        "validation": text(verification_s, 3),
        "runtimes": "[" + ", ".join([text(us, -3) for us in recorded.samples_us[c]]) + "]",
    }
    yield "times", "{" + ", ".join(f'"{k}": {v}' for k, v in times.items()) + "}"
    yield "invalidity", json.dumps(_WORD[status])
    yield "correctness", "0" if status is Status.INCORRECT else "1"
    measured = [
        f'{{"name": {json.dumps(name)}, "value": {value}, "unit": {json.dumps(unit)}}}' for name, value, unit in _measured(recorded, c)
    ]
    yield "measurements", "[" + ", ".join(measured) + "]"
    yield "objectives", '["time"]'


def _measured(recorded: RecordedSpace, c: int) -> Iterator[tuple[str, str, str]]:
    """Name, JSON and unit of what was measured."""
    status = recorded.status[c]
    if status is Status.OK:
        yield "time", text(float(recorded.time_us[c]), -3), "ms"
    else:
        yield "status", json.dumps(status.value), ""
    for name, (_, unit) in _COLUMNS.items():
        column = getattr(recorded, name)
        if column is not None and math.isfinite(column[c]):
            yield name, text(float(column[c])), unit
    if recorded.clocks_mhz is not None and len(recorded.clocks_mhz[c]):
        yield "clocks_mhz", _dumps([None if math.isnan(mhz) else mhz for mhz in recorded.clocks_mhz[c].tolist()]), "MHz"
    for name, values in recorded.metrics.items():
        if math.isfinite(values[c]):
            yield name, text(float(values[c])), _UNIT_OF.get(name.rpartition("_")[2], "")
    if recorded.reasons and recorded.reasons[c]:
        yield "reason", json.dumps(recorded.reasons[c]), ""


def _dumps(value: Any) -> str:
    return json.dumps(value, allow_nan=False)
