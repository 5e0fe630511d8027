"""What `klab tune` says while it works and when it is done: talk on stderr, tables or JSON lines on stdout."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from klab.harness.cli._console import emit, out, table, talk
from klab.harness.cli._progress import summary_row
from klab.harness.store.result import Result, Status

if TYPE_CHECKING:
    from klab.harness.choose.profile import Choice, Profile
    from klab.harness.plan.rows import Plan
    from klab.harness.plan.trial import Trial
    from klab.harness.tune.course import Course
    from klab.harness.tune.ending import Ending
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
            emit({"type": "trial", **summary_row(result)})
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
    # Of a problem without a time, its share is by the roofline's bound.
    loads = {c.prospect.key: c.prospect.weight * _load_us(c) for c in tuned.courses}
    whole = sum(loads.values()) or 1.0
    rows: list[dict[str, Any]] = []
    for course in tuned.courses:
        key = course.prospect.key
        choice, final = chosen.get(key), tuned.endings.get(key)
        # What ran beside each other is compared; what was measured minutes apart may have drifted.
        chosen_us = choice.evidence.median_us if choice else None
        if choice and final:
            chosen_us = final.median_us(choice.kernel, choice.config) or chosen_us
        measured = math.isfinite(min(course.prospect.now_us, course.best_us()))
        failed = Counter(e.status.value for e in course.found if not e.ok)
        rows.append(
            {
                "type": "tuned",
                "problem_key": key,
                "problem_label": course.label,
                "share": loads[key] / whole,
                "share_is": "measured" if measured else "modelled",
                "bound_us": course.prospect.bound_us,
                "default": course.default.kernel if course.default else None,
                "default_us": _beside(course.default, final) or _known(course.default_us),
                "library": course.library.kernel if course.library else None,
                "library_us": _beside(course.library, final) or _known(course.prospect.rival_us),
                "search_best_us": _known(course.best_us()),
                "chosen": choice.kernel if choice else None,
                "chosen_config": dict(choice.config) if choice else None,
                "chosen_us": chosen_us,
                "final": final.word if final else "none",
                "final_reason": final.reason if final else None,
                "final_known": final.known if final else None,
                "ties": final.ties if final else None,
                "candidates": len(course.lane.space) if course.lane else None,
                "evaluations": course.evaluations,
                "failed": dict(failed),
                "resumed": course.resumed,
                "device_s": course.prospect.spent_s,
                "all_failed": {kernel: dict(counts) for kernel, counts in course.hopeless().items()},
                "left_out": dict(course.left_out),
                "further_us": tuned.further_us.get(key, 0.0) if course.evaluations else None,
                "further_is": "modelled",
                "trouble": course.trouble,
                "journal": str(course.journal) if course.journal else None,
            }
        )
    return rows


def _load_us(course: Course) -> float:
    now_us = min(course.prospect.now_us, course.best_us())
    return now_us if math.isfinite(now_us) else course.prospect.bound_us


def _beside(trial: Trial | None, final: Ending | None) -> float | None:
    return None if trial is None or final is None else final.median_us(trial.kernel, trial.config.to_json_full())


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
        {
            "phase": phase,
            "batch": batch,
            **{f"{name}_us": _known(found[phase, batch]) for name, found in times.items()},
            **_covered(plan, phase, batch, chosen),
        }
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
        "finals_s": round(tuned.finals_s, 2),
        "devices": tuned.devices,
        "measuring_share": None if share is None else round(share, 3),
        "waited_for_compiler_s": round(tuned.waited_s, 2),
        "steps": steps,
        "results": str(folder),
    }


def _covered(plan: Plan, phase: str, batch: int, times_us: Mapping[str, float]) -> dict[str, Any]:
    """What of a step has a time: problems and microseconds; of the others, what the roofline says that they take at least."""
    rows = [row for row in plan.step(phase, batch) if row.problem]
    known = {row.problem.key for row in rows if row.problem and row.problem.key in times_us}
    return {
        "problems": len({row.problem.key for row in rows if row.problem}),
        "measured": len(known),
        "measured_us": sum(row.count * times_us[row.problem.key] for row in rows if row.problem and row.problem.key in known),
        "unmeasured_bound_us": sum(row.count * row.bound_us for row in rows if row.problem and row.problem.key not in known),
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
    for row in rows:
        for line in _lines(row):
            out.print(line, markup=False, soft_wrap=True)
    for step in whole["steps"]:
        out.print(_step_line(step), markup=False, soft_wrap=True)
    share = tuned.measuring_share
    measured = "" if share is None else f"; the device measured {share:.0%} of the search's {tuned.search_s:.0f} s"
    waited = f", waited {tuned.waited_s:.0f} s for compilers" if tuned.waited_s >= 0.5 else ""
    known = f", {tuned.known} known" if tuned.known else ""
    said = (
        f"{whole['evaluations']} candidates tried, {tuned.new.total()} measured now{known}; searching ended: {tuned.stopped or 'not begun'}"
    )
    talk.print(f"{said}{measured}{waited}. Results in {folder}", markup=False, soft_wrap=True)


def _lines(row: Mapping[str, Any]) -> list[str]:
    """What does not fit a cell: how the final ended, who failed, who was left out."""
    label = row["problem_label"]
    found = []
    if row["final_reason"]:
        found.append(f"{label}: {'known from an earlier final: ' if row['final_known'] else ''}{row['final_reason']}")
    for kernel, counts in row["all_failed"].items():
        count = sum(counts.values())
        how = ", ".join(f"{status} ({n})" for status, n in sorted(counts.items()))
        found.append(f"{label}: {kernel.partition('/')[2] or kernel}: {count} of {count} candidates failed: {how}")
    if row["trouble"]:
        found.append(f"{label}: not searched: {row['trouble']}")
    else:
        found += [f"{label}: {kernel} is left out: {reason}" for kernel, reason in row["left_out"].items()]
    return found


def _step_line(step: Mapping[str, Any]) -> str:
    name = f"{step['phase']} batch {step['batch']}"
    if step["tuned_us"] is None or step["untuned_us"] is None:
        said = f"{name}: {step['measured']} of {step['problems']} problems have a time, {step['measured_us']:,.4g} us together"
        return f"{said}; the others take at least {step['unmeasured_bound_us']:,.4g} us (roofline, not measured)"
    gain = f"{step['untuned_us']:,.4g} us untuned -> {step['tuned_us']:,.4g} us tuned ({step['untuned_us'] / step['tuned_us']:.2f}x)"
    further = f"; as much time again: about {step['later_us']:,.4g} us (modelled)" if step["later_us"] else ""
    return f"{name}, of what has kernels: {gain}{further}"


def _further(row: Mapping[str, Any]) -> str:
    if row["further_us"] is None:
        return "not searched"
    text = f"{row['further_us']:.3g}"
    return f"-{text} modelled" if float(text) > 0 else ""


def _cells(row: Mapping[str, Any]) -> tuple[object, ...]:
    def ratio(name: str) -> str:
        base, chosen = row[name], row["chosen_us"]
        return f"{base / chosen:.2f}x" if isinstance(base, float) and isinstance(chosen, float) else ""

    config = row["chosen_config"]
    knobs = " ".join(f"{k}={v}" for k, v in config.items()) if isinstance(config, dict) else ""
    return (
        row["problem_label"], f"{row['share']:.1%}{'' if row['share_is'] == 'measured' else ' modelled'}",
        _cell(row["default_us"]), _cell(row["library_us"]), _cell(row["chosen_us"]),
        ratio("default_us"), ratio("library_us"), f"{str(row['chosen'] or '').partition('/')[2]} {knobs}".strip(),
        f"{row['final']}{' (known)' if row['final_known'] else ''}",
        f"{row['evaluations']}/{row['candidates'] or '?'}", f"{row['device_s']:.1f}", _further(row),
    )  # fmt: skip


def _cell(value: object) -> str:
    return f"{value:,.4g}" if isinstance(value, float) else ""


def _us(value: float) -> str:
    return f"{value:,.4g}" if math.isfinite(value) else "-"


def _known(value: float) -> float | None:
    return value if math.isfinite(value) else None
