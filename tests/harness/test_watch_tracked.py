import dataclasses

import pytest
from night_fleet import NightFleet
from night_lab import CPU, LIBRARY, OWN, Lab, calls, slow, verdict

from klab.harness.catalog.chips import find_chip
from klab.harness.choose.profile import Choice, Evidence, Profile, Rival, Wanted
from klab.harness.watch.night import exit_code
from klab.harness.watch.series import Call
from klab.harness.watch.tracked import watched
from klab.kernels.discover import discover
from klab.kernels.errors import UsageError


@pytest.fixture(scope="module")
def catalogue():
    return discover(only=("norm", "activation", "embedding"))


@pytest.fixture
def lab(tmp_path, catalogue):
    return Lab(tmp_path, catalogue)


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
