"""Kernel Tuner's cache files, as its versions 1.0 to 1.5 write and read them.

An object with `device_name`, `kernel_name`, `problem_size`, `tune_params_keys`, `tune_params`, `objective` (a name in 1.0, a list of
names in 1.5) and, last, `cache`: per candidate its parameters, `time` and `times` in milliseconds, what it cost (`compile_time`,
`verification_time`, `benchmark_time`, ms), and whatever was observed. Entries are appended as they come, so a file may lack its end. A
failure is one of FAILURES, as the value of the objective (1.0) or of `__error__` (1.5). Source: kernel_tuner/util.py (process_cache,
store_cache, read_cache).
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence

import numpy as np

from klab.harness.store.result import Status
from klab.harness.tune.replay.assemble import Candidate, assemble
from klab.harness.tune.replay.decimal_text import number, numbers, text, thawed, without, words
from klab.harness.tune.replay.document import Document
from klab.harness.tune.replay.recorded import RecordedSpace
from klab.harness.tune.space import ABSENT
from klab.kernels.contract import Json
from klab.kernels.errors import UsageError

# Kernel Tuner's words for a failure -> ours, and back.
FAILURES = {
    "InvalidConfig": Status.UNSUPPORTED,
    "CompilationFailedConfig": Status.COMPILE_ERROR,
    "RuntimeFailedConfig": Status.CRASHED,
    "ErrorConfig": Status.CRASHED,
}
_FAILED = {Status.UNSUPPORTED: "InvalidConfig", Status.SCREENED: "InvalidConfig", Status.COMPILE_ERROR: "CompilationFailedConfig"}
ERROR = "__error__"
# What klab adds, which Kernel Tuner passes over: a field of the file, and these of an entry.
OURS = "klab"
_FIELDS = {"status", "reason", "sm_clock_mhz", "power_w", "energy_j", "clocks_mhz"}
# Kernel Tuner's NVML observer has the same under other names: MHz, W, J per launch.
_OBSERVED = {"sm_clock_mhz": "core_freq", "power_w": "nvml_power", "energy_j": "nvml_energy"}
_FAILED_STATUSES = {s.value for s in Status} - {Status.OK.value}
_TIMES = {"time", "times", "compile_time", "verification_time", "benchmark_time", "strategy_time", "framework_time", "timestamp"}
_RESERVED = _TIMES | _FIELDS | {ERROR}


def read(document: Document) -> RecordedSpace:
    """UsageError for a document that lacks what a cache has, or that has no valid candidate."""
    fields, path = document.fields, document.path
    names = fields.get("tune_params_keys") or list(fields.get("tune_params") or ())
    if not isinstance(names, list) or not names or not all(isinstance(n, str) for n in names):
        raise UsageError(f"{path} is no Kernel Tuner cache: it does not say its parameters (tune_params_keys)")
    ours = fields.get(OURS)
    ours = ours if isinstance(ours, dict) else {}
    objective = fields.get("objective")
    objectives = objective if isinstance(objective, list) else [objective]
    notes = list(document.notes)
    if document.dropped_bytes:
        notes.append(f"{document.dropped_bytes} bytes are torn or damaged and were dropped; {len(document.entries)} entries are whole")
    if objectives not in (["time"], [None]):
        notes.append(f"it was tuned for {', '.join(map(str, objectives))}; replayed is the time")
    entries = list(_whole(document, names, notes))
    if entries and not any("time" in e or "times" in e for e in entries):
        raise UsageError(f"{path} records {', '.join(map(str, objectives))} and no time, which is what klab replays")
    failing = (ERROR, *(str(o) for o in objectives), "time")
    known = {*names, *_RESERVED, *_OBSERVED.values()}
    return assemble(
        (_candidate(e, names, known, failing, ours.get("absent")) for e in entries),
        name=words(ours.get("name")) or path.name.split(".")[0],
        where=str(path),
        device=words(fields.get("device_name")),
        kernel=words(fields.get("kernel_name")),
        kind=words(ours.get("kind")) or "reference",
        problem_size=fields.get("problem_size"),
        about=about if isinstance(about := ours.get("about"), dict) else {},
        notes=notes,
    )


def _whole(document: Document, names: Sequence[str], notes: list[str]) -> Iterator[dict[str, Json]]:
    lacking = 0
    for entry in document.entries:
        if all(name in entry for name in names):
            yield entry
        else:
            lacking += 1
    if lacking:
        notes.append(f"{lacking} entries lack parameters and were left out")


def _candidate(entry: dict[str, Json], names: Sequence[str], known: set[str], failing: Sequence[str], absent: Json) -> Candidate:
    point = {name: thawed(entry[name]) for name in names}
    if absent is not None:
        point = {name: value for name, value in point.items() if value != absent}
    times = entry.get("times")
    samples = numbers(times, 3)
    time_us = number(entry.get("time"), 3)
    if time_us is None and "time" not in entry and samples and ERROR not in entry:
        time_us = float(np.mean(samples))
    status = _status(entry, names, failing)
    benchmark, verification = number(entry.get("benchmark_time"), -3), number(entry.get("verification_time"), -3)
    seen = {ours: number(entry.get(ours, entry.get(theirs))) for ours, theirs in _OBSERVED.items()}
    metrics = {words(name): value for name, v in entry.items() if name not in known and (value := number(v)) is not None}
    return Candidate(
        point,
        status,
        time_us,
        compile_s=number(entry.get("compile_time"), -3),
        benchmark_s=None if benchmark is None else benchmark + (verification or 0.0),
        verification_s=verification,
        samples_us=samples,
        clocks_mhz=numbers(entry.get("clocks_mhz"), 0),
        sm_clock_mhz=seen["sm_clock_mhz"],
        power_w=seen["power_w"],
        energy_j=seen["energy_j"],
        reason=words(entry.get("reason")),
        recorded_at=words(entry.get("timestamp")),
        metrics=metrics,
    )


def _status(entry: dict[str, Json], names: Sequence[str], failing: Sequence[str]) -> Status:
    if "status" not in names and words(entry.get("status")) in _FAILED_STATUSES:
        return Status(entry["status"])
    for name in failing:
        if isinstance(entry.get(name), str):
            return FAILURES.get(entry[name], Status.CRASHED)
    # Kernel Tuner 1.5 reads older files so: its words count wherever they are.
    told = [v for name, v in entry.items() if isinstance(v, str) and v in FAILURES and name not in names]
    return FAILURES[told[0]] if told else Status.OK


def write(recorded: RecordedSpace) -> Iterator[str]:
    """The file's text in pieces. Kernel Tuner 1.5 reads it, also to replay it and to append to it.

    UsageError for a parameter whose name Kernel Tuner uses for something else.
    """
    space = recorded.space
    names, metrics = {*space.names}, {*recorded.metrics}
    clashing = sorted((names | metrics) & {*_RESERVED, *_OBSERVED.values()} | names & metrics)
    if clashing:
        raise UsageError(f"{recorded.name}: a Kernel Tuner cache cannot have a parameter or metric called {clashing[0]}")
    absent = _marker(recorded)
    lists = [[*values, absent] if (space.rows[:, c] == ABSENT).any() else [*values] for c, values in enumerate(space.values)]
    head = {
        "device_name": recorded.device,
        "kernel_name": recorded.kernel,
        "problem_size": recorded.problem_size,
        "tune_params_keys": list(space.names),
        "tune_params": dict(zip(space.names, lists, strict=True)),
        "objective": "time",
        OURS: {"name": recorded.name, "kind": recorded.kind, "absent": absent, "about": dict(recorded.about)},
    }
    yield "{\n" + "".join(f"{json.dumps(k)}: {_dumps(v)},\n" for k, v in head.items()) + '"cache": {'
    for candidate in range(len(space)):
        point = dict.fromkeys(space.names, absent) | space.point(candidate)
        key = ",".join(map(str, point.values()))
        entry = ", ".join(f"{json.dumps(k)}: {v}" for k, v in _entry(recorded, candidate, point))
        yield f"{',' if candidate else ''}\n{json.dumps(key)}: {{{entry}}}"
    # Kernel Tuner takes exactly these three characters off to append.
    yield "}\n}"


def _entry(recorded: RecordedSpace, c: int, point: dict[str, Json]) -> Iterator[tuple[str, str]]:
    """Fields and their JSON."""
    for name, value in point.items():
        yield name, _dumps(value)
    status = recorded.status[c]
    samples = recorded.samples_us[c]
    if status is Status.OK:
        yield "time", text(float(recorded.time_us[c]), -3)
    else:
        # Both ways of saying it: Kernel Tuner 1.0 looks at the objective, 1.5 at the error.
        yield "time", json.dumps(_FAILED.get(status, "RuntimeFailedConfig"))
        yield ERROR, json.dumps(_FAILED.get(status, "RuntimeFailedConfig"))
        yield "status", json.dumps(status.value)
    if len(samples):
        yield "times", "[" + ", ".join([text(us, -3) for us in samples]) + "]"
    verification_s = 0.0 if recorded.verification_s is None else float(recorded.verification_s[c])
    yield "compile_time", text(float(recorded.compile_s[c]), 3)
    yield "verification_time", text(verification_s, 3)
    yield "benchmark_time", text(without(float(recorded.benchmark_s[c]), verification_s), 3)
    for name in _OBSERVED:
        column = getattr(recorded, name)
        if column is not None and math.isfinite(column[c]):
            yield name, text(float(column[c]))
    if recorded.clocks_mhz is not None and len(recorded.clocks_mhz[c]):
        yield "clocks_mhz", _dumps([None if math.isnan(mhz) else mhz for mhz in recorded.clocks_mhz[c].tolist()])
    for name, values in recorded.metrics.items():
        if math.isfinite(values[c]):
            yield name, text(float(values[c]))
    if recorded.reasons and recorded.reasons[c]:
        yield "reason", json.dumps(recorded.reasons[c])
    if recorded.recorded_at and recorded.recorded_at[c]:
        yield "timestamp", json.dumps(recorded.recorded_at[c])


def _marker(recorded: RecordedSpace) -> str:
    """What stands for a parameter that does not apply: a text that is no value."""
    used = {v for values in recorded.space.values for v in values if isinstance(v, str)}
    marker = "-"
    while marker in used:
        marker += "-"
    return marker


def _dumps(value: Json) -> str:
    return json.dumps(value, allow_nan=False)
