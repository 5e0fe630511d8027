"""Side B against side A as figures: every answer as a mark on two logarithmic axes, and problem by problem as a heat map."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from klab.harness.report.compare_judged import Pair
from klab.harness.report.figures.chips_draw import Sides
from klab.harness.report.figures.chips_draw import draw as draw_ratios
from klab.harness.report.figures.style import INK, PALETTE, Figure, axis, layout, marks, plain
from klab.harness.report.limits import dtype_of
from klab.harness.report.units import time, times
from klab.harness.store.frame import config_label
from klab.harness.watch.compare_rule import Answer

if TYPE_CHECKING:
    import pandas as pd

# Told apart by shape as well as by colour.
LOOKS = {
    Answer.SLOWER: (PALETTE[1], "triangle-up"),
    Answer.FASTER: (PALETTE[0], "triangle-down"),
    Answer.SAME: (PALETTE[2], "circle"),
    Answer.CANNOT_TELL: ("var(--soft)", "circle-open"),
}
MOST_MARKS = 1500


def data(pairs: Sequence[Pair], metric: str = "time") -> pd.DataFrame:
    """One row per answer with a ratio, in their order. Columns: as `figures.chips.data`, and answer and reason.

    a, b: the medians (microseconds) of the newest rows, or joules. The ratio of times is that of the answer: over all runs, and over the
    anchor where both sides have one; that of energies is b over a.
    """
    import pandas as pd

    rows = []
    for pair in pairs:
        a, b = pair.a, pair.b
        found = pair.found
        told = (found.ratio, found.low, found.high) if metric == "time" else pair.energy
        if a is None or b is None or told is None or told[0] is None:
            continue
        values = (a.median_us, b.median_us) if metric == "time" else pair.energies or (None, None)
        like = pair.like
        rows.append({
            "model": (), "phase": (), "chip": tuple(dict.fromkeys((a.chip, b.chip))), "operator": like.operator, "dtype": dtype_of(like),
            "kernel": tuple(dict.fromkeys((_bare(a.kernel), _bare(b.kernel)))), "status": "ok", "problem": pair.problem,
            "problem_key": like.problem_key, "fields": dict(like.problem), "kernel_a": _bare(a.kernel), "kernel_b": _bare(b.kernel),
            "config_a": config_label(a), "config_b": config_label(b),
            "a": values[0], "b": values[1],
            "ratio": told[0], "low": told[1], "high": told[2], "answer": found.answer.value, "reason": found.reason,
        })  # fmt: skip
    numbers = ("a", "b", "ratio", "low", "high")
    found_rows = pd.DataFrame(rows, columns=list(COLUMNS))
    return found_rows.astype(dict.fromkeys(numbers, "float64"))


COLUMNS = (
    "chip", "model", "phase", "operator", "dtype", "kernel", "status", "problem", "problem_key", "fields", "kernel_a", "kernel_b",
    "config_a", "config_b",
    "a", "b", "ratio", "low", "high", "answer", "reason",
)  # fmt: skip


def scatter(table: pd.DataFrame, sides: Sides, identity: str) -> Figure:
    """A mark per answer: A across, B up, so that what lies above the diagonal is slower on B."""
    title = f"{sides.b} against {sides.a}, answer by answer"
    shown = table[(table["a"] > 0) & (table["b"] > 0)].head(MOST_MARKS).reset_index(drop=True)
    if shown.empty:
        return Figure(identity, title, "Nothing has a time on both sides.", empty="Nothing has a time on both sides.")
    ends = [min(*shown["a"], *shown["b"]) / 1.3, max(*shown["a"], *shown["b"]) * 1.3]
    traces: list[dict[str, Any]] = [
        {"type": "scatter", "mode": "lines", "name": "same time", "x": ends, "y": ends, "hoverinfo": "skip",
         "line": {"color": INK, "width": 1, "dash": "dot"}}
    ]  # fmt: skip
    for answer, (colour, symbol) in LOOKS.items():
        part = shown[shown["answer"] == answer.value]
        if len(part):
            trace = {
                "type": "scatter", "mode": "markers", "name": answer.value, "x": part["a"].tolist(), "y": part["b"].tolist(),
                "customdata": [_hover(row) for row in part.to_dict("records")], "hovertemplate": "%{customdata}<extra></extra>",
                "marker": {"color": colour, "symbol": symbol, "size": 9},
            }  # fmt: skip
            traces.append(marks(trace, part.index.tolist()))
    ticks = [step * 10.0**power for power in range(-4, 9) for step in ((1, 2, 5) if ends[1] / ends[0] < 300 else (1,))]
    ticks = [tick for tick in ticks if ends[0] <= tick <= ends[1]]
    decades = {"type": "log", "range": [math.log10(end) for end in ends], "tickvals": ticks, "tickformat": ",~r"}
    shape = layout(
        xaxis=axis(f"µs on A: {plain(sides.a)}", **decades), yaxis=axis(f"µs on B: {plain(sides.b)}", **decades), height=480
    )  # fmt: skip
    counts = shown["answer"].value_counts()
    said = ", ".join(f"{counts[answer.value]} {answer.value}" for answer in LOOKS if answer.value in counts)
    far: dict[Any, Any] = max(shown.to_dict("records"), key=lambda row: abs(math.log(row["ratio"])))
    caption = f"{said}. Furthest from the diagonal: {far['problem']}, {_kernels(far)}, {times(far['ratio'])} ({far['answer']}). "
    caption += (
        "Above the dotted line B takes longer. A mark shows the medians of the newest row of each side; the answer rests on all their "
    )
    caption += "runs, and on the anchor where there is one."
    caption += f" {len(table) - len(shown)} more are not drawn." if len(table) > len(shown) else ""
    return Figure(identity, title, caption, traces, shape, table=shown.drop(columns=["fields", "problem_key"]))


# What the intervals of single cells cover.
CELLS = {
    "time": "intervals of cells, and that of the mean at the top of the page, allow for days and boards, which the brackets here do not.",
    "energy": "intervals of cells are the ends of the two rows' intervals over each other, and allow for no days and boards.",
}


def heat(best: Sequence[Pair], sides: Sides, identity: str) -> list[Figure]:
    """The best of each side per problem as a heat map, of time and, where both sides have it, of energy."""
    drawn = []
    for metric in ("time", "energy"):
        table = data(best, metric).sort_values("a", ascending=False, kind="stable").reset_index(drop=True)
        if len(table):
            named = Sides(sides.a, sides.b, metric, f"{sides.basis}; {CELLS[metric]}", sides.both)
            drawn.append(draw_ratios(table, named, f"{identity}-{metric}", "Problem by problem, the best of each side", metric))
    return drawn if len(drawn) > 1 else [Figure(**vars(figure) | {"variant": ""}) for figure in drawn]


def _hover(row: dict[Any, Any]) -> str:
    ends = "" if math.isnan(row["low"]) or math.isnan(row["high"]) else f" [{times(row['low'])[:-1]}, {times(row['high'])[:-1]}]"
    lines = [f"<b>{times(row['ratio'])}</b>{ends} {row['answer']}", plain(row["problem"]), plain(_kernels(row))]
    return "<br>".join([*lines, f"A {time(row['a'])}, B {time(row['b'])}"])


def _kernels(row: dict[Any, Any]) -> str:
    one, other = str(row["kernel_a"]), str(row["kernel_b"])
    return one if one == other else f"{one} and {other}"


def _bare(kernel: str) -> str:
    return kernel.partition("/")[2] or kernel
