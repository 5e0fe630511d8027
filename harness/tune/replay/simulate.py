"""One search on a recorded space, on a clock that counts what the chip was busy then: compiling and benchmarking, failures included."""

from __future__ import annotations

import bisect
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

from klab.harness.tune.replay.recorded import RecordedSpace
from klab.harness.tune.search import Budget, Trace, search
from klab.harness.tune.strategy import Ask, Evaluation, Prior, find_strategy
from klab.kernels.contract import Json
from klab.kernels.errors import UsageError

MARKS = (20, 50, 100, 200, 400)
"""Budgets, in distinct candidates, at which strategies are compared."""


@dataclass(frozen=True)
class Step:
    """The search changed its mind: after `evaluations` distinct candidates and `seconds`, its best is one that takes `value_us` in full."""

    evaluations: int
    seconds: float
    value_us: float


@dataclass(frozen=True)
class Run:
    """One run of one strategy: enough to recompute every figure of the scoreboard, in well under a kilobyte.

    evaluations: distinct candidates it evaluated. seconds: simulated seconds at the end; mark_seconds: at each of MARKS, nan
    beyond the end. ended: why, as in Trace; what a peer raised where it failed.
    """

    seed: int
    steps: tuple[Step, ...]
    evaluations: int
    seconds: float
    mark_seconds: tuple[float, ...]
    ended: str = ""

    def best_us(self, evaluations: int) -> float:
        """What its choice after so many distinct candidates takes in full, infinite where it has none; after its end, its last."""
        at = bisect.bisect_right(self.steps, evaluations, key=lambda s: s.evaluations)
        return self.steps[at - 1].value_us if at else math.inf

    def best_us_by(self, seconds: float) -> float:
        """The same after so many simulated seconds."""
        at = bisect.bisect_right(self.steps, seconds, key=lambda s: s.seconds)
        return self.steps[at - 1].value_us if at else math.inf

    def seconds_within(self, limit_us: float) -> float:
        """Simulated seconds after which its choice takes no more than `limit_us` and stays so; infinite when it never does."""
        reached = math.inf
        for step in reversed(self.steps):
            if step.value_us > limit_us:
                break
            reached = step.seconds
        return reached

    def to_json(self) -> dict[str, Json]:
        """Numbers rounded to 7 digits, which is below what a timer resolves."""
        return {
            "seed": self.seed,
            "steps": [[s.evaluations, _digits(s.seconds), _digits(s.value_us)] for s in self.steps],
            "evaluations": self.evaluations,
            "seconds": _digits(self.seconds),
            "mark_seconds": [None if math.isnan(s) else _digits(s) for s in self.mark_seconds],
            "ended": self.ended,
        }

    @classmethod
    def from_json(cls, row: dict[str, Json]) -> Self:
        """The inverse."""
        steps = tuple(Step(n, seconds, value) for n, seconds, value in row["steps"])
        marks = tuple(math.nan if s is None else s for s in row["mark_seconds"])
        return cls(row["seed"], steps, row["evaluations"], row["seconds"], marks, row["ended"])


def simulate(recorded: RecordedSpace, strategy_name: str, *, seed: int, budget: Budget, prior: Prior | None = None) -> Trace:
    """Search the recorded space as if it were a chip. UsageError for an unknown strategy, or a space where nothing is valid."""
    require_valid(recorded)
    strategy = find_strategy(strategy_name).make(recorded.space, seed, prior or Prior())
    compiled: set[int] = set()

    def evaluate(ask: Ask) -> Iterator[Evaluation]:
        for e in recorded.evaluate(ask):
            again = e.candidate in compiled
            compiled.add(e.candidate)
            # What was compiled for a short run is not compiled again for the full one. Unrecorded times are nan.
            spent_s = e.spent_s - float(recorded.compile_s[e.candidate]) if again else e.spent_s
            yield Evaluation(e.candidate, e.value, e.status, e.rounds, spent_s if math.isfinite(spent_s) else 0.0)

    return search(strategy, evaluate, budget)


def candidate_s(recorded: RecordedSpace) -> NDArray[np.float64]:
    """(candidates,) seconds that evaluating each takes: compiled and benchmarked then, also where it failed; 0 where not recorded."""
    found: NDArray[np.float64] = np.nan_to_num(recorded.compile_s + recorded.benchmark_s, nan=0.0)
    return found


def require_valid(recorded: RecordedSpace) -> None:
    """UsageError when every candidate failed: there is nothing to find."""
    if not math.isfinite(recorded.optimum_us):
        raise UsageError(f"{recorded.name}: none of its {len(recorded.space):,} candidates is valid, so there is no optimum to find")


def run_of(recorded: RecordedSpace, trace: Trace, seed: int) -> Run:
    """What a search did, as a Run. A choice is judged by its recorded full time, also where the search saw only a short run of it."""
    return _run(recorded, trace.evaluations, seed, trace.ended)


def run_of_sequence(recorded: RecordedSpace, candidates: Sequence[int], seed: int, ended: str = "") -> Run:
    """What a search that evaluated these candidates in full, in this order, found and took; repeats cost nothing."""
    cost_s = candidate_s(recorded)
    order = dict.fromkeys(candidates)
    made = (Evaluation(c, float(recorded.time_us[c]), recorded.status[c], spent_s=float(cost_s[c])) for c in order)
    return _run(recorded, made, seed, ended)


def _run(recorded: RecordedSpace, evaluations: Iterable[Evaluation], seed: int, ended: str) -> Run:
    seen: set[int] = set()
    steps: list[Step] = []
    marks = dict.fromkeys(MARKS, math.nan)
    seconds = 0.0
    best = (True, math.inf)
    for e in evaluations:
        seconds += e.spent_s
        seen.add(e.candidate)
        if len(seen) in marks:
            marks[len(seen)] = seconds
        if e.ok and (e.rounds > 0, e.value) < best:
            best = (e.rounds > 0, e.value)
            steps.append(Step(len(seen), seconds, float(recorded.time_us[e.candidate])))
    return Run(seed, tuple(steps), len(seen), seconds, tuple(marks.values()), ended)


def _digits(value: float) -> float:
    return float(f"{value:.7g}")
