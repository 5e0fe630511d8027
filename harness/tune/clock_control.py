"""Power limit and SM clock as things to tune: only where the owner of the machine said so, and put back on every exit.

Nothing here is called without `--allow-clock-control`. What was is written to a file before it is changed, and the file goes when it is
restored: a process that is killed leaves it behind for the next start or `klab doctor`. The file is locked (flock) while its process
lives, so that nobody takes a running one for a dead one.
"""

from __future__ import annotations

import atexit
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from types import FrameType
from typing import Any

from klab.harness.measure import nvml as sensors
from klab.harness.tune.clock_state import Before, StateFile, left_changed, state_path
from klab.kernels.errors import CannotMeasure, UsageError

OPTION = "--allow-clock-control"
# A signal that ends a process without unwinding it, were it not for a handler.
ENDING = (signal.SIGTERM, signal.SIGHUP)


@dataclass(frozen=True)
class Axes:
    """What may be set: SM clocks in MHz and power limits in W, each highest first; `power_limit_w` is the limit now."""

    sm_clocks_mhz: tuple[int, ...]
    power_limits_w: tuple[float, ...]
    power_limit_w: float


@contextmanager
def clock_control(device: str, *, allowed: bool, library: Any = None) -> Iterator[ClockControl]:
    """Control of one GPU (by UUID) within the block; whatever is set in it is put back at its end, however that comes.

    UsageError without `allowed` (the option). CannotMeasure without NVML, for an unknown device, and while another process controls it.
    What a killed process left changed is put back first. `library` stands in for pynvml.
    """
    if not allowed:
        raise UsageError(f"setting clocks or the power limit of {device} changes the machine for all its users: it needs {OPTION}")
    control = ClockControl(device, _library(library))
    with _ending_signals(control.restore):
        atexit.register(control.last_resort)
        try:
            yield control
        finally:
            # A second Ctrl-C in here leaves the rest to the exit of the process.
            try:
                control.restore()
            except CannotMeasure:
                control.end()
                raise
            control.end()


