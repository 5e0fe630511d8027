"""A table of ratios drawn: a heat map of problem families over sizes, and below it the geometric mean of each operator."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from klab.harness.report.figures.chips_mean import ALL, Mean, finding, means, problems
from klab.harness.report.figures.style import FAINT, INK, Figure, axis, layout, marks, plain
from klab.harness.report.units import energy, time, times
from klab.kernels.contract import Json

if TYPE_CHECKING:
    import pandas as pd

# What is drawn at most; what lies beyond still counts in the means.
MOST_FAMILIES, MOST_SIZES = 28, 18
# Numbers are printed into so many columns; with more they would run into one another, and stay in the hover.
COLUMNS_WITH_NUMBERS = 12
# Of the figure's width.
WIDEST_CELL = 0.16
# Blue and orange, which all common kinds of colour blindness tell apart; the middle is a grey that is not the paper's.
FASTER, SLOWER = "#2f6fb7", "#d9792b"
# The colours end here, or where the data do: differences of a few per cent are not painted as extremes.
LEAST_SPAN, MOST_SPAN = math.log2(1.25), 3.0
# The field that says how much of the same there is.
SIZES = ("m", "rows", "tokens", "batch")
LENGTHS = ("q_lens", "kv_lens", "seq_lens")
LONGEST = 44
BRACKETS = "Brackets are 95% intervals by bootstrap over problems: how far the mean depends on which problems are in it."


@dataclass(frozen=True)
class Sides:
    """What is held against what: `b` over `a`. basis: on what it rests, the last sentence; both: "both chips have"."""

    a: str
    b: str
    metric: str = "time"
    basis: str = ""
    both: str = "both chips have"

    @property
    def what(self) -> str:
        """The metric in words."""
        return "time" if self.metric == "time" else "energy per launch"


@dataclass(frozen=True)
class Place:
    """Where a problem is in the map: its family (the operator and all that it is but for its size), and the size."""

    operator: str
    rest: Mapping[str, Json]
    size: float

    @property
    def family(self) -> str:
        """The family by its full name."""
        return " ".join([self.operator, *filter(None, (_word(name, value) for name, value in self.rest.items()))])


def placed(operator: str, fields: Mapping[str, Json]) -> Place:
    """The size is the rows, the tokens, the sequences in the batch, or the length of a prompt: whatever the operator has."""
    rest = dict(fields)
    for name in LENGTHS:
        lens = rest.get(name)
        if isinstance(lens, list | tuple) and lens:
            del rest[name]
            one = lens[0] if len(set(lens)) == 1 else None
            if name == "kv_lens":
                return Place(operator, {"context": one or "mixed"} | rest, float(len(lens)))
            return Place(operator, ({"sequences": len(lens)} if len(lens) > 1 and one else {}) | rest, float(one or sum(map(float, lens))))
    for name in SIZES:
        value = rest.get(name)
        if isinstance(value, int) and not isinstance(value, bool):
            del rest[name]
            return Place(operator, rest, float(value))
    return Place(operator, rest, 0.0)


def _word(name: str, value: Json) -> str:
    if value in ("", False, None):
        return ""
    if value is True:
        return name
    if isinstance(value, str):
        return value
    return f"{name}={value[0]}.." if isinstance(value, list | tuple) and value else f"{name}={value}"


def grid(table: pd.DataFrame) -> tuple[list[Place], list[float], list[list[int]]]:
    """(a place of each family, sizes, the row of the table in each cell or -1): the families with most problems, the commonest sizes."""
    where = [placed(str(operator), fields) for operator, fields in zip(table["operator"], table["fields"], strict=True)]
    families = [place.family for place in where]
    kept = {family for family, _ in Counter(families).most_common(MOST_FAMILIES)}
    among = Counter(place.size for place, family in zip(where, families, strict=True) if family in kept)
    sizes = sorted(size for size, _ in among.most_common(MOST_SIZES))
    column = {size: n for n, size in enumerate(sizes)}
    known = {family: place for place, family in zip(where, families, strict=True) if family in kept and place.size in column}
    names = sorted(known, key=lambda family: [known[family].operator, *_natural(family)])
    rows = {name: n for n, name in enumerate(names)}
    cells = [[-1] * len(sizes) for _ in names]
    for position, (place, family) in enumerate(zip(where, families, strict=True)):
        if family in rows and place.size in column and cells[rows[family]][column[place.size]] < 0:
            cells[rows[family]][column[place.size]] = position
    return [known[name] for name in names], sizes, cells


def _natural(text: str) -> list[tuple[bool, float, str]]:
    """context=1024 before context=16384."""
    return [(n % 2 > 0, float(part) if n % 2 else 0.0, "" if n % 2 else part) for n, part in enumerate(re.split(r"([0-9]{1,15})", text))]


def labels(places: Sequence[Place]) -> list[str]:
    """What tells the families of one operator apart, without what they have in common."""
    found = []
    for place in places:
        like = [other.rest for other in places if other.operator == place.operator]
        own = {name: value for name, value in place.rest.items() if any(name not in rest or rest[name] != value for rest in like)}
        found.append(" ".join([place.operator, *filter(None, (_word(name, value) for name, value in own.items()))]))
    return found


def draw(table: pd.DataFrame, sides: Sides, identity: str, title: str, variant: str = "") -> Figure:
    """The figure of a table with the columns of `chips.data`; at least one row."""
    # As the page's script gets them, so that it computes the same.
    table = table.assign(ratio=[float(f"{ratio:.6g}") for ratio in table["ratio"]])
    places, sizes, cells = grid(table)
    ratios = table["ratio"].tolist()
    found = means([str(name) for name in table["operator"]], ratios)
    left_out = len(table) - sum(position >= 0 for row in cells for position in row)
    texts = {ALL: f"<b>{ALL}</b>"} | {one.name: plain(_short(one.name)) for one in found[1:]}
    words = {"a": sides.a, "b": sides.b, "what": sides.what, "both": sides.both, "names": texts}
    words |= {"reading": _reading(sides), "brackets": BRACKETS, "basis": sides.basis}
    families, columns = [plain(place.family) for place in places], [_size(size) for size in sizes]
    height, upper, lower = heights(len(places), len(found))
    unit = {"color": INK, "width": 1, "dash": "dot"}
    shape = layout(
        height=height,
        margin={"l": 64, "r": 24, "t": 70, "b": 56},
        xaxis=axis("size", type="category", categoryarray=columns, anchor="y", showgrid=False,
                   domain=[0, min(1.0, WIDEST_CELL * len(columns))]),
        yaxis=axis("", type="category", categoryarray=families, tickmode="array", tickvals=families,
                   ticktext=[plain(_short(label)) for label in labels(places)], domain=[upper, 1], autorange="reversed", showgrid=False),
        xaxis2=axis("geometric mean, 95% interval", type="log", anchor="y2", **_log_ticks(found)),
        yaxis2=axis("", type="category", domain=[0, lower], anchor="x2"),
        shapes=[{"type": "line", "xref": "x2", "yref": "y2 domain", "x0": 1, "x1": 1, "y0": 0, "y1": 1, "line": unit}],
        showlegend=False,
        meta=words,
    )  # fmt: skip
    brackets = BRACKETS if any(one.low is not None for one in found) else ""
    said = [finding(found, ratios, sides.a, sides.b, sides.what, sides.both), _reading(sides), brackets, not_drawn(left_out), sides.basis]
    caption = " ".join(filter(None, said))
    shown = table.drop(columns=["fields", "problem_key"], errors="ignore")
    traces = [marks(_heat(table, sides, cells, families, columns), cells), _forest(found, texts)]
    return Figure(identity, title, caption, traces, shape, table=shown, variant=variant, derive="geomean")


def heights(families: int, marks: int) -> tuple[int, float, float]:
    """(pixels in all, where the heat map begins, where the means end), from the bottom as shares. derive_geomean.js has the same sums."""
    upper, lower = 26 * max(families, 2), 34 * marks
    inner = upper + lower + 80
    return inner + 126, (lower + 80) / inner, lower / inner


def _heat(table: pd.DataFrame, sides: Sides, cells: list[list[int]], families: list[str], columns: list[str]) -> dict[str, Any]:
    ratios = table["ratio"].tolist()
    rows: list[dict[Any, Any]] = table.to_dict("records")
    span = min(MOST_SPAN, max(LEAST_SPAN, *(abs(math.log2(ratio)) for ratio in ratios)))
    steps = (0.125, 0.5, 1.0, 2.0, 8.0) if span > 2 else (0.25, 0.5, 1.0, 2.0, 4.0) if span > 1 else (0.5, 0.7, 1.0, 1.4, 2.0)
    steps = steps if span > 0.5 else (0.8, 0.9, 1.0, 1.1, 1.25)
    ticks = [tick for tick in steps if abs(math.log2(tick)) <= span + 1e-9]
    beyond = {ticks[0]: "≤", ticks[-1]: "≥"} if any(abs(math.log2(ratio)) > span + 1e-9 for ratio in ratios) else {}
    numbers = len(columns) <= COLUMNS_WITH_NUMBERS
    return {
        "type": "heatmap",
        "z": [[math.log2(ratios[p]) if p >= 0 else None for p in row] for row in cells],
        "x": columns,
        "y": families,
        "text": [[_number(ratios[p]) if p >= 0 and numbers else "" for p in row] for row in cells],
        "texttemplate": "%{text}",
        "customdata": [[_hover(rows[p], sides) if p >= 0 else "" for p in row] for row in cells],
        "hovertemplate": "%{customdata}<extra></extra>",
        "hoverongaps": False,
        "xgap": 2,
        "ygap": 2,
        "zmin": -span,
        "zmax": span,
        "colorscale": [[0, FASTER], [0.5, FAINT], [1, SLOWER]],
        "colorbar": {
            "orientation": "h", "y": 1.0, "yanchor": "bottom", "thickness": 10, "len": 0.7, "x": 0, "xanchor": "left", "outlinewidth": 0,
            "tickvals": [math.log2(tick) for tick in ticks], "ticktext": [f"{beyond.get(t, '')}{t:g}×" for t in ticks], "tickangle": 0,
            "title": {"text": f"{plain(sides.what)} of {plain(_short(sides.b))} over {plain(_short(sides.a))}", "side": "top"},
        },
    }  # fmt: skip


def _reading(sides: Sides) -> str:
    less = "is faster" if sides.metric == "time" else "takes less"
    return (
        f"Each cell is a problem: {sides.what} of {sides.b} over that of {sides.a}, blue below 1 ({sides.b} {less}), orange above. "
        "Across: its size, which is rows, tokens, sequences in the batch, or tokens of the prompt."
    )


def not_drawn(count: int) -> str:
    """What the means have and the map has not."""
    return f"{problems(count)} of further families or sizes {'is' if count == 1 else 'are'} not drawn, but in the means." if count else ""


def _forest(found: list[Mean], names: Mapping[str, str]) -> dict[str, Any]:
    """All at the top: a category axis begins at the bottom."""
    drawn = [*reversed(found[1:]), *found[:1]]
    return {
        "type": "scatter",
        "mode": "markers+text",
        "xaxis": "x2",
        "yaxis": "y2",
        "x": [one.ratio for one in drawn],
        "y": [names[one.name] for one in drawn],
        "text": [f" {one.text}" for one in drawn],
        "textposition": "top center",
        "textfont": {"size": 10},
        "customdata": [f"{one.text}, {problems(one.count)}" for one in drawn],
        "hovertemplate": "%{y}: %{customdata}<extra></extra>",
        "cliponaxis": False,
        "marker": {"color": INK, "size": 8, "symbol": "diamond"},
        "error_x": {
            "type": "data", "symmetric": False, "color": INK, "thickness": 1.5,
            "array": [one.high - one.ratio if one.high is not None else 0.0 for one in drawn],
            "arrayminus": [one.ratio - one.low if one.low is not None else 0.0 for one in drawn],
        },
        "meta": {"geomean": True},
    }  # fmt: skip


def _log_ticks(found: list[Mean]) -> dict[str, Any]:
    """Ticks where people look for them, and room for 1. derive_geomean.js has the same."""
    ends = [end for one in found for end in (one.low or one.ratio, one.high or one.ratio)]
    low, high = min(*ends, 1.0) / 1.08, max(*ends, 1.0) * 1.08
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    steps = [float(f"{step}e{power}") for power in decades for step in ((1, 2, 5) if high / low < 1000 else (1,))]
    near = [0.3, 0.7, 1.5, 3.0] if high / low < 100 else []
    near += [0.6, 0.8, 0.9, 1.1, 1.2] if high / low < 3 else []
    near += [0.95, 1.05] if high / low < 1.4 else []
    ticks = sorted(t for t in (*steps, *near) if low <= t <= high)
    return {"range": [math.log10(low), math.log10(high)], "tickvals": ticks, "ticktext": [f"{t:g}×" for t in ticks], "gridcolor": FAINT}


def _hover(row: Mapping[Any, Any], sides: Sides) -> str:
    unit = time if sides.metric == "time" else energy
    ends = "" if math.isnan(row["low"]) or math.isnan(row["high"]) else f" [{times(row['low'])[:-1]}, {times(row['high'])[:-1]}]"
    both = [
        f"{plain(_short(name))}: {unit(row[side])}, {plain(_short(str(row[f'kernel_{side}'])))}"
        for name, side in ((sides.a, "a"), (sides.b, "b"))
    ]
    return "<br>".join([f"<b>{times(row['ratio'])}</b>{ends}", plain(_short(f"{row['operator']} {row['problem']}", 70)), *both])


def _number(ratio: float) -> str:
    return f"{ratio:.0f}" if ratio >= 10 else f"{ratio:.2f}" if ratio >= 0.1 else f"{ratio:.1g}"


def _size(size: float) -> str:
    if not size:
        return "-"
    return f"{size / 1024:.0f}k" if size >= 4096 and size % 1024 == 0 else f"{size:.0f}"


def _short(text: str, longest: int = LONGEST) -> str:
    return text if len(text) <= longest else f"{text[: longest - 1]}…"
