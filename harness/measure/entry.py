"""One contestant's record within a contest, and the Result that it ends in."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from klab.harness.measure import environment as places
from klab.harness.measure.session import Answer
from klab.harness.measure.stats import FLOOR_ROUNDS, StoppingRule, counting, is_marked, paired_ratio, spread, throttled
from klab.harness.plan.trial import Policy, Trial
from klab.harness.store.result import Result, Status
from klab.kernels.contract import Json, digest

ENERGY_FIELDS = ("energy_j", "energy_ci_low_j", "energy_ci_high_j", "power_w", "idle_power_w", "energy_reason", "power_trace")


@dataclass(frozen=True)
class Place:
    """Who measures, and where: what every Result of one contest has in common. `data` is a worker's answer to `open`."""

    run_id: str
    environment: Mapping[str, Json]
    kernels: Mapping[str, Mapping[str, Json]]
    data: Mapping[str, Json] = field(default_factory=dict)

    @classmethod
    def of(
        cls, run_id: str, environment: dict[str, Json], kernels: Mapping[str, Mapping[str, Json]], data: Mapping[str, Json], policy: Policy
    ) -> Place:
        """The place where a problem is open. On a CPU the threads belong to its environment, and so to the epoch: those that `open` tells,
        or (for who is skipped before) the policy's.
        """
        threads = data.get("threads") or (policy.threads if environment.get("kind") == "cpu" else 0)
        return cls(run_id, environment | ({"threads": threads} if threads else {}), kernels, data)

    @property
    def rotation(self) -> dict[str, Json]:
        """What shows that the cache was cold: how many sets of how many bytes were walked through, and the cache's size."""
        return {name: self.data[name] for name in ("sets", "set_bytes", "l2_bytes") if name in self.data}


@dataclass(eq=False)
class Entry:
    """A trial under way. A `guest` is a baseline that was measured before and runs along for comparison: it gives no Result."""

    trial: Trial
    slot: int
    guest: bool = False
    library: bool = False
    ready: bool = False
    shape: Answer = field(default_factory=dict)
    samples_us: list[float] = field(default_factory=list)
    states: list[Answer] = field(default_factory=list)
    marked: list[int] = field(default_factory=list)
    spent_s: float = 0.0
    done: bool = False
    energy: Answer = field(default_factory=dict)
    finished: Answer = field(default_factory=dict)
    # Why it is launched one by one: its capture failed and took the worker along.
    not_captured: str = ""

    @property
    def policy(self) -> Policy:
        """The policy to prepare it under: the trial's own, without a graph once one has failed."""
        policy = self.trial.policy
        return dataclasses.replace(policy, launch="events") if self.not_captured and policy.launch == "auto" else policy

    @property
    def rule(self) -> StoppingRule:
        """When it has enough rounds."""
        p = self.trial.policy
        return StoppingRule(p.target_ci, p.min_rounds, p.max_rounds, p.limit_s)

    @property
    def kept(self) -> list[float]:
        """The rounds that count."""
        return counting(self.samples_us, self.marked)

    @property
    def median_us(self) -> float:
        """Of the rounds that count; infinite when there is none."""
        return statistics.median(self.kept) if self.kept else float("inf")

    @property
    def tellable(self) -> bool:
        """True when it was prepared, which is when it was checked, and there are rounds enough for a Result."""
        return bool(self.shape) and len(self.samples_us) >= min(FLOOR_ROUNDS, self.trial.policy.max_rounds)

    @property
    def round_s(self) -> float:
        """Seconds that a round takes, from the calibration."""
        return float(self.shape.get("launches", 1)) * float(self.shape.get("estimate_us", 0.0)) / 1e6

    def add(self, sample: Answer, seconds: float) -> None:
        """Note one round."""
        self.samples_us.append(sample["us"])
        self.states.append(sample)
        self.marked.append(int(is_marked(sample["throttle_reasons"])))
        self.spent_s += seconds

    def forget_after(self, rounds: int) -> None:
        """Drop the rounds of a lap that was not completed, so that equal indices mean equal laps."""
        del self.samples_us[rounds:], self.states[rounds:], self.marked[rounds:]

    def failed(self, place: Place, status: Status, reason: str, answer: Mapping[str, Json]) -> Result:
        """The Result of a contestant that did not come through. Its rounds, where it had any, are not kept: they cannot be trusted."""
        names = ("compile_s", "error", "tolerance", "checks", "wide_error")
        found = {name: answer[name] for name in names if answer.get(name) is not None}
        return _row(self, place, status, reason=reason, **found)

    def measured(self, place: Place, contest: Mapping[str, Json], anchors: Mapping[str, Json] | None = None) -> Result:
        """The Result of a contestant that has its rounds: ok, or throttled. `anchors`: what ran along in the same laps.

        Fewer rounds that count than FLOOR_ROUNDS (or none, of a trial that is only checked) give samples and no time: nobody is to be
        chosen for one.
        """
        shape, kept = self.shape, self.kept
        hot = throttled(self.marked)
        final = {**shape, **self.finished}
        timing: dict[str, Any] = {}
        if len(kept) >= FLOOR_ROUNDS:
            found = spread(kept)
            timing = {
                "median_us": found.median,
                "q1_us": found.q1,
                "q3_us": found.q3,
                "ci_low_us": found.low,
                "ci_high_us": found.high,
            }
        clocks = [s["sm_clock_mhz"] for s, mark in zip(self.states, self.marked, strict=True) if not mark and s["sm_clock_mhz"] is not None]
        not_captured = {"not_captured": self.not_captured} if self.not_captured else {}
        ran_along = {"anchors": dict(anchors)} if anchors else {}
        energy = {name: self.energy[name] for name in ENERGY_FIELDS if self.energy.get(name) is not None}
        if "power_trace" in energy:
            energy["power_trace"] = tuple((at, power) for at, power in energy["power_trace"])
        return _row(
            self,
            place,
            Status.THROTTLED if hot else Status.OK,
            reason=f"the hardware throttled in {sum(self.marked)} of {len(self.marked)} rounds" if hot else "",
            samples_us=tuple(self.samples_us),
            clocks_mhz=tuple(s["sm_clock_mhz"] for s in self.states),
            temperatures_c=tuple(s["temperature_c"] for s in self.states),
            throttle_reasons=tuple(s["throttle_reasons"] for s in self.states),
            marked=tuple(self.marked),
            sm_clock_mhz=statistics.median(clocks) if clocks else None,
            error=final.get("error"),
            tolerance=final.get("tolerance"),
            checks=final.get("checks", 0),
            wide_error=final.get("wide_error"),
            compile_s=shape.get("compile_s"),
            launches_per_round=shape.get("launches", 0),
            launch_mode=shape.get("launch_mode", ""),
            l2_state=shape.get("l2_state", ""),
            build={**shape.get("build", {}), **not_captured, **place.rotation, "contest": dict(contest), **ran_along},
            **timing,
            **energy,
        )


