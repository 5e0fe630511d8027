"""The project's own tests of every kernel on a device (`pytest -m gpu`), as a part of the evidence: what they came to."""

from __future__ import annotations

import importlib.util
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from klab.harness.measure.client import scrubbed
from klab.harness.store.paths import checkout
from klab.kernels.errors import CannotMeasure

_WORDS = "PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS"
# One line per test with -v: `tests/kernels/test_on_device.py::test_x[...] PASSED [ 10%]`.
_LINE = re.compile(rf"^(?P<name>tests/\S+?::.*?) (?P<word>{_WORDS})\b")
# The same from several processes: `[gw1] [ 10%] PASSED tests/kernels/test_on_device.py::test_x[...]`.
_LINE_OF_MANY = re.compile(rf"^\[gw\d+\] (?:\[ *\d+%\] )?(?P<word>{_WORDS}) (?P<name>tests/\S+?::.*?)\s*$")
# Each compiles for itself: processes side by side keep the cores busy, and the device has room for their contexts.
PROCESSES = 8
NAMED = 40
# For a worker to end after it was asked to.
GRACE_S = 10.0


@dataclass(frozen=True)
class DeviceTests:
    """How many ended how (in pytest's words, small), who failed (NAMED of them at most), why the run ended before its end, who passed."""

    counts: dict[str, int] = field(default_factory=dict)
    failed: tuple[str, ...] = ()
    stopped: str = ""
    passed: tuple[str, ...] = ()


def run_device_tests(limit_s: float | None, passed: Sequence[str] = ()) -> DeviceTests:
    """Run those that are not among `passed` in processes of their own, for so many seconds at most.

    CannotMeasure where the tests or pytest are not here.
    """
    root = checkout()
    if root is None or not (root / "tests").is_dir():
        raise CannotMeasure("the tests are not here: they are part of the checkout, not of an installed klab")
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-v", "--color=no", "-p", "no:cacheprovider", "tests/kernels"]
    processes = min(PROCESSES, len(os.sched_getaffinity(0)) // 2)
    if processes > 1 and importlib.util.find_spec("xdist") is not None:
        command += ["-n", str(processes), "--dist", "loadgroup"]
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile("w+") as out:
        if passed:
            # Hundreds of names are too long for a command line.
            named = Path(folder) / "passed"
            named.write_text("".join(f"--deselect={name}\n" for name in passed), encoding="utf-8")
            command.append(f"@{named}")
        process = subprocess.Popen(
            command, cwd=root, stdout=out, stderr=subprocess.STDOUT, env=scrubbed(os.environ), start_new_session=True
        )
        stopped = ""
        try:
            process.wait(limit_s)
        except subprocess.TimeoutExpired:
            stopped = f"stopped after {limit_s:.0f} s"
        finally:
            _end(process)
        out.seek(0)
        text = out.read()
    found = outcome(text, stopped)
    if not found.counts and not stopped and process.returncode not in (0, 5):
        lines = [line for line in text.splitlines() if line.strip()]
        raise CannotMeasure(f"the tests did not run: {lines[-1][:200] if lines else f'exit code {process.returncode}'}")
    return found


def outcome(text: str, stopped: str = "") -> DeviceTests:
    """What pytest's lines say."""
    counts: Counter[str] = Counter()
    failed, passed = [], []
    for line in text.splitlines():
        if found := _LINE.match(line) or _LINE_OF_MANY.match(line):
            counts[found["word"].lower()] += 1
            if found["word"] in ("FAILED", "ERROR"):
                failed.append(found["name"].partition("::")[2])
            elif found["word"] == "PASSED":
                passed.append(found["name"])
    return DeviceTests(dict(sorted(counts.items())), tuple(failed[:NAMED]), stopped, tuple(passed))


def _end(process: subprocess.Popen[bytes]) -> None:
    """With whatever it started: a hanging kernel must not outlive the part."""
    for how in (signal.SIGINT, signal.SIGKILL):
        if process.poll() is None:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, how)
            with suppress(subprocess.TimeoutExpired):
                process.wait(GRACE_S)
