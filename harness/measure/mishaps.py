"""What comes of a request within a contest when it is not an answer."""

from __future__ import annotations

from collections.abc import Mapping

from klab.harness.measure.entry import Entry
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
