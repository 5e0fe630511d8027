"""HTML as a tree of calls: text is escaped unless it is `Markup`, which only `el` and the page's own files make."""

from __future__ import annotations

import html
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

_VOID = {"meta", "br", "hr", "col"}


class Markup(str):
    """Text that is HTML already."""

    __slots__ = ()


def esc(value: object) -> Markup:
    """A value as HTML text; Markup as it is, None as nothing."""
    if isinstance(value, Markup):
        return value
    if value is None:
        return Markup("")
    if isinstance(value, list | tuple):
        return Markup("".join(esc(item) for item in value))
    return Markup(html.escape(str(value), quote=True))


def el(tag: str, /, *children: object, **attributes: str | None) -> Markup:
    """An element. Attributes: `class_` for class, `data_label` for data-label; None leaves one out."""
    shown = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{html.escape(value, quote=True)}"' for key, value in attributes.items() if value is not None
    )
    if tag in _VOID:
        return Markup(f"<{tag}{shown}>")
    return Markup(f"<{tag}{shown}>{esc(children)}</{tag}>")


@dataclass(frozen=True)
class Cell:
    """What a cell shows, and the number or text that its column is sorted by: None for its text, "" for what comes last either way."""

    shown: object
    sort: float | str | None = None


@dataclass(frozen=True)
class Line:
    """A row of a table: its cells; what the page's filters ask of it, by the names of `frames.DIMS`; and its identity on the page.

    evidence: the name under which the payload's section "evidence" has more of it, which the page's script opens below the row.
    """

    cells: Sequence[object]
    dims: Mapping[str, str | Sequence[str]]
    identity: str | None = None
    evidence: str | None = None


def table(
    columns: Sequence[str],
    rows: Iterable[Sequence[object] | Line],
    numbers: Sequence[str] = (),
    caption: str = "",
    identity: str | None = None,
) -> Markup:
    """A table that reads without a script, and row by row on a narrow screen (each cell carries its column's name).

    With an identity the page's script makes it sortable by its heads, by the `Cell.sort` of each cell or else by its text.
    """
    kinds = ["n" if column in numbers else None for column in columns]
    head = el("thead", el("tr", [el("th", column, class_=kind, scope="col") for column, kind in zip(columns, kinds, strict=True)]))

    def line(row: Sequence[object] | Line) -> Markup:
        one = row if isinstance(row, Line) else Line(row, {})
        cells = zip(columns, kinds, one.cells, strict=True)
        asked = {name: [value] if isinstance(value, str) else list(value) for name, value in one.dims.items()}
        dims = json.dumps(asked, separators=(",", ":")) if asked else None
        return el(
            "tr", [_cell(column, kind, cell) for column, kind, cell in cells], id=one.identity, data_dims=dims, data_evidence=one.evidence
        )

    body = el("tbody", [line(row) for row in rows])
    return el("div", el("table", el("caption", caption) if caption else None, head, body, id=identity), class_="wide")


def _cell(column: str, kind: str | None, cell: object) -> Markup:
    one = cell if isinstance(cell, Cell) else Cell(cell)
    sort = None if one.sort is None else str(one.sort)
    return el("td", one.shown, class_=kind, data_label=column, data_sort=sort)


def pairs(items: Iterable[tuple[str, object]]) -> Markup:
    """A list of names and values."""
    return el("dl", [el("div", el("dt", name), el("dd", value)) for name, value in items])
