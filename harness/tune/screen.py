"""Screen candidates with no GPU: compile each for the chip in a process that may die, and drop what cannot run or cannot matter."""

from __future__ import annotations

import dataclasses
import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from klab.harness.measure.client import scrubbed
from klab.harness.plan.trial import Trial
from klab.harness.store.result import Status
from klab.kernels.contract import Chip, Json

NOT_SCREENED = "not screened"


@dataclass(frozen=True)
class Limits:
    """When a compiled candidate is dropped. 512 B of stack per thread is where a matmul tile is lost to spills: 128x256x64 with
    4 warps spills 792 B on sm_90, and its 8-warp twin none."""

    stack_bytes: int = 512
    timeout_s: float = 120.0


@dataclass(frozen=True)
class Screened:
    """What screening says of one trial. `status` is ok (worth measuring), screened (dropped by `rule`), or how it failed."""

    trial: Trial
    status: Status
    rule: str
    reason: str
    functions: Sequence[dict[str, Json]] = field(default_factory=list)
    compile_s: float | None = None

    def to_json(self) -> dict[str, Json]:
        """One row for `klab screen --json`."""
        return {
            **self.trial.to_json(),
            "key": self.trial.key,
            "status": self.status.value,
            "rule": self.rule,
            "reason": self.reason,
            "compile_s": self.compile_s,
            "functions": list(self.functions),
        }


class _Compiler:
    """One compiling process, started when first needed and again after each death."""

    def __init__(self, chip: Chip, kernel_dirs: Iterable[Path | str]) -> None:
        self._hello = json.dumps({"chip": dataclasses.asdict(chip), "kernel_dirs": [str(d) for d in kernel_dirs]})
        self._process: subprocess.Popen[str] | None = None

    def ask(self, trial: Trial, timeout_s: float) -> dict[str, Json]:
        """The worker's answer, or one that says how it died."""
        process = self._started()
        assert process.stdin is not None and process.stdout is not None
        expired = threading.Event()

        def expire() -> None:
            expired.set()
            process.kill()

        timer = threading.Timer(timeout_s, expire)
        timer.start()
        try:
            process.stdin.write(json.dumps(trial.to_json()) + "\n")
            process.stdin.flush()
            line = process.stdout.readline()
        except BrokenPipeError:
            line = ""
        finally:
            timer.cancel()
        if line:
            answer: dict[str, Json] = json.loads(line)
            return answer
        code = process.wait()
        self._process = None
        if expired.is_set():
            return {"status": Status.TIMEOUT.value, "reason": f"compiling took more than {timeout_s:.0f} s"}
        return {"status": Status.CRASHED.value, "reason": f"the compiler died with {'signal' if code < 0 else 'exit code'} {abs(code)}"}

    def _started(self) -> subprocess.Popen[str]:
        if self._process is None or self._process.poll() is not None:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "klab.harness.tune.screen_worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                # Compiling is what runs in parallel; torch's own threads would only fight over the cores.
                env=scrubbed(os.environ) | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
            )
            assert self._process.stdin is not None
            self._process.stdin.write(self._hello + "\n")
            self._process.stdin.flush()
        return self._process

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None


def screen(
    trials: Sequence[Trial],
    chip: Chip,
    *,
    kernel_dirs: Iterable[Path | str] = (),
    jobs: int | None = None,
    limits: Limits | None = None,
    on_done: Callable[[Screened], None] = lambda _: None,
    stop: threading.Event | None = None,
    deadline: float | None = None,
) -> list[Screened]:
    """Compile every trial for `chip` on `jobs` processes (default: one per core) and judge it.

    Kernels that have nothing to compile (libraries, CPU kernels) come back ok at once. Never raises for a candidate's fault: a
    crash, a hang or a compile error is that candidate's row. The order of the answer is the order of `trials`; of duplicates the
    first one stays. With `stop` set, or past `deadline` (of time.monotonic()), the rest comes back unscreened (ok, "not screened").
    """
    limits = limits or Limits()
    dirs = list(kernel_dirs)
    jobs = max(1, jobs or len(os.sched_getaffinity(0)))
    idle: queue.Queue[_Compiler] = queue.Queue()
    compilers = [_Compiler(chip, dirs) for _ in range(min(jobs, max(1, len(trials))))]
    for compiler in compilers:
        idle.put(compiler)

    def one(trial: Trial) -> Screened:
        if (stop is not None and stop.is_set()) or (deadline is not None and time.monotonic() >= deadline):
            return Screened(trial, Status.OK, NOT_SCREENED, "screening was stopped")
        compiler = idle.get()
        try:
            found = _judge(trial, compiler.ask(trial, limits.timeout_s), chip, limits)
        finally:
            idle.put(compiler)
        on_done(found)
        return found

    try:
        with ThreadPoolExecutor(len(compilers)) as pool:
            return _drop_duplicates(list(pool.map(one, trials)))
    finally:
        for compiler in compilers:
            compiler.close()


def _judge(trial: Trial, answer: dict[str, Json], chip: Chip, limits: Limits) -> Screened:
    functions: list[dict[str, Json]] = answer.get("functions", [])

    def ended(status: Status, rule: str, reason: str) -> Screened:
        return Screened(trial, status, rule, reason, functions, answer.get("compile_s"))

    status = Status(answer["status"])
    if status is not Status.OK:
        return ended(status, status.value.replace("_", " "), answer.get("reason", ""))
    for f in functions:
        if f["smem_bytes"] > chip.smem_per_block_bytes:
            need, have = f["smem_bytes"] / 1024, chip.smem_per_block_bytes / 1024
            return ended(Status.SCREENED, "does not fit", f"{f['name']} needs {need:.0f} KB of shared memory, {chip.name} has {have:.0f}")
        if f["tmem_columns"] > 512:
            return ended(Status.SCREENED, "does not fit", f"{f['name']} needs {f['tmem_columns']} columns of tensor memory of 512")
        if f["threads"] * f["registers"] > 65536:
            return ended(Status.SCREENED, "does not fit", f"{f['name']} needs {f['threads']} x {f['registers']} registers of 65536")
        if f["stack_bytes"] > limits.stack_bytes:
            return ended(Status.SCREENED, "spills", f"{f['name']} spills: {f['stack_bytes']} B of stack per thread")
    wants = trial.config.to_json_full().get("warp_specialize", False)
    if wants and functions and not any(f["warp_specialised"] for f in functions):
        return ended(Status.SCREENED, "silent no-op", "warp specialisation was asked for and not built")
    return ended(Status.OK, "", "")


def _drop_duplicates(found: list[Screened]) -> list[Screened]:
    """Of candidates of one problem whose functions and launches are equal to the last instruction, keep the first."""
    first: dict[tuple[Json, ...], Screened] = {}
    kept: list[Screened] = []
    for item in found:
        if item.status is Status.OK and item.functions:
            parts = ((f["sass_hash"], f["launch"], f["threads"], f["smem_bytes"]) for f in item.functions)
            signature = (item.trial.problem.key, *parts)
            twin = first.setdefault(signature, item)
            if twin is not item:
                reason = f"the same machine code and launch as {twin.trial.kernel} {twin.trial.config.label()}"
                item = dataclasses.replace(item, status=Status.SCREENED, rule="duplicate", reason=reason)
        kept.append(item)
    return kept


def tally(found: Iterable[Screened]) -> dict[str, int]:
    """How many candidates fell to which rule; "kept" for those worth measuring, "not screened" for those not reached."""
    return dict(Counter((s.rule or "kept") if s.status is Status.OK else s.rule for s in found))
