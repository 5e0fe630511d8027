"""Chip against chip: the time (or energy) of one over that of the other, problem by problem, with geometric means per operator."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING

from klab.harness.report.figures.chips_draw import LONGEST, Sides, draw
from klab.harness.report.figures.style import Figure, distinct
from klab.harness.report.subject import Story
from klab.harness.watch.wording import line

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
        "Rests on klab's own measurements, of each chip the chosen kernel, in the same state of cache and clocks. A board can differ from "
        "the next of its kind by 5%, which no interval here covers."
    ),
    "reference": (
        "Rests on published rows alone, of each chip the fastest kernel: times without an interval, measured by others. A time measured "
        "here over a published one is no ratio that klab shows."
    ),
}


@dataclass(frozen=True)
class Pair:
    """Two chips that share problems in one kind of evidence: `b` is held against `a`.

    shared: problems that both have under the same conditions; unlike: those that they have under others; machines: how many have any.
    """

    origin: str
    metric: str
    a: str
    b: str
    shared: int
    unlike: int
    machines: int


def known(frame: pd.DataFrame, metric: str = "time") -> pd.DataFrame:
    """Of each machine, problem and origin the one row that stands for it: the choice's newest, of published rows the fastest.

    `machine` is the chip, of a CPU with its device: two CPUs are two machines.
    """
    value, *_ = METRICS[metric]
    fine = frame[(frame["status"] == "ok") & (frame[value] > 0) & (frame["chosen"] | (frame["origin"] == "reference"))]
    cpu = fine["chip"] == "cpu"
    fine = fine.assign(machine=fine["chip"].where(~cpu, fine["chip"] + " (" + fine["device"].astype(str) + ")"))
    # Published rows have no date.
    ordered = fine.sort_values(["recorded_at", "median_us"], ascending=[False, True], kind="stable")
    return ordered.drop_duplicates(["origin", "machine", "problem_key"])


def pairs(rows: pd.DataFrame, metric: str) -> list[Pair]:
    """The pairs that are shown, of `known` rows: H200 and B200 first, CPUs last, else those that share most problems.

    MOST_PAIRS of each origin, among the MOST_CHIPS machines with most problems.
    """
    found = []
    for origin, group in rows.groupby("origin", sort=True):
        have = {str(machine): dict(zip(own["problem_key"], own["conditions"], strict=True)) for machine, own in group.groupby("machine")}
        most = sorted(have, key=lambda name: (name not in FIRST, -len(have[name]), name))[:MOST_CHIPS]
        all_pairs = []
        for a, b in combinations(sorted(most, key=_base), 2):
            shared = len(have[a].items() & have[b].items())
            if shared:
                all_pairs.append(Pair(str(origin), metric, a, b, shared, len(have[a].keys() & have[b].keys()) - shared, len(have)))
        found += sorted(all_pairs, key=lambda p: ((p.a, p.b) != FIRST, _is_cpu(p.b), -p.shared, p.a, p.b))[:MOST_PAIRS]
    return found


def data(rows: pd.DataFrame, pair: Pair) -> pd.DataFrame:
    """One row per problem that both sides of a pair have under the same conditions, of `known` rows: the longest on `a` first.

    Columns: those of DIMS (chip, kernel: of both sides), problem, fields, conditions, kernel_a, kernel_b, config_a, config_b, a, b
    (microseconds, or joules for energy), ratio (b over a), low and high: the ends of the two intervals over each other, NaN where a side
    has none (as published rows) or one that reaches 0.
    """
    value, low, high = METRICS[pair.metric]
    own = rows[rows["origin"] == pair.origin]
    sides = own[own["machine"] == pair.a], own[own["machine"] == pair.b]
    both = sides[0].merge(sides[1], on=["problem_key", "conditions"], suffixes=("_a", "_b"))
    table = both[["problem_key", "conditions"]].copy()
    for name in ("model", "phase", "operator", "dtype", "status", "problem", "fields"):
        table[name] = both[f"{name}_a"]
    table["chip"], table["kernel"] = [list(zip(both[f"{n}_a"], both[f"{n}_b"], strict=True)) for n in ("chip", "kernel")]
    for side in ("a", "b"):
        table[f"kernel_{side}"], table[f"config_{side}"], table[side] = (both[f"{n}_{side}"] for n in ("kernel", "config", value))
    table["ratio"] = table["b"] / table["a"]
    ends = both[[f"{end}_{side}" for end in (low, high) for side in ("a", "b")]]
    ends = ends.where((ends > 0).all(axis=1), math.nan)
    table["low"], table["high"] = ends[f"{low}_b"] / ends[f"{high}_a"], ends[f"{high}_b"] / ends[f"{low}_a"]
    return table.sort_values("a", ascending=False, kind="stable").reset_index(drop=True)


def figures(story: Story, frame: pd.DataFrame) -> list[Figure]:
    """A heat map per pair, metric and kind of evidence; nothing for a single chip."""
    if len(story.subjects) < 2 or frame.empty:
        return []
    found = [(pair, data(rows, pair)) for metric in METRICS for rows in [known(frame, metric)] for pair in pairs(rows, metric)]
    if found:
        names = distinct([f"{titled(pair.b)} over {titled(pair.a)}: {pair.metric}, {pair.origin}" for pair, _ in found])
        return [of_pair(table, pair, f"chips-{n}", names[n]) for n, (pair, table) in enumerate(found)]
    return [Figure("chips-0", TITLE, _none(frame), empty="No two chips have a problem in common that can be compared.")]


def of_pair(table: pd.DataFrame, pair: Pair, identity: str, variant: str) -> Figure:
    """The figure of a pair from its `data`."""
    a, b = titled(pair.a), titled(pair.b)
    said = [BASIS[pair.origin]]
    if len(table) > MOST_PROBLEMS:
        said.append(f"Of {len(table)} shared problems the {MOST_PROBLEMS} that take most on {a} count.")
    if pair.unlike:
        is_are = "is one" if pair.unlike == 1 else f"are {pair.unlike}"
        said.append(f"Left out {is_are} that both have, but with the cache or the clocks in another state.")
    if math.comb(pair.machines, 2) > MOST_PAIRS:
        said.append(f"Of {pair.machines} chips at most {MOST_PAIRS} pairs are shown: H200 with B200, then those that share most problems.")
    both = "klab measured on both" if pair.origin == "measured" else "others published for both"
    return draw(table[:MOST_PROBLEMS], Sides(a, b, pair.metric, " ".join(said), both), identity, TITLE, variant)


def titled(machine: str) -> str:
    """A machine as people call it: H200 for h200; a CPU, and whatever is no short name, as it is, but for its length."""
    return machine.upper() if machine.isascii() and machine.isalnum() and len(machine) <= 8 else line(machine, LONGEST)


def _none(frame: pd.DataFrame) -> str:
    """Why there is no pair: what each chip has."""
    fine = frame[(frame["status"] == "ok") & frame["median_us"].notna()]
    have = fine.groupby(["origin", "chip"])["problem_key"].nunique()
    told = [f"{' '.join(map(str, name))}: {count}" for name, count in zip(have.index.tolist(), have.tolist(), strict=True)]
    more = f" and {len(told) - 6} more" if len(told) > 6 else ""
    return (
        f"No ratio can be formed. Problems with a time: {', '.join(told[:6]) or 'none'}{more}. "
        "Only a problem that two chips share is compared, with cache and clocks in the same state on both, and a measured time is never "
        "held against a published one."
    )


def _base(machine: str) -> tuple[bool, bool, str]:
    """H200 before all others, so that it is what they are held against; CPUs last."""
    return machine != FIRST[0], _is_cpu(machine), machine


def _is_cpu(machine: str) -> bool:
    return machine.startswith("cpu (")
