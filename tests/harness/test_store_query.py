"""What stands, what need not be run again, what is verified; pandas and Parquet."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import shutil
import time
from pathlib import Path

import pytest
from made_results import contest, failed, made

from klab.harness.store import load
from klab.harness.store.compact import compact
from klab.harness.store.journal import Journal
from klab.harness.store.paths import checkout, folder_to_read, folder_to_write
from klab.harness.store.query import done_keys, latest, numerics, standing_incorrect, verified_kernels
from klab.harness.store.read import ReadReport, iter_results
from klab.harness.store.result import Result, Status
from klab.kernels.errors import CannotMeasure, UsageError
from klab.kernels.matmul.problem import Matmul

SHAPE = Matmul(8, 64, 32)


def store(folder: Path, rows: list[Result], run: str = "run") -> Path:
    with Journal(folder, run) as journal:
        for row in rows:
            journal.append(row)
    assert journal.path is not None
    return journal.path


def at(hour: int, **changes: object) -> Result:
    return dataclasses.replace(made(SHAPE), recorded_at=f"2026-11-20T{hour:02d}:00:00Z", **changes)  # type: ignore[arg-type]


def test_the_newest_ok_row_stands() -> None:
    old, new = at(1, median_us=5.0), at(2, median_us=6.0)
    assert latest([old, new]) == latest([new, old]) == [new]


def test_a_newer_failure_hides_nothing_and_is_kept() -> None:
    good, bad, worse = at(1), at(2, status=Status.TIMEOUT), at(3, status=Status.CRASHED)
    rows = [good, bad, worse]
    for order in itertools.permutations(rows):
        assert latest(order) == [good, worse]


def test_an_older_failure_is_history() -> None:
    assert latest([at(1, status=Status.CRASHED), at(2)]) == [at(2)]


def test_times_with_and_without_a_zone_are_ordered() -> None:
    early = dataclasses.replace(at(1), recorded_at="2026-11-20T12:00:00+02:00", median_us=1.0)
    late = dataclasses.replace(at(1), recorded_at="2026-11-20T11:00:00", median_us=2.0)
    odd = dataclasses.replace(at(1), recorded_at="yesterday", median_us=3.0)
    assert latest([late, early, odd]) == [late]


def test_screened_rows_do_not_replace_measured_ones() -> None:
    screened = at(5, status=Status.SCREENED, kind="screened")
    assert latest([screened, at(1)]) == [at(1), screened]


def test_done_keys_are_ok_rows_of_this_epoch() -> None:
    other = made(Matmul(1, 64, 32))
    rows = [at(1), dataclasses.replace(other, status=Status.TIMEOUT), dataclasses.replace(other, epoch="driver of last year")]
    assert done_keys(rows, "epoch-1") == {at(1).key}


@pytest.mark.parametrize(
    ("changes", "counts"),
    [
        ({}, True),
        ({"status": Status.THROTTLED}, True),
        ({"checks": 0}, False),
        ({"error": None}, False),
        ({"error": 1.0}, False),
        ({"status": Status.INCORRECT}, False),
        ({"kind": "screened"}, False),
    ],
)
def test_a_kernel_is_verified_by_a_checked_result(tmp_path: Path, changes: dict[str, object], counts: bool) -> None:
    row = at(1, **changes)
    store(tmp_path, [row])
    assert verified_kernels(tmp_path) == ({(row.kernel, row.source_digest, "h200")} if counts else set())


def test_a_wrong_result_stands_until_the_same_trial_is_right() -> None:
    wrong, crash, right = at(2, status=Status.INCORRECT, error=0.3), at(3, status=Status.CRASHED), at(4)
    assert standing_incorrect([at(1), wrong]) == [wrong]
    assert standing_incorrect([crash, wrong]) == [wrong], "a crash says nothing of the numbers"
    assert standing_incorrect([right, wrong, crash]) == [] == standing_incorrect([at(1)])
    other = dataclasses.replace(right, key="another trial")
    assert standing_incorrect([wrong, other]) == [wrong]
    assert standing_incorrect([wrong, at(4, checks=0)]) == [wrong], "an unchecked time proves nothing"


def test_a_kernel_that_is_wrong_somewhere_is_not_verified(tmp_path: Path) -> None:
    wrong = dataclasses.replace(at(2, status=Status.INCORRECT, error=0.3), key="an example")
    store(tmp_path, [wrong, at(1), dataclasses.replace(at(3), kernel="matmul/other")])
    found = numerics(tmp_path)
    code = (wrong.kernel, wrong.source_digest, "h200")
    assert found.wrong == {code: 1} and found.verified == {("matmul/other", wrong.source_digest, "h200")}
    store(tmp_path, [at(4, key="an example")], run="later")
    assert code in verified_kernels(tmp_path) and not numerics(tmp_path).wrong


def test_load_gives_a_frame(tmp_path: Path) -> None:
    rows = contest()
    store(tmp_path, rows)
    report = ReadReport()
    frame = load(tmp_path, report)
    assert len(frame) == len(rows) == report.rows
    assert json.loads(frame["problem"][0]) == rows[0].problem and json.loads(frame["config"][1]) == rows[1].config
    ok = frame[frame["status"] == "ok"].iloc[0]
    assert ok["tflops"] == pytest.approx(ok["flops"] / ok["median_us"] / 1e6)
    assert ok["gb_per_s"] == pytest.approx(ok["bytes_moved"] / ok["median_us"] / 1e3)
    assert frame["median_us"].dtype == "float64" and frame[frame["status"] == "crashed"]["median_us"].isna().all()
    assert frame.groupby("kernel")["median_us"].median().notna().any()
    assert len(frame["samples_us"][0]) == 20


def test_load_of_nothing_has_the_columns(tmp_path: Path) -> None:
    frame = load(tmp_path)
    assert len(frame) == 0 and {"median_us", "tflops", "config_label", "environment"} <= set(frame.columns)


def test_load_of_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="nowhere does not exist"):
        load(tmp_path / "nowhere")


def test_compaction_keeps_every_value_and_doubles_none(tmp_path: Path) -> None:
    rows = contest() + contest("cpu", seed=1)
    rows.append(dataclasses.replace(rows[0], run_id="traced", power_trace=((0.0, 91.0), (0.1, 690.0)), clocks_mhz=(None, 1755.0)))
    rows.append(
        dataclasses.replace(rows[0], run_id="text", reason="quotes \" ' \n newline, \U0001f600 and <html>", throttle_reasons=(None, 4))
    )
    part = store(tmp_path, rows)
    done = compact(tmp_path)
    assert done.rows == len(rows) and done.path is not None and part.exists() and done.deleted == ()
    assert list(iter_results(done.path)) == rows, "the Parquet file alone gives the same rows"
    assert list(iter_results(part)) == rows
    report = ReadReport()
    assert len(list(iter_results(tmp_path, report))) == len(rows) and report.copies == len(rows)
    assert compact(tmp_path).path is None, "a second time there is nothing new"
    new = dataclasses.replace(rows[0], run_id="later")
    store(tmp_path, [new], "later")
    again = compact(tmp_path)
    assert again.rows == 1 and again.path is not None and list(iter_results(again.path)) == [new]


def test_compaction_deletes_only_what_is_safe(tmp_path: Path) -> None:
    rows = contest()
    safe, spoiled, fresh = (store(tmp_path, rows[n : n + 10], f"run{n}") for n in (0, 10, 20))
    with spoiled.open("a") as file:
        file.write("not a row\n")
    hour_ago = time.time() - 3600
    os.utime(safe, (hour_ago, hour_ago))
    os.utime(spoiled, (hour_ago, hour_ago))
    done = compact(tmp_path, delete_originals=True)
    assert done.deleted == (safe,) and not safe.exists() and spoiled.exists() and fresh.exists()
    assert len(done.kept) == 2 and any("not understood" in why for why in done.kept) and any("last 600 s" in why for why in done.kept)
    assert sorted(r.key for r in iter_results(tmp_path)) == sorted(r.key for r in rows[:30])
    assert len(load(tmp_path)) == 30


def test_compaction_survives_spoiled_input_and_a_foreign_parquet(tmp_path: Path) -> None:
    import duckdb

    store(tmp_path, contest()[:3])
    (tmp_path / "noise.jsonl").write_bytes(os.urandom(3000))
    duckdb.sql("SELECT 1 AS a, 'x' AS b").write_parquet(str(tmp_path / "foreign.parquet"))
    assert compact(tmp_path).rows == 3
    report = ReadReport()
    assert len(list(iter_results(tmp_path, report))) == 3
    assert {p.name for p in [*report.skipped, *report.torn]} == {"noise.jsonl", "foreign.parquet"}


def test_compaction_without_space_says_so_and_leaves_no_debris(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    part = store(tmp_path, contest()[:3])

    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(CannotMeasure, match="originals are untouched"):
        compact(tmp_path)
    assert list(tmp_path.iterdir()) == [part]


def test_compaction_of_no_folder(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="not a folder"):
        compact(tmp_path / "nowhere")


def test_where_results_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KLAB_RESULTS", raising=False)
    root = checkout()
    assert root is not None and folder_to_read() == root / "results" and folder_to_write() == root / "results" / "local"
    monkeypatch.setenv("KLAB_RESULTS", str(tmp_path / "env"))
    assert folder_to_write() == tmp_path / "env"
    with pytest.raises(UsageError, match="KLAB_RESULTS"):
        folder_to_read()
    assert folder_to_write(tmp_path / "given") == tmp_path / "given" and folder_to_read(tmp_path) == tmp_path
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="is a file"):
        folder_to_write(tmp_path / "file")
    monkeypatch.delenv("KLAB_RESULTS")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("klab.harness.store.paths.checkout", lambda: None)
    assert folder_to_read() == folder_to_write() == Path("klab-results")


def test_rows_that_moved_to_another_machine_read_the_same(tmp_path: Path) -> None:
    rows = contest()
    store(tmp_path / "here", rows)
    shutil.copytree(tmp_path / "here", tmp_path / "there")
    assert list(iter_results(tmp_path)) == rows


def test_a_failed_trial_is_a_row_too(tmp_path: Path) -> None:
    row = failed(SHAPE, "triton_x", Status.OUT_OF_MEMORY, "needs 180 GB")
    store(tmp_path, [row])
    assert list(iter_results(tmp_path)) == [row] and load(tmp_path)["status"][0] == "out_of_memory"
