"""The sides of several chips at once: a process per chip, as the estimates of one chip know nothing of another's."""

from __future__ import annotations

import multiprocessing
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor

from klab.harness.cost.estimate import Estimate
from klab.harness.cost.sides import Builder, Side, sides_of
from klab.harness.cost.workload import Deployment, Workload
from klab.harness.plan.communication import Collective
from klab.kernels.contract import Chip, Problem

Task = tuple[Sequence[Chip], Sequence[int] | None, Deployment, Workload, Builder]
Made = tuple[list[Side], list[str], tuple[Mapping[Problem, Estimate], Mapping[Collective, Estimate]]]

# What the processes work on: they are forked, so it need not be sent to them (sources may hold 1e5 facts).
_task: Task | None = None


def sides_of_all(
    chips: Sequence[Chip], sizes: Sequence[int] | None, like: Deployment, workload: Workload, builder: Builder, jobs: int = 1
) -> tuple[list[Side], list[str]]:
    """`sides_of` every chip, in their order, by up to `jobs` processes; the builder's estimators know afterwards what was asked.

    One process where there is one chip, or the system cannot fork. Nor is a process forked in which DuckDB (the reader of published tables)
    may run: its threads would be missing in the fork, which would wait for them for ever.
    """
    global _task
    jobs = min(jobs, len(chips)) if sys.platform == "linux" and "duckdb" not in sys.modules else 1
    _task = (chips, sizes, like, workload, builder)
    try:
        if jobs > 1:
            with ProcessPoolExecutor(jobs, multiprocessing.get_context("fork")) as pool:
                made = list(pool.map(_sides, range(len(chips))))
            for chip, (_, _, answers) in zip(chips, made, strict=True):
                builder.estimators[chip.name].learn(answers)
        else:
            made = [_sides(at) for at in range(len(chips))]
    finally:
        _task = None
    return [side for sides, _, _ in made for side in sides], [reason for _, reasons, _ in made for reason in reasons]


def _sides(at: int) -> Made:
    assert _task is not None
    chips, sizes, like, workload, builder = _task
    found, reasons = sides_of(chips[at], sizes, like, workload, builder)
    return found, reasons, builder.estimators[chips[at].name].answers
