"""What did not work, by status, with the reason: a failure is a result too."""

from __future__ import annotations

from collections import defaultdict

from klab.harness.report.html import Markup, el, table
from klab.harness.report.subject import Subject
from klab.harness.store.frame import config_label
from klab.harness.store.result import Result

# One broken kernel in a tuned space fails a thousand times for one reason: rows are grouped, and the groups listed end somewhere.
GROUPS = 150
LONGEST_REASON = 300

MEANING = {
    "compile_error": "did not compile",
    "incorrect": "computed something else than the reference",
    "out_of_memory": "needed more memory than there was",
    "crashed": "killed its process or the device's context",
    "timeout": "did not end in time",
    "throttled": "the hardware throttled during most rounds, so the time does not count",
    "unsupported": "cannot run here",
}


def section(subject: Subject) -> Markup:
    """Groups of equal kernel, status and reason, the largest first."""
    groups: dict[tuple[str, str, str], list[Result]] = defaultdict(list)
    for row in subject.failed:
        groups[(row.status.value, row.kernel, row.reason)].append(row)
    if not groups:
        return el("section", el("h3", "Failures"), el("p", "None: every trial that was run gave a checked time."))
    ordered = sorted(groups.items(), key=lambda group: (group[0][0], -len(group[1]), group[0]))
    lines = [_line(*name, rows) for name, rows in ordered[:GROUPS]]
    rest = sum(len(rows) for _, rows in ordered[GROUPS:])
    more = el("p", f"{rest} more rows are left out here; `klab results --all` has them.", class_="note") if rest else None
    counts: dict[str, int] = defaultdict(int)
    for (status, _, _), rows in groups.items():
        counts[status] += len(rows)
    words = [el("li", el("b", f"{count} {status}"), f": {MEANING.get(status, '')}") for status, count in sorted(counts.items())]
    shown = table(("Status", "Kernel", "Reason", "Rows", "For example"), lines, ("Rows",))
    return el("section", el("h3", "Failures"), el("ul", words), shown, more)


def _line(status: str, kernel: str, reason: str, rows: list[Result]) -> list[object]:
    example = rows[0]
    short = reason if len(reason) <= LONGEST_REASON else f"{reason[:LONGEST_REASON]}..."
    return [status, kernel, short or "no reason recorded", len(rows), [example.problem_label, el("small", config_label(example))]]
