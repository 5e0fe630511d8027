"""A night is judged: every series against the best level it has held, in its own noise. Pure: points in, verdicts out (docs/night.md)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from klab.harness.store.result import Status
from klab.harness.watch import reasons
from klab.harness.watch.evidence import NORMAL_95, Course, Span, courses
from klab.harness.watch.rule import Rule
from klab.harness.watch.series import Call, Point, Series, Verdict

__all__ = ["Rule", "judge_night", "may_confirm", "suspects", "too_noisy"]

# What a trial ended with where the kernel is at fault. `incorrect` gets no second chance: what is wrong once in a while is wrong.
BROKEN = frozenset({Status.INCORRECT, Status.CRASHED, Status.TIMEOUT, Status.COMPILE_ERROR, Status.OUT_OF_MEMORY})
AGAIN = BROKEN - {Status.INCORRECT}
# The kernel is not for this chip any more: no excuse, and no fault of a launch.
GONE = frozenset({Status.UNSUPPORTED, Status.SCREENED})
# A clock that is lower for so many nights, while the anchor beside it is not slower, is the kernel's doing (it draws more power).
LASTING = 3


def judge_night(
    history: Mapping[str, Sequence[Point]],
    tonight: Mapping[str, Point],
    rule: Rule,
    series: Mapping[str, Series],
    *,
    since: Mapping[str, int] | None = None,
) -> dict[str, Verdict]:
    """What this night says of each series, by its identity.

    history: earlier points, oldest first, of any epochs. series: what is tracked; a series that only the recent nights of the history know
    is missing when tonight has no value of it. since: for a series whose new level was accepted, the index in its history of the first
    point that counts for its level (all of them count for its noise).
    At its first look a series beyond its limit is `suspect`. Measure the `suspects` again, put the values of all looks into the point, and
    judge again: only what was looked at `rule.looks` times is called slower or faster.
    """
    found: dict[str, Verdict] = {}
    judged: dict[str, tuple[Point, Sequence[Point]]] = {}
    expected = set(series) | set(tonight) | _recent(history, rule.recent)
    for identity in sorted(expected):
        known = series.get(identity) or _series_of(identity)
        point, earlier = tonight.get(identity), history.get(identity, ())
        if point is not None and point.status == Status.OK and any(v > 0 and math.isfinite(v) for v in point.values):
            judged[identity] = (point, earlier)
            found[identity] = Verdict(known, Call.UNKNOWN.value, "", point)
        else:
            call, reason = _without_value(point, earlier, rule)
            found[identity] = Verdict(known, call.value, reason, point)
    for identity, course in courses(judged, rule, since or {}, {i: v.series for i, v in found.items()}).items():
        found[identity] = _judged(found[identity].series, course, rule)
    return found


def may_confirm(point: Point, rule: Rule) -> bool:
    """May a suspect with this point be measured once more tonight?"""
    return point.looks < rule.looks


def suspects(verdicts: Mapping[str, Verdict], rule: Rule) -> list[str]:
    """The identities of what another look tonight would decide: suspects with looks left, and what failed at its first look.

    A wrong result is not among them.
    """
    wanted = []
    for identity, verdict in verdicts.items():
        point = verdict.point
        if point is None:
            continue
        failed = verdict.call == Call.BROKEN and point.status in AGAIN and point.looks < 2
        if failed or (verdict.call == Call.SUSPECT and may_confirm(point, rule)):
            wanted.append(identity)
    return wanted


def too_noisy(verdicts: Iterable[Verdict], rule: Rule) -> list[Verdict]:
    """The judged series that could not have shown a change of `rule.too_noisy` tonight."""
    return [v for v in verdicts if v.limit is not None and v.limit > 1.0 + rule.too_noisy]


def _judged(series: Series, course: Course, rule: Rule) -> Verdict:
    """The verdict on a series that has a value tonight."""
    if not course.spans:
        young = reasons.new_epoch(course)
        ratio = None if course.before is None else math.exp(course.before)
        return Verdict(series, Call.UNKNOWN.value, reasons.young(course), course.point, ratio, nights=course.nights, new_epoch=young)
    tonight = next(s for s in course.spans if s.nights == 1)
    final = course.point.looks >= rule.looks
    worst = max(course.spans, key=lambda s: s.excess / _bar(s, final))
    # Better is said of a night alone: a better level becomes the reference within days.
    span, sign = (worst, 1) if worst.excess > _bar(worst, final) else (tonight, -1)
    if sign * span.excess <= _bar(span, final):
        noisy = tonight.limit > math.log1p(rule.blind)
        reason = reasons.within(course, tonight, rule)
        return _told(series, Call.UNKNOWN if noisy else Call.OK, reason, course, tonight, tonight)
    agreed = rule.confirm * (span.limit if final else span.first)
    if not all(sign * look > agreed for look in course.looks):
        return _told(series, Call.OK, reasons.not_confirmed(course, span), course, tonight, tonight)
    if not final:
        return _told(series, Call.SUSPECT, reasons.suspect(course, span, rule), course, span, tonight)
    in_cycles = span.cycles is None or sign * span.cycles > agreed
    lasting = course.basis.anchored and any(s.nights >= LASTING and s.excess > s.limit for s in course.spans)
    if not in_cycles and not (sign > 0 and lasting):
        return _told(series, Call.SUSPECT, reasons.not_in_cycles(course, span), course, span, tonight)
    if sign > 0 and _may_pass(course, tonight, agreed):
        return _told(series, Call.SUSPECT, reasons.may_pass(course, span), course, span, tonight)
    call = Call.SLOWER if sign > 0 else Call.FASTER
    return _told(series, call, reasons.confirmed(course, span, agreed, in_cycles), course, span, tonight)


def _may_pass(course: Course, tonight: Span, agreed: float) -> bool:
    """Is this the first night of it, its source the same, and others that loud were gone the next night?"""
    if not tonight.limit < tonight.excess <= course.passing or course.elevated(agreed):
        return False
    return all(s.excess - tonight.excess / s.nights <= s.limit for s in course.spans if s.nights > 1)


def _bar(span: Span, final: bool) -> float:
    return span.limit if final else span.first


def _told(series: Series, call: Call, reason: str, course: Course, span: Span, tonight: Span) -> Verdict:
    return Verdict(
        series,
        call.value,
        reason,
        course.point,
        math.exp(span.excess),
        math.exp(span.excess - NORMAL_95 * span.error),
        math.exp(span.excess + NORMAL_95 * span.error),
        course.nights,
        span=span.nights,
        limit=math.exp(tonight.limit),
    )


def _without_value(point: Point | None, earlier: Sequence[Point], rule: Rule) -> tuple[Call, str]:
    if point is None:
        return Call.MISSING, "tracked, but tonight has nothing of it"
    said = point.status if not point.reason else f"{point.status}: {point.reason}" if point.status != Status.OK else point.reason
    if point.status in BROKEN:
        return Call.BROKEN, said
    if point.status in GONE:
        return Call.MISSING, said
    nights = 1
    for p in reversed(earlier):
        if p.status == Status.OK and p.values:
            break
        nights += 1
    reason = said if said and said != Status.OK else "no value tonight"
    if nights > rule.patience:
        return Call.MISSING, f"no value for {nights} nights; {reason}"
    return Call.UNKNOWN, reason


def _recent(history: Mapping[str, Sequence[Point]], nights: int) -> set[str]:
    """The series that have a value in the last nights of the history; any night counts where points do not say of which they are."""
    named = sorted({p.night for points in history.values() for p in points if p.night})
    least = named[-nights] if len(named) >= nights else ""
    return {
        identity for identity, points in history.items() if any(p.values and p.status == Status.OK and p.night >= least for p in points)
    }


def _series_of(identity: str) -> Series:
    """What can be known of a series that nobody described."""
    chip, problem, role, metric = (*identity.rsplit("/", 3), "", "", "")[:4]
    return Series(chip, "", problem, problem, role, metric)
