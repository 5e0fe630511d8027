"""What every figure is made from: the rows of the story as one DataFrame, and the dimensions by which the page filters all it shows."""

from __future__ import annotations

from typing import TYPE_CHECKING

from klab.harness.choose.candidates import state
from klab.harness.choose.profile import Choice
from klab.harness.report.limits import Limits, bound, dtype_of
from klab.harness.report.subject import Story, Subject
from klab.harness.store.frame import config_label, gb_per_s, tflops
from klab.harness.store.index import rounds_of
from klab.harness.store.result import Result, Status
from klab.kernels.contract import canonical_json

if TYPE_CHECKING:
    import pandas as pd

DIMS = ("chip", "model", "phase", "operator", "dtype", "kernel", "status")
"""Columns of these names, in any table of the page, are filtered by. A cell is a text, or a tuple of texts of which one has to match."""


def standing(story: Story) -> pd.DataFrame:
    """One row per standing Result of the story, own and published, in the story's order.

    Columns: those of DIMS (`kernel` is the bare name; model and phase are tuples, empty where no model of the catalog has the problem);
    kernel_id, backend, library, origin (measured or reference: never mixed in a mark, a mean or a ratio), chosen (it is its chip's
    choice for the problem), light (its samples were not read);
    problem (label), problem_key, fields (the problem's, a dict), config (label), settings (the config, a dict), config_key, key, run_id,
    recorded_at, commit, device, device_uuid, reason; median_us, low_us, high_us (95%), rounds, gpu_s (what measuring it took),
    compile_s, tflops, gb_per_s, intensity_flop_per_byte, bound_us, bound_by, share (of the roofline by specification, 1 is the
    roofline), share_at_clock (at the SM clock that was measured), power_w, energy_j, energy_low_j, energy_high_j, energy_reason,
    sm_clock_mhz, error, tolerance, wide_key, wide_error; conditions (see `conditions`). What was not measured is NaN or "".
    """
    import pandas as pd

    rows = [
        _row(story, subject, result, id(result) in chosen, light)
        for subject in story.subjects
        for chosen in [_chosen(subject)]
        for results, light in ((subject.rows, False), (subject.light, True), (subject.reference, False))
        for result in results
    ]
    found = pd.DataFrame(rows, columns=list(COLUMNS))
    return found.astype({name: "float64" for name, kind in COLUMNS.items() if kind == "float"})


def best(frame: pd.DataFrame) -> pd.DataFrame:
    """Of each kernel on each problem, chip and origin, the row with the lowest median; the chosen one where the kernel has it.

    A time in a warm cache is none in a cold one: of a problem, the rows under the choice's conditions; without a choice, under those of
    most rows.
    """
    fine = frame[(frame["status"] == Status.OK.value) & frame["median_us"].notna()]
    problem = ["chip", "origin", "problem_key"]
    groups = fine.groupby([*problem, "conditions"], sort=False)["chosen"].agg(["any", "size"]).reset_index()
    ranked = groups.sort_values(["any", "size", "conditions"], ascending=[False, False, True], kind="stable").drop_duplicates(problem)
    comparable = fine.reset_index().merge(ranked[[*problem, "conditions"]], on=[*problem, "conditions"]).set_index("index")
    ordered = comparable.sort_values(["chosen", "median_us"], ascending=[False, True], kind="stable")
    kept = ordered.drop_duplicates([*problem, "kernel_id"])
    return frame.loc[kept.index.sort_values()]


COLUMNS: dict[str, str] = {
    **dict.fromkeys(DIMS, "object"),
    **dict.fromkeys(("kernel_id", "backend"), "object"), "library": "bool", "origin": "object", "chosen": "bool", "light": "bool",
    **dict.fromkeys(("problem", "problem_key", "fields", "config", "settings", "config_key", "key", "run_id", "recorded_at"), "object"),
    **dict.fromkeys(("commit", "device", "device_uuid", "reason"), "object"),
    **dict.fromkeys(("median_us", "low_us", "high_us", "rounds", "gpu_s", "compile_s", "tflops", "gb_per_s"), "float"),
    "intensity_flop_per_byte": "float", "bound_us": "float", "bound_by": "object", "share": "float", "share_at_clock": "float",
    **dict.fromkeys(("power_w", "energy_j", "energy_low_j", "energy_high_j"), "float"), "energy_reason": "object",
    "sm_clock_mhz": "float", "error": "float", "tolerance": "float", "wide_key": "object", "wide_error": "float",
    "conditions": "object",
}  # fmt: skip


