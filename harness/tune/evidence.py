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
from klab.harness.measure.calibrate import PARTS as FIGURES
from klab.harness.measure.calibrate import SENSOR_S
from klab.harness.measure.calibration import read_calibrations
from klab.harness.plan.trial import Trial
from klab.harness.plan.trials import default_policy, trials
from klab.harness.store.result import Status
from klab.harness.tune.allowance import Allowance
from klab.harness.tune.campaign import Share, bound_us, correctness_trials, shares
from klab.harness.tune.device_tests import DeviceTests, run_device_tests
from klab.harness.tune.evidence_problems import MODELS, SpaceOf, spaces
from klab.harness.tune.evidence_spaces import STRATEGY, is_recorded
from klab.harness.tune.job import Job, Listener
from klab.harness.tune.pick import energy_trials
from klab.harness.tune.tuner import Options, Target, Tuner
from klab.kernels.contract import Chip, Json, Kernel, Problem, digest
from klab.kernels.discover import Catalogue, operators
from klab.kernels.errors import CannotMeasure, KlabError, UsageError

SITTINGS_FILE = "sittings.json"
# Device tests that passed with the kernels' code as it was: a later sitting with the same code runs the others.
TESTED_FILE = "device_tests.json"
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
# Below this nothing that follows can begin: a GPU's worker needs a dozen seconds until its first trial.
LEAST_S = {"cuda": 20.0, "cpu": 5.0}


@dataclass(frozen=True)
class Done:
    """What a part of a sitting came to. `left`: trials or problems that were not reached; with 0, and no note, the part is complete."""

    part: str
    seconds: float = 0.0
    statuses: Mapping[str, int] = field(default_factory=dict)
    known: int = 0
    left: int = 0
    notes: tuple[str, ...] = ()


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
        tests: Callable[[float | None, Sequence[str]], DeviceTests] = run_device_tests,
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
                done = self._timed(part)
                self.sitting.parts.append(done)
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
            self.deadline = min(whole, began + max(self.least_s, SHARES[part] * (whole - began)))
        self.job.deadline = self.deadline
        try:
            done = PARTS[part](self)
        except KlabError as error:
            done = Done(part, notes=(str(error),))
        finally:
            self.deadline = self.job.deadline = whole
        here = (row.environment for row in reversed(self.job.outcome.results) if row.kind == "measured" and row.environment)
        self.sitting.environment = next(here, self.sitting.environment)
        return dataclasses.replace(done, part=part, seconds=round(time.monotonic() - began, 2))

    def _note(self) -> None:
        earlier = [one for one in read_sittings(self.folder) if one.get("run_id") != self.sitting.run_id]
        _write(self.folder / SITTINGS_FILE, [*earlier, dataclasses.asdict(self.sitting)])


def _write(path: Path, value: Json) -> None:
    part = path.with_name(f".{path.name}.part")
    try:
        part.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
        part.replace(path)
    except OSError as error:
        raise CannotMeasure(f"cannot write {path}: {error.strerror or error}") from None


def tuner_folder(folder: Path) -> Path:
    """Beside the evidence: the tuner's searches begin as if nothing were known, so their rows and journals are apart."""
    return folder.with_name(f"{folder.name}-tuner")


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
    left, path = evidence.left_s(), evidence.folder / TESTED_FILE
    code = digest({kernel.id: kernel.source_digest for kernel in evidence.kernels()})
    passed = _passed(path, code)
    found = evidence.tests(None if left == float("inf") else left, passed)
    if found.passed:
        _write(path, {"code": code, "passed": sorted({*passed, *found.passed})})
    notes = (*([found.stopped] if found.stopped else []), *(f"failed: {name}" for name in found.failed))
    return Done("", statuses=found.counts, known=len(passed), left=1 if found.stopped else 0, notes=notes)


def _passed(path: Path, code: str) -> list[str]:
    """A file that is damaged, or of other code, costs the tests once more."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return [str(name) for name in found["passed"]] if found["code"] == code else []
    except (OSError, ValueError, KeyError, TypeError):
        return []


def _correctness(evidence: Evidence) -> Done:
    return evidence.measured(correctness_trials(evidence.kernels(), evidence.chip))


def _calibration(evidence: Evidence) -> Done:
    """Each sitting may be on another machine of the chip: a device that has its figures is left alone."""
    from klab.harness.fleet.devices import devices

    here = {device.id for device in devices(evidence.chip)}
    known = {uuid for uuid, one in read_calibrations([evidence.folder]).items() if one.chip == evidence.chip.name}
    todo = sorted(here - known)
    made = []
    if todo:
        made = list(calibrate_devices(evidence.chip, evidence.folder, only_devices=todo, parts=FIGURES, sensor_s=evidence.sensor_s))
    return Done("", statuses={"calibrated": len(made)}, known=len(here & known), notes=tuple(n for one, _ in made for n in one.notes))


def _comparison(evidence: Evidence) -> Done:
    return evidence.measured(evidence.compared())


def _energy(evidence: Evidence, problems: slice = slice(0, ENERGY_FIRST)) -> Done:
    if evidence.chip.kind == "cpu":
        raise CannotMeasure("klab reads no power sensor of a CPU")
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
                done = _tried(evidence, one, STRATEGY, evidence.job, Allowance(deadline=evidence.deadline, final_s_most=0.0))
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
        return Done("", left=1, notes=(f"{one.problem.label()}: {error}",))


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
    """The winner, its runner-up and the best library of the heaviest problems once more, in this sitting's own run; then some joules."""
    keys = [problem.key for problem in evidence.heaviest()[:REPEATED]]
    fine = {row.key: row for row in evidence.job.stored() if row.status is Status.OK and row.median_us is not None}
    by_problem: dict[str, list[Trial]] = {key: [] for key in keys}
    for trial in evidence.compared():
        if trial.problem.key in by_problem and trial.key in fine:
            by_problem[trial.problem.key].append(trial)
    chosen, metered = list[Trial](), list[Trial]()
    for group in by_problem.values():
        ranked = sorted(group, key=lambda t: fine[t.key].median_us or 0.0)
        chosen += list(dict.fromkeys([*ranked[:2], *[t for t in ranked if fine[t.key].library][:1]]))
        # One that was metered before: only that makes a spread.
        known = [one for t in ranked if (row := fine.get((one := t.with_policy(energy=True)).key)) and row.energy_j is not None]
        metered += known[:1]
    mine = {row.key for row in fine.values() if row.run_id == evidence.job.run_id}
    before, evidence.job.again = evidence.job.again, True
    try:
        return evidence.measured([trial for trial in [*chosen, *metered[:REPEATED_ENERGY]] if trial.key not in mine])
    finally:
        evidence.job.again = before


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
