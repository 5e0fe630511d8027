import dataclasses
import json
import random
from datetime import UTC, datetime, timedelta

import pytest
from night_fleet import Clock, NightFleet, write_policy

from klab.harness.catalog.chips import find_chip
from klab.harness.choose.profile import Choice, Evidence, Profile, Rival, Wanted
from klab.harness.store.result import Status
from klab.harness.watch.history import History
from klab.harness.watch.looks import Looks
from klab.harness.watch.night import exit_code, pick_devices, run_night
from klab.harness.watch.points import cycles_of, find_point
from klab.harness.watch.policy import Accepted, read_policy
from klab.harness.watch.series import Call, Series
from klab.harness.watch.tracked import watched
from klab.kernels.contract import Chip
from klab.kernels.discover import discover
from klab.kernels.errors import CannotMeasure, UsageError

CPU = Chip("cpu", "CPU", "cpu", 1, 2000, 2000, {"float32": 0.05, "bfloat16": 0.05}, 8 << 30, 10.0, 1 << 18)
START = datetime(2026, 11, 1, 2, tzinfo=UTC)
# Norms and activations: one kernel of klab's own and one of torch each.
OWN, LIBRARY = "norm/cpu_blocked", "norm/torch_norm"


@pytest.fixture(scope="module")
def catalogue():
    return discover(only=("norm", "activation", "embedding"))


class Lab:
    """A history, a policy and nights in a row on made-up processes."""

    def __init__(self, folder, catalogue, chip=CPU, **policy):
        self.folder, self.catalogue, self.chip = folder, catalogue, chip
        self.policy = read_policy(write_policy(folder, chip=chip.name, **policy))
        self.history = History(folder / "nights")
        self.count = 0

    def night(self, fleet=None, *, record=True, profile=None, **given):
        self.fleet = fleet or NightFleet(seed=self.count)
        at = START + timedelta(days=self.count)
        self.count += 1
        found = watched(self.policy, self.chip, self.catalogue, profile=profile)
        night = run_night(
            self.policy, self.chip, fleet=self.fleet, history=self.history, found=found, now=at, clock=self.fleet.clock,
            identity=at.strftime("%Y%m%dT%H%M%SZ"), **given,
        )  # fmt: skip
        if record:
            self.history.add(night)
        return night

    def nights(self, count, outcome=lambda trial, process: 100.0, **given):
        return [self.night(NightFleet(outcome, seed=100 + self.count), **given) for _ in range(count)]


@pytest.fixture
def lab(tmp_path, catalogue):
    return Lab(tmp_path, catalogue)


def verdict(night, words):
    found = [v for v in night.verdicts if all(word in v.series.name for word in words.split())]
    assert len(found) == 1, [v.series.name for v in night.verdicts]
    return found[0]


def calls(night):
    return {v.call for v in night.verdicts}


def slow(factor, kernel=OWN, processes=lambda process: True):
    return lambda trial, process: 100.0 * (factor if trial.kernel == kernel and processes(process) else 1.0)


def test_a_first_night_measures_everything_in_fresh_processes_and_judges_nothing(lab):
    night = lab.night()
    assert {v.series.operator for v in night.verdicts} == {"norm", "activation"}
    assert {v.series.role for v in night.verdicts} == {"chosen", "library"} and {v.series.metric for v in night.verdicts} == {"time"}
    assert calls(night) == {Call.UNKNOWN} and exit_code(night, strict=True) == 0
    for v in night.verdicts:
        assert len(v.point.values) == len(v.point.anchored) == 3 and v.point.looks == 1 and v.point.night == night.identity
        assert v.point.anchor in ("matmul", "copy") and v.point.anchored_value == pytest.approx(2.0, rel=0.02)
        assert v.series.models == (lab.folder.name,)
    assert [process for process, _ in lab.fleet.asked] == [0, 1, 2], "every pass is a fresh process"
    assert set(lab.fleet.anchors) == {("matmul", "copy")}
    first, second, third = ([t.key for t in trials] for _, trials in lab.fleet.asked)
    assert second == first[::-1] and third == first, "passes in alternating order"
    assert night.epochs and night.devices == {
        "cpu": {"device": "made", "driver": None, "power_limit_w": None, "cpu_model": "made", "host": None}
    }
    assert night.policy == lab.policy.digest("cpu") and night.identity == "20261101T020000Z"


