"""A history, a policy and nights in a row on made-up processes; and what tests ask of a night."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from night_fleet import NightFleet, write_policy

from klab.harness.watch.history import History
from klab.harness.watch.night import run_night
from klab.harness.watch.policy import read_policy
from klab.harness.watch.tracked import watched
from klab.kernels.contract import Chip

CPU = Chip("cpu", "CPU", "cpu", 1, 2000, 2000, {"float32": 0.05, "bfloat16": 0.05}, 8 << 30, 10.0, 1 << 18)
START = datetime(2026, 11, 1, 2, tzinfo=UTC)
# Norms and activations: one kernel of klab's own and one of torch each.
OWN, LIBRARY = "norm/cpu_blocked", "norm/torch_norm"


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


def verdict(night, words):
    found = [v for v in night.verdicts if all(word in v.series.name for word in words.split())]
    assert len(found) == 1, [v.series.name for v in night.verdicts]
    return found[0]


def calls(night):
    return {v.call for v in night.verdicts}


def slow(factor, kernel=OWN, processes=lambda process: True):
    return lambda trial, process: 100.0 * (factor if trial.kernel == kernel and processes(process) else 1.0)
