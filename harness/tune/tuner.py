"""A tuning run: every problem's default and libraries first, then searches that take turns on the device, then a final for each."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from klab.harness.fleet.estimate import estimate_s
from klab.harness.fleet.open import AnyFleet
from klab.harness.plan.trial import Policy, Trial
from klab.harness.plan.trials import default_policy, trials
from klab.harness.store.result import Result, Status
from klab.harness.tune import strategy as strategies
from klab.harness.tune.allowance import Allowance
from klab.harness.tune.course import FOLDER, Course, damaged, header_of, make_space
from klab.harness.tune.ending import SUFFIX, Ending, ending, keep, kept
from klab.harness.tune.finals import finals
from klab.harness.tune.finals_told import Final
from klab.harness.tune.job import Job
from klab.harness.tune.live import Lane, Live, compiling
from klab.harness.tune.objective import LATENCY, Objective, latency
from klab.harness.tune.pack import Prospect, outlook
from klab.harness.tune.prior import prior_for
from klab.harness.tune.rank import expected_us
from klab.harness.tune.searching import Searching, Told
from klab.harness.tune.space import Space
from klab.harness.tune.strategy import Evaluation, find_strategy
from klab.kernels.contract import Json, Kernel, Problem
from klab.kernels.errors import CannotMeasure, UsageError

# Who goes to the final besides the default and the libraries: the best, none slower than so many times the best of them.
FINALISTS, NEAR_BEST = 6, 1.15
# Seconds that a final takes at least.
LEAST_FINAL_S = 1.5


@dataclass(frozen=True)
class Target:
    """A problem to tune: what a microsecond of it counts (see pack.Prospect), and the roofline's bound in microseconds."""

    problem: Problem
    weight: float
    bound_us: float


@dataclass(frozen=True)
class Options:
    """How to tune. UsageError for an unknown strategy or a seed below 0."""

    strategy: str = ""
    seed: int = 0
    objective: Objective = LATENCY
    allowance: Allowance = field(default_factory=Allowance)

    def __post_init__(self) -> None:
        if self.seed < 0:
            raise UsageError(f"--seed {self.seed}: a seed is 0 or more")
        find_strategy(self.strategy_name)

    @property
    def strategy_name(self) -> str:
        """The strategy, or the default one."""
        return self.strategy or strategies.DEFAULT


@dataclass
class Tuned:
    """How a run went. Seconds: `wall_s` of the whole run; `search_s` of the searches and `busy_s` of contests within them, added up over
    `devices`; `waited_s` in which a device stood idle for a compiler. `further_us`: what searching as long again would take off a launch
    of each problem (by key), by the model of pack.py. `stopped` says why the searches ended. `endings`: what each final came to, by key;
    a problem without a contender has none, one whose final there was no time for has one that says so. `finals`: those of this run.
    """

    courses: list[Course]
    finals: dict[str, Final] = field(default_factory=dict)
    endings: dict[str, Ending] = field(default_factory=dict)
    new: Counter[str] = field(default_factory=Counter)
    known: int = 0
    wall_s: float = 0.0
    search_s: float = 0.0
    busy_s: float = 0.0
    finals_s: float = 0.0
    waited_s: float = 0.0
    devices: int = 1
    stopped: str = ""
    further_us: dict[str, float] = field(default_factory=dict)

    @property
    def measuring_share(self) -> float | None:
        """Share of the searches' wall time in which the devices measured; None when nothing was searched."""
        return self.busy_s / (self.search_s * self.devices) if self.busy_s > 0 else None

    @property
    def searched_s(self) -> float:
        """Seconds of the device that the searches took, those before an interruption included."""
        return sum(c.prospect.spent_s for c in self.courses)

    @property
    def device_s(self) -> float:
        """The same with this run's finals."""
        return self.searched_s + self.finals_s

    @property
    def decided(self) -> dict[str, tuple[str, Mapping[str, Json], str]]:
        """Problem key -> (kernel id, configuration, why): what the finals that had evidence say is to be chosen."""
        return {key: (e.kernel, e.config, e.reason) for key, e in self.endings.items() if e.decided}

    @property
    def resumed(self) -> int:
        """Evaluations that an earlier run had made."""
        return sum(c.resumed for c in self.courses)


