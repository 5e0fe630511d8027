"""The page: one HTML file with everything in it, from which no request leaves."""

from __future__ import annotations

from klab.harness.report.figures import cost_and_error, roofline, sweep, where_time_goes
from klab.harness.report.figures.style import Figure, colours
from klab.harness.report.html import Markup, el
from klab.harness.report.sections import failures, glossary, method, steps, strip, winners
from klab.harness.report.shell import document, framed, plotly_js
from klab.harness.report.subject import Story, Subject


def figures(subject: Subject) -> list[Figure]:
    """The figures of one chip, in order. Each module has `data` (pure, tested alone) and `draw`."""
    rows = subject.best_per_kernel()
    hues = colours(row.kernel for row in rows)
    found = [roofline.draw(roofline.data(rows, subject.limits), f"{_slug(subject)}-roofline", hues)]
    for along in sweep.AXES:
        panels = sweep.data(rows, along)
        if panels:
            found.append(sweep.draw(panels, along, f"{_slug(subject)}-{along.identity}", hues))
    formats = cost_and_error.data(rows)
    if formats:
        found.append(cost_and_error.draw(formats, f"{_slug(subject)}-error"))
    parts = where_time_goes.data(subject.profile)
    if parts:
        found.append(where_time_goes.draw(parts, subject.profile, f"{_slug(subject)}-time"))
    return found


def render(story: Story) -> str:
    """The whole page as text. Without plotly installed the tables are there and each figure says what is missing."""
    drawing = plotly_js()
    parts = [_chip(subject, bool(drawing)) for subject in story.subjects]
    if not parts:
        parts = [el("p", "There are no results to show yet. `klab run --model qwen3-0.6b --chip auto` makes some.")]
    links = [(f"#{_slug(s)}", s.chip) for s in story.subjects] + [("#method", "method and environment"), ("#words", "words")]
    title = " ".join(["klab:", story.model or "results", *(f"on {s.chip}" for s in story.subjects[:1])])
    content = [
        strip.section(story),
        el("nav", [el("a", name, href=target) for target, name in links]),
        el("main", parts, method.section(story), glossary.section()),
        el("footer", el("p", _footer(story), class_="note")),
    ]
    return document(title, content, drawing=drawing if story.subjects else "")


def _chip(subject: Subject, drawing: bool) -> Markup:
    shown = [framed(figure, drawing) for figure in figures(subject)]
    parts = [steps.section(subject), winners.section(subject), shown, method.limits(subject), failures.section(subject)]
    return el("article", el("h2", subject.title), parts, id=_slug(subject))


def _footer(story: Story) -> str:
    places = ", ".join(story.sources)
    return f"Made by klab{f' from {places}' if places else ''}. Everything is in this file; it loads nothing."


def _slug(subject: Subject) -> str:
    return "chip-" + "".join(c if c.isalnum() else "-" for c in subject.chip.lower())
