"""Energy against time, problem by problem, with the front of what nothing beats in both."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

from klab.harness.report.figures import energy_price, front
from klab.harness.report.figures.energy_price import ENERGY, metered, named, price
from klab.harness.report.figures.front import TIME
from klab.harness.report.figures.style import Figure, Look, distinct, even_legend, grouped, layout, log_axis, looks
from klab.harness.report.subject import Story
from klab.harness.report.units import percent
from klab.harness.watch.wording import line

if TYPE_CHECKING:
    import pandas as pd

TITLE = "Energy against time"
# Problems of a page that have a figure of their own, and marks of one figure.
PANELS, MARKS = 24, 80
# Chips without energy that are named together.
CHIPS = 6


def finding(panel: pd.DataFrame) -> str:
    """Of one problem on one chip (rows of `energy_price.metered`): does the fastest use the least, and what does the alternative cost?"""
    own = panel[panel["origin"] == "measured"]
    if len(own) < 2:
        return (
            "One candidate alone has a measured energy: there is nothing to compare it with."
            if len(own)
            else "No energy was measured here."
        )
    fast, thrifty = own.iloc[0], own.sort_values("energy_j", kind="stable").iloc[0]
    if fast.name == thrifty.name:
        return f"The fastest uses the least energy too: {_named(fast)}, {TIME.told(fast)} and {ENERGY.told(fast)} per launch."
    one = price(fast, thrifty)
    text = (
        f"{_named(thrifty)} uses {_share(one.saved)} less energy than the fastest, {_named(fast)}, and {_share(one.extra)} more time: "
        f"{ENERGY.told(thrifty)} in {TIME.told(thrifty)} against {ENERGY.told(fast)} in {TIME.told(fast)}."
    )
    doubts = [name for name, sure in (("energies", one.clear), ("times", one.slower)) if not sure]
    return f"{text} Their {' and '.join(doubts)} cannot be told apart." if doubts else text


def draw(panel: pd.DataFrame, identity: str, look: Mapping[str, Look], variant: str = "", note: str = "") -> Figure:
    """One problem on one chip: rows of `energy_price.metered`. note: what the page left out."""
    shown = _drawn(panel)
    found = front.front(shown, TIME, ENERGY)
    caption = (
        f"{finding(panel)} A mark is a configuration: further left is faster, further down uses less energy; bars are 95% intervals. The "
        "line joins what nothing beats in both by the medians; a small mark is clearly beaten by another."
    )
    if (shown["origin"] != "measured").any():
        caption += " Hollow marks are published by others and do not compete."
    if len(panel) > len(shown):
        caption += f" The {len(shown)} drawn are those on the line and the fastest; {len(panel) - len(shown)} are left out."
    traces: list[dict[str, Any]] = [front.line_trace(shown, found, TIME, ENERGY)]
    for (kernel, _), rows in grouped(shown.itertuples(), "kernel_id", "origin").items():
        seen = look[kernel]
        traces.append(front.mark_trace(rows, found, TIME, ENERGY, rows[0].kernel, seen.colour, seen.symbol))
    shape = layout(
        xaxis=log_axis("time per launch, µs", shown["median_us"]),
        yaxis=log_axis("energy per launch, J", shown["energy_j"]),
        showlegend=True,
    )
    table = shown.drop(columns=["backend", "kernel_id", "problem_key"])
    return Figure(identity, TITLE, f"{caption} {note}".strip(), traces, even_legend(shape), table=table, variant=variant, derive="front")


def _drawn(panel: pd.DataFrame) -> pd.DataFrame:
    """All rows where they are no more than MARKS, else those on the front's line and of the others the fastest, in the panel's order."""
    if len(panel) <= MARKS:
        return panel.reset_index(drop=True)
    on_line = set(front.line(panel, TIME, ENERGY))
    others = [n for n in range(len(panel)) if n not in on_line]
    return panel.iloc[sorted([*on_line, *others[: max(MARKS - len(on_line), 0)]])].reset_index(drop=True)


def missing(frame: pd.DataFrame) -> str:
    """Why there is no energy to compare in these rows of one chip, in a sentence; "" where none of them was measured on it."""
    own = frame[(frame["origin"] == "measured") & frame["median_us"].notna()]
    if own["energy_j"].notna().any():
        return "Energy was measured for one candidate of each problem alone: there is nothing to compare it with."
    reasons = Counter(line(reason, 200) for reason in own["energy_reason"] if reason)
    if not len(own):
        return ""
    return f"No energy was measured: {reasons.most_common(1)[0][0] if reasons else 'no reason was recorded'}."


def _share(one: tuple[float, float, float]) -> str:
    return f"{percent(one[0])} ({percent(one[1])} to {percent(one[2])})"


def _named(row: pd.Series[Any]) -> str:
    return named(row["kernel"], row["config"])


def figures(story: Story, frame: pd.DataFrame) -> list[Figure]:
    """What the least energy costs, over all problems of each chip; then single problems, of each chip in turn the one where the fastest
    is dearest, then those with most candidates; and why a chip has none.
    """
    rows = metered(frame, energy_price.settings_of(story))
    look = looks(frame)
    prices = energy_price.data(rows, frame)
    saved = {(chip, key): float(much) for chip, key, much in zip(prices["chip"], prices["problem_key"], prices["saved_j"], strict=True)}
    places: dict[str, dict[str, list[int]]] = {}
    for n, (chip, key) in enumerate(zip(rows["chip"], rows["problem_key"], strict=True)):
        places.setdefault(chip, {}).setdefault(key, []).append(n)
    labels = rows["problem"].tolist()
    found: list[list[tuple[str, list[int]]]] = []
    without: dict[str, list[str]] = {}
    for chip in (subject.chip for subject in story.subjects):
        panels = [(key, at) for key, at in places.get(chip, {}).items() if len(at) > 1]
        panels.sort(key=lambda one: (-saved.get((chip, one[0]), 0.0), -len(one[1]), labels[one[1][0]]))
        if not panels:
            why = missing(frame[frame["chip"] == chip])
            without.setdefault(why, []).extend([line(chip, 40)] * bool(why))
        found.append([(f"{chip}: {line(labels[at[0]], 100)}", at) for _, at in panels])
    several = [one for turn in zip_longest(*found) for one in turn if one is not None]
    note = ""
    if len(several) > PANELS:
        note = f"{PANELS} problems have a figure, of each chip in turn where most joules can be saved; {len(several) - PANELS} have none."
    names = distinct([name for name, _ in several])
    drawn = [draw(rows.iloc[at], f"energy-{n}", look, names[n], note) for n, (_, at) in enumerate(several[:PANELS])]
    for n, (why, chips) in enumerate((why, chips) for why, chips in without.items() if why):
        some = ", ".join(chips[:CHIPS]) + (f" and {len(chips) - CHIPS} more" if len(chips) > CHIPS else "")
        drawn.append(Figure(f"energy-none-{n}", TITLE, "", empty=f"{why} ({some})", variant=some))
    return [*energy_price.overview(prices, [subject.chip for subject in story.subjects]), *drawn]
