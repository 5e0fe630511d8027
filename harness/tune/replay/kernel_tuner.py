"""Kernel Tuner's cache files: read, also gzipped and unclosed ones."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np

from klab.harness.store.result import Status
from klab.harness.tune.replay.recorded import RecordedSpace
from klab.harness.tune.space import Space
from klab.kernels.contract import Json
from klab.kernels.errors import UsageError

# Kernel Tuner's words for a failure -> ours.
FAILURES = {
    "InvalidConfig": Status.UNSUPPORTED,
    "CompilationFailedConfig": Status.COMPILE_ERROR,
    "RuntimeFailedConfig": Status.CRASHED,
}


def read(path: Path) -> RecordedSpace:
    """Times in the file are milliseconds. UsageError for a file that is none, or that has no valid candidate."""
    text = (gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()).decode()
    try:
        data: dict[str, Json] = json.loads(text)
    except json.JSONDecodeError:
        data = json.loads(text.rstrip().rstrip(",") + "}}")
    names, entries = data["tune_params_keys"], list(data["cache"].values())
    space = Space.of({name: e[name] for name in names} for e in entries)
    if len(space) != len(entries):
        raise UsageError(f"{path} has entries of equal parameters")
    time_ms = [e["time"] for e in entries]
    failed = [not isinstance(t, int | float) for t in time_ms]
    return RecordedSpace(
        name=path.name.split(".")[0],
        device=data["device_name"],
        kernel=data["kernel_name"],
        space=space,
        time_us=np.array([np.inf if bad else 1e3 * t for bad, t in zip(failed, time_ms, strict=True)]),
        status=[FAILURES.get(str(t), Status.CRASHED) if bad else Status.OK for bad, t in zip(failed, time_ms, strict=True)],
        compile_s=np.array([e.get("compile_time", 0.0) / 1e3 for e in entries]),
        benchmark_s=np.array([(e.get("benchmark_time", 0.0) + e.get("verification_time", 0.0)) / 1e3 for e in entries]),
        samples_us=[[1e3 * s for s in e.get("times", ())] for e in entries],
    )
