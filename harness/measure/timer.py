"""How long does a launch take? One small protocol; the CPU's timer is here, CUDA's is in cuda_timer.py."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from klab.harness.measure.power import PowerMeter, Reading
from klab.harness.measure.rotation import Rotation
from klab.harness.plan.trial import Policy
from klab.kernels.contract import Chip, Launch

# Beyond this the page faults of filling the sets cost more than the problem is worth on a laptop.
CPU_MEMORY_BYTES = int(1.5 * 2**30)
CPU_MAX_SETS = 4096


@dataclass(frozen=True)
class Round:
    """One round: the mean microseconds per launch, and the state of the device while it ran."""

    us: float
    reading: Reading


@dataclass(frozen=True)
class Shape:
    """How the rounds of one contestant are made. `details` goes into the Result's `build`."""

    launches: int
    mode: str
    l2_state: str
    estimate_us: float
    details: dict[str, Any] = field(default_factory=dict)


class Batch(Protocol):
    """A launch made ready to be timed."""

    shape: Shape

    def round(self) -> Round:
        """Time one round."""

    def verify(self) -> None:
        """Run so that the first and the last set are written in the way the rounds write them, and wait."""

    def advance(self) -> int:
        """For a sustained run: see energy.Load."""

    def settle(self) -> None:
        """Wait for everything that is queued."""


class Timer(Protocol):
    """Makes batches on one device."""

    device: str
    memory_bytes: int
    max_sets: int
    can_flush: bool
    l2_bytes: int

    def begin(self, policy: Policy) -> dict[str, Any]:
        """Apply what the policy asks of the device (threads) and say what holds."""

    def batch(self, launch: Launch, rotation: Rotation, policy: Policy) -> Batch:
        """Warm up, choose how to launch, and calibrate the launches per round. Raises whatever the launch raises."""

    def wait(self) -> None:
        """Return when the device is idle; raises what went wrong on it."""

    def free_share(self) -> float:
        """Share of the device's memory that is free."""


def cores() -> int:
    """CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class CpuTimer:
    """perf_counter_ns around a loop of launches that walks through the sets."""

    device = "cpu"
    memory_bytes = CPU_MEMORY_BYTES
    max_sets = CPU_MAX_SETS
    can_flush = False

    def __init__(self, chip: Chip, meter: PowerMeter) -> None:
        self.l2_bytes = chip.l2_bytes
        self._meter = meter
        self.cores = min(chip.sm_count, cores()) if chip.sm_count else cores()

    def begin(self, policy: Policy) -> dict[str, Any]:
        """Set torch's threads to the policy's number, or to the chip's cores."""
        import torch

        torch.set_num_threads(policy.threads or self.cores)
        return {"threads": torch.get_num_threads()}

    def batch(self, launch: Launch, rotation: Rotation, policy: Policy) -> CpuBatch:
        """Warm up for policy.warmup_ms and calibrate."""
        return CpuBatch(launch, rotation, policy, self._meter)

    def wait(self) -> None:
        """A CPU launch has ended when it returns."""

    def free_share(self) -> float:
        """Of the host's memory; 1 where the system does not say."""
        try:
            lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
            return int(lines["MemAvailable"].split()[0]) / int(lines["MemTotal"].split()[0])
        except (OSError, KeyError, ValueError):
            return 1.0


class CpuBatch:
    """Rounds on a CPU. Nothing overlaps, so a round is the loop and nothing else."""

    def __init__(self, launch: Launch, rotation: Rotation, policy: Policy, meter: PowerMeter) -> None:
        self._walk = walk(launch, rotation)
        self._rotation = rotation
        self._launch = launch
        self._meter = meter
        self._ended = 0
        spent_us, launches = 0.0, 0
        while spent_us < policy.warmup_ms * 1e3 or not launches:
            last_us = self._time(1)
            spent_us += last_us
            launches += 1
        # The least of a few: a busy neighbour only ever lengthens a launch, and rounds of one launch would be all noise.
        estimate_us = min(last_us, *(self._time(1) for _ in range(min(launches, 5))))
        self.shape = Shape(max(1, math.ceil(policy.round_ms * 1e3 / estimate_us)), "loop", rotation.l2_state, estimate_us)

    def _time(self, launches: int) -> float:
        """Mean microseconds of so many launches."""
        walk = self._walk
        started = time.perf_counter_ns()
        for _ in range(launches):
            walk()
        return (time.perf_counter_ns() - started) / 1e3 / launches

    def round(self) -> Round:
        """Time shape.launches launches; a warm cache is warmed by one untimed launch, since other contestants ran in between."""
        if self._rotation.l2_state == "warm":
            self._walk()
        us = self._time(self.shape.launches)
        return Round(us, self._meter.read())

    def verify(self) -> None:
        """Launch on the first and the last set."""
        for i in self._rotation.ends:
            self._launch(self._rotation.inputs[i], self._rotation.outputs[i])

    def advance(self) -> int:
        """Run one round's launches."""
        for _ in range(self.shape.launches):
            self._walk()
        self._ended += self.shape.launches
        return self._ended

    def settle(self) -> None:
        """Nothing is ever queued."""


def walk(launch: Launch, rotation: Rotation) -> Callable[[], None]:
    """A function that launches on the next set at each call, for ever."""
    pairs = list(zip(rotation.inputs, rotation.outputs, strict=True))
    at = -1

    def step() -> None:
        nonlocal at
        at = (at + 1) % len(pairs)
        launch(*pairs[at])

    return step
