"""A search: a strategy asks, an evaluator answers, a budget ends it, a journal lets it go on after a kill."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from klab.harness.tune.search_journal import SearchJournal
from klab.harness.tune.strategy import Ask, Evaluation, Strategy
from klab.kernels.errors import UsageError

Evaluator = Callable[[Ask], Iterator[Evaluation]]
"""Evaluates an ask; yields each evaluation as soon as it stands. It may end early (a deadline, an interrupt)."""


@dataclass(frozen=True)
class Budget:
    """When a search ends; None is no limit. evaluations count distinct candidates; device_s counts `spent_s`."""

    evaluations: int | None = None
    device_s: float | None = None

    def __post_init__(self) -> None:
        if self.evaluations is not None and self.evaluations < 1:
            raise UsageError(f"a budget of {self.evaluations} evaluations is too small for one")
        if self.device_s is not None and not self.device_s > 0:
            raise UsageError(f"a budget of {self.device_s} device seconds is too small for one evaluation")


@dataclass
class Trace:
    """What a search did: evaluations in order, and why it ended: "exhausted", "evaluations", "device seconds" or "stopped"."""

    evaluations: list[Evaluation] = field(default_factory=list)
    ended: str = ""
    _seen: set[int] = field(default_factory=set)
    spent_s: float = 0.0

    def add(self, evaluation: Evaluation) -> None:
        """One more."""
        self.evaluations.append(evaluation)
        self._seen.add(evaluation.candidate)
        self.spent_s += evaluation.spent_s

    @property
    def distinct(self) -> int:
        """Candidates evaluated, each counted once."""
        return len(self._seen)

    def has(self, candidate: int) -> bool:
        """True when this candidate was evaluated, for short or in full."""
        return candidate in self._seen

    @property
    def best(self) -> Evaluation | None:
        """The lowest value among full measurements; of short runs where there is no full one; None when every candidate failed."""
        good = [e for e in self.evaluations if e.ok]
        return min(good, key=lambda e: (e.rounds > 0, e.value), default=None)

    def ranked(self) -> list[Evaluation]:
        """The last evaluation of each candidate that has a value, the lowest first."""
        last = {e.candidate: e for e in self.evaluations}
        return sorted((e for e in last.values() if e.ok), key=lambda e: (e.value, e.candidate))

    def best_after(self) -> list[float]:
        """Per distinct candidate, in order, the best value so far (infinite until one is valid)."""
        best, seen = math.inf, set[int]()
        curve: list[float] = []
        for e in self.evaluations:
            best = min(best, e.value if e.ok else math.inf)
            if e.candidate in seen:
                curve[-1] = best
            else:
                seen.add(e.candidate)
                curve.append(best)
        return curve


class Search:
    """A search in steps, for a caller who runs several at once: take what is open, answer, and again until nothing is open.

    What the journal holds is told to the strategy again instead of being evaluated, so a search that was killed goes on exactly where it
    was: the strategy asks the same, and only what has no answer yet is open.
    """

    def __init__(self, strategy: Strategy, budget: Budget | None = None, journal: SearchJournal | None = None) -> None:
        self.trace = Trace()
        self._strategy, self._budget, self._journal = strategy, budget or Budget(), journal
        self._known = journal.recorded() if journal else []
        self._turn = 0
        self._ask: Ask | None = None
        self._answers: dict[int, Evaluation] = {}

    def open(self) -> Ask | None:
        """What has no answer yet of the last ask, in its order; None when the search has ended (`trace.ended` says why).

        UsageError when the journal is of another search.
        """
        while not self.trace.ended:
            if self._ask is None:
                ask = _within(self._strategy.ask(), self._budget, self.trace)
                if not ask.candidates:
                    self.trace.ended = _spent(self._budget, self.trace) or "exhausted"
                    break
                self._ask, self._answers = ask, {}
                self._replay(ask)
            left = tuple(c for c in self._ask.candidates if c not in self._answers)
            if left:
                return Ask(left, self._ask.rounds)
            self._tell()
        return None

    def _replay(self, ask: Ask) -> None:
        known, asked = self._known, set(ask.candidates)
        while self._turn < len(known) and known[self._turn].candidate in asked and known[self._turn].candidate not in self._answers:
            self._answers[known[self._turn].candidate] = known[self._turn]
            self.trace.add(known[self._turn])
            self._turn += 1
        if self._turn < len(known) and len(self._answers) < len(asked):
            where = self._journal.path if self._journal else "the journal"
            raise UsageError(f"{where} records another search; remove it, or start one elsewhere")

    def answer(self, evaluation: Evaluation) -> None:
        """The outcome of one open candidate: journalled at once, told to the strategy when the ask is complete."""
        if self._journal:
            self._journal.append(evaluation)
        self._answers[evaluation.candidate] = evaluation
        self.trace.add(evaluation)

    def _tell(self) -> None:
        assert self._ask is not None
        told = [self._answers[c] for c in self._ask.candidates if c in self._answers]
        complete = len(told) == len(self._ask.candidates)
        self._ask = None
        self._strategy.tell(told)
        self.trace.ended = _spent(self._budget, self.trace) if complete else "stopped"

    def stop(self) -> None:
        """End it where it is: what the last ask has answers for is told."""
        if self._ask is not None:
            self._tell()
        self.trace.ended = self.trace.ended or "stopped"


def search(strategy: Strategy, evaluate: Evaluator, budget: Budget, journal: SearchJournal | None = None) -> Trace:
    """Run a Search until the budget is used up, the strategy has no more to ask, or the evaluator ends early."""
    made = Search(strategy, budget, journal)
    while (ask := made.open()) is not None:
        answered = 0
        for evaluation in evaluate(ask):
            made.answer(evaluation)
            answered += 1
        if answered < len(ask.candidates):
            made.stop()
    return made.trace


def _within(ask: Ask, budget: Budget, trace: Trace) -> Ask:
    """Cut an ask to the evaluations that are left; re-measuring a known candidate costs none."""
    if budget.evaluations is None:
        return ask
    left = budget.evaluations - trace.distinct
    kept = []
    for candidate in ask.candidates:
        if trace.has(candidate):
            kept.append(candidate)
        elif left > 0:
            kept.append(candidate)
            left -= 1
    return Ask(tuple(kept), ask.rounds)


def _spent(budget: Budget, trace: Trace) -> str:
    if budget.evaluations is not None and trace.distinct >= budget.evaluations:
        return "evaluations"
    if budget.device_s is not None and trace.spent_s >= budget.device_s:
        return "device seconds"
    return ""
