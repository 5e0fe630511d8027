"""What every page of klab is made in: one HTML file with everything in it, from which no request leaves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from klab.harness.report.figures.style import Figure
from klab.harness.report.frames import DIMS
from klab.harness.report.html import Markup, el
from klab.harness.report.payload import cell, packed, payload, table_value

if TYPE_CHECKING:
    import pandas as pd

# Nothing may be fetched: not by a mistake here, and not by a name of a kernel that smuggles markup in.
POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'{}; style-src 'unsafe-inline'; img-src data: blob:; base-uri 'none'; form-action 'none'"
)
# Drawn by WebGL, for which plotly.js compiles its programs in the page. Where scripts may stand inline, this opens no further door.
COMPILED = ("parcoords", "scattergl", "splom", "scatter3d", "surface")
SCRIPTS = ("core", "state", "filters", "traces", "plots", "tables", "evidence", "derive_*", "main")
# Rows of a table behind a figure that are there without a script, and of all such tables of a page.
PLAIN_ROWS, PLAIN_ROWS_OF_PAGE, LEAST_PLAIN_ROWS = 60, 1500, 8


def document(
    title: str,
    content: object,
    *,
    figures: Sequence[Figure] = (),
    sections: Mapping[str, object] | None = None,
    drawing: str = "",
    styles: Sequence[str] = ("page.css",),
    scripted: bool = True,
) -> str:
    """A page as text.

    figures: those that `content` frames. sections: further JSON for the page's script (`klab.payload[name]`). drawing: plotly.js, where
    the page has figures to draw. scripted: a page that is sent to others, to be read and printed, may do without.
    """
    compiled = any(trace.get("type") in COMPILED for figure in figures for trace in figure.traces)
    head = el(
        "head",
        el("meta", charset="utf-8"),
        el("meta", http_equiv="Content-Security-Policy", content=POLICY.format(" 'unsafe-eval'" if compiled else "")),
        el("meta", name="viewport", content="width=device-width, initial-scale=1"),
        el("meta", name="generator", content="klab"),
        el("title", title),
        el("style", Markup("".join(map(asset, styles)))),
    )
    scripts = [packed("klab-payload", payload(figures, sections or {}))] if figures or sections else []
    scripts += [_packed(drawing)] if drawing else []
    scripts += [el("script", Markup(script()))] if scripted else []
    return f"<!doctype html>\n{el('html', head, el('body', content, scripts), lang='en')}\n"


def framed(figure: Figure, drawing: bool, rows: int = PLAIN_ROWS) -> Markup:
    """A figure with its title, its words, what the page's script draws, and the table behind it; or what it lacks."""
    name, parts = f"{figure.identity}-figure", [el("h3", figure.title), el("figcaption", figure.caption)]
    if figure.controls:
        parts.append(el("div", figure.controls, class_="controls"))
    if figure.empty or not figure.traces:
        parts.append(el("p", figure.empty or "There is nothing to draw.", class_="empty"))
    elif drawing:
        parts.append(el("div", class_="plot", id=figure.identity, role="img", aria_label=figure.title))
        parts.append(el("noscript", el("p", "This figure needs a script; the tables do not.")))
    else:
        parts.append(el("p", "Figures need plotly: pip install 'kernel-lab[analysis]'.", class_="empty"))
    return el("figure", parts, behind(figure, rows), id=name, data_variant=figure.variant or None)


def framed_all(figures: Sequence[Figure], drawing: bool) -> list[Markup]:
    """Figures in their order; the variants of one title together, of which the script shows one at a time."""
    rows = max(LEAST_PLAIN_ROWS, min(PLAIN_ROWS, PLAIN_ROWS_OF_PAGE // max(len(figures), 1)))
    groups: dict[tuple[str, str], list[Figure]] = {}
    for figure in figures:
        groups.setdefault((figure.title, "" if figure.variant else figure.identity), []).append(figure)
    found = []
    for several in groups.values():
        boxes = [framed(figure, drawing, rows) for figure in several]
        # The name stays with the title, so that a link to a view survives another order of figures.
        name = "".join(c if c.isascii() and c.isalnum() else "-" for c in several[0].title.lower())[:40].strip("-")
        found.append(el("div", boxes, class_="variants", data_group=name) if len(several) > 1 else boxes[0])
    return found


def behind(figure: Figure, rows: int) -> Markup | None:
    """The first rows of the table behind a figure, as they are read without a script. With one, all of them can be had."""
    if figure.table is None or not len(figure.table):
        return None
    frame, total = figure.table.iloc[:rows], len(figure.table)
    numbers = [series.dtype.kind in "fiu" for _, series in frame.items()]
    kinds = ["n" if number else None for number in numbers]
    head = el("tr", [el("th", str(name), class_=kind, scope="col") for name, kind in zip(frame.columns, kinds, strict=True)])
    lines = (
        el("tr", [el("td", _plain(value), class_=kind) for value, kind in zip(values, kinds, strict=True)])
        for values in frame.itertuples(index=False, name=None)
    )
    cut = el("p", f"The first {len(frame)} of {total} rows.", class_="note") if len(frame) < total else None
    table = el("div", el("table", el("thead", head), el("tbody", list(lines))), class_="wide plain", tabindex="0")
    return el("details", el("summary", f"Table behind it ({total} {'row' if total == 1 else 'rows'})"), cut, table, class_="behind")


def index(frame: pd.DataFrame) -> dict[str, Any]:
    """The dimensions of every row that the page is about, by which its filters count: a section "index" of the payload."""
    return table_value(frame[list(DIMS)])


def _plain(value: object) -> str:
    one = cell(value)
    if isinstance(one, tuple):
        return ", ".join(one)
    return "" if one is None else f"{one:.5g}" if isinstance(one, float) else str(one)


@cache
def asset(name: str) -> str:
    """A file that lies beside this one."""
    return (Path(__file__).parent / name).read_text(encoding="utf-8")


@cache
def script() -> str:
    """The page's own script: the files of script/ in their order."""
    folder = Path(__file__).parent / "script"
    return "".join(path.read_text(encoding="utf-8") for name in SCRIPTS for path in sorted(folder.glob(f"{name}.js")))


@cache
def plotly_js() -> str:
    """plotly.js as the plotly package ships it (4.8 MB), or "" where that is not installed."""
    try:
        from plotly.offline import get_plotlyjs
    except ModuleNotFoundError:
        return ""
    found: str = get_plotlyjs()
    return found


@cache
def _packed(drawing: str) -> Markup:
    return packed("klab-plotly", drawing)
