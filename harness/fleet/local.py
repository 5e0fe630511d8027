"""Run trials on this machine: one worker process per device, one contest per problem, one lock per device."""

from __future__ import annotations

import queue
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType, TracebackType
from typing import Self

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
    fleet: Fleet | None = None,
    guests: Mapping[str, Trial] | None = None,
    keep_data: bool = False,
    anchors: Sequence[str] = (),
) -> Summary:
    """Measure all trials on every device here that is this chip; `on_result` is called in this thread, once per trial that ended.

    `deadline` is a second of time.monotonic(). When it comes, or when `stop` is set, running trials end with the rounds they have.
    Ctrl-C sets `stop` and is raised as KeyboardInterrupt when all has been handed over; a second one kills the workers. (A caller
    with a handler of its own for SIGINT keeps it, and sets `stop` itself.) A device that another run has locked is left out, with a
    note. CannotMeasure when the chip is not here or all its devices are locked; what `on_result` raises ends the run.

    With a `fleet` its workers are used and stay; otherwise they live for this call. `guests` maps a problem's key to the baseline that
    runs along in its contests for comparison, and gives no Result. `keep_data` and `anchors` as for a Contest.
    """
    if fleet is not None:
        return fleet.run(trials, on_result, deadline=deadline, stop=stop, guests=guests, keep_data=keep_data, anchors=anchors)
    with Fleet(chip, run_id, only_devices=only_devices, kernel_dirs=kernel_dirs, limits=limits) as made:
        return made.run(trials, on_result, deadline=deadline, stop=stop, guests=guests, keep_data=keep_data, anchors=anchors)


class Fleet:
    """The devices of this machine that are a chip, each locked and with a worker of its own from the first run until `close`.

    For many short runs in a row: a worker takes seconds to start. One run at a time.
    """

    def __init__(
        self,
        chip: Chip,
        run_id: str,
        *,
        only_devices: Sequence[str] | None = None,
        kernel_dirs: Sequence[Path | str] = (),
        limits: Limits | None = None,
    ) -> None:
        """CannotMeasure when the chip is not here."""
        self.chip, self.run_id, self.limits = chip, run_id, limits
        self.kernel_dirs = list(kernel_dirs)
        self.notes: list[str] = []
        self.busy_s = 0.0
        """Seconds that the devices were held by contests, added up over the devices."""
        self._chosen = devices(chip, only_devices)
        self._seats: list[Seat] | None = None
        self._locks = ExitStack()
        self._checkout: dict[str, Json] = {}
        self._quarantine = Quarantine()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    @property
    def size(self) -> int:
        """Devices that measure at the same time; before the first run, those that are here."""
        return len(self._chosen if self._seats is None else self._seats)

    def run(
        self,
        trials: Sequence[Trial],
        on_result: Callable[[Result], None],
        *,
        deadline: float | None = None,
        stop: threading.Event | None = None,
        guests: Mapping[str, Trial] | None = None,
        keep_data: bool = False,
        anchors: Sequence[str] = (),
    ) -> Summary:
        """As `run_trials`, with the workers that are there."""
        began = time.monotonic()
        stop = stop or threading.Event()
        summary = Summary(notes=self.notes)

        def tell(result: Result) -> None:
            summary.by_status[result.status] += 1
            on_result(result)

        def contest(seat: Seat, group: Sequence[Trial]) -> Contest:
            return self._contest(seat, group, (guests or {}).get(group[0].problem.key), keep_data, anchors)

        run = _Run(trials, deadline, stop, contest)
        try:
            with _gentle_interrupt(stop):
                run.start(self._ready())
                run.hand_over(tell)
        finally:
            run.end()
            self.busy_s += run.busy_s
            summary.unfinished = run.unfinished
            summary.seconds = time.monotonic() - began
            summary.stopped = "" if not summary.unfinished else "interrupted" if stop.is_set() else "deadline"
        return summary

    def environment(self) -> Mapping[str, Json]:
        """What the first worker says of where it runs; started where it is not."""
        client = self._ready()[0].client
        client.start()
        return client.environment

    def _ready(self) -> list[Seat]:
        """Lock what is free, once; CannotMeasure when another run has locked everything."""
        if self._seats is None:
            self._checkout = environment.checkout()
            seats = []
            for device in self._chosen:
                try:
                    self._locks.enter_context(exclusive(device.id))
                except CannotMeasure as error:
                    self.notes.append(str(error))
                    continue
                seats.append(Seat(device, self._worker(device)))
            if not seats:
                raise CannotMeasure("; ".join(self.notes))
            self._seats = seats
        for seat in self._seats:
            if seat.client.aborted:
                seat.client = self._worker(seat.device)
        return self._seats

    def _worker(self, device: Device) -> WorkerClient:
        return WorkerClient(self.chip, cuda_device=device.cuda_visible, kernel_dirs=self.kernel_dirs)

    def _contest(self, seat: Seat, group: Sequence[Trial], guest: Trial | None, keep_data: bool, anchors: Sequence[str]) -> Contest:
        return Contest(
            seat.client,
            group,
            run_id=self.run_id,
            checkout=self._checkout,
            limits=self.limits,
            quarantine=self._quarantine,
            guest=guest,
            keep_data=keep_data,
            anchors=anchors,
        )

    def refresh(self) -> None:
        """End the workers; the next run starts fresh ones. The devices stay locked."""
        for seat in self._seats or []:
            seat.client.kill()

    def close(self) -> None:
        """End the workers and unlock the devices; calling it twice is fine."""
        for seat in self._seats or []:
            seat.client.kill()
        self._seats = None
        self._locks.close()


