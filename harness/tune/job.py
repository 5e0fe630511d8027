"""A job: trials in, rows in the store out. Skips what is known, screens what compiles, measures the rest within a budget."""

from __future__ import annotations

import os
import secrets
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Protocol

from klab.harness.fleet.devices import devices
from klab.harness.fleet.estimate import estimate_s
from klab.harness.fleet.local import Fleet, Summary, run_trials
from klab.harness.fleet.open import AnyFleet, Engine, open_fleet
from klab.harness.measure import environment
from klab.harness.measure.calibration import look_in
from klab.harness.measure.client import WorkerClient
from klab.harness.plan.trial import Policy, Trial
from klab.harness.plan.trials import missing
from klab.harness.store.journal import Journal
from klab.harness.store.query import age, latest
from klab.harness.store.read import ReadReport, iter_results
from klab.harness.store.result import Result, Status
from klab.harness.tune.farm import AnyCompiler
from klab.harness.tune.screen import NOT_SCREENED, Limits, Screened, screen
from klab.kernels.contract import Chip, Json, Kernel

DEADLY = (Status.CRASHED, Status.TIMEOUT)


class Listener(Protocol):
    """Who is told how a job goes: the command line draws progress bars, tests listen."""

    def phase(self, name: str, total: int) -> None:
        """A phase begins: "screening" or "measuring", with so many trials."""

    def screened(self, found: Screened) -> None:
        """One candidate was compiled and judged."""

    def result(self, result: Result) -> None:
        """One row is in the store."""


class Silent:
    """Tells nobody."""

    def phase(self, name: str, total: int) -> None:
        """Nothing."""

    def screened(self, found: Screened) -> None:
        """Nothing."""

    def result(self, result: Result) -> None:
        """Nothing."""


@dataclass
class Outcome:
    """How a job went. `known` trials had an ok Result in this epoch already; `left` have none and were not reached."""

    results: list[Result] = field(default_factory=list)
    known: list[Trial] = field(default_factory=list)
    left: list[Trial] = field(default_factory=list)
    stopped: str = ""
    seconds: float = 0.0

    @property
    def by_status(self) -> Counter[str]:
        """New rows by status."""
        return Counter(result.status.value for result in self.results)


def new_run_id() -> str:
    """Sortable by time and unique without coordination."""
    return f"{datetime.now(UTC).strftime('%Y%m%dT%H%M%SZ')}-{secrets.token_hex(3)}"


