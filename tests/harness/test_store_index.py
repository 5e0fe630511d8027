"""The index of a large store holds what iter_results gives: each row once, nothing that is no row, by age; whole rows are the rows."""

from __future__ import annotations

import gzip
import json
import random
from pathlib import Path

import pytest
from made_results import contest, made
from made_store import lines, write_store

from klab.harness.measure.stats import FLOOR_ROUNDS as FLOOR
from klab.harness.measure.stats import THROTTLED_SHARE as SHARE
from klab.harness.store.compact import compact
from klab.harness.store.index import Index, rounds_of
from klab.harness.store.index_sql import FLOOR_ROUNDS, THROTTLED_SHARE
from klab.harness.store.query import age
from klab.harness.store.read import ReadReport, iter_results
from klab.harness.store.result import Result
from klab.harness.store.schema import parse
from klab.kernels.matmul.problem import Matmul

pytest.importorskip("duckdb")

FOREIGN = (
    "not JSON", "[]", "3", "{}", '{"key": "only"}', '{"schema": 1}',
)  # fmt: skip
WRONG = (
    {"schema": 2}, {"schema": None}, {"status": "fine"}, {"kernel": "matmul"}, {"kernel": "a/b/c"}, {"median_us": -1.0}, {"flops": -1.0},
    {"config": [1]}, {"problem": None}, {"q1_us": 1e9}, {"ci_high_us": 1e-9}, {"samples_us": [1.0, 0.0]}, {"key": None},
)  # fmt: skip


def text(row: Result, **changes: object) -> str:
    return json.dumps(row.to_json() | changes) + "\n"


def everything(index: Index) -> dict[int, Result]:
    return index.whole("SELECT n FROM rows")


def test_it_holds_what_reading_gives(tmp_path: Path) -> None:
    rows = contest()
    random.Random(0).shuffle(rows)
    (tmp_path / "a.jsonl").write_text("".join(map(text, rows[:30])) + "\n" + text(rows[0]))
    (tmp_path / "b*.jsonl").write_text("".join(map(text, rows[20:40])))
    with gzip.open(tmp_path / "c.jsonl.gz", "wt") as file:
        file.writelines(json.dumps(row.to_json(), sort_keys=True) + "\n" for row in rows[40:])
    compact(tmp_path)
    (tmp_path / "late.jsonl").write_text(text(made(Matmul(3, 3, 3), recorded_at="2027-01-01T00:00:00+02:00")))
    report = ReadReport()
    expected = sorted(iter_results(tmp_path, report), key=age)
    with Index([tmp_path]) as index:
        assert index.report.lines() == [] and (index.report.rows, index.report.copies) == (report.rows, report.copies)
        found = everything(index)
        assert [found[n] for n in sorted(found)] == expected, "by age"
        for n, light in index.light("SELECT n FROM rows").items():
            whole = found[n]
            assert (light.key, light.config, light.problem, light.environment) == (
                whole.key,
                whole.config,
                whole.problem,
                whole.environment,
            )
            assert (light.status, light.reason, light.median_us, light.energy_j) == (
                whole.status,
                whole.reason,
                whole.median_us,
                whole.energy_j,
            )
            assert not light.samples_us and rounds_of(light) == pytest.approx(rounds_of(whole))
        folder = index._scratch
        assert folder.is_dir()
    assert not folder.exists(), "nothing is left behind"


def test_what_is_no_row_is_counted(tmp_path: Path) -> None:
    row = made(Matmul(1, 64, 64))
    whole = "".join([text(row), *(f"{line}\n" for line in FOREIGN), *(text(row, **change) for change in WRONG)])
    (tmp_path / "a.jsonl").write_text(whole + text(row)[:100])
    packed = gzip.compress("".join(text(made(Matmul(m, 64, 64))) for m in range(2, 400)).encode())
    (tmp_path / "cut.jsonl.gz").write_bytes(packed[: len(packed) // 2])
    (tmp_path / "foreign.parquet").write_bytes(b"PAR1 or not")
    slow = ReadReport()
    expected = list(iter_results(tmp_path, slow))
    with Index([tmp_path]) as index:
        assert sorted(r.key for r in everything(index).values()) == sorted(r.key for r in expected)
        assert set(index.report.torn) == set(slow.torn) == {tmp_path / "a.jsonl", tmp_path / "cut.jsonl.gz"}
        assert {path: one.count for path, one in index.report.skipped.items()} == {path: one.count for path, one in slow.skipped.items()}
        assert index.report.skipped[tmp_path / "a.jsonl"].count == len(FOREIGN) + len(WRONG)


def test_a_row_of_a_wrong_type_is_dropped_when_it_is_read_whole(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(text(made(Matmul(1, 64, 64)), checks="three"))
    with Index([tmp_path]) as index:
        assert everything(index) == {} and index.report.skipped[tmp_path / "a.jsonl"].first == "checks is not a whole number"


def test_the_numbers_are_those_of_the_statistics() -> None:
    assert (FLOOR_ROUNDS, THROTTLED_SHARE) == (FLOOR, SHARE)


def test_the_made_store_is_of_rows(tmp_path: Path) -> None:
    write_store(tmp_path / "a", 300, problems=3, runs=4)
    write_store(tmp_path / "b", 300, problems=3, runs=4, packed=True)
    report = ReadReport()
    rows = list(iter_results(tmp_path / "a", report))
    assert len(rows) == 300 and not report.lines() and rows == list(iter_results(tmp_path / "b"))
    assert {row.run_id for row in rows} == {f"run-{n:04d}" for n in range(4)} and {row.chip for row in rows} == {"h200", "cpu"}
    assert 5 < sum(row.status != "ok" for row in rows) < 60
    assert all(parse(json.loads(line)) for _, line in lines(10, rounds=100, problems=3))
