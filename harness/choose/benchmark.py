"""The kernels of a model as benchmarks of another framework: measured by the lab's own workers, described in one flat record each."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from klab.harness.choose.candidates import Candidate, candidates, why_not
from klab.harness.choose.compare import best, ratio, tie_set
from klab.harness.fleet.local import Fleet
from klab.harness.plan.roofline import Roofline
from klab.harness.plan.trial import Trial
from klab.harness.store.frame import config_label, gb_per_s, tflops
from klab.harness.store.journal import row_of
from klab.harness.store.result import Result, Status
from klab.harness.tune.job import new_run_id
from klab.harness.tune.objective import LATENCY, counting_rounds
from klab.harness.tune.pick import energy_trials
from klab.kernels.contract import Chip, Json

# Under this name `extra_info` of a benchmark holds the rows that it stands for; `klab import` reads them back.
ROWS = "klab"
NO_ENERGY = {"cuda": "metered for the winner, the runner-up and the best library alone", "cpu": "no power is read on a CPU"}


class Measured:
    """The trials of some problems, each problem measured as one contest when its first trial is asked for."""

    def __init__(
        self, chip: Chip, trials: Sequence[Trial], *, kernel_dirs: Sequence[Path] = (), deadline: float | None = None, energy: bool = True
    ) -> None:
        """`deadline` is a second of time.monotonic(); with `energy`, on GPUs, each problem's winners are metered. CannotMeasure when the
        chip is not here.
        """
        self.chip, self.deadline, self.energy = chip, deadline, energy and chip.kind == "cuda"
        self.rows: dict[str, list[Result]] = defaultdict(list)
        self.stopped: dict[str, str] = {}
        self._contests: dict[str, list[Trial]] = defaultdict(list)
        for trial in trials:
            self._contests[trial.problem.key].append(trial)
        self._fleet = Fleet(chip, new_run_id(), kernel_dirs=kernel_dirs)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._fleet.__exit__(kind, error, trace)

    @property
    def notes(self) -> list[str]:
        """What people must know of the devices."""
        return self._fleet.notes

    def of(self, trial: Trial) -> list[Result]:
        """The rows of a trial: its time, and its energy where that was metered. Empty where the time was not enough to reach it."""
        problem = trial.problem.key
        if problem not in self.stopped:
            self._measure(problem)
        return [row for row in self.rows[problem] if same_kernel(row, trial)]

    def _measure(self, problem: str) -> None:
        found, trials = self.rows[problem], self._contests[problem]
        summary = self._fleet.run(trials, found.append, deadline=self.deadline)
        if self.energy and not summary.stopped:
            summary = self._fleet.run(energy_trials(trials, list(found)), found.append, deadline=self.deadline)
        self.stopped[problem] = summary.stopped

    def all_rows(self) -> list[Result]:
        """Every row that came to be, in the order of the problems."""
        return [row for rows in self.rows.values() for row in rows]


def same_kernel(row: Result, trial: Trial) -> bool:
    """Is it a row of this trial's kernel and configuration (timed or metered)?"""
    return row.kernel == trial.kernel and row.problem_key == trial.problem.key and dict(row.config) == trial.config.to_json_full()


def timed(rows: Sequence[Result]) -> Result | None:
    """The row whose rounds are the benchmark's: the one without energy."""
    return next((row for row in rows if not row.policy.get("energy")), None)


def why_no_time(row: Result) -> str:
    """Why a benchmark of this row fails, or "": a wrong or crashing kernel has no time, and nor has one without counting rounds."""
    if row.status is not Status.OK:
        return f"{row.status.value}: {row.reason or 'no reason was given'}"
    return "" if counting_rounds(row) else "ok, but no round counts"


