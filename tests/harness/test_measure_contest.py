"""A contest end to end: real workers, real kernels on this CPU, and contestants that fail in every way."""

import dataclasses
import re
import threading
import time
from pathlib import Path

import pytest

from klab.harness.measure.client import WorkerClient
from klab.harness.measure.contest import Contest
from klab.harness.measure.limits import Limits
from klab.harness.plan.trial import Policy, Trial
from klab.harness.store.result import Result, Status
from klab.kernels.contract import Chip
from klab.kernels.discover import discover
from klab.kernels.errors import UsageError
from klab.kernels.matmul.problem import Matmul

CONTESTANTS = Path(__file__).with_name("contestants")
CHIP = Chip("cpu", "CPU", "cpu", 1, 2000, 2000, {"float32": 0.05}, 8 << 30, 10.0, 1 << 18)
PROBLEM = Matmul(8, 48, 64, "float32")
POLICY = Policy(warmup_ms=1.0, round_ms=0.3, min_rounds=6, max_rounds=12, limit_s=5.0, threads=1)
# With these, nothing but a deadline ends a contestant that hangs within a minute, and nobody is blamed sooner.
SLOW_COMPILERS = Limits(prepare_floor_s=180.0, blame_s=60.0)


@pytest.fixture(scope="module")
def catalogue():
    return discover([CONTESTANTS])


@pytest.fixture(scope="module")
def client():
    client = WorkerClient(CHIP, kernel_dirs=[CONTESTANTS])
    yield client
    client.kill()


def trials(catalogue, *names, policy=POLICY, problem=PROBLEM):
    kernels = [catalogue.kernels[f"matmul/{name}"] for name in names]
    return [Trial.of(kernel, problem, kernel.default(problem, CHIP), "cpu", policy) for kernel in kernels]


def run(client, entries, **how):
    contest = Contest(client, entries, run_id="r1", limits=how.pop("limits", Limits()))
    return {row.kernel.split("/")[1]: row for row in contest.run(**how)}, contest


def test_interleaved_rounds_become_results(client, catalogue):
    rows, contest = run(client, trials(catalogue, "half_speed", "good"))
    assert contest.unfinished == []
    for row in rows.values():
        assert row.status is Status.OK
        assert POLICY.min_rounds <= len(row.samples_us) <= POLICY.max_rounds
        assert len(row.marked) == len(row.clocks_mhz) == len(row.samples_us)
        assert row.ci_low_us <= row.median_us <= row.ci_high_us
        assert row.q1_us <= row.median_us <= row.q3_us
        assert (row.checks, row.l2_state, row.launch_mode, row.reference_device) == (4, "cold", "loop", "cpu")
        assert row.error <= row.tolerance
        assert (row.energy_j, row.power_w, row.sm_clock_mhz) == (None, None, None)
        assert row.environment["threads"] == 1
        assert row.epoch
        assert Result.from_json(row.to_json()).samples_us == row.samples_us
    beside = rows["half_speed"].build["contest"]
    assert beside["id"] == rows["good"].build["contest"]["id"]
    assert beside["baseline"] == "matmul/good"
    assert beside["ratio_low"] <= beside["ratio"] <= beside["ratio_high"]
    assert beside["ratio"] > 1.2, "twice the work takes longer"
    assert rows["good"].library
    assert not rows["half_speed"].library
    assert {row.key for row in rows.values()} == {trial.key for trial in trials(catalogue, "half_speed", "good")}


def test_failures_are_rows_and_the_others_go_on(client, catalogue):
    rows, contest = run(client, trials(catalogue, "good", "wrong", "raises", "does_not_compile", "refuses", "stale", "half_speed"))
    assert {name: row.status.value for name, row in rows.items()} == {
        "good": "ok",
        "half_speed": "ok",
        "wrong": "incorrect",
        "raises": "crashed",
        "does_not_compile": "compile_error",
        "refuses": "unsupported",
        "stale": "incorrect",
    }
    assert contest.unfinished == []
    assert rows["wrong"].error > rows["wrong"].tolerance
    assert rows["wrong"].median_us is None
    assert all(row.reason for name, row in rows.items() if row.status is not Status.OK)


def test_deadly_contestants_are_named_and_the_others_are_measured_in_fresh_workers(client, catalogue):
    rows, contest = run(client, trials(catalogue, "good", "aborts", "dies_late", "hangs", "half_speed"), limits=Limits(prepare_s=10.0))
    assert {name: row.status.value for name, row in rows.items()} == {
        "good": "ok",
        "half_speed": "ok",
        "aborts": "crashed",
        "dies_late": "crashed",
        "hangs": "timeout",
    }
    assert "SIGABRT" in rows["aborts"].reason
    assert "exit code 7" in rows["dies_late"].reason
    assert "within 10 s" in rows["hangs"].reason
    assert len({row.epoch for row in rows.values()}) == 1, "failures belong to the same epoch"
    assert contest.unfinished == []


