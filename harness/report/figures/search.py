"""The search landscape of a problem: every configuration that was tried as a line through its parameters to its time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from klab.harness.report.figures import search_failures, search_importance, search_progress
from klab.harness.report.figures.front import TIME, over
from klab.harness.report.figures.search_journals import journals
from klab.harness.report.figures.search_spaces import NEAR, Parameter, Space, dims, is_number, spaces, word
from klab.harness.report.figures.style import Figure, layout, marks, plain
from klab.harness.report.subject import Story
from klab.harness.report.units import interval, time, times
from klab.kernels.contract import Json

if TYPE_CHECKING:
    import pandas as pd

TITLE = "Search landscape"
# Lines of all landscapes of a page, and of one: the page must stay small, and more lines than this hide one another.
LINES, MOST_LINES = 5000, 1500
AXES = 11
# A parameter of more values has an axis of numbers instead of one with a place for each value.
PLACES = 16
LONGEST_REASON = 120
# Configurations from which the importance of parameters is estimated, over all spaces of a page.
WEIGHED = 1600
# From fast to slow, and what failed: hues that stand out on white and on near-black and differ for the colour-blind.
FAST, MIDDLE, SLOW, FAILED = "#2f6fd0", "#9a86b8", "#e07b39", "#8b919b"
# On the axis of times, the part above the slowest that belongs to failures.
ABOVE = 0.25
# At each place of an axis lines are spread over so much of the way to the next, by how fast they are.
SPREAD = 0.6


def data(space: Space, lines: int = MOST_LINES) -> pd.DataFrame:
    """A row per line that is drawn: its parameters, median_us, low_us, high_us (95%), chosen, reason and the columns of DIMS.

    Of more configurations than `lines`, a quarter of the lines goes to the fastest and the others are spread evenly over the ranks of the
    rest; of the failures (in the order of their rows) as large a part is shown as of the configurations with a time.
    """
    import pandas as pd

    rows = space.tried.iloc[thinned(space.times_us, lines)]
    own = {_column(p): [_plain(p.values[code]) for code in p.codes[rows.index]] for p in space.parameters}
    shown = pd.DataFrame(own, index=rows.index)
    for name in ("median_us", "low_us", "high_us", "chosen"):
        shown[name] = rows[name]
    shown["reason"] = rows["reason"].str.slice(0, LONGEST_REASON)
    for name, value in dims(space).items():
        shown[name] = [value] * len(shown)
    shown["status"] = rows["status"]
    return shown


def thinned(times_us: NDArray[np.float64], lines: int) -> NDArray[np.intp]:
    """Positions of the configurations to draw, ascending: all where they are no more than `lines`."""
    if len(times_us) <= lines:
        return np.arange(len(times_us))
    order = np.argsort(times_us, kind="stable")  # NaN, what failed, comes last
    fine = int(np.isfinite(times_us).sum())
    for_fine = min(fine, round(lines * fine / len(times_us)))
    fastest = order[: min(fine, for_fine // 4)]
    rest, failed = order[len(fastest) : fine], order[fine:]
    return np.sort(np.concatenate([fastest, _spread(rest, for_fine - len(fastest)), _spread(failed, lines - for_fine)]))


def _spread(positions: NDArray[np.intp], count: int) -> NDArray[np.intp]:
    """So many of them, evenly, both ends included."""
    at = np.linspace(0, len(positions) - 1, min(count, len(positions)))
    chosen: NDArray[np.intp] = positions[np.round(at).astype(int)]
    return chosen


def draw(space: Space, table: pd.DataFrame, identity: str, order: Sequence[str] = ()) -> Figure:
    """An axis per parameter and one for the time. order: names of parameters, those that matter most first (default: as they come)."""
    at = table.index.to_numpy()
    ranked = sorted(space.parameters, key=lambda p: list(order).index(p.name) if p.name in order else len(order))
    shown, hidden = ranked[:AXES], ranked[AXES:]
    place, ticks = _time_axis(space)
    rank = np.argsort(np.argsort(place, kind="stable"), kind="stable")[at] / max(len(place) - 1, 1)
    dimensions = [_dimension(p, at, SPREAD * (rank - 0.5)) for p in reversed(shown)]
    # Below zero, for what has the higher colour is drawn above: the fast ones are what one looks for.
    colour = np.where(space.fine[at], -rank, -1 - ABOVE)
    dimensions.append({
        "label": "time", "values": place[at].round(4).tolist(), "range": [-0.02, float(max(place.max(), 1.0)) + 0.02],
        "tickvals": [value for value, _ in ticks], "ticktext": [plain(text) for _, text in ticks],
    })  # fmt: skip
    trace: dict[str, Any] = {
        "type": "parcoords",
        "dimensions": dimensions,
        "line": {"color": colour.round(4).tolist(), "cmin": -1 - ABOVE, "cmax": 0.0, "colorscale": _scale()},
        "labelangle": 45,
        "labelfont": {"size": 11},
        "tickfont": {"size": 10},
        "rangefont": {"size": 1, "color": "rgba(0,0,0,0)"},
    }
    shape = layout(height=470, margin={"l": 84, "r": 40, "t": 96, "b": 20})
    told = table.reset_index(drop=True)
    words = caption(space, len(table), hidden, bool(order))
    return Figure(identity, TITLE, words, [marks(trace, range(len(told)))], shape, table=told, variant=space.name)


def _dimension(parameter: Parameter, at: NDArray[np.intp], aside: NDArray[np.float64]) -> dict[str, Any]:
    """One axis: a place per value, around which lines are moved `aside`; or the numbers themselves where there are many."""
    name = plain(search_importance.shortened(parameter.name, 18))
    words = [plain(search_importance.shortened(text, 14)) for text in parameter.words]
    if len(words) <= PLACES or not parameter.ordered or parameter.values[0] is None:
        ends = [-SPREAD / 2 - 0.02, len(words) - 1 + SPREAD / 2 + 0.02]
        step = -(-len(words) // PLACES)
        return {
            "label": name, "values": (parameter.codes[at] + aside).round(3).tolist(), "range": ends,
            "tickvals": list(range(0, len(words), step)), "ticktext": words[::step],
        }  # fmt: skip
    numbers = np.array(parameter.values, dtype=np.float64)
    return {"label": name, "values": numbers[parameter.codes[at]].tolist()}


def _time_axis(space: Space) -> tuple[NDArray[np.float64], list[tuple[float, str]]]:
    """(per configuration its place, ticks): times from 0 (the fastest) to 1 (the slowest), by logarithm where they span more than 5 times,
    and each status of failure above.
    """
    us, status = space.times_us, space.tried["status"].to_numpy()
    place, ticks = np.zeros(len(us)), []
    fine = space.fine
    if fine.any():
        low, high = float(us[fine].min()), float(us[fine].max())
        scale = np.log if high > 5 * low else (lambda value: value)
        width = float(scale(high) - scale(low)) or 1.0
        place[fine] = (scale(us[fine]) - scale(low)) / width
        between = np.exp(np.linspace(np.log(low), np.log(high), 5)) if high > 5 * low else np.linspace(low, high, 5)
        ticks = [(float((scale(value) - scale(low)) / width), time(float(value))) for value in (between if high > low else [low])]
    kinds = sorted(set(status[~fine]))
    for n, kind in enumerate(kinds):
        level = 1 + ABOVE * (n + 1) / len(kinds)
        place[status == kind] = level
        ticks.append((level, str(kind).replace("_", " ")))
    return place, ticks


def _scale() -> list[list[object]]:
    edge = ABOVE / (1 + ABOVE)
    return [
        [0.0, FAILED],
        [edge - 0.02, FAILED],
        [edge, SLOW],
        [edge + 0.65 * (1 - edge), MIDDLE],
        [edge + 0.9 * (1 - edge), FAST],
        [1.0, FAST],
    ]


def caption(space: Space, lines: int, hidden: Sequence[Parameter], ranked: bool) -> str:
    """What the search found, then how to read the lines."""
    total, fine, best = len(space.tried), space.fine, space.best
    words = [f"{total} configurations were tried and {_count(total - int(fine.sum()))} failed."]
    if best is None:
        words.append("None gave a checked time.")
    else:
        us = space.times_us[fine]
        ends = TIME.ends(best)
        middle = float(np.median(us))
        words[0] = f"The best of {total} configurations takes {time(best['median_us'])} ({interval(*ends)})"
        against = [f"the median one takes {times(over(middle, best['median_us']))} as long"]
        default = space.default
        if default is not None and default["config_key"] == best["config_key"]:
            against.append("it is the default")
        elif default is not None:
            low, high = TIME.ends(default)
            against.append(
                f"the default {times(over(default['median_us'], best['median_us']))} ({times(over(low, ends[1]))} to "
                f"{times(over(high, ends[0]))}) as long"
            )
        near = int((us <= NEAR * best["median_us"]).sum())
        words[0] += f": {', '.join(against)}. {near} of {len(us)} with a time are within 5% of it; {_count(total - len(us))} failed."
        words.append(f"It has {_settings(best['settings'], space.parameters)}.")
    words.append(
        "Each line is a configuration; what failed ends above the times, by how it failed. At each value the lines are spread, the fastest "
        "lowest; colour goes by rank, from the fastest (blue) to the slowest (orange), failures are grey. Drag along an axis to keep a "
        "part of it, click to let go, drag a name to move its axis."
        + (" The parameters that matter most stand next to the time." if ranked else "")
    )
    if space.constant:
        words.append(f"The same in all: {_pairs(space.constant)}.")
    if hidden:
        words.append(f"Without an axis, for they matter least: {', '.join(search_importance.shortened(p.name) for p in hidden)}.")
    if lines < total:
        words.append(f"Of the {total} lines {lines} are drawn: the fastest, and an even choice of the others.")
    if space.left_out:
        words.append(f"{space.left_out} rows were taken under other conditions (cache, threads, clock or power limit) and are not in it.")
    if space.others:
        words.append(f"No landscape for {space.others} smaller space{'' if space.others == 1 else 's'}.")
    return " ".join(words)


def _count(count: int) -> str:
    return str(count) if count else "none"


def _settings(settings: dict[str, Json], varying: Sequence[Parameter]) -> str:
    return _pairs({p.name: settings.get(p.name) for p in varying})


def _pairs(values: Any, most: int = 12) -> str:
    parts = [f"{search_importance.shortened(name)}={search_importance.shortened(word(value))}" for name, value in values.items()]
    return ", ".join(parts[:most]) + (f" and {len(parts) - most} more" if len(parts) > most else "")


def _column(parameter: Parameter) -> str:
    """A parameter's column in the table, which filters must not take for one of theirs."""
    return f"parameter {parameter.name}"


