"""Latency along one dimension of a problem, all else equal: decode against batch, prefill against sequence length, matmul against rows."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from klab.harness.report.figures.style import INK, Figure, axis, colours, layout, mark, plain
from klab.harness.report.subject import Story
from klab.harness.report.units import interval, time
from klab.harness.store.frame import config_label
from klab.harness.store.result import Result
from klab.kernels.contract import Json, canonical_json

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Axis:
    """A way to read a problem as a place on a line: `place` gives (coordinate, what is held equal) or None for another kind of problem."""

    identity: str
    title: str
    unit: str
    place: Callable[[Mapping[str, Json]], tuple[float, dict[str, Json]] | None]


@dataclass(frozen=True)
class Stop:
    """One result on the way: coordinate, median and its interval in microseconds."""

    x: float
    median_us: float
    low_us: float
    high_us: float
    config: str


@dataclass(frozen=True)
class Line:
    """One kernel's stops, in order."""

    kernel: str
    backend: str
    stops: tuple[Stop, ...]


@dataclass(frozen=True)
class Panel:
    """The lines of problems that differ only in the coordinate."""

    name: str
    lines: tuple[Line, ...]


def _decode(problem: Mapping[str, Json]) -> tuple[float, dict[str, Json]] | None:
    lens = problem.get("kv_lens")
    if not isinstance(lens, list | tuple) or not lens or len(set(lens)) != 1:
        return None
    return float(len(lens)), {"context": lens[0]} | {name: value for name, value in problem.items() if name != "kv_lens"}


def _prefill(problem: Mapping[str, Json]) -> tuple[float, dict[str, Json]] | None:
    lens = problem.get("q_lens")
    if not isinstance(lens, list | tuple) or not lens or len(set(lens)) != 1:
        return None
    return float(lens[0]), {"sequences": len(lens)} | {name: value for name, value in problem.items() if name != "q_lens"}


def _rows(problem: Mapping[str, Json]) -> tuple[float, dict[str, Json]] | None:
    m = problem.get("m")
    if not isinstance(m, int) or isinstance(m, bool):
        return None
    return float(m), {name: value for name, value in problem.items() if name != "m"}


AXES = (
    Axis("decode-batch", "Decode: latency against batch", "sequences in the batch", _decode),
    Axis("prefill-length", "Prefill: latency against sequence length", "new tokens per sequence", _prefill),
    Axis("matmul-rows", "Matmul: latency against rows (tokens in flight)", "rows m", _rows),
)


def data(rows: Sequence[Result], along: Axis) -> list[Panel]:
    """The panels with at least two stops on some line, the one with most stops first."""
    found: dict[str, dict[str, list[tuple[float, Result]]]] = defaultdict(lambda: defaultdict(list))
    names: dict[str, str] = {}
    for row in rows:
        placed = along.place(row.problem)
        if placed is None or row.median_us is None:
            continue
        x, rest = placed
        key = canonical_json([row.operator, rest])
        names[key] = f"{row.operator} " + " ".join(f"{name}={_short(value)}" for name, value in rest.items())
        found[key][row.kernel].append((x, row))
    panels = [Panel(names[key], tuple(_line(kernel, stops) for kernel, stops in sorted(lines.items()))) for key, lines in found.items()]
    worth = [panel for panel in panels if any(len(line.stops) > 1 for line in panel.lines)]
    return sorted(worth, key=lambda panel: (-sum(len(line.stops) for line in panel.lines), panel.name))


def draw(panels: Sequence[Panel], along: Axis, identity: str, hues: dict[str, str]) -> Figure:
    """Log-log lines with intervals; a menu chooses among panels."""
    caption = "Medians per launch with 95% intervals; each kernel with its best configuration at that place. Lower is better."
    if not panels:
        return Figure(identity, along.title, caption, empty="No two results differ in this dimension alone yet.")
    traces: list[dict[str, Any]] = []
    owner: list[int] = []
    for n, panel in enumerate(panels):
        for line in panel.lines:
            owner.append(n)
            traces.append(_trace(line, hues, visible=n == 0))
    ticks = {"type": "log", "exponentformat": "none", "tickformat": "~s", "dtick": "D2"}
    shape = layout(xaxis=axis(along.unit, **ticks), yaxis=axis("microseconds", **ticks))
    if len(panels) > 1:
        buttons = [
            {"label": plain(panel.name), "method": "restyle", "args": ["visible", [o == n for o in owner]]}
            for n, panel in enumerate(panels)
        ]
        shape["updatemenus"] = [{"buttons": buttons, "x": 0, "xanchor": "left", "y": 1.02, "yanchor": "bottom", "font": {"size": 11}}]
        shape["margin"] = shape["margin"] | {"t": 56}
    else:
        caption = f"{panels[0].name}. {caption}"
    return Figure(identity, along.title, caption, traces, shape)


def _line(kernel: str, stops: list[tuple[float, Result]]) -> Line:
    in_order = sorted(stops, key=lambda stop: stop[0])
    return Line(kernel, in_order[0][1].backend, tuple(_stop(x, row) for x, row in in_order))


def _stop(x: float, row: Result) -> Stop:
    middle = row.median_us or 0.0
    low = middle if row.ci_low_us is None else row.ci_low_us
    high = middle if row.ci_high_us is None else row.ci_high_us
    return Stop(x, middle, low, high, config_label(row))


def _trace(line: Line, hues: dict[str, str], *, visible: bool) -> dict[str, Any]:
    return {
        "type": "scatter",
        "mode": "lines+markers",
        "name": plain(line.kernel),
        "visible": visible,
        "x": [s.x for s in line.stops],
        "y": [s.median_us for s in line.stops],
        "error_y": {
            "type": "data",
            "symmetric": False,
            "array": [max(s.high_us - s.median_us, 0.0) for s in line.stops],
            "arrayminus": [max(s.median_us - s.low_us, 0.0) for s in line.stops],
            "thickness": 1.2,
            "width": 3,
        },
        "text": [f"{time(s.median_us)} ({interval(s.low_us, s.high_us)})<br>{plain(s.config)}" for s in line.stops],
        "hovertemplate": "<b>%{fullData.name}</b><br>at %{x}: %{text}<extra></extra>",
        "line": {"color": hues.get(line.kernel, INK), "width": 2},
        "marker": {"color": hues.get(line.kernel, INK), "symbol": mark(line.backend), "size": 7},
    }


def _short(value: Json) -> str:
    """A value in a panel's name; long lists only by their ends."""
    if isinstance(value, list | tuple):
        distinct = sorted(set(value))
        return str(distinct[0]) if len(distinct) == 1 else f"{distinct[0]}..{distinct[-1]}" if distinct else "none"
    return str(value)


def figures(story: Story, _: pd.DataFrame) -> list[Figure]:
    """Of each chip a figure per axis along which there is something to see."""
    found = []
    for n, subject in enumerate(story.subjects):
        rows = subject.best_per_kernel()
        hues = colours(row.kernel for row in rows)
        panels = [(along, data(rows, along)) for along in AXES]
        found += [draw(several, along, f"{along.identity}-{n}", hues) for along, several in panels if several]
    return found
