"""Power meters behind one small protocol: NVML (in nvml.py), nothing at all, or a recording."""

from __future__ import annotations

import bisect
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class Reading:
    """The state of a device at one moment. None means that it could not be read, never zero."""

    sm_clock_mhz: float | None = None
    temperature_c: float | None = None
    throttle_reasons: int | None = None
    power_w: float | None = None


class PowerMeter(Protocol):
    """What measuring needs of a sensor. No method raises: what cannot be read is None, and `trouble` says why in one line."""

    trouble: str

    def read(self) -> Reading:
        """Clock, temperature, throttle reasons and power, now."""

    def power_w(self) -> float | None:
        """Power of the board in watts, over the shortest window that the sensor has."""

    def energy_j(self) -> float | None:
        """The board's energy counter in joules since some fixed moment; it moves in steps."""


class NullMeter:
    """For machines without a sensor: everything is None, with the reason."""

    def __init__(self, trouble: str = "no power sensor") -> None:
        self.trouble = trouble

    def read(self) -> Reading:
        """Nothing is known."""
        return Reading()

    def power_w(self) -> float | None:
        """None."""
        return None

    def energy_j(self) -> float | None:
        """None."""
        return None


@dataclass(frozen=True)
class Frame:
    """One line of a recording: what the sensor showed from `at_s` on."""

    at_s: float
    reading: Reading
    energy_j: float | None


class ReplayMeter:
    """Shows a recording at the pace of `clock`: the last frame at or before now, and nothing once `ends_s` has passed."""

    def __init__(self, frames: Sequence[Frame], *, ends_s: float = float("inf"), clock: Callable[[], float] = time.perf_counter) -> None:
        if not frames:
            raise ValueError("a recording has at least one frame")
        self.trouble = ""
        self._frames = sorted(frames, key=lambda frame: frame.at_s)
        self._times = [frame.at_s for frame in self._frames]
        self._ends_s = ends_s
        self._clock = clock
        self._started = clock()

    def _frame(self) -> Frame:
        now = self._clock() - self._started
        if now > self._ends_s:
            self.trouble = "the recording has ended"
            return Frame(now, Reading(), None)
        return self._frames[max(bisect.bisect_right(self._times, now) - 1, 0)]

    def read(self) -> Reading:
        """The reading of this moment."""
        return self._frame().reading

    def power_w(self) -> float | None:
        """The power of this moment."""
        return self._frame().reading.power_w

    def energy_j(self) -> float | None:
        """The counter of this moment."""
        return self._frame().energy_j