def _plain(value: Json) -> Json:
    """A value in the table: a number where it is one, else its word."""
    return value if is_number(value) else word(value)


def figures(story: Story, frame: pd.DataFrame) -> list[Figure]:
    """Of each of the richest spaces a landscape, what its parameters matter and what failed; of their problems, how the searches went."""
    found = spaces(frame, story)
    drawn: dict[str, list[Figure | None]] = {"landscape": [], "importance": [], "failed": [], "progress": []}
    lines = min(MOST_LINES, LINES // max(len(found), 1))
    for n, one in enumerate(found):
        weights = search_importance.data(one, WEIGHED // len(found))
        order = [str(name) for name in weights["parameter"] if name != search_importance.REST]
        drawn["landscape"].append(draw(one, data(one, lines), f"landscape-{n}", order))
        drawn["importance"].append(search_importance.draw(one, weights, f"importance-{n}"))
        drawn["failed"].append(search_failures.draw(one, search_failures.data(one), f"failed-{n}"))
    drawn["progress"] = _progress(story, frame, found)
    return [figure for several in drawn.values() for figure in several if figure is not None]


def _progress(story: Story, frame: pd.DataFrame, found: Sequence[Space]) -> list[Figure | None]:
    if not found:
        return []
    recorded = journals(story.sources)
    problems = dict.fromkeys((one.first("chip"), one.first("problem_key")) for one in found)
    made: list[Figure | None] = []
    places = frame.groupby(["chip", "problem_key"], sort=False).indices
    needed = frame[list(search_progress.NEEDED)]
    for n, (chip, problem) in enumerate(problems):
        rows = needed.iloc[places[chip, problem]]
        own = [one for one in recorded if (one.header.get("chip"), one.header.get("problem")) == (chip, problem)]
        known = [one for one in found if (one.first("chip"), one.first("problem_key")) == (chip, problem)]
        table = search_progress.data(rows, own)
        made.append(search_progress.draw(table, search_progress.goal(rows, known), f"progress-{n}"))
    return made
