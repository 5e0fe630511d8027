"""The verb `klab evidence` around its parts: one at a time on a folder, ends in time, and what bad input and bad disks come to."""

from __future__ import annotations

import errno
import gzip
import json
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from contest import CPU
from made_evidence import stored, three_runs

from klab.harness.cli import evidence as verb
from klab.harness.measure import environment
from klab.harness.measure.calibration import Calibration, Figure, device_id, write_calibration
from klab.harness.store.read import ReadReport, iter_results
from klab.harness.tune import campaign, evidence
from klab.harness.tune.evidence import PARTS, Done, Evidence
from klab.harness.tune.evidence_folder import PACK_S, alone, pack_all, pack_s, tuner_folder
from klab.harness.tune.job import Outcome
from klab.kernels.discover import discover
from klab.kernels.errors import CannotMeasure

Klab = Callable[..., tuple[int | str, str, str]]
CATALOGUE = discover()


@pytest.fixture(autouse=True)
def _starts_now(monkeypatch: pytest.MonkeyPatch) -> None:
    """A budget counts from the start of the process, which here has run other tests before."""
    monkeypatch.setattr("klab.harness.cli._setup.START_S", time.monotonic())


def only(monkeypatch: pytest.MonkeyPatch, part: Callable[[Evidence], Done]) -> None:
    """Every part is this one."""
    for name in PARTS:
        monkeypatch.setitem(PARTS, name, part)


