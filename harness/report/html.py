"""HTML as a tree of calls: text is escaped unless it is `Markup`, which only `el` and the page's own files make."""

from __future__ import annotations

import html
import json
from collections.abc import Iterable, Sequence

from klab.kernels.contract import Json

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


def table(columns: Sequence[str], rows: Iterable[Sequence[object]], numbers: Sequence[str] = (), caption: str = "") -> Markup:
    """A table that reads without a script, and row by row on a narrow screen (each cell carries its column's name)."""
    kinds = ["n" if column in numbers else None for column in columns]
    head = el("thead", el("tr", [el("th", column, class_=kind, scope="col") for column, kind in zip(columns, kinds, strict=True)]))

    def line(row: Sequence[object]) -> Markup:
        cells = zip(columns, kinds, row, strict=True)
        return el("tr", [el("td", cell, class_=kind, data_label=column) for column, kind, cell in cells])

    body = el("tbody", [line(row) for row in rows])
    return el("div", el("table", el("caption", caption) if caption else None, head, body), class_="wide")


def pairs(items: Iterable[tuple[str, object]]) -> Markup:
    """A list of names and values."""
    return el("dl", [el("div", el("dt", name), el("dd", value)) for name, value in items])


def data_script(identity: str, value: Json) -> Markup:
    """JSON that a script of the page reads; nothing in it can end the element or begin another."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    text = text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026").replace("\u2028", "\\u2028")
    return Markup(f'<script type="application/json" id="{html.escape(identity, quote=True)}">{text}</script>')
