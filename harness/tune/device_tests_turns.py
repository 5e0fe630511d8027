"""A plugin of pytest for processes that test one device side by side: each takes the next test that nobody has, and notes how it ended.

Every outcome is on the disk before the next test begins, so that a process may crash, hang or be killed at any time. A process whose CUDA
context is lost (an illegal access: every later call in it fails) ends, and another goes on.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pytest

# The folder in which the processes of one run meet.
FOLDER = "KLAB_DEVICE_TESTS"
# What the tests' own fixture hides: binaries that were compiled before, on this machine or ahead on another, serve here too.
CACHE = "KLAB_DEVICE_TESTS_CACHE"
# Characters of a failure that are kept, from its begin and its end.
HEAD, TAIL = 2000, 4000
LOST_CONTEXT = 70


def _folder() -> Path:
    return Path(os.environ[FOLDER])


def claim_of(name: str) -> str:
    """The file that says who has a test: process and name."""
    return f"turn.{hashlib.sha256(name.encode()).hexdigest()[:24]}"


def shortened(text: str) -> str:
    """A text of any length in HEAD + TAIL characters."""
    text = text.strip()
    return text if len(text) <= HEAD + TAIL else f"{text[:HEAD]}\n[... {len(text) - HEAD - TAIL} characters]\n{text[-TAIL:]}"


def _note(**event: Any) -> None:
    """With the monotonic time, which all processes of a machine share."""
    with (_folder() / f"{os.getpid()}.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps({"at": time.monotonic(), **event}) + "\n")


def _turns(items: list[pytest.Item]) -> Iterator[pytest.Item]:
    parent = os.getppid()
    for item in items:
        if os.getppid() != parent:  # whoever would gather the outcomes was killed
            return
        try:
            with (_folder() / claim_of(item.nodeid)).open("x", encoding="utf-8") as file:
                file.write(f"{os.getpid()} {item.nodeid}")
        except FileExistsError:
            continue
        yield item


def pytest_runtestloop(session: pytest.Session) -> bool:
    """Instead of pytest's own loop. Fixtures of a module live as long as the tests that this process takes from it."""
    names = [item.nodeid for item in session.items]
    listed = _folder() / f"collected.{os.getpid()}"
    listed.write_text("\n".join(names), encoding="utf-8")
    listed.replace(_folder() / "collected")
    last = [line for line in (_folder() / "last").read_text(encoding="utf-8").splitlines() if line]
    turns = _turns(sorted(session.items, key=lambda item: last.index(item.nodeid) if item.nodeid in last else -1))
    item = next(turns, None)
    while item is not None:
        following = next(turns, None)
        session.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
        item = following
    return True


def pytest_collectreport(report: pytest.CollectReport) -> None:
    """A file that cannot be imported is a failure of its own."""
    if report.failed:
        _note(test=report.nodeid, outcome="error", text=shortened(report.longreprtext))


def pytest_runtest_logstart(nodeid: str, location: object) -> None:
    """It begins."""
    _note(test=nodeid, outcome="begun")


def pytest_runtest_call(item: pytest.Item) -> None:
    """After the fixtures: compiled binaries are looked for where the user keeps them."""
    if cache := os.environ.get(CACHE):
        os.environ["KLAB_CACHE"] = cache


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """How one of its phases ended. A process that can do no more ends here."""
    if report.failed:
        # What the device printed and the first line of an assertion may be far apart: both ends are kept.
        output = "".join(text for title, text in report.sections if title.startswith("Captured std"))
        text = "\n".join(part for part in (shortened(report.longreprtext), output[-HEAD:].strip()) if part)
        _note(test=report.nodeid, outcome="failed" if report.when == "call" else "error", text=text)
        if _context_is_lost():
            os._exit(LOST_CONTEXT)
    elif report.skipped:
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longreprtext
        # An expected failure is reported as skipped.
        _note(test=report.nodeid, outcome="xfailed" if hasattr(report, "wasxfail") else "skipped", text=shortened(reason))
    elif report.when == "call":
        _note(test=report.nodeid, outcome="passed")
    if report.when == "teardown":
        _note(test=report.nodeid, outcome="ended")
        _give_back()


def _context_is_lost() -> bool:
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return False
    try:
        torch.cuda.synchronize()
    except Exception:  # noqa: BLE001 - of whatever kind, the next test would meet it too
        return True
    return False


def _give_back() -> None:
    """Cached memory of the device: several processes share it."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.empty_cache()
