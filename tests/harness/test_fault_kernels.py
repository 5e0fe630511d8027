"""Faults of kernels, injected into a real worker: each is a row of a stated status, costs nobody else one, and fails a night so."""

import dataclasses
import os
import signal
from pathlib import Path

import pytest
from fault_table import JUDGED, KERNELS, RATES, fault, noticed
from night_fleet import NightFleet
from night_lab import OWN, Lab, verdict

from klab.harness.measure import session as sessions
from klab.harness.measure.client import WorkerClient
from klab.harness.measure.contest import Contest
from klab.harness.measure.limits import Limits
from klab.harness.measure.power import NullMeter
from klab.harness.measure.session import Session
from klab.harness.measure.timer import CpuTimer
from klab.harness.plan.trial import Policy, Trial
from klab.harness.store.result import Status
from klab.harness.watch.night import exit_code
from klab.kernels.contract import Chip
from klab.kernels.discover import discover
from klab.kernels.matmul.problem import Matmul

CONTESTANTS = Path(__file__).with_name("contestants")
CHIP = Chip("cpu", "CPU", "cpu", 1, 2000, 2000, {"float32": 0.05}, 8 << 30, 10.0, 1 << 18)
PROBLEM = Matmul(8, 48, 64, "float32")
# Rounds enough for `fades` to fade.
POLICY = Policy(warmup_ms=1.0, round_ms=1.0, min_rounds=20, max_rounds=30, limit_s=5.0, threads=1)
LIMITS = Limits(prepare_s=4.0)


@pytest.fixture(scope="module")
def catalogue():
    return discover([CONTESTANTS])


@pytest.fixture(scope="module")
def client():
    client = WorkerClient(CHIP, kernel_dirs=[CONTESTANTS])
    yield client
    client.kill()


def run(client, catalogue, names):
    kernels = [catalogue.kernels[f"matmul/{name}"] for name in names]
    wanted = [Trial.of(kernel, PROBLEM, kernel.default(PROBLEM, CHIP), "cpu", POLICY) for kernel in kernels]
    contest = Contest(client, wanted, run_id="r", limits=LIMITS)
    rows = {row.kernel.split("/")[1]: row for row in contest.run()}
    assert contest.unfinished == []
    return rows


@pytest.fixture(scope="module")
def rows(client, catalogue):
    """Of one contest in which everybody takes part."""
    return run(client, catalogue, ["good", *(one.name for one in KERNELS)])


@pytest.fixture(scope="module")
def small_catalogue():
    return discover(only=("norm", "activation", "embedding"))


@pytest.fixture
def lab(tmp_path, small_catalogue):
    lab = Lab(tmp_path, small_catalogue, operators=("norm",))
    lab.nights(8)
    return lab


class Replay(NightFleet):
    """A night in which klab's own kernel ends as a row did."""

    def __init__(self, row):
        super().__init__(lambda trial, process: row.status if trial.kernel == OWN and row.status is not Status.OK else 100.0)
        self.reason = row.reason

    def row(self, trial, found):
        made = super().row(trial, found)
        return made if made.status is Status.OK else dataclasses.replace(made, reason=self.reason)


def judged(lab, row, declared):
    night = lab.night(Replay(row))
    found = verdict(night, "norm chosen")
    assert (found.call, exit_code(night)) == (declared.verdict, declared.exit_code), found.reason
    assert declared.says in found.reason
    assert verdict(night, "norm library").call == "ok", "the other series is judged as ever"


@pytest.mark.parametrize("name", [one.name for one in KERNELS])
def test_a_fault_of_a_kernel_is_its_row_and_its_verdict(rows, lab, name):
    row, declared = rows[name], fault(name)
    assert (row.status, row.median_us, row.samples_us) == (declared.row, None, ()), row.reason
    assert declared.says in row.reason and row.epoch, row.reason
    judged(lab, row, declared)


def test_nobody_pays_for_the_faults_of_others(rows):
    assert rows["good"].status is Status.OK and len(rows["good"].samples_us) >= POLICY.min_rounds and rows["good"].checks == 4


def killing(client, times):
    """Have the worker killed by SIGKILL at the third round after each start, so often."""
    asked, left = client.ask, [times, 3]

    def ask(operation, **fields):
        if operation == "hello":
            left[1] = 3
        if operation == "sample" and left[0]:
            left[1] -= 1
            if not left[1]:
                left[0] -= 1
                os.kill(client.pid, signal.SIGKILL)
        return asked(operation, **fields)

    return ask


@pytest.mark.parametrize(("name", "times"), [("worker-killed", 1), ("worker-killed-twice", 2)])
def test_a_worker_that_is_killed_from_outside_costs_no_row_unless_it_happens_again(client, catalogue, lab, monkeypatch, name, times):
    declared = fault(name)
    monkeypatch.setattr(client, "ask", killing(client, times))
    row = run(client, catalogue, ["half_speed"])["half_speed"]
    assert row.status == declared.row and declared.says in row.reason
    judged(lab, row, declared)


@pytest.mark.parametrize("rate", [rate for rate in RATES if rate >= 0.1])
def test_an_error_by_chance_is_noticed_as_often_as_the_page_says(catalogue, monkeypatch, rate):
    """The real checks on launches that are wrong with a probability; what is left out is memory's tidying, which takes the time."""
    import random

    import torch

    monkeypatch.setattr(sessions, "release", lambda device: None)
    torch.set_num_threads(1)
    meter = NullMeter("none")
    session = Session(CHIP, catalogue, CpuTimer(CHIP, meter), meter)
    session.open("matmul", PROBLEM.to_json(), POLICY.to_json())
    dice, asked = random.Random(7), [0]

    def errs(inputs, outputs):
        torch.matmul(inputs["x"], inputs["w"].T, out=outputs["out"])
        asked[0] += 1
        if dice.random() < rate:
            outputs["out"][0, 0] += 1.0

    tries, met = 400, 0
    policy = dataclasses.replace(POLICY, warmup_ms=0.0, round_ms=0.0)
    for _ in range(tries):
        answer = session._make_ready(0, errs, policy)
        if answer["status"] == "ok":
            answer = session.finish(0)
            assert answer["status"] == "incorrect" or answer["checks"] == 4
        met += answer["status"] == "incorrect"
    expected = noticed(rate, JUDGED)
    assert abs(met / tries - expected) < 4 * (expected * (1 - expected) / tries) ** 0.5 + 1e-3
