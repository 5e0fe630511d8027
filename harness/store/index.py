"""An index of a store too large for Python's memory: the small columns of every row in a DuckDB file of its own, whole rows on demand.

It lives in a temporary folder as long as its block runs, and holds what `iter_results` would give: each row once, no line that is none.
What DuckDB cannot check is looser: a field that may be absent and is of another type counts as absent here, until the row is read whole.
"""

from __future__ import annotations

import gzip
import json
import os
import shutil
import tempfile
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from klab.harness.store.compact import parquet_rows
from klab.harness.store.index_sql import LIGHT, READ, create, insert, json_source, literal, parquet_source
from klab.harness.store.read import LONGEST_LINE_BYTES, ReadReport, Skipped, iter_results, part_files
from klab.harness.store.result import Result, Status
from klab.harness.store.schema import JSON_COLUMNS, parse
from klab.kernels.contract import Json

MEMORY = "600MB"
THREADS = 2
ROWS_AT_ONCE = 2048
# A file whose name would be a pattern to DuckDB is read by Python.
PATTERN = set("*?[{")
KEY_FIRST = b'{"key": "'
NO_ROW = "not a row that this klab reads"


class Index:
    """`with Index(paths) as index`: the table `rows` of `index.db` has a row per Result; `report` tells what reading met.

    Columns: those of LIGHT, and n (rows by age, the oldest first: see `query.age`), config_hash, rounds, counted_rounds, sum_us,
    middle_us (the median, from the samples where it was not stored), throttled. JSON fields are text.
    """

    def __init__(self, paths: Iterable[Path | str], *, memory: str = MEMORY, threads: int = THREADS) -> None:
        self._paths, self._memory, self._threads = list(paths), memory, threads
        self.report = ReadReport()
        self._json: list[Path] = []
        self._parquet: list[Path] = []
        self._texts: dict[str, Json] = {}
        self._missing: set[int] = set()

    def __enter__(self) -> Self:
        import duckdb

        self._scratch = Path(tempfile.mkdtemp(prefix="klab-index-"))
        try:
            self.db = duckdb.connect(str(self._scratch / "index.duckdb"))
            for setting in (
                f"threads = {self._threads}",
                f"memory_limit = '{self._memory}'",
                f"temp_directory = '{literal(self._scratch)}'",
                "preserve_insertion_order = false",
                "enable_progress_bar = false",
                "TimeZone = 'UTC'",  # of times that do not name theirs
            ):
                self.db.execute(f"SET {setting}")
            self._fill()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if hasattr(self, "db"):
            self.db.close()
        shutil.rmtree(self._scratch, ignore_errors=True)

    def query(self, sql: str, *values: Any) -> list[tuple[Any, ...]]:
        """All rows of an answer, which must be small."""
        found: list[tuple[Any, ...]] = self.db.execute(sql, list(values)).fetchall()
        return found

    def light(self, numbers: str) -> dict[int, Result]:
        """By n, the rows that a query of numbers names, without samples, traces and how they were built; `build` has a word on both."""
        found: dict[int, Result] = {}
        names = ", ".join(f"r.{name}" for name in LIGHT)
        self.db.execute(f"SELECT r.n, r.rounds, r.sum_us, {names} FROM rows r WHERE r.n IN ({numbers}) ORDER BY r.n")
        while chunk := self.db.fetchmany(ROWS_AT_ONCE):
            for n, rounds, sum_us, *values in chunk:
                row = {name: value for name, value in zip(LIGHT, values, strict=True) if value is not None}
                for name in JSON_COLUMNS:
                    if name in row:
                        row[name] = self._decoded(row[name])
                row["status"] = Status(row["status"])
                if rounds:
                    row["build"] = {"light": {"rounds": rounds, "sum_us": sum_us}}
                found[n] = Result(**row)
        return found

    def whole(self, numbers: str) -> dict[int, Result]:
        """By n, the rows that a query of numbers names, read whole from their files; what turns out to be none is noted, and missing."""
        self.db.execute(f"CREATE OR REPLACE TEMP TABLE wanted AS SELECT * FROM rows WHERE n IN ({numbers})")
        found: dict[int, Result] = {}
        for (file,) in self.query("SELECT DISTINCT file FROM wanted ORDER BY file"):
            named = self.query(f"SELECT n, {', '.join(_NAME)} FROM wanted WHERE file = ?", file)
            names = {tuple(values): n for n, *values in named}
            path = Path(file)
            rows = self._of_parquet(path) if path in self._parquet else _of_lines(path, {str(key).encode() for _, key, *_ in named})
            why = NO_ROW
            for row in rows:
                try:
                    result = parse(row)
                except (ValueError, TypeError, RecursionError) as error:
                    why = str(error)[:200]
                    continue
                n = names.pop(_name(result), None)
                if n is not None:
                    found[n] = result
                if not names:
                    break
            for _ in set(names.values()) - self._missing:
                self.report.skip(path, why)
            self._missing |= set(names.values())
        return found

    def _of_parquet(self, path: Path) -> Iterator[Json]:
        """Rows of a compacted file that may be wanted."""
        self.db.execute(
            f"SELECT * EXCLUDE (filename) FROM {parquet_source(path)} WHERE key IN (SELECT key FROM wanted WHERE file = ?)", [str(path)]
        )
        columns = [column[0] for column in self.db.description or ()]
        while chunk := self.db.fetchmany(ROWS_AT_ONCE):
            for values in chunk:
                row = {name: value for name, value in zip(columns, values, strict=True) if value is not None}
                yield row | {name: json.loads(row[name]) for name in JSON_COLUMNS if name in row}

    def _decoded(self, text: str) -> Json:
        """Problems and environments repeat in every row: one dict serves all of a text."""
        if text not in self._texts:
            if len(self._texts) > 100_000:
                self._texts.clear()
            self._texts[text] = json.loads(text)
        return self._texts[text]

    def _fill(self) -> None:
        import duckdb

        self.db.execute(create())
        files = part_files(self._paths, self.report)
        plain = [path for path in files if not set(str(path)) & PATTERN]
        for path in files:
            if path not in plain:
                self._salvage(path)
        self._take_json([path for path in plain if path.suffix != ".parquet"])
        for path in plain:
            if path.suffix == ".parquet":
                try:
                    there = {name for name, *_ in self.query(f"DESCRIBE SELECT * FROM {parquet_source(path)}")}
                    self.db.execute(insert(parquet_source(path), there & set(READ)))
                    self._parquet.append(path)
                except duckdb.Error:
                    self._salvage(path)
        self._note_foreign(files)
        # Of copies the first stays; rows by age get their numbers.
        everything, *_ = self.query("SELECT count(*) FROM raw WHERE valid")[0]
        self.db.execute(
            "CREATE TABLE ranks AS SELECT row_number() OVER (ORDER BY at_us, run_id, tie, mark) AS n, first_id "
            "FROM raw JOIN (SELECT min(rowid) AS first_id FROM raw WHERE valid GROUP BY mark) ON raw.rowid = first_id"
        )
        self.db.execute("ALTER TABLE raw ADD COLUMN n BIGINT")
        self.db.execute("UPDATE raw SET n = ranks.n FROM ranks WHERE raw.rowid = ranks.first_id")
        self.db.execute("DELETE FROM raw WHERE n IS NULL")
        self.db.execute("DROP TABLE ranks")
        self.db.execute("ALTER TABLE raw RENAME TO rows")
        self.report.files = len(files)
        self.report.rows, *_ = self.query("SELECT count(*) FROM rows")[0]
        self.report.copies = everything - self.report.rows

    def _take_json(self, files: Sequence[Path]) -> None:
        """Read JSON lines of many files at once; what stops DuckDB (a compressed file without its end) is found by halves."""
        import duckdb

        if not files:
            return
        try:
            self.db.execute(insert(json_source(listed(files))))
            self._json += files
        except duckdb.Error:
            if len(files) == 1:
                self._salvage(files[0])
            else:
                middle = len(files) // 2
                self._take_json(files[:middle])
                self._take_json(files[middle:])

    def _salvage(self, path: Path) -> None:
        """What DuckDB does not read at all, Python reads as far as it goes."""
        rows = parquet_rows(path, self.report) if path.suffix == ".parquet" else iter_results(path, self.report)
        copy = self._scratch / f"salvaged-{len(self._json)}.jsonl"
        with copy.open("w") as file:
            for row in rows:
                file.write(json.dumps(row.to_json()) + "\n")
        if copy.stat().st_size:
            self.db.execute(insert(json_source(listed([copy]))))
            self._json.append(copy)

    def _note_foreign(self, files: Sequence[Path]) -> None:
        """Lines that are no rows, per file; the last line of a file that does not end in a line's end is torn."""
        by_name = {str(path): path for path in files}
        for name, count in self.query("SELECT file, count(*) FROM raw WHERE NOT valid GROUP BY file ORDER BY file"):
            path = by_name.get(name, Path(name))
            if path.suffix not in (".gz", ".parquet") and _unfinished(path):
                self.report.torn.append(path)
                count -= 1
            if count:
                self.report.skipped[path] = Skipped(count, NO_ROW)