def test_the_same_kernels_night_after_night_give_no_alarm(lab):
    nights = lab.nights(14)
    assert all(exit_code(n) == 0 for n in nights) and calls(nights[-1]) == {Call.OK}
    assert nights[-1].verdicts[0].ratio == pytest.approx(1.0, abs=0.02)


def test_a_slow_down_is_measured_again_the_same_night_in_fresh_processes_and_confirmed(lab):
    lab.nights(8)
    night = lab.night(NightFleet(slow(1.10), seed=5))
    slower = verdict(night, "norm chosen")
    assert slower.call == Call.SLOWER and slower.fails and exit_code(night) == 1
    assert slower.ratio == pytest.approx(1.10, abs=0.02) and slower.low < slower.ratio < slower.high
    assert slower.point.looks == lab.policy.rule.looks and len(slower.point.values) == 3 * lab.policy.rule.looks
    assert all(v.call == Call.OK and v.point.looks == 1 for v in night.verdicts if v is not slower)
    looked_again = lab.fleet.asked[3:]
    assert [process for process, _ in looked_again] == list(range(3, 9))
    for _, trials in looked_again:
        assert {t.kernel for t in trials} == {OWN, LIBRARY}, "the suspect's problem alone, with all its contestants"


def test_what_is_slow_in_one_look_alone_is_no_alarm(lab):
    lab.nights(8)
    night = lab.night(NightFleet(slow(1.10, processes=lambda process: process < 3), seed=5))
    assert verdict(night, "norm chosen").call == Call.OK and verdict(night, "norm chosen").point.looks > 1
    assert exit_code(night, strict=True) == 0


def test_common_drift_is_divided_out_by_the_anchor(lab):
    lab.nights(8)
    fleet = NightFleet(seed=5)
    fleet._drift = lambda: 1.2
    fleet.drift = 1.2
    night = lab.night(fleet)
    assert calls(night) == {Call.OK} and verdict(night, "norm chosen").point.value == pytest.approx(120, rel=0.02)


def test_a_wrong_result_is_broken_at_first_sight_and_not_asked_again(lab):
    lab.nights(6)
    night = lab.night(NightFleet(lambda t, process: Status.INCORRECT if t.kernel == OWN and process == 1 else 100.0, seed=1))
    broken = verdict(night, "norm chosen")
    assert broken.call == Call.BROKEN and broken.point.status == "incorrect" and "in 1 of 2 processes" in broken.reason
    assert exit_code(night) == 1
    asked = [process for process, trials in lab.fleet.asked for t in trials if t.kernel == OWN]
    assert asked == [0, 1]

    def both(trial, process):
        return (Status.INCORRECT if process == 2 else 100.0) if trial.kernel == OWN else 115.0

    night = lab.night(NightFleet(both, seed=1))
    assert verdict(night, "norm chosen").call == Call.BROKEN and verdict(night, "norm library").call == Call.SLOWER
    asked = [process for process, trials in lab.fleet.asked for t in trials if t.kernel == OWN]
    assert asked == [0, 1, 2], "nor where the problem is looked at again for another's sake"


def test_a_crash_is_tried_again_and_is_broken_when_it_is_met_again(lab):
    lab.nights(6)
    night = lab.night(NightFleet(lambda t, process: Status.CRASHED if t.kernel == OWN and process in (1, 4) else 100.0, seed=1))
    assert verdict(night, "norm chosen").call == Call.BROKEN and "crashed" in verdict(night, "norm chosen").reason


@pytest.mark.parametrize("crash", [0, 1, 2])
def test_a_crash_that_is_not_met_again_is_a_suspect_that_says_so(lab, crash):
    lab.nights(6)
    night = lab.night(NightFleet(lambda t, process: Status.CRASHED if t.kernel == OWN and process == crash else 100.0, seed=1))
    doubtful = verdict(night, "norm chosen")
    assert doubtful.call == Call.SUSPECT and f"crashed in 1 of {crash + 4} processes and not again" in doubtful.reason
    assert {process for process, _ in lab.fleet.asked} == set(range(6)), "tried again in fresh processes"
    assert doubtful.point.value == pytest.approx(100, rel=0.05)
    assert exit_code(night) == 0 and exit_code(night, strict=True) == 3


