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


def search(strategy: Strategy, evaluate: Evaluator, budget: Budget, journal: SearchJournal | None = None) -> Trace:
    """Run until the budget is used up, the strategy has no more to ask, or the evaluator ends early.

    What the journal holds is told to the strategy again instead of being evaluated, so a search that was killed goes on exactly where it
    was: the strategy asks the same, and only what has no answer yet is evaluated. UsageError when the journal is of another search.
    """
    trace = Trace()
    known = journal.recorded() if journal else []
    turn = 0
    while not trace.ended:
        ask = _within(strategy.ask(), budget, trace)
        if not ask.candidates:
            trace.ended = trace.ended or _spent(budget, trace) or "exhausted"
            break
        answers: dict[int, Evaluation] = {}
        while turn < len(known) and known[turn].candidate in ask.candidates and known[turn].candidate not in answers:
            answers[known[turn].candidate] = known[turn]
            turn += 1
        if turn < len(known) and len(answers) < len(ask.candidates):
            raise UsageError(f"{journal.path if journal else 'the journal'} records another search; remove it, or start one elsewhere")
        for evaluation in answers.values():
            trace.add(evaluation)
        open_ask = Ask(tuple(c for c in ask.candidates if c not in answers), ask.rounds)
        if open_ask.candidates:
            for evaluation in evaluate(open_ask):
                if journal:
                    journal.append(evaluation)
                answers[evaluation.candidate] = evaluation
                trace.add(evaluation)
        strategy.tell([answers[c] for c in ask.candidates if c in answers])
        if len(answers) < len(ask.candidates):
            trace.ended = "stopped"
        else:
            trace.ended = _spent(budget, trace)
    return trace


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
