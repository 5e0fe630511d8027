"""Reading is never stopped by what it finds: corrupt, foreign, compressed, newer and older rows."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from made_results import made

from klab.harness.store.journal import Journal
from klab.harness.store.read import ReadReport, iter_results
from klab.harness.store.result import Result
from klab.harness.store.schema import COLUMNS, parse, upgrade
from klab.kernels.matmul.problem import Matmul

SHAPE = Matmul(8, 64, 32)


def line(n: int, **changes: object) -> bytes:
    return json.dumps(made(SHAPE, seed=n, run_id=f"run-{n}").to_json() | changes).encode() + b"\n"


def read(*paths: Path) -> tuple[list[Result], ReadReport]:
    report = ReadReport()
    return list(iter_results(paths, report)), report


SPOILED = {
    "not JSON": b'{"key": "a", \n',
    "not text": b"\xff\xfe\x00\x01\n",
    "NUL bytes": b"\0" * 100 + b"\n",
    "a list": b"[1, 2]\n",
    "another program's": b'{"time": 3.5, "name": "somebody"}\n',
    "no schema": line(1).replace(b'"schema": 1', b'"scheme": 1'),
    "newer": line(1, schema=99),
    "unknown status": line(1, status="excellent"),
    "text for a number": line(1, median_us="fast"),
    "a number for samples": line(1, samples_us=3.0),
    "text in samples": line(1, samples_us=["1.0"]),
    "infinity": line(1, median_us=1).replace(b'"median_us": 1', b'"median_us": 1e999'),
    "NaN": line(1, median_us=1).replace(b'"median_us": 1', b'"median_us": NaN'),
    "a flag for a count": line(1, checks=True),
    "a count beyond 64 bits": line(1, launches_per_round=2**70),
    "deep": b"[" * 100_000 + b"\n",
    "lists for the problem": line(1, problem=[1]),
    "a kernel without its operator": line(1, kernel="torch"),
    "a kernel with two": line(1, kernel="matmul/deep/torch"),
    "a time of nothing": line(1, samples_us=[3.0, 0]),
    "a median before its start": line(1, median_us=-1.0, q1_us=None, ci_low_us=None),
    "work below nothing": line(1, flops=-1.0),
    "bytes below nothing": line(1, bytes_moved=-1),
    "a median above its interval": line(1, median_us=5.0, q1_us=4.0, q3_us=6.0, ci_low_us=4.0, ci_high_us=4.5),
    "quartiles the wrong way round": line(1, median_us=None, q1_us=6.0, q3_us=5.0),
}


@pytest.mark.parametrize("what", SPOILED)
def test_a_spoiled_line_in_the_middle_is_skipped_and_reported(tmp_path: Path, what: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(line(1) + SPOILED[what] + SPOILED[what] + line(2))
    rows, report = read(tmp_path)
    assert [r.run_id for r in rows] == ["run-1", "run-2"]
    assert report.skipped[path].count == 2 and report.skipped[path].first.startswith("line 2: ")
    (told,) = report.lines()
    assert str(path) in told and "2 skipped" in told and "\n" not in told and len(told) < 400


def test_a_newer_row_says_to_update(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(line(1, schema=7))
    assert "schema 7" in read(tmp_path)[1].lines()[0] and "update klab" in read(tmp_path)[1].lines()[0]


def test_foreign_files_do_not_stop_it(tmp_path: Path) -> None:
    good = tmp_path / "deep" / "er" / "good.jsonl"
    good.parent.mkdir(parents=True)
    good.write_bytes(line(1))
    (tmp_path / "picture.jsonl").write_bytes(os.urandom(5000))
    (tmp_path / "archive.jsonl.gz").write_bytes(b"not gzip at all")
    (tmp_path / "table.parquet").write_bytes(b"PAR1 no it is not")
    (tmp_path / "notes.md").write_text("ignored")
    (tmp_path / "folder.jsonl").mkdir()
    (tmp_path / "gone.jsonl").symlink_to(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / "empty.jsonl").write_bytes(b"")
    (tmp_path / "blank.jsonl").write_bytes(b"\n\n  \n")
    rows, report = read(tmp_path)
    assert [r.run_id for r in rows] == ["run-1"]
    assert {p.name for p in [*report.skipped, *report.torn]} == {
        "picture.jsonl", "archive.jsonl.gz", "table.parquet", "gone.jsonl", "pipe.jsonl",
    }  # fmt: skip


def test_compressed_files(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(line(1) + line(2)))
    rows, report = read(tmp_path)
    assert len(rows) == 2 and not report.lines()


def test_a_compressed_file_without_its_end_gives_what_it_has(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(b"".join(line(n) for n in range(50)))[:-20])
    rows, report = read(tmp_path)
    assert len(rows) >= 1 and report.torn == [path]


def test_a_line_too_long_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("klab.harness.store.read.LONGEST_LINE_BYTES", 20_000)
    (tmp_path / "a.jsonl").write_bytes(line(1) + b"x" * 100_000 + b"\n" + line(2))
    rows, report = read(tmp_path)
    assert len(rows) == 2 and "longer than" in report.lines()[0]


def test_a_copy_counts_once(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(line(1) + line(2))
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(line(2) + line(3)))
    rows, report = read(tmp_path, tmp_path / "a.jsonl", tmp_path)
    assert [r.run_id for r in rows] == ["run-1", "run-2", "run-3"] and report.copies == 1


def test_the_chain_of_upgrades() -> None:
    old = json.loads(line(1, schema=1)) | {"power": 100.0}
    del old["recorded_at"]
    steps = {
        1: lambda row: row | {"recorded_at": "2026-01-01T00:00:00Z", "power_mw": row.pop("power") * 1000},
        2: lambda row: row | {"power_w": row.pop("power_mw") / 1000},
    }
    assert upgrade(dict(old), steps, current=3)["power_w"] == 100.0
    assert parse(dict(old), steps, current=3).power_w == 100.0
    assert old["power"] == 100.0, "the row that was read is not changed"
    with pytest.raises(ValueError, match="newer klab"):
        upgrade({"schema": 4}, steps, current=3)
    with pytest.raises(ValueError, match="schema 0 is unknown"):
        upgrade({"schema": 0}, steps, current=3)


def test_every_field_of_a_result_has_a_column() -> None:
    assert list(COLUMNS) == list(Result.__dataclass_fields__)


def test_whole_numbers_become_floats(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(line(1, median_us=3, q1_us=3, q3_us=3, ci_low_us=2, ci_high_us=3, samples_us=[1, 2]))
    (row,) = read(tmp_path)[0]
    assert isinstance(row.median_us, float) and all(isinstance(s, float) for s in row.samples_us)


@given(st.binary(max_size=300))
def test_no_bytes_whatever_stop_it(tmp_path_factory: pytest.TempPathFactory, noise: bytes) -> None:
    path = tmp_path_factory.mktemp("noise") / "a.jsonl"
    path.write_bytes(line(1) + noise + b"\n" + line(2))
    assert {r.run_id for r in read(path)[0]} == {"run-1", "run-2"}


def test_it_reads_with_the_standard_library_alone(tmp_path: Path) -> None:
    """A measuring node has no pandas, DuckDB or plotly: importing the store and reading must not need them."""
    with Journal(tmp_path, "run") as journal:
        journal.append(made(SHAPE))
    program = (
        "import sys\n"
        "for name in ('pandas', 'duckdb', 'plotly', 'numpy', 'torch'): sys.modules[name] = None\n"
        "from klab.harness.store import Journal, iter_results, load\n"
        "from klab.harness.store.query import done_keys, latest, verified_kernels\n"
        f"rows = latest(iter_results({str(tmp_path)!r}))\n"
        f"print(len(rows), len(done_keys(rows, 'epoch-1')), len(verified_kernels({str(tmp_path)!r})))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.split() == ["1", "1", "1"], done.stderr
