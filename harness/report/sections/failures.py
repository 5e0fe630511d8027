"""What did not work, by status, with the reason: a failure is a result too."""

from __future__ import annotations

from collections import defaultdict

from klab.harness.report.html import Cell, Line, Markup, el, table
from klab.harness.report.limits import dtype_of
from klab.harness.report.subject import Story
from klab.harness.store.frame import config_label
from klab.harness.store.result import Result

# One broken kernel in a tuned space fails a thousand times for one reason: rows are grouped, and the groups listed end somewhere.
GROUPS = 150
LONGEST_REASON, LONGEST_TITLE = 300, 2000

MEANING = {
    "compile_error": "did not compile",
    "incorrect": "computed something else than the reference",
    "out_of_memory": "needed more memory than there was",
    "crashed": "killed its process or the device's context",
    "timeout": "did not end in time",
    "throttled": "the hardware throttled during most rounds, so the time does not count",
    "unsupported": "cannot run here",
}


COLUMNS = ("Status", "Kernel", "Reason", "Rows", "For example")
Group = tuple[str, str, str, str]
"""Chip, status, kernel and reason."""


def section(story: Story) -> Markup:
    """Groups of equal chip, kernel, status and reason in one table, the largest first; what each status means above it."""
    groups: dict[Group, list[Result]] = defaultdict(list)
    for subject in story.subjects:
        for row in subject.failed:
            groups[(subject.chip, row.status.value, row.kernel, row.reason)].append(row)
    if not groups:
        words = "None: every trial that was run gave a checked time." if any(s.rows for s in story.subjects) else "None: no trial was run."
        return el("section", el("h3", "Failures"), el("p", words))
    ordered = sorted(groups.items(), key=lambda group: (group[0][1], -len(group[1]), group[0]))
    several = len(story.subjects) > 1
    lines = [_line(story, group, rows, several) for group, rows in ordered[:GROUPS]]
    rest = sum(len(rows) for _, rows in ordered[GROUPS:])
    more = el("p", f"{rest} more rows are left out here; `klab results --all` has them.", class_="note") if rest else None
    counts: dict[str, int] = defaultdict(int)
    for (_, status, _, _), rows in groups.items():
        counts[status] += len(rows)
    for subject in story.subjects:
        for status, count in subject.left_out.items():
            if status in MEANING:
                counts[status] += count
    words_of = [el("li", el("b", f"{count} {status}"), f": {MEANING.get(status, '')}") for status, count in sorted(counts.items())]
    columns = (COLUMNS[0], "Chip", *COLUMNS[1:]) if several else COLUMNS
    shown = table(columns, lines, ("Rows",), identity="failures")
    return el("section", el("h3", "Failures"), el("ul", words_of), shown, more)


def _line(story: Story, group: Group, rows: list[Result], several: bool) -> Line:
    chip, status, kernel, reason = group
    example = rows[0]
    places = [place for key in dict.fromkeys(row.problem_key for row in rows) for place in story.occurs.get(key, ())]
    dims = {
        "chip": chip,
        "model": tuple(dict.fromkeys(place.model for place in places if place.model)),
        "phase": tuple(dict.fromkeys(place.phase for place in places)),
        "operator": tuple(dict.fromkeys(row.operator for row in rows)),
        "dtype": tuple(dict.fromkeys(dtype_of(row) for row in rows)),
        "kernel": kernel.partition("/")[2],
        "status": status,
    }
    short = el("span", f"{reason[:LONGEST_REASON]}...", title=reason[:LONGEST_TITLE]) if len(reason) > LONGEST_REASON else reason
    config = config_label(example) if example.config else ""
    named = [example.problem_label, el("small", config if len(config) <= LONGEST_REASON else f"{config[:LONGEST_REASON]}...")]
    cells = [Cell(el("b", status), status), kernel, short or "no reason recorded", Cell(len(rows), len(rows)), named]
    return Line([cells[0], chip, *cells[1:]] if several else cells, dims)
