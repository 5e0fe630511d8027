"""Time along one dimension of a problem, all else equal: decode against batch and context, prefill against length, matmul against rows."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise, zip_longest
from typing import TYPE_CHECKING, Any

import numpy as np

from klab.harness.report.figures.front import TIME, over
from klab.harness.report.figures.style import Figure, Look, digits, distinct, grouped, hollow, layout, log_axis, looks, marks, short
from klab.harness.report.frames import DIMS, best
from klab.harness.report.subject import Story
from klab.harness.report.units import number, time, times
from klab.harness.watch.wording import line
from klab.kernels.contract import Json, canonical_json
from klab.kernels.discover import operators

if TYPE_CHECKING:
    import pandas as pd

# Panels of one axis, all chips together: two dozen with those of the other axes.
PANELS = 6
# Overtakings that a caption names.
TOLD = 3
COLUMNS = (
    *DIMS, "origin", "problem", "config", "chosen", "at", "median_us", "low_us", "high_us", "backend", "kernel_id", "problem_key",
    "panel", "held",
)  # fmt: skip


@dataclass(frozen=True)
class Axis:
    """A way to read a problem as a place on a line: `place` gives (coordinate, what is held equal) or None for another kind of problem."""

    identity: str
    title: str
    unit: str
    place: Callable[[Mapping[str, Json]], tuple[float, dict[str, Json]] | None]


def _same(problem: Mapping[str, Json], name: str) -> tuple[int, int, dict[str, Json]] | None:
    """(how many, their length, the rest) of a field that lists lengths which are all the same."""
    lens = problem.get(name)
    if not isinstance(lens, list | tuple) or not lens or not isinstance(lens[0], int) or any(one != lens[0] for one in lens):
        return None
    return len(lens), lens[0], {field: value for field, value in problem.items() if field != name}


def _decode(problem: Mapping[str, Json]) -> tuple[float, dict[str, Json]] | None:
    same = _same(problem, "kv_lens")
    return None if same is None else (float(same[0]), {"context": same[1]} | same[2])


def _context(problem: Mapping[str, Json]) -> tuple[float, dict[str, Json]] | None:
    same = _same(problem, "kv_lens")
    return None if same is None else (float(same[1]), {"batch": same[0]} | same[2])


def _prefill(problem: Mapping[str, Json]) -> tuple[float, dict[str, Json]] | None:
    same = _same(problem, "q_lens")
    return None if same is None else (float(same[1]), {"sequences": same[0]} | same[2])


def _rows(problem: Mapping[str, Json]) -> tuple[float, dict[str, Json]] | None:
    m = problem.get("m")
    if not isinstance(m, int) or isinstance(m, bool):
        return None
    return float(m), {name: value for name, value in problem.items() if name != "m"}


AXES = (
    Axis("decode-batch", "Decode: time against batch", "sequences in the batch", _decode),
    Axis("decode-context", "Decode: time against context length", "tokens of context per sequence", _context),
    Axis("prefill-length", "Prefill: time against sequence length", "new tokens per sequence", _prefill),
    Axis("matmul-rows", "Matmul: time against rows (tokens in flight)", "rows m", _rows),
)


def data(frame: pd.DataFrame, along: Axis) -> pd.DataFrame:
    """COLUMNS: of each kernel its best row (`frames.best`) at each place of the panels in which some kernel has two places, the panel
    with most rows first, in order of `at`. panel: chip and what is held equal, apart by what differs among panels; held: all of it.
    """
    import pandas as pd

    rows = frame[np.array([along.place(fields) is not None for fields in frame["fields"]], dtype=bool)]
    rows = best(rows[rows["median_us"].between(0, math.inf, inclusive="neither")])
    spots = [place for place in map(along.place, rows["fields"]) if place is not None]
    group = [
        canonical_json([chip, operator, rest]) for chip, operator, (_, rest) in zip(rows["chip"], rows["operator"], spots, strict=True)
    ]
    rows = rows.assign(at=[x for x, _ in spots], group=group, rest=pd.Series([rest for _, rest in spots], index=rows.index, dtype="object"))
    lines = rows.groupby(["group", "origin", "kernel_id"])["at"].nunique()
    worth = set(lines[lines > 1].index.get_level_values("group"))
    rows = rows[rows["group"].isin(worth)]
    groups = rows.drop_duplicates("group")
    named = dict(zip(groups["group"], _names(groups), strict=True))
    size = rows.groupby("group")["at"].size()
    rows = rows.assign(panel=rows["group"].map(named), held=rows["rest"].map(_words), order=[-int(size[one]) for one in rows["group"]])
    return rows.sort_values(["order", "panel", "kernel_id", "origin", "at"], kind="stable")[list(COLUMNS)].reset_index(drop=True)


def _names(groups: pd.DataFrame) -> list[str]:
    """Of one row per panel: chip, operator, and of what is held equal that by which the panels of the operator differ."""
    held = [_whole(operator, rest) for operator, rest in zip(groups["operator"], groups["rest"], strict=True)]
    seen: dict[tuple[str, str], set[str]] = {}
    for operator, rest in zip(groups["operator"], held, strict=True):
        for field, value in rest.items():
            seen.setdefault((operator, field), set()).add(canonical_json(value))
    names = []
    for chip, operator, rest in zip(groups["chip"], groups["operator"], held, strict=True):
        differs = {field: value for field, value in rest.items() if len(seen[operator, field]) > 1}
        names.append(line(f"{chip}: {operator} {_words(differs)}".strip(), 160))
    return distinct(names)


def _whole(operator: str, rest: Mapping[str, Json]) -> dict[str, Json]:
    """What is held equal with the defaults of the operator's problems, which are not stored."""
    problem = operators().get(operator)
    fields = getattr(problem, "__dataclass_fields__", {}).values()
    defaults = {field.name: field.default for field in fields if field.init and field.default is not dataclasses.MISSING}
    return {**rest, **{name: value for name, value in defaults.items() if name not in rest}}


