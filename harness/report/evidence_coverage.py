"""How far the evidence of a chip has come, part by part: what its sittings reached, and what its rows hold."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from klab.harness.choose.evidence_repeats import Repeats
from klab.harness.measure.calibration import device_of
from klab.harness.report.evidence_search import ToBest
from klab.harness.store.query import numerics_verified
from klab.harness.store.result import Result
from klab.harness.tune.device_tests_kept import Tally
from klab.harness.tune.evidence import CUT_OFF, PARTS, REPEATED, SITTINGS_WANTED

COMPLETE, BEGUN, NEVER, IMPOSSIBLE = "complete", "begun", "not begun", "not possible"
NAMED = 3
FAILED = "failed: "


@dataclass(frozen=True)
class Covered:
    """A part: its state, the seconds of all sittings together, what the rows hold of it, and what is missing."""

    part: str
    state: str
    seconds: float
    holds: str
    missing: str = ""


def coverage(
    sittings: Sequence[Mapping[str, Any]],
    rows: Sequence[Result],
    spaces: Sequence[ToBest],
    repeated: Repeats,
    wanted: Sequence[str],
    calibrated: Collection[str] = (),
    tests: Tally | None = None,
) -> list[Covered]:
    """In the order of PARTS. wanted: keys of the models' problems. calibrated: devices with a calibration. tests: what is kept of them."""
    tests = tests or Tally()
    tried: dict[str, list[Mapping[str, Any]]] = {part: [] for part in PARTS}
    for sitting in sittings:
        for done in sitting.get("parts") or ():
            if isinstance(done, Mapping) and done.get("part") in tried:
                tried[done["part"]].append(done)
    asked = set(wanted)
    holds = _holds(tests, rows, spaces, repeated, asked, calibrated)
    lacking = _lacking(rows, repeated, asked, calibrated)
    found = []
    for part, entries in tried.items():
        state, missing = _tests(entries, tests) if part == "tests" else _state(entries)
        if state == COMPLETE and lacking.get(part):
            state, missing = BEGUN, lacking[part]
        if part in ("spaces", "tuner"):
            state, missing = _searched(part, spaces, entries)
        seconds = sum(float(one.get("seconds") or 0.0) for one in entries)
        found.append(Covered(part, state, seconds, holds.get(part, ""), missing))
    return found


def _lacking(rows: Sequence[Result], repeated: Repeats, asked: Collection[str], calibrated: Collection[str]) -> dict[str, str]:
    """What the rows lack, by part, whatever the sittings say of themselves: one may have been for fewer models, on another device, or may
    have found nothing to do.
    """
    found = {}
    if absent := len(set(asked) - {row.problem_key for row in rows if row.kind == "measured"}):
        found["comparison"] = f"{absent} of the models' problems have no row"
    devices = {device for row in rows if row.kind == "measured" and (device := device_of(row))}
    if without := sorted(devices - set(calibrated)):
        found["calibration"] = f"not calibrated: {', '.join(device[:12] for device in without)}"
    models = {row.problem_label for row in rows if row.problem_key in asked}
    thrice, most = len(_thrice(repeated) & models), min(REPEATED, len(asked))
    if thrice < most:
        found["repeat"] = f"{thrice} of {most} problems have a trial with times of {SITTINGS_WANTED} sittings"
    return found


def _thrice(repeated: Repeats) -> set[str]:
    """Problems of which some trial was timed in as many sittings as make a spread."""
    return {one.problem for one in repeated.times if one.runs >= SITTINGS_WANTED}


def _state(entries: Sequence[Mapping[str, Any]]) -> tuple[str, str]:
    if not entries:
        return NEVER, "all of it"
    last = entries[-1]
    if why := _why(last):
        return BEGUN, why
    if not last.get("statuses") and not last.get("known") and (notes := _notes(last)):
        return IMPOSSIBLE, notes[0]
    return COMPLETE, ""


def _notes(entry: Mapping[str, Any]) -> list[str]:
    return [str(note) for note in entry.get("notes") or ()]


