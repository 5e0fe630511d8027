"""What the page's script works on, packed: the figures, the tables behind them, what sections add. Packed text ends no element."""

from __future__ import annotations

import base64
import gzip
import html
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from klab.harness.report.figures.style import Figure
from klab.harness.report.frames import DIMS
from klab.harness.report.html import Markup

if TYPE_CHECKING:
    import pandas as pd

# Above this, six digits would lose what a reader needs of times of day and of bytes.
_WHOLE = 1e6

Cell = str | float | bool | tuple[str, ...] | None


def packed(identity: str, text: str) -> Markup:
    """Text as an element that the script unpacks: gzip, then base64, which has no character of HTML in it."""
    data = base64.b64encode(gzip.compress(text.encode(), 6, mtime=0)).decode("ascii")
    return Markup(f'<script type="application/gzip" id="{html.escape(identity, quote=True)}">{data}</script>')


def payload(figures: Iterable[Figure], sections: Mapping[str, object]) -> str:
    """The JSON of a page: `figures` by identity, and each section by its name. What is not a number becomes null."""
    return compact({"figures": {figure.identity: figure_value(figure) for figure in figures}, **sections})


def figure_value(figure: Figure) -> dict[str, Any]:
    """A figure as the script takes it."""
    table = None if figure.table is None else table_value(figure.table)
    return {"title": figure.title, "data": figure.traces, "layout": figure.layout, "table": table, "derive": figure.derive}


def table_value(frame: pd.DataFrame) -> dict[str, Any]:
    """{columns, length, values}: values by column, each a list, or {of, at} with every distinct cell once and its place per row.

    Columns of DIMS are always of the second form, which filters are quick with; a cell of several texts is a list.
    """
    names = [str(name) for name in frame.columns]
    values = [_column(name, frame.iloc[:, n]) for n, name in enumerate(names)]
    return {"columns": names, "length": len(frame), "values": values}


def _column(name: str, series: pd.Series[Any]) -> Any:
    if series.dtype.kind in "fiub" and name not in DIMS:
        return series.to_numpy()
    cells = [cell(value) for value in series.tolist()]
    places: dict[tuple[type, Cell], int] = {}
    at = [places.setdefault((type(value), value), len(places)) for value in cells]
    if name not in DIMS and 2 * len(places) > len(cells):
        return cells
    return {"of": [value for _, value in places], "at": at}


def cell(value: object) -> Cell:
    """A cell of a table as the page has it: settings as `name=value`, several values as texts, None for what is not there."""
    if value is None or isinstance(value, str | bool):
        return value
    if isinstance(value, np.generic):
        return cell(value.item())
    if isinstance(value, int | float):
        return value if isinstance(value, int) or math.isfinite(value) else None
    if isinstance(value, Mapping):
        return " ".join(f"{key}={item}" for key, item in value.items())
    if isinstance(value, list | tuple | set | frozenset | np.ndarray):
        return tuple(str(item) for item in value)
    shown = str(value)
    return None if shown in ("NaT", "<NA>") else shown


def compact(value: object) -> str:
    """JSON with six significant digits (all of them from a million on), and null for what is no finite number."""
    if value is None or isinstance(value, bool):
        return "null" if value is None else "true" if value else "false"
    if isinstance(value, str):
        return json.dumps(value)
    if isinstance(value, int):
        return str(int(value))
    if isinstance(value, float):
        return _float(value)
    if isinstance(value, np.ndarray):
        return compact(value.tolist())
    if isinstance(value, np.generic):
        return compact(value.item())
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{json.dumps(str(key))}:{compact(item)}" for key, item in value.items()) + "}"
    if isinstance(value, Sequence | set | frozenset) or hasattr(value, "tolist"):
        items = value if isinstance(value, Sequence | set | frozenset) else value.tolist()
        return "[" + ",".join(map(compact, items)) + "]"
    return json.dumps(str(value))


def _float(value: float) -> str:
    if -_WHOLE < value < _WHOLE:
        return f"{value:.6g}"
    return f"{value:.15g}" if math.isfinite(value) else "null"
