"""How figures look: colours and marks that stay with a kernel, text that is text, and a layout that follows the page's theme."""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from klab.harness.watch.wording import line

if TYPE_CHECKING:
    import pandas as pd

# Ten hues of similar weight that can be told apart with common colour blindness and stand out on white and on near-black.
PALETTE = ("#3b7dd8", "#e07b39", "#2a9d74", "#c44e9b", "#8a6fd1", "#b8901f", "#d1495b", "#3fa7c4", "#7d8a2e", "#8c6d5a")
MARKS = {"torch": "circle", "triton": "square", "cuda": "diamond", "cupy": "cross", "cpu": "triangle-up"}
# Of lines: a kernel beyond the tenth has a colour again, and another dash.
DASHES = ("solid", "dash", "dot", "dashdot", "longdash")
# Drawn by the page's script, which fills in the theme's colours.
INK, FAINT = "var(--ink)", "var(--faint)"


@dataclass(frozen=True)
class Figure:
    """A figure as Plotly takes it, with what a reader is to see in it. Without data, `empty` says why there is nothing to draw.

    caption: what the data says, with its numbers, then how to read the figure. table: the data behind it, a row per mark, with units in
    the columns' names; columns of `frames.DIMS` are what the page filters by. A trace made with `marks` follows that filter point by
    point. variant: figures that share a title are shown one at a time, and this is its name in their menu. derive: the function of the
    page's script (`klab.derive[...]`) that computes again, from the rows that are left, what depends on all of them. controls: Markup
    shown below the caption; an input there with `data-state="name"` is part of the page's state and of its address.
    """

    identity: str
    title: str
    caption: str
    traces: list[dict[str, Any]] = field(default_factory=list)
    layout: dict[str, Any] = field(default_factory=dict)
    empty: str = ""
    table: pd.DataFrame | None = None
    variant: str = ""
    derive: str = ""
    controls: str = ""


def marks(trace: dict[str, Any], rows: Sequence[int] | Sequence[Sequence[int]]) -> dict[str, Any]:
    """The trace with the row of the figure's table (its position, from 0) that each point stands for, so that a filter can drop points.

    A heat map takes rows of rows, in the form of its z, with -1 where a cell stands for none.
    """
    plain_rows = [list(map(int, row)) if isinstance(row, Sequence) else int(row) for row in rows]
    return trace | {"meta": trace.get("meta", {}) | {"rows": plain_rows}}


def colours(kernels: Iterable[str]) -> dict[str, str]:
    """A colour per kernel, the same in all figures of a page."""
    return {kernel: PALETTE[n % len(PALETTE)] for n, kernel in enumerate(sorted(set(kernels)))}


@dataclass(frozen=True)
class Look:
    """How one kernel looks in every figure: its colour, the dash of its lines, its mark."""

    colour: str
    dash: str
    symbol: str


def looks(frame: pd.DataFrame) -> dict[str, Look]:
    """By `kernel_id` of a frame of `frames.standing`. Kernels of one operator, which compete, differ; those of others may look alike."""
    kernels = frame[["operator", "kernel_id", "backend"]].drop_duplicates("kernel_id").sort_values("kernel_id")
    found = {}
    for _, group in kernels.groupby("operator", sort=False):
        for n, (kernel, backend) in enumerate(zip(group["kernel_id"], group["backend"], strict=True)):
            found[kernel] = Look(PALETTE[n % len(PALETTE)], DASHES[n // len(PALETTE) % len(DASHES)], mark(backend))
    return found


def mark(backend: str) -> str:
    """The mark of a backend, so that a figure reads without colour too."""
    return MARKS.get(backend, "x")


def hollow(symbol: str) -> str:
    """The mark of what others published: the same one, not filled."""
    return f"{symbol}-open"


def digits(values: Iterable[float | None]) -> list[float | None]:
    """Numbers as a figure needs them: five digits, None for what was not measured."""
    return [None if value is None or not math.isfinite(value) else float(f"{value:.5g}") for value in values]


def short(text: object, longest: int = 60) -> str:
    """Text of others as Plotly must get it, on one line of at most `longest` characters."""
    return plain(line(text, longest))


def distinct(names: Sequence[str]) -> list[str]:
    """Names of a menu, told apart by a number where they are the same."""
    seen: dict[str, int] = {}
    for name in names:
        seen[name] = seen.get(name, 0) + 1
    return [f"{name} ({n + 1})" if seen[name] > 1 else name for n, name in enumerate(names)]


def plain(text: object) -> str:
    """Text as Plotly must get it to show it as it is: it reads a little HTML in labels."""
    return html.escape(str(text), quote=False)


def grouped(rows: Iterable[Any], *names: str) -> dict[tuple[str, ...], list[Any]]:
    """Rows that have their columns as attributes (of `DataFrame.itertuples`), by these columns, in order of the values: many times quicker
    than a DataFrame for each of many small groups.
    """
    found: dict[tuple[str, ...], list[Any]] = {}
    for row in rows:
        found.setdefault(tuple(getattr(row, name) for name in names), []).append(row)
    return dict(sorted(found.items()))


def layout(**changes: Any) -> dict[str, Any]:
    """The common layout. The legend lies below, so that a narrow screen keeps its width for the data."""
    return {
        "margin": {"l": 64, "r": 16, "t": 16, "b": 56},
        "height": 460,
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "hovermode": "closest",
        "legend": {"orientation": "h", "y": -0.2, "x": 0, "yanchor": "top"},
    } | changes


def even_legend(shape: dict[str, Any]) -> dict[str, Any]:
    """A layout whose legend shows marks of one size, where those of the figure differ."""
    return shape | {"legend": shape["legend"] | {"itemsizing": "constant"}}


def axis(title: str, **changes: Any) -> dict[str, Any]:
    """An axis with its title (and unit)."""
    return {"title": {"text": title}, "automargin": True, "gridcolor": FAINT, "zeroline": False, "linecolor": FAINT} | changes


def log_axis(title: str, values: Iterable[float | None], **changes: Any) -> dict[str, Any]:
    """A logarithmic axis whose labels read as plain numbers and do not run into one another. values: what is drawn along it."""
    seen = [value for value in values if value is not None and math.isfinite(value) and value > 0]
    decades = math.log10(max(seen)) - math.log10(min(seen)) if seen else 1.0
    step = "D1" if decades < 0.7 else "D2" if decades < 2.0 else math.ceil(decades / 6)
    return axis(title, **{"type": "log", "exponentformat": "none", "tickformat": ",.4~r", "dtick": step} | changes)
