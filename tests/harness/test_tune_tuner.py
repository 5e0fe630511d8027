"""A tuning run: budgets, resuming after a kill, finals, and the errors of a user's input."""

import contextlib
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from contest import CPU
from fake_fleet import FakeFleet, Stop

from klab.harness.plan.trial import Policy
from klab.harness.store.result import Status
from klab.harness.tune import job as jobs
from klab.harness.tune.allowance import FINALS_SHARE, Allowance
from klab.harness.tune.job import Job
from klab.harness.tune.objective import Objective
from klab.harness.tune.strategy import Evaluation
from klab.harness.tune.tuner import Options, Target, Tuner
from klab.kernels.discover import discover
from klab.kernels.errors import CannotMeasure, UsageError
from klab.kernels.matmul.problem import Matmul

CATALOGUE = discover()
POLICY = Policy(warmup_ms=1.0, min_rounds=6, max_rounds=10, round_ms=0.3, limit_s=1.0, threads=1)
WIDE = Matmul(32, 4096, 2048, "float32")
SMALL = Matmul(32, 256, 64, "float32")


def time_of(trial):
    """Made up: the library takes 100 us, a configuration 60 to 160, the default 120."""
    config = trial.config.to_json_full()
    if not config:
        return 100.0
    if trial.config == CATALOGUE.kernels[trial.kernel].default(trial.problem, CPU):
        return 120.0
    return 60.0 + 100.0 * np.random.default_rng(int(trial.config.key[:8], 16)).random()


@pytest.fixture
def fleet(monkeypatch):
    made = FakeFleet(time_of)
    monkeypatch.setattr(jobs, "Fleet", made)
    return made


def tuner(folder, *, problems=(WIDE,), strategy="random", seed=0, **budget):
    kernels = [k for k in CATALOGUE.of("matmul") if "cpu" in k.kinds]
    targets = [Target(p, 1.0, 20.0) for p in problems]
    return Tuner(Job(CPU, folder), kernels, targets, Options(strategy, seed, allowance=Allowance(**budget)), policy=POLICY)


def lines(folder):
    return {path.name: path.read_text().splitlines() for path in folder.rglob("*.search")}