@dataclass
class Seat:
    """A locked device and its worker."""

    device: Device
    client: WorkerClient


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


class _Run:
    """One run of a fleet: a thread per device, and the queue from which the caller's thread takes results."""

    def __init__(
        self,
        trials: Sequence[Trial],
        deadline: float | None,
        stop: threading.Event,
        contest: Callable[[Seat, Sequence[Trial]], Contest],
    ) -> None:
        self.stop = stop
        self.busy_s = 0.0
        self._contest = contest
        self._deadline = None if deadline is None else deadline - RESERVE_S
        self._trials = list(trials)
        self._jobs: queue.SimpleQueue[list[Trial]] = queue.SimpleQueue()
        for group in contests(trials):
            self._jobs.put(group)
        # None: a device has no more to do. An exception: it cannot go on.
        self._told: queue.SimpleQueue[Result | BaseException | None] = queue.SimpleQueue()
        self._keys: set[str] = set()
        self._seats: list[Seat] = []
        self._threads: list[threading.Thread] = []
        self._lock = threading.Lock()

    @property
    def unfinished(self) -> list[Trial]:
        """Trials that no Result was handed over for."""
        return [trial for trial in self._trials if trial.key not in self._keys]

    def start(self, seats: Sequence[Seat]) -> None:
        """One thread per device, no more than there are contests."""
        self._seats = list(seats[: max(1, self._jobs.qsize())])
        self._threads = [threading.Thread(target=self._measure, args=(seat,), daemon=True) for seat in self._seats]
        for thread in self._threads:
            thread.start()

    def _measure(self, seat: Seat) -> None:
        busy_s = 0.0
        try:
            while not self._over():
                try:
                    group = self._jobs.get_nowait()
                except queue.Empty:
                    break
                began = time.monotonic()
                try:
                    for result in self._contest(seat, group).run(deadline=self._deadline, stop=self.stop):
                        self._told.put(result)
                finally:
                    busy_s += time.monotonic() - began
        except BaseException as error:  # noqa: BLE001  raised again in the caller's thread
            seat.client.kill()
            self._told.put(error)
        finally:
            with self._lock:
                self.busy_s += busy_s
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
            elif isinstance(item, BaseException):
                broken = broken or item
                self.stop.set()
            else:
                tell(item)
                self._keys.add(item.key)
        if broken is not None:
            raise broken

    def end(self) -> None:
        """End what still runs: nothing does, unless the caller's thread was torn out of its loop."""
        if any(thread.is_alive() for thread in self._threads):
            self.stop.set()
            for seat in self._seats:
                seat.client.abort()
            for thread in self._threads:
                thread.join(timeout=5.0)
