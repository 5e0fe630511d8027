"""The README's words on time to best and on repeatability."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from klab.harness.choose.evidence_repeats import Repeated, Repeats
from klab.harness.report.evidence_gaps import Again
from klab.harness.report.evidence_markdown import count, plain, ratio, table
from klab.harness.report.evidence_search import REPLAYS, WITHIN, Pace, ToBest
from klab.harness.report.units import percent, plain_ratio, time
from klab.harness.tune.evidence import SITTINGS_WANTED

LISTED = 10


def search_text(found: Sequence[ToBest]) -> str:
    """Time to best."""
    if not found:
        return ""
    said = (
        "`device` rows were measured: the tuner's default strategy, from nothing, beside every candidate. Seconds are those in which the "
        "device was held for candidates, without defaults and libraries, which every search measures first. Regret is the time of what "
        "the search chose over the best recorded, both from the exhaustive rows; the best of many medians is partly luck, and `held out` "
        "is the regret without it: the best picked by every other round and timed by those between. `replayed` rows are simulated on "
        f"the recorded space: the same strategy and as many evaluations, medians of {REPLAYS} seeds (regret: least to most), with the "
        "seconds of compiling and benchmarking."
    )
    cells = []
    for one in found:
        space = f"{one.recorded:,}" + (f" of {one.space:,}" if one.space is not None else "")
        best = f"{time(one.best_us)} ({one.best.partition(' ')[0]})" if one.best_us else "none"
        every = "not run" if one.exhaustive_s is None else f"{one.exhaustive_s:.0f} s"
        for label, pace in (("device", one.tuner), ("replayed", one.replayed)):
            cells.append((one.problem, space, best, every, label, *_pace(pace)))
    columns = ("problem", "candidates", "best recorded", "exhaustive", "tuner", "evaluations", "seconds", "final", "regret", "held out",
               *(f"until within {limit - 1:.0%}" for limit in WITHIN))  # fmt: skip
    notes = [f"- {plain(f'{one.problem}: {note}')}" for one in found for note in one.notes]
    parts = ["## Time to best", said, _together(found), table(columns, cells), "\n".join(notes)]
    return "\n\n".join(part for part in parts if part)


def _together(found: Sequence[ToBest]) -> str:
    """Of the problems with a search of the device and every candidate recorded."""
    both = [(one.exhaustive_s, one.tuner) for one in found if one.complete and one.exhaustive_s and one.tuner]
    if not both:
        return "On no problem are both a whole space and a search of the tuner recorded."
    every, seconds, finals = (math.fsum(values) for values in zip(*((s, p.seconds, p.final_s or 0.0) for s, p in both), strict=True))
    text = f"On {count(len(both), 'problem')} with a whole space and a search: the tuner took {seconds:.0f} s of the device"
    text += f" and {finals:.0f} s of finals" if finals else ""
    text += f", every candidate {every:.0f} s"
    regrets = [pace.regret.ratio for _, pace in both if pace.regret]
    if regrets:
        text += f"; its regret was {plain_ratio(statistics.median(regrets))} in the median and {plain_ratio(max(regrets))} at most"
        text += f" ({len(both) - len(regrets)} not known)" if len(regrets) < len(both) else ""
    return text + "."


def _pace(pace: Pace | None) -> tuple[str, ...]:
    if pace is None:
        return ("not run", *[""] * (4 + len(WITHIN)))
    regret = "not known" if pace.regret is None else ratio(pace.regret.ratio, pace.regret.low, pace.regret.high)
    final = "" if pace.final_s is None else f"{pace.final_s:.1f} s"
    fair = "" if pace.held_out is None else plain_ratio(pace.held_out)
    reached = (f"{pace.within[limit]:.1f} s" if math.isfinite(pace.within[limit]) else "never" for limit in WITHIN)
    return (f"{pace.evaluations:.0f}", f"{pace.seconds:.1f}", final, regret, fair, *reached)


def repeat_text(found: Repeats, again: Sequence[Again]) -> str:
    """Repeatability."""
    text = ["## Repeatability"]
    runs = f"{count(len(found.runs), 'sitting')} with times, on {count(len(found.devices), 'device')}"
    few = f": only {count(len(found.runs), 'sitting')}, {SITTINGS_WANTED} wanted" if len(found.runs) < SITTINGS_WANTED else ""
    text.append(f"{runs}{few}. A spread is (largest - smallest) / median of the sittings' medians of one trial.")
    for name, repeated in (("time", found.times), ("energy", found.energies)):
        if not repeated:
            text.append(f"No trial has its {name} from two sittings and more.")
            continue
        text.append(_spread_words(name, repeated))
    if found.times:
        cells = [
            (one.problem, one.kernel, len(one.values), percent(one.spread), "" if one.on_one_device is None else percent(one.on_one_device))
            for one in found.times[:LISTED]
        ]
        text += ["The widest:", table(("problem", "kernel", "medians", "spread", "on one device"), cells)]
    if found.problems:
        stable, same = sum(one.stable for one in found.problems), sum(one.same_winner for one in found.problems)
        text.append(
            f"Winners: on {stable} of {count(len(found.problems), 'problem')} the sittings' tie sets (what cannot be told from the best) "
            f"have a candidate in common; on {same} the same one was fastest each time."
        )
        if moved := [one.problem for one in found.problems if not one.stable]:
            text.append("Not stable: " + _listed(moved))
    if again:
        text += _verdict_words(again)
    return "\n\n".join(text)


def _verdict_words(again: Sequence[Again]) -> list[str]:
    """What differs between sittings is in no interval of one of them."""
    spreads = [one.spread for one in again]
    apart, turned = sum(one.apart for one in again), [one.problem for one in again if one.contradicts]
    words = (
        f"Gaps: on {count(len(again), 'problem')} two sittings or more held klab's own against a library. The ratio's spread is "
        f"{percent(statistics.median(spreads))} in the median and {percent(max(spreads))} at most; on {apart} the sittings' intervals have "
        f"nothing in common, so what a next sitting finds may lie outside of an interval above. The verdict turned around on {len(turned)}."
    )
    return [words, *(["Turned around: " + _listed(turned)] if turned else [])]


def _listed(labels: Sequence[str]) -> str:
    more = f"; and {len(labels) - LISTED} more" if len(labels) > LISTED else ""
    return "; ".join(plain(label) for label in labels[:LISTED]) + more


def _spread_words(name: str, repeated: Sequence[Repeated]) -> str:
    spreads = [one.spread for one in repeated]
    within = [one.on_one_device for one in repeated if one.on_one_device is not None]
    alone = f"; on one device {percent(statistics.median(within))}, {percent(max(within))}" if within else "; no device ran one twice"
    thrice = sum(one.runs >= SITTINGS_WANTED for one in repeated)
    return (
        f"{name.capitalize()} of {count(len(spreads), 'trial')} ({thrice} in {SITTINGS_WANTED} sittings or more): spread "
        f"{percent(statistics.median(spreads))} in the median, {percent(max(spreads))} at most{alone}."
    )
