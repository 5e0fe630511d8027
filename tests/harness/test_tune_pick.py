"""Energy is measured for each problem's winner, its runner-up and its fastest library, and for nobody else."""

from contest import CPU

from klab.harness.plan.trial import Policy, Trial
from klab.harness.store.result import Result, Status
from klab.harness.tune.pick import energy_trials
from klab.kernels.contract import NoConfig
from klab.kernels.matmul.problem import Matmul


def trial(name, m):
    return Trial(f"matmul/{name}", "0" * 16, Matmul(m, 64, 64), NoConfig(), CPU.name, Policy())


def row(of, median_us, *, library=False, status=Status.OK):
    return Result.of(of, status, backend="cpu", library=library, run_id="r", median_us=median_us)


def test_winner_runner_up_and_library():
    trials = {(name, m): trial(name, m) for name in ("a", "b", "c", "lib", "slow_lib") for m in (1, 2)}
    times = {"a": 3.0, "b": 1.0, "c": 2.0, "lib": 9.0, "slow_lib": 10.0}
    rows = [row(t, times[name], library=name.endswith("lib")) for (name, m), t in trials.items() if m == 1]
    rows += [row(trials["a", 2], 1.0, status=Status.INCORRECT), row(trials["lib", 2], 4.0, library=True)]
    chosen = energy_trials(list(trials.values()), rows)
    assert [(t.kernel, t.problem.m) for t in chosen] == [("matmul/b", 1), ("matmul/c", 1), ("matmul/lib", 1), ("matmul/lib", 2)]
    assert all(t.policy.energy for t in chosen)
    # Another policy, another key: the time alone does not stand for the energy.
    assert {t.key for t in chosen}.isdisjoint(t.key for t in trials.values())


def test_nothing_measured_nothing_chosen():
    assert energy_trials([trial("a", 1)], []) == []
