"""The recorded evidence of a chip: what it consists of, in the order of its worth, made in as many sittings as one gets the chip for."""

from __future__ import annotations

import dataclasses
import json
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from klab.harness.fleet.calibrating import calibrate_devices
from klab.harness.measure import environment
from klab.harness.measure.calibrate import PARTS as FIGURES
from klab.harness.measure.calibrate import SENSOR_S
from klab.harness.measure.calibration import Calibration, Figure, device_id, read_calibrations
from klab.harness.plan.trial import Trial
from klab.harness.plan.trials import default_policy, trials
from klab.harness.store.query import age
from klab.harness.store.read import iter_results
from klab.harness.store.result import Result, Status
from klab.harness.tune.allowance import FINAL_S, Allowance
from klab.harness.tune.campaign import Share, bound_us, correctness_trials, shares
from klab.harness.tune.device_tests import DeviceTests, free_device, run_device_tests
from klab.harness.tune.device_tests_kept import KeptTests, write_json
from klab.harness.tune.evidence_folder import tuner_folder
from klab.harness.tune.evidence_problems import MODELS, SpaceOf, spaces
from klab.harness.tune.evidence_spaces import STRATEGY, is_recorded
from klab.harness.tune.job import Job, Listener, Outcome
from klab.harness.tune.pick import energy_trials
from klab.harness.tune.tuner import Options, Target, Tuner
from klab.kernels.contract import Chip, Json, Kernel, Problem
from klab.kernels.discover import Catalogue, operators
from klab.kernels.errors import KlabError, UsageError

SITTINGS_FILE = "sittings.json"
# Of the time that is left, a part takes at most so much where others follow that are worth as much.
SHARES = {"tests": 0.2, "correctness": 0.3, "comparison": 0.7, "energy": 0.4, "spaces": 0.65, "tuner": 0.5}
# Problems whose energy comes before the spaces: three kernels each, 6 s and more a kernel. The others come last.
ENERGY_FIRST = 6
# The heaviest problems that every sitting measures again, and the sittings that make a spread.
REPEATED, SITTINGS_WANTED = 30, 3
# Of these, so many have the energy of their winner measured again.
REPEATED_ENERGY = 3
# Seconds of the device that the tuner gets for each problem, its final included.
TUNER_S = {"cuda": 45.0, "cpu": 6.0}
# A calibration knows no time limit, so it is begun only where it fits; besides these, a GPU's power sensor is watched.
CALIBRATION_S = {"cuda": 30.0, "cpu": 60.0}
CUT_OFF = "cut off"
# A share that would leave less to what follows leaves nothing: of scraps, most goes into starting workers.
SCRAPS_S = {"cuda": 90.0, "cpu": 15.0}
# Below this nothing that follows can begin: a GPU's worker needs a dozen seconds until its first trial.
LEAST_S = {"cuda": 20.0, "cpu": 5.0}


@dataclass(frozen=True)
class Done:
    """What a part of a sitting came to. `left`: trials or problems that were not reached; with 0, and no note, the part is complete.

    failed: it ended with an error, which is the last note.
    """

    part: str
    seconds: float = 0.0
    statuses: Mapping[str, int] = field(default_factory=dict)
    known: int = 0
    left: int = 0
    notes: tuple[str, ...] = ()
    failed: bool = False


@dataclass
class Sitting:
    """One run of the command: when, on which chip, with how many seconds, and its parts in order."""

    run_id: str
    at: str
    chip: str
    budget_s: float | None
    parts: list[Done] = field(default_factory=list)
    environment: Mapping[str, Json] = field(default_factory=dict)


