"""Run trials on this machine: one worker process per device, one contest per problem, one lock per device."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Self

from klab.harness.fleet.board import contests
from klab.harness.fleet.devices import Device, devices
from klab.harness.fleet.epitaph import epitaph
from klab.harness.fleet.run import AnyFleet, Run, SeatLost, Summary, Wish, measure
from klab.harness.measure import environment
from klab.harness.measure.client import WorkerClient
from klab.harness.measure.contest import Contest
from klab.harness.measure.limits import Limits
from klab.harness.measure.lock import exclusive
from klab.harness.measure.mishaps import DeviceLost
from klab.harness.measure.quarantine import Quarantine
from klab.harness.plan.trial import Trial
from klab.harness.store.result import Result
from klab.kernels.contract import Chip, Json
from klab.kernels.errors import CannotMeasure

__all__ = ["Fleet", "Summary", "contests", "run_trials"]


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
    fleet: AnyFleet | None = None,
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
        self._seats: list[LocalSeat] | None = None
        self._losing = threading.Lock()
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
        """As `run_trials`, with the workers that are there. What a lost device had in hand is measured on another one; CannotMeasure when
        the last is lost."""
        wish = Wish.until(deadline, stop, guests=guests, keep_data=keep_data, anchors=anchors)
        run = Run(trials, wish, epitaph=self._epitaph, recruit=lambda chips: self._idle(run), note=self.notes.append)
        try:
            return measure(run, self._ready, on_result, notes=self.notes)
        finally:
            self.busy_s += run.busy_s

    def environment(self) -> Mapping[str, Json]:
        """What the first worker says of where it runs; started where it is not."""
        client = self._ready()[0].client
        client.start()
        return client.environment

    def environments(self, chip: str = "") -> list[Mapping[str, Json]]:
        """Of every device that may measure this chip's trials; here they are taken for alike."""
        return [self.environment()]

    def _ready(self) -> list[LocalSeat]:
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
                seats.append(LocalSeat(self, device, self._worker(device)))
            if not seats:
                raise CannotMeasure("; ".join(self.notes))
            self._seats = seats
        self._seats = [seat for seat in self._seats if not seat.lost]
        for seat in self._seats:
            if seat.client.aborted:
                seat.client = self._worker(seat.device)
        return self._seats

    def _idle(self, run: Run) -> list[LocalSeat]:
        """Devices for which the run had no contest at its start: they take the place of lost ones."""
        return [seat for seat in self._seats or [] if not seat.lost and seat not in run.seats]

    def lose(self, seat: LocalSeat) -> bool:
        """Its device is gone; False when it was the last, which stays: the next run may find it again."""
        with self._losing:
            if all(other is seat or other.lost for other in self._seats or []):
                return False
            seat.lost = True
            return True

    def _epitaph(self, trial: Trial, why: str) -> Result:
        return epitaph(trial, why, run_id=self.run_id, kernel_dirs=self.kernel_dirs)

    def _worker(self, device: Device) -> WorkerClient:
        return WorkerClient(self.chip, cuda_device=device.cuda_visible, kernel_dirs=self.kernel_dirs)

    def contest(self, client: WorkerClient, group: Sequence[Trial], wish: Wish) -> Contest:
        """One of this run's contests."""
        return Contest(
            client,
            group,
            run_id=self.run_id,
            checkout=self._checkout,
            limits=self.limits,
            quarantine=self._quarantine,
            guest=wish.guest(group),
            keep_data=wish.keep_data,
            anchors=wish.anchors,
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


class LocalSeat:
    """A locked device and its worker."""

    def __init__(self, fleet: Fleet, device: Device, client: WorkerClient) -> None:
        self.device, self.client, self._fleet = device, client, fleet
        self.lost = False

    @property
    def chip(self) -> str:
        """The fleet's."""
        return self._fleet.chip.name

    def contest(self, group: Sequence[Trial], wish: Wish) -> Iterator[Result]:
        """In this thread. SeatLost when the device is gone and there is another; DeviceLost when there is none."""
        try:
            yield from self._fleet.contest(self.client, group, wish).run(deadline=wish.deadline, stop=wish.stop)
        except DeviceLost as error:
            if not self._fleet.lose(self):
                raise
            raise SeatLost(f"{self.device.id}: {error}") from error

    def revive(self) -> bool:
        """A GPU that fell off the bus does not come back before the machine is restarted."""
        return False

    def abort(self) -> None:
        """Kill the worker, from any thread; the next run has another."""
        self.client.abort()
