"""The answers of a comparison as a table: per problem and kernel, or per problem the best of each side."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from klab.harness.report.compare_judged import Pair
from klab.harness.report.html import Cell, Line, Markup, el, table
from klab.harness.report.limits import dtype_of
from klab.harness.report.sections.compare_strip import ratio
from klab.harness.report.units import interval, time, times
from klab.harness.store.frame import config_label
from klab.harness.store.result import Result
from klab.harness.watch.comparison import ORDER
from klab.harness.watch.wording import line

NUMBERS = ("B over A", "A", "B", "Energy, B over A")
MOST_ROWS = 1500


def section(pairs: Sequence[Pair], heading: str, identity: str, note: str) -> Markup:
    """The table in the order of the answers, worst first. What the answers of most rows rest on is said once, above them."""
    best, energy = all(not pair.kernel for pair in pairs), any(pair.energy for pair in pairs)
    reasons = Counter(pair.found.reason for pair in pairs if pair.found.reason)
    usual, count = reasons.most_common(1)[0] if reasons else ("", 0)
    usual = usual if count > 2 else ""
    columns = ("Problem", *(() if best else ("Kernel",)), "B over A", "Answer", "A", "B", *(("Energy, B over A",) if energy else ()))
    rows = [_line(pair, best, energy, usual, f"{identity}-{n}") for n, pair in enumerate(pairs[:MOST_ROWS])]
    shown = (
        table(columns, rows, [name for name in NUMBERS if name in columns], identity=f"{identity}-table")
        if rows
        else el("p", "Nothing was compared.")
    )
    said = [el("p", note, class_="note"), el("p", f"Where a row says nothing else: {line(usual, 300)}.", class_="note") if usual else None]
    cut = el("p", f"{len(pairs) - MOST_ROWS} more rows are left out: those at the end of this order.", class_="note")
    return el("section", el("h2", heading), said, shown, cut if len(pairs) > MOST_ROWS else None, id=identity)


def _line(pair: Pair, best: bool, energy: bool, usual: str, identity: str) -> Line:
    found = pair.found
    rows = [row for row in (pair.a, pair.b) if row is not None]
    text, _, ends = ratio(found).partition(" ")
    kernel = el("span", line(pair.kernel, 60), title=pair.kernel)
    reason = "" if found.reason == usual else line(found.reason, 300)
    cells: list[object] = [
        Cell(el("span", line(pair.problem, 90), title=pair.problem)),
        *([] if best else [Cell(kernel, pair.kernel)]),
        Cell([text, el("small", ends) if ends else None], found.ratio),
        Cell([el("b", found.answer.value), _small(reason)], ORDER.index(found.answer)),
        _side(pair.a, best),
        _side(pair.b, best),
        *([_energy(pair)] if energy else []),
    ]
    dims: dict[str, str | Sequence[str]] = {
        "chip": list(dict.fromkeys(row.chip for row in rows or [pair.like])),
        "operator": pair.like.operator,
        "dtype": dtype_of(pair.like),
        "kernel": list(dict.fromkeys(row.kernel.partition("/")[2] for row in rows)) or [pair.kernel],
    }
    return Line(cells, dims, identity)


def _side(row: Result | None, best: bool) -> Cell:
    if row is None or row.median_us is None:
        return Cell("no value")
    ends = interval(row.ci_low_us, row.ci_high_us) if row.ci_low_us is not None and row.ci_high_us is not None else ""
    ran = " ".join(filter(None, (row.kernel.partition("/")[2] if best else "", label if (label := config_label(row)) != "-" else "")))
    return Cell([time(row.median_us), _small(ends), el("small", line(ran, 80), title=ran) if ran else None], row.median_us)


def _energy(pair: Pair) -> Cell:
    if pair.energy is None:
        return Cell("")
    middle, low, high = pair.energy
    ends = f"[{times(low)[:-1]}, {times(high)[:-1]}]" if low is not None and high is not None else ""
    return Cell([times(middle), _small(ends)], middle)


def _small(text: str) -> Markup | None:
    return el("small", text) if text else None
