"""Error against cost: what each narrower format of a problem saves, and how far its output is from the unquantised one."""

from __future__ import annotations

import math
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

from klab.harness.report.figures import front
from klab.harness.report.figures.front import TIME, Way, over
from klab.harness.report.figures.style import PALETTE, Figure, axis, distinct, even_legend, grouped, layout, log_axis, mark
from klab.harness.report.frames import DIMS, best
from klab.harness.report.subject import Story
from klab.harness.report.units import percent, plain_ratio, time, times
from klab.harness.watch.wording import line

if TYPE_CHECKING:
    import pandas as pd

TITLE = "Quantisation: error against cost"
ERROR = Way("error_percent", "", "", "error", "%")
UNQUANTISED = "unquantised"
# Problems of a page that have a figure, and formats that a caption names.
PANELS, TOLD = 24, 5
COLUMNS = (
    *DIMS, "origin", "format", "problem", "config", "chosen", "error_percent", "median_us", "low_us", "high_us", "backend", "kernel_id",
    "panel",
)  # fmt: skip


def data(frame: pd.DataFrame) -> pd.DataFrame:
    """COLUMNS: the best row of each kernel (`frames.best`) for every problem of which some narrower format has a time and an error, and
    for its formats; the problem with most rows first, then by error. panel: chip and unquantised problem. error_percent:
    ||out - wide|| / ||wide||, 0 for the problem itself. format: the narrower format, or UNQUANTISED.
    """
    import pandas as pd

    rows = best(frame)
    rows = rows[rows["median_us"].between(0, math.inf, inclusive="neither")]
    narrow = rows[(rows["wide_key"] != "") & rows["wide_error"].between(0, math.inf, inclusive="left")]
    wanted = narrow[["chip", "wide_key"]].drop_duplicates()
    wide = rows.merge(wanted.rename(columns={"wide_key": "problem_key"}), on=["chip", "problem_key"])
    wide = wide.assign(group=wide["problem_key"], error_percent=0.0, format=UNQUANTISED)
    formats = [_format(problem, fields) for problem, fields in zip(narrow["problem"], narrow["fields"], strict=True)]
    narrow = narrow.assign(group=narrow["wide_key"], error_percent=100 * narrow["wide_error"], format=formats)
    found = pd.concat([wide, narrow], ignore_index=True)
    names = {(chip, key): label for chip, key, label in zip(wide["chip"], wide["group"], wide["problem"], strict=True)}
    for chip, key, label in zip(narrow["chip"], narrow["group"], narrow["problem"], strict=True):
        names.setdefault((chip, key), f"what {label} approximates")
    groups = found.groupby(["chip", "group"])["kernel"].size()
    labels = distinct([f"{chip}: {line(names[chip, key], 120)}" for chip, key in groups.index])
    named = dict(zip(groups.index, zip(labels, groups, strict=True), strict=True))
    panels = [named[place] for place in zip(found["chip"], found["group"], strict=True)]
    found = found.assign(panel=[label for label, _ in panels], order=[-int(size) for _, size in panels])
    return found.sort_values(["order", "panel", "error_percent", "median_us"], kind="stable")[list(COLUMNS)].reset_index(drop=True)


def _format(problem: str, fields: dict[str, Any]) -> str:
    """The problem's field `format` where it is stated, else what its label says after operator and shape."""
    named = fields.get("format")
    return str(named) if named else line(problem.split(" ", 2)[-1].removesuffix(" bf16").removesuffix(" fp16"), 40)