def extra_info(rows: Sequence[Result], contest: Sequence[Result], chip: Chip) -> dict[str, Json]:
    """What stands beside a benchmark's times: work per second, power, energy, the roofline's share, clock, status, and the verdict against
    the other kernels of its contest. A number that was not measured is null; energy then has its reason. Units are in the names.
    """
    row = timed(rows)
    assert row is not None, "a benchmark has a time"
    metered = next((r for r in rows if r.policy.get("energy")), row)
    bound_us, limit = Roofline(chip, row.math_dtype or str(row.problem.get("dtype", "bfloat16"))).bound(row.flops, row.bytes_moved)
    return {
        "kernel": row.kernel,
        "config": config_label(row),
        "problem": row.problem_label,
        "chip": row.chip,
        "device": row.device,
        "device_uuid": row.device_uuid,
        "epoch": row.epoch,
        "library": row.library,
        "status": row.status.value,
        "verdict": verdict(row, contest),
        "tflops": tflops(row),
        "gb_per_s": gb_per_s(row),
        "roofline_share": bound_us / row.median_us if row.median_us else None,
        "roofline_limit": limit,
        "sm_clock_mhz": row.sm_clock_mhz,
        "power_w": metered.power_w,
        "energy_j": metered.energy_j,
        "energy_reason": metered.energy_reason or ("" if metered.energy_j is not None else NO_ENERGY[chip.kind]),
        "error": row.error,
        "tolerance": row.tolerance,
        "interval_us": [row.ci_low_us, row.ci_high_us],
        "launch_mode": row.launch_mode,
        "l2_state": row.l2_state,
        ROWS: {"rows": [row_of(r) for r in rows]},
    }


def verdict(row: Result, contest: Sequence[Result]) -> str:
    """How a kernel stands among those that were sampled in turns with it, by `klab choose`'s rules; and why not, where they do not hold."""
    reason = why_not(row)
    if reason is not None:
        return f"none: {reason}"
    found = candidates(r for r in contest if not r.policy.get("energy") and why_not(r) is None)
    own = next((c for c in found if row in c.rows), None)
    if own is None:
        return "none: not comparable with the others"
    if len(found) == 1:
        return "alone: nothing to compare with"
    winner = best(found, LATENCY)
    ties = tie_set(found, winner, LATENCY)
    if own in ties:
        return "fastest" if len(ties) == 1 else f"fastest, tied with {len(ties) - 1} of {len(found) - 1}"
    return f"slower: {_ratio(own, winner)} of {winner.kernel}'s time"


def _ratio(one: Candidate, other: Candidate) -> str:
    found = ratio(one, other)
    return f"{found.ratio:.3f} ({found.low:.3f}..{found.high:.3f}) x"


class DeviceTime:
    """A timer that plays back the rounds of a row, in seconds: what a framework that times calls itself is to read instead of a clock.

    Each call of `launch` is one round; `self()` gives 0 before it and the round's time after it, exactly.
    """

    __name__ = "device time of klab's rounds"

    def __init__(self) -> None:
        self._rounds: list[float] = []
        self._reading = 0.0

    def load(self, row: Result) -> int:
        """Take the counting rounds of a row; returns how many there are."""
        self._rounds = [us / 1e6 for us in reversed(counting_rounds(row))]
        return len(self._rounds)

    def launch(self) -> None:
        """The next round; after the last (--benchmark-cprofile asks once more) nothing."""
        self._reading = self._rounds.pop() if self._rounds else 0.0

    def __call__(self) -> float:
        """Seconds, as time.perf_counter would say."""
        reading, self._reading = self._reading, 0.0
        return reading


def names(trials: Sequence[Trial], labels: Callable[[Trial], str] | None = None) -> Mapping[str, str]:
    """By trial key a name that stays the same from night to night: problem and kernel, and only where those are not enough, a digest."""
    plain = {t.key: labels(t) if labels else f"{t.problem.label()} {t.kernel}" for t in trials}
    count: dict[str, int] = defaultdict(int)
    for name in plain.values():
        count[name] += 1
    return {t.key: plain[t.key] if count[plain[t.key]] == 1 else f"{plain[t.key]} {t.key[:8]}" for t in trials}
