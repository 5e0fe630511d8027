"""`python -m klab.harness.measure.worker`: the process in which kernels run, and which may die in their stead.

One JSON object per line in, one out, with the same `id`. The answers go to the standard output that the process was started with;
file descriptor 1 is then pointed at standard error, so that a kernel that prints cannot corrupt them. Nothing is ever unpickled.
"""

from __future__ import annotations

import faulthandler
import gc
import json
import os
import sys
import threading
import time
from collections.abc import Mapping
from typing import IO, Any

from klab.harness.measure import calibrate_steps, environment
from klab.harness.measure.faults import one_line
from klab.harness.measure.nvml import open_meter
from klab.harness.measure.power import NullMeter
from klab.harness.measure.session import Answer, Session
from klab.harness.measure.timer import CpuTimer
from klab.kernels.contract import Chip, Json
from klab.kernels.discover import discover
from klab.kernels.errors import CannotMeasure, KlabError

ORPHAN_CHECK_S = 1.0


class Worker:
    """Answers requests: `hello` first, then those of Session; `calibrate` is of calibrate_steps."""

    OPERATIONS = ("open", "prepare", "sample", "finish", "anchor", "sample_anchor", "energy", "drop", "close", "calibrate")

    def __init__(self) -> None:
        self.session: Session | None = None

    def answer(self, request: Mapping[str, Json]) -> Answer:
        """The answer to one request; KlabError for one that makes no sense."""
        fields = {name: value for name, value in request.items() if name not in ("id", "op")}
        operation = request.get("op")
        if operation == "hello":
            return self.hello(**fields)
        if operation not in self.OPERATIONS:
            raise KlabError(f"unknown operation {operation!r}")
        if self.session is None:
            raise KlabError("say hello first")
        if operation == "calibrate":
            return calibrate_steps.run(self.session.chip, self.session.timer, self.session.meter, **fields)
        answer: Answer = getattr(self.session, operation)(**fields)
        return answer

    def hello(self, chip: Json, kernel_dirs: list[str]) -> Answer:
        """Open the device, find the kernels, and say what is here."""
        import torch

        torch.set_grad_enabled(False)
        chosen = Chip.from_json(chip)
        facts: dict[str, Any] = {**environment.software(), **environment.host()}
        if chosen.kind == "cuda":
            properties = torch.cuda.get_device_properties(0)
            facts |= environment.cuda_device(properties, torch.version.cuda)
            meter = open_meter(properties)
            from klab.harness.measure.cuda_timer import CudaTimer

            timer: Any = CudaTimer(chosen, meter)
        else:
            meter = NullMeter("no power sensor on this CPU")
            timer = CpuTimer(chosen, meter)
            # The threads of a policy that names none; `open` tells those that hold.
            facts |= {"kind": "cpu", "device": facts["cpu_model"], "uuid": "", "cores": timer.cores, "threads": timer.cores}
        catalogue = discover(kernel_dirs)
        self.session = Session(chosen, catalogue, timer, meter)
        gc.freeze()  # what was imported stays: each later collection costs 1 ms instead of 200
        return {
            "environment": facts,
            "power": meter.trouble,
            "kernels": {k.id: {"backend": k.backend, "library": k.library} for k in catalogue.kernels.values()},
        }


def serve(worker: Worker, requests: IO[str], answers: IO[str]) -> None:
    """Answer line by line until the requests end or an answer is fatal."""
    for line in requests:
        request = json.loads(line)
        try:
            answer = worker.answer(request)
        except KlabError as error:
            answer = {"refused": str(error), "exit_code": error.exit_code}
        except Exception as error:
            if worker.session is not None:
                raise
            answer = {"refused": one_line(error), "exit_code": CannotMeasure.exit_code}
        answers.write(json.dumps({"id": request.get("id"), **answer}, allow_nan=False) + "\n")
        answers.flush()
        if answer.get("fatal"):
            # Not sys.exit: the atexit handlers of a broken CUDA context hang or abort.
            os._exit(0)


def _end_with_parent() -> None:
    """A hanging kernel does not see its input close: without this, killing klab would leave it on the GPU."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(ORPHAN_CHECK_S)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def main() -> None:
    """Take the pipes, then serve."""
    requests = os.fdopen(os.dup(0), "r", encoding="utf-8")
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.dup2(2, 1)
    faulthandler.enable()
    _end_with_parent()
    serve(Worker(), requests, answers)
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