def test_a_library_that_fails_is_broken_when_it_held_the_role_and_a_note_when_not(lab):
    policy = lab.policy.tracks[0]
    lab.policy = dataclasses.replace(lab.policy, tracks=(dataclasses.replace(policy, operators=("embedding",)),))
    faster = "embedding/torch_embedding"
    times = {faster: 90.0}
    lab.nights(6, lambda t, process: times.get(t.kernel, 100.0))
    assert verdict(lab.history.nights("cpu")[-1], "library").point.kernel == faster
    other = lab.night(NightFleet(lambda t, p: times.get(t.kernel, Status.INCORRECT), seed=1), record=False)
    assert verdict(other, "library").call == Call.OK and any("torch_index_select" in note for note in other.notes)
    held = lab.night(NightFleet(lambda t, p: Status.INCORRECT if t.kernel == faster else 100.0, seed=1))
    assert verdict(held, "library").call == Call.BROKEN and faster == verdict(held, "library").point.kernel


def test_what_the_budget_does_not_reach_is_unknown_and_comes_first_next_night(lab):
    # Two problems of two trials, a second each: 3 processes of both take 12 s, and a quarter is kept for second looks.
    fleet = NightFleet(clock=Clock())
    night = lab.night(fleet, deadline=8.0)
    reached = [v.series.operator for v in night.verdicts if v.point.values]
    left = [v for v in night.verdicts if not v.point.values]
    assert set(reached) == {"norm"} and {v.series.operator for v in left} == {"activation"}
    assert all(v.call == Call.UNKNOWN and "not reached within the budget" in v.reason for v in left)
    assert any("the budget ended before 1 of the problems" in note for note in night.notes)
    assert fleet.clock.now <= 8.0
    again = lab.night(NightFleet(clock=Clock()), deadline=8.0)
    assert {v.series.operator for v in again.verdicts if v.point.values} == {"activation"}


def test_a_budget_that_never_reaches_a_series_makes_it_missing(lab):
    for _ in range(lab.policy.rule.patience):
        night = lab.night(NightFleet(lambda t, p: 100.0 if t.problem.operator == "norm" else None))
        assert {v.call for v in night.verdicts if v.series.operator == "activation"} == {Call.UNKNOWN}
    night = lab.night(NightFleet(lambda t, p: 100.0 if t.problem.operator == "norm" else None))
    assert {v.call for v in night.verdicts if v.series.operator == "activation"} == {Call.MISSING} and exit_code(night) == 1


def test_suspects_that_the_time_does_not_reach_stay_suspects(lab):
    lab.nights(8)
    night = lab.night(NightFleet(slow(1.10), seed=5, clock=Clock()), deadline=20.0)
    assert verdict(night, "norm chosen").call == Call.SUSPECT
    assert exit_code(night) == 0 and exit_code(night, strict=True) == 3


def test_nothing_measured_is_an_error_and_no_night(lab):
    with pytest.raises(CannotMeasure, match="nothing was measured on cpu"):
        lab.night(NightFleet(lambda t, p: None))
    assert not lab.history.nights("cpu")


def test_a_device_that_is_lost_ends_the_measuring_and_what_stands_is_judged(lab):
    lab.nights(8)

    def outcome(trial, process):
        if process >= 3:
            raise CannotMeasure("GPU-1 fell off the bus")
        return slow(1.10)(trial, process)

    night = lab.night(NightFleet(outcome, seed=5))
    assert verdict(night, "norm chosen").call == Call.SUSPECT and night.incomplete == "GPU-1 fell off the bus"
    assert exit_code(night) == 4 and any("ended early: GPU-1" in note for note in night.notes)

    def at_once(trial, process):
        if trial.problem.operator == "activation":
            raise CannotMeasure("GPU-1 fell off the bus")
        return 100.0

    night = lab.night(NightFleet(at_once))
    lost = [v for v in night.verdicts if v.series.operator == "activation"]
    assert {v.call for v in lost} == {Call.UNKNOWN} and all(v.reason == "not reached: GPU-1 fell off the bus" for v in lost)

    def never(trial, process):
        raise CannotMeasure("GPU-1 fell off the bus")

    with pytest.raises(CannotMeasure, match="off the bus"):
        lab.night(NightFleet(never))


