"""What `klab tune` says while it works and when it is done: talk on stderr, tables or JSON lines on stdout."""

from __future__ import annotations

import math
import statistics
import time
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from klab.harness.cli._console import emit, out, table, talk
from klab.harness.cli._progress import summary_row
from klab.harness.store.result import Result, Status
from klab.kernels.contract import canonical_json

if TYPE_CHECKING:
    from klab.harness.choose.profile import Choice, Profile
    from klab.harness.plan.rows import Plan
    from klab.harness.plan.trial import Trial
    from klab.harness.tune.course import Course
    from klab.harness.tune.finals_told import Final
    from klab.harness.tune.screen import Screened
    from klab.harness.tune.strategy import Evaluation
    from klab.harness.tune.tuner import Tuned

# Between two lines of progress: a log of ten minutes stays readable.
EVERY_S = 5.0


class Narrator:
    """A Listener, and who hears of each slice. With `as_json` each new row is also a line on stdout."""

    def __init__(self, *, as_json: bool) -> None:
        self._as_json = as_json
        self._last = 0.0
        self.failed: Counter[str] = Counter()
        self.screened_out: Counter[str] = Counter()

    def phase(self, name: str, total: int) -> None:
        """A part of the run begins."""
        if name != "final":
            talk.print(f"{name}: {total} trials" if total else name, markup=False)

    def screened(self, found: Screened) -> None:
        """One candidate was compiled and judged."""
        if found.status is not Status.OK:
            self.screened_out[found.rule] += 1

    def result(self, result: Result) -> None:
        """One row is in the store. Failures of one kind are told once: a search meets many."""
        if self._as_json:
            emit(summary_row(result))
        if result.status not in (Status.OK, Status.SCREENED, Status.UNSUPPORTED):
            kind = f"{result.status.value}: {result.kernel} on {result.problem_label}"
            self.failed[kind] += 1
            if self.failed[kind] == 1:
                talk.print(f"{kind}: {result.reason}", style="yellow", markup=False, soft_wrap=True)

    def slice(self, course: Course, evaluations: Sequence[Evaluation]) -> None:
        """How far a search is, now and then."""
        now = time.monotonic()
        if now - self._last < EVERY_S or course.lane is None:
            return
        self._last = now
        tried = f"{course.evaluations} of {len(course.lane.space)} tried"
        talk.print(f"{course.label}: {tried}, best {_us(course.best_us())} us (default {_us(course.default_us)})", markup=False)


COLUMNS = (
    "problem", "share", "default us", "library us", "chosen us", "vs default", "vs library", "chosen", "final", "tried", "device s",
    "more time us",
)  # fmt: skip
RIGHT = ("share", "default us", "library us", "chosen us", "vs default", "vs library", "tried", "device s", "more time us")


def problem_rows(tuned: Tuned, profile: Profile) -> list[dict[str, Any]]:
    """One row per tuned problem, times in microseconds; `further_us` is modelled, not measured."""
    chosen: dict[str, Choice] = {choice.wanted.problem_key: choice for choice in profile.choices}
    loads = {c.prospect.key: c.prospect.weight * _finite(c.prospect.now_us) for c in tuned.courses}
    whole = sum(loads.values()) or 1.0
    rows: list[dict[str, Any]] = []
    for course in tuned.courses:
        key = course.prospect.key
        choice, final = chosen.get(key), tuned.finals.get(key)
        # What ran beside each other is compared; what was measured minutes apart may have drifted.
        same = _medians(final)
        chosen_us = choice.evidence.median_us if choice else None
        if choice:
            chosen_us = same.get((choice.kernel, canonical_json(choice.config)), chosen_us)
        failed = Counter(e.status.value for e in course.found if not e.ok)
        rows.append(
            {
                "type": "tuned",
                "problem_key": key,
                "problem_label": course.label,
                "share": loads[key] / whole,
                "bound_us": course.prospect.bound_us,
                "default": course.default.kernel if course.default else None,
                "default_us": _beside(course.default, same) or _known(course.default_us),
                "library": course.library.kernel if course.library else None,
                "library_us": _beside(course.library, same) or _known(course.prospect.rival_us),
                "search_best_us": _known(course.best_us()),
                "chosen": choice.kernel if choice else None,
                "chosen_config": dict(choice.config) if choice else None,
                "chosen_us": chosen_us,
                "final": final.reason if final else None,
                "ties": len(final.ties) if final else None,
                "candidates": len(course.lane.space) if course.lane else None,
                "evaluations": course.evaluations,
                "failed": dict(failed),
                "resumed": course.resumed,
                "device_s": course.prospect.spent_s,
                "further_us": tuned.further_us.get(key, 0.0),
                "further_is": "modelled",
                "trouble": course.trouble,
                "journal": str(course.journal) if course.journal else None,
            }
        )
    return rows


def _medians(final: Final | None) -> dict[tuple[str, str], float]:
    """(kernel, configuration) -> its median in microseconds over the blocks of a final."""
    found: dict[tuple[str, str], list[float]] = defaultdict(list)
    for row in final.results if final else ():
        if row.status is Status.OK and row.median_us is not None:
            found[row.kernel, canonical_json(row.config)].append(row.median_us)
    return {name: statistics.median(times) for name, times in found.items()}