def _words(rest: Mapping[str, Json]) -> str:
    """What is held equal; long lists only by their ends."""
    return " ".join(f"{name}={_short(value)}" for name, value in rest.items())


def _short(value: Json) -> str:
    if isinstance(value, list | tuple):
        distinct = sorted(set(value))
        return str(distinct[0]) if len(distinct) == 1 else f"{distinct[0]}..{distinct[-1]}" if distinct else "none"
    return str(value)


@dataclass(frozen=True)
class Change:
    """Between two neighbouring places another kernel becomes the fastest. `at`: where the two lines cross, straight between the places
    on logarithmic scales; NaN where one of the two lacks a place. sure: at both places the two can be told apart.
    """

    before: str
    after: str
    low: float
    high: float
    at: float
    sure: bool


def changes(panel: pd.DataFrame) -> list[Change]:
    """Of the measured rows of one panel, along the axis."""
    own = panel[panel["origin"] == "measured"]
    places: dict[float, dict[str, Any]] = {}
    for row in own.sort_values("at", kind="stable").itertuples():
        places.setdefault(float(str(row.at)), {})[str(row.kernel_id)] = row
    found = []
    for left, right in pairwise(places.values()):
        before, after = (min(place, key=lambda kernel: float(place[kernel].median_us)) for place in (left, right))
        if before == after:
            continue
        low, high = float(left[before].at), float(right[after].at)
        at, sure = math.nan, False
        if after in left and before in right:
            behind = math.log(left[after].median_us / left[before].median_us)
            ahead = math.log(right[before].median_us / right[after].median_us)
            share = behind / (behind + ahead) if behind + ahead > 0 else 0.5
            at = low * (high / low) ** share if low > 0 else low + (high - low) * share
            sure = _apart(left[before], left[after]) and _apart(right[after], right[before])
        found.append(Change(left[before].kernel, right[after].kernel, low, high, at, sure))
    return found


