"""One compiling process of a farm: asked with a time limit, held to a memory limit, replaced when it dies or has grown."""

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
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO

from klab.harness.measure.client import scrubbed
from klab.harness.plan.trial import Trial
from klab.harness.store.result import Status
from klab.kernels.contract import Chip, Json

# -P: no module is imported from the current folder, where a file named random.py may lie.
WORKER = [sys.executable, "-P", "-m", "klab.harness.tune.screen_worker"]
# Importing torch and triton takes 4 s, and 20 s from a cold disk; user files are each given up to a minute.
START_LIMIT_S = 180.0
# How often a compiling process's memory is looked at: one that takes 1 GB/s goes 0.1 GB too far.
LOOK_S = 0.1
# A process that has closed its pipe is about to end; on a busy machine it takes a moment to.
END_S = 5.0
# A process that has grown by this share of what it may is replaced between two candidates: what it holds is not the next one's fault.
WORN = 0.5
_TELLING = re.compile(r"error|abort|assert|fatal|terminate|bad_alloc|out of memory", re.IGNORECASE)
_MEMORY = re.compile(r"bad_alloc|out of memory|MemoryError|cannot allocate", re.IGNORECASE)


class FarmClosed(Exception):
    """The farm was closed while a candidate compiled."""


class Compiler:
    """One process, started when first asked and again after each death. Asked by one thread; `kill` may come from any."""

    def __init__(self, chip: Chip, kernel_dirs: Sequence[str], memory_bytes: int) -> None:
        hello = {"chip": dataclasses.asdict(chip), "kernel_dirs": list(kernel_dirs), "memory_bytes": memory_bytes}
        self._hello = json.dumps(hello) + "\n"
        self._memory_bytes = memory_bytes
        self._process: subprocess.Popen[bytes] | None = None
        self._said: IO[bytes] | None = None
        self._served, self._at_first_bytes = 0, 0
        self._closed = False
        self._lock = threading.Lock()

    def ask(self, trial: Trial, timeout_s: float) -> dict[str, Json]:
        """The process's answer, or one that says how it died. A candidate is blamed for memory only in a process of its own."""
        answer = self._ask(trial, timeout_s)
        if answer["status"] == Status.OUT_OF_MEMORY.value and answer.pop("shared", False):
            answer = self._ask(trial, timeout_s)
        answer.pop("shared", None)
        return answer

    def _ask(self, trial: Trial, timeout_s: float) -> dict[str, Json]:
        failed = self._start()
        if failed:
            return {"status": Status.CRASHED.value, "reason": failed, "did_not_start": True}
        process, said, shared = self._process, self._said, self._served > 0
        if process is None or said is None or process.stdin is None:
            raise FarmClosed
        self._served += 1
        said.truncate(0)
        with contextlib.suppress(OSError):
            process.stdin.write((json.dumps(trial.to_json()) + "\n").encode())
            process.stdin.flush()
        line, why = self._line(process, timeout_s)
        if line is not None:
            answer = _parsed(line)
            if answer is None:
                self._end()
                return {"status": Status.CRASHED.value, "reason": "the compiler wrote something else than an answer"}
            if answer["status"] == Status.COMPILE_ERROR.value and "PassManager" in answer.get("reason", ""):
                answer["reason"] = f"{answer['reason']} ({self._telling()})"
            if answer["status"] == Status.OUT_OF_MEMORY.value or self._worn(process.pid):
                self._end()
            return answer | {"shared": shared}
        telling = self._telling()
        code = self._end(wait_s=END_S if why == "ended" else 0.0)
        if why == "timeout":
            return {"status": Status.TIMEOUT.value, "reason": f"compiling took more than {timeout_s:g} s"}
        if why == "memory" or _MEMORY.search(telling):
            limit = self._memory_bytes / (1 << 30)
            return {"status": Status.OUT_OF_MEMORY.value, "reason": f"compiling took more than {limit:.1f} GiB of memory", "shared": shared}
        how = f"the compiler died with {_how(code)}"
        return {"status": Status.CRASHED.value, "reason": f"{how}: {telling}" if telling else how}

    def _line(self, process: subprocess.Popen[bytes], timeout_s: float) -> tuple[bytes | None, str]:
        """A line of the process, or None and why: "timeout", "memory" or "ended"."""
        assert process.stdout is not None
        handle, text = process.stdout.fileno(), bytearray()
        give_up = time.monotonic() + timeout_s
        while True:
            ready, _, _ = select.select([handle], [], [], max(0.0, min(LOOK_S, give_up - time.monotonic())))
            if self._closed:
                raise FarmClosed
            if ready:
                piece = os.read(handle, 1 << 16)
                if not piece:
                    return None, "ended"
                text += piece
                if text.endswith(b"\n"):
                    return bytes(text), ""
            elif time.monotonic() >= give_up:
                return None, "timeout"
            elif _memory_bytes(process.pid) > self._memory_bytes:
                return None, "memory"

    def _start(self) -> str:
        """Make sure that a process runs and is ready; otherwise say why not."""
        if self._process is not None and self._process.poll() is None:
            return ""
        self._end()
        with self._lock:
            if self._closed:
                raise FarmClosed
            said = tempfile.TemporaryFile()  # noqa: SIM115  closed with the process
            process = subprocess.Popen(
                WORKER,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=said,
                # Compiling is what runs in parallel; torch's own threads would only fight over the cores.
                env=scrubbed(os.environ) | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
                start_new_session=True,  # ptxas and whatever else it starts can be killed with it, and Ctrl-C is the parent's to handle
            )
            self._process, self._said, self._served = process, said, 0
        assert process.stdin is not None
        with contextlib.suppress(OSError):
            process.stdin.write(self._hello.encode())
            process.stdin.flush()
        line, why = self._line(process, START_LIMIT_S)
        if line is None or "ready" not in (_parsed(line, "ready") or {}):
            telling = self._telling()
            code = self._end(wait_s=END_S if why == "ended" else 0.0)
            how = {"timeout": f"was not ready within {START_LIMIT_S:.0f} s", "memory": "took more memory than it may"}
            return f"the compiling process {how.get(why, f'ended at its start with {_how(code)}')}{': ' if telling else ''}{telling}"
        self._at_first_bytes = _memory_bytes(process.pid)
        return ""

    def _worn(self, pid: int) -> bool:
        grown, may = _memory_bytes(pid) - self._at_first_bytes, self._memory_bytes - self._at_first_bytes
        return grown > WORN * may

    def _telling(self) -> str:
        """The line on standard error that says most of what went wrong since the last candidate; empty if none does."""
        said = self._said
        if said is None:
            return ""
        size = os.fstat(said.fileno()).st_size
        text = os.pread(said.fileno(), 65_536, max(0, size - 65_536)).decode(errors="replace").replace("\0", "")
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        return next((line[:200] for line in lines if _TELLING.search(line)), "")

    def _end(self, wait_s: float = 0.0) -> int | None:
        """Kill the process and what it started; its exit code. One whose pipe has just closed has `wait_s` to end by itself: how it
        ends is worth knowing."""
        process, self._process = self._process, None
        said, self._said = self._said, None
        if said is not None:
            said.close()
        if process is None:
            return None
        code = process.poll()
        if code is None and wait_s:
            with contextlib.suppress(subprocess.TimeoutExpired):
                code = process.wait(timeout=wait_s)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=10)
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()
        return process.returncode if code is None else code

    def kill(self) -> None:
        """At once and for good, from any thread; whoever is asking gets FarmClosed."""
        with self._lock:
            self._closed = True
            process = self._process
        if process is not None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)

    def close(self) -> None:
        """Kill and reap. Called by the thread that asks."""
        self.kill()
        self._end()


