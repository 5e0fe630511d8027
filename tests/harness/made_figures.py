"""Figures and tables of a page, made by hand, of which every number can be told beforehand."""

from __future__ import annotations

import itertools
from typing import Any

import pandas as pd

from klab.harness.report.figures.style import Figure, axis, layout, marks
from klab.harness.report.html import Cell, Line, el, table
from klab.harness.report.shell import document, framed_all, index, plotly_js

CHIPS, OPERATORS, KERNELS = ("b200", "h200"), ("matmul", "rope"), ("alpha", "beta", "gamma")


def rows(chips: int = 2, problems: int = 4, kernels: int = 3) -> pd.DataFrame:
    """A row per chip, problem and kernel: time_us counts up from 1; the last is without a time."""
    chip = [*CHIPS, *(f"chip{n}" for n in range(chips))][:chips]
    kernel = [*KERNELS, *(f"kernel{n}" for n in range(kernels))][:kernels]
    every = itertools.product(chip, range(problems), kernel)
    found = [
        {
            "chip": c,
            "model": ("tiny", "large") if p % 2 else ("tiny",),
            "phase": ("decode",),
            "operator": OPERATORS[p % 2],
            "dtype": "bf16",
            "kernel": k,
            "status": "ok",
            "problem": f"problem {p}",
            "time_us": float(n + 1),
        }
        for n, (c, p, k) in enumerate(every)
    ]
    frame = pd.DataFrame(found)
    frame.loc[len(frame) - 1, "time_us"] = float("nan")
    return frame


def points(frame: pd.DataFrame, identity: str = "points", **changes: Any) -> Figure:
    """A mark per row, a trace per kernel."""
    traces = []
    for kernel, part in frame.groupby("kernel", sort=False):
        places = [frame.index.get_loc(i) for i in part.index]
        shown = {
            "type": "scatter",
            "mode": "markers",
            "name": str(kernel),
            "x": places,
            "y": part["time_us"].tolist(),
            "text": part["problem"].tolist(),
            "marker": {"color": [float(n) for n in places], "size": 8},
            "error_y": {"type": "data", "symmetric": False, "array": [0.5] * len(part), "arrayminus": [0.25] * len(part)},
        }
        traces.append(marks(shown, places))
    traces.append({"type": "scatter", "mode": "lines", "name": "limit", "x": [0, len(frame)], "y": [1, 1], "hoverinfo": "skip"})
    shape = layout(xaxis=axis("row"), yaxis=axis("time (us)"))
    fields = {"title": "Time of every row", "caption": "The words of the whole.", "table": frame} | changes
    return Figure(identity, traces=traces, layout=shape, **fields)


def heat(frame: pd.DataFrame, identity: str = "heat") -> Figure:
    """Time by problem and kernel, on the first chip."""
    first = frame[frame["chip"] == frame["chip"].iloc[0]]
    problems, kernels = list(dict.fromkeys(first["problem"])), list(dict.fromkeys(first["kernel"]))
    place = {(p, k): n for n, (p, k) in enumerate(zip(frame["problem"], frame["kernel"], strict=True)) if n < len(first)}
    where = [[place.get((p, k), -1) for k in kernels] for p in problems]
    z = [[None if n < 0 else frame["time_us"].iloc[n] for n in line] for line in where]
    trace = marks({"type": "heatmap", "x": kernels, "y": problems, "z": z, "text": [[str(v) for v in line] for line in z]}, where)
    shape = layout(xaxis=axis("kernel"), yaxis=axis("problem", categoryorder="array", categoryarray=problems), height=300)
    return Figure(identity, "Map", "All of it.", [trace], shape, table=first)


def variants(frame: pd.DataFrame) -> list[Figure]:
    """The same figure once per chip."""
    found = []
    for n, (chip, part) in enumerate(frame.groupby("chip", sort=False)):
        found.append(points(part.reset_index(drop=True), f"chip-{n}", title="By chip", variant=str(chip)))
    return found


def winners(frame: pd.DataFrame, identity: str = "winners") -> object:
    """A table with a line per row; every third has evidence."""
    lines = []
    for n, row in enumerate(frame.to_dict("records")):
        time = row["time_us"]
        cells = [row["problem"], row["kernel"], Cell("not measured", "") if time != time else Cell(f"{time:.0f} µs", time)]
        dims = {name: row[name] for name in ("chip", "operator", "kernel")}
        lines.append(Line(cells, dims, f"row-{n}", evidence=f"e{n}" if n % 3 == 0 else None))
    return table(("Problem", "Kernel", "Time"), lines, numbers=("Time",), identity=identity)


def made_page(frame: pd.DataFrame | None = None, figures: list[Figure] | None = None, **changes: Any) -> str:
    """A page with two sections, a table, an article per chip and the figures."""
    found = rows() if frame is None else frame
    drawn = [points(found), heat(found), *variants(found)] if figures is None else figures
    chips = [
        el("article", el("h3", chip), el("p", f"About {chip}."), id=f"about-{chip}", data_chip=chip)
        for chip in dict.fromkeys(found["chip"])
    ]
    content = [
        el("nav", el("a", "Tables", href="#tables"), el("a", "Figures", href="#figures")),
        el(
            "main",
            el("section", el("h2", "Tables"), chips, winners(found), table(("Word", "Meaning"), [("a", "b")]), id="tables"),
            el("section", el("h2", "Figures"), framed_all(drawn, True), id="figures"),
        ),
    ]
    sections = {"index": index(found)} | changes.pop("sections", {})
    return document("made", content, figures=drawn, sections=sections, drawing=plotly_js(), **changes)
