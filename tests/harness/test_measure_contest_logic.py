"""The order of a contest and what it does when things go wrong, against a scripted worker: no process, no waiting."""

import dataclasses
import time

import pytest

from klab.harness.measure.client import WorkerDied, WorkerHung
from klab.harness.measure.contest import Contest
from klab.harness.measure.limits import Limits
from klab.harness.measure.quarantine import Quarantine
from klab.harness.plan.trial import Policy, Trial
from klab.harness.store.result import Result, Status
from klab.kernels.contract import Config, NoConfig
from klab.kernels.matmul.problem import Matmul

POLICY = Policy(min_rounds=6, max_rounds=6, target_ci=1.0)
ENERGY = Policy(min_rounds=6, max_rounds=6, energy=True, energy_s=6.0)


class ScriptedWorker:
    """Answers like a worker; `script` maps (operation, kernel) to an answer, an exception, or a function of the call's number."""

    def __init__(self, script=None, times=None, libraries=("lib",)):
        self.script, self.times = script or {}, times or {}
        self.kernels = {f"matmul/{n}": {"backend": "torch", "library": n in libraries} for n in ["lib", "other", "a", "b", "c", "d", "e"]}
        self.environment = {"kind": "cpu", "device": "CPU", "uuid": "", "torch": "2.13"}
        self.alive, self.starts, self.calls, self.slots, self.counts = False, 0, [], {}, {}
        self.policies = []

    def start(self, *, limit_s):
        if not self.alive:
            self.alive, self.starts, self.slots = True, self.starts + 1, {}

    def kill(self):
        self.alive = False

    def names(self, operation):
        return "".join(name for op, name in self.calls if op == operation)

    def ask(self, operation, *, limit_s, **fields):
        assert self.alive
        if operation == "prepare":
            self.slots[fields["slot"]] = fields["kernel"].split("/")[1]
            self.policies.append((self.slots[fields["slot"]], fields["policy"].get("launch", "auto")))
        name = self.slots.get(fields.get("slot"), "")
        if operation not in ("open", "close", "prepare"):
            assert name, "a fresh worker knows no slots"
        self.calls.append((operation, name))
        key = (operation, name)
        self.counts[key] = self.counts.get(key, 0) + 1
        answer = self.script.get(key, {})
        if callable(answer) and not isinstance(answer, type):
            answer = answer(self.counts[key])
        if isinstance(answer, Exception):
            self.kill()
            raise answer
        return {"status": "ok", **self.usual(operation, name), **(answer or {})}

    def usual(self, operation, name):
        return {
            "open": {"threads": 2, "reference_device": "cpu", "sets": 9, "set_bytes": 4096, "l2_bytes": 1024},
            "prepare": {"launches": 1, "estimate_us": 10.0, "free_share": 0.9, "checks": 3, "error": 0.1, "tolerance": 0.2, "build": {}},
            "sample": {
                "us": self.times.get(name, 10.0),
                "sm_clock_mhz": 1700.0,
                "temperature_c": 60.0,
                "throttle_reasons": 4,
                "power_w": 500.0,
            },
            "finish": {"error": 0.15, "checks": 4},
            "energy": {
                "energy_j": 0.01,
                "energy_ci_low_j": 0.009,
                "energy_ci_high_j": 0.011,
                "power_w": 500.0,
                "idle_power_w": 70.0,
                "energy_reason": "counter",
                "power_trace": [[0.0, 490.0], [1.0, 500.0]],
            },
        }.get(operation, {})


def run(worker, names, policy=POLICY, **how):
    trials = [Trial(f"matmul/{name}", "0" * 16, Matmul(4, 4, 4), NoConfig(), "cpu", policy) for name in names]
    contest = Contest(worker, trials, run_id="r", limits=Limits(), **how.pop("contest", {}))
    return {row.kernel.split("/")[1]: row for row in contest.run(**how)}, contest


def test_laps_alternate_their_order_and_libraries_come_first():
    worker = ScriptedWorker()
    rows, _ = run(worker, ["a", "b", "lib"])
    order = "".join(name[0] for op, name in worker.calls if op == "sample")
    assert order == "labbal" * 3 or order == "labbal" * 3
    assert [op for op, _ in worker.calls[:4]] == ["open", "prepare", "prepare", "prepare"]
    assert all(row.status is Status.OK for row in rows.values())
    assert rows["a"].checks == 4
    assert rows["a"].error == 0.15
    assert rows["a"].sm_clock_mhz == 1700.0


