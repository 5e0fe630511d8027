"""The same trials at several SM clocks and power limits: what a lower clock costs in time, and saves in energy."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

from klab.harness.fleet.local import Fleet
from klab.harness.plan.trial import Trial
from klab.harness.store.result import Result
from klab.harness.tune.clock_control import Axes, ClockControl
from klab.harness.tune.job import Job
from klab.kernels.errors import UsageError

# A board takes a new limit or clock within some 100 ms; the warm-up of each trial follows.
SETTLE_S = 0.2


def settings(axes: Axes) -> Iterator[dict[str, float]]:
    """The device as it is, then each SM clock, then each power limit but the present one; one at a time."""
    yield {}
    for clock in axes.sm_clocks_mhz:
        yield {"sm_clock_mhz": clock}
    for limit in axes.power_limits_w:
        if limit != axes.power_limit_w:
            yield {"power_limit_w": limit}


def sweep(
    job: Job,
    fleet: Fleet,
    control: ClockControl,
    trials: Sequence[Trial],
    axes: Axes | None = None,
    *,
    deadline: float | None = None,
) -> list[Result]:
    """Measure the trials, with energy, at every setting of `axes` (default: those of the board); rows go to the job's store.

    Each row's policy names its setting, so that no row is taken for one of the device as it is. `fleet` holds the controlled device
    alone; UsageError otherwise. Between settings, and at the end, everything is put back; until `deadline` (time.monotonic()) there is
    time for a setting, they go on.
    """
    if fleet.size != 1:
        raise UsageError(f"clocks are controlled on one device ({control.device}), and {fleet.size} would measure: name it with --device")
    found: list[Result] = []

    def store(row: Result) -> None:
        job.journal.append(row)
        job.listener.result(row)
        found.append(row)

    ends = [at for at in (deadline, job.deadline) if at is not None]
    until = min(ends) if ends else None
    for setting in settings(axes or control.axes()):
        if job.stop.is_set() or (until is not None and time.monotonic() >= until):
            break
        control.put_back()
        if setting:
            clock, limit = setting.get("sm_clock_mhz"), setting.get("power_limit_w")
            control.set(sm_clock_mhz=None if clock is None else int(clock), power_limit_w=limit)
            time.sleep(SETTLE_S)
        job.listener.phase("clocks", len(trials))
        fleet.run([trial.with_policy(energy=True, **setting) for trial in trials], store, deadline=until, stop=job.stop)
    control.put_back()
    return found
