"""The steps of the model: what the chosen kernels add up to, beside the libraries alone."""

from __future__ import annotations

from klab.harness.choose.profile import StepTime
from klab.harness.report.html import Markup, el, table
from klab.harness.report.subject import Subject
from klab.harness.report.units import percent, speed_up, sum_time, time

COLUMNS = ("Step", "Chosen kernels", "Libraries alone", "Speed-up", "Problems open", "Share of the step (modelled)")


def section(subject: Subject) -> Markup | None:
    """A row per step; nothing without a plan."""
    steps = subject.profile.steps
    if not steps:
        return None
    words = el(
        "p",
        "Kernel times from the table of winners times their launches per step, on one device, without the gaps between "
        "launches; a lower bound (>=) while problems of the step are open. The last column is the share of the step's roofline time that "
        "these operators stand for; the rest has no kernels in klab yet.",
        class_="note",
    )
    return el("section", el("h3", "Steps"), words, table(COLUMNS, [_row(step) for step in steps], COLUMNS[1:]))


def _row(step: StepTime) -> list[object]:
    libraries = step.library_us
    return [
        f"{step.phase}, batch {step.batch}",
        sum_time(step.us, step.open),
        time(libraries) if libraries else "not known for every problem",
        speed_up(libraries, step.us, step.open),
        step.open or "none",
        "not known" if step.modelled_share is None else percent(step.modelled_share),
    ]
