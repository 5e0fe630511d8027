"""How a night is told, the same in every output: the order of its verdicts, its headline, its figures; and names that cannot do harm."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence

from klab.harness.watch.series import Call, Metric, Night, Series, Verdict

# What a reader must see first stands first: outputs that are cut lose the end of this order.
ORDER = (Call.BROKEN, Call.SLOWER, Call.MISSING, Call.SUSPECT, Call.FASTER, Call.UNKNOWN, Call.OK)
LONGEST_NAME, LONGEST_REASON = 300, 600

_UNITS = {
    Metric.TIME.value: ((1e6, "s"), (1e3, "ms"), (1.0, "us"), (1e-3, "ns")),
    Metric.ENERGY.value: ((1.0, "J"), (1e-3, "mJ"), (1e-6, "uJ")),
}


def line(text: object, longest: int = LONGEST_REASON) -> str:
    """Text of others as one printable line of at most `longest` characters.

    Line breaks become spaces; what steers a terminal, an XML parser or the direction of reading is shown by its number.
    """
    shown = " ".join(str(text).split())
    if not shown.isprintable():
        shown = "".join(c if c.isprintable() else _number(c) for c in shown)
    return shown if len(shown) <= longest else shown[: max(longest - 3, 0)] + "..."


def _number(character: str) -> str:
    code = ord(character)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def name_of(series: Series) -> str:
    """The series' name as one line."""
    return line(series.name, LONGEST_NAME)


def ordered(verdicts: Iterable[Verdict]) -> list[Verdict]:
    """What fails the night first, then what is waived, then by call; the largest slow-down first within each, then by name."""
    rank = {call.value: n for n, call in enumerate(ORDER)}

    def place(one: Verdict) -> tuple[bool, bool, int, float, list[str | int]]:
        ratio = one.ratio if one.ratio is not None and math.isfinite(one.ratio) else 0.0
        return (not one.fails, not one.waiver, rank[one.call], -ratio, _natural(one.series.name))

    return sorted(verdicts, key=place)


def _natural(name: str) -> list[str | int]:
    """m16 before m128: texts and numbers in turn."""
    return [int(part) if n % 2 else part for n, part in enumerate(re.split(r"([0-9]+)", name))]


def counts(night: Night) -> dict[str, int]:
    """How many verdicts there are of each call, waived ones among them, in the order of `ORDER`; then how many are waived."""
    found = Counter(one.call for one in night.verdicts)
    waived = sum(bool(one.waiver) for one in night.verdicts)
    return {call.value: found[call.value] for call in ORDER} | {"waived": waived}


def failing(night: Night, strict: bool = False) -> list[Verdict]:
    """The verdicts that fail the night, worst first; with `strict`, suspects too."""
    return [one for one in ordered(night.verdicts) if fails(one, strict)]


def fails(verdict: Verdict, strict: bool = False) -> bool:
    """Does it fail the night, or a strict one?"""
    return verdict.fails or (strict and verdict.call == Call.SUSPECT and not verdict.waiver)


def outcome(night: Night, strict: bool = False) -> str:
    """`failed`, `ended early`, `passed`, or `judged nothing`: a night without a judgement has not passed."""
    if night.lapsed or failing(night, strict):
        return "failed"
    if night.incomplete:
        return "ended early"
    return "passed" if any(one.call != Call.UNKNOWN for one in night.verdicts) else "judged nothing"


def headline(night: Night) -> str:
    """`2 slower, 1 broken, 1 waived of 200 series`; `200 series: all ok`; what was judged at all is always said."""
    expired = f"{plural(len(night.lapsed), 'expired waiver')}; " if night.lapsed else ""
    return f"{expired}{_headline(night)}"


def plural(count: int, what: str) -> str:
    """`1 expired waiver`, `2 expired waivers`."""
    return f"{count} {what}{'' if count == 1 else 's'}"


def _headline(night: Night) -> str:
    total = len(night.verdicts)
    early = ", and the measuring ended early" if night.incomplete else ""
    if not total:
        return f"no series was watched{early}"
    found = counts(night)
    parts = []
    for call in ORDER[:-1]:
        waived = sum(one.call == call.value and bool(one.waiver) and Call(one.call).fails for one in night.verdicts)
        if found[call.value]:
            parts.append(f"{found[call.value]} {call.value}" + (f" ({waived} waived)" if waived else ""))
    if not parts:
        return f"{total} series: all ok{early}"
    return f"{', '.join(parts)} of {total} series{early}"


def value_of(verdict: Verdict) -> str:
    """Tonight's value in a fitting unit, or "" where nothing was measured."""
    value = verdict.point.value if verdict.point else None
    return quantity(value, verdict.series.metric) if value is not None else ""


def quantity(value: float, metric: str) -> str:
    """A value of a metric, in its own unit (us or J), with four digits and the unit that fits."""
    if not math.isfinite(value):
        return "not finite"
    units = _UNITS.get(metric, ((1.0, ""),))
    scale, unit = next(((scale, unit) for scale, unit in units if abs(value) >= scale), units[-1])
    return f"{value / scale:.4g} {unit}".strip()


def change(ratio: float | None) -> str:
    """`+5.2%` of a ratio (above 1: worse), or ""."""
    return "" if ratio is None or not math.isfinite(ratio) else f"{100 * (ratio - 1):+.1f}%"


def change_of(verdict: Verdict) -> str:
    """`+5.2% (+4.1% to +6.3%)`: against the baseline, with the 95% interval where there is one."""
    inside = [change(verdict.low), change(verdict.high)]
    return change(verdict.ratio) + (f" ({' to '.join(inside)})" if change(verdict.ratio) and all(inside) else "")


def reason_of(verdict: Verdict) -> str:
    """The reason in one line, with the waiver that covers it."""
    return line(verdict.reason) + (f" [waived: {line(verdict.waiver, 200)}]" if verdict.waiver else "")


def lapsed_lines(night: Night) -> list[str]:
    """A line for each expired waiver."""
    return [line(one.told) for one in night.lapsed]


def commit_of(night: Night) -> str:
    """The commit in twelve digits, and whether the checkout had been changed."""
    return (line(night.commit)[:12] or "not recorded") + (" with changes" if night.dirty else "")


def joined(words: Sequence[str], most: int = 3) -> str:
    """`a, b, c and 4 more`."""
    rest = len(words) - most
    return ", ".join(words[:most]) + (f" and {rest} more" if rest > 0 else "")
