"""One run of a fleet: a thread per device that takes contests from the board, and the queue from which the caller's thread takes rows."""

from __future__ import annotations

import queue
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType, TracebackType
from typing import Protocol, Self

from klab.harness.fleet.board import POLL_S, Board
from klab.harness.plan.trial import Trial
from klab.harness.store.result import Result, Status
from klab.kernels.contract import Json
from klab.kernels.errors import CannotMeasure

# What starting and ending around the measuring takes (killing a worker that hangs in a launch, up to 0.5 s); so much before the
# deadline the measuring ends.
RESERVE_S = 0.8
# How often a cluster is looked at for a device in the place of a lost one, and how long the last trials of a chip wait for one.
RECRUIT_S = 5.0
PATIENCE_S = 30.0
NO_DEVICE = "no device left"


@dataclass
class Summary:
    """How a run went. `unfinished` are the trials without a Result; `stopped` says why: "deadline", "interrupted", "no device left" (all
    of a chip were lost) or "".

    `notes` names the devices that were left out or lost, with the reason.
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


@dataclass(frozen=True)
class Wish:
    """What holds for every contest of a run; `deadline` is a second of time.monotonic(). See Contest for the rest."""

    stop: threading.Event
    deadline: float | None = None
    guests: Mapping[str, Trial] = field(default_factory=dict)
    keep_data: bool = False
    anchors: tuple[str, ...] = ()

    @classmethod
    def until(
        cls,
        deadline: float | None,
        stop: threading.Event | None = None,
        *,
        guests: Mapping[str, Trial] | None = None,
        keep_data: bool = False,
        anchors: Sequence[str] = (),
    ) -> Wish:
        """The wish of a run that has until `deadline` for everything."""
        ends = None if deadline is None else deadline - RESERVE_S
        return cls(stop or threading.Event(), ends, dict(guests or {}), keep_data, tuple(anchors))

    def guest(self, group: Sequence[Trial]) -> Trial | None:
        """The baseline that runs along with this group."""
        found = self.guests.get(group[0].problem.key)
        return found if found is not None and found.chip == group[0].chip else None


class SeatLost(Exception):
    """A device went away, or cannot measure; the text says how. Without `blame` no trial is suspected of it."""

    def __init__(self, why: str, *, blame: bool = True) -> None:
        super().__init__(why)
        self.blame = blame


class Seat(Protocol):
    """A device that measures one contest at a time."""

    @property
    def chip(self) -> str:
        """The name of the chip that it is."""

    def contest(self, group: Sequence[Trial], wish: Wish) -> Iterator[Result]:
        """Measure; each Result as soon as it stands. SeatLost when the device is no more."""

    def revive(self) -> bool:
        """After SeatLost: can it measure again?"""

    def abort(self) -> None:
        """From another thread: end what runs, for good."""


class AnyFleet(Protocol):
    """What every engine can: see local.Fleet."""

    run_id: str
    notes: list[str]
    busy_s: float

    def __enter__(self) -> Self: ...

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None: ...

    @property
    def size(self) -> int:
        """Devices that measure at the same time."""

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
        """Measure; see local.run_trials."""

    def environment(self) -> Mapping[str, Json]:
        """What the first worker says of where it runs."""

    def environments(self, chip: str = "") -> list[Mapping[str, Json]]:
        """What the workers of a chip's devices say, as far as they may differ."""

    def refresh(self) -> None:
        """Fresh workers from the next run on."""

    def close(self) -> None:
        """End the workers and free the devices."""


