"""What is around a comparison: in what the places of measurement differ, what only one side has, and how to read the answers."""

from __future__ import annotations

from collections.abc import Sequence

from klab.harness.report.compare_judged import Judged
from klab.harness.report.html import Markup, el, pairs, table
from klab.harness.store.result import Result
from klab.harness.watch.compare_results import DEVICES, DRIFT, LEAST_RUNS, TOLD
from klab.harness.watch.wording import joined, line, plural

# Beyond what klab compare tells: what else may explain a difference, in the order of a reader's suspicion.
FIELDS = (
    *dict.fromkeys((*TOLD, "commit", "dirty", "python", "numpy", "cuda_runtime", "cudnn", "os", "kernel_release", "cpu_model")),
    "device_uuid",
    "epoch",
)
HIDDEN = {"source_digest"}
MOST_ALONE = 300


def values(rows: Sequence[Result], name: str) -> set[str]:
    """What the rows say of one field of their environment, or of their own."""
    return {str(found) for row in rows if (found := row.environment.get(name, getattr(row, name, ""))) not in (None, "", ())}


def environment(a: Sequence[Result], b: Sequence[Result]) -> Markup:
    """The fields that differ as a table, and those that do not as one line."""
    seen = {
        str(name)
        for rows in (a, b)
        for row in rows
        for name, value in row.environment.items()
        if isinstance(value, str | int | float | bool)
    }
    names = [*FIELDS, *sorted(seen - set(FIELDS) - HIDDEN)]
    found = [(name, values(a, name), values(b, name)) for name in names]
    differ = [(name, _listed(x), _listed(y)) for name, x, y in found if x != y]
    same = [f"{line(name, 40)} {_listed(x)}" for name, x, y in found if x and x == y]
    shown = table(("What", "A", "B"), differ) if differ else el("p", "Nothing that was recorded differs.")
    rest = el("p", f"The same on both sides: {'; '.join(same)}.", class_="note") if same else None
    return el("section", el("h2", "What else differs"), shown, rest, id="around")


def _listed(found: set[str]) -> str:
    return joined([line(value, 80) for value in sorted(found)], 4) or "not recorded"


def alone(judged: Judged) -> Markup | None:
    """What only one side has; None where there is no such thing."""
    if not judged.alone:
        return None
    parts: list[object] = []
    for side in ("A", "B"):
        names = sorted(name for name, own in judged.alone if own == side)
        if names:
            items = [el("li", line(name, 200)) for name in names[:MOST_ALONE]]
            more = el("p", f"and {len(names) - MOST_ALONE} more", class_="note") if len(names) > MOST_ALONE else None
            parts.append(
                el("details", el("summary", f"Only {side} has {plural(len(names), 'kernel')} on a problem"), el("ul", items), more)
            )
    return el("section", el("h2", "What only one side has"), el("p", "Not compared, and in no mean.", class_="note"), parts, id="alone")


def words(margin: float) -> Markup:
    """What the answers mean."""
    terms: list[tuple[str, object]] = [
        ("ratio", "B's time over A's: below 1, B is faster. Each side at its best configuration of the kernel, over all its runs."),
        (
            "interval",
            f"Those of a table hold together with 95%. With {LEAST_RUNS} runs or more on both sides they come from how runs differ, "
            f"with fewer from the samples, with {DRIFT:.0%} more for what days differ by. Another board of the kind: {DEVICES:.0%} more.",
        ),
        ("same", f"The whole interval lies within {margin:.0%} of 1."),
        ("faster, slower", f"The interval excludes 1, the ratio is beyond {margin:.0%}, and where clocks are known the cycles agree."),
        ("cannot tell", "Everything else. It is no sign that nothing changed."),
        ("mean", "Geometric. Its interval is as wide as if all ratios erred alike: what days and boards differ by is common to them."),
    ]
    return el("section", el("h2", "Words"), pairs(terms), id="words")
