"""What the least energy costs in time: over all problems of a chip, the thriftiest beside the fastest."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from klab.harness.report.figures.front import TIME, Way, over
from klab.harness.report.figures.style import INK, PALETTE, Figure, axis, digits, grouped, layout, mark, marks, short
from klab.harness.report.frames import DIMS
from klab.harness.report.subject import Story
from klab.harness.report.units import energy, percent, time
from klab.harness.store.result import Status
from klab.harness.watch.wording import line

if TYPE_CHECKING:
    import pandas as pd

TITLE = "What the least energy costs in time"
ENERGY = Way("energy_j", "energy_low_j", "energy_high_j", "energy", "J")
EXTRA = Way("extra_percent", "extra_low_percent", "extra_high_percent", "more time", "%")
SAVED = Way("saved_percent", "saved_low_percent", "saved_high_percent", "less energy", "%")
# Marks of a page, all chips together, and the fewest of one chip: those that save most joules.
MOST, FEWEST = 1000, 40
KEPT = (
    *DIMS, "origin", "problem", "config", "chosen", "median_us", "low_us", "high_us", "energy_j", "energy_low_j", "energy_high_j",
    "power_w", "sm_clock_mhz", "backend", "kernel_id", "problem_key",
)  # fmt: skip
COLUMNS = (
    *DIMS, "problem", "fastest", "fastest_config", "fastest_us", "fastest_j", "thriftiest", "thriftiest_config", "thriftiest_us",
    "thriftiest_j", *EXTRA.columns, "extra_us", *SAVED.columns, "saved_j", "saved_low_j", "saved_high_j", "clear", "slower", "backend",
    "problem_key",
)  # fmt: skip


@dataclass(frozen=True)
class Price:
    """The thriftiest against the fastest. extra: the share of time that it takes more; saved: the share of energy, saved_j: the joules
    that it takes less; each with its ends at their worst. clear: the intervals of energy lie apart; slower: those of time do.
    """

    extra: tuple[float, float, float]
    saved: tuple[float, float, float]
    saved_j: tuple[float, float, float]
    clear: bool
    slower: bool


NOTHING = Price((0.0, 0.0, 0.0), (0.0, 0.0, 0.0), (0.0, 0.0, 0.0), clear=False, slower=False)


def metered(frame: pd.DataFrame, settings: Mapping[str, str] | None = None) -> pd.DataFrame:
    """The rows with a time and an energy, fastest first. settings: by `key`, a clock or power limit that was set for the row, which
    then stands in its `config`.
    """
    fine = frame[_timed(frame) & frame["energy_j"].between(0, math.inf, inclusive="neither")].sort_values("median_us", kind="stable")
    configs = [" ".join([config, (settings or {}).get(key, "")]).strip() for config, key in zip(fine["config"], fine["key"], strict=True)]
    return fine.assign(config=configs)[list(KEPT)].reset_index(drop=True)


def data(rows: pd.DataFrame, frame: pd.DataFrame) -> pd.DataFrame:
    """Of the rows of `metered`: COLUMNS, a row per chip and problem with at least two measured candidates; most joules saved first.

    frame: of `frames.standing`. A problem of which a clearly faster row has no energy is left out: its fastest is not known.
    """
    import pandas as pd

    timed = frame[_timed(frame) & (frame["origin"] == "measured")]
    highest = timed.assign(high_us=timed["high_us"].fillna(timed["median_us"]))
    quickest = highest.groupby(["chip", "problem_key"])["high_us"].min().to_dict()
    groups: dict[tuple[str, str], list[Any]] = {}
    for row in rows[rows["origin"] == "measured"].itertuples():
        groups.setdefault((str(row.chip), str(row.problem_key)), []).append(row)
    found = []
    for place, group in groups.items():
        fast, thrifty = group[0], min(group, key=lambda row: float(row.energy_j))
        if len(group) < 2 or quickest[place] < TIME.ends(fast)[0]:
            continue
        one = NOTHING if fast is thrifty else price(fast, thrifty)
        found.append(
            {name: getattr(thrifty, name) for name in (*DIMS, "problem", "backend", "problem_key")}
            | {"kernel": tuple(dict.fromkeys((fast.kernel, thrifty.kernel)))}
            | {f"fastest{end}": getattr(fast, name) for end, name in _SIDES}
            | {f"thriftiest{end}": getattr(thrifty, name) for end, name in _SIDES}
            | dict(zip(EXTRA.columns, (100 * share for share in one.extra), strict=True))
            | dict(zip(SAVED.columns, (100 * share for share in one.saved), strict=True))
            | dict(zip(("saved_j", "saved_low_j", "saved_high_j"), one.saved_j, strict=True))
            | {"extra_us": thrifty.median_us - fast.median_us, "clear": one.clear, "slower": one.slower}
        )
    prices = pd.DataFrame(found, columns=list(COLUMNS))
    return prices.sort_values("saved_j", ascending=False, kind="stable").reset_index(drop=True)


_SIDES = (("", "kernel"), ("_config", "config"), ("_us", "median_us"), ("_j", "energy_j"))


def price(fast: Any, thrifty: Any) -> Price:
    """Of two rows of `metered`, with its columns as attributes."""
    (t_low, t_high), (fast_low, fast_high) = TIME.ends(thrifty), TIME.ends(fast)
    (e_low, e_high), (much_low, much_high) = ENERGY.ends(thrifty), ENERGY.ends(fast)
    t, t_fast, e, much = (float(getattr(row, name)) for name in ("median_us", "energy_j") for row in (thrifty, fast))
    return Price(
        (t / t_fast - 1, over(t_low, fast_high) - 1, over(t_high, fast_low) - 1),
        (1 - e / much, 1 - over(e_high, much_low), 1 - over(e_low, much_high)),
        (much - e, much_low - e_high, much_high - e_low),
        clear=e_high < much_low,
        slower=fast_high < t_low,
    )


def finding(prices: pd.DataFrame, chip: str) -> str:
    """What the prices of one chip say."""
    other = prices[prices["saved_j"] > 0]
    clear = other[other["clear"]]
    count = len(prices)
    if not len(other):
        return f"On {chip} the fastest uses the least energy on {'the one problem' if count == 1 else f'all {count} problems'} compared."
    whole = f"On {chip} the fastest is not the thriftiest on {len(other)} of {count} problem{'' if count == 1 else 's'}"
    if not len(clear):
        return f"{whole} by the medians, but the 95% intervals of energy overlap on each: no saving can be told apart."
    top = clear.iloc[0]
    free = int((~clear["slower"].astype(bool)).sum())
    several = len(clear) > 1
    text = (
        f"{whole}, clearly so (the 95% intervals of energy lie apart) on {len(clear)}: {'a median of ' if several else ''}"
        f"{percent(statistics.median(clear['saved_percent']) / 100)} less energy{_range(clear['saved_percent'])}"
        f"{', ' + energy(statistics.median(clear['saved_j'])) + ' per launch,' if several else ''} for "
        f"{percent(statistics.median(clear['extra_percent']) / 100)} more time{_range(clear['extra_percent'])}."
    )
    if free:
        text += f" On {free} of these the times cannot be told apart: there the saving costs no time that was seen."
    thrifty, fast = (named(top[side], top[f"{side}_config"]) for side in ("thriftiest", "fastest"))
    return (
        f"{text} {'The most joules: ' if several else ''}{line(top['problem'], 80)}, where {thrifty} instead of {fast} saves "
        f"{energy(top['saved_j'])} ({energy(top['saved_low_j'])} to {energy(top['saved_high_j'])}) of {energy(top['fastest_j'])} for "
        f"{time(top['extra_us'])} more."
    )


def named(kernel: str, config: str) -> str:
    """A candidate in a sentence."""
    return line(kernel if config in ("", "-") else f"{kernel} {config}", 100)


def _range(values: pd.Series[float]) -> str:
    return f" ({percent(min(values) / 100)} to {percent(max(values) / 100)} among them)" if len(values) > 1 else ""


def draw(prices: pd.DataFrame, identity: str, chip: str, most: int = MOST) -> Figure:
    """One chip: rows of `data`."""
    shown = prices.iloc[:most].reset_index(drop=True)
    caption = (
        f"{finding(prices, chip)} A mark is a problem: what its thriftiest candidate saves against its fastest, and the time that it takes "
        "more. At the lower left the fastest is the thriftiest. Bars: what both 95% intervals allow at their worst; below the line at 0 a "
        "saving is not sure."
    )
    if len(prices) > len(shown):
        caption += f" The {len(shown)} with most joules to save are drawn; {len(prices) - len(shown)} are left out."
    hues = {operator: PALETTE[n % len(PALETTE)] for n, operator in enumerate(sorted(set(prices["operator"])))}
    traces = [_marks(rows, operator, hues[operator]) for (operator,), rows in grouped(shown.itertuples(), "operator").items()]
    zero = {"type": "line", "xref": "paper", "x0": 0, "x1": 1, "y0": 0, "y1": 0, "line": {"color": INK, "width": 1, "dash": "dot"}}
    shape = layout(
        xaxis=axis("more time than the fastest, %"), yaxis=axis("less energy than the fastest, %"), shapes=[zero], showlegend=True
    )
    table = shown.drop(columns=["backend", "problem_key"])
    return Figure(identity, TITLE, caption, traces, shape, table=table, variant=chip)


def _marks(rows: list[Any], operator: str, hue: str) -> dict[str, Any]:
    trace = {
        "type": "scatter",
        "mode": "markers",
        "name": short(operator),
        "x": digits(row.extra_percent for row in rows),
        "y": digits(row.saved_percent for row in rows),
        "error_x": EXTRA.bars(rows) | {"width": 0, "thickness": 1},
        "error_y": SAVED.bars(rows) | {"width": 0, "thickness": 1},
        "customdata": [_told(row) for row in rows],
        "hovertemplate": "<b>%{customdata[0]}</b><br>fastest: %{customdata[1]}<br>thriftiest: %{customdata[2]}<br>"
        "%{y:.1f}% less energy, %{x:.1f}% more time<extra></extra>",
        "marker": {"color": hue, "symbol": [mark(row.backend) for row in rows], "size": 9},
    }
    return marks(trace, [row.Index for row in rows])


def _told(row: Any) -> list[str]:
    fast = f"{short(row.fastest)} {short(row.fastest_config, 80)}, {time(row.fastest_us)}, {energy(row.fastest_j)}"
    thrifty = f"{short(row.thriftiest)} {short(row.thriftiest_config, 80)}, {time(row.thriftiest_us)}, {energy(row.thriftiest_j)}"
    return [short(row.problem, 80), fast, thrifty]


def _timed(frame: pd.DataFrame) -> pd.Series[bool]:
    return (frame["status"] == Status.OK.value) & frame["median_us"].between(0, math.inf, inclusive="neither")


def settings_of(story: Story) -> dict[str, str]:
    """By key of a Result, the clock or power limit that was set while it was measured."""
    limits = (("sm_clock_mhz", "MHz"), ("power_limit_w", "W"))
    rows = (row for subject in story.subjects for row in (*subject.rows, *subject.light))
    told = {row.key: " ".join(f"at {row.policy[name]:g} {unit}" for name, unit in limits if row.policy.get(name)) for row in rows}
    return {key: text for key, text in told.items() if text}


def overview(prices: pd.DataFrame, chips: Sequence[str]) -> list[Figure]:
    """Of rows of `data` a figure per chip, in this order; none for a chip of which nothing can be compared."""
    most = max(MOST // max(prices["chip"].nunique(), 1), FEWEST)
    by_chip = {str(chip): group.reset_index(drop=True) for chip, group in prices.groupby("chip")}
    return [draw(by_chip[chip], f"energy-price-{n}", chip, most) for n, chip in enumerate(chips) if chip in by_chip]
