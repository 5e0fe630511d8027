"""The project's own tests of every kernel on a device (`pytest -m gpu`), as a part of the evidence: what they came to, and why."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from klab.harness.fleet.devices import Device, devices
from klab.harness.measure.client import scrubbed
from klab.harness.measure.lock import exclusive
from klab.harness.store.paths import checkout
from klab.harness.tune import device_tests_turns as turns
from klab.kernels.contract import Chip
from klab.kernels.disk_cache import cache_root
from klab.kernels.errors import CannotMeasure

# Compiling takes most of a test, on one core: all cores but two. Each process has torch and a context on the device.
PROCESSES, MEMORY_KIB = 14, 4 << 20
# A test that takes longer hangs: pytest's own limit (300 s) cannot end one that waits for the device.
TEST_S = 330.0
POLL_S, SAVE_S = 0.05, 5.0
# To write down where a process was, to kill it, and to read what was noted.
STACK_S, ENDING_S = 1.0, 3.0
# How a test ends that shows a defect.
FAILED = ("failed", "error", "crashed", "hung")
# Processes that end before their first test, one after the other: a further one would do no better.
FRUITLESS = 2


@dataclass(frozen=True)
class Ended:
    """How a test ended: passed, skipped, failed, error, crashed, hung, unfinished; `text` says why it did not pass."""

    outcome: str
    seconds: float = 0.0
    text: str = ""

    @property
    def failed(self) -> bool:
        """True where there is a defect."""
        return self.outcome in FAILED


@dataclass(frozen=True)
class DeviceTests:
    """What a run came to, by the test's name. `left`: how many were not reached, `stopped`: why."""

    tests: Mapping[str, Ended] = field(default_factory=dict)
    left: int = 0
    stopped: str = ""

    @property
    def counts(self) -> dict[str, int]:
        """How many ended how."""
        return dict(sorted(Counter(one.outcome for one in self.tests.values()).items()))


@contextmanager
def free_device(chip: Chip) -> Iterator[Device]:
    """A device of the chip that nobody measures on, locked within the block; CannotMeasure, saying who measures, where there is none.

    What the tests lock themselves is in a folder of their own (tests/conftest.py), so that they do not wait for this lock.
    """
    taken = list[str]()
    with ExitStack() as lock:
        for device in devices(chip):
            try:
                lock.enter_context(exclusive(device.id))
            except CannotMeasure as error:
                taken.append(str(error))
                continue
            yield device
            return
        raise CannotMeasure("; ".join(taken))


def run_device_tests(
    limit_s: float | None,
    done: Sequence[str] = (),
    last: Sequence[str] = (),
    *,
    save: Callable[[DeviceTests], None] = lambda found: None,
    visible: str | None = None,
    test_s: float = TEST_S,
) -> DeviceTests:
    """Run those that are not among `done`, those in `last` at the end, in processes side by side, for so many seconds at most.

    A test that crashes its process, loses the device's context or hangs costs itself alone. `save` gets what there is every few seconds
    and at the end, KeyboardInterrupt included. visible: the device, as CUDA_VISIBLE_DEVICES has it; None for what the user has there.
    CannotMeasure where the tests or pytest are not here.
    """
    root = checkout()
    if root is None or not (root / "tests").is_dir():
        raise CannotMeasure("the tests are not here: they are part of the checkout, not of an installed klab")
    if importlib.util.find_spec("pytest") is None:
        raise CannotMeasure("the tests need pytest, which is not installed")
    deadline = float("inf") if limit_s is None else time.monotonic() + max(0.0, limit_s - ENDING_S)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        return _Run(root, Path(folder), done, last, visible, test_s).until(deadline, save)


