"""The verdicts of a night: what fails or is doubtful first, the rest folded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from klab.harness.report.curve import Curve
from klab.harness.report.figures.history import spark
from klab.harness.report.html import Markup, el, table
from klab.harness.watch.series import Call, Night, Verdict
from klab.harness.watch.wording import change, line, name_of, ordered, reason_of, value_of

COLUMNS = ("Verdict", "Series", "Tonight", "Against usual", "History", "Kernel", "Why")
NUMBERS = ("Tonight", "Against usual")
QUIET = (Call.OK, Call.UNKNOWN)
# Rows beyond this are in night.json alone: a page of 5,000 rows opens in no browser at ease.
MOST_ROWS = 1500


def section(night: Night, curves: Mapping[str, Curve], nights: int) -> Markup:
    """The tables. nights: how many of them the curves tell of."""
    told = ordered(night.verdicts)
    loud = [one for one in told if one.call not in QUIET]
    parts: list[object] = [el("h2", "Verdicts")]
    if not told:
        parts.append(el("p", "No series was watched. The notes above say why, if it is known."))
    elif all(one.call == Call.UNKNOWN for one in told):
        parts.append(el("p", "Nothing could be judged tonight; each series says why."))
    elif not loud:
        parts.append(el("p", "Nothing failed, and nothing is doubtful."))
    parts.append(_table(loud, curves, nights))
    for call, words in ((Call.UNKNOWN, "not judged"), (Call.OK, "ok")):
        quiet = [one for one in told if one.call == call]
        if quiet:
            parts.append(el("details", el("summary", f"{len(quiet)} {words}"), _table(quiet, curves, nights)))
    return el("section", parts, id="verdicts")


def _table(verdicts: Sequence[Verdict], curves: Mapping[str, Curve], nights: int) -> Markup | None:
    if not verdicts:
        return None
    shown = table(COLUMNS, [_row(one, _spark(curves, one, nights)) for one in verdicts[:MOST_ROWS]], NUMBERS)
    left = len(verdicts) - MOST_ROWS
    return Markup(shown + el("p", f"{left} more rows are left out here; night.json has them.", class_="note")) if left > 0 else shown


def _row(one: Verdict, drawn: Markup | None) -> list[object]:
    point = one.point
    interval = [change(one.low), change(one.high)]
    kernel = line(point.kernel.partition("/")[2] or point.kernel, 80) if point else ""
    config = line(" ".join(f"{k}={v}" for k, v in point.config.items()), 200) if point else ""
    looks = f"{len(point.values)} processes" + (f", {point.looks} looks" if point.looks > 1 else "") if point and point.values else ""
    baseline = f"{one.nights} nights" if one.nights else ""
    return [
        [el("b", one.call, class_=one.call), _small("waived" if one.waiver else ""), _small("new epoch" if one.new_epoch else "")],
        [name_of(one.series).removeprefix(f"{line(one.series.chip)} "), _small(", ".join(line(m, 60) for m in one.series.models))],
        [value_of(one), _small(looks)],
        [change(one.ratio), _small(" to ".join(interval) if all(interval) else ""), _small(baseline)],
        drawn,
        [kernel, _small(config)],
        reason_of(one),
    ]  # fmt: skip


def _small(text: str) -> Markup | None:
    return el("small", text) if text else None


def _spark(curves: Mapping[str, Curve], one: Verdict, nights: int) -> Markup | None:
    curve = curves.get(one.series.identity)
    return spark(curve, nights) if curve else None
