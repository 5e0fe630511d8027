"""Looks: the same trials in several fresh processes, in passes of alternating order, as far as the time goes."""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Callable, Sequence

from klab.harness.fleet.run import NO_DEVICE, AnyFleet
from klab.harness.plan.trial import Trial
from klab.harness.store.result import Result, Status
from klab.kernels.errors import CannotMeasure

# What ends a trial by its own fault. It is not tried again in the same look: a hang costs its whole time limit each time.
FAILED = (Status.INCORRECT, Status.CRASHED, Status.TIMEOUT, Status.OUT_OF_MEMORY, Status.COMPILE_ERROR)

SKIPPED = "skipped: "
"""How the reason of a row begins that was not run, because its kernel hung or crashed on another problem (measure/quarantine.py)."""

Group = tuple[Trial, ...]
"""The trials of one problem: they are measured together, so that drift is common to them."""


def failed(row: Result) -> bool:
    """Did it end by its own fault?"""
    return row.status in FAILED and not row.reason.startswith(SKIPPED)


class Looks:
    """Every row of a night, by trial and by look. `lost`: why nothing can be measured any more, "" while it can."""

    def __init__(
        self,
        fleet: AnyFleet,
        on_result: Callable[[Result], None],
        *,
        anchors: Sequence[str] = (),
        stop: threading.Event | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._fleet, self._on_result, self._anchors = fleet, on_result, tuple(anchors)
        self._stop = stop or threading.Event()
        self._clock = clock
        self._passes = 0
        self.lost = ""
        # Trial key -> look -> its rows, in the order of the processes.
        self.rows: dict[str, dict[int, list[Result]]] = defaultdict(lambda: defaultdict(list))

    @property
    def stopped(self) -> bool:
        """Did somebody ask to end?"""
        return self._stop.is_set()

    def take(self, look: int, groups: Sequence[Group], processes: int, deadline: float | None) -> list[Group]:
        """Measure the groups in so many fresh processes each; returns those that were not reached, in their order.

        The first pass may use its share of the time alone: so many groups are begun as can be ended in all processes. What time the later
        passes leave (compilers have been there) goes to the groups that were left out.
        """
        left = list(groups)
        while left and self._time(deadline):
            began = self._clock()
            share = None if deadline is None else began + (deadline - began) / processes
            self._pass(look, left, share)
            reached = [group for group in left if any(self.rows[trial.key].get(look) for trial in group)]
            if not reached:
                break
            for turn in range(1, processes):
                if not self._time(deadline):
                    break
                ordered = reached if turn % 2 == 0 else [group[::-1] for group in reached[::-1]]
                self._pass(look, ordered, deadline)
            left = [group for group in left if group not in reached]
        return left

    def of(self, trial: Trial, looks: Sequence[int]) -> list[list[Result]]:
        """The rows of a trial, one list per look, in the order of the processes."""
        taken = self.rows.get(trial.key, {})
        return [list(taken.get(look, ())) for look in looks]

    def all_rows(self) -> list[Result]:
        """Every row of the night."""
        return [row for taken in self.rows.values() for look in taken.values() for row in look]

    def _time(self, deadline: float | None) -> bool:
        return not self.stopped and not self.lost and (deadline is None or self._clock() < deadline)

    def _pass(self, look: int, groups: Sequence[Group], deadline: float | None) -> None:
        if self._passes:
            self._fleet.refresh()
        self._passes += 1
        wanted = {trial.key: trial for group in groups for trial in group if not self._gave_up(trial, look)}

        def store(row: Result) -> None:
            self._on_result(row)
            self.rows[row.key][look].append(row)

        if not wanted:
            return
        try:
            ended = self._fleet.run(list(wanted.values()), store, deadline=deadline, stop=self._stop, anchors=self._anchors)
        except CannotMeasure as error:  # a device fell off the bus, a disk is full: what stands is judged all the same
            if not self.rows:
                raise
            self.lost = str(error)
        else:
            if ended.stopped == NO_DEVICE:
                self.lost = "; ".join([NO_DEVICE, *self._fleet.notes][:3])

    def _gave_up(self, trial: Trial, look: int) -> bool:
        """Did it fail in this look, or was it wrong in any?"""
        rows = self.rows.get(trial.key, {})
        wrong = any(row.status is Status.INCORRECT for taken in rows.values() for row in taken)
        return wrong or any(failed(row) for row in rows.get(look, ()))
