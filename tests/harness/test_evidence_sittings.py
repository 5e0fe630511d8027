"""A sitting of `klab evidence`: its parts in order and in their share of the time, going on, and what is damaged."""

from __future__ import annotations

import itertools
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from contest import CPU
from fake_fleet import EPOCH_FACTS, FakeFleet

from klab.harness.fleet import local
from klab.harness.measure.lock import exclusive
from klab.harness.store.read import iter_results
from klab.harness.store.result import Status
from klab.harness.tune import evidence
from klab.harness.tune import job as jobs
from klab.harness.tune.allowance import FINAL_S, Allowance
from klab.harness.tune.device_tests import DeviceTests, Ended
from klab.harness.tune.evidence import PARTS, SHARES, Done, Evidence, read_sittings
from klab.harness.tune.evidence_folder import tuner_folder
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


def no_tests(limit_s: float | None, done: Any, last: Any, *, save: Any, visible: str) -> DeviceTests:
    save(found := DeviceTests({"tests/a.py::x": Ended("passed"), "tests/a.py::y": Ended("passed")}))
    return found


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


def test_a_share_that_leaves_scraps_takes_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fleet: FakeFleet) -> None:
    given: list[float] = []

    def part(made_of: Evidence) -> Done:
        given.append(made_of.left_s())
        return Done("")

    monkeypatch.setitem(PARTS, "comparison", part)
    list(sitting(tmp_path, "comparison", "energy_rest", seconds=45.0).run())
    list(sitting(tmp_path, "comparison", "energy_rest", seconds=60.0).run())
    assert 32.0 < given[0] <= 45.0, "13.5 s for all others are scraps"
    assert given[1] <= 42.0


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


def test_repeats_end_with_enough_sittings_and_begin_with_the_rarest(
    tmp_path: Path, fleet: FakeFleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    count_of = itertools.count()  # runs in one second are ordered by their names
    monkeypatch.setattr(jobs, "new_run_id", lambda: f"run-{next(count_of)}")
    list(sitting(tmp_path, "comparison").run())
    # What is repeated looks slower than what is not.
    monkeypatch.setattr(fleet, "outcome", lambda trial: 10.0 * time_of(trial))
    (whole,) = sitting(tmp_path, "repeat").run()
    count = whole.statuses["ok"]
    before = [trial.key for trial in fleet.asked[-1]]
    # A third that ends after its first trial, and a fourth that goes on with the others.
    asked = len(fleet.asked)
    third = sitting(tmp_path, "repeat")
    monkeypatch.setattr(third, "measured", lambda trials: Evidence.measured(third, trials[:1]))
    list(third.run())
    assert len(fleet.asked) == asked + 1 and fleet.asked[-1][0].key in before
    (fourth,) = sitting(tmp_path, "repeat").run()
    assert fourth.statuses["ok"] == count - 1 and fourth.known == 1
    assert {trial.key for run in fleet.asked[-2:] for trial in run} == set(before), "others are faster by the newest times"
    (fifth,) = sitting(tmp_path, "repeat").run()
    assert not fifth.statuses and fifth.known == count and fifth.left == 0, "three sittings have all of them"


def test_a_space_whose_candidates_all_fail_leaves_the_others(tmp_path: Path, fleet: FakeFleet, monkeypatch: pytest.MonkeyPatch) -> None:
    other = Matmul(2, 64, 64, "float32")
    monkeypatch.setattr(evidence, "spaces", lambda chip: [SpaceOf(other), SpaceOf(SMALL)])
    fleet.outcome = lambda trial: Status.CRASHED if trial.problem == other else time_of(trial)
    (done,) = sitting(tmp_path, "spaces").run()
    assert done.left == 1 and done.notes[0].startswith("failed: ") and "every candidate failed" in done.notes[0] and "best" in done.notes[1]


def test_device_tests_that_ended_are_not_run_again(tmp_path: Path, fleet: FakeFleet) -> None:
    asked: list[Any] = []

    def tests(limit_s: float | None, done: Any, last: Any, *, save: Any, visible: str) -> DeviceTests:
        asked.append((limit_s, list(done), list(last)))
        found = DeviceTests(
            {f"tests/a.py::{len(asked)}": Ended("passed"), "tests/a.py::t": Ended("failed", 1.0, "E   AssertionError: off")},
            3 - len(asked),
            "stopped" if len(asked) < 3 else "",
        )
        save(found)
        return found

    (first,) = sitting(tmp_path, "tests", tests=tests).run()
    assert first.left == 2 and first.notes == ("stopped", "failed: t: failed: AssertionError: off")
    assert first.statuses == {"failed": 1, "passed": 1}
    (second,) = sitting(tmp_path, "tests", tests=tests, seconds=50.0).run()
    assert asked[0] == (None, [], []) and asked[1][1:] == (["tests/a.py::1"], ["tests/a.py::t"]) and asked[1][0] <= 50.0
    (third,) = sitting(tmp_path, "tests", tests=tests).run()
    assert second.left == 1 and third.left == 0 and len(asked) == 3
    (fourth,) = sitting(tmp_path, "tests", tests=tests).run()
    assert len(asked) == 3 and fourth.known == 4 and fourth.notes == first.notes[1:], "nothing is run, and the failure is still told"


def test_device_tests_have_the_device_for_themselves(tmp_path: Path, fleet: FakeFleet) -> None:
    """Another klab would disturb them, and be disturbed."""
    seen: list[str] = []

    def tests(limit_s: float | None, done: Any, last: Any, *, save: Any, visible: str) -> DeviceTests:
        with pytest.raises(CannotMeasure, match="cpu is being measured by"), exclusive("cpu"):
            pass
        seen.append(visible)
        return no_tests(limit_s, done, last, save=save, visible=visible)

    with exclusive("cpu"):
        (locked,) = sitting(tmp_path, "tests", tests=tests).run()
    assert locked.failed and locked.left == 1 and "cpu is being measured by" in locked.notes[0] and not seen
    (done,) = sitting(tmp_path, "tests", tests=tests).run()
    assert not done.failed and done.left == 0 and seen == [""]
    with exclusive("cpu"):
        assert next(sitting(tmp_path, "tests", tests=tests).run()).known == 2, "with nothing to run, nobody waits for the device"


def test_the_final_of_a_recorded_space_takes_no_more_than_a_final_does(
    tmp_path: Path, fleet: FakeFleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the share of the spaces has much more left, or no end."""
    fleet.outcome = lambda trial: 1000.0 - time_of(trial)  # another than the default is the best, which makes a final
    limits: list[float] = []
    live = Allowance.final_s
    monkeypatch.setattr(Allowance, "final_s", lambda self, *given: limits.append(live(self, *given)) or limits[-1])
    for seconds in (None, 4000.0):
        (done,) = sitting(tmp_path / str(seconds), "spaces", seconds=seconds).run()
        assert done.left == 0
    assert limits == [FINAL_S, FINAL_S]


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


def test_the_spaces_of_both_kinds_of_chip_have_candidates() -> None:
    from klab.harness.catalog import find_chip

    for chip in (CPU, find_chip("h200")):
        listed = spaces(chip)
        assert listed and len({one.problem.key for one in listed}) == len(listed)
        for one in listed:
            able = [k for k in CATALOGUE.of(one.problem.operator) if not k.library and chip.kind in k.kinds]
            assert able, one.problem.label()
