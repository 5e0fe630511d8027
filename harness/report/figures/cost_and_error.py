"""Cost against error: what each narrower format of a problem saves, and how far its output is from the unquantised one."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from klab.harness.report.figures.style import INK, Figure, axis, colours, layout, mark, plain
from klab.harness.report.subject import Story
from klab.harness.report.units import interval, time
from klab.harness.store.frame import config_label
from klab.harness.store.result import Result

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Format:
    """The best of one kernel on one problem. `error` is ||out - wide|| / ||wide|| (0: the problem itself)."""

    kernel: str
    backend: str
    problem: str
    error: float
    median_us: float
    low_us: float
    high_us: float
    config: str


@dataclass(frozen=True)
class Panel:
    """One unquantised problem and everything that can be run in its place."""

    name: str
    formats: tuple[Format, ...]

    @property
    def front(self) -> tuple[Format, ...]:
        """Those that no other beats in both time and error, by error."""
        front: list[Format] = []
        for one in sorted(self.formats, key=lambda f: (f.error, f.median_us)):
            if not front or one.median_us < front[-1].median_us:
                front.append(one)
        return tuple(front)


def data(rows: Sequence[Result]) -> list[Panel]:
    """A panel per problem of which some narrower format was measured, the one with most marks first."""
    narrow: dict[str, list[Result]] = defaultdict(list)
    for row in rows:
        if row.wide_key and row.wide_error is not None:
            narrow[row.wide_key].append(row)
    panels = []
    for key, approximations in narrow.items():
        wide = [row for row in rows if row.problem_key == key]
        name = wide[0].problem_label if wide else f"what {approximations[0].problem_label} approximates"
        panels.append(
            Panel(name, tuple(_format(row, 0.0) for row in wide) + tuple(_format(r, r.wide_error or 0.0) for r in approximations))
        )
    return sorted(panels, key=lambda panel: (-len(panel.formats), panel.name))


def draw(panels: Sequence[Panel], identity: str) -> Figure:
    """Error to the right, time upwards: what lies below and to the left is better. A line joins what nothing beats in both."""
    caption = (
        "Error is the distance of the output from the unquantised problem's, relative to its size, on activations with outlier channels; "
        "it is the format's far more than the kernel's. Time is the median per launch with its 95% interval. The line joins what nothing "
        "beats in both. klab choose --max-error picks the fastest to the left of a limit."
    )
    if not panels:
        return Figure(identity, TITLE, caption, empty="No narrower format was measured: klab run --max-error 0.05 does that.")
    traces: list[dict[str, Any]] = []
    owner: list[int] = []
    # A colour for each format and a mark for each backend: what one looks for here is the format.
    hues = colours({_name(one) for panel in panels for one in panel.formats})
    for n, panel in enumerate(panels):
        front = panel.front
        traces.append(_line(front, visible=n == 0))
        traces += [_mark(one, hues, visible=n == 0) for one in sorted(panel.formats, key=lambda f: (_name(f), f.kernel))]
        owner += [n] * (1 + len(panel.formats))
    # A little to the left of 0, so that the marks of the problem itself are whole.
    widest = max(100 * one.error for panel in panels for one in panel.formats)
    shape = layout(
        xaxis=axis("error against the unquantised output, %", exponentformat="none", range=[-0.04 * widest, 1.08 * widest]),
        yaxis=axis("microseconds", type="log", exponentformat="none", tickformat="~s", dtick="D2"),
    )
    if len(panels) > 1:
        buttons = [
            {"label": plain(panel.name), "method": "restyle", "args": ["visible", [o == n for o in owner]]}
            for n, panel in enumerate(panels)
        ]
        shape["updatemenus"] = [{"buttons": buttons, "x": 0, "xanchor": "left", "y": 1.02, "yanchor": "bottom", "font": {"size": 11}}]
        shape["margin"] = shape["margin"] | {"t": 56}
    else:
        caption = f"{panels[0].name}. {caption}"
    return Figure(identity, TITLE, caption, traces, shape)


TITLE = "Cost against error"


def _format(row: Result, error: float) -> Format:
    middle = row.median_us or 0.0
    low, high = (middle if v is None else v for v in (row.ci_low_us, row.ci_high_us))
    return Format(row.kernel, row.backend, row.problem_label, error, middle, low, high, config_label(row))


def _line(front: Sequence[Format], *, visible: bool) -> dict[str, Any]:
    return {
        "type": "scatter",
        "mode": "lines",
        "name": "nothing beats these in both",
        "visible": visible,
        "x": [100 * one.error for one in front],
        "y": [one.median_us for one in front],
        "line": {"color": INK, "width": 1, "dash": "dot"},
        "hoverinfo": "skip",
    }


def _name(one: Format) -> str:
    """The format as the problem's label has it, or "unquantised"."""
    return one.problem.split(" ", 2)[-1].removesuffix(" bf16").removesuffix(" fp16") if one.error else "unquantised"


def _mark(one: Format, hues: dict[str, str], *, visible: bool) -> dict[str, Any]:
    words = f"{time(one.median_us)} ({interval(one.low_us, one.high_us)})<br>{plain(one.problem)}<br>{plain(one.config)}"
    return {
        "type": "scatter",
        "mode": "markers",
        "name": plain(f"{_name(one)}: {one.kernel.partition('/')[2]}"),
        "visible": visible,
        "x": [100 * one.error],
        "y": [one.median_us],
        "error_y": {
            "type": "data",
            "symmetric": False,
            "array": [max(one.high_us - one.median_us, 0.0)],
            "arrayminus": [max(one.median_us - one.low_us, 0.0)],
            "thickness": 1.2,
            "width": 3,
        },
        "text": [words],
        "hovertemplate": "<b>%{fullData.name}</b><br>error %{x:.2f}%<br>%{text}<extra></extra>",
        "marker": {"color": hues.get(_name(one), INK), "symbol": mark(one.backend), "size": 9},
    }


def figures(story: Story, _: pd.DataFrame) -> list[Figure]:
    """One per chip on which narrower formats were measured."""
    found = [(n, data(subject.best_per_kernel())) for n, subject in enumerate(story.subjects)]
    return [draw(panels, f"error-{n}") for n, panels in found if panels]
