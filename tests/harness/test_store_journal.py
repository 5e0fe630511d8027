"""What is stored stays stored: crashes, full and read-only disks, many writers, forks, deleted files."""

from __future__ import annotations

import dataclasses
import json
import math
import multiprocessing
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from made_results import made

from klab.harness.store.journal import Journal
from klab.harness.store.read import ReadReport, iter_results
from klab.harness.store.result import Result
from klab.kernels.errors import CannotMeasure
from klab.kernels.matmul.problem import Matmul

SHAPE = Matmul(8, 64, 32)


def row(n: int) -> Result:
    return made(SHAPE, "torch", seed=n, run_id=f"run-{n}")


def read(folder: Path) -> tuple[list[Result], ReadReport]:
    report = ReadReport()
    return list(iter_results(folder, report)), report


def test_a_row_comes_back_equal(tmp_path: Path) -> None:
    full = dataclasses.replace(row(1), power_trace=((0.0, 90.5), (0.1, 680.0)), clocks_mhz=(1755.0, None), build={"registers": 168})
    with Journal(tmp_path, "run") as journal:
        assert not list(tmp_path.iterdir()), "the file appears with the first row"
        journal.append(full)
        assert journal.path is not None and "run-" in journal.path.name and str(os.getpid()) in journal.path.name
    assert read(tmp_path)[0] == [full]


def test_infinity_is_stored_as_null(tmp_path: Path) -> None:
    with Journal(tmp_path, "run") as journal:
        journal.append(dataclasses.replace(row(1), error=math.inf, environment={"load": math.nan, "x": [math.inf]}))
    rows, report = read(tmp_path)
    assert rows[0].error is None and rows[0].environment == {"load": None, "x": [None]} and not report.lines()


def _write_many(folder: Path, writer: int, count: int) -> None:
    with Journal(folder, "shared") as journal:
        for n in range(count):
            journal.append(row(writer * 1000 + n))


def test_many_writers_at_once(tmp_path: Path) -> None:
    spawn = multiprocessing.get_context("fork")
    writers = [spawn.Process(target=_write_many, args=(tmp_path, w, 25)) for w in range(6)]
    for process in writers:
        process.start()
    for process in writers:
        process.join()
    rows, report = read(tmp_path)
    assert len(list(tmp_path.iterdir())) == 6 and not report.lines()
    assert {r.run_id for r in rows} == {f"run-{w * 1000 + n}" for w in range(6) for n in range(25)}


def test_a_fork_writes_to_its_own_file(tmp_path: Path) -> None:
    with Journal(tmp_path, "run") as journal:
        journal.append(row(1))
        child = multiprocessing.get_context("fork").Process(target=journal.append, args=(row(2),))
        child.start()
        child.join()
        journal.append(row(3))
    assert len(list(tmp_path.iterdir())) == 2
    assert {r.run_id for r in read(tmp_path)[0]} == {"run-1", "run-2", "run-3"}


def test_two_writers_with_the_same_name_do_not_share_a_file(tmp_path: Path) -> None:
    with Journal(tmp_path, "run") as one, Journal(tmp_path, "run") as two:
        one.append(row(1))
        two.append(row(2))
        assert one.path != two.path


def test_kill_9_loses_at_most_the_line_being_written(tmp_path: Path) -> None:
    program = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "from test_store_journal import Journal, row\n"
        f"journal = Journal({str(tmp_path)!r}, 'victim')\n"
        "n = 0\n"
        "while True:\n"
        "    journal.append(row(n)); n += 1; print(n, flush=True)\n"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as victim:
        assert victim.stdout is not None
        for line in victim.stdout:
            if int(line) >= 20:
                break
        victim.send_signal(signal.SIGKILL)
        acknowledged = max([20, *(int(line) for line in victim.stdout if line.endswith("\n"))])
    rows, report = read(tmp_path)
    assert len(rows) >= acknowledged, "a row whose append returned is on disk"
    assert not report.skipped


@pytest.mark.parametrize("lost", [1, 2, 40])
def test_a_torn_last_line_is_left_out_and_reported(tmp_path: Path, lost: int) -> None:
    with Journal(tmp_path, "run") as journal:
        journal.append(row(1))
        journal.append(row(2))
    assert journal.path is not None
    os.truncate(journal.path, journal.path.stat().st_size - lost)
    rows, report = read(tmp_path)
    if lost == 1:  # only the newline: the row itself is whole
        assert len(rows) == 2 and not report.lines()
    else:
        assert [r.run_id for r in rows] == ["run-1"] and report.torn == [journal.path]
        assert "torn" in report.lines()[0] and str(journal.path) in report.lines()[0]