class ClockControl:
    """One GPU under control; made by `clock_control`."""

    def __init__(self, device: str, library: Any) -> None:
        self.device, self._nvml = device, library
        try:
            self._handle = sensors.handle_of(library, uuid=device)
        except library.NVMLError as error:
            raise CannotMeasure(f"NVML does not know {device}: {error}") from None
        self._process = os.getpid()
        self._file = StateFile(state_path(device))
        self._before, self._ended = Before(device), False
        try:
            left = self._file.read()
            if left is not None:
                self._before = left
                self.restore()
        except CannotMeasure:
            self.end()
            raise
        self._before, self._ended = Before(device), False

    def axes(self, *, clocks: int = 6, limits: int = 4) -> Axes:
        """So many values of each at most, spread evenly from the highest to the lowest. CannotMeasure if the board tells none."""
        nvml, handle = self._nvml, self._handle
        least, most = self._ask("its power limits", lambda: nvml.nvmlDeviceGetPowerManagementLimitConstraints(handle))
        now = self._ask("its power limit", lambda: nvml.nvmlDeviceGetPowerManagementLimit(handle))
        # Whole watts; the limit that stands is always among them.
        even = {round((most - n * (most - least) / max(limits - 1, 1)) / 1000) for n in range(limits)}
        watts = sorted({float(w) for w in even if least <= w * 1000 <= most} | {now / 1000}, reverse=True)
        return Axes(tuple(_spread(self._clocks(), clocks)), tuple(watts), now / 1000)

    def set(self, *, sm_clock_mhz: int | None = None, power_limit_w: float | None = None) -> None:
        """Lock the SM clock, set the power limit, or both; what is None stays as it is.

        UsageError for a value that the board does not take. CannotMeasure, with everything put back, where this user may not.
        NVML does not tell a lock that somebody else had set on the clock: putting back lifts it as well.
        """
        if self._ended:
            raise CannotMeasure(f"the control of {self.device} has ended")
        nvml, handle = self._nvml, self._handle
        if sm_clock_mhz is not None and sm_clock_mhz not in (known := self._clocks()):
            raise UsageError(f"{self.device} takes SM clocks of {known[-1]} to {known[0]} MHz in its own steps, not {sm_clock_mhz}")
        if power_limit_w is not None:
            least, most = self._ask("its power limits", lambda: nvml.nvmlDeviceGetPowerManagementLimitConstraints(handle))
            if not least <= power_limit_w * 1000 <= most:
                raise UsageError(f"{self.device} takes power limits of {least / 1000:g} to {most / 1000:g} W, not {power_limit_w:g}")
            limit = self._before.power_limit_mw
            if limit is None:
                limit = int(self._ask("its power limit", lambda: nvml.nvmlDeviceGetPowerManagementLimit(handle)))
            note = Before(self.device, limit, self._before.clocks_locked)
            self._change("power limit", note, lambda: nvml.nvmlDeviceSetPowerManagementLimit(handle, round(power_limit_w * 1000)))
        if sm_clock_mhz is not None:
            note = Before(self.device, self._before.power_limit_mw, True)
            self._change("SM clock", note, lambda: nvml.nvmlDeviceSetGpuLockedClocks(handle, sm_clock_mhz, sm_clock_mhz))

    def restore(self) -> None:
        """Put back what was changed, and end the control; calling it again does nothing. CannotMeasure names what could not be put back."""
        if os.getpid() != self._process:
            return  # a fork's exit is not ours
        self._ended = True
        self.put_back()

    def put_back(self) -> None:
        """Put back what was changed; more may be set afterwards. CannotMeasure as `restore`."""
        before, nvml, handle = self._before, self._nvml, self._handle
        left, trouble = before, ""
        if before.clocks_locked:
            try:
                nvml.nvmlDeviceResetGpuLockedClocks(handle)
                left = Before(self.device, left.power_limit_mw, False)
            except nvml.NVMLError as error:
                trouble = str(error)
        if before.power_limit_mw is not None:
            try:
                nvml.nvmlDeviceSetPowerManagementLimit(handle, before.power_limit_mw)
                now = nvml.nvmlDeviceGetPowerManagementLimit(handle)
                if now == before.power_limit_mw:
                    left = Before(self.device, None, left.clocks_locked)
                else:
                    trouble = f"its power limit is {now / 1000:g} W after it was set to {before.power_limit_mw / 1000:g} W"
            except nvml.NVMLError as error:
                trouble = str(error)
        self._before = left
        if left != Before(self.device):
            raise CannotMeasure(f"{self.device} could not be put back ({trouble}); the owner types: {left.remedy}")
        self._file.clear()

    def last_resort(self) -> None:
        """At the exit of the process: put back if that has not happened yet; what cannot be put back stays noted."""
        if os.getpid() == self._process:
            with suppress(CannotMeasure):
                self.restore()
            self._file.close()

    def end(self) -> None:
        """Give up the lock on the note, which stays where something is still changed, and do nothing at the exit of the process."""
        self._file.close()
        atexit.unregister(self.last_resort)

    def _clocks(self) -> list[int]:
        """SM clocks that the board takes at its highest memory clock, highest first."""
        nvml, handle = self._nvml, self._handle
        memory = self._ask("its memory clocks", lambda: nvml.nvmlDeviceGetSupportedMemoryClocks(handle))
        found = self._ask("its SM clocks", lambda: nvml.nvmlDeviceGetSupportedGraphicsClocks(handle, max(memory)))
        return sorted({int(clock) for clock in found}, reverse=True)

    def _ask(self, what: str, question: Callable[[], Any]) -> Any:
        try:
            return question()
        except self._nvml.NVMLError as error:
            raise CannotMeasure(f"{self.device} does not tell {what}: {error}") from None

    def _change(self, what: str, note: Before, change: Callable[[], Any]) -> None:
        """Note what was, then change it."""
        before = self._before
        if note != before:
            self._file.write(note)
            self._before = note
        try:
            change()
        except self._nvml.NVMLError as error:
            refused = getattr(error, "value", None) == self._nvml.NVML_ERROR_NO_PERMISSION
            if refused:
                self._before = before  # who may not set it may not put it back either, and need not
            self.restore()
            if refused:
                raise CannotMeasure(
                    f"this user may not set the {what} of {self.device}: run as root (in a container: with CAP_SYS_ADMIN), "
                    f"or leave out {OPTION}"
                ) from None
            raise CannotMeasure(f"the {what} of {self.device} cannot be set: {error}") from None


def _spread(values: list[int], count: int) -> list[int]:
    """The first, the last and others evenly between, `count` at most."""
    if len(values) <= count:
        return values
    return [values[round(n * (len(values) - 1) / max(count - 1, 1))] for n in range(count)]


def _library(given: Any) -> Any:
    if given is not None:
        return given
    try:
        return sensors.load()
    except ImportError:
        raise CannotMeasure(f"{OPTION} needs nvidia-ml-py: pip install nvidia-ml-py") from None
    except Exception as error:  # noqa: BLE001  NVMLError, and whatever a broken driver library raises
        raise CannotMeasure(f"{OPTION} needs NVML: {error}") from None


@contextmanager
def _ending_signals(restore: Callable[[], None]) -> Iterator[None]:
    """Within the block, a signal that would end the process at once restores first and then unwinds it (SystemExit).

    A handler that somebody else has set stays: it ends the process in its own way, and that leads through the block's end. Outside the
    main thread no handler can be set; the file tells the next start.
    """

    def end(number: int, frame: FrameType | None) -> None:
        with suppress(CannotMeasure):
            restore()
        raise SystemExit(128 + number)

    ours = []
    if threading.current_thread() is threading.main_thread():
        ours = [number for number in ENDING if signal.getsignal(number) is signal.SIG_DFL]
    for number in ours:
        signal.signal(number, end)
    try:
        yield
    finally:
        for number in ours:
            signal.signal(number, signal.SIG_DFL)


def put_back(*, allowed: bool, library: Any = None) -> list[Before]:
    """Put back what processes that are gone have left changed; returns what that was. UsageError and CannotMeasure as `clock_control`."""
    left = left_changed()
    for before in left:
        with clock_control(before.device, allowed=allowed, library=library):
            pass  # entering it puts back
    return left