def test_a_kernel_that_was_skipped_for_its_faults_elsewhere_is_not_called_broken(lab):
    def outcome(trial, process):
        return Status.TIMEOUT if trial.kernel == OWN else 100.0

    class Skipping(NightFleet):
        def row(self, trial, found):
            made = super().row(trial, found)
            return dataclasses.replace(made, reason="skipped: it hung on 9x9 in this run") if made.status is Status.TIMEOUT else made

    lab.nights(2)
    night = lab.night(Skipping(outcome))
    skipped = verdict(night, "norm chosen")
    assert (skipped.call, skipped.reason) == (Call.UNKNOWN, "skipped: it hung on 9x9 in this run")


def test_a_series_that_is_planned_no_more_is_missing_unless_the_tracks_changed(lab):
    lab.nights(2)
    last = lab.history.nights("cpu")[-1]
    ghost = dataclasses.replace(verdict(last, "norm chosen"), series=Series("cpu", "norm", "gone", "9x9 fp32", "chosen", "time"))
    kept = dataclasses.replace(last, identity=last.identity + "x", verdicts=(*last.verdicts, ghost))
    lab.history.add(kept)
    night = lab.night(record=False)
    missing = verdict(night, "9x9")
    assert missing.call == Call.MISSING and "not planned any more" in missing.reason and exit_code(night) == 1
    fewer = dataclasses.replace(lab.policy.tracks[0], operators=("norm",))
    lab.policy = dataclasses.replace(lab.policy, tracks=(fewer,))
    night = lab.night()
    assert {v.series.operator for v in night.verdicts} == {"norm"} and exit_code(night) == 0
    assert any("no longer watched" in note and "9x9" in note for note in night.notes)


def test_a_waiver_covers_and_an_accepted_level_is_the_new_normal(lab):
    lab.nights(8)
    lab.nights(2, slow(1.10))
    path = lab.policy.path
    text = path.read_text()
    path.write_text(text + '[[waiver]]\nseries = "cpu norm *"\nowner = "ann"\nexpires = 2026-11-11\n')
    lab.policy = read_policy(path)
    night = lab.night(NightFleet(slow(1.10), seed=3))
    assert verdict(night, "norm chosen").call == Call.SLOWER and exit_code(night) == 0
    assert "ann until 2026-11-11" in verdict(night, "norm chosen").waiver
    night = lab.night(NightFleet(slow(1.10), seed=4))
    assert exit_code(night) == 1 and "the waiver of ann expired" in verdict(night, "norm chosen").reason
    lab.policy = dataclasses.replace(
        read_policy(path), waivers=(), accepted=(Accepted("cpu norm * chosen time", "ann", str(START.date() + timedelta(8))),)
    )
    night = lab.night(NightFleet(slow(1.10), seed=5))
    assert verdict(night, "norm chosen").call in (Call.OK, Call.UNKNOWN) and exit_code(night) == 0


def choice(problem, kernel, config=None, library=None):
    fields = {f.name: None for f in dataclasses.fields(Evidence)}
    rival = None if library is None else Rival(library, {}, 1.0, 1.0, (1.0, 1.0), "same rounds")
    evidence = Evidence(**{**fields, "library": rival, "interval_us": (1.0, 1.0), "tied": (), "run_ids": ()})
    wanted = Wanted(problem.key, problem.operator, problem.label(), problem.to_json())
    return Choice(wanted, kernel, "cpu", False, config or {}, "x", False, evidence)


def profile_of(lab, *choices):
    path = lab.folder / "pack.json"
    path.write_text(Profile("cpu", "latency", choices=choices).to_text())
    return path


def test_the_profile_says_who_is_chosen_and_which_library_is_best(lab, catalogue):
    one = watched(lab.policy, CPU, catalogue).tracked
    problem = next(t.problem for t in one if t.problem.operator == "activation")
    kernel = catalogue.kernels["activation/cpu_blocked"]
    configs = [c.to_json_full() for c in kernel.space(problem, CPU)]
    pack = profile_of(lab, choice(problem, kernel.id, configs[-1], "activation/torch_activation"))
    found = watched(lab.policy, CPU, catalogue, profile=pack)
    chosen = next(t for t in found.tracked if t.problem == problem and t.role == "chosen")
    assert [t.config.to_json_full() for t in chosen.trials] == [configs[-1]] and chosen.found == "chosen"
    library = next(t for t in found.tracked if t.problem == problem and t.role == "library")
    assert [t.kernel for t in library.trials] == ["activation/torch_activation"] and "evidence" in library.found
    norm = next(t for t in found.tracked if t.problem.operator == "norm" and t.role == "chosen")
    assert [t.kernel for t in norm.trials] == [OWN] and "nothing is chosen" in norm.found
    assert any("chosen by" in note for note in found.notes) and any("1 problems have no choice" in note for note in found.notes)