def finding(panel: pd.DataFrame) -> str:
    """What each format saves and what error it costs: its fastest kernel against the fastest unquantised one. Measured rows alone."""
    own = panel[panel["origin"] == "measured"]
    narrow = own[own["format"] != UNQUANTISED].sort_values("median_us", kind="stable").drop_duplicates("format")
    wide = own[own["format"] == UNQUANTISED].sort_values("median_us", kind="stable")
    if not len(narrow):
        return "No narrower format was measured here."
    narrow = narrow.sort_values("error_percent", kind="stable")
    told = [_saving(row, wide.iloc[0] if len(wide) else None) for _, row in narrow.iloc[:TOLD].iterrows()]
    if len(narrow) > TOLD:
        told.append(f"{len(narrow) - TOLD} more formats are in the table")
    against = "The unquantised problem was not measured, so that no saving is known: "
    if len(wide):
        first = wide.iloc[0]
        against = f"Against {line(first['kernel'], 60)} unquantised, {TIME.told(first)}: "
    return f"{against}{'; '.join(told)}."


def _saving(row: pd.Series[Any], wide: pd.Series[Any] | None) -> str:
    error = f"{percent(row['error_percent'] / 100)} error"
    name = line(row["format"], 40)
    if wide is None:
        return f"{name} {TIME.told(row)} at {error}"
    (low, high), (wide_low, wide_high) = TIME.ends(row), TIME.ends(wide)
    ratio, least, most = over(wide["median_us"], row["median_us"]), over(wide_low, high), over(wide_high, low)
    if low <= wide_high and wide_low <= high:
        return f"{name} cannot be told apart in time, at {error}"
    if ratio < 1:
        return f"{name} is slower, {time(row['median_us'])}, at {error}"
    return f"{name} is {times(ratio)} as fast ({plain_ratio(least)} to {plain_ratio(most)}) at {error}"


def draw(panel: pd.DataFrame, identity: str, hues: dict[str, str], note: str = "") -> Figure:
    """One panel of `data`. hues: a colour by format. note: what the page left out."""
    shown = panel.reset_index(drop=True)
    found = front.front(shown, ERROR, TIME)
    caption = (
        f"{finding(shown)} Error is the distance of the output from the unquantised one, relative to its size, on activations with outlier "
        "channels; it is the format's far more than the kernel's. Further left is closer to the unquantised output, further down is "
        "faster; bars are 95% intervals. The line joins what nothing beats in both; a small mark is clearly beaten. klab choose "
        "--max-error picks the fastest to the left of a limit."
    )
    if (shown["origin"] != "measured").any():
        caption += " Hollow marks are published by others and do not compete."
    traces: list[dict[str, Any]] = [front.line_trace(shown, found, ERROR, TIME)]
    for (name, _), rows in grouped(shown.itertuples(), "format", "origin").items():
        traces.append(front.mark_trace(rows, found, ERROR, TIME, name, hues[name], [mark(row.backend) for row in rows]))
    # A little to the left of 0, so that the marks of the problem itself are whole.
    widest = max(shown["error_percent"].max(), 0.01)
    shape = layout(
        xaxis=axis("error against the unquantised output, %", exponentformat="none", range=[-0.04 * widest, 1.08 * widest]),
        yaxis=log_axis("time per launch, µs", [value for name in TIME.columns for value in shown[name]]),
        showlegend=True,
    )
    table = shown.drop(columns=["backend", "kernel_id", "panel"])
    return Figure(
        identity,
        TITLE,
        f"{caption} {note}".strip(),
        traces,
        even_legend(shape),
        table=table,
        variant=shown["panel"].iloc[0],
        derive="front",
    )


def figures(story: Story, frame: pd.DataFrame) -> list[Figure]:
    """One per chip and problem of which narrower formats were measured; of each chip in turn the problem with most marks."""
    found = data(frame)
    hues = {
        name: PALETTE[n % len(PALETTE)] for n, name in enumerate(sorted(set(found["format"]), key=lambda one: (one != UNQUANTISED, one)))
    }
    by_chip = [list(part.groupby("panel", sort=False)) for _, part in found.groupby("chip")]
    panels = [one for turn in zip_longest(*by_chip) for one in turn if one is not None]
    note = f"{PANELS} of {len(panels)} problems have a figure: those with most marks." if len(panels) > PANELS else ""
    return [draw(panel, f"error-{n}", hues, note) for n, (_, panel) in enumerate(panels[:PANELS])]