def _apart(fast: Any, slow: Any) -> bool:
    return TIME.ends(fast)[1] < TIME.ends(slow)[0]


def finding(panel: pd.DataFrame, along: Axis) -> str:
    """Who is fastest where, and by how much the best time changes along the axis. Measured rows alone."""
    own = panel[panel["origin"] == "measured"]
    if not len(own):
        return "All of it is published by others; nothing of it was measured here."
    leaders = own.sort_values(["at", "median_us"], kind="stable").drop_duplicates("at")
    first, last = leaders.iloc[0], leaders.iloc[-1]
    count = len(leaders)
    overtaken = changes(panel)
    if own["kernel_id"].nunique() == 1:
        text = f"One kernel alone was measured here, {_kernel(first['kernel'])}."
    elif not overtaken:
        places = ("the one place", "both places")[count - 1] if count < 3 else f"all {count} places"
        text = f"{_kernel(first['kernel'])} is the fastest at {places}{_ties(own)}."
    elif len(overtaken) <= TOLD:
        text = f"{_kernel(first['kernel'])} is the fastest at {_place(first['at'])}; {'; '.join(map(_overtaking, overtaken))}."
    else:
        wins = [f"{_kernel(kernel)} at {won}" for kernel, won in leaders["kernel"].value_counts().items()]
        text = (
            f"The fastest changes {len(overtaken)} times along the {count} places: {', '.join(wins[:TOLD])}. {_overtaking(overtaken[0])}."
        )
    if count == 1:
        return text
    (first_low, first_high), (last_low, last_high) = TIME.ends(first), TIME.ends(last)
    start, end = float(first["median_us"]), float(last["median_us"])
    along_it = f"for {_place(last['at'] / first['at'])}× the {along.unit}" if first["at"] > 0 else f"along the {along.unit}"
    return (
        f"{text} The best time goes from {time(first['median_us'])} at {_place(first['at'])} to {time(last['median_us'])} at "
        f"{_place(last['at'])}: {times(over(end, start))} ({times(over(last_low, first_high))} to "
        f"{times(over(last_high, first_low))}) {along_it}."
    )


def _overtaking(one: Change) -> str:
    place = f"between {_place(one.low)} and {_place(one.high)}"
    if math.isnan(one.at):
        return f"{_kernel(one.after)} follows {_kernel(one.before)} {place}, where one of them was not measured on both sides"
    near = f" (near {_near(one.at)}{'' if one.sure else '; not clear, intervals overlap'})"
    return f"{_kernel(one.after)} overtakes {_kernel(one.before)} {place}{near}"


def _ties(own: pd.DataFrame) -> str:
    """At how many places the next best cannot be told apart from the best."""
    ties = 0
    for rows in grouped(own.itertuples(), "at").values():
        first, *others = sorted(rows, key=lambda row: float(row.median_us))
        ties += bool(others) and not _apart(first, others[0])
    return f" (at {ties} of them the next cannot be told apart)" if ties else ""


def _place(at: float) -> str:
    """A coordinate as people write it: whole, unless it is small and is not."""
    return f"{at:,.0f}" if at == int(at) or at >= 10 else number(at)


def _near(at: float) -> str:
    """An estimated coordinate: two digits."""
    return f"{at:.2g}" if at < 99.5 else f"{float(f'{at:.2g}'):,.0f}"


def _kernel(name: object) -> str:
    return line(name, 60)


