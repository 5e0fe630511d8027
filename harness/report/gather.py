"""From the files of a store to a story's subjects: all rows where they are few, the rows that matter where they are many."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Sequence
from pathlib import Path

from klab.harness.choose.profile import Profile
from klab.harness.report.request import Request
from klab.harness.report.runs import named_runs, runs_of
from klab.harness.report.sift import sifted
from klab.harness.report.subject import Story, tell
from klab.harness.store.query import age
from klab.harness.store.read import ReadReport, iter_results, part_files
from klab.harness.store.result import Result, Status

# Up to here every row is read into memory: some seconds, and about 20,000 rows of 20 rounds.
LARGE_BYTES = 48 << 20
# How much text a byte of a packed file stands for, about.
PACKED = {".gz": 8, ".parquet": 12}


def gather(folders: Sequence[Path], request: Request, *, large_bytes: int = LARGE_BYTES) -> Story:
    """The story's subjects, the newest run by chip, the choices without it, and what reading met.

    A store larger than `large_bytes` is sifted by DuckDB, where that is installed: the choices and the counts are those of all rows, and
    the rows that matter are whole. UsageError for runs that are not there.
    """
    report = ReadReport()
    note: tuple[str, ...] = ()
    if text_bytes(folders) > large_bytes:
        if importlib.util.find_spec("duckdb") is not None:
            import duckdb

            try:
                return sifted(folders, request)
            except duckdb.Error as error:  # no room for its files, say
                why = str(error).splitlines()[0][:160]
                note = (f"This is a large store, and DuckDB could not sift it ({why}): every row was read into memory",)
        else:
            note = ("This is a large store, and without DuckDB every row is read into memory: pip install 'kernel-lab[analysis]'",)
    rows = list(iter_results(folders, report))
    told = story_of(rows, request)
    return dataclasses.replace(told, reading=(*report.lines(), *note))


def text_bytes(folders: Sequence[Path]) -> int:
    """About how much JSON the files hold, from their sizes alone."""
    files = part_files(folders, ReadReport())
    return sum(path.stat().st_size * PACKED.get(path.suffix, 1) for path in files if path.exists())


def story_of(results: Sequence[Result], request: Request) -> Story:
    """The story of results that are at hand: subjects, the newest run by chip, and the choices without it."""
    rows = [row for row in results if not request.shown_chips or row.chip in request.shown_chips]
    if request.runs:
        ids = set(named_runs(request.runs, runs_of(rows)))
        rows = [row for row in rows if row.run_id in ids or row.kind == "reference"]
    chips = request.shown_chips
    keys = {chip: found for chip in chips if (found := request.keys(chip)) is not None}
    told = tell(rows, request.profile, request.known, chips=chips, keys=keys)
    newest_run: dict[str, str] = {}
    before: dict[str, Profile] = {}
    failed_before: dict[str, frozenset[tuple[str, str]]] = {}
    for subject in told.subjects:
        own = [row for row in subject.rows if row.kind != "reference"]
        if not own:
            continue
        newest = max(own, key=age).run_id
        newest_run[subject.chip] = newest
        shown = keys.get(subject.chip)
        here = [row for row in rows if row.chip == subject.chip and (shown is None or row.problem_key in shown)]
        without = [row for row in here if row.kind == "reference" or row.run_id != newest]
        if any(row.kind != "reference" for row in without):
            before[subject.chip] = request.profile(subject.chip, without)
            failed_before[subject.chip] = _failed_before(here, newest)
    return dataclasses.replace(told, newest_run=newest_run, before=before, failed_before=failed_before)


def _failed_before(rows: Sequence[Result], newest: str) -> frozenset[tuple[str, str]]:
    """What ended how in earlier runs, of kernels and of the trials that the newest run has (see `Story.failed_before`)."""
    failed = [row for row in rows if row.status is not Status.OK and row.kind != "reference"]
    trials = {row.key for row in failed if row.run_id == newest}
    earlier = [row for row in failed if row.run_id != newest]
    return frozenset((name, row.status.value) for row in earlier for name in (row.kernel, row.key) if name == row.kernel or name in trials)
