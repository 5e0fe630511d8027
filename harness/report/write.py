"""From folders of results to the page in a file: what `klab report` and `klab run` do."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from klab.harness.choose.profile import Wanted, write_text
from klab.harness.measure.calibration import read_calibrations
from klab.harness.plan.rows import Plan
from klab.harness.report.gather import gather
from klab.harness.report.limits import Limits, limits_of
from klab.harness.report.page import render
from klab.harness.report.places import places_of
from klab.harness.report.published import published
from klab.harness.report.request import Request
from klab.harness.report.subject import Occurrence, Story
from klab.harness.store.query import latest
from klab.harness.watch.history import History
from klab.harness.watch.series import Night
from klab.kernels.discover import Catalogue


def write_report(
    folders: Sequence[Path],
    out: Path,
    *,
    chips: Sequence[str] = (),
    plans: Mapping[str, Plan] | None = None,
    catalogue: Catalogue | None = None,
    limits: Callable[[str, str], Limits] = limits_of,
    runs: Sequence[str] = (),
    history: Sequence[Path] | None = None,
    reference: bool = False,
) -> Story:
    """Read the results, tell their story, and replace `out` by the page. Arguments as of `story_from`.

    CannotMeasure when `out` cannot be written.
    """
    story = story_from(
        folders, chips=chips, plans=plans, catalogue=catalogue, limits=limits, runs=runs, history=history, reference=reference
    )
    write_text(out, render(story))
    return story


def story_from(
    folders: Sequence[Path],
    *,
    chips: Sequence[str] = (),
    plans: Mapping[str, Plan] | None = None,
    catalogue: Catalogue | None = None,
    limits: Callable[[str, str], Limits] = limits_of,
    runs: Sequence[str] = (),
    history: Sequence[Path] | None = None,
    reference: bool = False,
) -> Story:
    """Everything that the page of these folders tells.

    chips: only these (default: all that have results). plans: by chip; with one, only its problems are shown, with their place in the
    model. catalogue: the kernels as they are now, to mark stale code. runs: ids, starts of ids, `latest`, `previous`: only rows of these
    (UsageError for what is no run). history: folders of `klab nightly` (default: where it keeps them beside these results).
    reference: with published results of these chips, apart from own ones.
    """
    there = [folder for folder in folders if folder.exists()]
    planned = dict(plans or {})
    request = Request(chips, planned, catalogue, runs, limits, read_calibrations(there))
    story = gather(there, request)
    story = _with_published(story, planned) if reference else story
    nights, troubles = _nights([subject.chip for subject in story.subjects], _kept(folders) if history is None else history)
    plan = next(iter(planned.values()), None)
    return dataclasses.replace(
        story,
        model=plan.model.name if plan else "",
        scenario={"input": plan.scenario.isl, "output": plan.scenario.osl, "tp": plan.scenario.tp, "dtype": plan.dtype} if plan else {},
        notes=(*story.notes, *(note.text for note in plan.notes)) if plan else story.notes,
        reading=(*story.reading, *troubles),
        sources=tuple(str(folder) for folder in folders),
        occurs=_places(story, planned),
        plans=planned,
        nights=nights,
    )


def _places(story: Story, plans: Mapping[str, Plan]) -> Mapping[str, tuple[Occurrence, ...]]:
    rows = [row for subject in story.subjects for row in (*subject.rows, *subject.light, *subject.reference)]
    wanted = {row.problem_key: Wanted(row.problem_key, row.operator, row.problem_label, dict(row.problem)) for row in rows}
    return places_of(wanted.values(), plans, {row.problem_key: row.wide_key for row in rows if row.wide_key})


def _with_published(story: Story, plans: Mapping[str, Plan]) -> Story:
    """The story with what others published of its chips and problems, apart from own results."""
    rows = [row for subject in story.subjects for row in (*subject.rows, *subject.light)]
    found = published([subject.chip for subject in story.subjects], plans, rows)
    subjects = [
        dataclasses.replace(
            subject, reference=tuple(latest([*subject.reference, *(row for row in found.rows if row.chip == subject.chip)]))
        )
        for subject in story.subjects
    ]
    return dataclasses.replace(story, subjects=tuple(subjects), notes=(*story.notes, *found.lines))


def _kept(folders: Iterable[Path]) -> list[Path]:
    """Where `klab nightly` keeps its nights for each folder of results: in it, or in the checkout's results/local."""
    inside = [folder / name for folder in folders for name in ("nights", Path("local", "nights"))]
    return [folder for folder in dict.fromkeys(inside) if folder.is_dir()]


def _nights(chips: Iterable[str], folders: Iterable[Path]) -> tuple[dict[str, tuple[Night, ...]], list[str]]:
    """By chip its nights, the oldest first, and a line for each file that is none."""
    histories = [History(folder) for folder in folders]
    found = {chip: [night for history in histories for night in history.nights(chip)] for chip in chips}
    ordered = {chip: tuple(sorted(nights, key=lambda night: (night.at, night.identity))) for chip, nights in found.items() if nights}
    return ordered, [line for history in histories for line in history.problems]
