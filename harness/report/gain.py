"""By how much the choices of a chip are better than the libraries, and how far they are from its limits: figures with 95% intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from klab.harness.choose.profile import Choice, StepTime
from klab.harness.report.limits import bound
from klab.harness.report.subject import Subject
from klab.harness.store.result import Result, Status
from klab.kernels.contract import canonical_json

Span = tuple[float, float, float]
"""A value with the ends of its 95% interval. Where it is made from several, all of them are at the same end at once, which is never
narrower than independent errors would be."""


@dataclass(frozen=True)
class Gain:
    """The chosen kernels against the best library, problem by problem. `ratio`: the geometric mean of the libraries' times over the
    chosen ones', 1 where the choice is a library's; None where nothing can be compared. `problems` is how many it is of, `alone` how
    many have no library to compare with, `unopposed` how many have libraries alone.
    """

    ratio: Span | None
    problems: int
    won: int
    tied: int
    lost: int
    alone: int
    unopposed: int


@dataclass(frozen=True)
class Headroom:
    """How much of the time the chip's specified limits account for. `share` is the sum of the least times over the sum of the measured
    ones; `left` the choice with most time above its least, and `left_us` how much that is (per step where counts are known).
    """

    share: Span
    problems: int
    left: Choice
    left_us: float
    left_share: float


def gain_of(subject: Subject) -> Gain:
    """Of all choices of a chip."""
    libraries = {row.kernel for row in subject.rows if row.library}
    light = [row for row in subject.light if row.status is Status.OK and row.kind == "measured" and row.median_us]
    own = {row.problem_key for row in (*subject.fine, *light) if not row.library}
    ratios: list[Span] = []
    won = tied = lost = alone = unopposed = 0
    for choice in subject.profile.choices:
        rival = choice.evidence.library
        if choice.library:
            ratios.append((1.0, 1.0, 1.0))
            if choice.wanted.problem_key not in own:
                unopposed += 1
            elif any(other.kernel not in libraries for other in choice.evidence.tied):
                tied += 1
            else:
                lost += 1
        elif rival is None:
            alone += 1
        else:
            low, high = rival.ratio_interval
            ratios.append((rival.ratio, low, high))
            won, tied, lost = won + (low > 1), tied + (low <= 1 <= high), lost + (high < 1)
    return Gain(geometric_mean(ratios), len(ratios), won, tied, lost, alone, unopposed)


def geometric_mean(ratios: Sequence[Span]) -> Span | None:
    """Of the values, of the low ends and of the high ends; None of none, or where one is not above 0."""
    if not ratios or any(not value > 0 for ratio in ratios for value in ratio):
        return None
    middle, low, high = (math.exp(math.fsum(math.log(ratio[n]) for ratio in ratios) / len(ratios)) for n in range(3))
    return middle, low, high


def step_time(subject: Subject, step: StepTime) -> Span | None:
    """Microseconds of one step with the chosen kernels, of what has a choice; None where nothing has."""
    parts = [(count, choice.evidence) for choice, count in _in_step(subject, step)]
    if not parts:
        return None
    middle = math.fsum(count * e.median_us for count, e in parts)
    low = math.fsum(count * e.interval_us[0] for count, e in parts)
    return middle, low, math.fsum(count * e.interval_us[1] for count, e in parts)


def step_gain(subject: Subject, step: StepTime) -> Span | None:
    """The step's time with the best library for each problem over that with the chosen kernels; None while a problem of the step has no
    choice or no library.
    """
    if step.open or step.library_us is None:
        return None
    weights: list[tuple[float, Span]] = []
    for choice, count in _in_step(subject, step):
        rival = choice.evidence.library
        us = count * choice.evidence.median_us
        weights.append((us, (1.0, 1.0, 1.0) if rival is None else (rival.median_us / choice.evidence.median_us, *rival.ratio_interval)))
    whole = math.fsum(us for us, _ in weights)
    if not whole:
        return None
    middle, low, high = (math.fsum(us * ratio[n] for us, ratio in weights) / whole for n in range(3))
    return middle, min(low, middle), max(high, middle)


def headroom_of(subject: Subject, step: StepTime | None = None) -> Headroom | None:
    """Of all choices, each problem counted once, or of those of a step, as often as it launches them. None where no limit is known."""
    counted = _in_step(subject, step) if step else [(choice, 1) for choice in subject.profile.choices]
    parts = []
    rows = chosen_rows(subject)
    for choice, count in counted:
        row = rows.get(choice.wanted.problem_key)
        least = bound(row, subject.limits) if row else None
        if least is not None:
            parts.append((choice, count, least.us))
    whole = math.fsum(count * choice.evidence.median_us for choice, count, _ in parts)
    if not whole:
        return None
    least_us = math.fsum(count * us for _, count, us in parts)
    low_us = math.fsum(count * choice.evidence.interval_us[0] for choice, count, _ in parts)
    high_us = math.fsum(count * choice.evidence.interval_us[1] for choice, count, _ in parts)
    left, count, us = max(parts, key=lambda part: part[1] * (part[0].evidence.median_us - part[2]))
    share = least_us / whole, least_us / high_us, least_us / low_us if low_us else math.inf
    return Headroom(share, len(parts), left, count * (left.evidence.median_us - us), us / left.evidence.median_us)


def chosen_rows(subject: Subject) -> dict[str, Result]:
    """By the key of the wanted problem, the row that each choice rests on (of a narrower format, where that was chosen instead)."""
    wanted = {c.wanted.problem_key: (c, canonical_json(c.config)) for c in subject.profile.choices}
    found: dict[str, Result] = {}
    for row in subject.fine:
        for problem_key in (row.problem_key, row.wide_key):
            choice, config = wanted.get(problem_key, (None, ""))
            # A narrower row stands only for a choice that says so.
            if choice is None or row.kernel != choice.kernel or bool(choice.instead) != (problem_key != row.problem_key):
                continue
            if canonical_json(row.config) == config and (problem_key not in found or not _same(found[problem_key], choice)):
                found[problem_key] = row
    return found


def _same(row: Result, choice: Choice) -> bool:
    """Is it the very row, and not one of the same configuration measured otherwise?"""
    evidence = choice.evidence
    return (row.recorded_at, row.l2_state, len(row.samples_us)) == (evidence.recorded_at, evidence.l2_state, evidence.samples)


def _in_step(subject: Subject, step: StepTime) -> list[tuple[Choice, int]]:
    return [(c, n) for c in subject.profile.choices if (n := _count(c, step))]


def _count(choice: Choice, step: StepTime) -> int:
    return sum(use.count for use in choice.wanted.uses if (use.phase, use.batch) == (step.phase, step.batch))