def test_a_trial_that_is_done_is_told_at_once_and_the_baseline_runs_on():
    noisy = iter([10, 30, 20, 50, 10, 40] * 50)
    worker = ScriptedWorker({("sample", "a"): lambda n: {"us": float(next(noisy))}}, times={"b": 20.0})
    rows, _ = run(worker, ["lib", "a", "b"], Policy(min_rounds=6, max_rounds=20, target_ci=0.01))
    counts = {name: len(row.samples_us) for name, row in rows.items()}
    assert counts == {"b": 6, "a": 20, "lib": 20}
    assert list(rows) == ["b", "a", "lib"] or list(rows) == ["b", "lib", "a"]
    assert rows["b"].build["contest"]["ratio"] == 2.0
    assert worker.calls.index(("finish", "b")) < worker.calls.index(("finish", "a"))


def test_the_fastest_library_is_the_baseline():
    worker = ScriptedWorker(times={"lib": 10.0, "other": 5.0, "a": 20.0}, libraries=("lib", "other"))
    rows, _ = run(worker, ["lib", "other", "a"])
    assert rows["a"].build["contest"]["baseline"] == "matmul/other"
    assert rows["a"].build["contest"]["ratio"] == 4.0


def test_marked_rounds_do_not_count_and_all_marked_is_throttled():
    marks = {("sample", "a"): lambda n: {"throttle_reasons": 0x48, "us": 99.0} if n <= 2 else {}}
    rows, _ = run(ScriptedWorker(marks), ["a"], Policy(min_rounds=6, max_rounds=10, target_ci=1.0))
    assert rows["a"].marked[:3] == (1, 1, 0)
    assert rows["a"].median_us == 10.0
    assert sum(not m for m in rows["a"].marked) >= 6
    hot, _ = run(ScriptedWorker({("sample", "a"): {"throttle_reasons": 0x40}}), ["a"])
    assert hot["a"].status is Status.THROTTLED
    assert "throttled in 6 of 6 rounds" in hot["a"].reason
    assert len(hot["a"].samples_us) == 6


def test_a_crash_in_the_rounds_costs_the_others_only_the_broken_lap():
    die = {("sample", "b"): lambda n: WorkerDied("killed by SIGSEGV") if n == 3 else {}}
    worker = ScriptedWorker(die)
    rows, _ = run(worker, ["lib", "a", "b", "c"])
    assert rows["b"].status is Status.CRASHED
    assert rows["b"].reason == "killed by SIGSEGV, in sample"
    assert worker.starts == 2
    assert {name: len(rows[name].samples_us) for name in ("lib", "a", "c")} == {"lib": 6, "a": 6, "c": 6}
    # Two whole laps, the broken third (its order: lib, a, b), then four more.
    assert {name: worker.names("sample").count(name) for name in ("lib", "a", "c")} == {"lib": 7, "a": 7, "c": 6}


def test_a_fatal_answer_names_the_culprit_and_the_worker_is_replaced():
    bad = {("prepare", "b"): {"status": "crashed", "reason": "CUDA error: illegal memory access", "fatal": True, "compile_s": 1.0}}
    worker = ScriptedWorker(bad)
    rows, _ = run(worker, ["lib", "b", "c"])
    assert rows["b"].status is Status.CRASHED
    assert rows["b"].compile_s == 1.0
    assert worker.starts == 2
    assert rows["lib"].status is rows["c"].status is Status.OK


def test_a_hang_is_a_timeout():
    rows, _ = run(ScriptedWorker({("sample", "a"): WorkerHung("no answer to sample within 30 s")}), ["lib", "a"])
    assert rows["a"].status is Status.TIMEOUT
    assert rows["lib"].status is Status.OK


def test_out_of_memory_beside_others_is_tried_once_more_alone():
    crowded = {("prepare", "b"): lambda n: {"status": "out_of_memory", "reason": "OutOfMemoryError"} if n == 1 else {}}
    worker = ScriptedWorker(crowded)
    rows, _ = run(worker, ["lib", "b"])
    assert rows["b"].status is Status.OK
    assert rows["b"].build["contest"]["contestants"] == 1
    hopeless = {("prepare", "b"): {"status": "out_of_memory", "reason": "OutOfMemoryError"}}
    rows, contest = run(ScriptedWorker(hopeless), ["lib", "b"])
    assert rows["b"].status is Status.OUT_OF_MEMORY
    assert contest.unfinished == []


