"""The history of series: a figure for one, a figure with a menu for many, a map of all, and a line of a few pixels for a table."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any

from klab.harness.report.curve import Curve, Place, Step
from klab.harness.report.figures.style import FAINT, INK, Figure, axis, distinct, layout, plain
from klab.harness.report.html import Markup, el
from klab.harness.watch.series import Call, Metric
from klab.harness.watch.wording import change, line, name_of, quantity

# Colour and mark of a verdict: it reads without colour too.
COLOURS = {
    Call.OK: "#3b7dd8", Call.FASTER: "#2a9d74", Call.SUSPECT: "#b8901f", Call.SLOWER: "#d1495b", Call.UNKNOWN: "#8a8f99",
    Call.MISSING: "#d1495b", Call.BROKEN: "#d1495b",
}  # fmt: skip
MARKS = {
    Call.OK: "circle", Call.FASTER: "triangle-down", Call.SUSPECT: "diamond", Call.SLOWER: "triangle-up", Call.UNKNOWN: "circle-open",
    Call.MISSING: "x-thin-open", Call.BROKEN: "x",
}  # fmt: skip
LEVEL, STEP = "#e07b39", "#e07b39"
READING = (
    "In the figures of series each mark is a night: the median over fresh processes as it was judged, which is divided by the anchor "
    "of the same minutes and scaled back by the anchor's usual time. Bars: the least and the most of the processes. Level lines: the "
    "median between changes. Verticals: solid where the level changed, dotted where an epoch began."
)
HOW = (
    "A mark is a night's judged value, its bar the least and the most of the processes; a line is a level, a solid vertical its change, a "
    "dotted one a new epoch."
)
# Every entry of a menu says of every curve whether it is seen: 1,250 of them are 17 MB, and no menu for people.
MENU_SERIES = 200
# A map of more rows than this is taller than a reader scrolls.
MAP_ROWS = 150
# Beyond this a cell of the map has its full colour: twice what a night must see.
MAP_PERCENT = 10.0


def draw(curve: Curve, identity: str) -> Figure:
    """One series."""
    title = name_of(curve.series)
    if not curve.measured:
        return Figure(identity, title, "", empty="It has no value on any of these nights.")
    shape = layout(height=300, showlegend=False, xaxis=axis("", type="date"), yaxis=_y_axis(curve), **_marks(curve))
    shape["margin"] = shape["margin"] | {"t": 34}
    last = curve.places[-1]
    return Figure(identity, title, f"{last.call}: {line(last.reason)}" if last.tonight else "", traces(curve), shape)


def draw_menu(found: Sequence[Curve], identity: str, title: str) -> Figure:
    """Many series, one at a time."""
    measured = [curve for curve in found if curve.measured]
    drawn = measured[:MENU_SERIES]
    if not drawn:
        return Figure(identity, title, "", empty="None of them has a value on any of these nights.")
    if len(drawn) == 1:
        return draw(drawn[0], identity)
    parts = [traces(curve, visible=n == 0) for n, curve in enumerate(drawn)]
    owner = [n for n, part in enumerate(parts) for _ in part]
    buttons = [
        {
            "label": plain(line(f"{curve.series.label} {curve.series.role} {curve.series.metric}", 80)),
            "method": "update",
            "args": [{"visible": [o == n for o in owner]}, {**_marks(curve), "yaxis.title.text": _y_title(curve)}],
        }
        for n, curve in enumerate(drawn)
    ]
    menu = {"buttons": buttons, "x": 0, "xanchor": "left", "y": 1.04, "yanchor": "bottom", "font": {"size": 11}}
    shape = layout(
        height=360, showlegend=False, xaxis=axis("", type="date"), yaxis=_y_axis(drawn[0]), updatemenus=[menu], **_marks(drawn[0])
    )
    shape["margin"] = shape["margin"] | {"t": 64}
    caption = f"{len(drawn)} series; the menu chooses."
    if len(measured) > len(drawn):
        caption += f" The first in the order of the tables; {len(measured) - len(drawn)} are left out."
    return Figure(identity, title, caption, [trace for part in parts for trace in part], shape)


def traces(curve: Curve, *, visible: bool = True) -> list[dict[str, Any]]:
    """The levels, the judged values with the spread of the processes, and the nights without a value."""
    seen = [curve.places[n] for n in curve.measured]
    common: dict[str, Any] = {"type": "scatter", "visible": visible, "showlegend": False}
    x: list[str | None] = []
    y: list[float | None] = []
    for first, last, level in curve.levels:
        x += [_date(curve.places[first].at), _date(curve.places[last].at), None]
        y += [_digits(level), _digits(level), None]
    levels = common | {"mode": "lines", "hoverinfo": "skip", "x": x, "y": y, "line": {"color": LEVEL, "width": 1.5}}
    judged = common | {
        "mode": "markers",
        "x": [_date(p.at) for p in seen],
        "y": [_digits(p.judged) for p in seen],
        "text": [_hover(p, curve.series.metric) for p in seen],
        "hovertemplate": "%{x}, %{text}<extra></extra>",
        "error_y": {
            "type": "data",
            "symmetric": False,
            "array": [_digits(p.high - p.judged) for p in seen],
            "arrayminus": [_digits(p.judged - p.low) for p in seen],
            "thickness": 1.2,
            "width": 0,
            "color": "var(--soft)",
        },
        "marker": {
            "color": _one_or_all([COLOURS[Call(p.call)] for p in seen]),
            "symbol": _one_or_all([MARKS[Call(p.call)] for p in seen]),
            "opacity": 1,
            "size": _one_or_all([11 if p.tonight else 7 for p in seen]),
            "line": {"color": INK, "width": _one_or_all([1.5 if p.tonight else 0 for p in seen])},
        },
    }
    empty = [p for p in curve.places if not math.isfinite(p.judged)]
    absent = common | {
        "mode": "markers",
        "x": [_date(p.at) for p in empty],
        "y": [_digits(statistics.median(p.judged for p in seen))] * len(empty),
        "text": [f"<b>{p.call}</b><br>{plain(line(p.reason, 120))}" for p in empty],
        "hovertemplate": "%{x}, %{text}<extra></extra>",
        "marker": {"color": [COLOURS[Call(p.call)] for p in empty], "symbol": "x-thin-open", "size": 10, "line": {"width": 2}},
    }
    return [levels, judged, *([absent] if empty else [])]


def _one_or_all(values: list[Any]) -> Any:
    """One value where all are alike: a page of 200 series holds many."""
    return values[0] if len(set(values)) == 1 else values


def _hover(place: Place, metric: str) -> str:
    told = f"{plain(place.commit)}<br><b>{place.call}</b> {quantity(place.judged, metric)}, as measured {quantity(place.value, metric)}"
    return told if place.call == Call.OK else f"{told}<br>{plain(line(place.kernel, 80))}<br>{plain(line(place.reason, 120))}"


def _marks(curve: Curve) -> dict[str, Any]:
    """Where the level changed and where an epoch began, with words."""
    shapes = [
        {
            "type": "line", "xref": "x", "yref": "paper", "x0": _date(step.at), "x1": _date(step.at), "y0": 0, "y1": 1,
            "line": {"color": "var(--soft)" if step.new_epoch else STEP, "width": 1, "dash": "dot" if step.new_epoch else "solid"},
        }
        for step in curve.steps
    ]  # fmt: skip
    notes = [
        {
            "xref": "x", "yref": "paper", "x": _date(step.at), "y": 1, "xanchor": "left", "yanchor": "top", "showarrow": False,
            "font": {"size": 10, "color": "var(--soft)"}, "text": plain(_step_words(step)),
        }
        for step in curve.steps
    ]  # fmt: skip
    return {"shapes": shapes, "annotations": notes}


def _step_words(step: Step) -> str:
    if step.new_epoch:
        return f"new epoch, {change(step.ratio)}"
    return change(step.ratio) if step.low is not None else f"{change(step.ratio)} (few nights)"


def _y_axis(curve: Curve) -> dict[str, Any]:
    return axis(_y_title(curve), tickformat="~r", rangemode="normal")


def _y_title(curve: Curve) -> str:
    return "joules per launch" if curve.series.metric == Metric.ENERGY else "microseconds"


def draw_map(found: Sequence[Curve], nights: Sequence[str], identity: str) -> Figure:
    """Every series on every night, as the difference from the median of its epoch. found: the rows, the first on top."""
    title = "All series, night by night"
    rows = [curve for curve in found if len(curve.measured) > 1][:MAP_ROWS]
    left = sum(len(curve.measured) > 1 for curve in found) - len(rows)
    caption = (
        "A column is a night, a row is a series: its judged value against the median of its epoch, blue below and red above, at "
        f"{MAP_PERCENT:.0f}% in full colour. A column of one colour is a night's doing, a row that changes its colour is the series'."
    )
    if left:
        caption += f" The first {len(rows)} in the order of the tables; {left} are left out."
    if not rows or len(nights) < 2:
        return Figure(identity, title, "", empty="This needs at least two nights.")
    z: list[list[float | None]] = [[None] * len(nights) for _ in rows]
    for row, curve in zip(z, rows, strict=True):
        for n, percent in _against_epoch(curve):
            row[curve.places[n].night] = round(percent, 2)
    # Times are categories here, so that nights stand beside one another however far apart; two of one minute need two names.
    stamps = [_date(at) for at in nights]
    stamps = [f"{stamp} {n}" if stamps.count(stamp) > 1 else stamp for n, stamp in enumerate(stamps)]
    # Rows are categories, so that a filter closes the ranks; of one name there is one category.
    names = distinct([plain(line(name_of(curve.series).removeprefix(f"{curve.series.chip} "), 70)) for curve in rows])
    trace = {
        "type": "heatmap",
        "x": stamps,
        "y": names,
        "z": z,
        "zmin": -MAP_PERCENT,
        "zmax": MAP_PERCENT,
        "colorscale": [[0.0, "#3b7dd8"], [0.5, FAINT], [1.0, "#d1495b"]],
        "showscale": False,
        "hovertemplate": "%{y}<br>%{x}: %{z:+.1f}%<extra></extra>",
        "xgap": 1,
        "ygap": 1,
    }
    some = stamps[:: max(1, math.ceil(len(stamps) / 6))]
    along = axis("", type="category", tickmode="array", tickvals=some, ticktext=[stamp[:10] for stamp in some])
    row_px = 15 if len(rows) <= 60 else 10
    rows_axis = axis("", type="category", autorange="reversed", tickmode="array", tickvals=names, ticktext=names)
    rows_axis["tickfont"] = {"size": 9 if row_px > 10 else 8}
    borders = _epoch_borders(rows)
    if borders:
        caption += " A dotted vertical: a new epoch began."
    shape = layout(height=110 + row_px * len(rows), xaxis=along, yaxis=rows_axis, shapes=[_border(n) for n in borders])
    return Figure(identity, title, caption, [trace], shape)


def _epoch_borders(rows: Sequence[Curve]) -> list[int]:
    """The nights at which a new epoch began for half of the series or more."""
    found = Counter(curve.places[step.index].night for curve in rows for step in curve.steps if step.new_epoch)
    return sorted(night for night, count in found.items() if 2 * count >= len(rows))


def _border(night: int) -> dict[str, Any]:
    """A vertical before a night of the map, whose nights are numbered categories."""
    at = night - 0.5
    return {
        "type": "line", "xref": "x", "yref": "paper", "x0": at, "x1": at, "y0": 0, "y1": 1,
        "line": {"color": INK, "width": 1.5, "dash": "dot"},
    }  # fmt: skip


def _against_epoch(curve: Curve) -> Iterable[tuple[int, float]]:
    """(place, per cent above the median of its epoch and anchor)."""
    groups: dict[tuple[str, str], list[int]] = {}
    for n in curve.measured:
        groups.setdefault((curve.places[n].epoch, curve.places[n].anchor), []).append(n)
    for group in groups.values():
        usual = statistics.median(curve.places[n].judged for n in group)
        if usual > 0:
            yield from ((n, 100 * (curve.places[n].judged / usual - 1)) for n in group)


def spark(curve: Curve, nights: int, width: int = 140, height: int = 28) -> Markup | None:
    """A curve in a table's cell: a dot for each of the `nights`, bars where it changed, no script. None without two values."""
    if len(curve.measured) < 2:
        return None
    seen = curve.measured
    values = [curve.places[n].judged for n in seen]
    # Noise of a tenth of a per cent shall not look like a mountain range: the scale spans 4% at least.
    middle = statistics.median(values)
    low, high = min(*values, 0.98 * middle), max(*values, 1.02 * middle)
    last = max(nights - 1, 1)

    def x(n: int) -> str:
        return f"{3 + (width - 6) * curve.places[n].night / last:.1f}"

    def y(value: float) -> str:
        return f"{height - 3 - (height - 6) * (value - low) / (high - low or 1.0):.1f}"

    bars = [
        el("line", x1=x(s.index), x2=x(s.index), y1="0", y2=str(height), class_="epoch" if s.new_epoch else "step") for s in curve.steps
    ]
    lines = [el("line", x1=x(a), x2=x(b), y1=y(v), y2=y(v), class_="level") for a, b, v in curve.levels]
    # Lines of no length with round ends are dots, in a tenth of the bytes that circles take.
    dots = el("path", d="".join(f"M{x(n)} {y(curve.places[n].judged)}h0" for n in seen))
    end = curve.places[seen[-1]]
    now = el("circle", cx=x(seen[-1]), cy=y(end.judged), r="2.6", class_=Call(end.call).value) if end.tonight else None
    told = f"{len(seen)} nights, {quantity(min(values), curve.series.metric)} to {quantity(max(values), curve.series.metric)}"
    return el(
        "svg", el("title", told), bars, lines, dots, now, class_="spark", viewBox=f"0 0 {width} {height}", role="img", aria_label=told
    )


def _date(at: str) -> str:
    """`2026-11-22 02:17`; a time that cannot be read as it is."""
    try:
        return datetime.fromisoformat(at).strftime("%Y-%m-%d %H:%M")
    except ValueError:
        return line(at, 40)


def _digits(value: float) -> float:
    return float(f"{value:.5g}")


def by_operator(found: Mapping[str, Curve]) -> dict[str, list[Curve]]:
    """The curves by operator, each in the order given."""
    groups: dict[str, list[Curve]] = {}
    for curve in found.values():
        groups.setdefault(curve.series.operator, []).append(curve)
    return dict(sorted(groups.items()))