def conditions(r: Result) -> str:
    """What two measured times must share to be compared: `cold`, or `warm at 1200 MHz` where a clock or power limit was set.

    "" of published rows, which do not say.
    """
    if r.kind == "reference":
        return ""
    limits = (("sm_clock_mhz", "MHz"), ("power_limit_w", "W"))
    return " ".join([state(r)[1], *(f"at {r.policy[name]} {unit}" for name, unit in limits if r.policy.get(name))])


def _chosen(subject: Subject) -> set[int]:
    """The identities (in memory) of the rows that are a choice's: of its code and configuration, and in the state that it was chosen in."""
    by_name: dict[tuple[str, str, str, str], list[Result]] = {}
    for row in subject.rows:
        by_name.setdefault((row.problem_key, row.kernel, canonical_json(row.config), row.source_digest), []).append(row)
    found: set[int] = set()
    for choice in subject.profile.choices:
        name = (choice.wanted.problem_key, choice.kernel, canonical_json(choice.config), choice.source_digest)
        rows = by_name.get(name, [])
        own = [row for row in rows if _is(row, choice)] or [row for row in rows if row.l2_state == choice.evidence.l2_state]
        states = set(map(state, own))
        found |= {id(row) for row in rows if state(row) in states}
    return found


def _is(row: Result, choice: Choice) -> bool:
    """Is this the row that stood for the choice?"""
    own = choice.evidence
    return (row.recorded_at, row.l2_state, row.sm_clock_mhz) == (own.recorded_at, own.l2_state, own.sm_clock_mhz)


def _row(story: Story, subject: Subject, r: Result, chosen: bool, light: bool) -> tuple[object, ...]:
    places = story.occurs.get(r.problem_key, ())
    settings = canonical_json(r.config)
    limit = bound(r, subject.limits)
    origin = "reference" if r.kind == "reference" else "measured"
    rounds, sum_us = rounds_of(r)
    values = {
        "chip": r.chip,
        "model": tuple(dict.fromkeys(place.model for place in places if place.model)),
        "phase": tuple(dict.fromkeys(place.phase for place in places)),
        "operator": r.operator,
        "dtype": dtype_of(r),
        "kernel": r.kernel.partition("/")[2],
        "status": r.status.value,
        "kernel_id": r.kernel,
        "backend": r.backend,
        "library": r.library,
        "origin": origin,
        "chosen": origin == "measured" and chosen,
        "light": light,
        "problem": r.problem_label,
        "problem_key": r.problem_key,
        "fields": dict(r.problem),
        "config": config_label(r),
        "settings": dict(r.config),
        "config_key": settings,
        "key": r.key,
        "run_id": r.run_id,
        "recorded_at": r.recorded_at,
        "commit": str(r.environment.get("commit") or ""),
        "device": r.device,
        "device_uuid": r.device_uuid,
        "reason": r.reason,
        "median_us": r.median_us,
        "low_us": r.ci_low_us,
        "high_us": r.ci_high_us,
        "rounds": rounds,
        "gpu_s": sum_us * r.launches_per_round / 1e6,
        "compile_s": r.compile_s,
        "tflops": tflops(r),
        "gb_per_s": gb_per_s(r),
        "intensity_flop_per_byte": r.flops / r.bytes_moved if r.bytes_moved else None,
        "bound_us": limit.us if limit else None,
        "bound_by": limit.by if limit else "",
        "share": limit.us / r.median_us if limit and r.median_us else None,
        "share_at_clock": share_at_clock(r, subject.limits),
        "power_w": r.power_w,
        "energy_j": r.energy_j,
        "energy_low_j": r.energy_ci_low_j,
        "energy_high_j": r.energy_ci_high_j,
        "energy_reason": r.energy_reason,
        "sm_clock_mhz": r.sm_clock_mhz,
        "error": r.error,
        "tolerance": r.tolerance,
        "wide_key": r.wide_key,
        "wide_error": r.wide_error,
        "conditions": conditions(r),
    }
    return tuple(values[name] for name in COLUMNS)


def share_at_clock(r: Result, limits: Limits) -> float | None:
    """The share of the roofline with its arithmetic peak scaled to the SM clock that was measured; that by specification where memory
    bounds. None where a clock, a time or the limits are not known.
    """
    found, chip = bound(r, limits), limits.chip
    if found is None or chip is None or not r.median_us or not r.sm_clock_mhz or not chip.spec_clock_mhz:
        return None
    return found.us * (chip.spec_clock_mhz / r.sm_clock_mhz if found.by == "compute" else 1.0) / r.median_us
