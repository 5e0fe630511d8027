"""The parent's end of a worker: start it, ask it with a time limit, kill it with everything it started."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from klab.harness.measure.session import Answer
from klab.kernels.contract import Chip, Json
from klab.kernels.errors import CannotMeasure, UsageError

# What a worker inherits. Everything else is dropped: a user's kernel has no business with tokens and keys.
KEEP = {"PATH", "HOME", "LANG", "LD_LIBRARY_PATH", "VIRTUAL_ENV", "TMPDIR", "XDG_CACHE_HOME", "CC", "CXX", "NVIDIA_VISIBLE_DEVICES"}
KEEP_PREFIXES = ("LC_", "CUDA_", "TRITON_", "CUPY_", "OMP_", "GOMP_", "KMP_", "MKL_", "OPENBLAS_", "PYTHON", "KLAB_")
START_LIMIT_S = 180.0
TAIL_BYTES = 16_384
DRAIN_S = 2.0
_TELLING = re.compile(r"error|abort|assert|fatal|terminate|killed|cannot|failed", re.IGNORECASE)


class WorkerDied(Exception):
    """The worker ended while it was asked; the text says how, in one line."""


class WorkerHung(Exception):
    """The worker did not answer in time and was killed."""


def scrubbed(environment: Mapping[str, str]) -> dict[str, str]:
    """The part of an environment that a worker gets."""
    return {name: value for name, value in environment.items() if name in KEEP or name.startswith(KEEP_PREFIXES)}


class WorkerClient:
    """One worker on one device. `cuda_device` is a GPU's UUID (or CUDA index); empty for the CPU.

    Start it, ask it and close it from any thread, one at a time. A worker that died is started afresh by the next `start`.
    """

    def __init__(self, chip: Chip, *, cuda_device: str = "", kernel_dirs: Sequence[Path | str] = ()) -> None:
        self.chip = chip
        self.kernel_dirs = [str(Path(d).resolve()) for d in kernel_dirs]
        self.environment: dict[str, Json] = {}
        self.kernels: dict[str, dict[str, Json]] = {}
        self._cuda_device = cuda_device
        self._process: subprocess.Popen[bytes] | None = None
        self._answers = bytearray()
        self._tail = bytearray()
        self._drain: threading.Thread | None = None
        self._next_id = 0
        self._aborted = False

    @property
    def pid(self) -> int | None:
        """Process id of the running worker."""
        return self._process.pid if self.alive and self._process else None

    @property
    def alive(self) -> bool:
        """True while there is a worker to ask."""
        return self._process is not None and self._process.poll() is None

    @property
    def aborted(self) -> bool:
        """True when no worker starts here any more."""
        return self._aborted

    def start(self, *, limit_s: float = START_LIMIT_S) -> None:
        """Start a worker where none runs. CannotMeasure when it does not come up; WorkerHung when it takes longer than `limit_s`."""
        if self._aborted:
            raise CannotMeasure("the run was ended")
        if self.alive:
            return
        self.kill()
        command, variables = self.invocation()
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, env=variables, start_new_session=True)
        self._answers.clear()
        self._tail.clear()
        self._drain = threading.Thread(target=_drain, args=(self._process, self._tail), daemon=True)
        self._drain.start()
        try:
            hello = self.ask("hello", limit_s=limit_s, chip=self.chip_fields(), kernel_dirs=self.kernel_dirs)
        except WorkerDied as error:
            raise CannotMeasure(f"the measuring process does not start: {error}") from error
        self.environment, self.kernels = hello["environment"], hello["kernels"]

    def invocation(self) -> tuple[list[str], dict[str, str]]:
        """The command line and the whole environment of the process to start."""
        # -P: do not import from the current folder, where a file named random.py may lie.
        command = [sys.executable, "-P", "-m", "klab.harness.measure.worker"]
        return command, scrubbed(os.environ) | {"CUDA_VISIBLE_DEVICES": self._cuda_device}

    def chip_fields(self) -> Json:
        """The chip as the worker is told of it."""
        return dataclasses.asdict(self.chip)

    def ask(self, operation: str, *, limit_s: float, **fields: Json) -> Answer:
        """Send one request and return its answer.

        WorkerDied when the worker ends first, WorkerHung (and it is killed) after `limit_s`, UsageError or CannotMeasure for what it
        refuses.
        """
        process = self._process
        if process is None or process.stdin is None:
            raise WorkerDied("no worker runs")
        self._next_id += 1
        request = json.dumps({"id": self._next_id, "op": operation, **fields}, allow_nan=False) + "\n"
        give_up = time.monotonic() + limit_s
        try:
            process.stdin.write(request.encode())
            process.stdin.flush()
        except OSError:
            raise WorkerDied(self._epitaph()) from None
        while True:
            line = self._line(process, give_up, operation, limit_s)
            try:
                answer: Answer = json.loads(line)
                known = answer.pop("id") == self._next_id
            except (ValueError, KeyError, AttributeError):  # a kernel found the pipe by its number and wrote to it
                self.kill()
                raise WorkerDied("wrote something else than an answer to its pipe") from None
            if known:
                break
        if "refused" in answer:
            raise (UsageError if answer["exit_code"] == UsageError.exit_code else CannotMeasure)(answer["refused"])
        if answer.get("fatal"):
            self.kill()
        return answer

    def _line(self, process: subprocess.Popen[bytes], give_up: float, operation: str, limit_s: float) -> bytes:
        assert process.stdout is not None
        handle = process.stdout.fileno()
        while b"\n" not in self._answers:
            remaining = give_up - time.monotonic()
            ready, _, _ = select.select([handle], [], [], max(remaining, 0.0))
            if not ready:
                self.kill()
                raise WorkerHung(f"no answer to {operation} within {limit_s:.0f} s")
            piece = os.read(handle, 1 << 16)
            if not piece:
                raise WorkerDied(self._epitaph())
            self._answers += piece
        line, _, rest = bytes(self._answers).partition(b"\n")
        self._answers[:] = rest
        return line

    def _epitaph(self) -> str:
        """How the worker ended, with the most telling line that it left on standard error."""
        process = self._process
        assert process is not None
        try:
            code = process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self.kill()
            return "closed its pipes"
        if code >= 0:
            how = f"ended with exit code {code}"
        else:
            name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
            how = f"killed by {name}" + (" (out of host memory?)" if -code == signal.SIGKILL else "")
        # The drain ends with the pipe, which a process that the worker left behind may keep open.
        if self._drain is not None:
            self._drain.join(DRAIN_S)
        lines = [line.strip() for line in self._tail.decode(errors="replace").splitlines() if line.strip()]
        # faulthandler's list of frames and of extension modules says nothing of the cause.
        said = [line for line in lines if _TELLING.search(line) and not line.startswith(("File ", "Extension modules"))]
        telling = said[-1] if said else ""
        self.kill()
        return f"{how}: {telling[:200]}" if telling else how

    def abort(self) -> None:
        """From another thread: kill the worker and let none start again. Whoever is asking it gets WorkerDied."""
        self._aborted = True
        process = self._process
        if process is not None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)

    def kill(self) -> None:
        """End the worker and its whole process group at once; nothing happens when none runs."""
        process, self._process = self._process, None
        if process is None:
            return
        # The group outlives its leader: compilers and other children of a dead worker end here too.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=10)  # a process stuck in the driver cannot be reaped; it must not hold up the run
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()


def _drain(process: subprocess.Popen[bytes], tail: bytearray) -> None:
    """Read standard error to its end and keep the last TAIL_BYTES: a chatty compiler must neither block nor fill memory."""
    assert process.stderr is not None
    with process.stderr as pipe:
        while piece := os.read(pipe.fileno(), 1 << 16):
            tail += piece
            del tail[:-TAIL_BYTES]
