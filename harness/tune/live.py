"""Evaluate candidates on the device of this machine: compiled ahead by the farm, measured in interleaved contests, every end a row."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Protocol

from klab.harness.plan.trial import Policy, Trial
from klab.harness.store.result import Result, Status
from klab.harness.tune.job import Job, screened_row
from klab.harness.tune.objective import counting_rounds, latency
from klab.harness.tune.screen import NOT_SCREENED, Screened
from klab.harness.tune.space import Space, config_of
from klab.harness.tune.strategy import Ask, Evaluation
from klab.kernels.contract import Json, Kernel, Problem

COMPILED = ("triton", "cuda")
# Rows of a run that was cut short need so many seconds before its end: nothing is begun that late.
LEAST_S = 1.0


class Compiler(Protocol):
    """What compiles ahead: `farm.Farm`, or a test's stand-in."""

    def submit(self, trials: Iterable[Trial], *, urgent: bool = False) -> None:
        """Queue them and return."""

    def wait(self, trial: Trial, *, deadline: float | None = None) -> Screened:
        """The verdict, waited for."""

    def done(self, trial: Trial) -> Screened | None:
        """The verdict, or None while there is none."""


@dataclass
class Lane:
    """One problem on the device: its space, its kernels by id, how it is measured in full, and the baseline that runs along."""

    space: Space
    problem: Problem
    kernels: Mapping[str, Kernel]
    policy: Policy
    chip: str
    guest: Trial | None = None
    twins: dict[tuple[Json, ...], float] = field(default_factory=dict)

    def trial(self, candidate: int, rounds: int = 0) -> Trial:
        """A candidate as a trial: in full, or a short run of so many rounds."""
        kernel, config = config_of(self.space.point(candidate), self.kernels)
        return Trial.of(kernel, self.problem, config, self.chip, short(self.policy, rounds) if rounds else self.policy)


def short(policy: Policy, rounds: int) -> Policy:
    """The same way of measuring, stopped after so many rounds."""
    return Policy.from_json({**policy.to_json(), "min_rounds": rounds, "max_rounds": rounds})


@dataclass(frozen=True)
class Turn:
    """Candidates of one problem that are to be evaluated now, and who hears of each."""

    lane: Lane
    ask: Ask
    answer: Callable[[Evaluation], None]

    def trial(self, candidate: int) -> Trial:
        """One of them."""
        return self.lane.trial(candidate, self.ask.rounds)

    def trials(self) -> list[Trial]:
        """All of them."""
        return [self.trial(candidate) for candidate in self.ask.candidates]

    @property
    def guest(self) -> Trial | None:
        """The baseline that runs along, for as many rounds."""
        guest, rounds = self.lane.guest, self.ask.rounds
        return replace(guest, policy=short(guest.policy, rounds)) if guest and rounds else guest


Told = Callable[[Trial, Result, float], None]
"""Hears how a trial ended, and the seconds that the device was held for it (0 for what was known or never ran)."""


