"""Run trials on a Ray cluster: one actor per device, several chips in one run, and what a lost node had in hand goes elsewhere."""

from __future__ import annotations

import json
import math
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from klab.harness.fleet.cluster import Cluster, Place, lacking, places
from klab.harness.fleet.epitaph import epitaph
from klab.harness.fleet.parcel import chip_for_node, klab_digest, pack_folders
from klab.harness.fleet.ray_actor import limits_to_json
from klab.harness.fleet.ray_seat import RaySeat, Refused
from klab.harness.fleet.run import Run, Summary, Wish, measure
from klab.harness.measure import environment
from klab.harness.measure.limits import Limits
from klab.harness.measure.quarantine import Quarantine
from klab.harness.plan.trial import Trial
from klab.harness.store.result import Result, Status
from klab.kernels.contract import Chip, Json
from klab.kernels.errors import CannotMeasure

# Facts in which two devices of one kind may differ and their rows then with them; the first ones make another epoch.
# Devices that have not answered so long after the first of their chip: they are taken by somebody, and the run begins without them.
STRAGGLERS_S = 20.0
COMPARED = ("driver", "cuda", "torch", "triton", "cupy", "power_limit_w", "device", "cpu_model", "python", "numpy", "nvidia-ml-py")


class RayFleet:
    """The devices of a cluster that are one of `chips`, each with an actor of its own from the first run until `close`.

    As local.Fleet, but a run takes trials of several chips: each goes where its chip is. One run at a time.
    """

    def __init__(
        self,
        chips: Sequence[Chip],
        run_id: str,
        *,
        address: str | None = None,
        only_devices: Sequence[str] | None = None,
        kernel_dirs: Sequence[Path | str] = (),
        limits: Limits | None = None,
        place_s: float = 120.0,
    ) -> None:
        """`place_s`: how long a device may take to be free and its actor to start (the import of torch from a cold disk is most of it).

        CannotMeasure when there is no cluster or it lacks one of the chips: before anything is started, for Ray would wait for ever.
        """
        self.chips = {chip.name: chip for chip in chips}
        self.chip, self.run_id, self.limits, self.place_s = chips[0], run_id, limits, place_s
        self.kernel_dirs = list(kernel_dirs)
        self.notes: list[str] = []
        self.busy_s = 0.0
        """Seconds that the devices were held by contests, added up over the devices."""
        self.quarantine = Quarantine()
        self._only = None if only_devices is None else set(only_devices)
        self._folders = pack_folders(kernel_dirs)
        self._seats: list[RaySeat] | None = None
        self._closed = False
        self._lock = threading.Lock()
        self.cluster = Cluster(address)
        nodes = self.cluster.nodes()
        if absent := lacking(nodes, chips):
            self.cluster.close()
            raise CannotMeasure(absent)
        self._places = places(nodes, chips)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    @property
    def size(self) -> int:
        """Devices that measure at the same time; before the first run, those that the cluster has."""
        return len(self._places if self._seats is None else self._seats)

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
        """As local.run_trials. What a lost device had in hand is measured on another of its chip; a trial that was lost so three times
        is a row `crashed` that says so. CannotMeasure when no device of a chip came up."""
        wish = Wish.until(deadline, stop, guests=guests, keep_data=keep_data, anchors=anchors)
        run = Run(trials, wish, epitaph=self._epitaph, recruit=self._recruit, note=self.note)
        try:
            return measure(run, lambda: self._ready({trial.chip for trial in trials}, wish.deadline), on_result, notes=self.notes)
        finally:
            self.busy_s += run.busy_s

    def environment(self, chip: str = "") -> Mapping[str, Json]:
        """What the first worker (of a chip) says of where it runs; started where it is not."""
        return self.environments(chip or self.chip.name, first=True)[0]

    def environments(self, chip: str = "", *, first: bool = False) -> list[Mapping[str, Json]]:
        """What the workers say of where they run, one each: nodes may differ, and their epochs then too."""
        name = chip or self.chip.name
        seats = [seat for seat in self._ready({name}) if seat.chip == name][: 1 if first else None]
        return [seat.environment() for seat in seats]

    def setup(self, chip: str) -> str:
        """What an actor is made of (ray_actor.Bench)."""
        told = {"run_id": self.run_id, "folders": self._folders, "limits": limits_to_json(self.limits)}
        return json.dumps({**told, "chip": chip_for_node(self.chips[chip])})

    def skips(self, group: Sequence[Trial]) -> dict[str, tuple[Status, str]]:
        """Verdicts on those of these trials that need not be tried again, from what every node saw."""
        found = {trial.key: self.quarantine.verdict(trial) for trial in group}
        return {key: verdict for key, verdict in found.items() if verdict is not None}

    def lives(self, node_id: str) -> bool:
        """Is this node still there?"""
        return any(node.id == node_id for node in self.cluster.nodes())

    def nodes_of(self, chip: str) -> set[str]:
        """The nodes on which devices of this chip are held or wanted."""
        return {place.node.id for place in self._places if place.chip == chip}

    def _ready(self, chips: set[str], deadline: float | None = None) -> list[RaySeat]:
        """Start what is not there, once; CannotMeasure for a chip of which no device came up."""
        if self._closed:
            raise CannotMeasure("the fleet was closed")
        if self._seats is None:
            self._seats = self._seated(self._places, deadline)
        self._seats = [seat for seat in self._seats if not seat.lost]
        for chip in sorted(chips):
            if not any(seat.chip == chip for seat in self._seats):
                self._seats += self._seated(places(self.cluster.nodes(), [self.chips[chip]]), deadline)
            if not any(seat.chip == chip for seat in self._seats):
                raise CannotMeasure("; ".join(self.notes) or f"no device for {chip}")
        return self._seats

    def _seated(self, wanted: Sequence[Place], deadline: float | None = None) -> list[RaySeat]:
        """Seats at these places, those that came up and run the same klab; a note on each that did not."""
        seats = [RaySeat(self, place) for place in wanted]
        for seat in seats:
            seat.invite()
        self._await(seats, min(time.monotonic() + self.place_s, deadline or math.inf))
        good: list[RaySeat] = []
        for seat in seats:
            try:
                seat.greet()
                if self._only is not None and seat.hello["device"] not in self._only:
                    seat.close()
                    continue
                self.same_klab(seat)
                good.append(seat)
            except Refused as why:
                self.note(str(why))
        if self._only is not None and seats and not good:
            known = ", ".join(str(seat.hello.get("device")) for seat in seats if seat.hello)
            self.note(f"no device of the cluster is called {' or '.join(sorted(self._only))}; it has {known}")
        self._compare(good)
        return good

    def _await(self, seats: Sequence[RaySeat], until: float) -> None:
        """Until all have answered or that second; when every chip has a device, the others have STRAGGLERS_S more."""
        import ray

        waiting = {seat.greeting: seat for seat in seats}
        needed = {seat.chip for seat in seats}
        while waiting and (left := until - time.monotonic()) > 0:
            done, _ = ray.wait(list(waiting), num_returns=1, timeout=left)
            needed -= {waiting.pop(reference).chip for reference in done}
            if not needed:
                until = min(until, time.monotonic() + STRAGGLERS_S)
                needed = {""}

    def same_klab(self, seat: RaySeat) -> None:
        """Refused where the node's klab is not this one: a row must mean the same wherever it was measured."""
        if seat.hello["klab"] != klab_digest():
            seat.close()
            there, here = (
                str(commit)[:10] if commit else "no commit" for commit in (seat.hello["commit"], environment.checkout()["commit"])
            )
            raise Refused(f"{seat.name} has other sources of klab (at {there}, here {here}): install the same on every node")

    def _compare(self, seats: Sequence[RaySeat]) -> None:
        """Say in what the devices of one chip differ: their rows are of different epochs, or made by different versions."""
        for chip in self.chips:
            own = [seat for seat in seats if seat.chip == chip]
            for name in COMPARED:
                values: dict[str, list[str]] = defaultdict(list)
                for seat in own:
                    values[str(seat.hello["facts"].get(name))].append(seat.place.node.address)
                if len(values) > 1:
                    told = ", ".join(f"{value} on {_named(where)}" for value, where in sorted(values.items()))
                    apart = "; their rows are of different epochs" if name in (*environment.EPOCH_CUDA, *environment.EPOCH_CPU) else ""
                    self.note(f"the nodes with {chip} differ in {name}: {told}{apart}")
            nice = [seat.place.node.address for seat in own if seat.hello["niceness"] > 0 and self.chips[chip].kind == "cpu"]
            if nice:
                self.note(f"{_named(nice)}: Ray runs its workers at a low priority; RAY_worker_niceness=0 before `ray start` avoids it")

    def _recruit(self, chips: Sequence[str]) -> list[RaySeat]:
        """Seats for these chips on nodes that have joined since."""
        known = {place.node.id for place in self._places}
        wanted = [place for place in places(self.cluster.nodes(), [self.chips[name] for name in chips]) if place.node.id not in known]
        self._places += wanted
        found = self._seated(wanted) if wanted else []
        if self._seats is not None:
            self._seats += found
        for seat in found:
            self.note(f"{seat.name} joined for {seat.chip}")
        return found

    def _epitaph(self, trial: Trial, why: str) -> Result:
        """The row of a trial that was given up."""
        return epitaph(trial, why, run_id=self.run_id, kernel_dirs=self.kernel_dirs)

    def note(self, text: str) -> None:
        """Say it once in `notes`."""
        with self._lock:
            if text not in self.notes:
                self.notes.append(text)

    def refresh(self) -> None:
        """End the workers; the next run starts fresh ones. The devices stay locked."""
        for seat in self._seats or []:
            seat.refresh()

    def close(self) -> None:
        """End the actors with their workers, and leave the cluster; calling it twice is fine."""
        for seat in self._seats or []:
            seat.close()
        self._seats, self._closed = None, True
        self.cluster.close()


def _named(addresses: Sequence[str]) -> str:
    """`10.0.0.1 (2), 10.0.0.2`: each once, with how often it stands there."""
    return ", ".join(f"{address} ({count})" if count > 1 else address for address, count in sorted(Counter(addresses).items()))
