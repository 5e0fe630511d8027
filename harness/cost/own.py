"""Own: what klab measured itself on a chip, as facts, kept in the cache until the results change: a large store takes seconds to read."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import klab.harness.choose.select as choosing
import klab.harness.store.read as reading
from klab.harness.choose.candidates import value
from klab.harness.choose.profile import Choice
from klab.harness.choose.select import Selection
from klab.harness.cost.estimate import Origin
from klab.harness.cost.known import Known
from klab.harness.cost.ranges import Range
from klab.harness.store.paths import folders_to_read
from klab.harness.store.read import ReadReport, iter_results, part_files
from klab.harness.tune.objective import LATENCY, Objective, energy
from klab.kernels.contract import Chip, Json, Problem, digest
from klab.kernels.discover import operators
from klab.kernels.disk_cache import DiskCache, cache_root
from klab.kernels.errors import UsageError

SCHEMA = 1
# Fewer rows are read faster than they are worth keeping (0.3 ms a row).
WORTH_KEEPING = 300


def measured_facts(chip: Chip, given: Sequence[Path | str] | None, objective: Objective) -> tuple[list[Known], list[str]]:
    """(what was measured of a chip in these folders and files, what a reader must know of it); None: where klab keeps results.

    UsageError for a folder or file that was named and is not there.
    """
    report = ReadReport()
    files = part_files([folder for folder in folders_to_read(given) if folder.exists()], report)
    cache = DiskCache(cache_root() / "facts", most_per_folder=4)
    key = digest([SCHEMA, chip.name, str(objective), _state(files), _state(_code())])
    kept = cache.get(key)
    if kept is not None:
        with contextlib.suppress(KeyError, TypeError, ValueError, UsageError):  # kept by a klab with other problems: read again
            data = json.loads(kept)
            return [_from_json(item) for item in data["facts"]], data["notes"]
    rows = [row for row in iter_results(files, report) if row.chip == chip.name]
    selection = Selection(rows, objective, chip=chip.name)
    facts = facts_in(selection)
    notes = [*report.lines(), *selection.notes]
    if facts:
        notes.insert(0, f"{len(facts)} measured problems of {selection.device or chip.name} (klab's own)")
    if report.rows >= WORTH_KEEPING:
        cache.put(key, json.dumps({"facts": [_to_json(fact) for fact in facts], "notes": notes}).encode())
    return facts, notes


def facts_in(selection: Selection) -> list[Known]:
    """Of every problem the candidate of the least median, at its newest time. What `klab choose` settles by comparing the candidates with
    one another (milliseconds for each pair) moves a time by less than its interval.
    """
    found = []
    for key, row in {row.problem_key: row for row in selection.rows}.items():
        candidates = selection.candidates(key)
        problem = problem_of(row.operator, row.problem) if candidates else None
        if problem is None:
            continue
        best = min(candidates, key=lambda c: (value(c.row, selection.objective).median, c.name))
        time, joules = value(best.row, LATENCY), energy(best.metered_row)
        drawn = _ordered(joules.low, joules.median, joules.high) if joules else None
        us = _ordered(time.low, time.median, time.high)
        found.append(Known(problem, us, Origin.MEASURED, drawn, best.row.kernel, dict(best.row.config), "measured"))
    return found


def facts_of(choices: Iterable[Choice], how: str = "chosen and measured") -> list[Known]:
    """The chosen kernels' times and energies. A choice of an operator that klab no longer has is left out."""
    found = []
    for choice in choices:
        problem = problem_of(choice.wanted.operator, choice.wanted.problem)
        if problem is None:
            continue
        seen = choice.evidence
        joules = None
        if seen.energy_j is not None and seen.energy_interval_j is not None:
            joules = _ordered(seen.energy_interval_j[0], seen.energy_j, seen.energy_interval_j[1])
        words = f"{how}{' (of older code)' if choice.stale else ''}{f' as {choice.instead}' if choice.instead else ''}"
        us = _ordered(seen.interval_us[0], seen.median_us, seen.interval_us[1])
        found.append(Known(problem, us, Origin.MEASURED, joules, choice.kernel, choice.config, words))
    return found


def problem_of(operator: str, fields: Mapping[str, Json]) -> Problem | None:
    """The problem of these fields; None for one that this klab does not have, or of values that are none (a dtype nobody knows, say)."""
    problem_type = operators().get(operator)
    if problem_type is None:
        return None
    try:
        found = problem_type.from_json(fields)
        return found if found.flops() >= 0 and found.bytes_moved() >= 0 else None
    except (UsageError, TypeError, ValueError, KeyError, AttributeError, OverflowError, ZeroDivisionError):
        return None


def _ordered(low: float, middle: float, high: float) -> Range:
    """Rounded intervals may miss their median by a digit."""
    return Range(min(low, middle), middle, max(high, middle))


def _state(files: Iterable[Path]) -> list[Json]:
    """What changes when a file does."""
    found: list[Json] = []
    for path in files:
        with contextlib.suppress(OSError):  # gone since it was listed: reading says so
            stat = path.stat()
            found.append([str(path.resolve()), stat.st_size, stat.st_mtime_ns])
    return found


def _code() -> list[Path]:
    """What reads and chooses: another rule is another answer."""
    return sorted(path for module in (reading, choosing) for path in Path(module.__file__ or "").parent.glob("*.py"))


def _to_json(fact: Known) -> Json:
    joules = [fact.joules.low, fact.joules.mid, fact.joules.high] if fact.joules else None
    us = [fact.us.low, fact.us.mid, fact.us.high]
    return [fact.problem.operator, fact.problem.to_json(), us, joules, fact.kernel, dict(fact.config), fact.how]


def _from_json(item: Json) -> Known:
    operator, fields, us, joules, kernel, config, how = item
    problem = operators()[operator].from_json(fields)
    return Known(problem, Range(*us), Origin.MEASURED, Range(*joules) if joules else None, kernel, config, how)
