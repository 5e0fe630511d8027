"""What is made of recorded evidence: gaps, repeats, time to best, coverage. By computations of the test's own."""

from __future__ import annotations

import dataclasses
import statistics
from typing import Any

import pytest
from made_evidence import SPACE, journal, part, three_runs, timed, to_best

from klab.harness.choose.evidence_repeats import repeats
from klab.harness.report.evidence_coverage import BEGUN, COMPLETE, IMPOSSIBLE, NAMED, NEVER, coverage
from klab.harness.report.evidence_failures import Failures
from klab.harness.report.evidence_gaps import LOSES, TIES, WINS, again, gaps, standings
from klab.harness.report.evidence_readme_device import failures_text
from klab.harness.report.evidence_readme_search import repeat_text
from klab.harness.report.evidence_search import WITHIN, ToBest
from klab.harness.report.evidence_sittings import seats, sound
from klab.harness.report.figures.search_journals import Recorded
from klab.harness.report.limits import limits_of
from klab.harness.store.result import Result
from klab.harness.tune.device_tests_kept import Failed, Tally
from klab.harness.tune.evidence import CUT_OFF, PARTS
from klab.harness.tune.strategy import Evaluation
from klab.kernels.matmul.problem import Matmul


def test_the_tuners_seconds_and_its_regret() -> None:
    found = to_best([journal([(0, 0.0), (2, 1.0), (6, 2.0), (7, 4.0)], "gaussian")])
    assert found.recorded == found.space == 8 and found.complete and found.exhaustive_s == 4.0
    assert found.best_us == pytest.approx(60.0) and "40" not in found.best, "a library is no candidate of the search"
    pace = found.tuner
    assert pace.evaluations == 4 and pace.seconds == 7.0
    assert pace.regret.ratio == pytest.approx(61 / 60, rel=1e-6) and pace.regret.low <= pace.regret.ratio <= pace.regret.high
    assert pace.within == {1.05: 3.0, 1.01: float("inf")}
    assert found.replayed.evaluations <= 4 and found.replayed.regret.ratio >= 1.0


def test_a_final_decides_what_the_tuner_chose() -> None:
    final = {"kernel": "matmul/triton_tiled", "config": {"tile": 5}, "took_s": 9.0}
    pace = to_best([journal([(6, 2.0), (5, 1.0)], "gaussian", final)]).tuner
    assert pace.regret.ratio == 1.0 and pace.final_s == 9.0 and pace.within == {1.05: 2.0, 1.01: 3.0}


def test_a_space_that_is_not_complete_and_a_search_that_is_not_there() -> None:
    found = to_best([], journal([(0, 1.0)], "exhaustive"))
    assert not found.complete and (found.recorded, found.space) == (1, 8) and found.tuner is None and found.replayed is not None
    foreign = dataclasses.replace(journal([], "gaussian"), journal=Recorded({"strategy": "gaussian"}, (Evaluation(0, 5.0, spent_s=1.0),)))
    noted = to_best([foreign])
    assert noted.tuner.regret is None and noted.tuner.within == dict.fromkeys(WITHIN, float("inf")) and "left out" in noted.notes[0]


def test_repeatability_over_three_runs() -> None:
    found = repeats(three_runs())
    assert found.runs == ("run-1", "run-2", "run-3") and found.devices == ("GPU-a", "GPU-b")
    kernel, library = found.times
    assert kernel.kernel == "matmul/triton_tiled" and kernel.spread == pytest.approx(0.06 / 1.02, rel=1e-4)
    assert kernel.on_one_device == pytest.approx(0.02 / 1.01, rel=1e-4) and library.spread == pytest.approx(0.0, abs=1e-9)
    (energy,) = found.energies
    assert energy.spread == pytest.approx(0.002 / 0.051)
    (problem,) = found.problems
    assert problem.stable and problem.same_winner and problem.candidates == 2