class Job:
    """What `klab measure`, `klab run` and `klab campaign` share. One per command; every row carries its `run_id`."""

    def __init__(
        self,
        chip: Chip,
        folder: Path,
        *,
        read_from: Iterable[Path] = (),
        kernel_dirs: Sequence[Path] = (),
        deadline: float | None = None,
        again: bool = False,
        listener: Listener | None = None,
        stop: threading.Event | None = None,
        jobs: int | None = None,
        others: Sequence[Chip] = (),
        engine: Engine | None = None,
    ) -> None:
        """`folder` takes the rows; `read_from` (besides it) is searched for results that make a trial known.

        `deadline` is a second of time.monotonic(). With `again`, known trials are measured once more. `engine`: who measures, and with a
        cluster `others`: further chips whose trials may be among those of a run. CannotMeasure, before anything is spent, when a chip is
        not there or the folder takes no rows.
        """
        self.chip, self.folder, self.kernel_dirs = chip, folder, list(kernel_dirs)
        self.chips = {one.name: one for one in (chip, *others)}
        self.engine = engine or Engine()
        if self.engine.is_local and len(self.chips) == 1:
            devices(chip)
        self.deadline, self.again, self.stop = deadline, again, stop or threading.Event()
        self.listener = listener or Silent()
        self.run_id = new_run_id()
        self.journal = Journal(folder, self.run_id)
        look_in(folder)
        self.journal.ready()
        self.report = ReadReport()
        self._jobs = jobs
        self._read_from = list(read_from)
        self._environments: dict[str, list[Mapping[str, Json]]] = {}
        self._notes: list[str] = []
        self._within = False
        self._fleet: AnyFleet | None = None
        if not self.engine.is_local or len(self.chips) > 1:
            self._fleet = open_fleet(
                self.engine.kind, list(self.chips.values()), self.run_id, address=self.engine.address, kernel_dirs=self.kernel_dirs
            )
        # The newest ok row of each key and epoch on this chip: read when first asked for, kept up to date from then on.
        self._fine: dict[str, dict[str, Result]] | None = None
        self.outcome = Outcome()
        self._screened: set[str] = set()
        self._dropped: set[str] = set()
        self._deadly: set[str] = set()

    @contextmanager
    def session(self) -> Iterator[AnyFleet]:
        """Within the block the devices stay locked and their workers alive from one run to the next. With a cluster, a job has one."""
        if self._within:
            assert self._fleet is not None
            yield self._fleet
            return
        made: AnyFleet = self._fleet or Fleet(self.chip, self.run_id, kernel_dirs=self.kernel_dirs)
        with made as fleet:
            self._fleet, self._within = fleet, True
            try:
                yield fleet
            finally:
                self._within = False
                self._notes += fleet.notes
                if self.engine.is_local:
                    self._fleet = None

    @property
    def notes(self) -> list[str]:
        """What is to be said of the devices: left out, lost, or unlike one another. Each once."""
        return list(dict.fromkeys([*self._notes, *(self._fleet.notes if self._fleet is not None else ())]))

    def known(self, trials: Sequence[Trial]) -> list[Trial]:
        """Those of the trials that have an ok Result of this epoch: same driver, toolchain, device and threads."""
        return [trial for trial in trials if self.standing(trial) is not None]

    def standing(self, trial: Trial) -> Result | None:
        """The newest ok Result of this trial in this epoch, from this run or an earlier one; None when it is to be measured.

        Where the devices of a chip differ, that of any of their epochs stands.
        """
        fine = self._rows().get(trial.key)
        if fine is None:
            return None
        # The epoch costs the start of a worker: it is asked for only where there is something to compare.
        standing = [fine[epoch] for epoch in self.epochs(trial.policy.threads, trial.chip) if epoch in fine]
        return max(standing, key=age, default=None)

    def _rows(self) -> dict[str, dict[str, Result]]:
        if self._fine is None:
            self._fine = {}
            for row in iter_results(self.sources(), self.report):
                if row.chip in self.chips:
                    self._note(row)
        return self._fine

    def _note(self, row: Result) -> None:
        if row.status in DEADLY:
            self._deadly.add(row.key)
        if row.status is Status.OK and self._fine is not None:
            rows = self._fine.setdefault(row.key, {})
            if row.epoch not in rows or age(rows[row.epoch]) <= age(row):
                rows[row.epoch] = row

    def epoch(self, threads: int = 0) -> str:
        """The epoch of a result measured now, by the first device. Asked of a worker, so that this process makes no CUDA context."""
        return self.epochs(threads)[0]

    def epochs(self, threads: int = 0, chip: str = "") -> list[str]:
        """The epochs of results measured now: more than one where the devices of this chip differ in driver or toolchain."""
        name = chip or self.chip.name
        if name not in self._environments:
            if self._fleet is not None:
                self._environments[name] = [self._fleet.environment()] if self.engine.is_local else self._fleet.environments(name)
            else:
                # Unlocked: where all is known, nothing will be measured.
                client = WorkerClient(self.chip, cuda_device=devices(self.chip)[0].cuda_visible, kernel_dirs=self.kernel_dirs)
                try:
                    client.start()
                    self._environments[name] = [client.environment]
                finally:
                    client.kill()
        found: list[str] = []
        for here in self._environments[name]:
            facts = dict(here)
            if self.chips[name].kind == "cpu":
                facts["threads"] = threads or facts.get("cores")
            found.append(environment.epoch(facts))
        return list(dict.fromkeys(found))

    def measure(
        self,
        trials: Sequence[Trial],
        on_result: Callable[[Result], None],
        *,
        deadline: float | None = None,
        guests: Mapping[str, Trial] | None = None,
        keep_data: bool = False,
    ) -> Summary:
        """Measure these trials, known or not, unscreened: each row is stored and then handed to `on_result`. See `run_trials`."""

        def store(result: Result) -> None:
            self._store(result, self.outcome)
            on_result(result)

        return run_trials(
            trials,
            chip=self.chip,
            run_id=self.run_id,
            on_result=store,
            kernel_dirs=self.kernel_dirs,
            deadline=self.deadline if deadline is None else deadline,
            stop=self.stop,
            fleet=self._fleet,
            guests=guests,
            keep_data=keep_data,
        )

    def run(self, trials: Sequence[Trial], kernels: dict[str, Kernel]) -> Outcome:
        """Measure `trials` in their order as far as the budget goes; every end that a trial came to is a row in the store.

        KeyboardInterrupt passes through after what was finished is stored; `self.outcome` then says how far it went.
        """
        began = time.monotonic()
        known = [] if self.again else self.known(trials)
        skip = {trial.key for trial in known}
        outcome = self.outcome = Outcome(known=known)
        try:
            todo = self._screen(missing(trials, skip), kernels, outcome)
            # What hung or crashed before is tried again, but last: it must not stand in the way of the others each time.
            calm = missing(todo, self._deadly)
            self._measure(calm, outcome)
            self._measure([trial for trial in todo if trial.key in self._deadly], outcome)
        finally:
            outcome.seconds = time.monotonic() - began
        return outcome

    def _measure(self, todo: list[Trial], outcome: Outcome) -> None:
        if not todo:
            return
        if self._over():
            outcome.left += todo
            outcome.stopped = "interrupted" if self.stop.is_set() else "deadline"
            return
        self.listener.phase("measuring", len(todo))

        def store(result: Result) -> None:
            self._store(result, outcome)

        try:
            summary = run_trials(
                todo,
                chip=self.chip,
                run_id=self.run_id,
                on_result=store,
                kernel_dirs=self.kernel_dirs,
                deadline=self.deadline,
                stop=self.stop,
                fleet=self._fleet,
            )
        except KeyboardInterrupt:
            stored = {result.key for result in outcome.results}
            outcome.left += missing(todo, stored)
            outcome.stopped = "interrupted"
            raise
        outcome.left += summary.unfinished
        self._notes += summary.notes
        outcome.stopped = summary.stopped or outcome.stopped

    def dropped(self, row: Result) -> Result:
        """Store the row of a candidate that never reached the device, once per job, and return it."""
        if row.key not in self._dropped:
            self._dropped.add(row.key)
            self._screened.add(row.key)
            self._store(row, self.outcome)
        return row

    def _over(self) -> bool:
        return self.stop.is_set() or (self.deadline is not None and time.monotonic() >= self.deadline)

    def _screen(self, trials: list[Trial], kernels: dict[str, Kernel], outcome: Outcome) -> list[Trial]:
        """Drop what cannot run, with a row that says why. Libraries and CPU kernels compile nothing and pass."""
        compiled = [t for t in trials if kernels[t.kernel].backend in ("triton", "cuda") and t.key not in self._screened]
        if compiled and not self._over():
            self.listener.phase("screening", len(compiled))
            for chip in self.chips.values():
                own = [trial for trial in compiled if trial.chip == chip.name]
                self._drop(self._screen_on(chip, own) if own else [], kernels, outcome)
        return missing(trials, self._dropped)

    def _screen_on(self, chip: Chip, trials: list[Trial]) -> list[Screened]:
        """For one chip: on the nodes of a cluster that have no GPU, else on the cores of this machine."""
        with self.compilers(chip) as compilers:
            return screen(
                trials,
                chip,
                kernel_dirs=self.kernel_dirs,
                jobs=self._jobs,
                on_done=self.listener.screened,
                stop=self.stop,
                deadline=self.deadline,
                compilers=compilers,
            )

    @contextmanager
    def compilers(self, chip: Chip) -> Iterator[Sequence[Callable[[], AnyCompiler]]]:
        """Makers of compilers on other machines for a farm; none where this machine compiles."""
        if self.engine.is_local:
            yield ()
            return
        from klab.harness.fleet.ray_fleet import RayFleet
        from klab.harness.tune.remote_compiler import remote_compilers

        assert isinstance(self._fleet, RayFleet)
        with remote_compilers(self._fleet, chip, self.kernel_dirs, Limits().memory_bytes, deadline=self.deadline) as makers:
            yield makers

    def _drop(self, found: Sequence[Screened], kernels: Mapping[str, Kernel], outcome: Outcome) -> None:
        for item in found:
            if item.rule == NOT_SCREENED:
                continue
            self._screened.add(item.trial.key)
            if item.status is not Status.OK:
                self._dropped.add(item.trial.key)
                self._store(screened_row(item, kernels[item.trial.kernel], self.run_id), outcome)

    def _store(self, result: Result, outcome: Outcome) -> None:
        self.journal.append(result)
        self._note(result)
        outcome.results.append(result)
        self.listener.result(result)

    def sources(self) -> list[Path]:
        """Where rows are read from: the job's own folder and those it was given."""
        return [p for p in dict.fromkeys([self.folder, *self._read_from]) if p.exists()]

    def stored(self) -> list[Result]:
        """What stands in the store now, new rows included: for choosing and reporting."""
        return latest(iter_results(self.sources(), ReadReport()))


def screened_row(found: Screened, kernel: Kernel, run_id: str) -> Result:
    """The Result of a candidate that never reached a device."""
    return Result.of(
        found.trial,
        found.status,
        backend=kernel.backend,
        library=kernel.library,
        run_id=run_id,
        reason=f"{found.rule}: {found.reason}" if found.rule else found.reason,
        kind="screened",
        compile_s=found.compile_s,
        build={"functions": list(found.functions)},
        environment=environment.software(),
    )


def dry_run(trials: Sequence[Trial], chip: Chip) -> float:
    """Seconds that measuring all these trials would take, roughly."""
    return estimate_s(trials, chip) + (screen_estimate_s(trials, chip) if chip.kind == "cuda" else 0.0)


def screen_estimate_s(trials: Sequence[Trial], chip: Chip) -> float:
    """Seconds of compiling on this machine's cores: about 1.5 s per candidate and core, disassembly included."""
    return 1.5 * len(trials) / len(os.sched_getaffinity(0)) + 4.0


CHECK_ONLY = Policy(max_rounds=0, min_rounds=0, warmup_ms=0.0, launch="events", l2="warm", energy=False)
"""For correctness on a device without timing: the trial is built, checked on fresh data, and ends ok without a time."""
