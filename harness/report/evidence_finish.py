"""From the recorded rows of a chip to what is committed with them: packs, engines' tables, spaces, README, and the page. Needs no GPU."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from klab.harness.choose.evidence_repeats import repeats
from klab.harness.choose.goals import engine_default, judge
from klab.harness.choose.profile import write_text
from klab.harness.measure.calibration import read_calibrations
from klab.harness.measure.correction import corrected
from klab.harness.report.evidence_coverage import NEVER, coverage
from klab.harness.report.evidence_energy import joules
from klab.harness.report.evidence_failures import failures
from klab.harness.report.evidence_files import packs, served, sizes, spaces, tables
from klab.harness.report.evidence_gaps import again as repeated_gaps
from klab.harness.report.evidence_gaps import gaps
from klab.harness.report.evidence_readme import About, readme
from klab.harness.report.evidence_search import ToBest, finals, rests_on, searches, time_to_best
from klab.harness.report.evidence_sittings import seats, sound
from klab.harness.report.limits import limits_of
from klab.harness.report.write import write_report
from klab.harness.store.paths import checkout
from klab.harness.store.read import ReadReport, iter_results
from klab.harness.store.result import Result
from klab.harness.tune.campaign import COMPACT_FILE
from klab.harness.tune.device_tests_kept import KeptTests
from klab.harness.tune.evidence import read_sittings
from klab.harness.tune.evidence_folder import tuner_folder
from klab.harness.tune.evidence_problems import MODELS, SpaceOf
from klab.harness.tune.evidence_problems import spaces as spaces_of
from klab.harness.tune.replay.export import Recordings
from klab.kernels.contract import Chip
from klab.kernels.discover import Catalogue
from klab.kernels.errors import CannotMeasure, UsageError

README, PAGE = "README.md", "report.html"


@dataclass(frozen=True)
class Finished:
    """What was written, and what is to be said of it, a line each."""

    files: tuple[Path, ...]
    lines: tuple[str, ...]


def finish(folder: Path, chip: Chip, catalogue: Catalogue, models: Sequence[str] = ()) -> Finished:
    """Everything that follows from the rows of `folder` and of its tuner's folder. Run again, it replaces what it wrote.

    UsageError where there is no such folder or model; CannotMeasure where it has no row of this chip, or the disk takes no more.
    """
    if not folder.is_dir():
        raise UsageError(f"--out {folder} does not exist; klab evidence without --finish makes it")
    report = ReadReport()
    every = [row for row in iter_results([folder], report) if row.kind != "reference"]
    raw = [row for row in every if row.chip == chip.name]
    if not raw:
        others = ", ".join(sorted({row.chip for row in every}))
        there = f"it has rows of {others}, which --chip names" if others else "klab evidence without --finish records some"
        raise CannotMeasure(f"{folder} has no row of {chip.name}; {there}")
    troubles: list[str] = []
    calibrations = read_calibrations([folder], troubles)
    rows, corrections = corrected(raw, calibrations)
    here = [one for _, one in sorted(calibrations.items()) if one.chip == chip.name]
    asked = [served(text, chip) for text in tuple(models) or MODELS[chip.kind]]
    profiles, pack_files, pack_lines = packs(asked, rows, chip, catalogue, finals(folder), folder)
    engine_files, engine_lines = tables(asked, rows, chip, catalogue, folder)
    recorded, found = _searched(raw, rows, chip, catalogue, folder)
    space_files, space_lines = spaces(recorded, folder)
    sittings = sound(read_sittings(folder))
    again, limits = repeats(raw), limits_of(chip.name, raw[-1].device)
    wanted = [problem.key for one in asked for problem in one.plan.problems()]
    tests = KeptTests(folder, list(catalogue.kernels.values())).tested()
    covered = coverage(sittings, raw, found, again, wanted, {one.device_uuid for one in here}, tests)
    made = [*pack_files, *engine_files, *space_files]
    lines = [*pack_lines, *engine_lines, *space_lines]
    about = About(
        chip.name,
        chip.title,
        _named(folder, folder.parent),
        len(raw),
        [_without(line, folder) for line in (*report.lines(), *troubles, *corrections)],
        seats(sittings, raw),
        covered,
        gaps(rows, limits),
        repeated_gaps(raw, limits),
        joules(raw),
        failures(raw),
        tests.failed,
        here,
        profiles,
        judge(rows, chip.name, engine_default=engine_default(catalogue)),
        again,
        found,
        [_named(path, folder) for path in made],
        lines,
        sizes([folder / COMPACT_FILE]),
    )
    write_text(folder / README, readme(about))
    page = folder / PAGE
    beside = [one for one in (folder, tuner_folder(folder)) if one.is_dir()]
    write_report(beside, page, chips=[chip.name], catalogue=catalogue)
    lines += [f"part {one.part}: {one.state}" + (f", {one.missing}" if one.missing and one.state != NEVER else "") for one in covered]
    lines.append(f"{README} and {PAGE} are written; the page is not committed")
    return Finished((*made, folder / README, page), tuple(lines))


def _searched(
    rows: Sequence[Result], fair: Sequence[Result], chip: Chip, catalogue: Catalogue, folder: Path
) -> tuple[list[Recordings], list[ToBest]]:
    """The rows of the problems whose space is recorded, as measured, and what the tuner took on them, by the rows that are corrected for
    their devices (`fair`): a space may be recorded on several. A problem without a row is in the second alone.
    """
    by_problem: dict[str, list[Result]] = defaultdict(list)
    comparable: dict[str, list[Result]] = defaultdict(list)
    for groups, some in ((by_problem, rows), (comparable, fair)):
        for row in some:
            groups[row.problem_key].append(row)
    beside = tuner_folder(folder)
    tuner_rows: dict[str, list[Result]] = defaultdict(list)
    for row in iter_results([beside], ReadReport()) if beside.is_dir() else ():
        if row.chip == chip.name:
            tuner_rows[row.problem_key].append(row)
    here, there = list(searches(folder)), list(searches(beside))
    recorded, found = [], []
    for one in spaces_of(chip):
        problem = one.problem
        group = by_problem.get(problem.key)
        if not group:
            found.append(ToBest(problem.label(), 0, None, notes=("nothing was recorded of it",)))
            continue
        done = [s for s in here if s.journal.header.get("problem") == problem.key]
        recording = Recordings(problem.key, problem.label(), problem.operator, tuple(group))
        recorded.append(rests_on(recording, done)[0])
        own = {kernel.id: kernel for kernel in catalogue.kernels.values() if _tried(one, kernel.name, kernel.library)}
        found.append(
            time_to_best(
                dataclasses.replace(recording, rows=tuple(comparable[problem.key])),
                problem,
                chip,
                own,
                done,
                [s for s in there if s.journal.header.get("problem") == problem.key],
                tuner_rows[problem.key],
            )
        )
    return recorded, found


def _tried(one: SpaceOf, name: str, library: bool) -> bool:
    return not library and (not one.kernels or name in one.kernels)


def _without(line: str, folder: Path) -> str:
    """A line of what was met on reading, without where on this machine the folder lies: the same rows give the same file."""
    for name in (str(folder.resolve()), str(folder)):
        line = line.replace(f"{name}/", "")
    return line


def _named(path: Path, folder: Path) -> str:
    """As a reader of the repository names it; outside of one, below `folder`, since where that lies is this machine's alone."""
    here = path.resolve()
    for root in (checkout(), folder):
        if root is not None and here.is_relative_to(root.resolve()):
            return here.relative_to(root.resolve()).as_posix()
    return path.name