def test_winners_that_change_are_told() -> None:
    rows = [timed(k, us, run_id=run) for run, a, b in (("r1", 50.0, 60.0), ("r2", 60.0, 50.0)) for k, us in (("torch", a), ("cuda_x", b))]
    (problem,) = repeats(rows).problems
    assert not problem.stable and not problem.same_winner
    assert repeats(rows[:2]).problems == () and repeats([]).times == ()
    half = [*rows[:2], rows[2]]
    assert repeats(half).problems == (), "one candidate alone shows no winner"


def test_a_run_of_other_kernels_hides_no_winner() -> None:
    rows = [*three_runs(), timed("cuda_new", 55.0, run_id="run-4"), timed("triton_new", 56.0, run_id="run-4")]
    (problem,) = repeats(rows).problems
    assert problem.candidates == 2 and set(problem.ties) == {"run-1", "run-2", "run-3"} and problem.stable
    more = [*rows, timed("cuda_new", 55.5, run_id="run-5"), timed("triton_new", 57.0, run_id="run-5")]
    assert set(repeats(more).problems[0].ties) == {"run-1", "run-2", "run-3"}, "the most runs count"


def test_gaps_of_one_sitting_beside_those_of_another() -> None:
    other = Matmul(512, 2048, 1024)
    rows = [timed(k, us, run_id=run) for run, own in (("r1", 50.0), ("r2", 49.0)) for k, us in (("triton_a", own), ("torch", 100.0))]
    rows += [
        timed(k, us, other, run_id=run) for run, own in (("r1", 90.0), ("r2", 110.0)) for k, us in (("triton_a", own), ("torch", 100.0))
    ]
    turned, steady = again([*rows, timed("triton_a", 1.0, Matmul(64, 64, 64))], limits_of("h200", ""))
    assert turned.problem == other.label() and turned.contradicts and turned.apart
    assert turned.spread == pytest.approx((100 / 90 - 100 / 110) / statistics.median([100 / 90, 100 / 110]), rel=1e-3)
    assert steady.problem == SPACE.label() and not steady.contradicts and steady.apart
    text = repeat_text(repeats(rows), [turned, steady])
    assert "on 2 the sittings' intervals have nothing in common" in text and "The verdict turned around on 1." in text
    assert f"Turned around: {other.label()}" in text


def test_gaps_by_verdict() -> None:
    other, third = Matmul(512, 2048, 1024), Matmul(64, 2048, 1024)
    rows = [timed("triton_a", 50.0), timed("torch", 100.0), timed("triton_a", 100.0, other), timed("torch", 50.0, other)]
    rows += [timed("triton_a", 50.0, third), timed("torch", 50.0, third)]
    found = {gap.problem: gap for gap in gaps(rows, limits_of("h200", ""))}
    assert {g.verdict for g in found.values()} == {WINS, LOSES, TIES}
    one = found[SPACE.label()]
    assert one.verdict == WINS and one.over is not None and one.over.ratio == pytest.approx(2.0)
    bound_us = max(SPACE.flops() / 989e12, SPACE.bytes_moved() / 4.8e12) * 1e6
    assert (
        one.share is not None and one.share[0] == pytest.approx(bound_us / 50.0, rel=0.01) and one.share[1] <= one.share[0] <= one.share[2]
    )
    (standing,) = standings(found.values())
    assert (standing.compared, standing.wins, standing.loses, standing.ties) == (3, 1, 1, 1)
    assert standing.mean[0] == pytest.approx(1.0, rel=1e-3)
    (alone,) = gaps([timed("triton_a", 50.0)], limits_of("h200", ""))
    assert alone.over is None and alone.verdict == ""


