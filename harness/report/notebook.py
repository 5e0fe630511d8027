"""The page's figures for Jupyter: as plotly's own objects, their tables as DataFrames, and a notebook that shows them without being run."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from klab.harness.choose.profile import write_text
from klab.harness.report import page
from klab.harness.report.figures.style import Figure, plain
from klab.harness.report.payload import compact
from klab.harness.report.subject import Story
from klab.kernels.contract import Json, digest
from klab.kernels.errors import UsageError

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

# The colours of page.css, which a browser fills in there.
THEMES: dict[str, dict[str, str]] = {
    "light": {
        "paper": "#fbfaf7", "card": "#ffffff", "ink": "#1d2330", "soft": "#5b6474", "faint": "#dfe2e8", "accent": "#2c5fb3",
        "warn": "#8a5a00", "warnback": "#fff6e0",
    },
    "dark": {
        "paper": "#14171d", "card": "#1b1f27", "ink": "#e6e9ef", "soft": "#9aa4b4", "faint": "#343b47", "accent": "#8ab4f8",
        "warn": "#f2c879", "warnback": "#2b2414",
    },
}  # fmt: skip
# Of figures that share a title, so many carry their output in a written notebook: the others are a call away.
VARIANTS_SHOWN = 2
# Rows of a table that a written notebook shows.
HEAD_ROWS = 8
# Height in pixels that a title with one line below it takes above the plot.
TITLE_PX = 64

Results = Story | Path | str | Iterable[Path | str] | None


def story(
    results: Results = None,
    model: str | None = None,
    *,
    chips: Sequence[str] = (),
    scenario: Mapping[str, object] | None = None,
    runs: Sequence[str] = (),
    history: Sequence[Path | str] | None = None,
    reference: bool = False,
) -> Story:
    """The story that `klab report` tells of these results. A Story is given back as it is.

    results: files and folders; default: KLAB_RESULTS, or results/ of the checkout, or ./klab-results. model: a name or a config.json whose
    problems alone are shown, as `scenario` (fields of klab.harness.plan.Scenario) has them; without `chips`, on this machine's.
    runs, history, reference: as of `klab.harness.report.write.story_from`. UsageError for a folder or a name that is not there.
    """
    if isinstance(results, Story):
        return results
    from klab.harness.catalog import find_chip, find_model
    from klab.harness.plan import plan, scenario_for
    from klab.harness.report.write import story_from
    from klab.harness.store.paths import folders_to_read
    from klab.kernels.discover import discover

    named = [results] if isinstance(results, str | Path) else list(results or ())
    folders = folders_to_read(named)
    plans = {}
    if model is not None:
        found = find_model(model)
        given = {name: tuple(value) if isinstance(value, list) else value for name, value in (scenario or {}).items()}
        plans = {chip.name: plan(found, chip, scenario_for(found, chip, **given)) for chip in map(find_chip, chips or ("auto",))}
    nights = None if history is None else [Path(folder) for folder in history]
    shown = list(chips) or list(plans)
    return story_from(folders, chips=shown, plans=plans, catalogue=discover(), runs=runs, history=nights, reference=reference)


def figures(results: Results = None, model: str | None = None, *, chips: Sequence[str] = (), theme: str = "light") -> dict[str, go.Figure]:
    """Every figure of the page that has something to draw, by its identity, checked by plotly's schema. Arguments as for `story`.

    theme: "light" or "dark". Title and first sentence stand above a figure; `layout.meta` has its whole caption, its variant (chip,
    problem, series...) and its chapter. What the page computes under a filter or a slider is here as it is without them. UsageError
    without plotly.
    """
    told = story(results, model, chips=chips)
    return {figure.identity: drawn(figure, theme, chapter) for chapter, figure in _all(told) if figure.traces and not figure.empty}


def tables(results: Results = None, model: str | None = None, *, chips: Sequence[str] = ()) -> dict[str, pd.DataFrame]:
    """The table behind every figure, by the figure's identity. Arguments as for `story`."""
    told = story(results, model, chips=chips)
    return {figure.identity: figure.table for _, figure in _all(told) if figure.table is not None}


