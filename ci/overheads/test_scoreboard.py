"""The scoreboard as a benchmark: klab's strategies, and other tuners' where they are installed, on recorded spaces.

KLAB_SPACES=spaces/ python -m pytest ci/overheads/test_scoreboard.py --benchmark-enable -s

KLAB_SPACES: recorded spaces, files and folders, separated by colons; without it a small made space stands in. KLAB_REPEATS: runs per
strategy and space (50; 3 on the made space). KLAB_RUNS: folder of runs that are not run again (a scratch folder, where all are).
"""

from __future__ import annotations

import itertools
import os
from pathlib import Path
from typing import Any

import numpy as np

from klab.harness.store.result import Status
from klab.harness.tune.replay.files import read_space
from klab.harness.tune.replay.recorded import RecordedSpace
from klab.harness.tune.replay.scoreboard import Scoreboard, scoreboard
from klab.harness.tune.replay.scoreboard_page import markdown, verdict
from klab.harness.tune.space import Space

TILES = (16, 32, 64, 128, 256)
KNOBS = {"block_m": TILES, "block_n": TILES, "block_k": (16, 32, 64), "stages": (2, 3, 4, 5), "warps": (4, 8)}
SMEM_BYTES = 227 * 1024


def made_space() -> RecordedSpace:
    """A bf16 matmul as a model sees it, 4096 cubed on 132 multiprocessors: tiles that do not fit fail, the rest is waves x tile time."""
    points = [dict(zip(KNOBS, values, strict=True)) for values in itertools.product(*KNOBS.values())]
    m, n, k, stages, warps = (np.array([p[name] for p in points], dtype=float) for name in KNOBS)
    fits = (m + n) * k * 2 * stages <= SMEM_BYTES
    tiles = np.ceil(4096 / m) * np.ceil(4096 / n)
    depth = 4096 / k
    busy = np.minimum(1, stages / 4) * np.where(m * n >= 128 * 128, np.where(warps == 8, 1, 0.7), np.where(warps == 4, 1, 0.9))
    tile_us = depth * (0.02 + 2 * m * n * k / (7.5e6 * np.minimum(1, m * n / 128**2) * busy))
    noise = 1 + 0.01 * np.random.default_rng(0).random(len(points))
    time_us = np.where(fits, np.ceil(tiles / 132) * tile_us * noise, np.inf)
    return RecordedSpace(
        name="made matmul",
        device="a model",
        kernel="matmul",
        space=Space.of(points),
        time_us=time_us,
        status=[Status.OK if good else Status.COMPILE_ERROR for good in fits],
        compile_s=np.full(len(points), 0.4),
        benchmark_s=np.where(fits, 0.1 + 100e-6 * np.where(fits, time_us, 0), 0.0),
        samples_us=[() for _ in points],
    )


def given_spaces() -> list[RecordedSpace]:
    found: list[RecordedSpace] = []
    for name in filter(None, os.environ.get("KLAB_SPACES", "").split(":")):
        path = Path(name)
        files = sorted(f for f in path.iterdir() if f.name.endswith((".json", ".json.gz"))) if path.is_dir() else [path]
        found += [read_space(file) for file in files]
    return found


def test_scoreboard(benchmark: Any, tmp_path: Path) -> None:
    spaces = given_spaces()
    repeats = int(os.environ.get("KLAB_REPEATS", "50" if spaces else "3"))
    folder = Path(os.environ.get("KLAB_RUNS", tmp_path))
    board = scoreboard(spaces or [made_space()], folder, repeats=repeats, evaluations=400 if spaces else 100)

    def run() -> Scoreboard:
        board.fill()
        return board

    benchmark.pedantic(run, rounds=1, iterations=1)
    found = board.standings()
    benchmark.extra_info["standings"] = [standing.to_json() for standing in found]
    benchmark.extra_info["absent"] = board.absent
    print("\n" + markdown(board, command="pytest ci/overheads/test_scoreboard.py"))
    assert board.missing() == []
    assert len(found) == len(board.contestants)
    assert verdict(board, found)
    own_random = next(s for s in found if s.name == "random")
    assert own_random.score.low <= 0.15, "random search is not better than random search"