def test_coverage_by_part() -> None:
    sittings = [
        {"parts": [part("tests", passed=5), part("correctness", 9, ok=3), part("energy", notes=["klab reads no power sensor"])]},
        {"parts": [part("correctness", ok=9), part("spaces", 2), {"part": "of another klab"}, "no part"]},
        {},
    ]
    reached = [to_best([journal([(0, 1.0)], "gaussian")]), to_best([], journal([(0, 1.0)], "exhaustive"))]
    tests = Tally({"passed": 5}, complete=True)
    found = {one.part: one for one in coverage(sittings, three_runs(), reached, repeats(three_runs()), [SPACE.key], (), tests)}
    assert list(found) == list(PARTS)
    assert {name: one.state for name, one in found.items()} == {
        "tests": COMPLETE, "correctness": COMPLETE, "calibration": NEVER, "comparison": NEVER, "energy": IMPOSSIBLE, "spaces": BEGUN,
        "tuner": BEGUN, "repeat": NEVER, "energy_rest": NEVER,
    }  # fmt: skip
    assert found["correctness"].seconds == 4.0 and found["spaces"].missing == found["tuner"].missing == SPACE.label()
    assert "1 of the models' 1 problems timed, 1 beside a library" in found["comparison"].holds
    assert "1 of 2 complete, 9 candidates" in found["spaces"].holds and "1 of 2 problems searched" in found["tuner"].holds
    none = {one.part: one.state for one in coverage([], [], [ToBest("x", 0, None)], repeats([]), [])}
    assert set(none.values()) == {NEVER}
    skipped = coverage([{"parts": [part("tests", skipped=9)]}], [], [], repeats([]), [], (), Tally({"skipped": 9}))[0]
    assert skipped.state == IMPOSSIBLE and "no GPU" in skipped.missing


def test_a_part_is_complete_by_its_rows_and_not_by_what_a_sitting_said() -> None:
    """A sitting for fewer models, on another device, or with nothing left to repeat leaves none of its part."""
    sittings = [{"parts": [part("calibration", calibrated=1), part("comparison", ok=9), part("repeat")]}] * 3
    rows = three_runs()

    def told(some: list[Result], wanted: list[str], *calibrated: str) -> dict[str, tuple[str, str]]:
        found = coverage(sittings, some, [], repeats(some), wanted, calibrated)
        return {one.part: (one.state, one.missing) for one in found}

    whole = told(rows, [SPACE.key], "GPU-a", "GPU-b")
    assert {whole[name] for name in ("calibration", "comparison", "repeat")} == {(COMPLETE, "")}
    less = told(rows[:4], [SPACE.key, "another"], "GPU-b", "GPU-z")
    assert less["calibration"] == (BEGUN, "not calibrated: GPU-a")
    assert less["comparison"] == (BEGUN, "1 of the models' problems have no row")
    assert less["repeat"] == (BEGUN, "0 of 2 problems have a trial with times of 3 sittings")
    held = {one.part: one.holds for one in coverage(sittings, rows, [], repeats(rows), [SPACE.key], ("GPU-a", "GPU-b"))}
    assert held["calibration"] == "2 devices calibrated" and "1 problems in 3" in held["repeat"]