def test_the_deadline_ends_a_launch_that_hangs_and_blames_nobody(client, catalogue):
    client.start()
    deadline = time.monotonic() + 4.0
    rows, contest = run(client, trials(catalogue, "hangs", "half_speed"), deadline=deadline, limits=SLOW_COMPILERS)
    assert time.monotonic() - deadline < 30.0
    assert rows == {}
    assert len(contest.unfinished) == 2


def test_who_hangs_until_the_deadline_is_named_and_does_not_return(client, catalogue):
    client.start()
    deadline = time.monotonic() + 8.0
    limits = dataclasses.replace(SLOW_COMPILERS, blame_s=1.0)
    rows, contest = run(client, trials(catalogue, "good", "hangs"), deadline=deadline, limits=limits)
    assert time.monotonic() - deadline < 30.0
    assert rows["hangs"].status is Status.TIMEOUT
    assert re.fullmatch(r"no answer to prepare within \d+ s, then the budget ended", rows["hangs"].reason)
    assert rows["hangs"].epoch
    assert [trial.kernel for trial in contest.unfinished] == ["matmul/good"]


def test_who_hangs_does_not_use_up_the_budget_of_the_others(client, catalogue):
    client.start()
    began = time.monotonic()
    rows, contest = run(client, trials(catalogue, "hangs", "good"), deadline=began + 60.0, limits=Limits(prepare_floor_s=3.0))
    assert time.monotonic() - began < 60.0
    assert {name: row.status.value for name, row in rows.items()} == {"hangs": "timeout", "good": "ok"}
    assert contest.unfinished == []


def test_rounds_taken_before_the_deadline_are_kept(client, catalogue):
    endless = Policy(**{**POLICY.to_json(), "max_rounds": 10**6, "target_ci": 1e-9, "limit_s": 1e6})
    client.start()
    deadline = time.monotonic() + 5.0
    rows, contest = run(client, trials(catalogue, "good", "half_speed", policy=endless), deadline=deadline)
    assert -2.0 < time.monotonic() - deadline < 30.0
    assert {row.status for row in rows.values()} == {Status.OK}
    assert all(len(row.samples_us) >= 5 for row in rows.values())
    assert contest.unfinished == []


def test_asked_to_stop_it_keeps_what_runs_and_leaves_the_rest(client, catalogue, monkeypatch):
    stop, ask, rounds = threading.Event(), client.ask, iter(range(10**6))

    def ask_and_stop(operation, **how):
        answer = ask(operation, **how)
        if operation == "sample" and next(rounds) == 2 * POLICY.min_rounds:
            stop.set()
        return answer

    monkeypatch.setattr(client, "ask", ask_and_stop)
    policy = Policy(**{**POLICY.to_json(), "max_rounds": 10**6, "target_ci": 1e-9, "limit_s": 1e6})
    client.start()
    rows, _ = run(client, trials(catalogue, "good", "takes_its_time", policy=policy), stop=stop)
    assert stop.is_set() and rows["good"].status is Status.OK
    rows, contest = run(client, trials(catalogue, "good"), stop=stop)
    assert rows == {}
    assert len(contest.unfinished) == 1


def test_groups_have_the_baseline_as_a_guest(client, catalogue, monkeypatch):
    monkeypatch.setattr("klab.harness.measure.contest.GROUP_SLOTS", 2)
    rows, _ = run(client, trials(catalogue, "half_speed", "chatty", "good", "takes_its_time"))
    assert {row.status for row in rows.values()} == {Status.OK}
    first, second = rows["good"].build["contest"], rows["takes_its_time"].build["contest"]
    assert first["id"] != second["id"]
    assert second["baseline"] == "matmul/good"
    assert second["ratio"] > 5
    assert second["contestants"] >= 2


def test_a_problem_that_does_not_fit_is_a_row_for_every_trial(client, catalogue):
    huge = Matmul(1 << 22, 1 << 22, 1 << 22, "float32")
    rows, contest = run(client, trials(catalogue, "good", "half_speed", problem=huge))
    assert {row.status for row in rows.values()} == {Status.OUT_OF_MEMORY}
    assert all("while the data of the problem was made" in row.reason for row in rows.values())
    assert contest.unfinished == []


def test_energy_without_a_sensor_is_null_with_its_reason(client, catalogue):
    wants = Policy(**{**POLICY.to_json(), "energy": True})
    rows, _ = run(client, trials(catalogue, "good", policy=wants))
    assert rows["good"].energy_j is None
    assert "sensor" in rows["good"].energy_reason


def test_a_contest_is_about_one_problem(client, catalogue):
    mixed = trials(catalogue, "good") + trials(catalogue, "good", problem=Matmul(1, 2, 3))
    with pytest.raises(UsageError, match="one problem"):
        Contest(client, mixed, run_id="r1")