def test_it_finds_the_best_and_the_final_confirms_it(tmp_path, fleet):
    tuned = tuner(tmp_path, evaluations=500).run()
    course = tuned.courses[0]
    assert tuned.stopped == "exhausted" and course.evaluations == len(course.lane.space)
    best = min(time_of(course.lane.trial(c)) for c in range(len(course.lane.space)))
    assert course.best_us() == best
    final = tuned.finals[WIDE.key]
    assert time_of(final.winner) == best and final.results
    assert tuned.new["ok"] + tuned.known >= course.evaluations
    assert course.library is not None and fleet.guests[-2 - len(final.results) // 8] is not None


def test_a_budget_of_evaluations_counts_over_all_problems_and_runs(tmp_path, fleet):
    tuned = tuner(tmp_path, problems=(WIDE, SMALL), evaluations=10).run()
    assert sum(c.evaluations for c in tuned.courses) == 10 and tuned.stopped == "evaluations"
    again = tuner(tmp_path, problems=(WIDE, SMALL), evaluations=10).run()
    assert sum(c.evaluations for c in again.courses) == 10 and again.resumed == 10
    more = tuner(tmp_path, problems=(WIDE, SMALL), evaluations=16).run()
    assert sum(c.evaluations for c in more.courses) == 16 and more.resumed == 10


@pytest.mark.parametrize("strategy", ["random", "genetic"])
def test_a_run_that_was_killed_goes_on_as_if_it_had_not_been(tmp_path, monkeypatch, strategy):
    def run(folder, dies_after=None):
        made = FakeFleet(time_of, dies_after)
        monkeypatch.setattr(jobs, "Fleet", made)
        with contextlib.suppress(Stop):
            return tuner(folder, strategy=strategy, evaluations=40).run(), made

    whole, _ = run(tmp_path / "whole")
    for dies_after in (1, 9, 30):
        run(tmp_path / "killed", dies_after)
    resumed, last = run(tmp_path / "killed")
    told = [(e.candidate, e.value, e.status) for e in resumed.courses[0].found]
    assert told == [(e.candidate, e.value, e.status) for e in whole.courses[0].found]
    assert len(lines(tmp_path / "killed")) == 1 and 0 < resumed.resumed < 41
    full = [t.key for t in last.measured if t.policy == POLICY]
    assert len(full) < 15, "what was measured before was not measured again"


def test_another_seed_space_or_strategy_is_another_search(tmp_path, fleet):
    tuner(tmp_path, evaluations=5).run()
    tuner(tmp_path, evaluations=5, seed=1).run()
    tuner(tmp_path, evaluations=5, strategy="exhaustive").run()
    tuner(tmp_path, evaluations=5, problems=(SMALL,)).run()
    journals = lines(tmp_path)
    assert len(journals) == 4
    headers = [json.loads(rows[0]) for rows in journals.values()]
    assert {h["strategy"] for h in headers} == {"random", "exhaustive"} and {h["seed"] for h in headers} == {0, 1}
    assert all(h["space"] and h["strategy_source"] and h["epoch"] and h["policy"] and h["chip"] == "cpu" for h in headers)


def test_the_prior_is_that_of_the_first_run_whatever_the_store_has_learnt(tmp_path, fleet):
    tuner(tmp_path, evaluations=5).run()
    first = tuner(tmp_path, evaluations=6).run().courses[0].prior
    tuner(tmp_path, evaluations=30, problems=(SMALL,), seed=3).run()
    later = tuner(tmp_path, evaluations=7).run().courses[0].prior
    assert later.seeds == first.seeds
    assert (later.expected is None) == (first.expected is None)
    assert first.expected is None or np.array_equal(first.expected, later.expected, equal_nan=True)


def test_a_damaged_journal_or_prior_is_refused_before_anything_is_measured(tmp_path, fleet):
    tuner(tmp_path, evaluations=5).run()
    prior, journal = next(tmp_path.rglob("*.prior.npz")), next(tmp_path.rglob("*.search"))
    whole, text = prior.read_bytes(), journal.read_text()
    asked = len(fleet.asked)

    def refused(match):
        with pytest.raises(UsageError, match=match) as raised:
            tuner(tmp_path, evaluations=9).run()
        assert "away" in str(raised.value) and str(journal.parent) in str(raised.value) and len(fleet.asked) == asked

    prior.write_bytes(whole[:20])
    refused("damaged")
    prior.unlink()
    refused("gone")
    prior.write_bytes(whole)
    row = '{"candidate": 3, "value": %s, "status": "ok", "rounds": 0, "spent_s": 0.1}\n'
    for bad in ("no json\n", row % "NaN", row % "-1.0", row % "Infinity"):
        journal.write_text(text + bad)
        refused("not a journal")
    both = tuner(tmp_path, problems=(WIDE, SMALL), evaluations=9).run()
    spoilt, sound = sorted(both.courses, key=lambda c: c.problem != WIDE)
    assert "not a journal" in spoilt.trouble and not spoilt.evaluations and not sound.trouble and sound.evaluations
    assert not [t for run in fleet.asked[asked:] for t in run if t.problem == WIDE]
    journal.write_text(text + '{"candidate": 3, "val')  # torn by a kill: no damage
    assert tuner(tmp_path, evaluations=9).run().courses[0].evaluations == 9


def test_every_candidate_failing_says_so_and_keeps_the_rows(tmp_path, fleet):
    fleet.outcome = lambda trial: Status.INCORRECT
    with pytest.raises(CannotMeasure, match=r"every candidate failed .*incorrect"):
        tuner(tmp_path, evaluations=20).run()
    assert len([row for row in tuner(tmp_path).job.stored() if row.status is Status.INCORRECT]) >= 20


def test_a_kernel_whose_every_candidate_fails_is_named_also_where_a_library_was_measured(tmp_path, fleet):
    fleet.outcome = lambda trial: time_of(trial) if "torch" in trial.kernel else Status.CRASHED
    (course,) = tuner(tmp_path, evaluations=6).run().courses
    assert course.hopeless() == {"matmul/cpu_blocked": {"crashed": 6}} and course.library is not None


def test_a_failing_default_leaves_the_search_to_find_another(tmp_path, fleet):
    usual = CATALOGUE.kernels["matmul/cpu_blocked"].default(WIDE, CPU)
    fleet.outcome = lambda trial: Status.CRASHED if trial.config == usual else time_of(trial)
    tuned = tuner(tmp_path, evaluations=20).run()
    course = tuned.courses[0]
    assert course.default is None and math.isfinite(course.best_us())
    assert tuned.finals[WIDE.key].winner is not None


def test_budgets_that_are_too_small_are_refused(tmp_path, fleet):
    with pytest.raises(UsageError, match="too small"):
        Allowance(evaluations=0)
    with pytest.raises(UsageError, match="too small"):
        Allowance(device_s=0.0)
    with pytest.raises(UsageError, match="too small for one evaluation"):
        tuner(tmp_path, deadline=time.monotonic()).run()
    assert fleet.asked == []
    with pytest.raises(UsageError, match="no strategy 'clever'; there are"):
        tuner(tmp_path, strategy="clever")


def test_a_space_without_a_valid_candidate_and_a_target_without_kernels(tmp_path, fleet):
    library = [k for k in CATALOGUE.of("matmul") if "cpu" in k.kinds and k.library]
    with pytest.raises(UsageError, match="nothing to tune"):
        Tuner(Job(CPU, tmp_path), library, [Target(WIDE, 1.0, 1.0)], Options("random"), policy=POLICY)


ODD = """
from klab.kernels.contract import kernel
from klab.kernels.matmul.problem import Matmul

def space(problem, chip):
    raise ValueError("division of the indivisible")
    yield

@kernel(Matmul, backend="torch", kinds=("cpu",), space=space)
def odd(problem, config, chip):
    '''Its space raises.'''
"""


def test_a_space_that_cannot_be_listed_is_told_and_what_was_measured_is_kept(tmp_path, fleet):
    (tmp_path / "odd.py").write_text(ODD)
    catalogue = discover([tmp_path])
    kernels = [k for k in catalogue.of("matmul") if k.library and "cpu" in k.kinds] + [catalogue.kernels["matmul/odd"]]
    made = Tuner(Job(CPU, tmp_path / "rows"), kernels, [Target(SMALL, 1.0, 1.0)], Options("random"), policy=POLICY)
    with pytest.raises(
        UsageError, match="matmul 32x256x64 fp32 on cpu: matmul/odd: its space raised ValueError: division of the indivisible"
    ):
        made.run()
    assert len(made.job.stored()) == 2


def test_a_kernel_whose_space_or_default_raises_is_left_out_and_the_others_go_on(tmp_path, fleet):
    (tmp_path / "odd.py").write_text(ODD)
    broken = "space=space, default=lambda problem, chip: 1 // 0)"
    (tmp_path / "broken.py").write_text(ODD.replace("space=space)", broken).replace("def odd", "def broken"))
    kernels = [k for k in discover([tmp_path]).of("matmul") if "cpu" in k.kinds]
    made = Tuner(
        Job(CPU, tmp_path / "rows"),
        kernels,
        [Target(SMALL, 1.0, 1.0)],
        Options("random", allowance=Allowance(evaluations=5)),
        policy=POLICY,
    )
    (course,) = made.run().courses
    assert course.evaluations == 5 and not course.trouble
    assert course.left_out["matmul/odd"] == "its space raised ValueError: division of the indivisible"
    assert "raised ZeroDivisionError" in course.left_out["matmul/broken"] and len(course.left_out) == 2


def test_short_runs_that_look_better_go_to_the_final_when_the_budget_ends_before_a_promotion(tmp_path, fleet):
    tuned = tuner(tmp_path, strategy="halving", evaluations=16).run()
    (course,) = tuned.courses
    assert course.evaluations == 16 and all(e.rounds for e in course.found), "nobody was measured in full"
    best = min(e.value for e in course.found)
    assert best < course.default_us and course.best_us() == best and course.contested
    assert time_of(tuned.finals[WIDE.key].winner) == pytest.approx(best, rel=0.01) and tuned.endings[WIDE.key].decided


def test_a_short_run_is_held_against_the_default_in_as_short_a_run_and_out_once_it_fails(tmp_path, fleet):
    # Short runs of everybody read 50 us too low: nobody but the really faster may come to the final.
    fleet.outcome = lambda trial: time_of(trial) - 50.0 * (trial.policy.max_rounds < 6)
    made = tuner(tmp_path, strategy="halving", evaluations=16)
    (course,) = made.run().courses
    assert course.has(course.lane.space.find({"kernel": course.default.kernel, **course.default.config.to_json_full()}))
    assert {time_of(t) < 120.0 for t in course.finalists(99, 9.0)} == {True}
    first = next(e for e in course.found if e.value == course.best_us())
    course.search.trace.add(Evaluation(first.candidate, math.inf, Status.INCORRECT))
    assert course.lane.trial(first.candidate) not in course.finalists(99, 9.0)


def test_a_finished_run_keeps_its_verdict_and_measures_nothing_again(tmp_path, fleet):
    first = tuner(tmp_path, evaluations=12).run()
    rows = len(first.finals[WIDE.key].results)
    assert first.finals_s > 0 and first.device_s > first.searched_s and first.new["ok"] >= rows + 12
    asked = len(fleet.asked)
    again = tuner(tmp_path, evaluations=12).run()
    assert len(fleet.asked) == asked and not again.new and not again.finals and again.finals_s == 0
    assert again.endings[WIDE.key].known and again.decided == first.decided
    more = tuner(tmp_path, evaluations=60).run()
    assert more.finals and not more.endings[WIDE.key].known, "other contenders are another final"


def test_a_final_without_the_device_s_seconds_is_told_and_what_is_left_is_not_overspent(tmp_path, fleet):
    tuned = tuner(tmp_path, device_s=1e-6).run()
    (course,) = tuned.courses
    assert tuned.stopped == "device seconds" and 0 < course.evaluations <= 8, "one slice, the very first"
    assert tuned.endings[WIDE.key].word == "no final" and "it takes at least" in tuned.endings[WIDE.key].reason
    assert not tuned.decided and not tuned.finals


def test_a_seed_below_0_is_refused():
    with pytest.raises(UsageError, match="--seed -1"):
        Options("random", -1)


def test_joules_of_a_cpu_are_refused_before_anything_is_measured(tmp_path, fleet):
    with pytest.raises(CannotMeasure, match="power sensor"):
        Tuner(Job(CPU, tmp_path), list(CATALOGUE.of("matmul")), [Target(WIDE, 1.0, 1.0)], Options("random", objective=Objective("energy")))


def test_an_allowance_keeps_time_for_the_finals_and_no_more_than_they_need():
    now = time.monotonic()
    short = Allowance(deadline=now + 40.0, began=now)
    assert short.search_ends(9) == pytest.approx(now + 40.0 * (1 - FINALS_SHARE))
    long = Allowance(deadline=now + 4000.0, began=now)
    assert long.search_ends(1) > long.search_ends(9) > now + 3000.0
    assert short.search_over(0, 0.0) == "" and Allowance(evaluations=4).search_over(4, 0.0) == "evaluations"
    assert Allowance(device_s=8.0).search_over(0, 6.1) == "device seconds"
    assert Allowance(device_s=8.0).final_s(0.5, 6.0) == pytest.approx(1.0)
    assert Allowance(evaluations=4).final_s(0.5) == math.inf, "it ends by its own rule"
    # While nothing has beaten a default, the finals' share is searched with.
    assert long.search_ends(0) > long.search_ends(1) and Allowance(device_s=8.0).search_over(0, 6.1, 0) == ""


KILLED = """
import sys
sys.path[:0] = {paths!r}
import test_tune_tuner as t
t.Tuner._finals = lambda *_: None  # this is about the search
tuned = t.tuner({folder!r}, problems=(t.SMALL, t.Matmul(8, 512, 128, "float32")), evaluations=12).run()
print(len(tuned.courses), sum(c.evaluations for c in tuned.courses), tuned.resumed, tuned.measuring_share)
"""


@pytest.mark.timeout(600)
def test_a_real_kill_on_this_cpu_loses_at_most_what_was_under_way(tmp_path):
    here = Path(__file__).parent
    script = KILLED.format(paths=[str(here), str(here.parent / "kernels")], folder=str(tmp_path))
    env = {**os.environ, "KLAB_LOCK_DIR": str(tmp_path)}
    command = [sys.executable, "-c", script.replace(repr(str(tmp_path)), f"t.Path({str(tmp_path)!r})")]
    process = subprocess.Popen(command, env=env, stderr=subprocess.PIPE)
    give_up = time.monotonic() + 240.0
    while sum(map(len, lines(tmp_path).values())) < 5 and time.monotonic() < give_up and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, process.stderr.read().decode()
    before = lines(tmp_path)
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    courses, evaluations, resumed, share = done.stdout.split()
    assert (int(courses), int(evaluations)) == (2, 12) and int(resumed) >= 3
    after = lines(tmp_path)
    # Every line that was whole before stands where it stood, and nobody was asked for twice.
    whole = {name: [row for row in rows if row.endswith("}")] for name, rows in before.items()}
    assert all(after[name][: len(rows)] == rows for name, rows in whole.items())
    for rows in after.values():
        candidates = [json.loads(row)["candidate"] for row in rows[1:]]
        assert len(candidates) == len(set(candidates))
    assert 0.0 < float(share) <= 1.0