def beside(entry: Entry, baseline: Entry | None, contest_id: str, contestants: int) -> dict[str, Json]:
    """How it stood to the baseline in the same laps: {"id", "contestants", "baseline", "ratio", "ratio_low", "ratio_high"}.

    The ratio is time over the baseline's time (below 1 is faster), paired lap by lap. Results with the same `id` share their laps: the
    n-th sample of each was taken in the same lap.
    """
    found: dict[str, Json] = {"id": contest_id, "contestants": contestants}
    if baseline is None:
        return found
    found["baseline"] = baseline.trial.kernel
    pairs = [
        (a, b)
        for a, b, mark_a, mark_b in zip(entry.samples_us, baseline.samples_us, entry.marked, baseline.marked, strict=False)
        if not (mark_a or mark_b)
    ]
    if baseline is not entry and len(pairs) >= FLOOR_ROUNDS:
        own, other = zip(*pairs, strict=True)
        ratio, low, high = paired_ratio(own, other)
        found |= {"baseline_config": baseline.trial.config.to_json_full(), "ratio": ratio, "ratio_low": low, "ratio_high": high}
    return found


def contest_key(trial: Trial) -> str:
    """Trials with equal keys can share a contest: the same problem, and the same policy but for energy."""
    policy = dataclasses.replace(trial.policy, energy=False, energy_s=0.0)
    return digest({"problem": trial.problem.key, "policy": policy.to_json(), "chip": trial.chip})


class Baseline:
    """Whom the others of a group are compared with: the guest, or the fastest library among them once there are rounds to tell."""

    def __init__(self, group: list[Entry], contest_id: str) -> None:
        self.contest_id = contest_id
        self.contestants = len(group)
        self._group = group
        self.entry: Entry | None = None

    def choose(self) -> None:
        """Choose once; again only if the chosen one has left the group."""
        if self.entry is None or self.entry not in self._group:
            libraries = [e for e in self._group if e.library and e.samples_us]
            self.entry = min(libraries, key=lambda e: (not e.guest, e.median_us), default=None)

    def beside(self, entry: Entry) -> dict[str, Json]:
        """How `entry` stood to the baseline in the same laps."""
        self.choose()
        return beside(entry, self.entry, self.contest_id, self.contestants)


def _row(entry: Entry, place: Place, status: Status, **found: Any) -> Result:
    kernel = place.kernels.get(entry.trial.kernel, {})
    return Result.of(
        entry.trial,
        status,
        backend=kernel.get("backend", ""),
        library=kernel.get("library", False),
        run_id=place.run_id,
        reference_device=place.data.get("reference_device", ""),
        device=place.environment.get("device", ""),
        device_uuid=place.environment.get("uuid", ""),
        epoch=places.epoch(dict(place.environment)),
        environment=place.environment,
        **found,
    )
