"""The top of a comparison: what is held against what, three sentences that say what came out, and what to know before believing them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence

from klab.harness.report.compare_judged import Judged, Pair
from klab.harness.report.html import Markup, el, pairs
from klab.harness.report.pick import Kind, Side
from klab.harness.report.sections.compare_around import values
from klab.harness.report.units import times
from klab.harness.store.frame import config_label
from klab.harness.store.result import Result
from klab.harness.watch.compare_rule import Answer, Found
from klab.harness.watch.wording import joined, line, plural

VERBS = {
    Answer.SAME: "{b} is the same as {a}",
    Answer.FASTER: "{b} is faster than {a}",
    Answer.SLOWER: "{b} is slower than {a}",
    Answer.CANNOT_TELL: "{b} cannot be told from {a}",
    Answer.BROKEN: "{b} is broken against {a}",
    Answer.NOT_COMPARED: "{b} was not compared with {a}",
}


def section(a: Side, b: Side, judged: Judged, of: str, warned: Sequence[str]) -> Markup:
    """The header. judged: the answers that the sentences are about; of: what each is of, "kernel on a problem"."""
    facts = [("A, held against", line(a.title, 160)), ("B", line(b.title, 160))]
    for name, field in (("Device", "device"), ("Commit", "commit"), ("Driver", "driver")):
        facts += [(f"{name} of {side}", _values(rows, field)) for side, rows in (("A", a.rows), ("B", b.rows))]
    told = [el("p", text) for text in sentences(judged, of, *called(a, b))]
    notes = (
        el("aside", el("h2", "Know before reading"), el("ul", [el("li", text) for text in warned]), class_="warnings") if warned else None
    )
    return el("header", el("h1", headline(judged, of, short(a), short(b))), told, pairs(facts), notes)


def headline(judged: Judged, of: str, a: str, b: str) -> str:
    """The verdict. Worse anywhere is worse, as in klab compare; where that is not everywhere, the headline says so."""
    found = judged.comparison
    said = VERBS[found.answer].format(a=a, b=b)
    compared = [pair for pair in judged.pairs if pair.found.answer is not Answer.NOT_COMPARED]
    count = sum(pair.found.answer is found.answer for pair in compared)
    if not found.answer.fails or not count or count == len(compared):
        return said
    return f"{said} on {count} of {plural(len(compared), of)}" + (", faster in the mean" if found.mean.answer is Answer.FASTER else "")


def called(a: Side, b: Side) -> tuple[str, str]:
    """What sentences call the sides: chips by their names, all else A and B."""
    return (short(a), short(b)) if a.kind is Kind.CHIP else ("A", "B")


def sentences(judged: Judged, of: str, a: str = "A", b: str = "B") -> list[str]:
    """What came out in all, of how many, and what changed most."""
    found, mean = judged.comparison, judged.comparison.mean
    compared = [pair for pair in judged.pairs if pair.found.answer is not Answer.NOT_COMPARED]
    counts = Counter(pair.found.answer for pair in judged.pairs)
    said = [
        f"{b} takes {ratio(mean)} of {a}'s time, the geometric mean over {plural(_timed(judged), of)}. "
        if mean.ratio
        else "No ratio of times can be formed. "
    ]
    said[0] += f"Verdict: {found.answer.value}, because {found.why}."
    named = [f"{counts[answer]} {word}" for answer, word in _COUNTED if counts[answer]]
    said.append(f"Of {plural(len(judged.pairs), of)}: {', '.join(named)}." if named else f"No {of} was compared.")
    clear = [pair for pair in compared if pair.found.answer in (Answer.FASTER, Answer.SLOWER) and pair.found.ratio]
    if clear:
        far = max(clear, key=lambda pair: abs(math.log(pair.found.ratio or 1.0)))
        said.append(f"Most changed: {name_of(far)}, {ratio(far.found)} ({far.found.answer.value}).")
    elif compared:
        said.append(f"No single {of} is shown to be faster or slower.")
    return said


_COUNTED = (
    (Answer.BROKEN, "fail on B and did not on A"), (Answer.SLOWER, "slower"), (Answer.FASTER, "faster"), (Answer.SAME, "the same"),
    (Answer.CANNOT_TELL, "cannot be told"), (Answer.NOT_COMPARED, "not compared"),
)  # fmt: skip


def ratio(found: Found) -> str:
    """`0.973× [0.961, 0.985]`, "" where there is none."""
    if found.ratio is None:
        return ""
    if found.low is None or found.high is None or not math.isfinite(found.high):
        return times(found.ratio)
    return f"{times(found.ratio)} [{times(found.low)[:-1]}, {times(found.high)[:-1]}]"


def name_of(pair: Pair) -> str:
    """The problem, and the kernel or kernels that ran it."""
    names = dict.fromkeys(_ran(row) for row in (pair.a, pair.b) if row is not None)
    return line(f"{pair.problem}, {' and '.join(names) or pair.kernel}", 200)


def _ran(row: Result) -> str:
    label = config_label(row)
    return row.kernel.partition("/")[2] + (f" ({label})" if label != "-" else "")


def short(side: Side) -> str:
    """A side in a heading."""
    if side.kind is Kind.RESULTS:
        return line(side.name.rstrip("/").rpartition("/")[2], 60)
    return line(side.name.upper() if side.kind is Kind.CHIP else side.name, 60)


def warnings(a: Side, b: Side, notes: Iterable[str]) -> list[str]:
    """What a reader must know before believing the answers: other machines, single runs, and what reading met."""
    said: list[str] = []
    devices = values(a.rows, "device"), values(b.rows, "device")
    boards = values(a.rows, "device_uuid"), values(b.rows, "device_uuid")
    hosts = values(a.rows, "host"), values(b.rows, "host")
    if a.kind is Kind.CHIP:
        said.append(
            "The sides are two chips. What is compared is what each was measured to do, of a kernel that both ran and of the best of each; "
            "neither anchors nor clocks are common ground. 5% is allowed for how boards differ, and 3% more for what days differ "
            "by where a side has fewer than three runs."
        )
    elif devices[0] and devices[1] and not devices[0] & devices[1]:
        said.append(
            f"Different devices: A on {joined(sorted(devices[0]))}, B on {joined(sorted(devices[1]))}. The ratios tell the machines apart, "
            "not what runs on them."
        )
    elif boards[0] and boards[1] and not boards[0] & boards[1]:
        said.append(
            "Different boards: no device measured both sides. Boards of one kind differ by up to 5%, which every interval allows for."
        )
    elif not boards[0] and hosts[0] and hosts[1] and not hosts[0] & hosts[1]:
        said.append(f"Different hosts: A on {joined(sorted(hosts[0]))}, B on {joined(sorted(hosts[1]))}.")
    shared = devices[0] & devices[1]
    if a.kind is not Kind.CHIP and shared and devices[0] ^ devices[1]:
        said.append(f"Several devices: only {joined(sorted(shared))} measured both sides; rows of the others are among them.")
    few = min(len({row.run_id for row in side.rows}) for side in (a, b))
    if few < 3 and a.kind is not Kind.CHIP:
        said.append(
            "One or two runs on a side do not show by how much days differ: 3% is allowed for that (1% over an anchor of the same laps), "
            "so smaller differences cannot be told. klab compare COMMIT COMMIT measures both in turns and tells less than 1%."
        )
    return [*said, *(note for note in notes if a.kind is not Kind.CHIP or not note.startswith(("device: ", "power_limit_w: ")))]


def _values(rows: Sequence[Result], name: str) -> str:
    found = sorted(values(rows, name))
    return joined([line(value[:12] if name == "commit" else value, 60) for value in found]) or "not recorded"


def _timed(judged: Judged) -> int:
    return sum(pair.found.ratio is not None for pair in judged.pairs)
