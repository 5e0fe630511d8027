"""Made rows, journals and sittings of a recorded chip, of which the truth is known."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from made_results import made

from klab.harness.catalog import find_chip
from klab.harness.report.evidence_files import served
from klab.harness.report.evidence_search import Found, time_to_best
from klab.harness.report.figures.search_journals import Recorded
from klab.harness.store.result import Result
from klab.harness.tune.replay.export import Recordings
from klab.harness.tune.strategy import Evaluation
from klab.kernels.contract import Problem
from klab.kernels.matmul.problem import Matmul

CHIP = find_chip("h200")
SPACE = Matmul(16, 14336, 4096)
TILES = [{"tile": n} for n in range(8)]
# The level of each tile; the best is the sixth.
LEVELS = [100.0, 95.0, 90.0, 99.0, 80.0, 60.0, 61.0, 75.0]


def timed(kernel: str, us: float, problem: Any = SPACE, **changes: Any) -> Result:
    """Twenty rounds within 0.2% of `us`, so that its median is `us`."""
    samples = [us * (1 + 0.0001 * (n % 11 - 5)) for n in range(22)]
    return made(problem, kernel, samples=samples, **changes)


def stored(folder: Path, rows: Iterable[Result]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row.to_json()) + "\n" for row in rows)
    (folder / "results.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    return folder


def three_runs() -> list[Result]:
    """A kernel and a library in three runs on two devices: the kernel's medians lie 6% apart, 2% on one device."""
    rows = []
    for run, device, slow, joules in (("run-1", "GPU-a", 1.0, 0.05), ("run-2", "GPU-a", 1.02, 0.051), ("run-3", "GPU-b", 1.06, 0.052)):
        where = {"run_id": run, "device_uuid": device, "recorded_at": f"2026-11-2{run[-1]}T10:00:00Z"}
        rows.append(timed("triton_tiled", 60.0 * slow, config={"tile": 5}, energy_j=joules, **where))
        rows.append(timed("torch", 90.0, **where))
    return rows


def journal(order: Iterable[tuple[int, float]], strategy: str, final: Mapping[str, Any] | None = None, candidates: int = 8) -> Found:
    found = tuple(Evaluation(c, LEVELS[c], spent_s=spent) for c, spent in order)
    header = {"strategy": strategy, "candidates": candidates, "problem": SPACE.key, "seed": 0}
    return Found(Recorded(header, found), final or {})


def space_rows() -> list[Result]:
    return [timed("triton_tiled", us, config=tile) for tile, us in zip(TILES, LEVELS, strict=True)]


def projections() -> list[Problem]:
    """Two problems of llama-3.1-8b."""
    return [problem for problem in served("llama-3.1-8b", CHIP).plan.problems() if problem.operator == "matmul"][:2]


def to_best(tuned: list[Found], exhaustive: Found | None = None) -> Any:
    rows = [*space_rows(), timed("torch", 40.0)]
    every = exhaustive or journal([(n, 0.5) for n in range(8)], "exhaustive")
    return time_to_best(Recordings(SPACE.key, SPACE.label(), "matmul", tuple(rows)), SPACE, CHIP, {}, [every], tuned, space_rows())


def part(name: str, left: int = 0, notes: Iterable[str] = (), **statuses: int) -> dict[str, Any]:
    return {"part": name, "seconds": 2.0, "statuses": statuses, "known": 0, "left": left, "notes": list(notes)}
