"""From a folder of results to the page in a file: what `klab report` and `klab run` do."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from klab.harness.choose.decide import decide
from klab.harness.choose.profile import Profile, profile_path, read_profile, write_text
from klab.harness.measure.calibration import Calibration, read_calibrations
from klab.harness.measure.correction import corrected
from klab.harness.plan.rows import Plan
from klab.harness.report.limits import Limits, limits_of, with_measured
from klab.harness.report.page import render
from klab.harness.report.subject import Story, tell
from klab.harness.store.read import ReadReport, iter_results
from klab.harness.store.result import Result
from klab.kernels.discover import Catalogue, approximations_of
from klab.kernels.errors import KlabError


def write_report(
    folders: Sequence[Path],
    out: Path,
    *,
    chips: Sequence[str] = (),
    plans: Mapping[str, Plan] | None = None,
    catalogue: Catalogue | None = None,
    limits: Callable[[str, str], Limits] = limits_of,
) -> Story:
    """Read the results, tell their story, and replace `out` by the page.

    chips: only these (default: all that have results). plans: by chip; with one, only its problems are shown, with their place in the
    model. catalogue: the kernels as they are now, to mark stale code. CannotMeasure when `out` cannot be written.
    """
    report = ReadReport()
    there = [folder for folder in folders if folder.exists()]
    results = list(iter_results(there, report))
    calibrations = read_calibrations(there)

    def known(chip: str, device: str) -> Limits:
        return with_measured(limits(chip, device), calibrations)

    story = story_of(
        results,
        chips=chips,
        plans=plans or {},
        catalogue=catalogue,
        limits=known,
        report=report,
        folders=folders,
        calibrations=calibrations,
    )
    write_text(out, render(story))
    return story


def story_of(
    results: Sequence[Result],
    *,
    chips: Sequence[str],
    plans: Mapping[str, Plan],
    catalogue: Catalogue | None,
    limits: Callable[[str, str], Limits],
    report: ReadReport,
    folders: Sequence[Path],
    calibrations: Mapping[str, Calibration] | None = None,
) -> Story:
    """The story of these results, choices settled by the tuned profiles that exist."""

    def choice(chip: str, rows: Sequence[Result]) -> Profile:
        plan = plans.get(chip)
        known = plan.chip if plan else limits(chip, "").chip if catalogue else None
        comparable, _ = corrected(rows, calibrations)
        return decide(comparable, plan, chip, catalogue=catalogue, previous=_previous(plan), limits=known)

    story = tell(results, choice, limits, chips=chips or list(plans), keys={chip: _keys(plan) for chip, plan in plans.items()})
    plan = next(iter(plans.values()), None)
    return dataclasses.replace(
        story,
        model=plan.model.name if plan else "",
        scenario={"input": plan.scenario.isl, "output": plan.scenario.osl, "tp": plan.scenario.tp, "dtype": plan.dtype} if plan else {},
        notes=tuple(note.text for note in plan.notes) if plan else (),
        reading=tuple(report.lines()),
        sources=tuple(str(folder) for folder in folders),
    )


def _keys(plan: Plan) -> set[str]:
    """The plan's problems, and what approximates them in narrower formats."""
    problems = plan.problems()
    return {p.key for p in problems} | {p.key for wide in problems for p in approximations_of(wide)}


def _previous(plan: Plan | None) -> Profile | None:
    """Last time's profile, where there is one; a file that is something else does not stop a report."""
    if plan is None:
        return None
    try:
        return read_profile(profile_path(plan.chip.name, plan.model.name))
    except KlabError:
        return None