def test_a_choice_that_is_a_library_holds_both_roles_and_one_in_another_format_runs_that(lab, catalogue):
    lab.policy = dataclasses.replace(lab.policy, tracks=(dataclasses.replace(lab.policy.tracks[0], operators=("embedding", "norm")),))
    problems = {t.problem.operator: t.problem for t in watched(lab.policy, CPU, catalogue).tracked}
    other = dataclasses.replace(problems["norm"], width=128)
    library = dataclasses.replace(choice(problems["embedding"], "embedding/torch_index_select"), library=True)
    narrower = dataclasses.replace(choice(problems["norm"], OWN, {}, "norm/gone"), instead="as fp8", instead_problem=other.to_json())
    kernel = catalogue.kernels[OWN]
    narrower = dataclasses.replace(narrower, config=kernel.default(other, CPU).to_json_full())
    found = watched(lab.policy, CPU, catalogue, profile=profile_of(lab, library, narrower)).tracked
    held = {(t.problem.operator, t.role): t for t in found}
    assert held["embedding", "library"].trials == held["embedding", "chosen"].trials
    assert [t.kernel for t in held["embedding", "library"].trials] == ["embedding/torch_index_select"]
    assert [t.problem for t in held["norm", "chosen"].trials] == [other] and held["norm", "chosen"].series("time").problem_key == problems[
        "norm"
    ].key
    assert [(t.kernel, t.problem) for t in held["norm", "library"].trials] == [(LIBRARY, problems["norm"])]
    night = lab.night(profile=lab.folder / "pack.json")
    assert all(v.point.values for v in night.verdicts)


def test_a_chosen_kernel_that_vanished_or_runs_no_more_is_missing_with_its_reason(lab, catalogue):
    problems = {t.problem.operator: t.problem for t in watched(lab.policy, CPU, catalogue).tracked}
    pack = profile_of(lab, choice(problems["norm"], "norm/gone"), choice(problems["activation"], "activation/cpu_blocked", {"no_field": 1}))
    night = lab.night(profile=pack)
    gone, changed = verdict(night, "norm chosen"), verdict(night, "activation chosen")
    assert (gone.call, changed.call) == (Call.MISSING, Call.MISSING) and exit_code(night) == 1
    assert "norm/gone (chosen) is not here" in gone.reason and "no_field" in changed.reason
    assert verdict(night, "norm library").call == Call.UNKNOWN
    foreign = next(k for k in catalogue.kernels.values() if k.kinds == ("cuda",) and k.problem_type.operator == "norm")
    config = foreign.default(problems["norm"], find_chip("h200")).to_json_full()
    elsewhere = watched(lab.policy, CPU, catalogue, profile=profile_of(lab, choice(problems["norm"], foreign.id, config))).tracked
    gone = next(t for t in elsewhere if t.problem.operator == "norm" and t.role == "chosen")
    assert not gone.trials and "does not run any more: runs on cuda, not cpu" in gone.found
    pack = profile_of(lab, choice(problems["norm"], "norm/gone"), choice(problems["activation"], "activation/cpu_blocked", {"no_field": 1}))
    lab.policy = dataclasses.replace(lab.policy, tracks=(dataclasses.replace(lab.policy.tracks[0], roles=("chosen",)),))
    assert calls(lab.night(NightFleet(pytest.fail), profile=pack)) == {Call.MISSING}, "and so when nothing is left to measure"


def test_an_anchor_that_is_not_taken_is_told_and_the_other_one_is_used(lab):
    lab.policy = dataclasses.replace(lab.policy, measure=dataclasses.replace(lab.policy.measure, anchors=("matmul",)))
    assert {v.point.anchor for v in lab.night().verdicts} == {"matmul"}
    lab.policy = dataclasses.replace(lab.policy, measure=dataclasses.replace(lab.policy.measure, anchors=()))
    assert {v.point.anchor for v in lab.night().verdicts} == {""}

    class Bare(NightFleet):
        def row(self, trial, found):
            return dataclasses.replace(super().row(trial, found), build={"anchors": {"copy": {"reason": "out of memory"}}})

    lab.policy = dataclasses.replace(lab.policy, measure=dataclasses.replace(lab.policy.measure, anchors=("copy",)))
    assert any("rows have no copy anchor, or not in all laps: out of memory" in note for note in lab.night(Bare()).notes)


