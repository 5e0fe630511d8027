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
    for dies_after in (1, 3, 9, 30):
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


def test_a_damaged_journal_or_prior_is_one_clear_line(tmp_path, fleet):
    tuner(tmp_path, evaluations=5).run()
    prior = next(tmp_path.rglob("*.prior.npz"))
    whole = prior.read_bytes()
    prior.write_bytes(whole[:20])
    with pytest.raises(UsageError, match="damaged"):
        tuner(tmp_path, evaluations=9).run()
    prior.unlink()
    with pytest.raises(UsageError, match="gone"):
        tuner(tmp_path, evaluations=9).run()
    prior.write_bytes(whole)
    journal = next(tmp_path.rglob("*.search"))
    text = journal.read_text()
    journal.write_text(text + "no json\n")
    with pytest.raises(UsageError, match="not a journal"):
        tuner(tmp_path, evaluations=9).run()
    journal.write_text(text + '{"candidate": 3, "val')  # torn by a kill: no damage
    assert tuner(tmp_path, evaluations=9).run().courses[0].evaluations == 9


def test_every_candidate_failing_says_so_and_keeps_the_rows(tmp_path, fleet):
    fleet.outcome = lambda trial: Status.INCORRECT
    with pytest.raises(CannotMeasure, match=r"every candidate failed .*incorrect"):
        tuner(tmp_path, evaluations=20).run()
    assert len([row for row in tuner(tmp_path).job.stored() if row.status is Status.INCORRECT]) >= 20


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
    with pytest.raises(UsageError, match="matmul 32x256x64 fp32 on cpu: a kernel's space raised ValueError: division of the indivisible"):
        made.run()
    assert len(made.job.stored()) == 2


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
    assert Allowance(device_s=8.0).final_s(0.5) == pytest.approx(1.0)


KILLED = """
import sys
sys.path[:0] = {paths!r}
import test_tune_tuner as t
from klab.harness.tune import allowance
allowance.FINAL_S = 0.0  # this is about the search
tuned = t.tuner({folder!r}, problems=(t.SMALL, t.Matmul(8, 2304, 1280, "float32")), evaluations=24).run()
print(len(tuned.courses), sum(c.evaluations for c in tuned.courses), tuned.resumed, tuned.measuring_share)
"""


def test_a_real_kill_on_this_cpu_loses_at_most_what_was_under_way(tmp_path):
    here = Path(__file__).parent
    script = KILLED.format(paths=[str(here), str(here.parent / "kernels")], folder=str(tmp_path))
    env = {**os.environ, "KLAB_LOCK_DIR": str(tmp_path)}
    command = [sys.executable, "-c", script.replace(repr(str(tmp_path)), f"t.Path({str(tmp_path)!r})")]
    process = subprocess.Popen(command, env=env, stderr=subprocess.PIPE)
    give_up = time.monotonic() + 60.0
    while sum(map(len, lines(tmp_path).values())) < 6 and time.monotonic() < give_up and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, process.stderr.read().decode()
    before = lines(tmp_path)
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    courses, evaluations, resumed, share = done.stdout.split()
    assert (int(courses), int(evaluations)) == (2, 24) and int(resumed) >= 4
    after = lines(tmp_path)
    # Every line that was whole before stands where it stood, and nobody was asked for twice.
    whole = {name: [row for row in rows if row.endswith("}")] for name, rows in before.items()}
    assert all(after[name][: len(rows)] == rows for name, rows in whole.items())
    for rows in after.values():
        candidates = [json.loads(row)["candidate"] for row in rows[1:]]
        assert len(candidates) == len(set(candidates))
    assert 0.0 < float(share) <= 1.0
