"""What stands behind each winner: its rounds beside its rivals', the state of the device, how it was checked and timed, and how to do it
again. For the page's script by the name of the winner's row, and in plain HTML for readers without one."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from klab.harness.choose.profile import Rival
from klab.harness.report.html import Markup, el, pairs
from klab.harness.report.sections.facts import facts
from klab.harness.report.sections.winners import Winner, label, winners
from klab.harness.report.subject import Story
from klab.harness.report.units import interval, time
from klab.harness.store.result import Result
from klab.harness.watch.wording import line
from klab.kernels.contract import Json, canonical_json

# Of a row's rounds every k-th is kept, so that no more than these are: fewer where the page has many winners.
MOST_ROUNDS = (60, 30, 15)
MOST_POWER = 120
MOST_CONTENDERS = 4
# All evidence of a page as JSON. It is packed to about a third of that.
MOST_BYTES = 1_500_000
DIGITS = 5
# Rows of which the evidence is there without a script too.
MOST_PLAIN = 40


class Pool:
    """Values that many records share, each once: the place of each in `values`."""

    def __init__(self) -> None:
        self.values: list[Json] = []
        self._places: dict[tuple[object, ...], int] = {}

    def place(self, name: tuple[object, ...], value: Json) -> int:
        """Of this value, which goes by this name and is added where it is not there yet."""
        if name not in self._places:
            self._places[name] = len(self.values)
            self.values.append(value)
        return self._places[name]


def payload(story: Story) -> dict[str, object]:
    """{environments: [...], facts: [[name, value], ...], records: {identity: record}}: at most MOST_BYTES of JSON. A record has the places
    of its facts and of its environment in these lists.

    With many winners fewer rounds are kept of each; where even that is too much, the fastest winners keep none of theirs, and say so.
    """
    found = winners(story)
    rows = {subject.chip: _by_name(subject.fine) for subject in story.subjects}
    # Energy is measured apart, and seldomer than time.
    metered = {subject.chip: _by_name(row for row in subject.fine if row.power_trace) for subject in story.subjects}
    environments, told = Pool(), Pool()
    records: dict[str, dict[str, Any]] = {}
    raw: dict[str, list[Contender]] = {}
    power: dict[str, dict[str, list[float | None]] | None] = {}
    for one in found:
        record = {"problem": one.choice.wanted.label, "chip": one.subject.chip, "kernel": one.choice.kernel}
        records[one.identity] = record | {
            "config": dict(one.choice.config),
            "facts": [told.place(fact, list(fact)) for fact in facts(story, one)],
            "environment": _placed(environments, one.row) if one.row else None,
        }
        raw[one.identity] = _contenders(one, rows[one.subject.chip])
        power[one.identity] = _power(metered[one.subject.chip].get(_name(one.row)) if one.row else None)

    def size_of(one: Winner, most: int) -> int:
        trace = power[one.identity]
        return _size_of(raw[one.identity], most) + (16 * len(trace["s"]) if trace else 0)

    left = MOST_BYTES - len(json.dumps([environments.values, told.values, records]))
    most = next((most for most in MOST_ROUNDS if sum(size_of(one, most) for one in found) <= left), MOST_ROUNDS[-1])
    for one in sorted(found, key=lambda one: -one.choice.evidence.median_us):
        left -= size_of(one, most)
        if left >= 0:
            records[one.identity]["series"] = [_series(*contender, most) for contender in raw[one.identity]]
            records[one.identity]["power"] = power[one.identity]
        else:  # and no faster one in the place of a slower one
            left = -1
            records[one.identity]["left_out"] = "The rounds of the fastest winners are left out of a page this large; the store has them."
    return {"environments": environments.values, "facts": told.values, "records": records}


def plain(story: Story) -> Markup | None:
    """The evidence of the winners as it reads without a script, of the slowest MOST_PLAIN: the script's panels have it all."""
    found = sorted(winners(story), key=lambda one: -one.choice.evidence.median_us)
    if not found:
        return None
    rows = {subject.chip: _by_name(subject.fine) for subject in story.subjects}
    blocks = []
    for one in found[:MOST_PLAIN]:
        contenders = [
            f"{role}: {_title(row)}, {time(row.median_us)} [{_ends(row)}], {len(row.samples_us)} rounds"
            for role, row, _ in _contenders(one, rows[one.subject.chip])
        ]
        summary = f"{one.choice.wanted.label} on {one.subject.chip}: {one.choice.kernel.partition('/')[2]}"
        blocks.append(
            el("details", el("summary", line(summary, 200)), el("ul", [el("li", text) for text in contenders]), pairs(facts(story, one)))
        )
    rest = len(found) - len(blocks)
    more = el("p", f"{rest} faster winners have theirs in the panels of the table, which need a script.", class_="note") if rest else None
    return el("details", el("summary", f"Evidence of {len(blocks)} winners in plain text"), blocks, more, class_="evidence-plain")


