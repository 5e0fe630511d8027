"""Recorded spaces made for tests: deterministic, small, with failures, and as Kernel Tuner would have recorded them."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np

from klab.harness.store.result import Status
from klab.harness.tune.replay.recorded import RecordedSpace
from klab.harness.tune.space import Space

TUNE_PARAMS = {"block_size_x": [16, 32, 48, 64, 96, 128], "block_size_y": [1, 2, 4, 8], "tile": [1, 2, 3, 4, 5], "pad": [0, 1]}


def allowed(block_size_x: int, block_size_y: int, tile: int, pad: int) -> bool:
    """The constraint of the space: 174 of 240 points."""
    return block_size_x * block_size_y <= 512 and (pad == 0 or tile > 1) and (tile < 5 or block_size_y < 8)


def small_space(*, failing: float = 0.15, seed: int = 0, name: str = "made") -> RecordedSpace:
    """A space with a valley, noise and failures; the failures take long."""
    return from_points(
        [dict(zip(TUNE_PARAMS, values, strict=True)) for values in itertools.product(*TUNE_PARAMS.values()) if allowed(*values)],
        failing=failing,
        seed=seed,
        name=name,
    )


def from_points(points: list[dict[str, int]], *, failing: float, seed: int = 0, name: str = "made") -> RecordedSpace:
    """Times by a formula on block size and tile; a share of `failing` candidates fails."""
    rng = np.random.default_rng(seed)
    space = Space.of(points)
    size = np.log2([p.get("block_size_x", 128) * p.get("block_size_y", 1) for p in points])
    tile = np.array([p["tile"] for p in points])
    time = 100 * (1 + 0.2 * (size - 7) ** 2 + 0.15 * (tile - 3) ** 2 + 0.3 * rng.random(len(points)))
    failed = rng.random(len(points)) < failing
    kinds = [Status.COMPILE_ERROR, Status.CRASHED, Status.UNSUPPORTED]
    return RecordedSpace(
        name=name,
        device="a made device",
        kernel="made_kernel",
        space=space,
        time_us=np.where(failed, np.inf, time),
        status=[kinds[i % 3] if bad else Status.OK for i, bad in enumerate(failed)],
        compile_s=0.5 + rng.random(len(points)),
        benchmark_s=np.where(failed, 3.0, time * 1e-3),
        samples_us=[() if bad else tuple(t * (1 + 0.05 * rng.standard_normal(8))) for t, bad in zip(time, failed, strict=True)],
    )


def cache_file(recorded: RecordedSpace, path: Path) -> Path:
    """The space as a cache file of Kernel Tuner."""
    words = {Status.COMPILE_ERROR: "CompilationFailedConfig", Status.CRASHED: "RuntimeFailedConfig", Status.UNSUPPORTED: "InvalidConfig"}
    cache = {}
    for i in range(len(recorded.space)):
        point = recorded.space.point(i)
        good = recorded.status[i] is Status.OK
        times = {"compile_time": 1e3 * recorded.compile_s[i], "verification_time": 0, "benchmark_time": 1e3 * recorded.benchmark_s[i]}
        cache[",".join(map(str, point.values()))] = {
            **point,
            "time": 1e-3 * recorded.time_us[i] if good else words[recorded.status[i]],
            **times,
        }
    names = list(recorded.space.names)
    head = {"device_name": recorded.device, "kernel_name": recorded.kernel, "problem_size": [1], "tune_params_keys": names}
    params = {name: list(values) for name, values in zip(names, recorded.space.values, strict=True)}
    path.write_text(json.dumps({**head, "tune_params": params, "objective": "time", "cache": cache}))
    return path
