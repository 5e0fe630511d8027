"""Power, clock and temperature while a result was measured: what the sensors showed, round by round and in the sustained run."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from klab.harness.measure.stats import HARDWARE_THROTTLE
from klab.harness.report.figures.power_words import POINTS, RESULTS, caption, power_limit, reasons
from klab.harness.report.figures.style import INK, PALETTE, Figure, axis, layout, marks, plain
from klab.harness.report.frames import DIMS
from klab.harness.report.subject import Story
from klab.harness.store.result import Result, Status
from klab.kernels.contract import canonical_json

if TYPE_CHECKING:
    import pandas as pd

TITLE = "Power, clock and temperature"
POWER, CLOCK, HEAT_PANEL = "power", "SM clock", "temperature"
UNITS = {POWER: "W", CLOCK: "MHz", HEAT_PANEL: "°C"}
LEAST_SPAN = {CLOCK: 60.0, HEAT_PANEL: 6.0}
# Pixels: a panel, the gap between two of one axis, the gap that has an axis's numbers and title in it.
PANEL_PX, GAP_PX, TITLE_PX = 120, 16, 70
# Stretches of marked rounds that are shaded: the longest.
STRETCHES = 6
HUES = {POWER: PALETTE[1], CLOCK: PALETTE[0], HEAT_PANEL: PALETTE[6]}


def chosen(story: Story) -> list[Result]:
    """The results worth drawing, in order: of each problem and chip the chosen one and the best library, and every result that was
    throttled by the hardware; those that were throttled most come first, then the longest traces. Only results with readings of a sensor
    are among them.
    """
    found: dict[int, Result] = {}
    for subject in story.subjects:
        fine = [row for row in subject.fine if sensed(row)]
        newest = {(row.problem_key, row.kernel, canonical_json(row.config)): row for row in fine}
        wanted = [newest.get((c.wanted.problem_key, c.kernel, canonical_json(c.config))) for c in subject.profile.choices]
        libraries: dict[str, Result] = {}
        for row in fine:
            known = libraries.get(row.problem_key)
            if row.library and (known is None or (row.median_us or math.inf) < (known.median_us or math.inf)):
                libraries[row.problem_key] = row
        throttled = [row for row in subject.rows if any(row.marked)]
        found |= {id(row): row for row in (*throttled, *wanted, *libraries.values()) if row is not None and sensed(row)}
    return sorted(found.values(), key=lambda r: (-sum(r.marked) / max(len(r.marked), 1), -len(r.power_trace), -len(r.clocks_mhz), r.key))


def sensed(row: Result) -> bool:
    """True when some sensor was read."""
    return bool(row.power_trace) or any(value is not None for value in (*row.clocks_mhz, *row.temperatures_c))


def data(row: Result, dims: Mapping[str, Any], points: int = POINTS) -> pd.DataFrame:
    """A row per mark: panel, seconds, value (in the panel's unit), marked (the hardware slowed down; such a round does not count), reasons
    (in words), round (from 0; -1 in the sustained run) and the columns of DIMS.

    The seconds of a round are the sum of this result's timed launches up to its end: when it ran is not recorded, and other candidates had
    their rounds in between. Those of power are of the sustained run, which came after the rounds.
    """
    import pandas as pd

    ends = _ends_s(row)
    columns = ["panel", "seconds", "value", "marked", "reasons", "round"]
    lines: list[tuple[Any, ...]] = []
    for panel, values in ((CLOCK, row.clocks_mhz), (HEAT_PANEL, row.temperatures_c)):
        known = [n for n, value in enumerate(values[: len(ends)]) if value is not None]
        flags = [(_at(row.marked, n) or 0, _at(row.throttle_reasons, n)) for n in known]
        for place in thinned([float(values[n] or 0.0) for n in known], flags, points):
            n, (marked, mask) = known[place], flags[place]
            lines.append((panel, float(ends[n]), float(values[n] or 0.0), bool(marked), reasons(mask), n))
    power = [watts for _, watts in row.power_trace]
    for place in thinned(power, [None] * len(power), points):
        lines.append((POWER, row.power_trace[place][0], power[place], False, "", -1))
    made = pd.DataFrame(lines, columns=columns)
    return made.assign(**{name: [dims[name]] * len(made) for name in DIMS})


def thinned(values: Sequence[float], flags: Sequence[object], points: int) -> list[int]:
    """Positions of the points to draw, ascending: without those in the midst of a level (its line is the same without them), and of more
    than `points` the least and the greatest of each of points/2 stretches, the first and the last point.
    """
    last = len(values) - 1
    same = [n for n in range(1, last) if values[n - 1] == values[n] == values[n + 1] and flags[n - 1] == flags[n] == flags[n + 1]]
    level = set(same)
    kept = [n for n in range(len(values)) if n not in level]
    if len(kept) <= points:
        return kept
    stretches = np.array_split(np.array(kept[1:-1]), max((points - 2) // 2, 1))
    ends = {extreme for part in stretches for extreme in (min(part, key=values.__getitem__), max(part, key=values.__getitem__))}
    return sorted({kept[0], kept[-1], *(int(n) for n in ends)})


def _at(values: Sequence[Any], place: int) -> Any:
    return values[place] if place < len(values) else None


def draw(row: Result, table: pd.DataFrame, identity: str, variant: str, left_out: int = 0) -> Figure:
    """Clock and temperature above one another on a common axis, power below on its own; panels without a reading are left out."""
    panels = [panel for panel in (CLOCK, HEAT_PANEL, POWER) if (table["panel"] == panel).any()]
    rounds = [panel for panel in panels if panel != POWER]
    margin = {"l": 64, "r": 16, "t": 24, "b": 52}
    inner = sum(PANEL_PX for _ in panels) + GAP_PX * (len(rounds) > 1) + TITLE_PX * (len(panels) > len(rounds) > 0)
    shape = layout(height=inner + margin["t"] + margin["b"], margin=margin, showlegend=False, shapes=[], annotations=[])
    traces: list[dict[str, Any]] = []
    top = inner
    for place, panel in enumerate(panels):
        suffix = "" if place == 0 else str(place + 1)
        part = table[table["panel"] == panel]
        domain = [max((top - PANEL_PX) / inner, 0.0), top / inner]
        last = panel == (rounds[-1] if panel != POWER else POWER)
        top -= PANEL_PX + (TITLE_PX if last else GAP_PX)
        title = ("seconds of its own timed launches" if panel != POWER else "seconds of the sustained run after them") if last else ""
        shape[f"yaxis{suffix}"] = axis(f"{panel}, {UNITS[panel]}", domain=domain, anchor=f"x{suffix}", range=_span(part, panel, row))
        shape[f"xaxis{suffix}"] = axis(title, anchor=f"y{suffix}", rangemode="tozero", showticklabels=last)
        if panel != POWER and place > 0:
            shape[f"xaxis{suffix}"]["matches"] = "x"
        at = part.index.tolist()
        traces.append(marks(_line(part, panel, suffix), at))
        if panel == POWER:
            _levels(row, shape, suffix)
        elif place == 0:
            _slowdowns(row, shape, suffix)
    return Figure(identity, TITLE, caption(row, left_out), traces, shape, table=table, variant=variant)


def _span(part: pd.DataFrame, panel: str, row: Result) -> list[float]:
    """The axis: power from 0 and with the limit; the others no narrower than the panel's LEAST_SPAN, so that a flicker looks like one."""
    low, high = float(part["value"].min()), float(part["value"].max())
    if panel == POWER:
        limit = _limit_shown(row)
        return [0.0, 1.12 * max(high, limit or 0.0)]
    missing = max(LEAST_SPAN[panel] - (high - low), 0.0) / 2
    pad = 0.08 * max(high - low, LEAST_SPAN[panel])
    return [low - missing - pad, high + missing + pad]


def _slowdowns(row: Result, shape: dict[str, Any], suffix: str) -> None:
    """A shade and words over each stretch of marked rounds."""
    ends = _ends_s(row)
    stretches: list[list[int]] = []
    for n in np.flatnonzero(np.array(row.marked[: len(ends)], dtype=bool)).tolist():
        if stretches and stretches[-1][-1] == n - 1:
            stretches[-1].append(n)
        else:
            stretches.append([n])
    for stretch in sorted(stretches, key=len, reverse=True)[:STRETCHES]:
        begin = float(ends[stretch[0] - 1]) if stretch[0] else 0.0
        masks = [_at(row.throttle_reasons, n) or 0 for n in stretch]
        words = reasons(int(np.bitwise_or.reduce(masks)) & HARDWARE_THROTTLE) or "slowed down"
        end = float(ends[stretch[-1]])
        shape["shapes"].append({
            "type": "rect", "xref": f"x{suffix}", "yref": f"y{suffix} domain", "x0": begin, "x1": end, "y0": 0, "y1": 1,
            "fillcolor": PALETTE[5], "opacity": 0.15, "line": {"width": 0},
        })  # fmt: skip
        shape["annotations"].append({
            "xref": f"x{suffix}", "yref": f"y{suffix} domain", "x": (begin + end) / 2, "y": 0.97, "yanchor": "top",
            "text": words, "showarrow": False, "font": {"size": 10, "color": INK},
        })  # fmt: skip


def _ends_s(row: Result) -> NDArray[np.float64]:
    """(rounds,) seconds of this result's own timed launches up to the end of each round."""
    ends: NDArray[np.float64] = np.cumsum(np.array(row.samples_us, dtype=np.float64)) * max(row.launches_per_round, 1) / 1e6
    return ends


def _line(part: pd.DataFrame, panel: str, suffix: str) -> dict[str, Any]:
    unit = UNITS[panel]
    marked = part["marked"].tolist()
    shown = len(part) <= 60 or any(marked)
    return {
        "type": "scatter",
        "mode": "lines+markers" if shown else "lines",
        "name": panel,
        "x": part["seconds"].tolist(),
        "y": part["value"].tolist(),
        "xaxis": f"x{suffix}",
        "yaxis": f"y{suffix}",
        "text": [plain(words) for words in part["reasons"]],
        "hovertemplate": f"{panel} %{{y:.4g}} {unit} after %{{x:.3g}} s<br>%{{text}}<extra></extra>",
        "line": {"width": 1.6, "color": HUES[panel], "shape": "linear"},
        "marker": {
            "size": [8 if one else 4 for one in marked],
            "color": HUES[panel],
            "symbol": ["circle-open" if one else "circle" for one in marked],
        },
    }


def _levels(row: Result, shape: dict[str, Any], suffix: str) -> None:
    """Lines for idle power and the power limit, where they are known."""
    for watts, words in ((row.idle_power_w, "idle"), (_limit_shown(row), "limit")):
        if watts is None:
            continue
        shape["shapes"].append({
            "type": "line", "xref": f"x{suffix} domain", "yref": f"y{suffix}", "x0": 0, "x1": 1, "y0": watts, "y1": watts,
            "line": {"color": INK, "width": 1.2 if words == "limit" else 0.8, "dash": "dash" if words == "limit" else "dot"},
        })  # fmt: skip
        shape["annotations"].append({
            "xref": f"x{suffix} domain", "yref": f"y{suffix}", "x": 1, "y": watts, "xanchor": "right", "yanchor": "bottom",
            "text": f"{words} {watts:.0f} W", "showarrow": False, "font": {"size": 10, "color": INK},
        })  # fmt: skip


def _limit_shown(row: Result) -> float | None:
    """The power limit, unless a line there would press the data to the floor."""
    limit = power_limit(row)
    return limit if limit and limit <= 2.5 * max((power for _, power in row.power_trace), default=0.0) else None


def figures(story: Story, frame: pd.DataFrame) -> list[Figure]:
    """One per chosen result with a sensor's reading; where there are results and none has one, a figure that says so."""
    rows = chosen(story)
    if not rows:
        return _nothing(story, frame)
    shown = frame[frame["key"].isin([row.key for row in rows])]
    places = {(one["chip"], one["key"], one["status"]): {name: one[name] for name in DIMS} for one in shown.to_dict("records")}
    made = []
    names: dict[str, int] = {}
    for n, row in enumerate(rows[:RESULTS]):
        dims = places[(row.chip, row.key, row.status.value)]
        name = f"{row.problem_label}, {row.kernel.partition('/')[2]}, {row.chip}"
        names[name] = names.get(name, 0) + 1
        variant = name if names[name] == 1 else f"{name} ({names[name]})"
        made.append(draw(row, data(row, dims), f"power-{n}", variant, max(len(rows) - RESULTS, 0)))
    return made


def _nothing(story: Story, frame: pd.DataFrame) -> list[Figure]:
    own = frame[(frame["origin"] == "measured") & (frame["status"] == Status.OK.value)]
    if own.empty:
        return []
    told = ", ".join(_first(reason for reason in own["energy_reason"] if reason))
    empty = f"No result has a reading of power, clock or temperature{f': {told}' if told else ''}."
    return [
        Figure("power", TITLE, "A GPU's sensors are read in every round, and its power in sustained runs (klab run --energy).", empty=empty)
    ]


def _first(texts: Iterable[str], most: int = 2) -> list[str]:
    return list(dict.fromkeys(texts))[:most]
