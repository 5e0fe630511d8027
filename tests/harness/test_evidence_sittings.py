"""A sitting of `klab evidence`: its parts in order and in their share of the time, going on, and what is damaged."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from contest import CPU
from fake_fleet import EPOCH_FACTS, FakeFleet

from klab.harness.fleet import local
from klab.harness.store.read import iter_results
from klab.harness.store.result import Status
from klab.harness.tune import device_tests, evidence
from klab.harness.tune import job as jobs
from klab.harness.tune.device_tests import NAMED, DeviceTests, outcome, run_device_tests
from klab.harness.tune.evidence import PARTS, SHARES, Done, Evidence, read_sittings, tuner_folder
from klab.harness.tune.evidence_problems import SpaceOf, spaces
from klab.kernels.discover import discover
from klab.kernels.errors import CannotMeasure, UsageError
from klab.kernels.matmul.problem import Matmul

CATALOGUE = discover()
SMALL = Matmul(1, 64, 64, "float32")


def time_of(trial: Any) -> float:
    """By the configuration, never twice the same; libraries take 500 us."""
    return 500.0 if "torch" in trial.kernel else 100.0 + int(trial.config.key[:6], 16) % 400


@pytest.fixture
def fleet(monkeypatch: pytest.MonkeyPatch) -> FakeFleet:
    made = FakeFleet(time_of)
    for module in (jobs, local):
        monkeypatch.setattr(module, "Fleet", made)
    worker = SimpleNamespace(start=lambda: None, kill=lambda: None, environment=EPOCH_FACTS)
    monkeypatch.setattr(jobs, "WorkerClient", lambda *_, **__: worker)
    monkeypatch.setattr(evidence, "spaces", lambda chip: [SpaceOf(SMALL)])
    return made


def no_tests(limit_s: float | None, passed: Any) -> DeviceTests:
    return DeviceTests({"passed": 2}, passed=("tests/a.py::x", "tests/a.py::y"))


def sitting(folder: Path, *parts: str, seconds: float | None = None, tests: Any = no_tests) -> Evidence:
    deadline = None if seconds is None else time.monotonic() + seconds
    return Evidence(CPU, folder, CATALOGUE, deadline=deadline, parts=parts, tests=tests, models=("qwen3-0.6b",))


def test_parts_come_in_their_order_each_within_its_share(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fleet: FakeFleet) -> None:
    given: dict[str, float] = {}

    def part(made_of: Evidence) -> Done:
        given[list(PARTS)[len(given)]] = made_of.left_s()
        assert made_of.job.deadline == made_of.deadline
        return Done("")

    for name in PARTS:
        monkeypatch.setitem(PARTS, name, part)
    done = list(sitting(tmp_path, seconds=1000.0).run())
    assert [one.part for one in done] == list(PARTS) == list(given)
    for name, seconds in given.items():
        assert seconds == pytest.approx(1000.0 * SHARES.get(name, 1.0), abs=5.0), "no part spends anything here"
    given.clear()
    alone = sitting(tmp_path, "tests", seconds=1000.0)
    assert [one.part for one in alone.run()] == ["tests"] and given["tests"] > 990, "the last that was asked for has all"


def test_no_share_starves_what_follows() -> None:
    left = 1.0
    for name in PARTS:
        assert left > 0.01, f"{name} gets nothing when all before it take their whole share"
        left *= 1.0 - SHARES.get(name, 0.0)


def test_a_part_that_cannot_be_done_leaves_the_others(tmp_path: Path, fleet: FakeFleet) -> None:
    first, second = sitting(tmp_path, "energy", "spaces").run()
    assert first.notes == ("klab reads no power sensor of a CPU",) and second.part == "spaces" and second.left == 0
    assert [done["part"] for done in read_sittings(tmp_path)[0]["parts"]] == ["energy", "spaces"]


def test_nothing_is_begun_without_time(tmp_path: Path, fleet: FakeFleet) -> None:
    assert list(sitting(tmp_path, seconds=2.0).run()) == [] and fleet.asked == []
    assert read_sittings(tmp_path)[0]["parts"] == []


def test_a_later_sitting_goes_on(tmp_path: Path, fleet: FakeFleet) -> None:
    folder = tmp_path / "chip"
    first = sitting(folder, "spaces", "tuner")
    (whole, tuned) = first.run()
    assert whole.statuses["ok"] >= 3 and whole.left == tuned.left == 0 and tuner_folder(folder).is_dir()
    measured = len(list(iter_results([folder])))
    asked = len(fleet.asked)
    second = sitting(folder, "spaces", "tuner")
    again = list(second.run())
    assert all(one.left == 0 and not one.statuses for one in again)
    assert len(list(iter_results([folder]))) == measured and len(fleet.asked) == asked, "a complete space asks the device for nothing"
    noted = read_sittings(folder)
    assert [one["run_id"] for one in noted] == [first.job.run_id, second.job.run_id]
    assert noted[0]["environment"]["device"] == "made", "also where a part only searched"


def test_the_tuner_waits_for_a_recorded_space(tmp_path: Path, fleet: FakeFleet) -> None:
    folder = tmp_path / "chip"
    (none,) = sitting(folder, "tuner").run()
    assert none.left == 1 and "no space is recorded yet" in none.notes[0] and not fleet.asked and not tuner_folder(folder).exists()
    list(sitting(folder, "spaces").run())
    (journal,) = (folder / "tune").glob("*.search")
    whole = journal.read_text()
    journal.write_text("\n".join(whole.split("\n")[:-2]) + "\n")
    (short,) = sitting(folder, "tuner").run()
    assert short.left == 1, "one candidate has no outcome"
    journal.write_text(whole)
    (done,) = sitting(folder, "tuner").run()
    assert done.left == 0 and len(done.notes) == 1 and list((tuner_folder(folder) / "tune").glob("*.search"))


def test_repeats_are_of_this_sitting_and_once(tmp_path: Path, fleet: FakeFleet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evidence, "REPEATED", 2)
    first = sitting(tmp_path, "comparison", "repeat")
    _, repeated = first.run()
    assert repeated.statuses == {}, "what this sitting measured is not measured again"
    second = sitting(tmp_path, "repeat")
    (done,) = second.run()
    heavy = {problem.key for problem in second.heaviest()[:2]}
    rows = [row for row in iter_results([tmp_path]) if row.run_id == second.job.run_id]
    assert done.statuses == {"ok": len(rows)} and {row.problem_key for row in rows} == heavy
    for key in heavy:
        group = [row for row in rows if row.problem_key == key]
        everybody = [row for row in iter_results([tmp_path]) if row.problem_key == key and row.run_id == first.job.run_id]
        fastest = min(row.median_us for row in everybody if row.median_us)
        assert min(row.median_us for row in group if row.median_us) == fastest and any(row.library for row in group) and len(group) <= 3


def test_a_space_whose_candidates_all_fail_leaves_the_others(tmp_path: Path, fleet: FakeFleet, monkeypatch: pytest.MonkeyPatch) -> None:
    other = Matmul(2, 64, 64, "float32")
    monkeypatch.setattr(evidence, "spaces", lambda chip: [SpaceOf(other), SpaceOf(SMALL)])
    fleet.outcome = lambda trial: Status.CRASHED if trial.problem == other else time_of(trial)
    (done,) = sitting(tmp_path, "spaces").run()
    assert done.left == 1 and "every candidate failed" in done.notes[0] and "best" in done.notes[1]


def test_device_tests_that_passed_are_not_run_again(tmp_path: Path, fleet: FakeFleet) -> None:
    asked: list[Any] = []

    def tests(limit_s: float | None, passed: Any) -> DeviceTests:
        asked.append((limit_s, list(passed)))
        return DeviceTests({"passed": 1, "failed": 1}, ("t[<x>]",), "stopped after 9 s", (f"tests/a.py::{len(asked)}",))

    (first,) = sitting(tmp_path, "tests", tests=tests).run()
    assert first.left == 1 and first.notes == ("stopped after 9 s", "failed: t[<x>]")
    (second,) = sitting(tmp_path, "tests", tests=tests, seconds=50.0).run()
    assert second.known == 1 and asked[0] == (None, []) and asked[1][1] == ["tests/a.py::1"] and asked[1][0] <= 50.0
    kept = tmp_path / "device_tests.json"
    assert json.loads(kept.read_text())["passed"] == ["tests/a.py::1", "tests/a.py::2"]
    kept.write_text(kept.read_text().replace('"code": "', '"code": "other'))
    list(sitting(tmp_path, "tests", tests=tests).run())
    kept.write_text("{torn")
    list(sitting(tmp_path, "tests", tests=tests).run())
    assert asked[2][1] == asked[3][1] == [], "other code, and a damaged file"


@pytest.mark.parametrize("text", ["{", '"x"', "[1]", "{}"])
def test_a_damaged_note_of_sittings_is_left_as_it_is(text: str, tmp_path: Path, fleet: FakeFleet) -> None:
    (tmp_path / "sittings.json").write_text(text)
    with pytest.raises(UsageError, match="move it away, the rows are safe"):
        list(sitting(tmp_path, "tests").run())
    assert (tmp_path / "sittings.json").read_text() == text and read_sittings(tmp_path / "none") == []


def test_unknown_parts_and_models(tmp_path: Path, fleet: FakeFleet) -> None:
    with pytest.raises(UsageError, match="unknown part flops; there are tests, correctness"):
        sitting(tmp_path, "tests", "flops")
    with pytest.raises(UsageError, match="no-such-model"):
        Evidence(CPU, tmp_path, CATALOGUE, models=("no-such-model",))


def test_outcome_of_one_process_and_of_many() -> None:
    text = """