def drawn(figure: Figure, theme: str = "light", chapter: str = "") -> go.Figure:
    """A figure of the page as plotly's object, with fixed colours and its title. ValueError where plotly refuses a property or a value."""
    try:
        import plotly.graph_objects as go
    except ModuleNotFoundError:
        raise UsageError("figures need plotly: pip install 'kernel-lab[analysis]'") from None
    if theme not in THEMES:
        raise UsageError(f"theme {theme!r} is neither {' nor '.join(THEMES)}")
    colours = THEMES[theme]
    value = _coloured(json.loads(compact({"data": figure.traces, "layout": figure.layout})), colours)
    shape = value["layout"]
    shape |= {
        "template": "none",
        "paper_bgcolor": colours["card"],
        "plot_bgcolor": colours["card"],
        "font": {"color": colours["ink"], "size": 12} | shape.get("font", {}),
        "hoverlabel": {"bgcolor": colours["card"], "bordercolor": colours["soft"], "font": {"color": colours["ink"]}},
        "meta": {"caption": figure.caption, "variant": figure.variant, "chapter": chapter},
        "title": _title(figure, colours),
    }
    margin = dict(shape.get("margin", {}))
    shape["margin"] = margin | {"t": margin.get("t", 16) + TITLE_PX}
    if "height" in shape:
        shape["height"] += TITLE_PX
    for menu in shape.get("updatemenus", []):
        menu |= {"bgcolor": colours["card"], "bordercolor": colours["faint"]}
    return go.Figure(value)


def write_notebook(told: Story, path: Path, *, theme: str = "light", asked: Mapping[str, object] | None = None) -> None:
    """Write a notebook (nbformat 4.5) that calls this module and carries what the calls give, so that it shows without being run.

    asked: what of `story`'s runs, history and reference the story was told with, for the notebook's own call. CannotMeasure when `path`
    cannot be written; UsageError without plotly.
    """
    write_text(path, json.dumps(notebook(told, theme=theme, asked=asked), indent=1, allow_nan=False) + "\n")


def notebook(told: Story, *, theme: str = "light", asked: Mapping[str, object] | None = None) -> dict[str, Json]:
    """The notebook as JSON: for each figure its words, its call with the output, and its table's head.

    Of figures that share a title VARIANTS_SHOWN carry their output; the words name the others.
    """
    cells = _Cells()
    subject = " ".join([told.model or "results", "on", ", ".join(one.chip for one in told.subjects) or "no chip"])
    cells.words(f"# klab: {_markdown(subject)}", *(f"- {_markdown(note)}" for note in (*told.notes, *told.reading)))
    cells.code(_opening(told, theme, asked or {}))
    chapters = {identity: heading for identity, heading, _ in page.CHAPTERS}
    groups: dict[tuple[str, str], list[Figure]] = {}
    for chapter, figure in _all(told):
        groups.setdefault((chapter, figure.title), []).append(figure)
    before = ""
    for (chapter, title), several in groups.items():
        cells.words(*([f"## {_markdown(chapters[chapter])}"] if chapter != before else []), f"### {_markdown(title)}", _others(several))
        before = chapter
        for figure in several[:VARIANTS_SHOWN]:
            _tell(cells, figure, theme, chapter)
    if not groups:
        cells.words("There is nothing to draw.")
    return cells.notebook()


class _Cells:
    """The cells of a notebook as they come; identities are made of place and content, so that the same story gives the same bytes."""

    def __init__(self) -> None:
        self.cells: list[dict[str, Json]] = []
        self.ran = 0

    def words(self, *lines: str) -> None:
        self._add({"cell_type": "markdown", "metadata": {}, "source": "\n\n".join(filter(None, lines))})

    def code(self, source: str, data: Mapping[str, Json] | None = None) -> None:
        self.ran += 1
        result = {"output_type": "execute_result", "execution_count": self.ran, "metadata": {}, "data": data}
        outputs = [result] if data else []
        self._add({"cell_type": "code", "execution_count": self.ran, "metadata": {}, "source": source, "outputs": outputs})

    def _add(self, cell: dict[str, Json]) -> None:
        self.cells.append({"id": digest([len(self.cells), cell["source"]])[:16], **cell})

    def notebook(self) -> dict[str, Json]:
        kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
        metadata = {"kernelspec": kernel, "language_info": {"name": "python"}}
        return {"cells": self.cells, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}


