"""The farm: processes that compile candidates for a chip, ahead of whoever measures them, on a machine that may have no GPU."""

from __future__ import annotations

import dataclasses
import heapq
import itertools
import os
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

from klab.harness.plan.trial import Trial
from klab.harness.store.result import Status
from klab.harness.tune.farm_compiler import Compiler, FarmClosed, available_memory_bytes
from klab.harness.tune.screen_cache import ScreenCache
from klab.harness.tune.screen_rules import Limits, Screened, as_duplicate, judge, not_screened
from klab.kernels.contract import Chip, Json

# The order of the queue: what somebody waits for, what is asked for now, what may be asked for later.
_WAITED, _URGENT, _AHEAD = 0, 1, 2
# So many compiling processes in a row that do not come up, and none is started again: the fault is the installation's.
_GIVE_UP_STARTS = 3
_NEVER = 1 << 30


@dataclass
class _Work:
    """One thing to compile: the trials that want it (policies may differ), how urgent it is, and what came out."""

    trials: dict[str, Trial]
    urgency: int
    started: bool = False
    found: Screened | None = None
    told: set[str] = field(default_factory=set)


class AnyCompiler(Protocol):
    """What compiles for one thread of a farm: farm_compiler.Compiler, or one on another machine."""

    def ask(self, trial: Trial, timeout_s: float) -> dict[str, Json]:
        """The answer for a candidate; FarmClosed after `kill`."""

    def kill(self) -> None:
        """At once and for good, from any thread."""

    def close(self) -> None:
        """Kill and reap, by the thread that asks."""


