"""Runs node_load's processes, one per device at the same time, and keeps whatever they said until they ended, died or hung."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from klab.harness.measure.client import START_LIMIT_S, scrubbed
from klab.kernels.contract import Chip, Json

# A process that has said nothing for so long hangs: a line comes every second under load, and each copy is far shorter.
SILENCE_S = 60.0
TAIL_CHARS = 4000
# -P: do not import from the current folder, where a file named random.py may lie.
COMMAND = (sys.executable, "-P", "-m", "klab.harness.watch.node_load")


@dataclass(frozen=True)
class Job:
    """One process: its work (see node_load), for about how long, and which GPUs it sees ("" for a CPU)."""

    work: str
    seconds: float
    visible: str = ""


@dataclass
class Said:
    """What a process said, in order, and how it ended: `error` is "" where it came to its end."""

    lines: list[dict[str, Json]] = field(default_factory=list)
    error: str = ""

    def get(self, key: str) -> Json:
        """The value of the first line that has this key, or None."""
        return next((line[key] for line in self.lines if key in line), None)

    def all(self, key: str) -> list[dict[str, Json]]:
        """The lines that have this key."""
        return [line for line in self.lines if key in line]


class Runner(Protocol):
    """Runs jobs at the same time."""

    def run(self, jobs: Sequence[Job]) -> list[Said]:
        """What each said, in the order of the jobs. Nothing that a process does raises here."""


class ProcessRunner:
    """Each job in a process group of its own, with the environment of a measuring worker: no secrets of the user's."""

    def __init__(self, chip: Chip, *, silence_s: float = SILENCE_S) -> None:
        self._chip, self._silence_s = chip, silence_s

    def run(self, jobs: Sequence[Job]) -> list[Said]:
        """See Runner. KeyboardInterrupt ends all processes first."""
        processes: list[_Process] = []
        try:
            for job in jobs:
                processes.append(_Process(self._chip, job, self._silence_s))
            for process in processes:
                process.wait()
        finally:
            for process in processes:
                process.kill()
        return [process.said for process in processes]


class _Process:
    def __init__(self, chip: Chip, job: Job, silence_s: float) -> None:
        self.said = Said()
        self._job, self._silence_s = job, silence_s
        self._heard_at = time.monotonic() + START_LIMIT_S - silence_s
        text = json.dumps({"work": job.work, "seconds": job.seconds, "chip": dataclasses.asdict(chip)})
        self._process = subprocess.Popen(
            [*COMMAND, text],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=scrubbed(os.environ) | {"CUDA_VISIBLE_DEVICES": job.visible},
            start_new_session=True,
            text=True,
            errors="replace",
        )
        self._tail = ""
        self._over = False
        self._threads = [threading.Thread(target=work, daemon=True) for work in (self._listen, self._drain)]
        for thread in self._threads:
            thread.start()

    def _listen(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._heard_at = time.monotonic()
            with contextlib.suppress(ValueError):  # a line torn by a kill
                found = json.loads(line)
                if isinstance(found, dict):
                    self.said.lines.append(found)

    def _drain(self) -> None:
        assert self._process.stderr is not None
        for line in self._process.stderr:
            self._tail = (self._tail + line)[-TAIL_CHARS:]

    def wait(self) -> None:
        """Until it has ended, or said nothing for too long."""
        while self._process.poll() is None:
            if time.monotonic() - self._heard_at > self._silence_s:
                self.said.error = f"hung: it said nothing for {self._silence_s:.0f} s and was ended"
                self.kill()
                break
            time.sleep(0.05)
        for thread in self._threads:
            thread.join(timeout=5.0)
        error = self.said.get("error")
        if error:
            self.said.error = str(error)
        elif not self.said.error and self.said.get("done") is None:
            self.said.error = self._epitaph()

    def _epitaph(self) -> str:
        code = self._process.returncode
        if code is not None and code < 0:
            name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
            how = f"killed by {name}" + (" (out of host memory?)" if -code == signal.SIGKILL else "")
        else:
            how = f"ended with exit code {code}"
        said = [line.strip() for line in self._tail.splitlines() if line.strip()]
        return f"{how}: {said[-1][:200]}" if said else how

    def kill(self) -> None:
        """End it and what it started; nothing happens when it has been ended or waited for."""
        if self._over:
            return
        self._over = True
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=10)  # a process stuck in the driver cannot be reaped; it must not hold up the run