def test_a_part_that_does_not_end_is_interrupted_in_time_to_pack(klab: Klab, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked = []

    def hangs(sitting: Evidence) -> Done:
        asked.append(sitting)
        (timer,) = [one for one in threading.enumerate() if isinstance(one, threading.Timer) and one.function.__name__ == "_press"]
        assert 0 < timer.interval < 60.0
        timer.function()
        time.sleep(600)
        return Done("")

    only(monkeypatch, hangs)
    code, _, err = klab("evidence", "--chip", "cpu", "--out", tmp_path / "d", "--budget", "60s")
    assert code == 0 and len(asked) == 1 and "did not end by itself" in err and "not begun for want of time: correctness" in err


def test_ctrl_c_is_no_end_of_the_budget(klab: Klab, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def pressed(sitting: Evidence) -> Done:
        sitting.job.outcome = Outcome([next(iter(three_runs()))])
        raise KeyboardInterrupt

    only(monkeypatch, pressed)
    code, _, _ = klab("evidence", "--chip", "cpu", "--out", tmp_path / "d", "--budget", "60s")
    (part,) = json.loads((tmp_path / "d" / "sittings.json").read_text())[0]["parts"]
    assert code == 130 and (part["part"], part["left"], part["notes"]) == ("tests", 1, ["cut off"]), "as of a process that is killed"
    assert part["statuses"] == {"ok": 1} and part["seconds"] >= 0.0, "and what it came to"


def test_one_sitting_at_a_time(klab: Klab, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    only(monkeypatch, lambda sitting: Done(""))
    with alone(tmp_path / "d"):
        code, _, err = klab("evidence", "--chip", "cpu", "--out", tmp_path / "d")
        assert code == 4 and "another klab evidence is at work on" in err
    assert klab("evidence", "--chip", "cpu", "--out", tmp_path / "d")[0] == 0
    (tmp_path / "file").write_text("x")
    with pytest.raises(CannotMeasure, match="name another folder"), alone(tmp_path / "file"):
        pass


def test_a_file_system_without_locks_is_no_obstacle(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def none(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("klab.harness.tune.evidence_folder.fcntl.flock", none)
    with alone(tmp_path / "d"):
        assert (tmp_path / "d").is_dir()


def test_packing_on_a_full_disk_leaves_the_rows(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    folder = tmp_path / "d"
    folder.mkdir()

    def full(where: Path, say: object) -> None:
        (where / f".results.jsonl.gz.{os.getpid()}").write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("klab.harness.tune.evidence_folder.pack", full)
    with pytest.raises(CannotMeasure, match="No space left on device; they are safe"):
        pack_all(folder)
    assert list(folder.iterdir()) == []


def test_a_packed_file_that_is_damaged_is_kept_beside_the_new_one(klab: Klab, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    packed = stored(tmp_path / "d", three_runs()) / campaign.COMPACT_FILE
    told: list[str] = []
    assert pack_all(packed.parent, told.append) == packed and not told, "one that is whole is replaced"
    whole = packed.read_bytes()
    for n in (1, 2):
        packed.write_bytes(damaged := packed.read_bytes()[: -20 * n])
        pack_all(packed.parent, told.append)
        assert (tmp_path / "d" / f"results.jsonl.gz.damaged-{n}").read_bytes() == damaged, "nothing that was kept is overwritten"
        assert f"it is kept as results.jsonl.gz.damaged-{n}" in told[-1] and len(told) == n
    report = ReadReport()
    assert 0 < len(list(iter_results(packed.parent, report))) < len(three_runs()) and report.files == 1 and packed.read_bytes() != whole
    packed.write_bytes(packed.read_bytes()[:-10])
    only(monkeypatch, lambda sitting: Done(""))
    assert "damaged-3" in klab("evidence", "--chip", "cpu", "--out", packed.parent)[2]


def test_packing_takes_longer_with_more_rows(tmp_path: Path) -> None:
    folder = tmp_path / "d"
    assert pack_s(folder) == PACK_S
    for one in (folder, tuner_folder(folder)):
        one.mkdir()
        (one / campaign.COMPACT_FILE).write_bytes(os.urandom(1_000_000))
    (folder / "run.jsonl").write_bytes(b"x" * 1_000_000)
    (folder / "note.json").write_bytes(b"x" * 1_000_000)
    assert pack_s(folder) == pytest.approx(PACK_S + 2 * 1.3 + 0.3)
    assert gzip.compress(b"")  # the name of the packed file ends in what is counted
    assert campaign.COMPACT_FILE.endswith(".jsonl.gz")


def calibrated(name: str, **figures: Any) -> Calibration:
    return Calibration(name, "made", "cpu", "2026-11-22T10:00:00Z", "epoch", **figures)


def test_a_device_is_calibrated_once_and_only_where_it_fits(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    here, asked = device_id(environment.host()), []

    def calibrate(chip: Any, folder: Path, **how: Any) -> Any:
        asked.append(how["only_devices"])
        one = calibrated(here, launch_overhead_us=Figure(5.0, 4.0, 6.0), graph_overhead_us=Figure.missing("a CPU has no graphs"))
        yield one, write_calibration(one, folder)

    monkeypatch.setattr(evidence, "calibrate_devices", calibrate)

    def sitting(seconds: float) -> Done:
        (done,) = Evidence(CPU, tmp_path, CATALOGUE, deadline=time.monotonic() + seconds, parts=["calibration"]).run()
        return done

    short = sitting(30.0)
    assert short.left == 1 and not asked and "which are not left" in short.notes[0]
    first = sitting(1e6)
    assert first.statuses == {"calibrated": 1} and asked == [["cpu"]] and first.left == 0
    assert any("graph_overhead_us: a CPU has no graphs" in note for note in first.notes), "what could not be found is told"
    again = sitting(30.0)
    assert again.known == 1 and again.left == 0 and not again.statuses and asked == [["cpu"]]


def test_a_sitting_that_could_do_nothing_says_so_by_its_exit_code(klab: Klab, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def locked(sitting: Evidence) -> Done:
        raise CannotMeasure("cpu is being measured by process 1")

    only(monkeypatch, locked)
    code, _, err = klab("evidence", "--chip", "cpu", "--out", tmp_path / "d")
    assert code == 4 and "repeat: nothing new in 0 s; 1 not reached" in err and "measured by process 1" in err
    monkeypatch.setitem(PARTS, "comparison", lambda sitting: Done("", known=3))
    assert klab("evidence", "--chip", "cpu", "--out", tmp_path / "d")[0] == 0, "the others are told, and the next sitting goes on"
    assert klab("evidence", "--chip", "cpu", "--out", tmp_path / "d", "--part", "energy_rest")[0] == 4


@pytest.mark.parametrize(
    "wrong",
    [("--part", "flops"), ("--model", "no-such-model"), ("--chip", "no-such-chip"), ("--budget", "soon"), ("--budget", "-3s")],
    ids=lambda words: words[1],
)
def test_nonsense_is_a_usage_error_and_makes_no_folder(wrong: tuple[str, str], klab: Klab, tmp_path: Path) -> None:
    given = dict(zip(("--chip", "--out"), ("cpu", str(tmp_path / "d")), strict=True)) | dict([wrong])
    code, _, err = klab("evidence", *(word for pair in given.items() for word in pair))
    assert code == 2 and wrong[1] in err and not (tmp_path / "d").exists()


def test_a_chip_that_is_not_here_and_a_folder_that_is_a_file(klab: Klab, tmp_path: Path) -> None:
    assert klab("evidence", "--chip", "h200", "--out", tmp_path / "d")[0] == 4
    (tmp_path / "file").write_text("x")
    code, _, err = klab("evidence", "--chip", "cpu", "--out", tmp_path / "file")
    assert code == 4 and "name another folder" in err and (tmp_path / "file").read_text() == "x"
    code, _, err = klab("evidence", "--chip", "cpu", "--out", tmp_path / "none", "--finish")
    assert code == 2 and "none" in err
    code, _, err = klab("evidence", "--chip", "cpu", "--out", tmp_path / "none", "--finish", "--part", "tests")
    assert code == 2 and "leave out --budget and --part" in err


def test_the_end_of_the_budget_is_heard_where_ctrl_c_is_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    """So a shell without job control starts what runs in the background."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        overdue = verb._Overdue(time.monotonic() + 500.0, time.monotonic() + 600.0)
        with pytest.raises(KeyboardInterrupt), overdue:
            os.kill(os.getpid(), signal.SIGINT)  # Ctrl-C itself is ignored as before
            assert not overdue.came
            overdue._press()
            time.sleep(600)
        assert overdue.came and signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_budget_that_is_over_at_the_start_is_no_failure(klab: Klab, tmp_path: Path) -> None:
    code, _, err = klab("evidence", "--chip", "cpu", "--out", tmp_path / "d", "--budget", "1s")
    assert code == 0 and "not begun for want of time: tests, correctness" in err
