"""The node's end of a cluster's seat: one Ray actor per device. It holds the lock and the worker, and carries contests out.

It answers in JSON text. The results of a contest wait here until the driver asks: a driver that does not ask any more gets none.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path

from klab.harness.catalog.chips import find_chip
from klab.harness.fleet.devices import Device, devices
from klab.harness.fleet.parcel import ToldQuarantine, klab_digest, trial_of, unpack_folders
from klab.harness.measure import environment
from klab.harness.measure.client import WorkerClient
from klab.harness.measure.contest import Contest
from klab.harness.measure.limits import Limits
from klab.harness.measure.lock import exclusive
from klab.harness.plan.trial import Trial
from klab.harness.store.result import Status
from klab.kernels.contract import Chip, Json
from klab.kernels.errors import KlabError


class Bench:
    """One device. `setup`: chip (null: this node's CPU), run_id, folders (parcel.pack_folders) and limits."""

    def __init__(self, setup: str) -> None:
        _undo_ray()
        told = json.loads(setup)
        self._run_id = told["run_id"]
        self._chip = find_chip("cpu") if told["chip"] is None else Chip.from_json(told["chip"])
        self._folders: list[Mapping[str, Json]] = told["folders"]
        self._limits = None if told["limits"] is None else Limits(**told["limits"])
        self._kept = ExitStack()
        self._checkout: dict[str, Json] = {}
        self._device: Device | None = None
        self._client: WorkerClient | None = None
        self._quarantine = ToldQuarantine()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._rows: deque[str] = deque()
        self._ended: dict[str, Json] | None = None
        self._changed = threading.Condition()

    def hello(self) -> str:
        """Look at the device, lock it, and say what and where it is. Refused, with the reason, where it cannot measure."""

        def answer() -> dict[str, Json]:
            device = self._device
            if device is None:
                # Ray shows this process its own GPU and no other.
                device = devices(self._chip)[0]
                self._kept.enter_context(exclusive(device.id))
                self._checkout = environment.checkout()
                dirs = unpack_folders(self._folders, self._kept)
                self._client = WorkerClient(self._chip, cuda_device=device.cuda_visible, kernel_dirs=dirs)
                self._device = device
            return {
                "device": device.id,
                "name": device.name,
                "pid": os.getpid(),
                "klab": klab_digest(),
                "commit": self._checkout.get("commit"),
                "niceness": os.getpriority(os.PRIO_PROCESS, 0),
                "facts": _facts(device),
            }

        return _told(answer)

    def environment(self) -> str:
        """What the worker says of where it runs; started where it is not."""

        def answer() -> dict[str, Json]:
            client = self._ready()
            client.start()
            return {"environment": client.environment}

        return _told(answer)

    def begin(self, order: str) -> str:
        """Start a contest (parcel.order) and return."""

        def answer() -> dict[str, Json]:
            client = self._ready()
            if self._thread is not None:
                self._thread.join()
            told = json.loads(order)
            trials = [trial_of(data) for data in told["trials"]]
            self._quarantine.told = {key: (Status(status), reason) for key, (status, reason) in told["skip"].items()}
            contest = Contest(
                client,
                trials,
                run_id=self._run_id,
                checkout=self._checkout,
                limits=self._limits,
                quarantine=self._quarantine,
                guest=None if told["guest"] is None else trial_of(told["guest"]),
                keep_data=told["keep_data"],
                anchors=told["anchors"],
            )
            deadline = None if told["left_s"] is None else time.monotonic() + told["left_s"]
            self._stop.clear()
            self._rows.clear()
            self._ended = None
            self._thread = threading.Thread(target=self._measure, args=(contest, trials, deadline), daemon=True)
            self._thread.start()
            return {}

        return _told(answer)

    def _measure(self, contest: Contest, trials: list[Trial], deadline: float | None) -> None:
        ended: dict[str, Json] = {}
        try:
            for result in contest.run(deadline=deadline, stop=self._stop):
                with self._changed:
                    self._rows.append(json.dumps(result.to_json(), allow_nan=False))
                    self._changed.notify_all()
        except KlabError as error:
            ended = {"refused": str(error), "exit_code": error.exit_code}
        except BaseException as error:  # noqa: BLE001  an error of klab's own: raised again where the driver is
            ended = {"error": f"{type(error).__name__}: {error}"}
        with self._changed:
            self._ended = ended
            self._changed.notify_all()

    def next(self, wait_s: float) -> str:
        """The rows since the last call, waited for as long; "done" when the contest has ended and nothing is left."""

        def answer() -> dict[str, Json]:
            with self._changed:
                self._changed.wait_for(lambda: self._rows or self._ended is not None, timeout=wait_s)
                rows = list(self._rows)
                self._rows.clear()
                if self._ended is None:
                    return {"rows": rows, "done": False}
                return {**self._ended, "rows": rows, "done": True}

        return _told(answer)

    def stop(self) -> None:
        """Have the contest end with the rounds it has."""
        self._stop.set()

    def refresh(self) -> None:
        """End the worker; the next contest starts a fresh one."""
        if self._client is not None:
            self._client.kill()

    def close(self) -> None:
        """End the worker and unlock the device."""
        self._stop.set()
        if self._client is not None:
            self._client.abort()
        if self._thread is not None:
            self._thread.join(timeout=5.0)
        if self._client is not None:
            self._client.kill()
        self._client = None
        self._kept.close()

    def _ready(self) -> WorkerClient:
        if self._client is None:
            raise KlabError("say hello first")
        return self._client


def _facts(device: Device) -> dict[str, Json]:
    """Versions, and on a GPU its driver and limits: enough to see whether two nodes are alike, without a worker."""
    found: dict[str, Json] = {**environment.software(), **environment.host(), "kind": device.kind, "device": device.name}
    if device.kind == "cuda":
        import torch

        found |= environment.cuda_device(torch.cuda.get_device_properties(device.index), torch.version.cuda)
    return found


def _told(answer: Callable[[], Mapping[str, Json]]) -> str:
    """The answer as text; a refusal is one too."""
    try:
        return json.dumps(answer(), allow_nan=False, default=str)
    except KlabError as error:
        return json.dumps({"refused": str(error), "exit_code": error.exit_code})


def _undo_ray() -> None:
    """Take back what Ray sets in its workers and a measurement must not inherit: one OpenMP thread, and a niceness of 15.

    The node's own setting of OMP_NUM_THREADS, which the parent (Ray's raylet) has too, stays. Lowering the niceness takes a permission;
    without it the driver says so (RAY_worker_niceness=0 before `ray start` is the remedy).
    """
    with contextlib.suppress(OSError):
        parents = Path(f"/proc/{os.getppid()}/environ").read_bytes().split(b"\0")
        if not any(entry.startswith(b"OMP_NUM_THREADS=") for entry in parents):
            os.environ.pop("OMP_NUM_THREADS", None)
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, 0, 0)


def limits_to_json(limits: Limits | None) -> Json:
    """For `setup`."""
    return None if limits is None else dataclasses.asdict(limits)
