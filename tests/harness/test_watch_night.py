import dataclasses
import json
import random
from datetime import timedelta

import pytest
from night_fleet import Clock, NightFleet
from night_lab import CPU, LIBRARY, OWN, START, Lab, calls, slow, verdict

from klab.harness.catalog.chips import find_chip
from klab.harness.store.result import Status
from klab.harness.watch.night import exit_code, pick_devices
from klab.harness.watch.policy import Accepted, Waiver, read_policy
from klab.harness.watch.series import Call, Series
from klab.kernels.discover import discover
from klab.kernels.errors import CannotMeasure


@pytest.fixture(scope="module")
def catalogue():
    return discover(only=("norm", "activation", "embedding"))


@pytest.fixture
def lab(tmp_path, catalogue):
    return Lab(tmp_path, catalogue)


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
    reached = [v for v in again.verdicts if v.point.values]
    assert {v.series.operator for v in reached} == {"activation"}
    assert {(v.reason, v.new_epoch) for v in reached} == {("the first night with a value of it", False)}


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


def test_nights_from_the_future_count_and_are_told(lab):
    lab.nights(6)
    lab.count = 3
    night = lab.night()
    assert calls(night) == {Call.OK}
    assert any("2 of 6 nights of the history are dated after tonight, up to 2026-11-06T02:00:00Z" in note for note in night.notes)
    lab.count = 7
    assert not any("dated after" in note for note in lab.night().notes)


def test_an_expired_waiver_fails_a_night_in_which_all_is_well(lab):
    lab.nights(8)
    lab.policy = dataclasses.replace(lab.policy, waivers=(Waiver("cpu norm *", "ann", START.date() + timedelta(8)),))
    night = lab.night()
    assert not night.lapsed and exit_code(night) == 0
    night = lab.night()
    assert calls(night) == {Call.OK} and exit_code(night) == exit_code(night, strict=True) == 1
    assert [(one.series, one.owner, one.expires) for one in night.lapsed] == [("cpu norm *", "ann", "2026-11-09")]
    assert lab.history.nights("cpu")[-1].lapsed == night.lapsed
    lab.policy = dataclasses.replace(lab.policy, waivers=())
    assert exit_code(lab.night()) == 0


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
