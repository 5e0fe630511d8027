"""The steps of the model: what the chosen kernels add up to, beside the libraries alone."""

from __future__ import annotations

from klab.harness.choose.profile import StepTime
from klab.harness.report.gain import step_gain, step_time
from klab.harness.report.html import Cell, Line, Markup, el, table
from klab.harness.report.subject import Subject
from klab.harness.report.units import interval, percent, plain_ratio, speed_up, sum_time, time

COLUMNS = ("Step", "Chosen kernels", "Libraries alone", "Speed-up", "Problems open", "Share of the step (modelled)")


def section(subject: Subject) -> Markup | None:
    """A row per step; nothing without a plan."""
    steps = subject.profile.steps
    if not steps:
        return None
    words = el(
        "p",
        "Kernel times from the table of winners times their launches per step, on one device, without the gaps between "
        "launches; a lower bound (>=) while problems of the step are open. Brackets are 95% intervals with every kernel at the same end of "
        "its own. The last column is the share of the step's roofline time that these operators stand for; the rest has no kernels in "
        "klab yet.",
        class_="note",
    )
    lines = [_line(subject, step) for step in steps]
    return el("section", el("h3", "Steps"), words, table(COLUMNS, lines, COLUMNS[1:], identity=f"steps-{subject.chip}"))


def _line(subject: Subject, step: StepTime) -> Line:
    libraries, taken, ratio = step.library_us, step_time(subject, step), step_gain(subject, step)
    ends = el("small", f"[{interval(*taken[1:])}]") if taken and not step.open else None
    inside = el("small", f"[{plain_ratio(ratio[1])}, {plain_ratio(ratio[2])}]") if ratio else None
    cells = [
        Cell(f"{step.phase}, batch {step.batch}", f"{step.phase} {step.batch:09d}"),
        Cell([sum_time(step.us, step.open), ends], step.us),
        Cell(time(libraries), libraries) if libraries else Cell("not known for every problem", ""),
        Cell([speed_up(libraries, step.us, step.open), inside], ratio[0] if ratio else ""),
        Cell(step.open or "none", step.open),
        Cell(
            "not known" if step.modelled_share is None else percent(step.modelled_share),
            "" if step.modelled_share is None else step.modelled_share,
        ),
    ]
    return Line(cells, {"chip": subject.chip, "model": subject.profile.model, "phase": step.phase})
