"""A store of any number of made-up rows, written fast: tuned spaces of a hundred problems over many runs, with failures and all else."""

from __future__ import annotations

import gzip
import itertools
import json
import random
import statistics
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from made_results import CONTEST, failed, made

from klab.harness.store.result import Status
from klab.kernels.contract import Json, Problem, digest
from klab.kernels.decode_attention.problem import DecodeAttention
from klab.kernels.matmul.problem import Matmul
from klab.kernels.prefill_attention.problem import PrefillAttention

START = datetime(2026, 10, 1, tzinfo=UTC)
REASONS = {
    Status.COMPILE_ERROR: "ptxas: shared memory of {n} bytes is more than there is",
    Status.CRASHED: "illegal memory access",
    Status.TIMEOUT: "no answer in 30 s",
    Status.INCORRECT: "out is off by 3.10e-01, tolerance 3.91e-03",
}
NOISE = 64


def shapes(count: int) -> list[Problem]:
    """`count` problems of three operators."""
    found: list[Problem] = []
    for n in range(count):
        size = 1 + n // 3
        match n % 3:
            case 0:
                found.append(Matmul(8 * size, 2048, 1024))
            case 1:
                found.append(PrefillAttention(q_lens=(128 * size,), heads=16, kv_heads=8, head_dim=128))
            case _:
                found.append(DecodeAttention(kv_lens=(256 * size,) * 8, heads=16, kv_heads=8, head_dim=128))
    return found


def lines(
    rows: int, *, rounds: int = 20, problems: int = 100, runs: int = 100, chips: tuple[str, ...] = ("h200", "cpu"), seed: int = 0
) -> Iterator[tuple[int, str]]:
    """(number of the run, JSON line) of each row. A run measures the configurations of a few problems, some of them once more; one row in
    twelve failed. Times spread over a factor of four, so that few are close to the best.
    """
    rng = random.Random(seed)
    noise = [[1 + abs(rng.gauss(0, 0.004)) for _ in range(rounds)] for _ in range(NOISE)]
    middles = [statistics.median(one) for one in noise]
    templates: list[tuple[str, str, float, dict[str, Json], str]] = []
    for chip in chips:
        for problem in shapes(problems):
            for kernel, _, library, share in CONTEST[problem.operator]:
                ok = made(problem, kernel, chip=chip, rounds=5).to_json()
                varying = (
                    "key",
                    "config",
                    "run_id",
                    "recorded_at",
                    "samples_us",
                    "median_us",
                    "q1_us",
                    "q3_us",
                    "ci_low_us",
                    "ci_high_us",
                    "build",
                )
                beside = {
                    "marked": [0] * rounds,
                    **(
                        {"clocks_mhz": [1755.0] * rounds, "temperatures_c": [52.0] * rounds, "throttle_reasons": [0] * rounds}
                        if chip != "cpu"
                        else {}
                    ),
                }
                fixed = json.dumps({name: value for name, value in ok.items() if name not in varying} | beside)[1:-1]
                bad = failed(problem, kernel, Status.CRASHED, "", chip=chip).to_json()
                bad = {name: value for name, value in bad.items() if name not in (*varying, "status", "reason")}
                level = max(problem.flops() / 5e8, problem.bytes_moved() / 4e6, 2.0) / share
                templates.append((digest(fixed), fixed, level, bad, "" if library else kernel))
    for n in range(rows):
        run = n * runs // rows
        # Each run looks at a third of the templates; the same configuration comes again in later runs.
        name, fixed, level, bad, tuned = templates[(n * 7 + run) % len(templates)]
        at = (START + timedelta(hours=12 * run, seconds=n % 40000)).strftime("%Y-%m-%dT%H:%M:%SZ")
        point = rng.randrange(max(rows // len(templates), 1)) if tuned else 0
        config = (
            {"block_m": 16 << point % 4, "block_n": 16 << point // 4 % 4, "warps": 1 << point // 16 % 4, "order": point // 64}
            if tuned
            else {}
        )
        key = f"{name[:8]}{point:08x}"
        start = f'{{"key": "{key}", "config": {json.dumps(config)}, "run_id": "run-{run:04d}", "recorded_at": "{at}", '
        if rng.random() < 1 / 12:
            status = rng.choices(list(REASONS), (6, 3, 2, 0.05))[0]
            row = bad | {"status": status.value, "reason": REASONS[status].format(n=64 * point)}
            yield run, start + json.dumps(row)[1:] + "\n"
            continue
        pick = rng.randrange(NOISE)
        us = level * (1 + 3 * (point * 0.6180339887 % 1)) * (1 + 0.002 * rng.random())
        middle = us * middles[pick]
        times = ", ".join([f"{us * x:.12g}" for x in noise[pick]])
        yield (
            run,
            (
                f'{start}"samples_us": [{times}], "median_us": {middle!r}, "q1_us": {middle * 0.999!r}, "q3_us": {middle * 1.001!r}, '
                f'"ci_low_us": {middle * 0.998!r}, "ci_high_us": {middle * 1.002!r}, '
                f'"build": {{"contest": {{"id": "c-{run}-{level:.6g}", "position": {point}}}}}, {fixed}}}\n'
            ),
        )


def write_store(folder: Path, rows: int, *, packed: bool = False, **how: Any) -> int:
    """Write the rows into one file per run (packed: .jsonl.gz) and return the bytes of it."""
    folder.mkdir(parents=True, exist_ok=True)
    for run, mine in itertools.groupby(lines(rows, **how), key=lambda numbered: numbered[0]):
        path = folder / f"run-{run:04d}.jsonl{'.gz' if packed else ''}"
        with gzip.open(path, "wt", compresslevel=3) if packed else path.open("w") as file:
            file.writelines(line for _, line in mine)
    return sum(path.stat().st_size for path in folder.iterdir())