class Run:
    """Trials on seats. `epitaph(trial, why)` makes the row of one that is given up; `recruit(chips)` finds seats for lost ones."""

    def __init__(
        self,
        trials: Sequence[Trial],
        wish: Wish,
        *,
        epitaph: Callable[[Trial, str], Result] | None = None,
        recruit: Callable[[Sequence[str]], Sequence[Seat]] | None = None,
        note: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.busy_s = 0.0
        self.board = Board(trials)
        self.wish = wish
        self._trials = list(trials)
        self._epitaph, self._recruit, self._note = epitaph, recruit, note
        # None: a device has no more to do. An exception: the run cannot go on.
        self._told: queue.SimpleQueue[Result | BaseException | None] = queue.SimpleQueue()
        self._keys: set[str] = set()
        self.seats: list[Seat] = []
        self._threads: list[threading.Thread] = []
        self._lock = threading.Lock()
        self._looking, self._ended = False, threading.Event()

    @property
    def unfinished(self) -> list[Trial]:
        """Trials that no Result was handed over for."""
        return [trial for trial in self._trials if trial.key not in self._keys]

    @property
    def stopped(self) -> str:
        """Why there are such, for a Summary."""
        if not self.unfinished:
            return ""
        if self.wish.stop.is_set():
            return "interrupted"
        return "deadline" if self._over() else NO_DEVICE if self.board.waiting() else "deadline"

    def start(self, seats: Sequence[Seat]) -> None:
        """One thread per seat, for no chip more than there are contests."""
        wanted = {chip: self.board.waiting(chip) for chip in self.board.chips}
        for seat in seats:
            if wanted.get(seat.chip, 0) > 0:
                wanted[seat.chip] -= 1
                thread = threading.Thread(target=self._measure, args=(seat,), daemon=True)
                self.seats.append(seat)
                self._threads.append(thread)
                thread.start()

    def _measure(self, seat: Seat) -> None:
        try:
            while (group := self.board.take(seat.chip, self._over)) is not None:
                if not self._contest(seat, group):
                    break
        except BaseException as error:  # noqa: BLE001  raised again in the caller's thread
            self._told.put(error)
        finally:
            self._told.put(None)

    def _contest(self, seat: Seat, group: Sequence[Trial]) -> bool:
        """Measure one group; False when the seat measures no more."""
        began, told = time.monotonic(), set()
        try:
            for result in seat.contest(group, self.wish):
                told.add(result.key)
                self._told.put(result)
        except SeatLost as lost:
            left = [trial for trial in group if trial.key not in told]
            for trial, why in self.board.back(left, str(lost), blame=lost.blame):
                if self._epitaph is not None:
                    self._told.put(self._epitaph(trial, why))
            if not left:
                self.board.done(seat.chip)
            fate = f"; its {len(left)} running trial{'s are' if len(left) > 1 else ' is'} measured again" if left else ""
            self._note(f"{lost}{fate}")
            return not self._over() and seat.revive()
        except BaseException:
            self.board.done(seat.chip)
            seat.abort()
            raise
        else:
            self.board.done(seat.chip)
            return True
        finally:
            with self._lock:
                self.busy_s += time.monotonic() - began

    def _over(self) -> bool:
        return self.wish.stop.is_set() or (self.wish.deadline is not None and time.monotonic() >= self.wish.deadline)

    def hand_over(self, tell: Callable[[Result], None]) -> None:
        """Hand results to the caller until every device has ended, then raise what ended one of them early."""
        if self._recruit is not None:
            threading.Thread(target=self._look_for_more, args=(self._recruit,), daemon=True).start()
        running, joined, alive = 0, 0, time.monotonic()
        broken: BaseException | None = None
        while True:
            now, count = time.monotonic(), len(self._threads)
            running, joined = running + count - joined, count
            if running or self._looking:
                alive = now
            elif broken or self._recruit is None or not self.board.waiting() or self._over() or now - alive > PATIENCE_S:
                break
            try:
                item = self._told.get(timeout=POLL_S)
            except queue.Empty:
                continue
            if item is None:
                running -= 1
            elif isinstance(item, BaseException):
                broken = broken or item
                self.wish.stop.set()
            else:
                tell(item)
                self._keys.add(item.key)
        self._ended.set()
        if broken is not None:
            raise broken

    def _look_for_more(self, recruit: Callable[[Sequence[str]], Sequence[Seat]]) -> None:
        """While trials wait: look whether devices have joined. In a thread of its own, since one takes many seconds to start."""
        while not self._ended.wait(RECRUIT_S) and not self._over():
            if self.board.waiting():
                self._looking = True
                try:
                    self.start(recruit(self.board.chips))
                except Exception as error:  # noqa: BLE001  those that are there go on
                    self._note(f"looking for further devices failed: {error}")
                self._looking = False

    def end(self) -> None:
        """End what still runs: nothing does, unless the caller's thread was torn out of its loop."""
        self._ended.set()
        if any(thread.is_alive() for thread in self._threads):
            self.wish.stop.set()
            for seat in self.seats:
                seat.abort()
            for thread in self._threads:
                thread.join(timeout=5.0)


@contextmanager
def gentle_interrupt(stop: threading.Event) -> Iterator[None]:
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


def measure(run: Run, seats: Callable[[], Sequence[Seat]], on_result: Callable[[Result], None], *, notes: list[str]) -> Summary:
    """Carry a run through on the seats that are ready, and sum it up. See `local.run_trials` for what it promises."""
    began = time.monotonic()
    summary = Summary(notes=notes)

    def tell(result: Result) -> None:
        summary.by_status[result.status] += 1
        on_result(result)

    try:
        with gentle_interrupt(run.wish.stop):
            run.start(seats())
            run.hand_over(tell)
    finally:
        run.end()
        summary.unfinished = run.unfinished
        summary.seconds = time.monotonic() - began
        summary.stopped = run.stopped
    if summary.stopped == NO_DEVICE and not summary.results:
        raise CannotMeasure("; ".join(notes) or NO_DEVICE)
    return summary
