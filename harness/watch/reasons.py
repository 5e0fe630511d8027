"""The reason of a verdict, in one line that a tired engineer can act on."""

from __future__ import annotations

import math

from klab.harness.watch.evidence import NORMAL_95, Course, Span
from klab.harness.watch.rule import Rule
from klab.harness.watch.series import Point


def young(course: Course) -> str:
    """Too few nights to judge by."""
    if not any(p.values for p in course.basis.earlier):
        return "its first night" if not course.basis.earlier else "the first night with a value of it"
    if new_epoch(course):
        told = "" if course.before is None else f"; {change(course.before)} against the epoch before"
        return f"night {course.nights + 1} of a new epoch (judged after {course.basis.least}){told}"
    return f"{course.nights} earlier night{'' if course.nights == 1 else 's'} of the {course.basis.least} that a judgement needs"


def new_epoch(course: Course) -> bool:
    """Was it measured in another epoch before? A night that did not reach it, or in which it failed, tells of none."""
    return any(p.values and p.epoch != course.point.epoch for p in course.basis.earlier)


def within(course: Course, tonight: Span, rule: Rule) -> str:
    """Nothing beyond the limit."""
    told = f"{change(tonight.excess)}, within its limit of {share(tonight.limit)} ({_basis(course)})"
    if tonight.limit > math.log1p(rule.blind):
        return f"too noisy to judge: {told}"
    return told


def not_confirmed(course: Course, span: Span) -> str:
    """Beyond the limit at one look, not at another."""
    if course.point.looks == 1:
        return f"{change(course.looks[0])} tonight; the last {span.nights} nights were {change(span.excess)}"
    looks = ", ".join(change(look) for look in course.looks)
    return f"not confirmed: {looks} at {course.point.looks} looks, limit {share(span.limit)} ({_basis(course)})"


def suspect(course: Course, span: Span, rule: Rule) -> str:
    """Beyond the limit, not yet looked at often enough."""
    return f"{_beyond(course, span)}; looked at {course.point.looks} of {rule.looks} times"


def not_in_cycles(course: Course, span: Span) -> str:
    """Time says so and cycles do not."""
    return f"{_beyond(course, span)}; in cycles {change(span.cycles or 0.0)}: the clock changed, not the kernel's work"


def may_pass(course: Course, span: Span) -> str:
    """Beyond the limit at every look, as other nights were that left nothing behind."""
    return f"{_beyond(course, span)}; changes of up to {share(course.passing)} came and went here: slower if the next night agrees"


def confirmed(course: Course, span: Span, bar: float, in_cycles: bool) -> str:
    """Beyond the limit at every look."""
    parts = [f"{_beyond(course, span)}; at all {course.point.looks} looks"]
    if span.cycles is not None and in_cycles:
        parts.append("and in cycles")
    elif span.cycles is not None:
        parts.append(f"though in cycles {change(span.cycles)}: its clock is lower, the anchor's is not slower")
    told = " ".join(parts)
    stood = course.elevated(bar) if span.excess > 0 else 0
    if stood:
        told += f"; for {stood + 1} nights now"
    changed = _changed(course.point, course.basis.kept[-stood - 1] if stood < len(course.basis.kept) else None)
    return f"{told}; since then {changed}" if changed else told


def change(log_ratio: float) -> str:
    """A change for people: "+5.2%"."""
    return f"{100 * math.expm1(log_ratio):+.1f}%"


def share(log_limit: float) -> str:
    """A limit for people: "3.4%"."""
    return f"{100 * math.expm1(log_limit):.1f}%"


def _beyond(course: Course, span: Span) -> str:
    reach = NORMAL_95 * span.error
    told = f"{change(span.excess)} [{change(span.excess - reach)}, {change(span.excess + reach)}]"
    over = "" if span.nights == 1 else f" over the last {span.nights} nights"
    return f"{told}{over}, limit {share(span.limit)} ({_basis(course)})"


def _basis(course: Course) -> str:
    told = f"level of {course.nights} night{'' if course.nights == 1 else 's'}"
    if course.basis.pooled:
        told += " of all devices, few of this one"
    return told + (", no anchor" if not course.basis.anchored else "")


def _changed(now: Point, then: Point | None) -> str:
    """What is different about the contestant since its last good night."""
    if then is None or not then.kernel:
        return ""
    if then.kernel != now.kernel:
        return f"the kernel changed from {then.kernel} to {now.kernel}"
    if then.source_digest != now.source_digest:
        return "its source changed"
    return "its configuration changed" if dict(then.config) != dict(now.config) else ""
