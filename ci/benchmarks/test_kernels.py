"""One benchmark per kernel and problem. A kernel that is wrong, crashes or hangs is a failing test with the reason."""

from __future__ import annotations

import pytest

from klab.harness.choose.benchmark import DeviceTime, Measured, extra_info, timed, why_no_time
from klab.harness.plan.trial import Trial
from klab.harness.store.frame import config_label
from klab.harness.store.result import Status
from klab.kernels.errors import KlabError


def test_kernel(trial: Trial, timer: DeviceTime, measured: Measured, benchmark) -> None:
    if benchmark.disabled:
        pytest.skip("benchmarks are switched off (--benchmark-disable, or pytest-xdist runs): pytest ci/benchmarks --benchmark-enable")
    try:
        rows = measured.of(trial)
    except KlabError as error:  # the devices are somebody else's, say
        pytest.fail(f"klab: {error}", pytrace=False)
    row = timed(rows)
    if row is None:
        pytest.skip(f"not reached: {measured.stopped[trial.problem.key] or 'no worker took it'}")
    failure = why_no_time(row)
    if failure:
        if row.status is Status.UNSUPPORTED:
            pytest.skip(failure)
        pytest.fail(f"{row.kernel} on {row.problem_label}: {failure}", pytrace=False)
    benchmark.params = {"problem": row.problem_label, "kernel": row.kernel, "config": config_label(row)}
    benchmark.extra_info.update(extra_info(rows, measured.rows[trial.problem.key], measured.chip))
    benchmark.pedantic(timer.launch, rounds=timer.load(row), iterations=1)
