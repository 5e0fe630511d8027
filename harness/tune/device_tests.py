"""The project's own tests of every kernel on a device (`pytest -m gpu`), as a part of the evidence: what they came to."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field

from klab.harness.store.paths import checkout
from klab.kernels.errors import CannotMeasure

# One line per test with -v: `tests/kernels/test_on_device.py::test_x[...] PASSED [ 10%]`.
_LINE = re.compile(r"^(tests/\S+::.*?) (PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS)\b")
NAMED = 40
# For a worker to end after it was asked to.
GRACE_S = 10.0


@dataclass(frozen=True)
class DeviceTests:
    """How many ended how (in pytest's words, small), who failed (NAMED of them at most), and why the run ended before its end."""

    counts: dict[str, int] = field(default_factory=dict)
    failed: tuple[str, ...] = ()
    stopped: str = ""


def run_device_tests(limit_s: float | None) -> DeviceTests:
    """Run them in a process of their own, for so many seconds at most. CannotMeasure where the tests or pytest are not here."""
    root = checkout()
    if root is None or not (root / "tests").is_dir():
        raise CannotMeasure("the tests are not here: they are part of the checkout, not of an installed klab")
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-v", "--color=no", "-p", "no:cacheprovider", "tests/kernels"]
    with tempfile.TemporaryFile("w+") as out:
        process = subprocess.Popen(command, cwd=root, stdout=out, stderr=subprocess.STDOUT, start_new_session=True)
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
    failed = []
    for line in text.splitlines():
        if found := _LINE.match(line):
            counts[found[2].lower()] += 1
            if found[2] in ("FAILED", "ERROR"):
                failed.append(found[1].partition("::")[2])
    return DeviceTests(dict(sorted(counts.items())), tuple(failed[:NAMED]), stopped)


def _end(process: subprocess.Popen[bytes]) -> None:
    """With whatever it started: a hanging kernel must not outlive the part."""
    for how in (signal.SIGINT, signal.SIGKILL):
        if process.poll() is None:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, how)
            with suppress(subprocess.TimeoutExpired):
                process.wait(GRACE_S)
