"""Whether the whole space of a problem is recorded: by the journal of the very search that would go on with it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from klab.harness.plan.trials import default_policy, trials
from klab.harness.tune.course import FOLDER, Course, header_of, make_space
from klab.harness.tune.job import Job
from klab.harness.tune.live import Lane
from klab.kernels.contract import Kernel, Problem
from klab.kernels.errors import KlabError

STRATEGY = "exhaustive"


def is_recorded(job: Job, problem: Problem, kernels: Sequence[Kernel]) -> bool:
    """True when every candidate has an outcome, of the kernels' present code and under this driver and toolchain (the job's epoch)."""
    policy = default_policy(job.chip)
    fitting = {trial.kernel for trial in trials([problem], list(kernels), job.chip, policy).trials}
    own = {kernel.id: kernel for kernel in kernels if not kernel.library and kernel.id in fitting}
    folder = job.folder / FOLDER
    if not own or not folder.is_dir():
        return False
    try:
        space = make_space(problem, own.values(), job.chip)
    except KlabError:
        return False
    lane = Lane(space, problem, own, policy, job.chip.name)
    path = Course.journal_path(folder, header_of(lane, STRATEGY, 0, job.epoch(policy.threads)))
    return len(_candidates(path)) >= len(space)


def _candidates(path: Path) -> set[int]:
    try:
        lines = path.read_text(encoding="utf-8").split("\n")[1:-1]
        return {int(json.loads(line)["candidate"]) for line in lines}
    except (OSError, ValueError, KeyError, TypeError):  # the search itself tells what is wrong with it
        return set()
