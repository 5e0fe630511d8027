"""Candidates on a device: known results and refused or equal code cost nothing, the rest is measured in contests with the baseline."""

import dataclasses
import math

import pytest
from contest import CPU
from fake_fleet import FakeFleet

from klab.harness.plan.trial import Policy, Trial
from klab.harness.store.result import Status
from klab.harness.tune import job as jobs
from klab.harness.tune.course import make_space
from klab.harness.tune.job import Job
from klab.harness.tune.live import Lane, Live, Turn, evaluator
from klab.harness.tune.screen import Screened
from klab.harness.tune.search import Budget, search
from klab.harness.tune.strategy import Ask, Prior, find_strategy
from klab.kernels.discover import discover
from klab.kernels.matmul.problem import Matmul

POLICY = Policy(warmup_ms=1.0, min_rounds=6, max_rounds=10, round_ms=0.3, limit_s=1.0, threads=1)
PROBLEM = Matmul(32, 256, 64, "float32")


def time_of(trial):
    return 100.0 + len(trial.config.label()) + (trial.config.block_m if trial.kernel == "matmul/cpu_blocked" else 0)


class Compiler:
    """A farm that compiles nothing: `codes` names the machine code of a configuration, `refuses` what it drops."""

    def __init__(self, codes, refuses=()):
        self.codes, self.refuses, self.urgent, self.ahead = codes, refuses, [], []

    def submit(self, trials, *, urgent=False):
        (self.urgent if urgent else self.ahead).extend(trials)

    def done(self, trial):
        return self.wait(trial)

    def wait(self, trial, *, deadline=None):
        if trial.config in self.refuses:
            return Screened(trial, Status.SCREENED, "spills", "spills: 900 B of stack per thread")
        function = {"sass_hash": self.codes(trial.config), "launch": "1", "threads": 128, "smem_bytes": 0}
        return Screened(trial, Status.OK, "", "", functions=[function])


@pytest.fixture
def place(tmp_path, monkeypatch):
    """(job, fleet, lane) on a made-up CPU."""
    catalogue = discover()
    kernels = {k.id: k for k in catalogue.of("matmul") if "cpu" in k.kinds}
    fleet = FakeFleet(time_of)
    monkeypatch.setattr(jobs, "Fleet", fleet)
    blocked = kernels["matmul/cpu_blocked"]
    library = next(k for k in kernels.values() if k.library)
    guest = Trial.of(library, PROBLEM, library.default(PROBLEM, CPU), "cpu", POLICY)
    lane = Lane(make_space(PROBLEM, [blocked], CPU), PROBLEM, kernels, POLICY, "cpu", guest)
    job = Job(CPU, tmp_path / "rows")
    with job.session():
        yield job, fleet, lane


def as_compiled(lane):
    """The same kernels, as if they went through a compiler."""
    return {name: dataclasses.replace(kernel, backend="triton") for name, kernel in lane.kernels.items()}


def test_the_evaluator_measures_with_the_baseline_beside_and_stores_every_row(place):
    job, fleet, lane = place
    live = Live(job, lane.kernels)
    trace = search(find_strategy("exhaustive").make(lane.space, 0, Prior()), evaluator(live, lane), Budget())
    assert trace.ended == "exhausted" and trace.distinct == len(lane.space) == 8
    assert trace.best.value == min(time_of(lane.trial(c)) for c in range(len(lane.space)))
    assert all(guests == {PROBLEM.key: lane.guest} for guests in fleet.guests)
    assert {row.key for row in job.stored()} == {lane.trial(c).key for c in range(len(lane.space))}
    assert all(e.spent_s >= 0 for e in trace.evaluations)


def test_what_the_store_knows_of_this_epoch_costs_nothing(place, tmp_path):
    job, fleet, lane = place
    told = []
    Live(job, lane.kernels).evaluate([Turn(lane, Ask((0, 1, 2)), told.append)])
    later = Job(CPU, tmp_path / "rows")
    with later.session():
        again = []
        Live(later, lane.kernels).evaluate([Turn(lane, Ask((0, 1, 2, 3)), again.append)])
    assert [e.value for e in again[:3]] == [e.value for e in told]
    assert [e.spent_s == 0 for e in again] == [True, True, True, False]
    assert [t.config for t in fleet.asked[-1]] == [lane.trial(3).config]


def test_a_short_run_has_few_rounds_and_so_has_the_baseline_beside_it(place):
    job, fleet, lane = place
    told = []
    Live(job, lane.kernels).evaluate([Turn(lane, Ask((0, 1), rounds=3), told.append)])
    assert all(t.policy.max_rounds == t.policy.min_rounds == 3 for t in fleet.measured)
    assert fleet.guests[0][PROBLEM.key].policy.max_rounds == 3
    assert all(e.rounds == 3 and e.ok for e in told), "three rounds make no interval, but a value"
    assert len({t.key for t in fleet.measured} | {lane.trial(c).key for c in (0, 1)}) == 4, "a short run is no full one"


def test_what_the_compiler_refuses_never_meets_the_device_and_is_a_row_once(place):
    job, fleet, lane = place
    refused = lane.trial(2).config
    live = Live(job, as_compiled(lane), Compiler(lambda config: config.label(), refuses=[refused]))
    told = []
    live.evaluate([Turn(lane, Ask((1, 2, 3)), told.append)])
    live.evaluate([Turn(lane, Ask((2,), rounds=4), told.append)])
    assert refused not in [t.config for t in fleet.measured]
    found = {e.candidate: e for e in told}
    assert found[2].status is Status.SCREENED and found[2].value == math.inf and found[2].spent_s == 0 and found[1].ok
    rows = [row for row in job.stored() if row.status is Status.SCREENED]
    assert len({row.key for row in rows}) == len(rows) and "900 B" in rows[0].reason


def test_equal_machine_code_is_measured_once(place):
    job, fleet, lane = place
    odd = {lane.trial(c).config for c in range(1, len(lane.space), 2)}
    live = Live(job, as_compiled(lane), Compiler(lambda config: "odd" if config in odd else config.label()))
    told = []
    live.evaluate([Turn(lane, Ask((1, 2, 3)), told.append)])
    live.evaluate([Turn(lane, Ask((5, 7)), told.append)])
    values = {e.candidate: e for e in told}
    assert len(fleet.measured) == 2
    assert values[1].value == values[3].value == values[5].value == values[7].value
    assert values[7].spent_s == 0


def test_the_twin_of_one_that_failed_is_measured_itself(place):
    job, fleet, lane = place
    fails = lane.trial(1).config
    fleet.outcome = lambda trial: Status.CRASHED if trial.config == fails else time_of(trial)
    live = Live(job, as_compiled(lane), Compiler(lambda config: "the same"))
    told = []
    live.evaluate([Turn(lane, Ask((1, 2)), told.append)])
    assert [(e.candidate, e.ok) for e in told] == [(1, False), (2, True)]


def test_failures_are_infinite_and_their_kind_is_told(place):
    job, fleet, lane = place
    fleet.outcome = lambda trial: Status.INCORRECT
    told = []
    Live(job, lane.kernels).evaluate([Turn(lane, Ask((0,)), told.append)])
    assert told[0].status is Status.INCORRECT and not told[0].ok
    assert job.stored()[0].status is Status.INCORRECT


def test_past_the_deadline_nothing_is_begun(place):
    job, fleet, lane = place
    told = []
    Live(job, lane.kernels).evaluate([Turn(lane, Ask((0, 1)), told.append)], deadline=0.0)
    assert told == [] and fleet.asked == []
