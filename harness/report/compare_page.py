"""One side against another on a page of its own: two runs, chips, commits or sets of results. What `klab report --compare A B` writes."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from klab.harness.choose.profile import write_text
from klab.harness.plan.rows import Plan
from klab.harness.report import compare_judged
from klab.harness.report.compare_judged import Judged
from klab.harness.report.figures import compared
from klab.harness.report.figures.chips_draw import Sides
from klab.harness.report.figures.style import Figure
from klab.harness.report.html import el
from klab.harness.report.pick import Kind, Side, pick
from klab.harness.report.request import Request
from klab.harness.report.sections import compare_around, compare_strip, compare_table
from klab.harness.report.shell import document, framed_all, index, plotly_js
from klab.harness.store.read import ReadReport, iter_results
from klab.harness.store.result import Result
from klab.harness.watch.compare_rule import MARGIN
from klab.harness.watch.comparison import Comparison
from klab.kernels.errors import UsageError


@dataclass(frozen=True)
class Compared:
    """What was written. `a` and `b`: the sides in words; `reading`: what reading met."""

    a: str
    b: str
    comparison: Comparison
    reading: tuple[str, ...] = ()

    @property
    def headline(self) -> str:
        """One line for a terminal."""
        return f"{self.comparison.headline()}. A: {self.a}. B: {self.b}"


def write_compare(
    folders: Sequence[Path],
    a: str,
    b: str,
    out: Path,
    *,
    chips: Sequence[str] = (),
    plans: Mapping[str, Plan] | None = None,
    margin: float = MARGIN,
) -> Compared:
    """Compare what `a` and `b` name (see `pick`) and replace `out` by the page.

    folders: where runs, chips and commits are looked up. chips: only rows of these. plans: by chip; with one, only its problems.
    UsageError for a side that names nothing or several things, and where the sides have nothing in common. CannotMeasure when `out` cannot
    be written.
    """
    report, there = ReadReport(), [folder for folder in folders if folder.exists()]
    first = [report]

    def read() -> Iterator[Result]:
        """The store, which is read more than once; what it meets is noted once."""
        rows = iter_results(there, first.pop() if first else None)
        return (row for row in rows if not chips or row.chip in chips)

    asked = Request(chips=chips, plans=plans or {})
    sides = [_asked(side, chips, asked) for side in pick(read, a, b, report)]
    reading = tuple(report.lines())
    found, page = render(sides[0], sides[1], margin=margin, reading=reading)
    write_text(out, page)
    return Compared(sides[0].title, sides[1].title, found, reading)


def _asked(side: Side, chips: Sequence[str], request: Request) -> Side:
    """The side without rows that were not asked for. With a plan of one chip alone, its problems count on every chip."""
    keys = {chip: request.keys(chip) for chip in {row.chip for row in side.rows}}
    plans = {key for chip in request.plans for key in request.keys(chip) or ()}
    rows = [
        row for row in side.rows if (not chips or row.chip in chips) and (not request.plans or row.problem_key in (keys[row.chip] or plans))
    ]
    return replace(side, rows=tuple(rows))


def render(a: Side, b: Side, *, margin: float = MARGIN, reading: Sequence[str] = ()) -> tuple[Comparison, str]:
    """(what was found, the page as text). Two chips are compared by the best kernel of each, all else kernel by kernel."""
    between = a.kind is Kind.CHIP
    best = _judged(a, b, between, best=True, margin=margin)
    each = _judged(a, b, between, best=False, margin=margin) if not between else _or_none(a, b, margin)
    main, of = (best, "problem") if between or each is None else (each, "kernel-problem pair")
    names = compare_strip.short(a), compare_strip.short(b)
    figures = _figures(best, main, names, between) if importlib.util.find_spec("pandas") else []
    drawing = plotly_js() if figures else ""
    warned = compare_strip.warnings(a, b, [*reading, *main.comparison.notes])
    tables = [
        compare_table.section(
            best.pairs, "Problem by problem, the best of each side", "best",
            "Of each side the kernel and configuration with the lowest median; they may be different ones.",
        )
    ]  # fmt: skip
    if each is not None:
        note = "The same kernel on both sides, each at its own best configuration. Sorted worst first, as klab compare has it."
        tables.insert(1 if between else 0, compare_table.section(each.pairs, "Kernel by kernel", "kernels", note))
    links = [("figures", "Figures"), ("kernels", "Kernel by kernel"), ("best", "Best of each"), ("alone", "Only one side"),
             ("around", "What else differs"), ("words", "Words")]  # fmt: skip
    others = each or best
    lone = compare_around.alone(others)
    there = [
        link for link in links if (link[0] != "kernels" or each) and (link[0] != "alone" or lone) and (link[0] != "figures" or figures)
    ]
    content = [
        compare_strip.section(a, b, main, of, warned),
        el("nav", [el("a", name, href=f"#{target}") for target, name in there]),
        el(
            "main",
            el("section", el("h2", "Figures"), framed_all(figures, bool(drawing)), id="figures") if figures else None,
            tables,
            lone,
            compare_around.environment(a.rows, b.rows),
            compare_around.words(margin),
        ),
        el("footer", el("p", "Made by klab report --compare. Everything is in this file; it loads nothing.", class_="note")),
    ]
    title = f"klab: {compare_strip.headline(main, of, *names)}"
    sections = {"index": index(compared.data(main.pairs))} if figures else {}
    return main.comparison, document(title, content, figures=figures, sections=sections, drawing=drawing)


def _judged(a: Side, b: Side, between: bool, *, best: bool, margin: float) -> Judged:
    return compare_judged.judge(a.rows, b.rows, between_chips=between, best=best, margin=margin)


def _or_none(a: Side, b: Side, margin: float) -> Judged | None:
    """Two chips may have no kernel in common, and still their best."""
    try:
        return _judged(a, b, True, best=False, margin=margin)
    except UsageError:
        return None


def _figures(best: Judged, main: Judged, names: tuple[str, str], between: bool) -> list[Figure]:
    basis = "Rests on klab's own measurements, of each side the fastest kernel and configuration"
    sides = Sides(*names, basis=basis, both="both chips have" if between else "both sides have")
    return [*compared.heat(best.pairs, sides, "heat"), compared.scatter(compared.data(main.pairs), sides, "scatter")]
