"""Run trials on this machine: one worker process per device, one contest per problem, one lock per device."""

from __future__ import annotations

import queue
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from klab.harness.fleet.devices import Device, devices
from klab.harness.measure import environment
from klab.harness.measure.client import WorkerClient
from klab.harness.measure.contest import Contest, contest_key
from klab.harness.measure.limits import Limits
from klab.harness.measure.lock import exclusive
from klab.harness.measure.quarantine import Quarantine
from klab.harness.plan.trial import Trial
from klab.harness.store.result import Result, Status
from klab.kernels.contract import Chip, Json
from klab.kernels.errors import CannotMeasure

# What starting and ending around the measuring takes (killing a worker that hangs in a launch, up to 0.5 s); so much before the
# deadline the measuring ends.
RESERVE_S = 0.8
POLL_S = 0.2


@dataclass
class Summary:
    """How a run went. `unfinished` are the trials without a Result; `stopped` says why: "deadline", "interrupted" or "".

    `notes` names the devices that were left out, with the reason.
    """

    by_status: Counter[Status] = field(default_factory=Counter)
    unfinished: list[Trial] = field(default_factory=list)
    stopped: str = ""
    seconds: float = 0.0
    notes: list[str] = field(default_factory=list)

    @property
    def results(self) -> int:
        """Results told."""
        return self.by_status.total()


def contests(trials: Iterable[Trial]) -> list[list[Trial]]:
    """Trials grouped by problem and policy, in the order of each group's first trial: what is most valuable stays first."""
    groups: dict[str, list[Trial]] = {}
    for trial in trials:
        groups.setdefault(contest_key(trial), []).append(trial)
    return list(groups.values())


def run_trials(
    trials: Sequence[Trial],
    *,
    chip: Chip,
    run_id: str,
    on_result: Callable[[Result], None],
    only_devices: Sequence[str] | None = None,
    kernel_dirs: Sequence[Path | str] = (),
    deadline: float | None = None,
    stop: threading.Event | None = None,
    limits: Limits | None = None,
) -> Summary:
    """Measure all trials on every device here that is this chip; `on_result` is called in this thread, once per trial that ended.

    `deadline` is a second of time.monotonic(). When it comes, or when `stop` is set, running trials end with the rounds they have.
    Ctrl-C sets `stop` and is raised as KeyboardInterrupt when all has been handed over; a second one kills the workers. (A caller
    with a handler of its own for SIGINT keeps it, and sets `stop` itself.) A device that another run has locked is left out, with a
    note. CannotMeasure when the chip is not here or all its devices are locked; what `on_result` raises ends the run.
    """
    began = time.monotonic()
    chosen = devices(chip, only_devices)
    stop = stop or threading.Event()
    fleet = _Fleet(trials, chip, run_id, kernel_dirs, deadline, stop, limits)
    summary = Summary(notes=fleet.notes)

    def tell(result: Result) -> None:
        summary.by_status[result.status] += 1
        on_result(result)

    try:
        with _gentle_interrupt(stop):
            fleet.start(chosen)
            fleet.hand_over(tell)
    finally:
        fleet.end()
        summary.unfinished = fleet.unfinished
        summary.seconds = time.monotonic() - began
        summary.stopped = "" if not summary.unfinished else "interrupted" if fleet.stop.is_set() else "deadline"
    return summary


@contextmanager
def _gentle_interrupt(stop: threading.Event) -> Iterator[None]:
    """The first Ctrl-C within the block sets `stop` and is raised at its end, so that no result is torn; the second is raised at once."""
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    pressed = False

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal pressed
        if pressed:
            raise KeyboardInterrupt
        pressed = True
        stop.set()

    signal.signal(signal.SIGINT, note)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if pressed:
        raise KeyboardInterrupt


class _Busy(Exception):
    """Another run holds this device."""


class _Fleet:
    """The threads, one per device, and the queue from which the caller's thread takes results."""

    def __init__(
        self,
        trials: Sequence[Trial],
        chip: Chip,
        run_id: str,
        kernel_dirs: Sequence[Path | str],
        deadline: float | None,
        stop: threading.Event,
        limits: Limits | None,
    ) -> None:
        self.stop = stop
        self.notes: list[str] = []
        self._chip, self._run_id, self._kernel_dirs, self._limits = chip, run_id, kernel_dirs, limits
        self._deadline = None if deadline is None else deadline - RESERVE_S
        self._trials = list(trials)
        self._jobs: queue.SimpleQueue[list[Trial]] = queue.SimpleQueue()
        for group in contests(trials):
            self._jobs.put(group)
        # None: a device has no more to do. An exception: it cannot go on.
        self._told: queue.SimpleQueue[Result | BaseException | None] = queue.SimpleQueue()
        self._keys: set[str] = set()
        self._clients: list[WorkerClient] = []
        self._threads: list[threading.Thread] = []
        self._checkout: dict[str, Json] = {}
        self._quarantine = Quarantine()

    @property
    def unfinished(self) -> list[Trial]:
        """Trials that no Result was handed over for."""
        return [trial for trial in self._trials if trial.key not in self._keys]

    def start(self, chosen: Sequence[Device]) -> None:
        """One thread per device, no more than there are contests."""
        self._checkout = environment.checkout()
        for device in chosen[: max(1, self._jobs.qsize())]:
            client = WorkerClient(self._chip, cuda_device=device.cuda_visible, kernel_dirs=self._kernel_dirs)
            self._clients.append(client)
            self._threads.append(threading.Thread(target=self._measure, args=(device, client), daemon=True))
        for thread in self._threads:
            thread.start()

    def _measure(self, device: Device, client: WorkerClient) -> None:
        try:
            with _locked(device):
                while not self._over():
                    try:
                        group = self._jobs.get_nowait()
                    except queue.Empty:
                        break
                    contest = Contest(
                        client, group, run_id=self._run_id, checkout=self._checkout, limits=self._limits, quarantine=self._quarantine
                    )
                    for result in contest.run(deadline=self._deadline, stop=self.stop):
                        self._told.put(result)
        except BaseException as error:  # noqa: BLE001  raised again in the caller's thread
            self._told.put(error)
        finally:
            client.kill()
            self._told.put(None)

    def _over(self) -> bool:
        return self.stop.is_set() or (self._deadline is not None and time.monotonic() >= self._deadline)

    def hand_over(self, tell: Callable[[Result], None]) -> None:
        """Hand results to the caller until every device has ended, then raise what ended one of them early."""
        running = len(self._threads)
        broken: BaseException | None = None
        while running:
            try:
                item = self._told.get(timeout=POLL_S)
            except queue.Empty:
                continue
            if item is None:
                running -= 1
            elif isinstance(item, _Busy):
                self.notes.append(str(item))
            elif isinstance(item, BaseException):
                broken = broken or item
                self.stop.set()
            else:
                tell(item)
                self._keys.add(item.key)
        if broken is not None:
            raise broken
        if len(self.notes) == len(self._threads):
            raise CannotMeasure("; ".join(self.notes))

    def end(self) -> None:
        """End what still runs: nothing does, unless the caller's thread was torn out of its loop."""
        if any(thread.is_alive() for thread in self._threads):
            self.stop.set()
            for client in self._clients:
                client.abort()
            for thread in self._threads:
                thread.join(timeout=5.0)


@contextmanager
def _locked(device: Device) -> Iterator[None]:
    with ExitStack() as stack:
        try:
            stack.enter_context(exclusive(device.id))
        except CannotMeasure as error:
            raise _Busy(str(error)) from error
        yield