def test_stored_results_choose_where_no_profile_does(lab, catalogue):
    rows = []
    lab.night(NightFleet(slow(0.5, kernel=LIBRARY)), on_result=rows.append)
    found = watched(lab.policy, CPU, catalogue, results=lambda: rows)
    chosen = next(t for t in found.tracked if t.problem.operator == "norm" and t.role == "chosen")
    assert [t.kernel for t in chosen.trials] == [LIBRARY]
    assert any("chosen by the results in the store" in note for note in found.notes)


def test_a_profile_that_is_named_must_be_there_and_of_the_chip(lab, catalogue):
    with pytest.raises(UsageError, match="no such profile"):
        watched(lab.policy, CPU, catalogue, profile=lab.folder / "none.json")
    other = lab.folder / "h200.json"
    other.write_text(Profile("h200", "latency").to_text())
    with pytest.raises(UsageError, match="is a profile of h200"):
        watched(lab.policy, CPU, catalogue, profile=other)


@pytest.mark.parametrize(("changes", "says"), [({"phase": "denoise"}, "has prefill, decode"), ({"operators": ("matmul2",)}, "matmul2")])
def test_a_track_of_what_there_is_not_is_a_usage_error(lab, catalogue, changes, says):
    track = dataclasses.replace(lab.policy.tracks[0], **changes)
    with pytest.raises(UsageError, match=says):
        watched(dataclasses.replace(lab.policy, tracks=(track,)), CPU, catalogue)


H200 = {"kind": "cuda", "device": "NVIDIA H200", "uuid": "GPU-1"}


@pytest.fixture
def gpu(tmp_path, catalogue):
    return Lab(tmp_path, catalogue, find_chip("h200"), operators=("norm",))


def test_energy_is_metered_of_those_who_hold_the_roles_alone(gpu):
    fleet = NightFleet(facts=H200, energy=lambda t, p: 0.001)
    night = gpu.night(fleet)
    energies = [v for v in night.verdicts if v.series.metric == "energy"]
    assert len(energies) == 2 and all(v.point.values == (0.001,) * gpu.policy.measure.energy_processes for v in energies)
    times = {v.series.role: v.point for v in night.verdicts if v.series.metric == "time"}
    metered = {t.kernel for t in fleet.measured if t.policy.energy}
    assert metered == {times["chosen"].kernel, times["library"].kernel} < {t.kernel for t in fleet.measured}
    assert all(len(v.point.values) == 3 for v in night.verdicts if v.series.metric == "time"), "hot runs are no times"


def test_an_energy_that_was_never_told_is_no_series_and_one_that_was_is_unknown(gpu):
    night = gpu.night(NightFleet(facts=H200))
    assert {v.series.metric for v in night.verdicts} == {"time"}
    assert any("the energy of 2 contestants cannot be watched: no sensor here" in note for note in night.notes)
    gpu.night(NightFleet(facts=H200, energy=lambda t, p: 0.001))
    night = gpu.night(NightFleet(facts=H200))
    energies = [v for v in night.verdicts if v.series.metric == "energy"]
    assert len(energies) == 2 and all(v.call == Call.UNKNOWN and v.reason == "no sensor here" for v in energies)


def test_a_cpu_has_no_energy_series_and_says_so(lab):
    assert any("no energy on cpu" in note for note in lab.night().notes)


def test_a_night_stays_on_one_gpu(gpu, monkeypatch):
    from klab.harness.fleet.devices import Device
    from klab.harness.watch import night as module

    found = [Device(f"GPU-{n}", "NVIDIA H200", "cuda", n) for n in range(3)]
    monkeypatch.setattr(module, "devices", lambda chip: found)
    assert pick_devices(gpu.chip, gpu.history) == ["GPU-0"]
    gpu.night(NightFleet(facts=H200))
    assert pick_devices(gpu.chip, gpu.history) == ["GPU-1"], "the one of last night"
    assert pick_devices(gpu.chip, gpu.history, "2") == ["2"] and pick_devices(gpu.chip, gpu.history, "all") is None
    found.pop(1)
    assert pick_devices(gpu.chip, gpu.history) == ["GPU-0"]
    assert pick_devices(CPU, gpu.history) is None