tests/kernels/test_on_device.py::test_x[matmul/a b-16] PASSED            [ 10%]
[gw1] [ 20%] FAILED tests/kernels/test_on_device.py::test_x[cuda-1]
[gw0] [ 30%] PASSED tests/kernels/test_on_device.py::test_y
[gw0] SKIPPED tests/kernels/test_on_device.py::test_z
tests/kernels/test_on_device.py::test_w ERROR
FAILED tests/kernels/test_on_device.py::test_x[cuda-1] - AssertionError
3 failed, 2 passed in 3 s
"""
    found = outcome(text, "stopped")
    assert found.counts == {"error": 1, "failed": 1, "passed": 2, "skipped": 1} and found.stopped == "stopped"
    assert found.failed == ("test_x[cuda-1]", "test_w")
    assert found.passed == ("tests/kernels/test_on_device.py::test_x[matmul/a b-16]", "tests/kernels/test_on_device.py::test_y")
    many = outcome("\n".join(f"tests/a.py::t{n} FAILED" for n in range(NAMED + 5)))
    assert len(many.failed) == NAMED and many.counts == {"failed": NAMED + 5} and outcome("") == DeviceTests()


def test_a_run_of_made_device_tests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "tests" / "kernels"
    folder.mkdir(parents=True)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu: a device\n")
    (folder / "test_it.py").write_text(
        "import pytest, time\n@pytest.mark.gpu\n@pytest.mark.parametrize('n', ['a b', 'c'])\ndef test_x(n):\n    assert n != 'c'\n"
        "def test_other():\n    assert False\n"
    )
    monkeypatch.setattr(device_tests, "checkout", lambda: tmp_path)
    monkeypatch.setattr(device_tests.os, "sched_getaffinity", lambda pid: {0, 1})  # one process
    found = run_device_tests(60.0)
    assert found.counts == {"failed": 1, "passed": 1} and found.failed == ("test_x[c]",) and not found.stopped
    rest = run_device_tests(60.0, found.passed)
    assert rest.counts == {"failed": 1} and rest.passed == ()


def test_device_tests_that_are_not_here_or_cannot_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_tests, "checkout", lambda: None)
    with pytest.raises(CannotMeasure, match="not of an installed klab"):
        run_device_tests(1.0)
    (tmp_path / "tests").mkdir()
    monkeypatch.setattr(device_tests, "checkout", lambda: tmp_path)
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(CannotMeasure, match="the tests did not run: exit code 1"):
        run_device_tests(10.0)


def test_the_spaces_of_both_kinds_of_chip_have_candidates() -> None:
    from klab.harness.catalog import find_chip

    for chip in (CPU, find_chip("h200")):
        listed = spaces(chip)
        assert listed and len({one.problem.key for one in listed}) == len(listed)
        for one in listed:
            able = [k for k in CATALOGUE.of(one.problem.operator) if not k.library and chip.kind in k.kinds]
            assert able, one.problem.label()
