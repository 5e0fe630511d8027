"""Searches of several problems that take turns on the device: while one is measured, the others' next candidates are compiled."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable, Iterator, Sequence

from klab.harness.plan.trial import Trial
from klab.harness.tune.allowance import Allowance
from klab.harness.tune.course import Course
from klab.harness.tune.live import Live, Turn
from klab.harness.tune.pack import SLICE, choose_next, ranking, usual_slice_s
from klab.harness.tune.strategy import Ask, Evaluation

# Problems whose next candidates are known and compiled at the same time.
OPEN_AT_ONCE = 3
# A slice is worth beginning when so many of its candidates are compiled.
LEAST_READY = 4
# Candidates per core that are compiled on the chance of being asked for.
FORESEEN_PER_CORE = 4
POLL_S = 0.02

Told = Callable[[Course, Sequence[Evaluation]], None]


class Searching:
    """The loop over slices. `begin` opens a course's search when its turn comes near."""

    def __init__(self, courses: Sequence[Course], allowance: Allowance, begin: Callable[[Course], None], told: Told) -> None:
        self.courses, self.allowance, self._begin, self._told = courses, allowance, begin, told

    def run(self, live: Live) -> str:
        """Until the allowance is spent, everything is searched, or the job is stopped; says which."""
        while not (over := self._over(live)):
            active = self._active(live.devices)
            if not active:
                return "exhausted"
            turns = self._turns(live, active)
            self._foresee(live, active)
            if not turns:
                live.waited_s += POLL_S
                time.sleep(POLL_S)
            elif not self._affordable(turns):
                return "device seconds"
            elif not self._measure(live, turns):
                return self._over(live) or "time"
        return over

    def _over(self, live: Live) -> str:
        return "interrupted" if live.job.stop.is_set() else self.allowance.search_over(*self._spent(), self._finals())

    def _finals(self) -> int:
        """How many problems have found something that a final must judge."""
        return sum(course.contested for course in self.courses)

    def _spent(self) -> tuple[int, float]:
        return sum(c.evaluations for c in self.courses), sum(c.prospect.spent_s for c in self.courses)

    def _affordable(self, turns: list[tuple[Course, Turn]]) -> bool:
        """False when these slices are expected to take more of the device than is left. The very first is always begun."""
        spent_s = self._spent()[1]
        if not spent_s:
            return True
        usual = usual_slice_s([c.prospect for c in self.courses])
        needed_s = sum(c.prospect.slice_s(usual) * len(turn.ask.candidates) / SLICE for c, turn in turns)
        return needed_s <= self.allowance.search_left_s(spent_s, self._finals())

    def _measure(self, live: Live, turns: list[tuple[Course, Turn]]) -> bool:
        """One slice of each; False when nothing came of it."""
        before = [len(course.found) for course, _ in turns]
        try:
            live.evaluate([turn for _, turn in turns], deadline=self.allowance.search_ends(self._finals()))
        finally:
            moved = False
            for (course, _), count in zip(turns, before, strict=True):
                new = course.found[count:]
                if new:
                    moved = True
                    course.prospect.note((e.value for e in new if e.ok and not e.rounds), sum(e.spent_s for e in new))
                    self._told(course, new)
        return moved

    def _active(self, devices: int) -> list[Course]:
        """The courses worth most now, the best first, each with an open ask."""
        by_key = {c.prospect.key: c for c in self.courses}
        found: list[Course] = []
        for prospect in ranking([c.prospect for c in self.courses]):
            course = by_key[prospect.key]
            if course.search is None:
                self._begin(course)
            if course.open() is not None:
                found.append(course)
            if len(found) == OPEN_AT_ONCE + devices - 1:
                break
        return found

    def _turns(self, live: Live, active: list[Course]) -> list[tuple[Course, Turn]]:
        """A slice for each device, as far as candidates are compiled; their compilation is urgent where they are not."""
        left = self.allowance.evaluations_left(self._spent()[0])
        chosen: list[tuple[Course, Turn]] = []
        waiting = list(active)
        # A budget of the device's seconds is not spent by waiting: then the best is waited for, whoever is ready.
        patience = 0.25 if self.allowance.deadline is not None else 0.75
        while waiting and len(chosen) < live.devices:
            ready = {c.prospect.key for c in waiting if self._ready(live, c)}
            best = choose_next([c.prospect for c in waiting], ready, patience=patience)
            if best is None:
                break
            course = next(c for c in waiting if c.prospect is best)
            waiting.remove(course)
            ask = self._slice(live, course, left)
            if ask.candidates:
                left = None if left is None else left - sum(not course.has(c) for c in ask.candidates)
                assert course.lane is not None and course.search is not None
                chosen.append((course, Turn(course.lane, ask, course.search.answer)))
        return chosen

    def _ready(self, live: Live, course: Course) -> bool:
        ask = course.open()
        assert ask is not None and course.lane is not None
        trials = [course.lane.trial(c, ask.rounds) for c in ask.candidates[: 2 * SLICE]]
        live.hurry(trials[:SLICE])
        live.foresee(trials[SLICE:])
        return sum(live.ready(trial) for trial in trials) >= min(LEAST_READY, len(trials))

    def _slice(self, live: Live, course: Course, left: int | None) -> Ask:
        """The next few of its open ask: the compiled ones, in order; no more new ones than are left."""
        ask = course.open()
        assert ask is not None and course.lane is not None
        ready = [c for c in ask.candidates[: 2 * SLICE] if live.ready(course.lane.trial(c, ask.rounds))][:SLICE]
        if left is not None:
            new = 0
            kept = []
            for candidate in ready:
                new += not course.has(candidate)
                if new <= left or course.has(candidate):
                    kept.append(candidate)
            ready = kept
        return Ask(tuple(ready), ask.rounds)

    def _foresee(self, live: Live, active: list[Course]) -> None:
        """Compile what is likely to be asked for: the neighbours of the best, and what the prior expects most of."""
        if live.compiler is None:
            return
        most = FORESEEN_PER_CORE * len(os.sched_getaffinity(0))
        for course in active[:2]:
            lane = course.lane
            assert lane is not None
            course.foreseen = {c for c in course.foreseen if not live.ready(lane.trial(c))}
            room = most - len(course.foreseen)
            chosen: list[Trial] = []
            for candidate in itertools.islice(_likely(course), 4 * most):
                if len(chosen) >= room:
                    break
                trial = lane.trial(candidate)
                if candidate not in course.foreseen and not live.ready(trial):
                    course.foreseen.add(candidate)
                    chosen.append(trial)
            live.foresee(chosen)


def _likely(course: Course) -> Iterator[int]:
    """Candidates without an outcome, by the likelihood of being asked for; each at most once."""
    assert course.lane is not None and course.search is not None
    best = course.search.trace.best
    near = [] if best is None else [int(c) for c in course.lane.space.neighbours(best.candidate, adjacent=True)]
    seen: set[int] = set()
    for pair in itertools.zip_longest(near, course.by_prior()):
        for candidate in pair:
            if candidate is not None and candidate not in seen and not course.has(candidate):
                seen.add(candidate)
                yield candidate
