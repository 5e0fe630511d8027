"""The anchors of a contest under way: they are made ready, take their turn in every lap, and fail without costing anybody a row."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from klab.harness.measure.anchor import ANCHORS
from klab.harness.measure.limits import Limits
from klab.harness.measure.mishaps import Again, Lost
from klab.harness.measure.session import Answer
from klab.harness.measure.stats import is_marked
from klab.harness.store.result import Status
from klab.kernels.contract import Json
from klab.kernels.errors import UsageError


class Ask(Protocol):
    """Contest's way of asking its worker. Lost when the worker is gone; nobody (None) is to blame."""

    def __call__(self, entry: None, operation: str, limit_s: float, *, name: str) -> Answer:
        """The worker's answer."""


@dataclass(eq=False)
class AnchorRun:
    """An anchor's rounds within one group of a contest: entry i is of lap i. `reason` says why there are no more."""

    name: str
    ready: bool = False
    reason: str = ""
    crashes: int = 0
    what: str = ""
    round_s: float = 0.0
    us: list[float] = field(default_factory=list)
    mhz: list[float | None] = field(default_factory=list)
    marked: list[int] = field(default_factory=list)

    @property
    def usable(self) -> bool:
        """Does it have a round in the next lap?"""
        return self.ready and not self.reason

    def made_ready(self, answer: Mapping[str, Any]) -> None:
        """Note what the worker said to `anchor`."""
        self.ready, self.what = True, answer.get("what", "")
        self.round_s = float(answer.get("launches", 1)) * float(answer.get("estimate_us", 0.0)) / 1e6

    def add(self, sample: Mapping[str, Any]) -> None:
        """Note one round."""
        self.us.append(sample["us"])
        self.mhz.append(sample["sm_clock_mhz"])
        self.marked.append(int(is_marked(sample["throttle_reasons"])))

    def forget_after(self, rounds: int) -> None:
        """Drop the rounds of a lap that was not completed."""
        del self.us[rounds:], self.mhz[rounds:], self.marked[rounds:]

    def to_json(self, rounds: int) -> dict[str, Json]:
        """For a Result that took part in so many laps."""
        found: dict[str, Json] = {"us": self.us[:rounds], "mhz": self.mhz[:rounds]}
        if any(self.marked[:rounds]):
            found["marked"] = self.marked[:rounds]
        return found | ({"what": self.what} if self.what else {}) | ({"reason": self.reason} if self.reason else {})


class Anchors:
    """Those of one contest, in the order named. UsageError for an unknown name."""

    def __init__(self, names: Iterable[str], ask: Ask, limits: Limits) -> None:
        names = tuple(names)
        if unknown := sorted(set(names) - set(ANCHORS)):
            raise UsageError(f"unknown anchor {', '.join(unknown)}; known: {', '.join(ANCHORS)}")
        self._ask, self._limits = ask, limits
        self.runs = [AnchorRun(name) for name in names]

    def next_group(self) -> None:
        """Begin anew for other contestants; what has failed stays out."""
        self.runs = [AnchorRun(run.name, reason=run.reason) for run in self.runs]

    @property
    def lap_s(self) -> float:
        """Seconds that the anchors add to a lap."""
        return sum(1.5 * run.round_s + 0.005 for run in self.runs if run.usable)

    def prepare(self, remaining_s: float) -> None:
        """Make ready those that are not. Again when one of them took the worker along."""
        for run in self.runs:
            if not run.ready and not run.reason:
                self._try(run, "anchor", self._limits.preparing_s(remaining_s), run.made_ready)

    def sample(self, run: AnchorRun, remaining_s: float) -> None:
        """One round. Again as in `prepare`."""
        self._try(run, "sample_anchor", self._limits.sampling_s(run.round_s, remaining_s), run.add)

    def _try(self, run: AnchorRun, operation: str, limit_s: float, take: Callable[[Answer], None]) -> None:
        """One that takes the worker along is tried once more, since what a contestant broke may show only now; one that hangs is not."""
        try:
            answer = self._ask(None, operation, limit_s, name=run.name)
        except Lost as lost:
            run.crashes += 1
            if lost.status is Status.TIMEOUT or run.crashes > 1:
                run.reason = lost.reason
            raise Again from lost
        except UsageError as error:  # a worker of an older klab knows no anchors
            run.reason = str(error)
            return
        if answer["status"] == Status.OK.value:
            take(answer)
        else:
            run.reason = answer.get("reason", "") or answer["status"]

    def in_turn(self, contestants: Sequence[Any], lap: int) -> list[Any]:
        """Who has a round in this lap, in order: the anchors at the ends, all reversed in every other lap."""
        usable = [run for run in self.runs if run.usable]
        half = math.ceil(len(usable) / 2)
        order = [*usable[:half], *contestants, *usable[half:]]
        return order if lap % 2 == 0 else order[::-1]

    def start_anew(self, laps: int | None) -> None:
        """The worker is gone: be prepared again, and keep so many whole laps (all, where None)."""
        for run in self.runs:
            run.ready = False
            if laps is not None:
                run.forget_after(laps)

    def to_json(self, rounds: int) -> dict[str, Json]:
        """For the `build["anchors"]` of a Result that took part in so many laps."""
        return {run.name: run.to_json(rounds) for run in self.runs}