def _why(last: Mapping[str, Any]) -> str:
    """What the newest sitting that tried a part left, and why, as far as it says; "" where it left nothing."""
    left, notes = int(last.get("left") or 0), _notes(last)
    if last.get("failed"):
        return f"the newest sitting ended it with an error: {notes[-1] if notes else 'without a word'}"
    if left and CUT_OFF in notes:
        return "the newest sitting was cut off in it"
    words = [note for note in notes if not note.startswith(FAILED)]
    return f"{left} not reached in the newest sitting" + (f" ({words[-1]})" if words else "") if left else ""


def _searched(part: str, spaces: Sequence[ToBest], entries: Sequence[Mapping[str, Any]]) -> tuple[str, str]:
    """Of these the journals tell: a sitting counts what it did not reach, and not how far it came. What it could not do, it says."""
    open_ones = [one.problem for one in spaces if (not one.complete if part == "spaces" else one.tuner is None)]
    begun = any(one.recorded for one in spaces) if part == "spaces" else len(open_ones) < len(spaces)
    if not open_ones:
        return COMPLETE, ""
    last = entries[-1] if entries else {}
    whole = last.get("failed") or CUT_OFF in _notes(last)
    troubles = [_why(last)] if whole else [note for note in _notes(last) if note.startswith(FAILED)]
    return (BEGUN if begun else NEVER), "; ".join([_some(open_ones, ", "), *([_some(troubles)] if troubles else [])])


def _some(words: Sequence[str], between: str = "; ") -> str:
    return between.join(words[:NAMED]) + (f" and {len(words) - NAMED} more" if len(words) > NAMED else "")


def _tests(entries: Sequence[Mapping[str, Any]], tests: Tally) -> tuple[str, str]:
    """By what is kept of each test: sittings count what ran in them, so one that was tried twice is in two of them."""
    failed = _some([str(one) for one in tests.failed])
    if tests.complete:
        return COMPLETE, failed
    why = _why(entries[-1]) if entries else ""
    if not entries and not tests.counts and not tests.earlier:
        return NEVER, "all of it"
    if not why and set(tests.counts) <= {"skipped"} and not tests.earlier:
        return IMPOSSIBLE, "every test was skipped: there was no GPU" if tests.counts else "no test ran"
    if not why:
        why = f"{tests.again} to be run once more" if tests.again else "the code has changed since"
    return BEGUN, "; ".join(part for part in (why, failed) if part)


def _holds(
    tests: Tally,
    rows: Sequence[Result],
    spaces: Sequence[ToBest],
    repeated: Repeats,
    asked: Collection[str],
    calibrated: Collection[str],
) -> dict[str, str]:
    asked = set(asked)
    timed = {row.problem_key for row in rows if row.median_us and numerics_verified(row)}
    both = timed & {row.problem_key for row in rows if row.library and row.median_us and numerics_verified(row)}
    own = {row.problem_key for row in rows if not row.library and row.median_us and numerics_verified(row)}
    metered = {(row.problem_key, row.kernel) for row in rows if row.energy_j is not None}
    right = {row.kernel for row in rows if numerics_verified(row)}
    wrong = {row.kernel for row in rows if row.status.value == "incorrect"}
    told = ", ".join(f"{count} {outcome}" for outcome, count in tests.counts.items()) or "none with the present code"
    joules = f"{len(metered)} kernels on {len({key for key, _ in metered})} problems have joules"
    return {
        "tests": told + (f"; {tests.earlier} with earlier code" if tests.earlier else ""),
        "correctness": f"{len(right)} kernels with a verified result, {len(wrong)} with a wrong one",
        "calibration": f"{len(calibrated)} device{'' if len(calibrated) == 1 else 's'} calibrated",
        "comparison": f"{len(asked & timed)} of the models' {len(asked)} problems timed, {len(asked & both & own)} beside a library",
        "energy": joules,
        "spaces": f"{sum(one.complete for one in spaces)} of {len(spaces)} complete, {sum(one.recorded for one in spaces):,} candidates",
        "tuner": f"{sum(one.tuner is not None for one in spaces)} of {len(spaces)} problems searched",
        "repeat": f"{len(repeated.times)} trials timed in two sittings and more, {len(repeated.energies)} metered; "
        f"{len(_thrice(repeated))} problems in {SITTINGS_WANTED}",
        "energy_rest": joules,
    }
