"""Reading the store with the standard library alone: whatever is wrong with a file is reported, and stops nothing."""

from __future__ import annotations

import gzip
import importlib.util
import json
import os
import stat
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn, Protocol

from klab.harness.store.result import Result
from klab.harness.store.schema import identity, parse

SUFFIXES = (".jsonl", ".jsonl.gz", ".parquet")

# A row with 200 rounds and a power trace is about 20 KB. A line longer than this is no row, and is not held in memory.
LONGEST_LINE_BYTES = 32 << 20


@dataclass
class Skipped:
    """What one file holds that is no Result: how many lines, and what was wrong with the first."""

    count: int
    first: str


@dataclass
class ReadReport:
    """What reading met: how much was read and what was passed over. `lines` is for people."""

    files: int = 0
    rows: int = 0
    copies: int = 0
    torn: list[Path] = field(default_factory=list)
    skipped: dict[Path, Skipped] = field(default_factory=dict)

    def skip(self, path: Path, reason: str) -> None:
        """Count a line (or a whole file) that was passed over."""
        if path in self.skipped:
            self.skipped[path].count += 1
        else:
            self.skipped[path] = Skipped(1, reason)

    def clean(self, path: Path) -> bool:
        """True when every byte of this file was understood."""
        return path not in self.skipped and path not in self.torn

    def lines(self) -> list[str]:
        """One line per file that was not read whole; empty when all is well."""
        torn = [f"{path}: the last line is torn (its writer was stopped); it is left out" for path in self.torn]
        return torn + [f"{path}: {s.count} skipped; first: {s.first}" for path, s in self.skipped.items()]


def iter_results(paths: Path | str | Iterable[Path | str], report: ReadReport | None = None) -> Iterator[Result]:
    """Every Result in these files and folders (searched recursively), one at a time, in the order of the files' names.

    Reads *.jsonl, *.jsonl.gz and, where DuckDB is installed, compacted *.parquet. A row that is there more than once is given once.
    Torn, corrupt, foreign and newer rows, and files that cannot be read, are passed over and noted in `report`.
    """
    report = ReadReport() if report is None else report
    seen: set[int] = set()
    for path in part_files([paths] if isinstance(paths, str | Path) else paths, report):
        report.files += 1
        rows = _parquet_rows(path, report) if path.suffix == ".parquet" else _json_rows(path, report)
        for result in rows:
            mark = identity(result)
            if mark in seen:
                report.copies += 1
                continue
            seen.add(mark)
            report.rows += 1
            yield result


def part_files(paths: Iterable[Path | str], report: ReadReport) -> list[Path]:
    """The files of the store under these paths, each once, by name; a named file is taken whatever its suffix."""
    found: dict[Path, Path] = {}
    for given in map(Path, paths):
        if given.is_dir():
            walk = os.walk(given, onerror=lambda error: report.skip(Path(error.filename), error.strerror or str(error)))
            inside = (Path(folder) / name for folder, _, names in walk for name in names if name.endswith(SUFFIXES))
            candidates = sorted(path for path in inside if not path.name.startswith("."))
        else:
            candidates = [given]
        for path in candidates:
            try:
                if stat.S_ISREG(path.stat().st_mode):  # a pipe of that name would wait for ever
                    found.setdefault(path.resolve(), path)
                else:
                    report.skip(path, "is not a regular file")
            except OSError as error:
                report.skip(path, error.strerror or str(error))
    return list(found.values())


class _Lines(Protocol):
    def readline(self, limit: int, /) -> bytes: ...


def _json_rows(path: Path, report: ReadReport) -> Iterator[Result]:
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            yield from _decoded(path, file, report)
    except EOFError:  # a compressed file without its end: its writer was stopped
        report.torn.append(path)
    except (OSError, zlib.error) as error:
        report.skip(path, getattr(error, "strerror", None) or str(error))


def _decoded(path: Path, file: _Lines, report: ReadReport) -> Iterator[Result]:
    number = 0
    while line := file.readline(LONGEST_LINE_BYTES):
        number += 1
        whole = line.endswith(b"\n")
        if not whole and len(line) == LONGEST_LINE_BYTES:
            report.skip(path, f"line {number}: longer than {LONGEST_LINE_BYTES >> 20} MiB")
            while (line := file.readline(LONGEST_LINE_BYTES)) and not line.endswith(b"\n"):
                pass
            continue
        if not line.strip():
            continue
        try:
            result = parse(_decoder.decode(line.decode()))
        except (ValueError, TypeError, RecursionError) as error:
            if whole:
                report.skip(path, f"line {number}: {_short(error)}")
            else:
                report.torn.append(path)
            continue
        yield result


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not JSON")


_decoder = json.JSONDecoder(parse_constant=_refuse)


def _short(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return "not JSON"
    if isinstance(error, UnicodeDecodeError):
        return "not text"
    if isinstance(error, RecursionError):
        return "nested too deeply"
    return str(error)[:200]


def _parquet_rows(path: Path, report: ReadReport) -> Iterator[Result]:
    if importlib.util.find_spec("duckdb") is None:
        report.skip(path, "compacted results are read with DuckDB: pip install duckdb")
        return
    from klab.harness.store.compact import parquet_rows

    yield from parquet_rows(path, report)
