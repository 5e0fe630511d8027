"""A modelled family of spaces: a tiled matmul on a chip of so many SMs; its best tiles move with the shape, as waves quantise."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import math
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from made_results import made

from klab.harness.store.result import Result, Status
from klab.harness.tune.replay.recorded import RecordedSpace
from klab.harness.tune.space import KERNEL, Space
from klab.kernels.matmul.problem import Matmul

NAME = "tiled"


@dataclass(frozen=True)
class Device:
    """Enough of a chip to model tiles on it."""

    name: str = "h200"
    sm_count: int = 132
    tflops: float = 800.0
    gb_per_s: float = 4800.0
    smem_bytes: int = 232_448


H200 = Device()
B200 = Device("b200", 148, 1800.0, 8000.0)
SMALL = Device("small", 48, 120.0, 450.0, 101_376)


def configs() -> list[dict[str, Any]]:
    knobs = {
        "block_m": (16, 32, 64, 128, 256),
        "block_n": (32, 64, 128, 256),
        "block_k": (32, 64, 128),
        "stages": (2, 3, 4, 5),
        "warps": (4, 8),
        "split_k": (1, 2, 4, 8),
    }
    return [dict(zip(knobs, values, strict=True)) for values in itertools.product(*knobs.values())]


def time_us(problem: Matmul, config: dict[str, Any], device: Device) -> float:
    """Waves of tiles at a rate that tile, stages and warps decide, not faster than memory; plus 3% that only this point has."""
    m, n, k = problem.m, problem.n, problem.k
    bm, bn, bk, stages, warps, split = config.values()
    smem = stages * (bm + bn) * bk * 2
    if smem > device.smem_bytes:
        return math.inf
    resident = max(1, min(device.smem_bytes // smem, 16 // warps))
    tiles = math.ceil(m / bm) * math.ceil(n / bn) * split
    waves = math.ceil(tiles / (device.sm_count * resident))
    reuse = bm * bn / (bm + bn) / 64  # 1.0 for a tile of 128 x 128
    hidden = 1.0 - 0.5 ** (stages * bk / 64)
    pressure = 1.0 if bm * bn / warps <= 4096 else 0.55
    rate = device.tflops * 1e6 / device.sm_count * min(1.0, 0.25 + 0.75 * reuse) * hidden * pressure / resident
    computed = waves * 2.0 * bm * bn * math.ceil(k / split / bk) * bk / rate
    moved = 2.0 * (m * k * math.ceil(n / bn) ** 0.5 + n * k * math.ceil(m / bm) ** 0.5 + m * n)
    busy = min(1.0, tiles / device.sm_count) * hidden
    read = moved / (device.gb_per_s * 1e3 * max(busy, 0.05))
    merge = 0.0 if split == 1 else 2.0 + 8.0 * split * m * n / (device.gb_per_s * 1e3)
    own = int(hashlib.sha256(f"{m} {n} {k} {sorted(config.items())} {device.name}".encode()).hexdigest()[:8], 16) / 2**32
    return (3.0 + max(computed, read) + merge) * (0.97 + 0.06 * own)


@cache
def space(m: int, n: int, k: int, device: Device = H200) -> RecordedSpace:
    """Every configuration of the family on this shape; what does not fit fails."""
    problem = Matmul(m, n, k)
    times = np.array([time_us(problem, config, device) for config in configs()])
    return RecordedSpace(
        name=f"matmul {m}x{n}x{k}",
        device=device.name,
        kernel=NAME,
        space=Space.of({KERNEL: f"matmul/{NAME}", **config} for config in configs()),
        time_us=times,
        status=[Status.OK if math.isfinite(t) else Status.UNSUPPORTED for t in times],
        compile_s=np.full(len(times), 0.5),
        benchmark_s=np.full(len(times), 0.1),
        samples_us=[() for _ in times],
    )


def results(recorded: RecordedSpace, problem: Matmul, candidates: list[int]) -> list[Result]:
    """The rows that measuring these candidates would have left in the store."""
    row = dataclasses.replace(made(problem, NAME, chip="h200", rounds=5), chip=recorded.device)
    rows = []
    for c in candidates:
        point = recorded.space.point(c)
        del point[KERNEL]
        level = float(recorded.time_us[c])
        if math.isfinite(level):
            rows.append(dataclasses.replace(row, config=point, median_us=level))
        else:
            rows.append(dataclasses.replace(row, config=point, status=Status.UNSUPPORTED, median_us=None, samples_us=()))
    return rows