def draw(panel: pd.DataFrame, along: Axis, identity: str, look: Mapping[str, Look], note: str = "") -> Figure:
    """One panel of `data`, with a line and a band per kernel and origin. note: what the page left out."""
    shown = panel.reset_index(drop=True)
    caption = (
        f"{finding(shown, along)} Held equal: {line(shown['held'].iloc[0], 300)}. Each kernel with its best configuration at each place; "
        "the band, often as thin as the line, is the 95% interval. Lower is better."
    )
    if (shown["origin"] != "measured").any():
        caption += " Hollow marks and thin dotted lines are published by others."
    traces: list[dict[str, Any]] = []
    for (kernel, origin), rows in grouped(shown.itertuples(), "kernel_id", "origin").items():
        traces += _traces(rows, look[kernel], own=origin == "measured")
    stops = sorted(set(shown["at"]))
    ends = [value for name in TIME.columns for value in shown[name]]
    across = log_axis(along.unit, stops) | _ticks(stops)
    shape = layout(xaxis=across, yaxis=log_axis("time per launch, µs", ends), showlegend=True)
    table = shown.drop(columns=["backend", "kernel_id", "problem_key", "panel", "held"])
    return Figure(identity, along.title, f"{caption} {note}".strip(), traces, shape, table=table, variant=shown["panel"].iloc[0])


def _traces(rows: list[Any], look: Look, *, own: bool) -> list[dict[str, Any]]:
    """The band (a closed shape: it follows a filter by itself) and the line of one kernel, switched together by the legend."""
    at = [row.Index for row in rows]
    name = short(rows[0].kernel) + ("" if own else " (published)")
    common = {"type": "scatter", "name": name, "legendgroup": f"{at[0]}"}
    x = digits(row.at for row in rows)
    ends = [TIME.ends(row) for row in rows]
    line_of = common | {
        "mode": "lines+markers",
        "x": x,
        "y": digits(row.median_us for row in rows),
        "customdata": [[short(row.problem, 80), short(row.config, 160), TIME.told(row)] for row in rows],
        "hovertemplate": f"<b>{name}</b><br>%{{customdata[0]}}<br>%{{customdata[1]}}<br>%{{customdata[2]}}<extra></extra>",
        "line": {"color": look.colour, "width": 2 if own else 1, "dash": look.dash if own else "dot"},
        "marker": {"color": look.colour, "symbol": look.symbol if own else hollow(look.symbol), "size": 7},
    }
    lines = [marks(line_of, at)]
    if any(low < high for low, high in ends):
        band = common | {
            "mode": "lines",
            "showlegend": False,
            "hoverinfo": "skip",
            "x": x + x[::-1],
            "y": digits([low for low, _ in ends]) + digits([high for _, high in ends])[::-1],
            "line": {"width": 0},
            "fill": "toself",
            "fillcolor": _faded(look.colour),
        }
        lines.insert(0, marks(band, at + at[::-1]))
    return lines


def _faded(colour: str) -> str:
    red, green, blue = (int(colour[n : n + 2], 16) for n in (1, 3, 5))
    return f"rgba({red},{green},{blue},0.28)"


def _ticks(stops: list[float]) -> dict[str, Any]:
    """Labels at the places themselves, as many as a narrow screen has room for."""
    if min(stops) <= 0:
        return {}
    apart = math.log(max(stops) / min(stops)) / 9 if len(stops) > 1 else 0.0
    kept: list[float] = []
    for stop in stops:
        if not kept or math.log(stop / kept[-1]) >= apart:
            kept.append(stop)
    return {"tickmode": "array", "tickvals": kept, "ticktext": [_place(stop) for stop in kept]}


def figures(story: Story, frame: pd.DataFrame) -> list[Figure]:
    """Of each axis the panels with most rows, of each chip in turn."""
    look, rows = looks(frame), best(frame)
    drawn = []
    for along in AXES:
        found = data(rows, along)
        by_chip = [list(part.groupby("panel", sort=False)) for _, part in found.groupby("chip")]
        panels = [one for turn in zip_longest(*by_chip) for one in turn if one is not None]
        note = ""
        if len(panels) > PANELS:
            note = f"{PANELS} of {len(panels)} such lines of problems have a figure: of each chip in turn those with most results."
        drawn += [draw(panel, along, f"{along.identity}-{n}", look, note) for n, (_, panel) in enumerate(panels[:PANELS])]
    return drawn