def _parsed(line: bytes, field: str = "status") -> dict[str, Json] | None:
    """An answer, or None for anything else: a kernel may have found the pipe by its number and written to it."""
    try:
        answer = json.loads(line)
    except ValueError:
        return None
    return answer if isinstance(answer, dict) and field in answer else None


def _how(code: int | None) -> str:
    if code is None:
        return "no exit code"
    return f"signal {-code}" if code < 0 else f"exit code {code}"


def _memory_bytes(pid: int) -> int:
    """Resident memory of a process and everything that it started; 0 where the system does not tell (not Linux) or it is gone."""
    total, todo = 0, [pid]
    while todo:
        one = todo.pop()
        try:
            total += int(Path(f"/proc/{one}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
            for task in os.listdir(f"/proc/{one}/task"):
                todo += [int(child) for child in Path(f"/proc/{one}/task/{task}/children").read_text().split()]
        except (OSError, ValueError, IndexError):
            continue
    return total


def available_memory_bytes() -> int | None:
    """What may still be taken: of the machine, or of the control group where that is less. None where the system does not tell."""
    found = []
    with contextlib.suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        found.append(next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable")))
    with contextlib.suppress(OSError, ValueError):
        group = Path("/sys/fs/cgroup")
        found.append(int((group / "memory.max").read_text()) - int((group / "memory.current").read_text()))
    return max(0, min(found)) if found else None