class Live:
    """The device side of a tuning run. Known results of this epoch cost nothing; what the compiler refuses never meets the device."""

    def __init__(self, job: Job, kernels: Mapping[str, Kernel], compiler: Compiler | None = None, *, devices: int = 1) -> None:
        self.job, self.kernels, self.compiler, self.devices = job, kernels, compiler, devices
        self.waited_s = 0.0
        """Seconds in which the device stood idle because nothing was compiled yet."""

    def foresee(self, trials: Iterable[Trial]) -> None:
        """Have these compiled when the cores have nothing more urgent."""
        if self.compiler is not None:
            self.compiler.submit([trial for trial in trials if self._compiles(trial)])

    def hurry(self, trials: Iterable[Trial]) -> None:
        """Have these compiled before anything that was only foreseen."""
        if self.compiler is not None:
            self.compiler.submit([trial for trial in trials if self._compiles(trial)], urgent=True)

    def ready(self, trial: Trial) -> bool:
        """True when it could be measured, or told of, without waiting for a compiler."""
        return not self._compiles(trial) or self.compiler is None or self.compiler.done(trial) is not None

    def _compiles(self, trial: Trial) -> bool:
        return self.kernels[trial.kernel].backend in COMPILED

    def settle(
        self,
        trials: Sequence[Trial],
        told: Told,
        *,
        deadline: float | None = None,
        guests: Mapping[str, Trial] | None = None,
        keep_data: bool = False,
    ) -> None:
        """Bring every trial to its end: known, refused by the compiler, or measured. Those that the deadline leaves are not told of.

        KeyboardInterrupt passes when what was finished is stored and told.
        """
        todo = []
        for trial in trials:
            known = None if self.job.again else self.job.standing(trial)
            refused = None if known else self._refused(trial, deadline)
            if known or refused:
                told(trial, known or refused, 0.0)  # type: ignore[arg-type]
            else:
                todo.append(trial)
        if not todo or (deadline is not None and time.monotonic() + LEAST_S > deadline) or self.job.stop.is_set():
            return
        by_key = {trial.key: trial for trial in todo}
        last = time.monotonic()

        def tell(result: Result) -> None:
            nonlocal last
            now = time.monotonic()
            told(by_key[result.key], result, now - last)
            last = now

        self.job.measure(todo, tell, deadline=deadline, guests=guests, keep_data=keep_data)

    def _refused(self, trial: Trial, deadline: float | None) -> Result | None:
        """The row of a candidate that the compiler refused, stored once; None for one that is to be measured."""
        if self.compiler is None or not self._compiles(trial):
            return None
        found = self._wait(self.compiler, trial, deadline)
        if found.status is Status.OK or found.rule in (NOT_SCREENED, "duplicate"):
            return None
        return self.job.dropped(screened_row(found, self.kernels[trial.kernel], self.job.run_id))

    def evaluate(self, turns: Sequence[Turn], *, deadline: float | None = None) -> None:
        """Answer for each candidate of each turn as soon as it is known; those that the deadline leaves have no answer.

        Turns of different problems share the devices there are. A candidate whose machine code and launch equal those of one that was
        measured has that one's value, at no cost.
        """
        owners = {trial.key: (turn, c) for turn in turns for c in turn.ask.candidates if (trial := turn.trial(c))}
        self.hurry(trial for turn in turns for trial in turn.trials())
        todo, later = [], []
        asked: set[tuple[Json, ...]] = set()
        for turn in turns:
            for candidate in turn.ask.candidates:
                code = self._code(turn, candidate, deadline)
                if code and (code in turn.lane.twins or code in asked):
                    later.append((turn, candidate, code))
                    continue
                asked.add(code)
                todo.append(turn.trial(candidate))
        at_once = min(self.devices, len(turns))

        def told(trial: Trial, result: Result, spent_s: float) -> None:
            turn, candidate = owners[trial.key]
            found = evaluation(candidate, result, turn.ask.rounds, spent_s * at_once)
            if found.ok and (code := self._code(turn, candidate, deadline)):
                turn.lane.twins[code] = found.value
            turn.answer(found)

        guests = {turn.lane.problem.key: guest for turn in turns if (guest := turn.guest)}
        self.settle(todo, told, deadline=deadline, guests=guests, keep_data=True)
        for turn, candidate, code in later:
            if code in turn.lane.twins:
                turn.answer(Evaluation(candidate, turn.lane.twins[code], rounds=turn.ask.rounds))
            else:  # its twin failed or was not reached
                self.settle([turn.trial(candidate)], told, deadline=deadline, guests=guests, keep_data=True)

    def _code(self, turn: Turn, candidate: int, deadline: float | None) -> tuple[Json, ...]:
        """What is equal for candidates that are the same machine code launched alike, measured alike; () where that is not known."""
        trial = turn.trial(candidate)
        if self.compiler is None or not self._compiles(trial):
            return ()
        found = self._wait(self.compiler, trial, deadline)
        # A duplicate's code is as good as its twin's, which the search may not have asked for.
        signature = (replace(found, status=Status.OK) if found.rule == "duplicate" else found).signature
        return () if signature is None else (turn.ask.rounds, *signature)

    def _wait(self, compiler: Compiler, trial: Trial, deadline: float | None) -> Screened:
        began = time.monotonic()
        found = compiler.wait(trial, deadline=deadline)
        self.waited_s += time.monotonic() - began
        return found


def evaluation(candidate: int, result: Result, rounds: int, spent_s: float) -> Evaluation:
    """What a Result says of a candidate: its median time; of a short run, the median of the rounds it had."""
    if result.status is not Status.OK:
        return Evaluation(candidate, math.inf, result.status, rounds, spent_s)
    time_us = latency(result)
    samples = counting_rounds(result)
    if rounds and samples:
        return Evaluation(candidate, statistics.median(samples), rounds=rounds, spent_s=spent_s)
    if time_us is None:
        return Evaluation(candidate, math.inf, Status.THROTTLED, rounds, spent_s)
    return Evaluation(candidate, time_us.median, rounds=rounds, spent_s=spent_s)


def evaluator(live: Live, lane: Lane, *, deadline: float | None = None) -> Callable[[Ask], Iterator[Evaluation]]:
    """`search.search`'s evaluator for one problem on this device."""

    def evaluate(ask: Ask) -> Iterator[Evaluation]:
        found: list[Evaluation] = []
        live.evaluate([Turn(lane, ask, found.append)], deadline=deadline)
        yield from found

    return evaluate


@contextmanager
def compiling(job: Job, kernels: Iterable[Kernel], *, jobs: int | None = None) -> Iterator[Compiler | None]:
    """A farm for these kernels while the block lasts; None where none of them is compiled."""
    if not any(kernel.backend in COMPILED for kernel in kernels):
        yield None
        return
    from klab.harness.tune.farm import Farm

    with (
        job.compilers(job.chip) as compilers,
        Farm(job.chip, kernel_dirs=job.kernel_dirs, jobs=jobs, on_done=job.listener.screened, compilers=compilers) as farm,
    ):
        yield farm