def processes() -> int:
    """As many as cores and memory have room for."""
    cores = len(os.sched_getaffinity(0))
    with suppress(OSError, StopIteration, ValueError):
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
        free = next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
        cores = min(cores, 2 + free // MEMORY_KIB)
    return max(1, min(PROCESSES, cores - 2))


class _Run:
    """The processes of one run, and the folder where they meet."""

    def __init__(self, root: Path, folder: Path, done: Sequence[str], last: Sequence[str], visible: str | None, test_s: float) -> None:
        self.root, self.folder, self.done, self.test_s = root, folder, set(done), test_s
        self.device = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
        (folder / "last").write_text("\n".join(last), encoding="utf-8")
        for name in done:
            (folder / turns.claim_of(name)).touch()
        self.live: dict[int, subprocess.Popen[bytes]] = {}
        self.ended: dict[str, Ended] = {}
        self.fruitless, self.words = 0, ""

    def until(self, deadline: float, save: Callable[[DeviceTests], None]) -> DeviceTests:
        """All that is done by then."""
        stopped, saved = "interrupted", time.monotonic()
        try:
            for _ in range(processes()):
                self._start()
            while self.live and time.monotonic() < deadline:
                time.sleep(POLL_S)
                self._look()
                if time.monotonic() - saved > SAVE_S:
                    saved = time.monotonic()
                    for pid in self.live:
                        self._take(self._events(pid))
                    save(DeviceTests(dict(self.ended), 1, "interrupted"))
            stopped = "stopped at the end of its share of the time" if self.live else ""
        finally:
            now = list(self.live)
            self._kill(now)
            for pid in now:
                self._gather(pid, "unfinished")
            found = self._found(stopped)
            save(found)
        return found

    def _found(self, stopped: str) -> DeviceTests:
        try:
            names = (self.folder / "collected").read_text(encoding="utf-8").splitlines()
        except OSError:
            names = []
        if not names and not stopped:
            raise CannotMeasure(f"the tests did not run: {self.words or 'pytest ended without a word'}")
        reached = {name for name, one in self.ended.items() if one.outcome != "unfinished"}
        left = len(set(names) - self.done - reached) if names else 1
        return DeviceTests(dict(sorted(self.ended.items())), left, stopped or (self.words if left else ""))

    def _start(self) -> None:
        command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "--tb=short", "--color=no", "-p", "no:cacheprovider"]
        command += ["--continue-on-collection-errors", "-p", turns.__name__, "tests/kernels"]
        variables = scrubbed(os.environ) | {
            turns.FOLDER: str(self.folder),
            turns.CACHE: str(cache_root()),
            # The other processes have the other cores.
            "OMP_NUM_THREADS": "1",
            "TORCHINDUCTOR_COMPILE_THREADS": "1",
            **self.device,
        }
        with tempfile.NamedTemporaryFile(dir=self.folder, delete=False) as log:
            process = subprocess.Popen(
                command,
                cwd=self.root,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=variables,
                start_new_session=True,
            )
        Path(log.name).rename(self.folder / f"{process.pid}.log")
        self.live[process.pid] = process

    def _look(self) -> None:
        """Whether a process has ended or hangs: another takes its place."""
        for pid, process in list(self.live.items()):
            if process.poll() is None:
                events = self._events(pid)
                if not events or time.monotonic() - events[-1]["at"] < self.test_s:
                    continue
                self._kill([pid])
                how = "hung"
            else:
                del self.live[pid]
                how = "" if process.returncode in (0, 1, 5) else "crashed"  # pytest's codes of a run to its end
            began = self._gather(pid, how)
            self.fruitless = 0 if began else self.fruitless + 1
            if how and self.fruitless < FRUITLESS:
                self._start()

    def _gather(self, pid: int, how: str) -> bool:
        """Take over what a process noted before it ended, `how`; "" when it had no test left. False when it began none."""
        events, log = self._events(pid), _tail(self.folder / f"{pid}.log")
        began = self._take(events)
        self._blame(events, how, log, began)
        for turn in self.folder.glob("turn.*"):  # those that it had taken and never began
            owner, _, name = turn.read_text(encoding="utf-8").partition(" ")
            if owner == str(pid) and name not in began:
                turn.unlink()
        if not events:
            self.words = next((line for line in reversed(log.splitlines()) if line.strip()), "")[:300]
        return bool(began) or not how

    def _take(self, events: Sequence[Mapping[str, Any]]) -> dict[str, float]:
        """When each test began; how those that ended did, is kept."""
        began: dict[str, float] = {}
        for event in events:
            name, outcome, at = event["test"], event["outcome"], event["at"]
            before = self.ended.get(name)
            if outcome == "begun":
                began[name] = at
            elif outcome != "ended" and not (before and before.failed):
                self.ended[name] = Ended(outcome, round(at - began.get(name, at), 1), str(event.get("text", "")))
        return began

    def _blame(self, events: Sequence[Mapping[str, Any]], how: str, log: str, began: Mapping[str, float]) -> None:
        """The test at which a process ended before its time, unless its failure is known already."""
        if not how or not events or events[-1]["outcome"] == "ended":
            return
        name = str(events[-1]["test"])
        known = self.ended.get(name)
        if name in began and not (known and known.failed) and not (how == "unfinished" and known):
            self.ended[name] = Ended(how, round(time.monotonic() - began[name], 1), turns.shortened(log))

    def _events(self, pid: int) -> list[dict[str, Any]]:
        """The last line may be torn."""
        try:
            lines = (self.folder / f"{pid}.jsonl").read_text(encoding="utf-8").split("\n")[:-1]
            return [json.loads(line) for line in lines]
        except (OSError, ValueError):
            return []

    def _kill(self, pids: Iterable[int]) -> None:
        """With whatever they started; each writes its stack first, which shows where it hung."""
        ended = [self.live.pop(pid) for pid in pids]
        for how in (signal.SIGABRT, signal.SIGKILL):
            for process in ended:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, how)
            until = time.monotonic() + STACK_S
            for process in ended:
                with suppress(subprocess.TimeoutExpired):
                    process.wait(max(0.0, until - time.monotonic()))


def _tail(path: Path) -> str:
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - 2 * turns.TAIL))
            return file.read().decode("utf-8", "replace").strip()
    except OSError:
        return ""
