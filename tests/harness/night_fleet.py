"""A fleet of made-up processes for nights: a trial takes what the test says, anchors run beside it, each pass is a fresh process."""

from __future__ import annotations

import json
import math
import random
from types import SimpleNamespace

from tiny_model import CONFIG

from klab.harness.measure import environment
from klab.harness.store.result import Result, Status

POLICY = """
[measure]
processes = 3
{measure}
[[track]]
model = "config.json"
chip = "{chip}"
isl = 32
osl = 8
batch = [2]
phase = "decode"
operators = {operators}
{more}
"""


def write_policy(folder, *, chip="cpu", operators=("norm", "activation"), measure="", more=""):
    """A policy of a small model in a folder, and its path."""
    (folder / "config.json").write_text(json.dumps(CONFIG))
    path = folder / "policy.toml"
    path.write_text(POLICY.format(chip=chip, operators=json.dumps(list(operators)), measure=measure, more=more))
    return path


class Clock:
    """Seconds that pass when the fleet says so."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


class NightFleet:
    """As fleet.local.Fleet. `outcome(trial, process)`: microseconds, a Status, or None for a trial that is not reached.

    Every value has 0.3% of noise of its own and, per process, 1% that the anchor shares. `asked`: (process, trials) of each run.
    """

    run_id, notes, busy_s, size = "made", (), 0.0, 1

    def __init__(self, outcome=lambda trial, process: 100.0, *, seed=0, clock=None, trial_s=1.0, facts=None, energy=None):
        self.outcome, self.clock, self.trial_s = outcome, clock or Clock(), trial_s
        self.facts = {"kind": "cpu", "device": "made", "cpu_model": "made", "threads": 1, "uuid": ""} | (facts or {})
        self.energy = energy
        self.random = random.Random(seed)
        self.process, self.asked, self.anchors = 0, [], []
        self.drift = self._drift()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return None

    def _drift(self):
        return math.exp(self.random.gauss(0, 0.01))

    def refresh(self):
        self.process += 1
        self.drift = self._drift()

    def run(self, trials, on_result, *, deadline=None, stop=None, anchors=(), **_):
        self.asked.append((self.process, list(trials)))
        self.anchors.append(tuple(anchors))
        for trial in trials:
            if (deadline is not None and self.clock.now >= deadline) or (stop is not None and stop.is_set()):
                break
            self.clock.now += self.trial_s
            found = self.outcome(trial, self.process)
            if found is not None:
                on_result(self.row(trial, found))
        return SimpleNamespace(unfinished=[], stopped="", notes=[])

    def row(self, trial, found):
        common = {
            "backend": "cpu", "library": "torch" in trial.kernel, "run_id": "made", "epoch": environment.epoch(self.facts),
            "environment": self.facts, "device": "made", "device_uuid": self.facts["uuid"],
        }  # fmt: skip
        if isinstance(found, Status):
            return Result.of(trial, found, reason="as the test says", **common)
        value = found * self.drift * math.exp(self.random.gauss(0, 0.003))
        samples = tuple(value * (1 + 0.001 * ((i * 7) % 5 - 2)) for i in range(9))
        beside = {name: {"us": [50.0 * self.drift] * 9, "mhz": [None] * 9} for name in ("matmul", "copy")}
        metered = {}
        if trial.policy.energy:
            told = self.energy(trial, self.process) if self.energy else None
            metered = {"energy_j": told} if told else {"energy_reason": "no sensor here"}
        return Result.of(
            trial, Status.OK, samples_us=samples, marked=(0,) * 9, median_us=value, ci_low_us=0.99 * value, ci_high_us=1.01 * value,
            checks=3, error=0.0, tolerance=1.0, l2_state="cold", build={"anchors": beside}, **metered, **common,
        )  # fmt: skip

    @property
    def measured(self):
        """All trials so far, one by one."""
        return [trial for _, trials in self.asked for trial in trials]