def test_a_full_device_splits_the_group():
    full = {("prepare", name): {"free_share": 0.1} for name in ("lib", "a", "b")}
    worker = ScriptedWorker(full)
    rows, _ = run(worker, ["lib", "a", "b"])
    assert {row.status for row in rows.values()} == {Status.OK}
    ids = {row.build["contest"]["id"] for row in rows.values()}
    assert len(ids) == 3, "each needs the device for itself, with the baseline as guest"
    assert rows["b"].build["contest"]["baseline"] == "matmul/lib"
    assert list(rows) == ["lib", "a", "b"]


def test_data_that_kills_the_worker_twice_fails_every_trial():
    worker = ScriptedWorker({("open", ""): WorkerDied("killed by SIGKILL (out of host memory?)")})
    rows, contest = run(worker, ["lib", "a"])
    assert {row.status for row in rows.values()} == {Status.CRASHED}
    assert all("while the data of the problem was made: killed by SIGKILL" in row.reason for row in rows.values())
    assert worker.starts == 2
    assert contest.unfinished == []


def test_a_check_that_fails_after_the_rounds_makes_the_trial_incorrect():
    late = {("finish", "a"): {"status": "incorrect", "reason": "out is off, after the rounds", "error": 0.5, "tolerance": 0.2}}
    rows, _ = run(ScriptedWorker(late), ["lib", "a"])
    assert rows["a"].status is Status.INCORRECT
    assert rows["a"].median_us is None, "the time of a wrong answer is no time"
    assert rows["lib"].status is Status.OK


def test_energy_follows_the_rounds_in_passes_of_alternating_order():
    worker = ScriptedWorker()
    rows, _ = run(worker, ["lib", "a", "b"], ENERGY)
    assert worker.names("energy") == "libab" + "balib"
    assert [op for op, _ in worker.calls].index("energy") > max(i for i, (op, _) in enumerate(worker.calls) if op == "sample")
    row = rows["a"]
    assert (row.energy_j, row.energy_ci_low_j, row.energy_ci_high_j, row.power_w, row.idle_power_w) == (0.01, 0.009, 0.011, 500.0, 70.0)
    assert row.power_trace == ((0.0, 490.0), (1.0, 500.0))
    assert Result.from_json(row.to_json()).power_trace == row.power_trace


def test_energy_refused_for_good_is_not_asked_twice():
    worker = ScriptedWorker({("energy", "a"): {"energy_j": None, "energy_reason": "no energy counter", "power_trace": []}})
    rows, _ = run(worker, ["a"], ENERGY)
    assert worker.names("energy") == "a"
    assert rows["a"].energy_j is None
    assert rows["a"].energy_reason == "no energy counter"


def test_energy_is_skipped_near_the_deadline_with_the_reason():
    worker = ScriptedWorker()
    rows, _ = run(worker, ["a"], ENERGY, deadline=time.monotonic() + 4.0)
    assert worker.names("energy") == ""
    assert rows["a"].status is Status.OK
    assert rows["a"].energy_j is None
    assert "a sustained run takes" in rows["a"].energy_reason


def test_a_crash_under_sustained_load_is_a_crash_and_the_others_start_anew():
    die = {("energy", "a"): WorkerDied("killed by SIGABRT")}
    worker = ScriptedWorker(die)
    rows, _ = run(worker, ["lib", "a"], ENERGY)
    assert rows["a"].status is Status.CRASHED
    assert rows["lib"].status is Status.OK
    assert rows["lib"].energy_j == 0.01
    assert worker.names("energy") == "liba" + "lib" * 2


def test_only_those_that_want_energy_have_it():
    worker = ScriptedWorker()
    trials = [Trial(f"matmul/{n}", "0" * 16, Matmul(4, 4, 4), NoConfig(), "cpu", p) for n, p in (("lib", POLICY), ("a", ENERGY))]
    trials[0] = trials[0].with_policy(target_ci=ENERGY.target_ci)
    rows = {row.kernel: row for row in Contest(worker, trials, run_id="r").run()}
    assert rows["matmul/a"].energy_j == 0.01
    assert rows["matmul/lib"].energy_j is None
    assert rows["matmul/lib"].energy_reason == ""


