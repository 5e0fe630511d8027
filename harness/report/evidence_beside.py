"""A page of a machine without a GPU shows the recorded evidence of other chips beside its own measurements, and says which is which."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

from klab.harness.catalog.chips import find_chip
from klab.harness.choose.profile import write_text
from klab.harness.plan.rows import Plan
from klab.harness.report.page import render
from klab.harness.report.subject import Story, Subject
from klab.harness.report.write import story_from
from klab.harness.store.paths import checkout
from klab.harness.store.query import age
from klab.harness.store.read import ReadReport, part_files
from klab.kernels.contract import Chip
from klab.kernels.discover import Catalogue
from klab.kernels.errors import KlabError


@dataclasses.dataclass(frozen=True)
class Kept:
    """The recorded rows of a chip that ship with klab."""

    chip: Chip
    folder: Path


def kept(measured: Path, own: Sequence[str]) -> list[Kept]:
    """results/CHIP of the checkout for every chip of the catalog but `own`, where rows are; none where `measured` (the folder that takes
    new rows) lies elsewhere, since who names a place of their own asks for no other.
    """
    root = checkout()
    results = root / "results" if root else None
    if results is None or not results.is_dir() or not measured.resolve().is_relative_to(results.resolve()):
        return []
    found = []
    for folder in sorted(path for path in results.iterdir() if path.is_dir() and path.name not in own):
        try:
            chip = find_chip(folder.name)
        except KlabError:
            continue
        if chip.name == folder.name and any(True for _ in part_files([folder], ReadReport())):
            found.append(Kept(chip, folder))
    return found


def write_beside(folders: Sequence[Path], page: Path, plans: Mapping[str, Plan], catalogue: Catalogue, recorded: Sequence[Kept]) -> Story:
    """The page of own plans with all that was recorded of the other chips. CannotMeasure when `page` cannot be written."""
    there = [folder.resolve() for folder in folders]
    more = [one.folder for one in recorded if not any(one.folder.resolve().is_relative_to(folder) for folder in there)]
    chips = [*plans, *(one.chip.name for one in recorded)]
    story = story_from([*folders, *more], chips=chips, plans=plans, catalogue=catalogue)
    names = {one.chip.name for one in recorded}
    said = {s.chip: _recorded(s) for s in story.subjects if s.chip in names and s.rows}
    own = ", ".join(plans)
    told = [f"{chip}: {words}; it was not measured by this run, which measured {own}" for chip, words in said.items()]
    subjects = tuple(_titled(s, said[s.chip]) if s.chip in said else s for s in story.subjects)
    story = dataclasses.replace(story, subjects=subjects, notes=(*told, *story.notes))
    write_text(page, render(story))
    return story


def _recorded(subject: Subject) -> str:
    """Where and when its rows were recorded."""
    days = sorted({age(row)[0].date().isoformat() for row in (*subject.rows, *subject.light)})
    when = days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}"
    return f"recorded on {subject.profile.device or subject.title} on {when}"


def _titled(subject: Subject, words: str) -> Subject:
    """The subject with these words in its name, wherever the page names it."""
    chip = subject.limits.chip
    if chip is None:
        return dataclasses.replace(subject, recorded=True)
    named = dataclasses.replace(chip, title=f"{chip.title}, {words}")
    return dataclasses.replace(subject, recorded=True, limits=dataclasses.replace(subject.limits, chip=named))
