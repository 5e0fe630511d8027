"""How far the evidence of a chip has come, part by part: what its sittings reached, and what its rows hold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from klab.harness.choose.evidence_repeats import Repeats
from klab.harness.report.evidence_search import ToBest
from klab.harness.store.query import numerics_verified
from klab.harness.store.result import Result
from klab.harness.tune.evidence import PARTS, SITTINGS_WANTED

COMPLETE, BEGUN, NEVER, IMPOSSIBLE = "complete", "begun", "not begun", "not possible"
NAMED = 3


@dataclass(frozen=True)
class Covered:
    """A part: its state, the seconds of all sittings together, what the rows hold of it, and what is missing."""

    part: str
    state: str
    seconds: float
    holds: str
    missing: str = ""


def coverage(
    sittings: Sequence[Mapping[str, Any]], rows: Sequence[Result], spaces: Sequence[ToBest], repeated: Repeats, wanted: Sequence[str]
) -> list[Covered]:
    """In the order of PARTS. wanted: keys of the models' problems."""
    tried: dict[str, list[Mapping[str, Any]]] = {part: [] for part in PARTS}
    for sitting in sittings:
        for done in sitting.get("parts") or ():
            if isinstance(done, Mapping) and done.get("part") in tried:
                tried[done["part"]].append(done)
    holds = _holds(tried, rows, spaces, repeated, wanted)
    found = []
    for part, entries in tried.items():
        state, missing = _state(part, entries, repeated)
        if part in ("spaces", "tuner"):
            state, missing = _searched(part, spaces)
        seconds = sum(float(one.get("seconds") or 0.0) for one in entries)
        found.append(Covered(part, state, seconds, holds.get(part, ""), missing))
    return found


def _state(part: str, entries: Sequence[Mapping[str, Any]], repeated: Repeats) -> tuple[str, str]:
    if not entries:
        return NEVER, "all of it"
    if part == "repeat" and len(repeated.runs) < SITTINGS_WANTED:
        return BEGUN, f"only {len(repeated.runs)} sittings with times: {SITTINGS_WANTED} wanted"
    last = entries[-1]
    left, statuses, known = int(last.get("left") or 0), dict(last.get("statuses") or {}), int(last.get("known") or 0)
    notes = [str(note) for note in last.get("notes") or ()]
    if left:
        return BEGUN, f"{left} not reached in the newest sitting" + (f" ({notes[0]})" if part == "tests" and notes else "")
    if part == "tests":
        return _tests(statuses, known, notes)
    if not statuses and not known and notes:
        return IMPOSSIBLE, notes[0]
    return COMPLETE, ""


def _searched(part: str, spaces: Sequence[ToBest]) -> tuple[str, str]:
    """Of these the journals tell: a sitting counts what it did not reach, and not how far it came."""
    open_ones = [one.problem for one in spaces if (not one.complete if part == "spaces" else one.tuner is None)]
    begun = any(one.recorded for one in spaces) if part == "spaces" else len(open_ones) < len(spaces)
    if not open_ones:
        return COMPLETE, ""
    more = f" and {len(open_ones) - NAMED} more" if len(open_ones) > NAMED else ""
    return (BEGUN if begun else NEVER), ", ".join(open_ones[:NAMED]) + more


def _tests(statuses: Mapping[str, int], known: int, notes: Sequence[str]) -> tuple[str, str]:
    failed = [note for note in notes if note.startswith("failed: ")]
    if failed:
        more = f" and {len(failed) - NAMED} more" if len(failed) > NAMED else ""
        return COMPLETE, "; ".join(failed[:NAMED]) + more
    if not known and not any(count for status, count in statuses.items() if status != "skipped"):
        return IMPOSSIBLE, "every test was skipped: there was no GPU" if statuses else "no test ran"
    return COMPLETE, ""


def _holds(
    tried: Mapping[str, Sequence[Mapping[str, Any]]],
    rows: Sequence[Result],
    spaces: Sequence[ToBest],
    repeated: Repeats,
    wanted: Sequence[str],
) -> dict[str, str]:
    asked = set(wanted)
    timed = {row.problem_key for row in rows if row.median_us and numerics_verified(row)}
    both = timed & {row.problem_key for row in rows if row.library and row.median_us and numerics_verified(row)}
    own = {row.problem_key for row in rows if not row.library and row.median_us and numerics_verified(row)}
    metered = {(row.problem_key, row.kernel) for row in rows if row.energy_j is not None}
    right = {row.kernel for row in rows if numerics_verified(row)}
    wrong = {row.kernel for row in rows if row.status.value == "incorrect"}
    counts: dict[str, int] = {}
    for done in tried["tests"]:
        for status, count in dict(done.get("statuses") or {}).items():
            counts[status] = counts.get(status, 0) + int(count)
    devices = sum(int(dict(done.get("statuses") or {}).get("calibrated", 0)) for done in tried["calibration"])
    joules = f"{len(metered)} kernels on {len({key for key, _ in metered})} problems have joules"
    return {
        "tests": ", ".join(f"{count} {status}" for status, count in sorted(counts.items())) or "nothing",
        "correctness": f"{len(right)} kernels with a verified result, {len(wrong)} with a wrong one",
        "calibration": f"{devices} device{'' if devices == 1 else 's'} calibrated",
        "comparison": f"{len(asked & timed)} of the models' {len(asked)} problems timed, {len(asked & both & own)} beside a library",
        "energy": joules,
        "spaces": f"{sum(one.complete for one in spaces)} of {len(spaces)} complete, {sum(one.recorded for one in spaces):,} candidates",
        "tuner": f"{sum(one.tuner is not None for one in spaces)} of {len(spaces)} problems searched",
        "repeat": f"{len(repeated.times)} trials timed in two runs and more, {len(repeated.energies)} metered",
        "energy_rest": joules,
    }