def thinned(count: int, most: int) -> list[int]:
    """The places of at most `most` of `count` rounds: every k-th from the first on."""
    step = max(1, -(-count // most))
    return list(range(0, count, step))


def _placed(environments: Pool, row: Result) -> int:
    named = {name: "not known" if value is None else line(value, 200) for name, value in sorted(row.environment.items())}
    return environments.place(tuple(named.items()), named)


Name = tuple[str, str, str]
Contender = tuple[str, Result, str]
"""The role, the row, and how it was compared with the winner's (see `Rival.how`)."""


def _name(row: Result) -> Name:
    return row.problem_key, row.kernel, canonical_json(row.config)


def _by_name(rows: Iterable[Result]) -> dict[Name, Result]:
    """The newest of these rows of each problem, kernel and configuration."""
    return {_name(row): row for row in rows}


def _contenders(one: Winner, rows: Mapping[Name, Result]) -> list[Contender]:
    """The row of the winner, then those of its nearest rival, of the best library and of its default configuration, each once."""
    evidence, row = one.choice.evidence, one.row
    if row is None:
        return []
    found: list[Contender] = [("winner", row, "")]
    nearest = evidence.tied[0] if evidence.tied else evidence.runner_up
    for role, rival in (("nearest rival", nearest), ("best library", evidence.library), ("default", evidence.default)):
        other = _row(rival, one, rows)
        if rival is None or other is None or other is row:
            continue
        at = next((n for n, (_, known, _) in enumerate(found) if known is other), None)
        if at is None:
            found.append((role, other, rival.how))
        else:
            found[at] = (f"{found[at][0]} and {role}", other, found[at][2])
    return found[:MOST_CONTENDERS]


def _row(rival: Rival | None, one: Winner, rows: Mapping[Name, Result]) -> Result | None:
    if rival is None or one.row is None:
        return None
    names = (
        (key, rival.kernel, canonical_json(rival.config)) for key in dict.fromkeys((one.choice.wanted.problem_key, one.row.problem_key))
    )
    return next((rows[name] for name in names if name in rows), None)


def _series(role: str, row: Result, how: str, most: int) -> dict[str, Any]:
    """The rounds of a row, thinned; beside them what was read in the same rounds, as one number where it never changed."""
    kept = thinned(len(row.samples_us), most)
    series: dict[str, Any] = {
        "role": role,
        "title": _title(row),
        "us": [_rounded(row.samples_us[n]) for n in kept],
        "every": kept[1] - kept[0] if len(kept) > 1 else 1,
        "rounds": len(row.samples_us),
        "median": _rounded(row.median_us),
        "low": _rounded(row.ci_low_us),
        "high": _rounded(row.ci_high_us),
        "run": line(row.run_id, 100),
        "how": how,
    }
    if any(row.marked) and len(row.marked) == len(row.samples_us):
        series["marked"] = [row.marked[n] for n in kept]
    for name, values in (("clock", row.clocks_mhz), ("heat", row.temperatures_c)):
        if len(values) == len(row.samples_us) and any(value is not None for value in values):
            read = [_rounded(values[n]) for n in kept]
            series[name] = read[0] if len(set(read)) == 1 else read
    return series


def _power(row: Result | None) -> dict[str, list[float | None]] | None:
    """(seconds, watts) of the winner's energy measurement, thinned."""
    if row is None or not row.power_trace:
        return None
    kept = [row.power_trace[n] for n in thinned(len(row.power_trace), MOST_POWER)]
    return {"s": [_rounded(point[0]) for point in kept], "w": [_rounded(point[1]) for point in kept]}


def _title(row: Result) -> str:
    return line(" ".join(filter(None, (row.kernel.partition("/")[2], label(row.config)))), 200)


def _ends(row: Result) -> str:
    return interval(row.ci_low_us, row.ci_high_us) if row.ci_low_us is not None and row.ci_high_us is not None else "no interval"


def _rounded(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else float(f"{value:.{DIGITS}g}")


def _size_of(contenders: Sequence[Contender], most: int) -> int:
    """About as many bytes as the rounds of these take as JSON."""
    numbers = 0
    for _, row, _ in contenders:
        kept = len(thinned(len(row.samples_us), most))
        steady = [len(set(values)) <= 1 for values in (row.clocks_mhz, row.temperatures_c)]
        numbers += kept * (1 + sum(not same for same in steady)) + 30
    return 8 * numbers
