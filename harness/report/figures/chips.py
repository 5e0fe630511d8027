"""Chip against chip: the time (or energy) of one over that of the other, problem by problem, with geometric means per operator."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING

from klab.harness.report.figures.chips_draw import Sides, draw
from klab.harness.report.figures.style import Figure
from klab.harness.report.subject import Story

if TYPE_CHECKING:
    import pandas as pd

# The pair that is asked for most stands first, the older chip as the base.
FIRST = ("h200", "b200")
# Pairs per kind of evidence, and the chips among which they are looked for: those with most problems.
MOST_PAIRS, MOST_CHIPS = 3, 16
# Problems of one pair; beyond it those that take longest count.
MOST_PROBLEMS = 600
TITLE = "Chip against chip"
METRICS = {"time": ("median_us", "low_us", "high_us"), "energy": ("energy_j", "energy_low_j", "energy_high_j")}
BASIS = {
    "measured": (
        "Rests on klab's own measurements, of each chip the chosen kernel. A board can differ from the next of its kind by 5%, which no "
        "interval here covers."
    ),
    "reference": (
        "Rests on published rows alone, of each chip the fastest kernel: means without an interval, measured by others. A time measured "
        "here over a published one is no ratio that klab shows."
    ),
}


@dataclass(frozen=True)
class Pair:
    """Two chips that share problems in one kind of evidence: `b` is held against `a`."""

    origin: str
    metric: str
    a: str
    b: str
    shared: int


def known(frame: pd.DataFrame, metric: str = "time") -> pd.DataFrame:
    """Of each machine, problem and origin the one row that stands for it: the chosen kernel's, of published rows the fastest.

    `machine` is the chip, of a CPU with its device: two CPUs are two machines.
    """
    value, *_ = METRICS[metric]
    fine = frame[(frame["status"] == "ok") & (frame[value] > 0) & (frame["chosen"] | (frame["origin"] == "reference"))]
    cpu = fine["chip"] == "cpu"
    fine = fine.assign(machine=fine["chip"].where(~cpu, fine["chip"] + " (" + fine["device"].astype(str) + ")"))
    return fine.sort_values("median_us", kind="stable").drop_duplicates(["origin", "machine", "problem_key"])


def pairs(rows: pd.DataFrame, metric: str) -> list[Pair]:
    """The pairs that are shown, of `known` rows: H200 and B200 first, CPUs last, else those that share most problems.

    MOST_PAIRS of each origin, among the MOST_CHIPS machines with most problems.
    """
    found = []
    for origin, group in rows.groupby("origin", sort=True):
        have = {str(machine): set(keys) for machine, keys in group.groupby("machine")["problem_key"]}
        most = sorted(have, key=lambda name: (name not in FIRST, -len(have[name]), name))[:MOST_CHIPS]
        all_pairs = [
            Pair(str(origin), metric, a, b, len(have[a] & have[b]))
            for a, b in combinations(sorted(most, key=_base), 2)
            if have[a] & have[b]
        ]
        found += sorted(all_pairs, key=lambda p: ((p.a, p.b) != FIRST, "cpu" in p.a or "cpu" in p.b, -p.shared, p.a, p.b))[:MOST_PAIRS]
    return found


def data(rows: pd.DataFrame, pair: Pair) -> pd.DataFrame:
    """One row per problem that both sides of a pair have, of `known` rows: the longest on `a` first.

    Columns: those of DIMS (chip, kernel: of both sides), problem, fields, kernel_a, kernel_b, config_a, config_b, a, b (microseconds, or
    joules for energy), ratio (b over a), low and high: the ends of the two intervals over each other, NaN for published rows.
    """
    value, low, high = METRICS[pair.metric]
    own = rows[rows["origin"] == pair.origin]
    sides = own[own["machine"] == pair.a], own[own["machine"] == pair.b]
    both = sides[0].merge(sides[1], on="problem_key", suffixes=("_a", "_b"))
    table = both[["problem_key"]].copy()
    for name in ("model", "phase", "operator", "dtype", "status", "problem", "fields"):
        table[name] = both[f"{name}_a"]
    table["chip"], table["kernel"] = [list(zip(both[f"{n}_a"], both[f"{n}_b"], strict=True)) for n in ("chip", "kernel")]
    for side in ("a", "b"):
        table[f"kernel_{side}"], table[f"config_{side}"], table[side] = (both[f"{n}_{side}"] for n in ("kernel", "config", value))
    table["ratio"] = table["b"] / table["a"]
    table["low"], table["high"] = both[f"{low}_b"] / both[f"{high}_a"], both[f"{high}_b"] / both[f"{low}_a"]
    return table.sort_values("a", ascending=False, kind="stable").reset_index(drop=True)


def figures(story: Story, frame: pd.DataFrame) -> list[Figure]:
    """A heat map per pair, metric and kind of evidence; nothing for a single chip."""
    if len(story.subjects) < 2 or frame.empty:
        return []
    drawn: list[Figure] = []
    for metric in METRICS:
        rows = known(frame, metric)
        for pair in pairs(rows, metric):
            drawn.append(of_pair(data(rows, pair), pair, f"chips-{len(drawn)}"))
    if drawn:
        return drawn
    return [Figure("chips-0", TITLE, _none(frame), empty="No two chips have a problem in common in one kind of evidence.")]


def of_pair(table: pd.DataFrame, pair: Pair, identity: str) -> Figure:
    """The figure of a pair from its `data`."""
    a, b = titled(pair.a), titled(pair.b)
    cut = f" Of {len(table)} shared problems the {MOST_PROBLEMS} that take most on {a} count." if len(table) > MOST_PROBLEMS else ""
    both = "klab measured on both" if pair.origin == "measured" else "are published for both"
    sides = Sides(a, b, pair.metric, BASIS[pair.origin] + cut, both)
    return draw(table[:MOST_PROBLEMS], sides, identity, TITLE, f"{b} over {a}: {pair.metric}, {pair.origin}")


def titled(machine: str) -> str:
    """A machine as people call it: H200 for h200; a CPU, and whatever is no short name, as it is."""
    return machine.upper() if machine.isascii() and machine.isalnum() and len(machine) <= 8 else machine


def _none(frame: pd.DataFrame) -> str:
    """Why there is no pair: what each chip has."""
    fine = frame[(frame["status"] == "ok") & frame["median_us"].notna()]
    have = fine.groupby(["origin", "chip"])["problem_key"].nunique()
    told = [f"{' '.join(map(str, name))}: {count}" for name, count in zip(have.index.tolist(), have.tolist(), strict=True)]
    more = f" and {len(told) - 6} more" if len(told) > 6 else ""
    return (
        f"No ratio can be formed. Problems with a time: {', '.join(told[:6]) or 'none'}{more}. "
        "Only a problem that two chips share is compared, and a measured time is never held against a published one."
    )


def _base(machine: str) -> tuple[bool, str]:
    """H200 before all others, so that it is what they are held against."""
    return machine != FIRST[0], machine
