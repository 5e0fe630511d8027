"""What `--compare A B` may name: two runs, chips, commits, or places with results; and the rows of each."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from pathlib import Path

from klab.harness.store.paths import folder_to_read
from klab.harness.store.query import age
from klab.harness.store.read import ReadReport, iter_results
from klab.harness.store.remote import shown
from klab.harness.store.result import Result
from klab.harness.store.urls import is_url
from klab.harness.watch.wording import joined, line, plural
from klab.kernels.errors import UsageError

LATEST, PREVIOUS = "latest", "previous"
# Of a commit fewer digits say nothing, and more are not needed: some rows have all of them, some twelve.
LEAST_DIGITS, DIGITS = 4, 12
CANDIDATES = 8


class Kind(StrEnum):
    """How a side was named."""

    RUN = "run"
    CHIP = "chip"
    COMMIT = "commit"
    RESULTS = "results"


@dataclass(frozen=True)
class Side:
    """One side: its rows as they were recorded, none of them published by others. `title`: in words, `name`: short."""

    kind: Kind
    name: str
    title: str
    rows: tuple[Result, ...]


Read = Callable[[], Iterable[Result]]
"""Stored rows, anew at every call: a store may be larger than memory, its sides are not."""


@dataclass
class Known:
    """What words may mean in a store: the newest row's age by run, the chips, the commits, and the chips of published rows."""

    runs: dict[str, tuple[datetime, str]] = field(default_factory=dict)
    chips: set[str] = field(default_factory=set)
    commits: dict[str, None] = field(default_factory=dict)
    published: set[str] = field(default_factory=set)

    @classmethod
    def of(cls, rows: Iterable[Result]) -> Known:
        """Everything in these rows."""
        found = cls()
        for row in rows:
            if row.kind == "reference":
                found.published.add(row.chip)
                continue
            at = age(row)[:2]
            found.runs[row.run_id] = max(at, found.runs.get(row.run_id, at))
            found.chips.add(row.chip)
            if commit_of(row):
                found.commits[commit_of(row)] = None
        return found

    @property
    def latest(self) -> list[str]:
        """The runs by their newest row, the latest first."""
        return sorted(self.runs, key=lambda run: self.runs[run], reverse=True)

    def told(self) -> str:
        """What there is, for somebody who named what is not."""
        commits = list(dict.fromkeys(commit[:DIGITS] for commit in self.commits))
        lists = (("runs", self.latest), ("chips", sorted(self.chips)), ("commits", commits))
        told = [f"{what} {joined([line(name, 60) for name in names], CANDIDATES)}" for what, names in lists if names]
        return "; ".join(told) + "; or a folder or file of results" if told else "there are no results; name folders or files of results"


def pick(read: Read, a: str, b: str, report: ReadReport | None = None) -> tuple[Side, Side]:
    """The two sides among stored rows, or in places of their own (what reading those meets is noted in `report`).

    A word is a run's identity or its beginning, `latest` or `previous` (runs by their newest row), a chip, the first digits of a commit, or
    a folder, file or URL of results; `run:`, `chip:`, `commit:` or `results:` before it says which. UsageError, with what there is, for a
    word that names nothing or several things, for a chip against something else, and for two words that name one thing.
    """
    known = Known.of(read())
    (kind, name), (other, same) = named = _named(known, a), _named(known, b)
    if Kind.CHIP in (kind, other) and kind != other:
        raise UsageError(f"{a} is a {kind} and {b} a {other}: a chip is compared with a chip")
    if (kind, name) == (other, same):
        raise UsageError(f"{a} and {b} are both {kind} {line(name, 80)}")
    rows: tuple[list[Result], list[Result]] = [], []
    for row in read() if any(one is not Kind.RESULTS for one, _ in named) else ():
        for (one, word), kept in zip(named, rows, strict=True):
            if row.kind != "reference" and _is(one, word, row):
                kept.append(row)
    sides = [_side(one, word, kept, report) for (one, word), kept in zip(named, rows, strict=True)]
    if (sides[0].kind, sides[0].name) == (sides[1].kind, sides[1].name):
        raise UsageError(f"{a} and {b} are one place: {line(sides[0].name, 80)}")
    return sides[0], sides[1]


def _named(known: Known, said: str) -> tuple[Kind, str]:
    """What a word means."""
    head, colon, rest = said.partition(":")
    kinds: tuple[Kind, ...] = (Kind(head),) if colon and head in set(Kind) else tuple(Kind)
    word = rest if len(kinds) == 1 else said
    if not word:
        raise UsageError("a side of --compare is empty: name a run, a chip, a commit or a folder of results")
    found = [(kind, name) for kind in kinds for name in _names(known, kind, word)]
    exact = [(kind, name) for kind, name in found if name == word or kind is Kind.RESULTS or word in (LATEST, PREVIOUS)]
    found = exact or found
    if len(found) == 1:
        return found[0]
    if found:
        told = joined([f"{kind}:{line(name, 80)}" for kind, name in found], CANDIDATES)
        raise UsageError(f"{said!r} is {len(found)} things: {told}; write one of them")
    if word.lower() in known.published - known.chips:
        raise UsageError(f"{word} has published rows alone, and what others measured is no side: klab reference --chip A,B compares tables")
    raise UsageError(f"{said!r} names nothing here: {known.told()}")


def _names(known: Known, kind: Kind, word: str) -> list[str]:
    """What of a kind a word may mean."""
    asked = word.lower()
    if kind is Kind.RUN:
        if word in (LATEST, PREVIOUS):
            return known.latest[word == PREVIOUS :][:1]
        return [word] if word in known.runs else [run for run in known.latest if run.startswith(word)]
    if kind is Kind.CHIP:
        return sorted(chip for chip in known.chips if chip.lower() == asked)
    if kind is Kind.COMMIT:
        fits = (one for one in known.commits if len(asked) >= LEAST_DIGITS and (one.startswith(asked) or asked.startswith(one)))
        return sorted({commit[:DIGITS] for commit in fits})
    return [word] if is_url(word) or _is_there(word) else []


def _is_there(word: str) -> bool:
    """Is it a file or a folder? What is too long for the name of one is none."""
    try:
        return Path(word).exists()
    except (OSError, ValueError):
        return False


def _is(kind: Kind, name: str, row: Result) -> bool:
    return {Kind.RUN: row.run_id, Kind.CHIP: row.chip, Kind.COMMIT: commit_of(row)[:DIGITS]}.get(kind) == name


def _side(kind: Kind, name: str, rows: Sequence[Result], report: ReadReport | None) -> Side:
    if kind is not Kind.RESULTS:
        return Side(kind, name, _titled(f"{kind} {name}", rows), tuple(rows))
    place = folder_to_read(name)
    rows = [row for row in iter_results(place, report) if row.kind != "reference"]
    return Side(kind, str(place if is_url(name) else place.resolve()), _titled(shown(place), rows), tuple(rows))


def _titled(name: str, rows: Sequence[Result]) -> str:
    days = sorted({row.recorded_at[:10] for row in rows if row.recorded_at})
    when = f", {days[0]}" + (f" to {days[-1]}" if len(days) > 1 else "") if days else ""
    return f"{line(name, 120)} ({plural(len(rows), 'result')}{when})"


def commit_of(row: Result) -> str:
    """The commit that a row was measured from, "" where that was not recorded."""
    return str(row.environment.get("commit") or "")
