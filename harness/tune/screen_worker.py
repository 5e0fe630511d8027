"""The process that compiles candidates: one JSON object per line in, one per line out. It may crash; its parent starts another."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import sys
import threading
import time
from pathlib import Path
from typing import TextIO

from klab.harness.store.result import Status
from klab.harness.tune.inspect_cubin import inspect_artifact
from klab.harness.tune.offline import compile_launch
from klab.kernels.contract import Chip, Config, Json, Kernel, Problem
from klab.kernels.discover import Catalogue, discover
from klab.kernels.errors import KlabError


def _private_stdout() -> TextIO:
    """The pipe to the parent; file descriptor 1 becomes stderr, so that a compiler that prints cannot break a line."""
    pipe = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return pipe


def _told(error: BaseException) -> str:
    """Type and telling line of an error, at most 300 characters: usually the first line.

    A Triton CompilationError begins with where ("at 2:26:") and the source up to there, and only then says what; one that passed
    through a call says nothing itself, and its cause does.
    """
    while hasattr(error, "error_message") and not error.error_message and error.__cause__ is not None:
        error = error.__cause__
    said = getattr(error, "error_message", None) or str(error)
    lines = [line.strip() for line in str(said).splitlines() if line.strip()]
    if lines and re.fullmatch(r"at \d+:\d+:", lines[0]):
        # The same as text alone, from whoever caught and raised it again: what follows the caret, else the line that the caret is under.
        carets = [at for at, line in enumerate(lines) if line == "^"]
        after = lines[carets[-1] + 1 :] if carets else lines[1:]
        lines = after or [f"{lines[0]} {lines[-2]}"]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:300]


def answer(trial: dict[str, Json], catalogue: Catalogue, chip: Chip) -> dict[str, Json]:
    """Compile one trial's launch and describe it."""
    kernel = catalogue.kernels.get(trial["kernel"])
    if kernel is None:
        return {"status": Status.UNSUPPORTED.value, "reason": f"{trial['kernel']} cannot be imported here"}
    problem = catalogue.operators[trial["operator"]].from_json(trial["problem"])
    config = kernel.config_type.from_json(trial["config"])
    about: dict[str, Json] = {"source_digest": kernel.source_digest, "from_default": _from_default(kernel, problem, config, chip)}
    try:
        unfit = kernel.fits(problem, config, chip)
    except Exception as error:  # noqa: BLE001  whatever a kernel's author did wrong is that candidate's row
        unfit = f"its fits raised {_told(error)}"
    if unfit is not None:
        return {"status": Status.UNSUPPORTED.value, "reason": unfit, **about}
    if kernel.backend not in ("triton", "cuda"):
        return {"status": Status.OK.value, "functions": [], **about}
    try:
        artifacts, seconds = compile_launch(kernel, problem, config, chip)
        functions = [inspect_artifact(a).to_json() for a in artifacts]
    except MemoryError as error:
        return {"status": Status.OUT_OF_MEMORY.value, "reason": f"compiling ran out of memory ({_told(error)})", **about}
    except Exception as error:  # noqa: BLE001  whatever a kernel's author did wrong is that candidate's row
        return {"status": Status.COMPILE_ERROR.value, "reason": _told(error), **about}
    kept = sorted({a.metadata["kept"] for a in artifacts if a.metadata.get("kept")})
    return {"status": Status.OK.value, "functions": functions, "compile_s": round(seconds, 4), "kept": kept, **about}


def _from_default(kernel: Kernel, problem: Problem, config: Config, chip: Chip) -> int | None:
    """How many fields differ from the kernel's default; None where its default raises."""
    try:
        default: dict[str, Json] = kernel.default(problem, chip).to_json_full()
    except Exception:  # noqa: BLE001  whatever a kernel's author did wrong
        return None
    return len([name for name, value in config.to_json_full().items() if default.get(name) != value])


def _limit_memory(more_bytes: int) -> None:
    """Let this process, and each that it starts, have so much private memory beyond what the imports took; an allocation beyond fails."""
    with contextlib.suppress(ImportError, OSError, ValueError, StopIteration):
        import resource

        lines = Path("/proc/self/status").read_text().splitlines()
        used = next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmData"))
        _, hard = resource.getrlimit(resource.RLIMIT_DATA)
        wanted = used + more_bytes
        resource.setrlimit(resource.RLIMIT_DATA, (wanted if hard == resource.RLIM_INFINITY else min(wanted, hard), hard))


def _end_with(parent: int) -> None:
    """Nobody reads the answers of a process whose parent was killed, and a compiler that hangs would stay for ever."""
    while os.getppid() == parent:
        time.sleep(2.0)
    if os.getpgrp() == os.getpid():
        os.killpg(0, signal.SIGKILL)  # with what it started
    os._exit(1)


def main() -> None:
    """Say that it is ready, then serve until the parent closes the pipe."""
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    pipe = _private_stdout()
    hello = json.loads(sys.stdin.readline())
    chip = Chip.from_json(hello["chip"])
    catalogue = discover(hello["kernel_dirs"])
    _limit_memory(hello["memory_bytes"])

    def say(reply: dict[str, Json]) -> None:
        pipe.write(json.dumps(reply) + "\n")
        pipe.flush()

    say({"ready": True})
    for line in sys.stdin:
        try:
            reply = answer(json.loads(line), catalogue, chip)
        except KlabError as error:
            reply = {"status": Status.UNSUPPORTED.value, "reason": str(error)}
        say(reply)


if __name__ == "__main__":
    main()
