"""What comes of a request within a contest when it is not an answer."""

from __future__ import annotations

from collections.abc import Mapping

from klab.harness.measure.client import WorkerHung
from klab.harness.measure.entry import Entry
from klab.harness.measure.faults import from_outside, is_of_device
from klab.harness.store.result import Status
from klab.kernels.contract import Json
from klab.kernels.errors import CannotMeasure


class OutOfTime(Exception):
    """The deadline has come."""


class Lost(Exception):
    """The worker is gone; `entry` did it, or nobody (while the data was made)."""

    def __init__(self, entry: Entry | None, status: Status, reason: str, answer: Mapping[str, Json] | None = None) -> None:
        super().__init__(reason)
        self.entry, self.status, self.reason, self.answer = entry, status, reason, answer or {}


class Again(Exception):
    """The worker must be replaced, and nobody is to blame."""


class NoContest(Exception):
    """The problem itself cannot be set up here."""

    def __init__(self, status: Status, reason: str) -> None:
        super().__init__(reason)
        self.status, self.reason = status, reason


DEVICE_LOST = "the device is lost"


class DeviceLost(CannotMeasure):
    """The device measured before, and now no worker comes up on it; begins with DEVICE_LOST. Whoever ran on it is not blamed."""

    def __init__(self, why: str) -> None:
        super().__init__(f"{DEVICE_LOST}: {why}")


class Losses:
    """What a contest has lost so far, and who is to be blamed for it."""

    def __init__(self) -> None:
        self._openings = 0
        self._excused: set[int] = set()
        self._last = ""

    def blames(self, lost: Lost) -> bool:
        """Is its contestant out? What came from outside is forgiven once.

        Where nobody was at it, the data could not be made: at the second time NoContest, or DeviceLost where that is what it says.
        """
        entry = lost.entry
        if entry is None:
            self._last = lost.reason
            self._openings += 1
            if self._openings > 1 and is_of_device(lost.reason):
                raise DeviceLost(lost.reason)
            if self._openings > 1:
                raise NoContest(lost.status, f"while the data of the problem was made: {lost.reason}")
            return False
        self._last = f"{lost.reason} ({entry.trial.kernel} on {entry.trial.problem.label()} ran)"
        if from_outside(lost.reason) and entry.slot not in self._excused:
            self._excused.add(entry.slot)
            return False
        return True

    def no_worker(self, error: Exception, *, was_up: bool) -> CannotMeasure:
        """What to raise when none comes up; `was_up`: one did before."""
        why = f"the measuring process does not start: {error}" if isinstance(error, WorkerHung) else str(error)
        return DeviceLost("; ".join(filter(None, (self._last, why)))) if was_up else CannotMeasure(why)
