"""The history of every series that `klab nightly` watches: a map of all, and a figure for each of those with news."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from klab.harness.report.curve import Curve, Historian, curves
from klab.harness.report.figures import history
from klab.harness.report.figures.history_table import LATELY, Known, changed_lately, nights_of, overview
from klab.harness.report.figures.history_words import map_finding, series_finding
from klab.harness.report.figures.style import Figure, distinct, marks
from klab.harness.report.subject import Story
from klab.harness.watch.changes import change_points
from klab.harness.watch.series import Call, Night
from klab.harness.watch.wording import line, name_of, ordered

if TYPE_CHECKING:
    import pandas as pd

MAP_TITLE, SERIES_TITLE = "All series, night by night", "The history of a series"
# Series of all chips that are looked at: finding the changes of one takes milliseconds.
MOST_SERIES = 300
# Figures of single series: a page of more is no page, and the night's own page has them all.
MOST_FIGURES = 40
# Cells of all maps, and nights of one figure: half a megabyte each.
MOST_CELLS, MOST_NIGHTS, LEAST_NIGHTS = 12_000, 90, 30
NONE_YET = "No night is recorded here. klab nightly measures the same series again and again, which makes a history; single runs make none."


def told(
    nights: Mapping[str, Sequence[Night]], changes: Historian = change_points, model: str = ""
) -> dict[str, tuple[list[Night], list[Curve]]]:
    """By chip, the nights that are drawn and the curves of their last night's series, those with news first.

    At most MOST_SERIES curves in all, the same number for every chip, and of so many nights that the maps have at most MOST_CELLS cells.
    model: only series of it, in the last night too. A chip without any series is left out.
    """
    known = {chip: (list(several), _of(several[-1], model)) for chip, several in nights.items() if several}
    known = {chip: (several, last) for chip, (several, last) in known.items() if last.verdicts}
    found: dict[str, tuple[list[Night], list[Curve]]] = {}
    for chip, (several, last) in known.items():
        verdicts = last.verdicts[: max(MOST_SERIES // len(known), 1)]
        most = min(MOST_NIGHTS, max(LEAST_NIGHTS, MOST_CELLS // max(len(known) * len(verdicts), 1)))
        before = several[-most:-1]
        by_series = curves([*before, dataclasses.replace(last, verdicts=verdicts)], changes)
        found[chip] = ([*before, last], sorted(by_series.values(), key=news))
    return found


def _of(night: Night, model: str) -> Night:
    """The night with the verdicts on a model's series (and on those of no model), what fails first."""
    mine = [one for one in night.verdicts if not model or not one.series.models or model in one.series.models]
    return dataclasses.replace(night, verdicts=tuple(ordered(mine)))


def news(curve: Curve) -> tuple[int, int]:
    """What series are ordered by: what the last night fails or doubts, then what changed its level lately, the latest first."""
    if Call(curve.places[-1].call) not in (Call.OK, Call.UNKNOWN, Call.FASTER):
        return (0, 0)
    ago = changed_lately(curve)
    return (1, ago) if ago is not None else (2, 0)


def draw_map(chip: str, nights: Sequence[Night], several: Sequence[Curve], identity: str, known: Known) -> Figure:
    """The map of one chip. Its table has a row per series, which all cells of a row of the map stand for."""
    drawn = history.draw_map(several, [one.at for one in nights], identity)
    table = overview(several, known)
    rows = [n for n, curve in enumerate(several) if len(curve.measured) > 1][: history.MAP_ROWS]
    traces = [marks(trace, [[row] * len(nights) for row in rows]) for trace in drawn.traces]
    caption = f"{map_finding(nights, several)} {drawn.caption}".strip()
    return dataclasses.replace(drawn, title=MAP_TITLE, variant=line(chip, 60), caption=caption, traces=traces, table=table)


def draw_series(curve: Curve, identity: str, variant: str, known: Known, note: str = "") -> Figure:
    """One series; its table has a row per night."""
    drawn = history.draw(curve, identity)
    levels, judged, *absent = drawn.traces
    without = sorted(set(range(len(curve.places))) - set(curve.measured))
    traces = [marks(levels, [n for first, last, _ in curve.levels for n in (first, last, last)]), marks(judged, curve.measured)]
    traces += [marks(one, without) for one in absent]
    caption = f"{series_finding(curve)} {history.HOW} {note}".strip()
    table = nights_of(curve, known)
    return dataclasses.replace(drawn, title=SERIES_TITLE, variant=variant, caption=caption, traces=traces, table=table)


def figures(story: Story, frame: pd.DataFrame, changes: Historian = change_points) -> list[Figure]:
    """A map per chip with nights, then the series with news first; without any night one figure that says what makes a history."""
    found = told(story.nights, changes, story.model)
    if not found:
        none = f"The last night watched no series{f' of {story.model}' if story.model else ''}." if any(story.nights.values()) else NONE_YET
        return [Figure("history-map", MAP_TITLE, "", empty=none)]
    known = Known.of(story, frame)
    drawn = [draw_map(chip, *found[chip], f"history-map-{n}", known) for n, chip in enumerate(found)]
    worth = sorted((curve for _, several in found.values() for curve in several if curve.measured), key=news)
    note = ""
    if len(worth) > MOST_FIGURES:
        note = (
            f"The menu has {MOST_FIGURES} of {len(worth)} series: what failed or is doubtful, then what changed in the last {LATELY} "
            "nights, then the first of the others."
        )
    shown = worth[:MOST_FIGURES]
    variants = distinct([line(name_of(curve.series), 90) for curve in shown])
    drawn += [draw_series(one, f"history-series-{n}", name, known, note) for n, (one, name) in enumerate(zip(shown, variants, strict=True))]
    return drawn