def test_device_tests_are_told_by_what_is_kept_of_each() -> None:
    def told(tests: Tally, *entries: dict[str, Any]) -> tuple[str, str, str]:
        one = coverage([{"parts": [entry]} for entry in entries], [], [], repeats([]), [], (), tests)[0]
        return one.state, one.holds, one.missing

    wrong = tuple(Failed(f"test_{n}", "failed", "off by 2") for n in range(NAMED + 2))
    twice = [part("tests", failed=1, notes=["failed: test_0: failed: off by 2"])] * 2
    assert told(Tally({"failed": 1}, wrong[:1], complete=True), *twice) == (COMPLETE, "1 failed", "test_0: failed: off by 2")
    assert told(Tally({"failed": 5}, wrong, complete=True), *twice)[2].endswith("test_2: failed: off by 2 and 2 more")
    assert told(Tally({"failed": 1}, wrong[:1], again=1), *twice) == (BEGUN, "1 failed", "1 to be run once more; test_0: failed: off by 2")
    changed = told(Tally({"passed": 3}, earlier=2), *twice)
    assert changed == (BEGUN, "3 passed; 2 with earlier code", "the code has changed since")
    cut = part("tests", 7, ["stopped at the end of its share of the time", "failed: test_0: failed: off by 2"], failed=1)
    assert told(Tally({"failed": 1}, wrong[:1]), cut)[2] == (
        "7 not reached in the newest sitting (stopped at the end of its share of the time); test_0: failed: off by 2"
    )
    assert told(Tally(), {**part("tests", 1, ["cpu is being measured by 5"]), "failed": True}) == (
        BEGUN, "none with the present code", "the newest sitting ended it with an error: cpu is being measured by 5",
    )  # fmt: skip
    assert told(Tally(), part("tests"))[::2] == (IMPOSSIBLE, "no test ran") and told(Tally())[::2] == (NEVER, "all of it")
    text = failures_text(Failures(0, (), (), ()), wrong)
    assert "| test_4 | failed | off by 2 |" in text and "device_tests.json" in text
    assert "Device tests" not in failures_text(Failures(0, (), (), ()))


@pytest.mark.parametrize("name", ["correctness", "comparison", "energy", "spaces", "tuner", "repeat"])
def test_why_a_part_did_not_end_is_told(name: str) -> None:
    reached = [ToBest(SPACE.label(), 0, None)]

    def told(last: dict[str, Any]) -> str:
        parts = [part(name, ok=5), last]
        one = next(o for o in coverage([{"parts": [p]} for p in parts], [], reached, repeats([]), []) if o.part == name)
        assert one.state != COMPLETE
        return one.missing

    assert "an error: the disk is full" in told({**part(name, 1, ["x: 3 of 9", "the disk is full"]), "failed": True})
    assert "was cut off in it" in told(part(name, 1, [CUT_OFF])), "also by the clock of the command"
    if name in ("spaces", "tuner"):
        missing = told(part(name, 1, ["failed: matmul: every candidate failed", "x: 3 of 9"]))
        assert "failed: matmul: every candidate failed" in missing and "3 of 9" not in missing
    else:
        assert told(part(name, 4)) == "4 not reached in the newest sitting"


def test_parts_that_somebody_wrote_wrongly_are_left_out() -> None:
    odd = [
        5,
        {"part": "tests", "statuses": [1]},
        {"part": "tests", "seconds": "x"},
        {"part": "tests", "notes": 1},
        {"part": "tests", "left": "y"},
    ]
    odd += [{"part": "tests", "statuses": {"ok": None}}, {"part": "tests", "seconds": float("nan")}]
    made = sound([{"run_id": "r", "budget_s": "soon", "parts": [*odd, part("tests", passed=5)]}, {"parts": 5}])
    assert [one["parts"] for one in made] == [[part("tests", passed=5)], []] and made[0]["budget_s"] is None
    assert coverage(made, [], [], repeats([]), [])[0].seconds == 2.0 and len(seats(made, [])) == 2


def test_sittings_are_told_from_rows_and_notes() -> None:
    noted = {"run_id": "run-2", "at": "2026-11-22T09:59:00Z", "budget_s": 540.0, "parts": [part("spaces")]}
    first, second, third = seats([noted], three_runs())
    assert [one.run_id for one in (first, second, third)] == ["run-1", "run-2", "run-3"]
    assert second.budget_s == 540.0 and second.parts == (("spaces", 2.0),) and first.parts == () and first.budget_s is None
    assert first.clocks_mhz == (1755.0, 1755.0) and first.versions["driver"] == "580.159" and third.uuids == ("GPU-b",)
    empty = seats([{"run_id": "gone", "environment": {"device": "a made one"}}], [])[0]
    assert empty.device == "a made one" and empty.rows == 0 and empty.clocks_mhz is None
