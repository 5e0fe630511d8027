"""`klab tune --allow-clock-control`: the winners at several SM clocks and power limits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from klab.harness.cli._console import emit, table

if TYPE_CHECKING:
    from klab.harness.choose.profile import Profile
    from klab.harness.plan.trial import Trial
    from klab.harness.store.result import Result
    from klab.harness.tune.job import Job
    from klab.harness.tune.objective import Objective
    from klab.harness.tune.tuner import Tuned
    from klab.kernels.contract import Kernel

# Of a budget in time, so much is for this; problems whose winner is swept, the heaviest first (a setting takes some 10 s each).
SHARE, PROBLEMS = 0.3, 3
_COLUMNS = ("problem", "kernel", "SM clock MHz", "power limit W", "median us", "energy J", "objective")
_RIGHT = _COLUMNS[2:]


def check(job: Job) -> None:
    """Refuse, before anything is spent, where nothing can be set: CannotMeasure without NVML or a GPU, or while another controls it."""
    from klab.harness.fleet.devices import devices
    from klab.harness.tune.clock_control import clock_control
    from klab.kernels.errors import CannotMeasure

    if job.chip.kind == "cpu":
        raise CannotMeasure("--allow-clock-control is for GPUs: klab sets no clocks of a CPU")
    with clock_control(devices(job.chip)[0].id, allowed=True) as control:
        control.axes()


def run(job: Job, chosen: Sequence[Trial], goal: Objective, deadline: float | None, *, as_json: bool) -> None:
    """Sweep the first PROBLEMS of these and show. Everything that was set is put back, however it ends."""
    from klab.harness.fleet.devices import devices
    from klab.harness.fleet.local import Fleet
    from klab.harness.tune.clock_control import clock_control
    from klab.harness.tune.clock_sweep import sweep

    device = devices(job.chip)[0]
    if not chosen:
        return
    with (
        clock_control(device.id, allowed=True) as control,
        Fleet(job.chip, job.run_id, only_devices=[device.id], kernel_dirs=job.kernel_dirs) as fleet,
    ):
        rows: list[Result] = []
        for trial in chosen[:PROBLEMS]:
            rows += sweep(job, fleet, control, [trial], deadline=deadline)
    show(rows, goal, as_json=as_json)


def winners(tuned: Tuned, profile: Profile, kernels: Mapping[str, Kernel]) -> list[Trial]:
    """What the profile chose of each problem, the heaviest problem first; none where the kernel is not here."""
    from klab.harness.plan.trial import Trial

    chosen = {choice.wanted.problem_key: choice for choice in profile.choices}
    found: list[Trial] = []
    for course in sorted(tuned.courses, key=lambda c: -c.prospect.weight * c.prospect.bound_us):
        choice = chosen.get(course.problem.key)
        kernel = kernels.get(choice.kernel) if choice else None
        if choice and kernel:
            usual = course.defaults[0]
            found.append(Trial.of(kernel, course.problem, kernel.config_type.from_json(choice.config), usual.chip, usual.policy))
    return found


def show(rows: Sequence[Result], goal: Objective, *, as_json: bool) -> None:
    """One line per setting; 0 is the device as its owner has it."""
    told = []
    for row in rows:
        clock, limit = row.policy.get("sm_clock_mhz", 0), row.policy.get("power_limit_w", 0.0)
        value = goal.value(row)
        if as_json:
            setting = {"sm_clock_mhz": clock, "power_limit_w": limit, "median_us": row.median_us, "energy_j": row.energy_j, "value": value}
            emit({"type": "clocks", "problem_key": row.problem_key, "kernel": row.kernel, "config": dict(row.config), **setting})
            continue
        energy = "" if row.energy_j is None else f"{row.energy_j:.4g}"
        shown = (clock or "free", limit or "as it was", row.median_us and f"{row.median_us:,.4g}", energy, value and f"{value:.4g}")
        told.append((row.problem_label, row.kernel, *shown))
    if not as_json:
        table(f"Clocks and power limits, by {goal} ({goal.unit})", _COLUMNS, told, right=_RIGHT)
