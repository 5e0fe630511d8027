"""Files from outside the package: importing one, and finding out in a process of its own which of them end or hang it."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import io
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType

# An import of torch and triton takes 10 s from a cold disk; a file that is still at it after this long hangs.
IMPORT_LIMIT_S = 60.0

# What is known of files that a process of its own has imported, as JSON: identity -> why it is refused, or "". Processes that klab starts
# inherit it (KLAB_*), so that each file is tried once and not again by every worker.
KNOWN = "KLAB_PROBED_KERNELS"


def load(path: Path) -> ModuleType:
    """Import a file under a name of its own. What it prints goes to standard error, and it has no standard input."""
    name = "klab_user_kernels_" + "_".join(path.with_suffix("").parts[1:])
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"cannot load {path}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # before execution: Triton and dataclasses look their module up by name
    with _aside():
        spec.loader.exec_module(module)
    return module


def rejected(paths: Sequence[Path], *, limit_s: float = IMPORT_LIMIT_S) -> dict[Path, str]:
    """Which of these files end or hang the process that imports them, and how, in one line each. The others may still raise.

    Files that this process or the one that started it has tried already are not tried again, unless they changed since.
    """
    known = _known()
    identities = {path: _identity(path) for path in paths}
    unknown = [path for path in paths if identities[path] not in known]
    if unknown:
        found = _probe(unknown, limit_s)
        known |= {identities[path]: found.get(path, "") for path in unknown}
        os.environ[KNOWN] = json.dumps(known)
    return {path: known[identities[path]] for path in paths if known[identities[path]]}


def _known() -> dict[str, str]:
    try:
        known = json.loads(os.environ.get(KNOWN, "{}"))
    except ValueError:
        return {}
    return known if isinstance(known, dict) else {}


def _identity(path: Path) -> str:
    """A file as it is now."""
    try:
        found = path.stat()
    except OSError:
        return str(path)
    return hashlib.sha256(f"{path} {found.st_mtime_ns} {found.st_size} {found.st_ino}".encode()).hexdigest()[:16]


def _probe(paths: Sequence[Path], limit_s: float) -> dict[Path, str]:
    """Import the files one after another in one process (most import the same toolkits); each that ends it costs a fresh one."""
    refused: dict[Path, str] = {}
    left = list(paths)
    while left:
        finished, how = _import_apart(left, limit_s)
        if finished is None or finished == len(left):  # no process came up to tell, or it came through
            break
        refused[left[finished]] = how
        left = left[finished + 1 :]
    return refused


def _import_apart(paths: Sequence[Path], limit_s: float) -> tuple[int | None, str]:
    """(how many were imported before the process ended, how it ended); None when it did not get as far as the first."""
    reading, writing = os.pipe()
    try:
        # -P: do not import from the current folder, where a file named random.py may lie.
        process = subprocess.Popen(
            [sys.executable, "-P", "-c", "from klab.kernels.user_files import serve; serve()", str(writing), *map(str, paths)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            pass_fds=[writing],
            start_new_session=True,
        )
    except OSError:
        os.close(reading)
        return None, ""
    finally:
        os.close(writing)
    marks, deadline = 0, time.monotonic() + limit_s
    how = "ended the process at import"
    try:
        while marks <= len(paths):
            ready, _, _ = select.select([reading], [], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                how = f"did not finish importing in {limit_s:g} s"
                break
            news = os.read(reading, 4096)
            if not news:
                code = process.wait()
                how += f" ({signal.Signals(-code).name})" if -code in set(signal.Signals) else f" (exit status {code})"
                break
            marks, deadline = marks + len(news), time.monotonic() + limit_s
    finally:
        os.close(reading)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)  # what a file started goes with it
        process.wait()
    return (None if marks == 0 else marks - 1), how


def serve() -> None:
    """The process of `_import_apart`: one byte when it is up and one more after each file."""
    pipe, *paths = sys.argv[1:]
    os.write(int(pipe), b".")
    for path in paths:
        with contextlib.suppress(BaseException):  # what raises is told by the process that wants the kernels
            load(Path(path))
        os.write(int(pipe), b".")
    os._exit(0)


@contextlib.contextmanager
def _aside() -> Iterator[None]:
    """File descriptor 1 is standard error meanwhile, and 0 is empty: standard output is for what klab was asked for."""
    saved: list[tuple[int, int]] = []
    keyboard, sys.stdin = sys.stdin, io.StringIO()  # what was read ahead from descriptor 0 is not for a file either
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
    try:
        with contextlib.suppress(OSError):  # a process may run without one of them
            empty = os.open(os.devnull, os.O_RDONLY)
            saved.append((os.dup(0), 0))
            os.dup2(empty, 0)
            os.close(empty)
        with contextlib.suppress(OSError):
            saved.append((os.dup(1), 1))
            os.dup2(2, 1)
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        sys.stdin = keyboard
        with contextlib.suppress(OSError, ValueError):
            sys.stderr.flush()
            sys.stdout.flush()
        for copy, descriptor in saved:
            os.dup2(copy, descriptor)
            os.close(copy)