class Farm:
    """Compiles candidates in `jobs` processes and judges them; a crash, a hang or a memory hog is that candidate's row.

    `submit` returns at once and `wait` gives the verdict, so that compiling overlaps measuring. A live evaluator works like this:

        with Farm(chip, kernel_dirs=dirs) as farm:
            farm.submit(likely)                       # the first asks of the strategy: seeds, the prior's best
            while (ask := strategy.ask()).candidates:
                asked = [trial(c) for c in ask.candidates]
                farm.submit(asked, urgent=True)       # to the front of the queue
                farm.submit(neighbours_of_the_best)   # compiled while the GPU measures
                screened = [farm.wait(t, deadline=deadline) for t in asked]
                measure([s.trial for s in screened if s.status is Status.OK])

    The time spent in `wait` is the time in which the GPU waited for compilers. The binaries land where the measuring process looks for
    them (Triton's cache, klab's cubins), so it compiles nothing.

    Duplicates: `wait` gives a candidate whose machine code and launches equal those of one waited for before as a "duplicate" (its `twin`
    names the trial whose time it has), unless it is a default. What was only submitted claims nothing, so the verdicts depend on the order
    of the waits and not on which process was faster. `done` and `on_done` tell what is known of a candidate by itself.

    Threads may submit and wait at the same time. `on_done` is called for each trial, one call at a time, from the farm's threads (or that
    of `submit`, for what is known already); it may submit more.
    """

    def __init__(
        self,
        chip: Chip,
        *,
        kernel_dirs: Iterable[Path | str] = (),
        jobs: int | None = None,
        limits: Limits | None = None,
        cache_dir: Path | None = None,
        on_done: Callable[[Screened], None] = lambda _: None,
        compilers: Sequence[Callable[[], AnyCompiler]] = (),
    ) -> None:
        """`jobs`: default one per core, and no more than the memory that is free now has room for at `limits.memory_bytes` each.
        `cache_dir`: default $KLAB_CACHE or ~/.cache/klab. `compilers`: makers of compilers elsewhere, one job each, instead of any here."""
        self.chip, self.limits = chip, limits or Limits()
        self._makers = list(compilers)
        self.jobs = len(self._makers) or jobs or default_jobs(self.limits)
        self.compiled = 0
        self.cached = 0
        self._dirs = [str(Path(d).resolve()) for d in kernel_dirs]
        self._cache = ScreenCache(chip, cache_dir)
        self._on_done, self._telling = on_done, threading.RLock()
        self._work: dict[str, _Work] = {}
        self._queue: list[tuple[int, int, str]] = []
        self._order = itertools.count()
        self._changed = threading.Condition()
        self._threads: list[threading.Thread] = []
        self._compilers: list[AnyCompiler] = []
        # Threads without work; works not begun; works not done.
        self._idle, self._waiting, self._pending = 0, 0, 0
        self._claimed: dict[tuple[Json, ...], Screened] = {}
        self._closed = False
        self._broken = ""
        self._failed_starts = 0
        self._error: BaseException | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def submit(self, trials: Iterable[Trial], *, urgent: bool = False) -> None:
        """Compile these when it is their turn, in their order; at once is returned. What is known or in the queue is not compiled again,
        but moves to the front where it is `urgent` now. Nothing happens on a closed farm."""
        self._submit(list(trials), _URGENT if urgent else _AHEAD)

    def withdraw(self) -> None:
        """Forget what was submitted, not urgent, and has not begun: a strategy that changed its mind need not wait for it."""
        with self._changed:
            for identity, work in list(self._work.items()):
                if work.urgency == _AHEAD and not work.started:
                    del self._work[identity]
                    self._waiting, self._pending = self._waiting - 1, self._pending - 1
            self._changed.notify_all()

    def wait(self, trial: Trial, *, deadline: float | None = None) -> Screened:
        """The verdict, as soon as it is known; compiled before all others that nobody waits for.

        Past `deadline` (of time.monotonic()), or when the farm is closed meanwhile, it is "not screened" (status ok), as in `screen`.
        """
        self._submit([trial], _WAITED)
        return self._claim(self._await(trial, deadline))

    def done(self, trial: Trial) -> Screened | None:
        """What is known of the trial, or None while it is not compiled (or was never submitted)."""
        with self._changed:
            work = self._work.get(self._identity(trial))
            return None if work is None or work.found is None else _of(work.found, trial)

    def finish(self, *, deadline: float | None = None, stop: threading.Event | None = None) -> bool:
        """Wait until all that was submitted is compiled; False when `deadline` came or `stop` was set before."""
        while True:
            with self._changed:
                self._raise()
                if not self._pending:
                    return True
                if self._closed or (stop is not None and stop.is_set()) or (deadline is not None and time.monotonic() >= deadline):
                    return False
                left = None if deadline is None else max(0.0, deadline - time.monotonic())
                # A threading.Event cannot be waited for together with a condition.
                self._changed.wait(left if stop is None else min(0.1, left if left is not None else 0.1))

    def close(self) -> None:
        """Kill all compiling processes and what they started, at once. What waits gets "not screened"; calling it twice is fine."""
        with self._changed:
            self._closed = True
            self._queue.clear()
            self._changed.notify_all()
        for compiler in self._compilers:
            compiler.kill()
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join(timeout=10)

    def _submit(self, trials: Sequence[Trial], urgency: int) -> None:
        known: list[Screened] = []
        with self._changed:
            if self._closed:
                return
            for trial in trials:
                identity = self._identity(trial)
                work = self._work.get(identity)
                if work is None:
                    work = self._work[identity] = _Work({}, _NEVER)
                    self._waiting, self._pending = self._waiting + 1, self._pending + 1
                work.trials.setdefault(trial.key, trial)
                if work.found is not None:
                    if trial.key not in work.told:
                        work.told.add(trial.key)
                        known.append(_of(work.found, trial))
                elif not work.started and urgency < work.urgency:
                    work.urgency = urgency
                    heapq.heappush(self._queue, (urgency, next(self._order), identity))
            for _ in range(min(self.jobs - len(self._threads), self._waiting - self._idle)):
                compiler = self._makers[len(self._threads)]() if self._makers else self._compiler()
                thread = threading.Thread(target=self._serve, args=(compiler,), name=f"klab-farm-{len(self._threads)}", daemon=True)
                self._compilers.append(compiler)
                self._threads.append(thread)
                self._idle += 1
                thread.start()
            self._changed.notify_all()
        self._tell(known)

    def _await(self, trial: Trial, deadline: float | None) -> Screened:
        with self._changed:
            while True:
                self._raise()
                work = self._work.get(self._identity(trial))
                if work is not None and work.found is not None:
                    return _of(work.found, trial)
                if self._closed or work is None:
                    return not_screened(trial, "screening was stopped")
                left = None if deadline is None else deadline - time.monotonic()
                if left is not None and left <= 0:
                    return not_screened(trial, "it was not compiled in time")
                self._changed.wait(left)

    def _claim(self, found: Screened) -> Screened:
        signature = found.signature
        if signature is None:
            return found
        with self._changed:
            first = self._claimed.setdefault(signature, found)
        same = self._identity(first.trial) == self._identity(found.trial)
        return found if same or found.from_default == 0 else as_duplicate(found, first)

    def _serve(self, compiler: AnyCompiler) -> None:
        """One thread: take the most urgent, compile it, and again."""
        try:
            while True:
                identity = self._next()
                if identity is None:
                    return
                with self._changed:
                    work = self._work[identity]
                    trial = next(iter(work.trials.values()))
                found = self._compile(compiler, trial)
                with self._changed:
                    work.found = found
                    self.cached, self.compiled = self.cached + found.cached, self.compiled + (not found.cached)
                    self._idle, self._pending = self._idle + 1, self._pending - 1
                    tell = [_of(found, t) for key, t in work.trials.items() if key not in work.told]
                    work.told |= set(work.trials)
                    self._changed.notify_all()
                self._tell(tell)
        except FarmClosed:
            pass
        except BaseException as error:  # noqa: BLE001  an error of klab's own, or of on_done: raised where somebody waits
            with self._changed:
                self._error = self._error or error
                self._changed.notify_all()
        finally:
            compiler.close()

    def _next(self) -> str | None:
        """The most urgent of the queue, once there is one; None when the farm is closed."""
        with self._changed:
            while not self._closed:
                while self._queue:
                    urgency, _, identity = heapq.heappop(self._queue)
                    work = self._work.get(identity)
                    # An entry is stale when the work moved further to the front, has begun, or was withdrawn.
                    if work is not None and not work.started and work.urgency == urgency:
                        work.started = True
                        self._idle, self._waiting = self._idle - 1, self._waiting - 1
                        return identity
                self._changed.wait()
        return None

    def _compile(self, compiler: AnyCompiler, trial: Trial) -> Screened:
        answer = self._cache.get(trial)
        if answer is not None:
            return judge(trial, answer, self.chip, self.limits, cached=True)
        if self._broken:
            return judge(trial, {"status": Status.CRASHED.value, "reason": self._broken}, self.chip, self.limits)
        answer = compiler.ask(trial, self.limits.timeout_s)
        if answer.pop("did_not_start", False):
            self._failed_starts += 1
            if self._failed_starts >= _GIVE_UP_STARTS:
                self._broken = answer["reason"]
        else:
            self._failed_starts = 0
            self._cache.put(trial, answer)
        return judge(trial, answer, self.chip, self.limits)

    def _tell(self, found: Iterable[Screened]) -> None:
        with self._telling:
            for item in found:
                self._on_done(item)

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error

    def _compiler(self) -> Compiler:
        return Compiler(self.chip, self._dirs, self.limits.memory_bytes)

    def _identity(self, trial: Trial) -> str:
        """What a trial compiles: the policy of measuring does not count."""
        return f"{trial.kernel} {trial.source_digest} {trial.problem.key} {trial.config.key}"


def default_jobs(limits: Limits) -> int:
    """Compiling processes: one per core that this process may use, as far as the memory that is free now goes."""
    cores = len(os.sched_getaffinity(0))
    free = available_memory_bytes()
    return max(1, cores if free is None else min(cores, free // limits.memory_bytes))


def _of(found: Screened, trial: Trial) -> Screened:
    """The same verdict for a trial that compiles the same."""
    return found if found.trial.key == trial.key else dataclasses.replace(found, trial=trial)
