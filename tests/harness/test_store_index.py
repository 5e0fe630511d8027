"""The index of a large store holds what iter_results gives: each row once, nothing that is no row, by age; whole rows are the rows."""

from __future__ import annotations

import gzip
import json
import random
import time
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
    {"energy_j": -1.0}, {"energy_ci_low_j": 2.0, "energy_ci_high_j": 1.0},
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


def test_rows_of_one_second_are_told_apart_and_what_is_wrong_is_counted_once(tmp_path: Path) -> None:
    rows = [made(Matmul(1, 64, 64), samples=[5.0] * count) for count in (6, 7)]
    (tmp_path / "a.jsonl").write_text("".join(map(text, rows)) + text(rows[0], ci_low_us=9.0) + text(rows[0], checks="three", run_id="x"))
    with Index([tmp_path]) as index:
        for _ in range(2):
            assert [len(row.samples_us) for row in everything(index).values()] in ([6, 7], [7, 6])
            assert index.report.skipped[tmp_path / "a.jsonl"].count == 2


def test_numbers_that_parquet_alone_can_hold_make_no_row(tmp_path: Path) -> None:
    """To DuckDB a NaN is above all numbers and equal to itself: a checked time of it would stand for one."""
    import duckdb

    (tmp_path / "a.jsonl").write_text("".join(text(made(Matmul(m, 64, 64))) for m in range(1, 6)))
    compact(tmp_path)
    (tmp_path / "a.jsonl").unlink()
    (path,) = tmp_path.glob("*.parquet")
    odd = {1: "median_us = 'nan'", 2: "error = 'nan', tolerance = 'nan'", 3: "samples_us = [1.0, 'nan'::DOUBLE]", 4: "flops = 'inf'"}
    with duckdb.connect() as db:
        db.execute(f"CREATE TABLE t AS SELECT * FROM '{path}'")
        for m, change in odd.items():
            db.execute(f"UPDATE t SET {change} WHERE problem_label LIKE '% {m}x64x64%'")
        db.execute(f"COPY t TO '{path}'")
    slow = ReadReport()
    (left,) = iter_results(tmp_path, slow)
    with Index([tmp_path]) as index:
        assert [row.key for row in index.light("SELECT n FROM rows").values()] == [left.key]
        assert index.report.skipped[path].count == slow.skipped[path].count == 4


def test_a_time_that_names_no_zone_is_utc_wherever_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [made(Matmul(m, 64, 64), recorded_at=at) for m, at in ((1, "2026-11-20T10:00:00"), (2, "2026-11-20T06:00:00Z"))]
    (tmp_path / "a.jsonl").write_text("".join(map(text, rows)))
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    time.tzset()
    try:
        with Index([tmp_path]) as index:
            found = everything(index)
            assert [found[n] for n in sorted(found)] == sorted(rows, key=age)
    finally:
        monkeypatch.undo()
        time.tzset()


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