def test_a_disk_that_fills_up_keeps_what_was_stored(tmp_path: Path) -> None:
    """A limit on the file's size fails as a full disk does: the last write is cut short, the next one is refused."""
    program = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "import resource, signal\n"
        "from test_store_journal import Journal, row\n"
        "from klab.kernels.errors import CannotMeasure\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        f"journal = Journal({str(tmp_path)!r}, 'run')\n"
        "journal.append(row(0)); one = journal.path.stat().st_size\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (int(one * 3.5), resource.RLIM_INFINITY))\n"
        "for n in range(1, 9):\n"
        "    try: journal.append(row(n))\n"
        "    except CannotMeasure as error: print(n, error)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))\n"
        "journal.append(row(9))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    refused = done.stdout.splitlines()
    assert refused and "no space for results" in refused[0] and "--results" in refused[0] and " kept in " in refused[0]
    rows, report = read(tmp_path)
    assert not report.lines(), "the line that was cut short was taken back"
    stored = {r.run_id for r in rows}
    assert {"run-0", "run-1", "run-9"} <= stored and len(stored) == 10 - len(refused)


def test_a_line_that_cannot_be_taken_back_spoils_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = Journal(tmp_path, "run")
    journal.append(row(1))
    write = os.write

    def half(fd: int, data: bytes) -> int:
        if len(data) < 400:
            raise OSError(28, "No space left on device")
        return write(fd, data[:-300])

    def refuse(fd: int, size: int) -> None:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", half)
        patch.setattr(os, "ftruncate", refuse)
        with pytest.raises(CannotMeasure, match="no space"):
            journal.append(row(2))
    journal.append(row(3))
    rows, report = read(tmp_path)
    assert [r.run_id for r in rows] == ["run-1", "run-3"]
    assert [s.count for s in report.skipped.values()] == [1]


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    in_the_way = tmp_path / "file"
    in_the_way.write_text("")
    for attempt in (Journal(in_the_way, "run").ready, lambda: Journal(in_the_way / "deeper", "run").append(row(1))):
        with pytest.raises(CannotMeasure) as caught:
            attempt()
        assert "\n" not in str(caught.value) and str(in_the_way) in str(caught.value)

    def read_only(*args: object, **kwargs: object) -> int:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(os, "open", read_only)
    with pytest.raises(CannotMeasure, match=r"Read-only file system.*--results"):
        Journal(tmp_path, "run").append(row(1))
    with pytest.raises(CannotMeasure, match="Read-only file system"):
        Journal(tmp_path, "run").ready()


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes to read-only folders")
def test_a_read_only_folder(tmp_path: Path) -> None:
    tmp_path.chmod(0o555)
    with pytest.raises(CannotMeasure, match="cannot write results"):
        Journal(tmp_path, "run").ready()


def test_ready_leaves_nothing_behind_and_asks_for_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Journal(tmp_path / "new", "run").ready()
    assert list((tmp_path / "new").iterdir()) == []
    monkeypatch.setattr("klab.harness.store.journal.LEAST_FREE_BYTES", 1 << 62)
    with pytest.raises(CannotMeasure, match="no space for results"):
        Journal(tmp_path, "run").ready()


def test_a_file_deleted_under_its_writer_loses_nothing(tmp_path: Path) -> None:
    journal = Journal(tmp_path, "run")
    journal.append(row(1))
    assert journal.path is not None
    journal.path.unlink()
    journal.append(row(2))
    assert [r.run_id for r in read(tmp_path)[0]] == ["run-2"]


def test_run_ids_are_safe_as_file_names(tmp_path: Path) -> None:
    with Journal(tmp_path / "results", "../../evil run/\0id" + "x" * 300) as journal:
        journal.append(row(1))
    assert [p.parent for p in tmp_path.rglob("*.jsonl")] == [tmp_path / "results"]


def test_a_line_is_small_and_on_disk_at_once(tmp_path: Path) -> None:
    with Journal(tmp_path, "run") as journal:
        for n in range(50):
            journal.append(row(n))
            assert journal.path is not None
            lines = journal.path.read_text().splitlines()
            assert len(lines) == n + 1
    assert all(json.loads(line)["schema"] == 1 for line in lines)
