"""The page: one HTML file with everything in it, from which no request leaves. In the order in which a reader asks."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from klab.harness.report.figures import (
    chips,
    energy,
    history_series,
    money,
    placement_map,
    power,
    quantisation,
    roofline,
    search,
    sweep,
    where_time_goes,
)
from klab.harness.report.figures.style import Figure, distinct
from klab.harness.report.frames import standing
from klab.harness.report.guard import guarded
from klab.harness.report.html import Markup, el
from klab.harness.report.sections import changes, evidence, failures, glossary, method, steps, strip, winners
from klab.harness.report.shell import document, framed_all, index, plotly_js
from klab.harness.report.subject import Story, Subject

if TYPE_CHECKING:
    import pandas as pd

Draw = Callable[[Story, "pd.DataFrame"], list[Figure]]
"""What a module of figures/ has by the name `figures`: what it draws of a story, from the rows of `frames.standing`. No data, no figure."""

# (identity, heading, figures) of each chapter: what won, why, what it costs, what changed.
CHAPTERS: tuple[tuple[str, str, tuple[Draw, ...]], ...] = (
    ("won", "What won", (chips.figures,)),
    ("why", "Why", (roofline.figures, sweep.figures, where_time_goes.figures, search.figures, power.figures)),
    (
        "cost",
        "What it costs",
        (
            energy.figures,
            quantisation.figures,
            money.figures,
            placement_map.figures,
        ),
    ),
    ("changed", "What changed", (history_series.figures,)),
)

# What the page's script has besides the figures, by name (`klab.payload[name]`): each made of the story.
SECTIONS: Mapping[str, Callable[[Story], object]] = {"evidence": evidence.payload}


def figures(story: Story, frame: pd.DataFrame | None = None) -> dict[str, list[Figure]]:
    """The figures of the page by chapter. frame: of `frames.standing`, where it is at hand."""
    rows = standing(story) if frame is None else frame
    return {identity: [figure for draw in draws for figure in guarded(draw, story, rows)] for identity, _, draws in CHAPTERS}


def render(story: Story) -> str:
    """The whole page as text. Without plotly and pandas the tables are there and the page says what is missing."""
    drawing = plotly_js() if story.subjects else ""
    frame = standing(story) if story.subjects and importlib.util.find_spec("pandas") else None
    drawn = {} if frame is None else figures(story, frame)
    sections = {name: make(story) for name, make in SECTIONS.items()} if story.subjects else {}
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
    if frame is not None:
        sections["index"] = index(frame)
    shown = [one for several in drawn.values() for one in several]
    return document(title, content, figures=shown, sections=sections, drawing=drawing, styles=("page.css", "winners.css"))


def _chapter(story: Story, identity: str, heading: str, drawn: Sequence[Figure], drawing: bool) -> Markup:
    """A chapter: its tables and its figures; what won is told first."""
    shown, boxes = _tables(story, identity), framed_all(drawn, drawing)
    return el("section", el("h2", heading), [boxes, shown] if identity == "why" else [shown, boxes], id=identity)


def _tables(story: Story, identity: str) -> list[object]:
    """The tables of a chapter: of all chips together where a reader compares, else chip by chip."""
    if identity == "won":
        return [_by_chip(story, identity, steps.section), winners.section(story), evidence.plain(story)]
    if identity == "why":
        return [failures.section(story), _by_chip(story, identity, method.limits)]
    return [changes.section(story)] if identity == "changed" else []


def _by_chip(story: Story, identity: str, tell: Callable[[Subject], Markup | None]) -> list[Markup]:
    # Chips whose names differ only in case or spaces have places of their own.
    places = map(slug, distinct([slug(subject.chip) for subject in story.subjects]))
    told = [(subject, place, tell(subject)) for subject, place in zip(story.subjects, places, strict=True)]
    return [
        el("article", el("h3", subject.title), part, id=f"{identity}-{place}", data_chip=subject.chip)
        for subject, place, part in told
        if part is not None
    ]


def _footer(story: Story) -> str:
    places = ", ".join(story.sources)
    return f"Made by klab{f' from {places}' if places else ''}. Everything is in this file; it loads nothing."


def slug(text: str) -> str:
    """Text as a part of an identity in HTML."""
    return "".join(c if c.isascii() and c.isalnum() else "-" for c in text.lower())