class Evidence:
    """One sitting over a folder that holds those before: it goes on where they ended. Every row is stored when it is made."""

    def __init__(
        self,
        chip: Chip,
        folder: Path,
        catalogue: Catalogue,
        *,
        deadline: float | None = None,
        models: Sequence[str] = (),
        parts: Sequence[str] = (),
        kernel_dirs: Sequence[Path] = (),
        listener: Listener | None = None,
        sensor_s: float = SENSOR_S,
        tests: Callable[..., DeviceTests] = run_device_tests,
    ) -> None:
        """deadline: a second of time.monotonic(). parts: only these, in the order of PARTS. UsageError for an unknown part or model."""
        if unknown := sorted(set(parts) - set(PARTS)):
            raise UsageError(f"unknown part {', '.join(unknown)}; there are {', '.join(PARTS)}")
        self.chip, self.folder, self.catalogue, self.deadline = chip, folder, catalogue, deadline
        self.parts = [part for part in PARTS if not parts or part in parts]
        self.shares: list[Share] = shares(tuple(models) or MODELS[chip.kind], chip)
        self.sensor_s, self.tests, self._listener, self._dirs = sensor_s, tests, listener, list(kernel_dirs)
        self.job = self.new_job(folder)
        budget = None if deadline is None else round(deadline - time.monotonic(), 1)
        self.sitting = Sitting(self.job.run_id, datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"), chip.name, budget)

    @property
    def least_s(self) -> float:
        """Seconds without which a part is not begun."""
        return LEAST_S[self.chip.kind]

    def new_job(self, folder: Path, *, again: bool = False) -> Job:
        """A job of this sitting over a folder."""
        return Job(self.chip, folder, kernel_dirs=self._dirs, deadline=self.deadline, again=again, listener=self._listener)

    def run(self) -> Iterator[Done]:
        """The parts, as far as the time goes; each is noted when it ends. KeyboardInterrupt passes when all is stored."""
        try:
            for part in self.parts:
                if self.left_s() < self.least_s:
                    return
                # Whoever kills the sitting leaves this: it was begun.
                self.sitting.parts.append(Done(part, left=1, notes=(CUT_OFF,)))
                self._note()
                done = self.sitting.parts[-1] = self._timed(part)
                self._note()
                yield done
        finally:
            self.job.journal.close()
            self._note()

    def left_s(self) -> float:
        """Seconds until the sitting, or the part that runs, must end."""
        return float("inf") if self.deadline is None else self.deadline - time.monotonic()

    def kernels(self) -> list[Kernel]:
        """All, libraries first."""
        return sorted(self.catalogue.kernels.values(), key=lambda k: (not k.library, k.id))

    def compared(self) -> list[Trial]:
        """Every kernel's default on every problem of the models; the anchor first, which memory-bound kernels are held against."""
        anchors = operators()["copy"].at_scale()[:1] if self.chip.kind == "cuda" else []
        return trials([*anchors, *(s.problem for s in self.shares)], self.kernels(), self.chip, default_policy(self.chip)).trials

    def heaviest(self) -> list[Problem]:
        """The models' problems, by the roofline time that a step of each spends in them."""
        return [s.problem for s in sorted(self.shares, key=lambda s: -s.bound_us)]

    def competing(self, one: SpaceOf) -> list[Kernel]:
        """The kernels whose candidates are a recorded space, and the libraries beside them."""
        found = [kernel for kernel in self.kernels() if isinstance(one.problem, kernel.problem_type)]
        return [kernel for kernel in found if kernel.library or not one.kernels or kernel.name in one.kernels]

    def measured(self, wanted: Sequence[Trial], job: Job | None = None) -> Done:
        """Measure what is not known yet."""
        outcome = (job or self.job).run(wanted, self.catalogue.kernels)
        return Done("", statuses=dict(outcome.by_status), known=len(outcome.known), left=len(outcome.left))

    def _timed(self, part: str) -> Done:
        """A part within its share of the time. What cannot be done here is a note, and the others go on."""
        whole, began = self.deadline, time.monotonic()
        if whole is not None and part in SHARES and part != self.parts[-1]:
            share = began + max(self.least_s, SHARES[part] * (whole - began))
            self.deadline = share if whole - share >= SCRAPS_S[self.chip.kind] else whole
        self.job.deadline = self.deadline
        before = self.job.outcome
        try:
            done = PARTS[part](self)
        except KlabError as error:
            done = Done(part, statuses=self._new(before), left=1, notes=(str(error),), failed=True)
        except KeyboardInterrupt:
            seconds = round(time.monotonic() - began, 2)
            self.sitting.parts[-1] = dataclasses.replace(self.sitting.parts[-1], seconds=seconds, statuses=self._new(before))
            raise
        finally:
            self.deadline = self.job.deadline = whole
        here = (row.environment for row in reversed(self.job.outcome.results) if row.kind == "measured" and row.environment)
        self.sitting.environment = next(here, self.sitting.environment)
        return dataclasses.replace(done, part=part, seconds=round(time.monotonic() - began, 2))

    def _new(self, before: Outcome) -> dict[str, int]:
        """What a part stored before it failed."""
        return dict(self.job.outcome.by_status) if self.job.outcome is not before else {}

    def _note(self) -> None:
        earlier = [one for one in read_sittings(self.folder) if one.get("run_id") != self.sitting.run_id]
        write_json(self.folder / SITTINGS_FILE, [*earlier, dataclasses.asdict(self.sitting)])


def read_sittings(folder: Path) -> list[dict[str, Any]]:
    """The sittings of a folder, oldest first; none where there is no such file. UsageError for one that is something else."""
    path = folder / SITTINGS_FILE
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return []
    except (OSError, ValueError) as error:
        raise UsageError(f"cannot read {path}: {getattr(error, 'strerror', None) or 'not JSON'}; move it away, the rows are safe") from None
    if not isinstance(found, list) or not all(isinstance(one, dict) for one in found):
        raise UsageError(f"{path} is not a list of sittings; move it away, the rows are safe")
    return found


def _tests(evidence: Evidence) -> Done:
    """Those that have not passed yet with this code."""
    kept = KeptTests(evidence.folder, evidence.kernels())
    known = kept.done
    if kept.complete:
        return Done("", known=len(known), notes=tuple(kept.failures()))
    left = evidence.left_s()
    limit = None if left == float("inf") else left
    with free_device(evidence.chip) as device:
        found = evidence.tests(limit, known, kept.again, save=kept.save, visible=device.cuda_visible)
    notes = (*([found.stopped] if found.stopped else []), *kept.failures())
    return Done("", statuses=found.counts, known=len(known), left=found.left, notes=notes)


def _correctness(evidence: Evidence) -> Done:
    return evidence.measured(correctness_trials(evidence.kernels(), evidence.chip))


def _calibration(evidence: Evidence) -> Done:
    """Each sitting may be on another machine of the chip: a device that has its figures is left alone."""
    from klab.harness.fleet.devices import devices

    chip = evidence.chip
    known = {uuid for uuid, one in read_calibrations([evidence.folder]).items() if one.chip == chip.name}
    # A CPU is known by its machine.
    here = {device.id: device.id if chip.kind == "cuda" else device_id(environment.host()) for device in devices(chip)}
    todo = sorted(place for place, name in here.items() if name not in known)
    needed_s = CALIBRATION_S[chip.kind] + (evidence.sensor_s if chip.kind == "cuda" else 0.0)
    made, notes, left = 0, list[str](), 0
    for place in todo:
        if evidence.left_s() < needed_s:
            left += 1
            continue
        for one, _ in calibrate_devices(chip, evidence.folder, only_devices=[place], parts=FIGURES, sensor_s=evidence.sensor_s):
            made += 1
            notes += [*one.notes, *_absent(one)]
    if left:
        notes.append(f"a device takes about {needed_s:.0f} s, which are not left")
    return Done("", statuses={"calibrated": made} if made else {}, known=len(here) - len(todo), left=left, notes=tuple(notes))


def _absent(one: Calibration) -> list[str]:
    """Figures that were looked for in vain, by why."""
    figures = {f.name: found for f in dataclasses.fields(one) if isinstance(found := getattr(one, f.name), Figure)}
    figures |= {f"matmul {dtype}": figure for dtype, figure in one.matmul_tflops.items()}
    by_why: dict[str, list[str]] = {}
    for name, figure in figures.items():
        if figure.value is None:
            by_why.setdefault(figure.reason, []).append(name)
    return [f"{', '.join(names)}: {why}" for why, names in by_why.items()]


def _comparison(evidence: Evidence) -> Done:
    return evidence.measured(evidence.compared())


def _energy(evidence: Evidence, problems: slice = slice(0, ENERGY_FIRST)) -> Done:
    if evidence.chip.kind == "cpu":
        return Done("", notes=("klab reads no power sensor of a CPU",))
    keys = {problem.key for problem in evidence.heaviest()[problems]}
    wanted = [trial for trial in evidence.compared() if trial.problem.key in keys]
    return evidence.measured(energy_trials(wanted, evidence.job.stored()))


def _energy_rest(evidence: Evidence) -> Done:
    return _energy(evidence, slice(ENERGY_FIRST, None))


def _spaces(evidence: Evidence) -> Done:
    """Every candidate that passes the screen, one problem after the other, the cores compiling ahead of the device."""
    left, known, counts, notes = 0, 0, Counter[str](), list[str]()
    with evidence.job.session():
        for one in spaces(evidence.chip):
            if evidence.left_s() < evidence.least_s:
                left += 1
            elif is_recorded(evidence.job, one.problem, evidence.competing(one)):
                known += 1
            else:
                # Nothing is reserved for its final, and what it has left at its end is the next one's.
                allowance = Allowance(deadline=evidence.deadline, final_s_most=0.0, final_s_limit=FINAL_S)
                done = _tried(evidence, one, STRATEGY, evidence.job, allowance)
                left += done.left
                counts.update(done.statuses)
                notes += done.notes
    return Done("", statuses=dict(counts), known=known, left=left, notes=tuple(notes))


def _tuner(evidence: Evidence) -> Done:
    """The default strategy from nothing, on the problems whose space is recorded: what a user's `klab tune` costs, and what it misses."""
    ready = [one for one in spaces(evidence.chip) if is_recorded(evidence.job, one.problem, evidence.competing(one))]
    left, notes = len(spaces(evidence.chip)) - len(ready), list[str]()
    if not ready:
        return Done("", left=left, notes=("no space is recorded yet, so there is nothing to hold it against",))
    job = evidence.new_job(tuner_folder(evidence.folder))
    try:
        with job.session():
            for one in ready:
                if evidence.left_s() < evidence.least_s:
                    left += 1
                    continue
                done = _tried(evidence, one, "", job, Allowance(device_s=TUNER_S[evidence.chip.kind], deadline=evidence.deadline))
                left += done.left
                notes += done.notes
    finally:
        job.journal.close()
    return Done("", left=left, notes=tuple(notes))


def _tried(evidence: Evidence, one: SpaceOf, strategy: str, job: Job, allowance: Allowance) -> Done:
    """A problem that cannot be searched (every candidate fails, its journal is damaged) leaves the others."""
    try:
        return _searched(evidence, one, strategy, job, allowance)
    except KlabError as error:
        return Done("", left=1, notes=(f"failed: {one.problem.label()}: {error}",))


def _searched(evidence: Evidence, one: SpaceOf, strategy: str, job: Job, allowance: Allowance) -> Done:
    problem = one.problem
    tuner = Tuner(
        job, evidence.competing(one), [Target(problem, 1.0, bound_us(problem, evidence.chip))], Options(strategy, allowance=allowance)
    )
    tuned = tuner.run()
    course = tuned.courses[0]
    space = len(course.lane.space) if course.lane else 0
    complete = strategy != STRATEGY or (space > 0 and course.evaluations >= space)
    tried = f"{course.evaluations} of {space} candidates, {course.prospect.spent_s:.0f} s of the device"
    words = f"{problem.label()}: {tried}, best {course.best_us():.2f} us"
    return Done("", statuses=dict(tuned.new), known=tuned.known, left=0 if complete else 1, notes=(words,))


def _repeat(evidence: Evidence) -> Done:
    """Winner, runner-up and best library of the heaviest problems, until SITTINGS_WANTED sittings have them; then some joules."""
    keys = [problem.key for problem in evidence.heaviest()[:REPEATED]]
    # By the first time of each, so that every sitting repeats the same ones, also where they are as fast as one another.
    fine: dict[str, Result] = {}
    runs: dict[str, set[str]] = {}
    for row in sorted(iter_results(evidence.job.sources()), key=age):
        if row.status is Status.OK and row.median_us is not None:
            fine.setdefault(row.key, row)
            if row.energy_j is not None or not row.policy.get("energy"):
                runs.setdefault(row.key, set()).add(row.run_id)
    by_problem: dict[str, list[Trial]] = {key: [] for key in keys}
    for trial in evidence.compared():
        if trial.problem.key in by_problem and trial.key in fine:
            by_problem[trial.problem.key].append(trial)
    chosen, metered = list[Trial](), list[Trial]()
    for group in by_problem.values():
        ranked = sorted(group, key=lambda t: fine[t.key].median_us or 0.0)
        chosen += list(dict.fromkeys([*ranked[:2], *[t for t in ranked if fine[t.key].library][:1]]))
        # One that was metered before: only that makes a spread.
        metered += [one for trial in ranked if (one := trial.with_policy(energy=True)).key in runs][:1]
    wanted = [*chosen, *metered[:REPEATED_ENERGY]]
    todo = [trial for trial in wanted if len(found := runs.get(trial.key, set())) < SITTINGS_WANTED and evidence.job.run_id not in found]
    before, evidence.job.again = evidence.job.again, True
    try:
        # Whatever has the fewest first: a sitting that is too short for all must not repeat the same ones each time.
        done = evidence.measured(sorted(todo, key=lambda trial: len(runs.get(trial.key, ()))))
    finally:
        evidence.job.again = before
    enough = sum(len(runs.get(trial.key, ())) >= SITTINGS_WANTED for trial in wanted)
    return dataclasses.replace(done, known=enough)


PARTS: dict[str, Callable[[Evidence], Done]] = {
    "tests": _tests,
    "correctness": _correctness,
    "calibration": _calibration,
    "comparison": _comparison,
    "energy": _energy,
    "spaces": _spaces,
    "tuner": _tuner,
    "repeat": _repeat,
    "energy_rest": _energy_rest,
}
"""By name, in the order of their worth."""
