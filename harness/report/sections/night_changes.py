"""What the history says: changes of level with the commits between which they came, epochs, and waivers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from klab.harness.report.curve import Curve, epoch_changes
from klab.harness.report.html import Markup, el, table
from klab.harness.watch.series import Night
from klab.harness.watch.wording import change, lapsed_lines, line, name_of
from klab.kernels.contract import Json

COLUMNS = ("Since", "Series", "Change", "Commits", "What else changed")
# The newest that are listed: a history of half a year and 200 series has hundreds.
MOST_CHANGES = 100


def changes(curves: Mapping[str, Curve]) -> Markup:
    """Changes within an epoch, the newest first; those at the border of two epochs are told with the epochs."""
    found = [(step, curve) for curve in curves.values() for step in curve.steps if not step.new_epoch]
    found.sort(key=lambda one: (one[0].at, abs(one[0].ratio - 1)), reverse=True)
    words = el(
        "p",
        "Found afterwards, each from its whole history within an epoch. It lies between the nights of the two commits; what else changed "
        "between them need not be the cause.",
        class_="note",
    )
    rows = []
    for step, curve in found[:MOST_CHANGES]:
        inside = f"{change(step.low)} to {change(step.high)}" if step.low is not None else "too few nights for an interval"
        commits = " to ".join(dict.fromkeys(step.commits))
        rows.append(
            [line(step.at, 40)[:10], name_of(curve.series), [change(step.ratio), el("small", inside)], commits, "; ".join(step.why)]
        )
    left = len(found) - len(rows)
    more = el("p", f"{left} older changes are left out here.", class_="note") if left > 0 else None
    shown = [words, table(COLUMNS, rows, ("Change",)), more] if rows else el("p", "No level has changed within an epoch.")
    return el("section", el("h2", "Changes of level"), shown, id="changes")


def epochs(nights: Sequence[Night], curves: Mapping[str, Curve]) -> Markup:
    """Each epoch of these nights, the newest first: since when, what is new in it, and by how much the series moved at its start."""
    known: dict[str, Json] = {}
    first: dict[str, str] = {}
    last: dict[str, str] = {}
    for night in nights:
        known |= night.epochs
        for point in night.points().values():
            if point.epoch:
                first.setdefault(point.epoch, night.at)
                last[point.epoch] = night.at
    order = sorted(first, key=lambda epoch: first[epoch])
    rows = []
    for n, epoch in reversed(list(enumerate(order))):
        new = "; ".join(epoch_changes(known.get(order[n - 1]), known.get(epoch))) if n else ""
        moved = [
            step.ratio for curve in curves.values() for step in curve.steps if step.new_epoch and curve.places[step.index].epoch == epoch
        ]
        facts = known.get(epoch)
        told = line(", ".join(f"{k} {v}" for k, v in facts.items()) if isinstance(facts, Mapping) else "not recorded")
        rows.append([first[epoch][:10], last[epoch][:10], [new or "the first", el("small", told)], _moved(moved), line(epoch, 40)])
    if not rows:
        return el("section", el("h2", "Epochs"), el("p", "No night has recorded one."), id="epochs")
    words = el("p", "Nights of two epochs are not compared by the verdicts; how far the series moved is reported here.", class_="note")
    shown = table(("First night", "Last night", "What is new in it", "Series moved by", "Epoch"), rows)
    return el("section", el("h2", "Epochs"), words, shown, id="epochs")


def _moved(ratios: Sequence[float]) -> str:
    if not ratios:
        return ""
    in_order = sorted(ratios)
    middle = in_order[len(in_order) // 2]
    return f"{change(middle)} in the median of {len(ratios)} ({change(in_order[0])} to {change(in_order[-1])})"


def waivers(night: Night) -> Markup | None:
    """What is waived tonight, by whom and until when; and the waivers that are past their day."""
    expired = [el("p", el("b", "expired", class_="slower"), f": {told}") for told in lapsed_lines(night)]
    rows = [[name_of(one.series), one.call, line(one.waiver, 200), line(one.reason)] for one in night.verdicts if one.waiver]
    if not rows and not expired:
        return None
    shown = table(("Series", "Verdict", "Who answers for it, until when", "Reason"), rows) if rows else None
    return el("section", el("h2", "Waivers"), expired, shown, id="waivers")
