"""The page: one HTML file with everything in it, from which no request leaves. In the order in which a reader asks."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from klab.harness.report.figures import cost_and_error, roofline, sweep, where_time_goes
from klab.harness.report.figures.style import Figure
from klab.harness.report.frames import standing
from klab.harness.report.html import Markup, el
from klab.harness.report.sections import failures, glossary, method, steps, strip, winners
from klab.harness.report.shell import document, framed, plotly_js
from klab.harness.report.subject import Story

if TYPE_CHECKING:
    import pandas as pd

Draw = Callable[[Story, "pd.DataFrame"], list[Figure]]
"""What a module of figures/ has by the name `figures`: what it draws of a story, from the rows of `frames.standing`. No data, no figure."""

# (identity, heading, figures) of each chapter: what won, why, what it costs, what changed.
CHAPTERS: tuple[tuple[str, str, tuple[Draw, ...]], ...] = (
    ("won", "What won", ()),
    ("why", "Why", (roofline.figures, sweep.figures, where_time_goes.figures)),
    ("cost", "What it costs", (cost_and_error.figures,)),
    ("changed", "What changed", ()),
)


def figures(story: Story, frame: pd.DataFrame | None = None) -> dict[str, list[Figure]]:
    """The figures of the page by chapter. frame: of `frames.standing`, where it is at hand."""
    rows = standing(story) if frame is None else frame
    return {identity: [figure for draw in draws for figure in draw(story, rows)] for identity, _, draws in CHAPTERS}


def render(story: Story) -> str:
    """The whole page as text. Without plotly and pandas the tables are there and the page says what is missing."""
    drawing = plotly_js() if story.subjects else ""
    drawn = figures(story) if story.subjects and importlib.util.find_spec("pandas") else {}
    parts = [_chapter(story, identity, heading, drawn.get(identity, []), bool(drawing)) for identity, heading, _ in CHAPTERS]
    if not story.subjects:
        parts = [el("p", "There are no results to show yet. `klab run --model qwen3-0.6b --chip auto` makes some.")]
    links = [(identity, heading) for identity, heading, _ in CHAPTERS] + [("method", "Method and environment"), ("words", "Words")]
    title = " ".join(["klab:", story.model or "results", *(f"on {s.chip}" for s in story.subjects[:1])])
    content = [
        strip.section(story),
        el("nav", [el("a", name, href=f"#{target}") for target, name in links]),
        el("main", parts, method.section(story), glossary.section()),
        el("footer", el("p", _footer(story), class_="note")),
    ]
    return document(title, content, drawing=drawing)


def _chapter(story: Story, identity: str, heading: str, drawn: Sequence[Figure], drawing: bool) -> Markup:
    """A chapter: its figures, and for each chip the tables that belong to it."""
    shown: list[object] = []
    for subject in story.subjects:
        parts: list[object] = []
        if identity == "won":
            parts = [steps.section(subject), winners.section(subject)]
        elif identity == "why":
            parts = [method.limits(subject), failures.section(subject)]
        if parts:
            shown.append(el("article", el("h3", subject.title), parts, id=f"{identity}-{slug(subject.chip)}", data_chip=subject.chip))
    boxes = [framed(figure, drawing) for figure in drawn]
    return el("section", el("h2", heading), [shown, boxes] if identity == "won" else [boxes, shown], id=identity)


def _footer(story: Story) -> str:
    places = ", ".join(story.sources)
    return f"Made by klab{f' from {places}' if places else ''}. Everything is in this file; it loads nothing."


def slug(text: str) -> str:
    """Text as a part of an identity in HTML."""
    return "".join(c if c.isascii() and c.isalnum() else "-" for c in text.lower())
