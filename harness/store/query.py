"""Questions to the store that need the standard library alone; `load` and `compact`, which need more, are here by name too."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path

from klab.harness.store.compact import Compaction, compact
from klab.harness.store.frame import load
from klab.harness.store.read import ReadReport, iter_results
from klab.harness.store.result import Result, Status

__all__ = ["Compaction", "age", "compact", "done_keys", "latest", "load", "numerics_verified", "verified_kernels"]

_EPOCH_START = datetime(1970, 1, 1, tzinfo=UTC)


def age(result: Result) -> tuple[datetime, str, str]:
    """What rows are ordered by, oldest first: when they were recorded, then the run, then the content, to leave nothing to chance."""
    try:
        at = datetime.fromisoformat(result.recorded_at)
    except ValueError:
        at = _EPOCH_START
    at = at if at.tzinfo else at.replace(tzinfo=UTC)
    return at, result.run_id, f"{result.status} {result.median_us} {result.samples_us} {result.reason}"


def done_keys(results: Iterable[Result], epoch: str) -> set[str]:
    """Keys of the trials that need no second measurement: status ok in this epoch (the same driver, toolchain and device)."""
    return {r.key for r in results if r.status is Status.OK and r.epoch == epoch}


def latest(results: Iterable[Result]) -> list[Result]:
    """What stands, per trial: its newest ok row, and its newest row that failed if that is newer still.

    So a failure tonight hides no result of yesterday, and is not hidden by it. Rows of another kind (screened, say) stand on their own.
    Sorted by operator, problem, kernel and age.
    """
    fine: dict[tuple[str, str], Result] = {}
    failed: dict[tuple[str, str], Result] = {}
    for result in results:
        rows = fine if result.status is Status.OK else failed
        trial = (result.key, result.kind)
        if trial not in rows or age(rows[trial]) < age(result):
            rows[trial] = result
    newer = [r for trial, r in failed.items() if trial not in fine or age(fine[trial]) < age(r)]
    return sorted([*fine.values(), *newer], key=lambda r: (r.operator, r.problem_label, r.kernel, r.key, age(r)))


def numerics_verified(result: Result) -> bool:
    """True when this row proves that the kernel computed the right thing on the chip itself (throttling costs time, not correctness)."""
    return (
        result.status in (Status.OK, Status.THROTTLED)
        and result.kind == "measured"
        and result.checks > 0
        and result.error is not None
        and result.tolerance is not None
        and result.error <= result.tolerance
    )


def verified_kernels(paths: Path | str | Iterable[Path | str], report: ReadReport | None = None) -> set[tuple[str, str, str]]:
    """(kernel id, source digest, chip) of every kernel that a recorded result shows to be right on a device of that kind."""
    return {(r.kernel, r.source_digest, r.chip) for r in iter_results(paths, report) if numerics_verified(r)}
