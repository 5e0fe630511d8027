"""Compaction: rows of many part files into one Parquet file, with DuckDB. Nothing is deleted unless asked, and no row counts twice."""

from __future__ import annotations

import errno
import json
import os
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from klab.harness.store.read import LONGEST_LINE_BYTES, ReadReport, iter_results, part_files
from klab.harness.store.result import Result
from klab.harness.store.schema import COLUMNS, JSON_COLUMNS, identity, parse
from klab.kernels.contract import Json
from klab.kernels.errors import CannotMeasure, UsageError

# A part file that was written to within this time may still have its writer, and is not deleted.
QUIET_S = 600.0
ROWS_AT_ONCE = 512


@dataclass(frozen=True)
class Compaction:
    """What was done: `rows` that were in no Parquet file before went to `path` (None when there were none); `deleted` part files."""

    rows: int
    path: Path | None
    deleted: tuple[Path, ...]
    kept: tuple[str, ...]


def compact(folder: Path | str, *, delete_originals: bool = False, quiet_s: float = QUIET_S) -> Compaction:
    """Write the rows of `folder` that are in no Parquet file yet to a new one there.

    With `delete_originals`, the JSON-lines files whose every line was understood, whose rows are all in Parquet (read back to be sure)
    and which have been quiet for `quiet_s` seconds are deleted; `kept` says why others were not.
    UsageError where the folder does not exist or DuckDB is missing, CannotMeasure where the disk does not take the file.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UsageError(f"cannot compact {folder}: it is not a folder")
    try:
        import duckdb  # noqa: F401
    except ModuleNotFoundError:
        raise UsageError("compaction needs DuckDB: pip install 'kernel-lab[analysis]'") from None

    already = {identity(r) for path in folder.rglob("*.parquet") for r in parquet_rows(path, ReadReport())}
    report = ReadReport()
    # The state of each file before it is read: a file that has grown since is not deleted.
    before = {path: path.stat() for path in part_files([folder], ReadReport()) if path.suffix != ".parquet"}
    path, rows = _write_new(folder, (r for r in iter_results(before, report) if identity(r) not in already))
    deleted: list[Path] = []
    kept: list[str] = []
    if delete_originals:
        stored = {identity(r) for file in folder.rglob("*.parquet") for r in parquet_rows(file, ReadReport())}
        for file, state in before.items():
            own = ReadReport()
            whole = all(identity(r) in stored for r in iter_results(file, own))
            if not own.clean(file):
                kept.append(f"{file}: has lines that were not understood")
            elif not whole:
                kept.append(f"{file}: not all of its rows are in Parquet")
            elif time.time() - state.st_mtime < quiet_s or file.stat().st_size != state.st_size:
                kept.append(f"{file}: written to within the last {quiet_s:.0f} s")
            else:
                file.unlink()
                deleted.append(file)
    return Compaction(rows, path, tuple(deleted), tuple(kept))


def parquet_rows(path: Path, report: ReadReport) -> Iterator[Result]:
    """The Results of one compacted file; a file that is damaged or somebody else's is noted in `report`."""
    import duckdb

    with duckdb.connect() as db:
        try:
            cursor = db.execute("SELECT * FROM read_parquet(?)", [str(path)])
            names = [column[0] for column in cursor.description or ()]
            while rows := cursor.fetchmany(ROWS_AT_ONCE):
                for values in rows:
                    try:
                        yield parse(_row(names, values))
                    except (ValueError, TypeError) as error:
                        report.skip(path, str(error)[:200])
        except duckdb.Error as error:
            report.skip(path, str(error).splitlines()[0][:200])


def _row(names: list[str], values: tuple[Any, ...]) -> dict[str, Json]:
    """A row of the table as the journal has it: JSON text decoded, what is null left out (its default is null or empty)."""
    row = {name: value for name, value in zip(names, values, strict=True) if value is not None}
    for name in JSON_COLUMNS:
        if name in row:
            row[name] = json.loads(row[name])
    return row


def _write_new(folder: Path, results: Iterator[Result]) -> tuple[Path | None, int]:
    """Stream the rows to a temporary JSON-lines file of exactly the table's columns, and let DuckDB turn it into Parquet."""
    import duckdb

    name = f"compact-{datetime.now(UTC):%Y%m%dT%H%M%S}-{os.getpid()}-{time.monotonic_ns() % 1_000_000:06d}.parquet"
    part, target = folder / f".{name}.part", folder / name
    rows = 0
    try:
        with tempfile.TemporaryDirectory(prefix="klab-compact-") as scratch:
            lines = Path(scratch) / "rows.jsonl"
            with lines.open("w") as out:
                for result in results:
                    row = result.to_json()
                    out.write(json.dumps({k: json.dumps(v) if k in JSON_COLUMNS else v for k, v in row.items()}) + "\n")
                    rows += 1
            if not rows:
                return None, 0
            # Explicit columns: guessing them (or union_by_name over many files) exhausts memory.
            columns = ", ".join(f"'{column}': '{kind}'" for column, kind in COLUMNS.items())
            with duckdb.connect() as db:
                db.execute(f"SET temp_directory = '{scratch}'")
                options = f"format = 'newline_delimited', maximum_object_size = {LONGEST_LINE_BYTES}, columns = {{{columns}}}"
                source = f"read_json('{_sql(lines)}', {options})"
                db.execute(f"COPY (SELECT * FROM {source}) TO '{_sql(part)}' (FORMAT parquet, COMPRESSION zstd)")
            with part.open("rb") as file:  # before its name says that the rows are safe
                os.fsync(file.fileno())
            os.replace(part, target)
    except (OSError, duckdb.Error) as error:
        part.unlink(missing_ok=True)
        full = os.strerror(errno.ENOSPC)
        why = full if full in str(error) else str(error).splitlines()[0][:160]
        raise CannotMeasure(f"cannot write {target} ({why}); the originals are untouched") from None
    return target, rows


def _sql(path: Path) -> str:
    return str(path).replace("'", "''")