def _beside(trial: Trial | None, same: Mapping[tuple[str, str], float]) -> float | None:
    return None if trial is None else same.get((trial.kernel, canonical_json(trial.config.to_json_full())))


def summary(tuned: Tuned, plan: Plan, rows: Sequence[Mapping[str, Any]], folder: Path) -> dict[str, Any]:
    """The run as a whole: what each step takes with the defaults, with the better of default and library, and with what was chosen."""
    from klab.harness.tune.pack import step_times

    chosen = {row["problem_key"]: row["chosen_us"] for row in rows if row["chosen_us"]}
    default = {row["problem_key"]: row["default_us"] for row in rows if row["default_us"]}
    libraries = {row["problem_key"]: row["library_us"] for row in rows if row["library_us"]}
    before = {key: min(d[key] for d in (default, libraries) if key in d) for key in default.keys() | libraries.keys()}
    later = {key: us - tuned.further_us.get(key, 0.0) for key, us in chosen.items()}
    times = {
        name: step_times(plan, known) for name, known in (("default", default), ("untuned", before), ("tuned", chosen), ("later", later))
    }
    steps = [
        {"phase": phase, "batch": batch, **{f"{name}_us": _known(found[phase, batch]) for name, found in times.items()}}
        for phase, batch in plan.steps
    ]
    share = tuned.measuring_share
    return {
        "type": "tuning",
        "new": dict(tuned.new),
        "known": tuned.known,
        "resumed": tuned.resumed,
        "evaluations": sum(c.evaluations for c in tuned.courses),
        "ended": tuned.stopped,
        "wall_s": round(tuned.wall_s, 2),
        "search_s": round(tuned.search_s, 2),
        "device_s": round(tuned.device_s, 2),
        "devices": tuned.devices,
        "measuring_share": None if share is None else round(share, 3),
        "waited_for_compiler_s": round(tuned.waited_s, 2),
        "steps": steps,
        "results": str(folder),
    }


def show(tuned: Tuned, plan: Plan, profile: Profile, folder: Path, *, as_json: bool) -> None:
    """The table, and what it adds up to."""
    rows = problem_rows(tuned, profile)
    whole = summary(tuned, plan, rows, folder)
    if as_json:
        for row in rows:
            emit(row)
        emit(whole)
        return
    table(f"Tuned on {plan.chip.title}", COLUMNS, [_cells(row) for row in rows], right=RIGHT)
    for step in whole["steps"]:
        if step["tuned_us"] is None or step["untuned_us"] is None:
            continue
        gain = f"{step['untuned_us']:,.0f} us untuned -> {step['tuned_us']:,.0f} us tuned ({step['untuned_us'] / step['tuned_us']:.2f}x)"
        further = f"; as much time again: about {step['later_us']:,.0f} us (modelled)" if step["later_us"] else ""
        out.print(f"{step['phase']} batch {step['batch']}, of what has kernels: {gain}{further}", markup=False, soft_wrap=True)
    for course in tuned.courses:
        if course.trouble:
            talk.print(f"not searched: {course.trouble}", style="yellow", markup=False, soft_wrap=True)
    share = tuned.measuring_share
    measured = "" if share is None else f"; the device measured {share:.0%} of the search's {tuned.search_s:.0f} s"
    waited = f", waited {tuned.waited_s:.0f} s for compilers" if tuned.waited_s >= 0.5 else ""
    known = f", {tuned.known} known" if tuned.known else ""
    said = (
        f"{whole['evaluations']} candidates tried, {tuned.new.total()} measured now{known}; searching ended: {tuned.stopped or 'not begun'}"
    )
    talk.print(f"{said}{measured}{waited}. Results in {folder}", markup=False, soft_wrap=True)


def _cells(row: Mapping[str, Any]) -> tuple[object, ...]:
    def ratio(name: str) -> str:
        base, chosen = row[name], row["chosen_us"]
        return f"{base / chosen:.2f}x" if isinstance(base, float) and isinstance(chosen, float) else ""

    config = row["chosen_config"]
    knobs = " ".join(f"{k}={v}" for k, v in config.items()) if isinstance(config, dict) else ""
    return (
        row["problem_label"], f"{row['share']:.1%}", _cell(row["default_us"]), _cell(row["library_us"]), _cell(row["chosen_us"]),
        ratio("default_us"), ratio("library_us"), f"{str(row['chosen'] or '').partition('/')[2]} {knobs}".strip(), row["final"] or "",
        f"{row['evaluations']}/{row['candidates'] or '?'}", f"{row['device_s']:.1f}", f"-{row['further_us']:.3g} modelled",
    )  # fmt: skip


def _cell(value: object) -> str:
    return f"{value:,.4g}" if isinstance(value, float) else ""


def _us(value: float) -> str:
    return f"{value:,.4g}" if math.isfinite(value) else "-"


def _known(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _finite(value: float) -> float:
    return value if math.isfinite(value) else 0.0