def _tell(cells: _Cells, figure: Figure, theme: str, chapter: str) -> None:
    """The words of one figure, the figure, and the head of its table."""
    cells.words(f"**{_markdown(figure.variant)}**" if figure.variant else "", _markdown(figure.caption), _markdown(figure.empty))
    if figure.traces and not figure.empty:
        value = json.loads(compact(drawn(figure, theme, chapter).to_plotly_json()))
        shown = {**value, "config": {"displaylogo": False, "plotlyServerURL": ""}}
        data = {"application/vnd.plotly.v1+json": shown, "text/plain": f"Figure({figure.title!r})"}
        cells.code(f"figures[{figure.identity!r}]", data)
    if figure.table is not None and len(figure.table):
        head = figure.table.head(HEAD_ROWS)
        rows = {"text/html": head.to_html(escape=True, max_cols=None), "text/plain": f"{len(figure.table)} rows"}
        cells.code(f"tables[{figure.identity!r}].head({HEAD_ROWS})", rows)


def _all(told: Story) -> list[tuple[str, Figure]]:
    """(chapter, figure) in the order of the page."""
    return [(chapter, figure) for chapter, several in page.figures(told).items() for figure in several] if told.subjects else []


def _others(several: Sequence[Figure]) -> str:
    """Which figures of a title are not shown, and how to have them."""
    rest = several[VARIANTS_SHOWN:]
    if not rest:
        return ""
    named = "; ".join(f"`{one.identity}` {_markdown(one.variant)}".strip() for one in rest)
    return f"{len(rest)} more are in `figures` by these names: {named}"


def _title(figure: Figure, colours: Mapping[str, str]) -> dict[str, Any]:
    """The title with its variant, and the first sentence of the caption below it as far as a line goes."""
    name = f"{figure.title}: {figure.variant}" if figure.variant else figure.title
    first = re.split(r"(?<=[.:;]) (?=[A-Z0-9])", figure.caption, maxsplit=1)[0]
    return {
        "text": plain(_short(name, 100)),
        "subtitle": {"text": plain(_short(first, 150)), "font": {"size": 11, "color": colours["soft"]}},
        "x": 0.01, "xanchor": "left", "yref": "container", "y": 1, "yanchor": "top", "pad": {"t": 12}, "font": {"size": 15},
    }  # fmt: skip


def _short(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 3] + "..."


def _coloured(value: Any, colours: Mapping[str, str]) -> Any:
    """With the theme's colours in the place of var(--name)."""
    if isinstance(value, dict):
        return {key: _coloured(item, colours) for key, item in value.items()}
    if isinstance(value, list):
        return [_coloured(item, colours) for item in value]
    if isinstance(value, str) and "var(--" in value:
        return re.sub(r"var\(--([a-z]+)\)", lambda found: colours.get(found[1], colours["ink"]), value)
    return value


def _opening(told: Story, theme: str, asked: Mapping[str, object]) -> str:
    """The first cell: the story once more, from the same results."""
    arguments = [repr(list(told.sources)) if told.sources else "None"]
    plan = next(iter(told.plans.values()), None)
    if plan is not None:
        arguments += [f"model={told.model!r}", f"scenario={dataclasses.asdict(plan.scenario)!r}"]
    arguments.append(f"chips={[one.chip for one in told.subjects]!r}")
    plainly = {name: [str(one) for one in value] if isinstance(value, list | tuple) else value for name, value in asked.items()}
    arguments += [f"{name}={value!r}" for name, value in plainly.items() if value]
    return (
        "from klab.harness.report import notebook\n\n"
        f"story = notebook.story({', '.join(arguments)})\n"
        f"figures = notebook.figures(story, theme={theme!r})\n"
        "tables = notebook.tables(story)"
    )


def _markdown(text: str) -> str:
    """Text as Markdown shows it as it is, on one line: what could be markup, a formula or a link is written by its number."""
    return re.sub(
        r"[&<>|`*_\[\]!\\~#@$^{}]|(?<=:)//|(?<=www)\.", lambda found: "".join(f"&#{ord(c)};" for c in found[0]), " ".join(text.split())
    )