@pytest.mark.parametrize("max_rounds", [1, 3])
def test_a_policy_of_few_rounds_is_honoured(max_rounds):
    rows, contest = run(ScriptedWorker(), ["a"], Policy(min_rounds=1, max_rounds=max_rounds))
    assert len(rows["a"].samples_us) == max_rounds
    assert (rows["a"].status, rows["a"].median_us, rows["a"].ci_low_us) == (Status.OK, None, None), "too few for an interval"
    assert contest.unfinished == []


def test_rows_carry_the_commit_and_the_threads():
    rows, _ = run(ScriptedWorker(), ["a"], contest={"checkout": {"commit": "c0ffee", "dirty": False}})
    assert rows["a"].environment["commit"] == "c0ffee"
    assert rows["a"].environment["threads"] == 2
    assert rows["a"].device == "CPU"


def test_a_trial_that_is_only_checked_has_no_time():
    worker = ScriptedWorker()
    rows, contest = run(worker, ["lib", "a"], Policy(min_rounds=0, max_rounds=0))
    for row in rows.values():
        assert (row.status, row.checks, row.error) == (Status.OK, 4, 0.15)
        assert (row.samples_us, row.median_us, row.q1_us, row.ci_low_us, row.ci_high_us) == ((), None, None, None, None)
    assert worker.names("sample") == ""
    assert contest.unfinished == []


def test_who_was_not_checked_before_the_deadline_did_not_pass():
    deadline = time.monotonic() + 0.3

    def late(n):
        time.sleep(max(0.0, deadline - time.monotonic()))
        return WorkerHung("no answer to prepare within 0 s")

    rows, contest = run(ScriptedWorker({("prepare", "a"): late}), ["lib", "a"], Policy(min_rounds=0, max_rounds=0), deadline=deadline)
    assert set(rows) <= {"lib"}
    assert "matmul/a" in {trial.kernel for trial in contest.unfinished}


def test_who_is_skipped_before_the_data_is_made_belongs_to_the_same_epoch():
    known, policy = Quarantine(), dataclasses.replace(POLICY, threads=2)
    known.failed(Trial("matmul/a", "0" * 16, Matmul(8, 8, 8), NoConfig(), "cpu", policy), Status.TIMEOUT)
    worker = ScriptedWorker()
    worker.environment["threads"] = 16
    rows, _ = run(worker, ["a", "b"], policy, contest={"quarantine": known})
    assert list(rows) == ["a", "b"]
    assert rows["a"].status is Status.TIMEOUT
    assert rows["a"].epoch == rows["b"].epoch
    assert worker.names("prepare") == "b"


def test_rows_show_why_the_cache_was_cold():
    rows, _ = run(ScriptedWorker(), ["a"])
    assert {name: rows["a"].build[name] for name in ("sets", "set_bytes", "l2_bytes")} == {"sets": 9, "set_bytes": 4096, "l2_bytes": 1024}


def test_a_capture_that_took_the_worker_along_is_tried_without_a_graph_in_a_fresh_one():
    spoiled = {"status": "unsupported", "reason": "cannot be captured", "fatal": True, "not_captured": "not permitted"}
    worker = ScriptedWorker({("prepare", "a"): lambda n: spoiled if n == 1 else {}})
    rows, contest = run(worker, ["lib", "a", "b"])
    assert {row.status for row in rows.values()} == {Status.OK}
    assert worker.starts == 2
    assert [launch for name, launch in worker.policies if name == "a"] == ["auto", "events"]
    assert {launch for name, launch in worker.policies if name != "a"} == {"auto"}
    assert rows["a"].build["not_captured"] == "not permitted"
    assert "not_captured" not in rows["b"].build
    assert rows["a"].policy == rows["b"].policy, "the trial is the one that was asked for"
    assert contest.unfinished == []


def test_a_second_hang_of_a_kernel_on_one_problem_skips_its_other_configurations():
    @dataclasses.dataclass(frozen=True)
    class Knob(Config):
        knob: int

    trials = [Trial("matmul/a", "0" * 16, Matmul(4, 4, 4), Knob(i), "cpu", POLICY) for i in range(4)]
    worker = ScriptedWorker({("prepare", "a"): WorkerHung("no answer to prepare within 20 s")})
    rows = list(Contest(worker, trials, run_id="r").run())
    assert [row.status for row in rows] == [Status.TIMEOUT] * 4
    assert [row.reason.startswith("skipped: it hung on") for row in rows] == [False, False, True, True]
    assert worker.names("prepare") == "aa"
