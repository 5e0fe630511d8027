"""The runs of a store, and which of them a person means: a full id, the start of one, `latest`, `previous`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime

from klab.harness.store.query import age
from klab.harness.store.result import Result
from klab.kernels.errors import UsageError

LATEST, PREVIOUS = "latest", "previous"
LISTED = 8


@dataclass(frozen=True)
class Run:
    """A run: its id, when its newest row was recorded, its chips, how many rows it has."""

    identity: str
    at: datetime
    chips: tuple[str, ...]
    rows: int

    @property
    def line(self) -> str:
        """For people."""
        return f"{self.identity} ({self.at:%Y-%m-%d %H:%M}, {', '.join(self.chips)}, {self.rows:,} row{'' if self.rows == 1 else 's'})"


def runs_of(rows: Iterable[Result]) -> list[Run]:
    """The runs of these rows, the newest first. Published rows are of no run."""
    found: dict[str, tuple[datetime, set[str], int]] = {}
    for row in rows:
        if row.kind == "reference":
            continue
        at, chips, count = found.get(row.run_id, (age(row)[0], set(), 0))
        found[row.run_id] = (max(at, age(row)[0]), chips | {row.chip}, count + 1)
    return newest_first(Run(run, at, tuple(sorted(chips)), count) for run, (at, chips, count) in found.items())


def newest_first(runs: Iterable[Run]) -> list[Run]:
    """Runs by their newest row; the id decides between two of one second."""
    return sorted(runs, key=lambda run: (run.at, run.identity), reverse=True)


def named_runs(words: Sequence[str], runs: Sequence[Run]) -> list[str]:
    """The ids that these words mean among `runs` (the newest first), each once.

    A word is `latest`, `previous`, an id, or the start of exactly one id. UsageError for one that is none of these lists the newest runs.
    """
    found: dict[str, None] = {}
    for word in words:
        found[_named(word, runs)] = None
    return list(found)


def split(given: Iterable[str]) -> list[str]:
    """The words of an option that takes several, separated by commas; UsageError where there are none."""
    words = [word.strip() for text in given for word in text.split(",") if word.strip()]
    if not words:
        raise UsageError(f"--runs names no run: give ids, the starts of ids, {LATEST} or {PREVIOUS}")
    return words


def _named(word: str, runs: Sequence[Run]) -> str:
    ids = [run.identity for run in runs]
    if word in ids:
        return word
    for name, at in ((LATEST, 0), (PREVIOUS, 1)):
        if word == name:
            if len(ids) <= at:
                raise UsageError(f"there is no {name} run: {_listed(runs)}")
            return ids[at]
    starts = [run for run in runs if run.identity.startswith(word)]
    if len(starts) == 1:
        return starts[0].identity
    if starts:
        raise UsageError(f"{word!r} begins the ids of {len(starts)} runs: {_listed(starts)}")
    raise UsageError(f"no run {word!r}: {_listed(runs)}")


def _listed(runs: Sequence[Run]) -> str:
    if not runs:
        return "the store has no rows of any run"
    more = f"; and {len(runs) - LISTED:,} more" if len(runs) > LISTED else ""
    return "; ".join(run.line for run in runs[:LISTED]) + more
