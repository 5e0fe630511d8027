"""How fast the searches of a problem found what they found: the best so far against seconds of the device, one line per search or run."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from klab.harness.measure.stats import FLOOR_ROUNDS
from klab.harness.report.figures.front import TIME, over
from klab.harness.report.figures.search_journals import Recorded
from klab.harness.report.figures.search_spaces import NEAR, Space, trials
from klab.harness.report.figures.style import FAINT, INK, PALETTE, Figure, axis, layout, marks, plain
from klab.harness.report.units import interval, number, time, times
from klab.harness.store.result import Status

if TYPE_CHECKING:
    import pandas as pd

TITLE = "Best so far against device time"
# Lines per figure: those with most configurations.
LINES = 6
# A line with fewer configurations is no search.
LEAST = 4
JOURNAL, ROWS = "journal", "rows"
_COLUMNS = [
    "line", "source", "step", "seconds", "best_us", "configurations", "failed", "compile_s",
    "chip", "model", "phase", "operator", "dtype", "kernel", "status",
]  # fmt: skip
# Columns of `frames.standing` that are looked at.
NEEDED = (
    "chip", "model", "phase", "operator", "dtype", "kernel", "status", "kernel_id", "library", "origin", "chosen", "problem", "config_key",
    "run_id", "recorded_at", "median_us", "low_us", "high_us", "rounds", "gpu_s", "compile_s",
)  # fmt: skip

Times = tuple[float, float, float]
"""Microseconds: median, and its 95% interval."""


@dataclass(frozen=True)
class Goal:
    """What the lines are held against, where it is known: the winner (the choice, or where that is a library the best other kernel), the
    default configuration and the best library.
    """

    name: str
    winner: Times | None
    winner_name: str = ""
    default: Times | None = None
    library: Times | None = None
    library_kernel: str = ""


def data(rows: pd.DataFrame, recorded: Sequence[Recorded]) -> pd.DataFrame:
    """A row per place where a line begins, gets better or ends: line, source ("journal" or "rows"), step (begins, better, ends), seconds,
    best_us, configurations and failed (so far), compile_s (of rows, beside the seconds), and the columns of DIMS.

    rows: of `frames.standing`, of one problem on one chip, at least one. Each run is a line, whose seconds are those of timed rounds alone,
    in the order in which rows were recorded; libraries are no search. recorded: searches of that problem, whose seconds are all that the
    device was held for.
    """
    import pandas as pd

    shared = {name: rows[name].iloc[0] for name in ("chip", "model", "phase", "operator", "dtype")}
    found = [(f"{one.name}", JOURNAL, _of_journal(one)) for one in recorded]
    named: dict[str, int] = {}
    for n, (name, source, line) in enumerate(found):
        named[name] = named.get(name, 0) + 1
        if named[name] > 1:
            found[n] = (f"{name} ({named[name]})", source, line)
    own = trials(rows)
    own = own[~own["library"]]
    for run, part in own.sort_values("recorded_at", kind="stable").groupby("run_id", sort=False):
        found.append((f"run {run}", ROWS, _of_rows(part)))
    kept = [line for line in found if line[2] and line[2][-1]["configurations"] >= LEAST]
    kept = sorted(kept, key=lambda line: (line[1] != JOURNAL, -line[2][-1]["configurations"]))[:LINES]
    places = [{"line": name, "source": source, **place} for name, source, line in kept for place in line]
    kernels = tuple(sorted(set(rows["kernel"])))
    made = pd.DataFrame(places, columns=_COLUMNS)
    dims = shared | {"kernel": kernels, "status": Status.OK.value}
    return made.assign(**{name: [value] * len(made) for name, value in dims.items()})


def _of_journal(one: Recorded) -> list[dict[str, Any]]:
    def events() -> Iterable[tuple[object, float, float, bool, bool, float]]:
        for e in one.evaluations:
            yield e.candidate, e.spent_s, e.value, e.ok, e.rounds > 0, math.nan

    return _line(events())


def _of_rows(part: pd.DataFrame) -> list[dict[str, Any]]:
    def events() -> Iterable[tuple[object, float, float, bool, bool, float]]:
        columns = ("kernel_id", "config_key", "gpu_s", "median_us", "status", "rounds", "compile_s")
        for kernel, config, gpu_s, median, status, rounds, compile_s in part[list(columns)].itertuples(index=False, name=None):
            fine = status == Status.OK.value
            yield (kernel, config), gpu_s, median if fine else math.inf, fine, fine and rounds < FLOOR_ROUNDS, compile_s

    return _line(events())


def _line(events: Iterable[tuple[object, float, float, bool, bool, float]]) -> list[dict[str, Any]]:
    """events: (configuration, seconds, value, ok, of a short run, seconds of compiling). A full measurement outweighs any short run."""
    seen: set[object] = set()
    failed: set[object] = set()
    best, seconds, compiling = (True, math.inf), 0.0, 0.0
    places: list[dict[str, Any]] = []

    def place(step: str) -> dict[str, Any]:
        found = {"step": step, "seconds": seconds, "best_us": best[1], "configurations": len(seen), "failed": len(failed)}
        return found | {"compile_s": compiling}

    for configuration, spent_s, value, fine, short, compile_s in events:
        seconds += spent_s if math.isfinite(spent_s) else 0.0
        compiling += compile_s if math.isfinite(compile_s) else 0.0
        seen.add(configuration)
        if not fine:
            failed.add(configuration)
        elif (short, value) < best:
            best = (short, value)
            places.append(place("better" if places else "begins"))
    return [*places, place("ends")] if places else []


def goal(rows: pd.DataFrame, known: Iterable[Space]) -> Goal:
    """Of the rows of one problem on one chip. known: its spaces, which may know a default configuration."""
    fine = rows[(rows["status"] == Status.OK.value) & rows["median_us"].gt(0) & (rows["origin"] == "measured")]
    name = f"{rows['problem'].iloc[0]}, {rows['chip'].iloc[0]}"
    if fine.empty:
        return Goal(name, None)
    chosen = fine[fine["chosen"] & ~fine["library"]]
    own = chosen if len(chosen) else fine[~fine["library"]]
    winner = _fastest(own)
    libraries = fine[fine["library"]]
    library = _fastest(libraries)
    default = next((space.default for space in known if space.default is not None), None)
    which = "the choice" if len(chosen) else "the best that is no library"
    called = f"{which}, {winner['kernel']}" if winner is not None else ""
    return Goal(name, _ends(winner), called, _ends(default), _ends(library), str(library["kernel"]) if library is not None else "")


def _fastest(rows: pd.DataFrame) -> pd.Series[Any] | None:
    return rows.iloc[int(np.argmin(rows["median_us"].to_numpy()))] if len(rows) else None


def _ends(row: pd.Series[Any] | None) -> Times | None:
    if row is None:
        return None
    return float(row["median_us"]), *TIME.ends(row)


def draw(found: pd.DataFrame, goal: Goal, identity: str) -> Figure | None:
    """Steps down to the best. None without a line."""
    if found.empty:
        return None
    traces: list[dict[str, Any]] = []
    end = max(float(found["seconds"].max()), 1e-9)
    logarithmic = _logarithmic(found)
    first = float(found.loc[found["seconds"] > 0, "seconds"].min()) if (found["seconds"] > 0).any() else end
    span = [first / 1.5 if logarithmic else 0.0, end * (1.5 if logarithmic else 1.03)]
    if goal.winner:
        middle, low, high = goal.winner
        traces.append(_band(span, low, high))
        traces.append(_level(span, middle, goal.winner_name, "solid", PALETTE[2]))
    if goal.default:
        traces.append(_level(span, goal.default[0], "default configuration", "dash", INK))
    if goal.library:
        traces.append(_level(span, goal.library[0], f"best library, {goal.library_kernel}", "dot", INK))
    for n, name in enumerate(dict.fromkeys(found["line"])):
        at = np.flatnonzero(found["line"] == name).tolist()
        part = found.iloc[at]
        from_rows = part["source"].iloc[0] == ROWS
        extra = [_hover(row, from_rows) for row in part.to_dict("records")]
        trace = {
            "type": "scatter",
            "mode": "lines+markers",
            "name": plain(_short(name) + (": timed rounds alone" if from_rows else ": all device time")),
            "x": [max(s, span[0]) for s in part["seconds"]],
            "y": part["best_us"].tolist(),
            "customdata": extra,
            "hovertemplate": "<b>%{fullData.name}</b><br>%{y:.4g} µs after %{x:.3g} s<br>%{customdata}<extra></extra>",
            "line": {"shape": "hv", "width": 2, "color": HUES[n % len(HUES)], "dash": "dashdot" if from_rows else "solid"},
            "marker": {"size": 6, "symbol": SYMBOLS[n % len(SYMBOLS)], "color": HUES[n % len(HUES)]},
        }
        traces.append(marks(trace, at))
    across = axis("seconds of the device", type="log" if logarithmic else "linear", exponentformat="none", tickformat=".3~g")
    ratio = float(found["best_us"].max() / found["best_us"].min())
    up = axis("best so far, microseconds", type="log" if ratio > 5 else "linear", exponentformat="none", tickformat=".4~g")
    shape = layout(xaxis=across, yaxis=up, showlegend=True)
    return Figure(identity, TITLE, caption(found, goal), traces, shape, table=found, variant=goal.name)


def _hover(row: dict[Hashable, Any], from_rows: bool) -> str:
    beside = f"<br>{number(row['compile_s'])} s of compiling beside" if from_rows else ""
    return f"{row['configurations']} configurations, {row['failed']} failed{beside}"


HUES = (PALETTE[0], PALETTE[1], PALETTE[3], PALETTE[4], PALETTE[5], PALETTE[7])
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross", "x")


def _logarithmic(found: pd.DataFrame) -> bool:
    seconds = found.loc[(found["seconds"] > 0), "seconds"]
    return len(seconds) > 2 and bool(seconds.max() > 20 * seconds.min())


def _level(span: Sequence[float], us: float, name: str, dash: str, colour: str) -> dict[str, Any]:
    return {
        "type": "scatter", "mode": "lines", "name": plain(f"{_short(name)}: {time(us)}"), "x": list(span), "y": [us, us],
        "line": {"dash": dash, "width": 1.3, "color": colour}, "hoverinfo": "name",
    }  # fmt: skip


def _band(span: Sequence[float], low: float, high: float) -> dict[str, Any]:
    return {
        "type": "scatter", "mode": "lines", "name": "its 95% interval", "x": [span[0], span[1], span[1], span[0]],
        "y": [low, low, high, high], "fill": "toself", "fillcolor": "rgba(42,157,116,0.18)", "line": {"width": 0, "color": FAINT},
        "hoverinfo": "skip", "showlegend": False,
    }  # fmt: skip


def caption(found: pd.DataFrame, goal: Goal) -> str:
    """What there was to be found, how long each line took to come near it, and what the seconds are."""
    words = []
    if goal.winner:
        words.append(f"{_capital(goal.winner_name)}, takes {time(goal.winner[0])} ({interval(*goal.winner[1:])})")
        against = [
            _against(goal.winner, other, what)
            for other, what in ((goal.default, "the default configuration"), (goal.library, f"the best library, {goal.library_kernel}"))
            if other
        ]
        words[-1] += f": {' and '.join(against)}." if against else "."
    target = goal.winner[0] if goal.winner else float(found["best_us"].min())
    for name, part in found.groupby("line", sort=False):
        last = part.iloc[-1]
        near = within(part, target)
        came = f"within 5% of that after {number(near)} s" if math.isfinite(near) else "never within 5% of that"
        tried = f"{last['configurations']} configurations ({last['failed']} failed) in {number(last['seconds'])} s"
        words.append(f"{_capital(_short(name))}: {tried}, best {time(last['best_us'])}, {came}.")
    kinds = set(found["source"])
    if JOURNAL in kinds:
        words.append("Seconds of a search are all that the device was held for, by its journal.")
    if ROWS in kinds:
        words.append(
            "Seconds of a run are those of the timed rounds of its rows that stand, in the order in which they were recorded: warming up, "
            "checking, energy and failures are not in them, so they are the least; compiling is told apart. Rows that were measured again "
            "later are not in it."
        )
    words.append(
        "A step down is a better configuration. The band is the 95% interval of the solid level; a best of many is low by chance as well."
    )
    return " ".join(words)


def _against(winner: Times, other: Times, what: str) -> str:
    middle, low, high = (times(over(other[n], winner[m])) for n, m in ((0, 0), (1, 2), (2, 1)))
    return f"{middle} ({low} to {high}) as fast as {what}"


def within(part: pd.DataFrame, target_us: float) -> float:
    """Seconds until a line was, to stay, no more than 5% above `target_us`; infinite where it never was."""
    far = np.flatnonzero(part["best_us"] > NEAR * target_us)
    place = far[-1] + 1 if len(far) else 0
    return float(part["seconds"].iloc[place]) if place < len(part) else math.inf


def _short(value: object, longest: int = 44) -> str:
    text = str(value)
    return text if len(text) <= longest else f"{text[: longest - 1]}…"


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