def rows_of(lab, changes):
    """One trial and its rows, one per entry of `changes`."""
    trial = watched(lab.policy, CPU, lab.catalogue).tracked[0].trials[0]
    fleet = NightFleet()
    return trial, [dataclasses.replace(fleet.row(trial, 100.0), **change) for change in changes]


def test_rows_of_two_devices_are_not_mixed(lab):
    trial, rows = rows_of(
        lab, [{"device_uuid": u, "median_us": m} for u, m in (("a", 1.0), ("b", 2.0), ("a", 1.1), ("b", 2.1), ("b", 2.2))]
    )
    point = find_point([(trial, [rows])], "time", "copy", processes=5).point
    assert point.device_uuid == "b" and point.values == (2.0, 2.1, 2.2)
    three = [dataclasses.replace(row, device_uuid=uuid) for row, uuid in zip(rows, "abcab", strict=True)]
    mixed = find_point([(trial, [three])], "time", "copy", processes=5).point
    assert (mixed.device_uuid, len(mixed.values)) == ("several", 5), "none has most of them, so all count"


def test_entries_of_a_point_are_of_the_same_process(lab):
    bare = {"build": {}}
    clocks = {"clocks_mhz": (1000.0,) * 9}
    trial, rows = rows_of(lab, [clocks, {**clocks, **bare}, clocks, clocks])
    point = find_point([(trial, [rows])], "time", "copy", processes=4).point
    assert len(point.values) == len(point.anchored) == len(point.cycles) == 3, "the process without an anchor is left out"
    assert point.cycles[0] == pytest.approx(point.values[0] * 1000, rel=0.01)
    hot = {"clocks_mhz": (1000.0,) * 4 + (500.0,) * 5, "marked": (0,) * 4 + (1,) * 5}
    trial, rows = rows_of(lab, [hot])
    assert cycles_of(rows[0]) == pytest.approx(rows[0].median_us * 1000, rel=0.01), "rounds that were throttled do not count"
    trial, rows = rows_of(lab, [{"clocks_mhz": (1000.0,) * 4 + (None,) * 5}])
    assert cycles_of(rows[0]) is None
    trial, rows = rows_of(lab, [bare, bare, clocks])
    point = find_point([(trial, [rows])], "time", "copy", processes=3).point
    assert (len(point.values), point.anchored, point.cycles, point.anchor) == (3, (), (), ""), "most have none, so none is used"


def test_a_look_that_was_cut_is_left_out_and_a_first_one_is_no_point(lab):
    trial, rows = rows_of(lab, [{}] * 5)
    assert len(find_point([(trial, [rows[:3], rows[3:]])], "time", "copy", processes=3).point.values) == 5
    cut = find_point([(trial, [rows, rows[:2]])], "time", "copy", processes=5).point
    assert (len(cut.values), cut.looks) == (5, 1)
    first = find_point([(trial, [rows[:2]])], "time", "copy", processes=5)
    assert first.point is None and "2 of 5 processes" in first.reason


def test_a_look_uses_what_time_its_passes_leave(lab):
    trials = [t for one in watched(lab.policy, CPU, lab.catalogue).tracked for t in one.trials]
    fleet = NightFleet(clock=Clock())

    def quicker(trial, process):  # compiling is over
        fleet.trial_s = 0.5
        return 100.0

    fleet.outcome = quicker
    looks = Looks(fleet, lambda row: None, clock=fleet.clock)
    assert looks.take(0, [(t,) for t in trials], 3, 6.6) == []
    assert all(len(looks.rows[t.key][0]) == 3 for t in trials)


def test_no_random_night_of_statuses_ends_in_a_traceback_or_loses_a_series(lab):
    names = None
    for seed in range(12):
        dice = random.Random(seed)

        def outcome(trial, process, dice=dice):
            return dice.choice([100.0, 100.0, 100.0, 130.0, None, *Status])

        try:
            night = lab.night(NightFleet(outcome, seed=seed))
        except CannotMeasure:
            continue
        names = names or {v.series.identity for v in night.verdicts}
        assert {v.series.identity for v in night.verdicts} == names
        assert all(v.reason for v in night.verdicts if v.call != Call.OK), json.dumps([v.to_json() for v in night.verdicts], default=str)
        json.dumps([v.to_json() for v in night.verdicts], default=str, allow_nan=False)