_NAME = ("key", "kind", "status", "run_id", "recorded_at", "device_uuid", "reason", "median_us", "energy_j", "rounds")


def _name(r: Result) -> tuple[Any, ...]:
    return r.key, r.kind, r.status.value, r.run_id, r.recorded_at, r.device_uuid, r.reason, r.median_us, r.energy_j, len(r.samples_us)


def listed(files: Iterable[Path]) -> str:
    """Files as a list in SQL."""
    return "[" + ", ".join(f"'{literal(path)}'" for path in files) + "]"


def _of_lines(path: Path, keys: Collection[bytes]) -> Iterator[Json]:
    """Rows of JSON lines that may be wanted. What klab wrote begins with the key, so that other lines need not be decoded."""
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
        while line := file.readline(LONGEST_LINE_BYTES):
            if line.startswith(KEY_FIRST):
                key = line[len(KEY_FIRST) : line.find(b'"', len(KEY_FIRST))]
                if key not in keys and b"\\" not in key:
                    continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if isinstance(row, dict) and str(row.get("key")).encode() in keys:
                yield row


def _unfinished(path: Path) -> bool:
    """Does its last line lack its end?"""
    try:
        with path.open("rb") as file:
            file.seek(-1, os.SEEK_END)
            return file.read(1) != b"\n"
    except OSError:
        return False


def rounds_of(r: Result) -> tuple[int, float]:
    """(rounds, their sum in microseconds) of a row, also of a light one, whose samples were not read."""
    light = r.build.get("light") if not r.samples_us else None
    return (int(light["rounds"]), float(light["sum_us"])) if isinstance(light, dict) else (len(r.samples_us), sum(r.samples_us))
