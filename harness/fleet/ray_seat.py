"""The driver's end of a cluster's seat: it starts the actor, sends it contests, and notices when it is gone."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from klab.harness.fleet.cluster import Place
from klab.harness.fleet.parcel import order
from klab.harness.fleet.run import SeatLost, Wish
from klab.harness.measure.faults import KILLED
from klab.harness.measure.mishaps import DEVICE_LOST
from klab.harness.measure.quarantine import ENOUGH
from klab.harness.plan.trial import Trial
from klab.harness.store.result import Result, Status
from klab.kernels.contract import Json
from klab.kernels.errors import CannotMeasure, UsageError

if TYPE_CHECKING:
    from klab.harness.fleet.ray_fleet import RayFleet

# How long one request for news waits at the node, and when a node that says nothing at all counts as lost: Ray mostly calls it dead before
# (heartbeats); the second figure is a guess.
NEWS_S = 0.5
SILENT_S = 60.0
# Past its deadline a contest ends within seconds; a node that goes on for longer is cut off.
OVERTIME_S = 20.0
# A device whose actor died is started again on its node so often: a driver that keeps crashing is no place to measure.
REVIVALS = 2


class Refused(Exception):
    """The node cannot measure; the text says why."""


class RaySeat:
    """One device of a cluster. Asked by one thread at a time; `abort` may come from any."""

    def __init__(self, fleet: RayFleet, place: Place) -> None:
        self.place, self.hello = place, dict[str, Json]()
        self._fleet = fleet
        self._actor: Any = None
        self.greeting: Any = None
        """Ray's reference to the actor's first answer."""
        self._revived = 0
        self._aborted = self.lost = False

    @property
    def chip(self) -> str:
        """The name of its chip."""
        return self.place.chip

    @property
    def name(self) -> str:
        """For people: the node's address, and the device's number of its UUID where it is known."""
        device = str(self.hello.get("device", ""))
        return self.place.node.address + (f" ({device[:12]})" if device.startswith("GPU-") else "")

    def invite(self) -> None:
        """Ask Ray for the actor and return; `greet` waits for it."""
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        from klab.harness.fleet.ray_actor import Bench

        remote = ray.remote(Bench)
        pinned = NodeAffinitySchedulingStrategy(node_id=self.place.node.id, soft=False)
        # Three threads: one request for news, one to stop, and one to spare. No restarts by Ray: what was lost is measured elsewhere.
        options = {"max_concurrency": 3, "max_restarts": 0, "max_task_retries": 0, "scheduling_strategy": pinned}
        self._actor = remote.options(**options, **self.place.options).remote(self._fleet.setup(self.chip))
        self.greeting = self._actor.hello.remote()

    def greet(self, limit_s: float = 0.0) -> None:
        """Take the actor's first answer, waiting for so long. Refused when there is none, or when it says that it cannot measure."""
        import ray

        where = self.place.node.address
        try:
            self.hello = _parsed(ray.get(self.greeting, timeout=limit_s))
        except ray.exceptions.GetTimeoutError:
            self.leave()
            raise Refused(f"{where}: the device was not free in time") from None
        except ray.exceptions.RayError as error:
            self.leave()
            raise Refused(f"{where}: {_how(error)}") from None
        except (CannotMeasure, UsageError) as error:
            self.leave()
            raise Refused(f"{where}: {error}") from None

    def environment(self) -> Mapping[str, Json]:
        """As its worker says. CannotMeasure when it does not come up."""
        try:
            found: Mapping[str, Json] = self._ask("environment", limit_s=self._fleet.place_s + SILENT_S)["environment"]
        except SeatLost as lost:
            raise CannotMeasure(str(lost)) from lost
        return found

    def contest(self, group: Sequence[Trial], wish: Wish) -> Iterator[Result]:
        """Have it carried out there. SeatLost when the node or its actor is gone or cannot measure, or when somebody killed the worker: no
        kernel ends itself by SIGKILL, but who is short of memory kills what is largest."""
        left_s = None if wish.deadline is None else wish.deadline - time.monotonic()
        try:
            self._ask("begin", order(group, wish, left_s, self._fleet.skips(group)))
            stopping = killed = False
            while True:
                if wish.stop.is_set() and not stopping:
                    stopping = True
                    self._tell("stop")
                news = self._ask("next", NEWS_S)
                for text in news["rows"]:
                    result = Result.from_json(json.loads(text))
                    if result.status is Status.CRASHED and result.reason.startswith(KILLED):
                        killed = True
                        continue
                    self._note(group, result)
                    yield result
                if "error" in news:
                    raise RuntimeError(f"on {self.name}: {news['error']}")
                if news["done"]:
                    _refusal(news)
                    if killed:
                        raise SeatLost(f"{self.name}: the measuring process was killed from outside")
                    return
                if wish.deadline is not None and time.monotonic() > wish.deadline + OVERTIME_S:
                    self.leave()
                    return
        except CannotMeasure as error:
            self.leave()
            self._revived = REVIVALS  # it said itself that it cannot
            # A trial that takes one device after another with it is given up in the end.
            raise SeatLost(f"{self.name}: {error}", blame=str(error).startswith(DEVICE_LOST)) from error

    def _note(self, group: Sequence[Trial], result: Result) -> None:
        """What one node learned of a kernel holds for all."""
        trial = next((trial for trial in group if trial.key == result.key), None)
        if trial is None:
            return
        if result.status is Status.OK:
            self._fleet.quarantine.worked(trial)
        elif result.status in ENOUGH and not result.reason.startswith("skipped: "):
            self._fleet.quarantine.failed(trial, result.status)

    def _ask(self, method: str, *arguments: Json, limit_s: float = SILENT_S) -> dict[str, Json]:
        import ray

        if self._actor is None:
            raise SeatLost(f"{self.name}: the run was ended", blame=False)
        try:
            text = ray.get(getattr(self._actor, method).remote(*arguments), timeout=limit_s)
        except ray.exceptions.GetTimeoutError:
            self.leave()
            raise SeatLost(f"{self.name} said nothing for {limit_s:.0f} s") from None
        except ray.exceptions.RayTaskError:
            raise
        except ray.exceptions.RayError as error:
            self.leave()
            raise SeatLost(f"{self.name} was lost ({_how(error)})") from None
        return _parsed(text)

    def revive(self) -> bool:
        """Start the actor again where its node lives."""
        if self._actor is not None and not self._aborted:
            return True  # its worker alone was lost
        if self._aborted or self._revived >= REVIVALS or not self._fleet.lives(self.place.node.id):
            self.lost = True
            return False
        self._revived += 1
        self.invite()
        try:
            self.greet(self._fleet.place_s)
            self._fleet.same_klab(self)
        except Refused as why:
            self._fleet.note(str(why))
            self.lost = True
            return False
        return True

    def refresh(self) -> None:
        """End the worker; a lost actor has none."""
        with contextlib.suppress(SeatLost):
            self._ask("refresh")

    def _tell(self, method: str) -> None:
        """Ask and do not wait."""
        if self._actor is not None:
            getattr(self._actor, method).remote()

    def abort(self) -> None:
        """End the actor and its worker at once, for good."""
        self._aborted = True
        self.leave()

    def close(self) -> None:
        """Let it unlock the device, then end it."""
        import ray

        actor = self._actor
        if actor is not None:
            with contextlib.suppress(ray.exceptions.RayError):
                ray.get(actor.close.remote(), timeout=10.0)
            self.leave()

    def leave(self) -> None:
        """Kill the actor: whatever it still does is not waited for, and none of its rows comes any more."""
        import ray

        actor, self._actor = self._actor, None
        if actor is not None and ray.is_initialized():
            ray.kill(actor, no_restart=True)


def _parsed(text: str | None) -> dict[str, Json]:
    """An answer; CannotMeasure or UsageError for a refusal that brings no rows."""
    answer: dict[str, Json] = json.loads(text or "{}")
    if not answer.get("rows"):
        _refusal(answer)
    return answer


def _refusal(answer: Mapping[str, Json]) -> None:
    if "refused" in answer:
        raise (UsageError if answer.get("exit_code") == UsageError.exit_code else CannotMeasure)(answer["refused"])


def _how(error: BaseException) -> str:
    """What Ray says of a death, in a few words: it says much, and names every cause that it can think of."""
    kind, text = type(error).__name__, str(error).lower()
    if "OutOfMemory" in kind:
        return "its node was out of memory"
    if "Unavailable" in kind:
        return "it cannot be reached"
    if any(sign in text for sign in ("node has died", "node was terminated", "node died", "node is dead")):
        return "its node died"
    if "ActorDied" in kind or "WorkerCrashed" in kind:
        return "its process died"
    return _first_line(error)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