class Tuner:
    """One run over the problems of a model, or over one. What was measured is in the job's store also when the run is interrupted."""

    def __init__(
        self,
        job: Job,
        kernels: Sequence[Kernel],
        targets: Sequence[Target],
        options: Options,
        *,
        told: Told = lambda course, evaluations: None,
        reweigh: Callable[[Mapping[str, float]], Mapping[str, float]] | None = None,
        policy: Policy | None = None,
        journals: Path | None = None,
        compile_jobs: int | None = None,
    ) -> None:
        """`kernels` compete, libraries as baselines. `told` hears of each slice. `reweigh` makes new weights (by problem key) of the
        times known after the defaults. `journals`: folder for the searches' journals (default: the results'). UsageError when there is
        nothing to tune for any target.
        """
        objective = options.objective
        if objective.needs_energy and job.chip.kind == "cpu":
            raise CannotMeasure(f"--objective {objective.name} needs joules, and klab reads no power sensor of a CPU")
        self.job, self.options, self.allowance = job, options, options.allowance
        self.policy = policy or default_policy(job.chip)
        self.kernels = {kernel.id: kernel for kernel in kernels}
        made = [self._course(target, kernels) for target in targets]
        courses = sorted((c for c in made if c.defaults), key=lambda c: -c.prospect.weight * c.prospect.bound_us)
        if not courses:
            raise UsageError(f"nothing to tune on {job.chip.name}: of the kernels asked for, none but libraries competes on these problems")
        self.tuned = Tuned(courses)
        self._told, self._reweigh, self._compile_jobs = told, reweigh, compile_jobs
        self._journals = journals or job.folder / FOLDER
        self._spaces: dict[str, Future[Space]] = {}
        self._stored: list[Result] = []

    def _course(self, target: Target, kernels: Sequence[Kernel]) -> Course:
        problem = target.problem
        made = trials([problem], list(kernels), self.job.chip, self.policy)
        base = made.trials
        defaults = [t for t in base if not self.kernels[t.kernel].library]
        libraries = [t for t in base if self.kernels[t.kernel].library]
        prospect = Prospect(problem.key, target.weight, target.bound_us)
        course = Course(problem, prospect, {t.kernel: self.kernels[t.kernel] for t in defaults}, defaults, libraries)
        course.left_out.update((s.kernel, s.reason) for s in made.skipped if " raised " in s.reason)
        return course

    def run(self) -> Tuned:
        """Tune. KeyboardInterrupt passes when all is stored; `tuned` says how far it went.

        UsageError when the budget was too small for one evaluation or a space has no valid candidate; CannotMeasure when all failed.
        """
        began = time.monotonic()
        tuned = self.tuned
        try:
            # The spaces are listed while the first problems are measured.
            with (
                ThreadPoolExecutor(1) as pool,
                self.job.session() as fleet,
                compiling(self.job, self.kernels.values(), jobs=self._compile_jobs) as farm,
            ):
                self._spaces = {
                    c.prospect.key: pool.submit(make_space, c.problem, c.kernels.values(), self.job.chip, c.left_out) for c in tuned.courses
                }
                try:
                    self._go(Live(self.job, self.kernels, farm), fleet)
                finally:
                    for future in self._spaces.values():
                        future.cancel()
        finally:
            tuned.wall_s = time.monotonic() - began
            tuned.further_us = outlook([c.prospect for c in tuned.courses], tuned.searched_s)
        self._judge()
        return tuned

    def _go(self, live: Live, fleet: AnyFleet) -> None:
        tuned = self.tuned
        live.foresee(t for c in tuned.courses for t in (*c.libraries, *c.defaults))
        if self.allowance.left_s() <= 0:
            return
        fleet.environment()  # starts a worker: its seconds are nobody's
        tuned.devices = live.devices = fleet.size
        self._stored = self.job.stored()
        self._refuse_damaged()
        self._baselines(live)
        began, busy = time.monotonic(), fleet.busy_s
        try:
            self._lanes(tuned.courses)
            for course in tuned.courses:
                if course.lane is not None and self._path(course.lane).exists():
                    self._begin(course)
            self._insist()
            self.job.listener.phase("searching", 0)
            tuned.stopped = Searching(tuned.courses, self.allowance, self._begin, self._heard).run(live)
        finally:
            tuned.search_s, tuned.busy_s, tuned.waited_s = time.monotonic() - began, fleet.busy_s - busy, live.waited_s
        if not self.job.stop.is_set():
            self._finals(fleet)

    # Defaults and libraries.

    def _baselines(self, live: Live) -> None:
        """The least slice of every problem, the heaviest first: what `klab run` measures."""
        todo = [c for c in self.tuned.courses if not c.trouble]
        self.job.listener.phase("defaults", sum(len(c.defaults) + len(c.libraries) for c in todo))
        for first in range(0, len(todo), live.devices):
            group = todo[first : first + live.devices]
            owners = {t.key: c for c in group for t in (*c.libraries, *c.defaults)}

            def told(trial: Trial, result: Result, spent_s: float, owners: Mapping[str, Course] = owners) -> None:
                self._count(result, spent_s)
                owners[trial.key].note_baseline(trial, result, latency(result) if result.status is Status.OK else None)

            live.settle([t for c in group for t in (*c.libraries, *c.defaults)], told, deadline=self.allowance.search_ends())
            if self.job.stop.is_set():
                return
        if self._reweigh is not None:
            weights = self._reweigh({c.prospect.key: c.prospect.now_us for c in todo if math.isfinite(c.prospect.now_us)})
            for course in todo:
                course.prospect.weight = weights.get(course.prospect.key, course.prospect.weight)

    def _count(self, result: Result, spent_s: float) -> None:
        if spent_s:
            self.tuned.new[result.status.value] += 1
        else:
            self.tuned.known += 1

    # The searches.

    def _refuse_damaged(self) -> None:
        """Before anything is measured: a problem whose journal is damaged is left out. Spaces are waited for only where one is."""
        bad = damaged(self._journals)
        if bad:
            self._lanes(self.tuned.courses)
            for course in self.tuned.courses:
                if course.lane is not None and (reason := bad.get(self._path(course.lane))):
                    self._leave(course, reason)
            self._insist()

    def _leave(self, course: Course, reason: str) -> None:
        course.trouble, course.prospect.exhausted, course.lane, course.search = reason, True, None, None

    def _insist(self) -> None:
        """UsageError when there is nothing left that could be searched."""
        if all(course.trouble for course in self.tuned.courses):
            raise UsageError(self.tuned.courses[0].trouble)

    def _lanes(self, courses: Sequence[Course]) -> None:
        """List their spaces, baselines known or not. One that cannot be leaves the others."""
        for course in courses:
            if course.trouble:
                continue
            try:
                space = self._spaces[course.prospect.key].result()
            except UsageError as error:
                self._leave(course, str(error))
                continue
            course.lane = Lane(space, course.problem, course.kernels, self.policy, self.job.chip.name, course.library)

    def _header(self, lane: Lane) -> dict[str, object]:
        return header_of(lane, self.options.strategy_name, self.options.seed, self.job.epoch(self.policy.threads))

    def _path(self, lane: Lane) -> Path:
        """The journal of this very search, begun by an earlier run or not."""
        return Course.journal_path(self._journals, self._header(lane))

    def _begin(self, course: Course) -> None:
        """Open a course's search. What is known by now, of the other problems too, goes into its prior."""
        lane = course.lane
        assert lane is not None
        rows = [*self._stored, *self.job.outcome.results]
        prior = prior_for(lane.space, course.problem, self.job.chip, course.kernels, rows, expected_us=expected_us)
        try:
            course.begin(lane, prior, self.options.strategy_name, self.options.seed, self._journals, self._header(lane))
        except UsageError as error:
            self._leave(course, str(error))

    def _heard(self, course: Course, evaluations: Sequence[Evaluation]) -> None:
        for evaluation in evaluations:
            self.tuned.new[evaluation.status.value] += evaluation.spent_s > 0
            self.tuned.known += not evaluation.spent_s
        self._told(course, evaluations)

    # The finals.

    def _finals(self, fleet: AnyFleet) -> None:
        """The best of each search against the default and the best library, the heaviest problem first."""
        waiting = [(c, c.finalists(FINALISTS, NEAR_BEST)) for c in self.tuned.courses if c.contested]
        rows = [*self._stored, *self.job.outcome.results]
        objective = self.options.objective
        for place, (course, contenders) in enumerate(waiting):
            if self.job.stop.is_set():
                return
            weight = _load(course) / max(sum(_load(other) for other, _ in waiting[place:]), 1e-30)
            seconds = self.allowance.final_s(weight, self.tuned.device_s)
            default = course.default or contenders[0]
            libraries = [course.library] if course.library else []
            kept_at = course.journal.with_suffix(SUFFIX) if course.journal else None
            everybody = [default, *libraries, *contenders]
            made = kept(kept_at, everybody, str(objective), seconds) if kept_at else None
            if made is None and seconds < LEAST_FINAL_S:
                made = Ending("no final", f"no final: {seconds:.1f} s left, it takes at least {LEAST_FINAL_S} s")
            if made is None:
                began = time.monotonic()
                final = finals(
                    self.job,
                    contenders,
                    default=default,
                    libraries=libraries,
                    kernels=self.kernels,
                    objective=objective,
                    deadline=began + seconds if math.isfinite(seconds) else None,
                    fleet=fleet,
                    known=[row for row in rows if row.problem_key == course.problem.key],
                )
                made = ending(final, course.default, time.monotonic() - began)
                self.tuned.finals[course.prospect.key] = final
                self.tuned.finals_s += made.took_s
                self.tuned.new.update(row.status.value for row in final.results)
                if kept_at:
                    keep(kept_at, made, everybody, str(objective))
            self.tuned.endings[course.prospect.key] = made

    def _judge(self) -> None:
        tuned = self.tuned
        if any(math.isfinite(min(c.prospect.now_us, c.best_us())) for c in tuned.courses):
            return
        failed = [e for c in tuned.courses for e in (*c.failed, *(f"{e.status.value}" for e in c.found if not e.ok))]
        if failed:
            often, count = Counter(failed).most_common(1)[0]
            raise CannotMeasure(f"every candidate failed ({len(failed)} tried; {count} times: {often}); the rows are in {self.job.folder}")
        first = tuned.courses[0]
        need = estimate_s([*first.defaults, *first.libraries], self.job.chip)
        raise UsageError(f"the budget is too small for one evaluation: the first problem alone takes about {math.ceil(need)} s")


def _load(course: Course) -> float:
    """What the problem weighs in the model's time."""
    return course.prospect.weight * min(course.prospect.now_us, course.best_us())
