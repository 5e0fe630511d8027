"""Trial: one kernel, one problem, one configuration, one chip and one way of measuring. Its key is its identity in the store."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from klab.kernels.contract import Config, Json, Kernel, Problem, Record, digest


@dataclass(frozen=True)
class Policy(Record):
    """How a trial is measured. It is part of the trial's identity: a warm time and a cold time are different facts.

    l2: "cold" rotates through copies of the inputs that together exceed the last-level cache five times; "warm" repeats one set.
    launch: "graph" (CUDA graph), "events", or "auto": graph for kernels below 100 us.
    sm_clock_mhz, power_limit_w: what the device was set to for this trial (tune/clock_control.py sets it); 0: as its owner has it.
    """

    l2: str = "cold"
    launch: str = "auto"
    warmup_ms: float = 50.0
    min_rounds: int = 15
    max_rounds: int = 200
    round_ms: float = 4.0
    target_ci: float = 0.005
    limit_s: float = 6.0
    energy: bool = False
    energy_s: float = 6.0
    threads: int = 0
    seed: int = 0
    sm_clock_mhz: int = 0
    power_limit_w: float = 0.0

    @property
    def setting(self) -> dict[str, float]:
        """The clock and the limit that were set, by name; empty where the device was left as it is."""
        return {name: value for name in ("sm_clock_mhz", "power_limit_w") if (value := getattr(self, name))}


@dataclass(frozen=True)
class Trial:
    """What is to be measured. `key` does not depend on the machine or the day: a Result adds those."""

    kernel: str
    source_digest: str
    problem: Problem
    config: Config
    chip: str
    policy: Policy

    @classmethod
    def of(cls, kernel: Kernel, problem: Problem, config: Config, chip: str, policy: Policy) -> Trial:
        """A trial of this kernel as its file is now."""
        return cls(kernel.id, kernel.source_digest, problem, config, chip, policy)

    def to_json(self) -> dict[str, Json]:
        """The form that goes to a worker and into a Result."""
        return {
            "kernel": self.kernel,
            "source_digest": self.source_digest,
            "operator": self.problem.operator,
            "problem": self.problem.to_json(),
            "config": self.config.to_json_full(),
            "chip": self.chip,
            "policy": self.policy.to_json(),
        }

    @property
    def key(self) -> str:
        """Hash of the canonical JSON of everything above."""
        return digest(self.to_json())

    def with_policy(self, **changes: object) -> Trial:
        """The same trial under a policy with these fields replaced."""
        return dataclasses.replace(self, policy=dataclasses.replace(self.policy, **changes))  # type: ignore[arg-type]
