"""What a tuning run may spend, over all its problems together: evaluations, seconds of the device, time on the clock."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field

from klab.harness.tune.search import Budget

# Of a budget, so much is kept for the finals; of one in time no more than so many seconds for each that there will be.
FINALS_SHARE, FINAL_S = 0.25, 20.0
# One that meters energy: five windows of about 14 s for each of two or three.
ENERGY_FINAL_S = 200.0
# While nothing has beaten a default there is nothing to judge: so much is kept, for what the last slice may find.
SPARE_S = 3.0


@dataclass(frozen=True)
class Allowance:
    """None is no limit. `deadline` is a second of time.monotonic() for everything, `began` when the run began.

    final_s_most: what one final is reserved at most. final_s_limit: what one takes at most, however much is left.
    evaluations: distinct candidates that searches may have an outcome for, those of an interrupted run included. device_s: seconds of the
    device, likewise. UsageError for one that is too small for anything.
    """

    evaluations: int | None = None
    device_s: float | None = None
    deadline: float | None = None
    began: float = field(default_factory=time.monotonic)
    final_s_most: float = FINAL_S
    final_s_limit: float = math.inf

    def __post_init__(self) -> None:
        Budget(self.evaluations, self.device_s)

    def left_s(self) -> float:
        """Seconds until everything must end."""
        return math.inf if self.deadline is None else self.deadline - time.monotonic()

    def search_ends(self, finals: int = 1) -> float | None:
        """The second at which searching ends, so that so many finals have their share of the time."""
        if self.deadline is None:
            return None
        share = FINALS_SHARE * max(self.deadline - self.began, 0.0)
        return self.deadline - min(share, self.final_s_most * finals if finals else SPARE_S)

    def search_over(self, evaluations: int, device_s: float, finals: int = 1) -> str:
        """Why searching must end after so much, or "" while it may go on."""
        ends = self.search_ends(finals)
        if ends is not None and time.monotonic() >= ends:
            return "time"
        if self.evaluations is not None and evaluations >= self.evaluations:
            return "evaluations"
        return "device seconds" if self.search_left_s(device_s, finals) <= 0 else ""

    def search_left_s(self, device_s: float, finals: int = 1) -> float:
        """Seconds of the device that searches may still take when they took so many, with so many finals to come."""
        return math.inf if self.device_s is None else (1.0 - FINALS_SHARE * bool(finals)) * self.device_s - device_s

    def evaluations_left(self, evaluations: int) -> int | None:
        """How many more distinct candidates."""
        return None if self.evaluations is None else max(self.evaluations - evaluations, 0)

    def final_s(self, share: float, spent_s: float = 0.0) -> float:
        """Seconds of a final that has this share of what is left when so many of the device were spent; infinite without any limit."""
        left = max(self.left_s(), 0.0)
        if self.device_s is not None:
            left = min(left, max(self.device_s - spent_s, 0.0))
        return min(share * left if math.isfinite(left) else math.inf, self.final_s_limit)
