"""Which trials are worth the long energy measurement: the winner of each problem, its runner-up and the best library."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence

from klab.harness.plan.trial import Trial
from klab.harness.store.result import Result, Status


def energy_trials(trials: Sequence[Trial], results: Iterable[Result], *, runners_up: int = 1) -> list[Trial]:
    """The same trials with energy wanted, for the fastest `1 + runners_up` of each problem and its fastest library.

    Energy takes 6 s and more of the device per trial, where a time takes a fraction of one: so it is for the few that matter.
    """
    found: dict[str, Result] = {}
    for row in results:
        if row.status is Status.OK and row.median_us is not None and row.key not in found:
            found[row.key] = row
    by_problem: dict[str, list[Trial]] = defaultdict(list)
    for trial in trials:
        if trial.key in found:
            by_problem[trial.problem.key].append(trial)
    chosen: list[Trial] = []
    for group in by_problem.values():
        ranked = sorted(group, key=lambda t: found[t.key].median_us or math.inf)
        library = [t for t in ranked if found[t.key].library][:1]
        chosen += list(dict.fromkeys([*ranked[: 1 + runners_up], *library]))
    return [trial.with_policy(energy=True) for trial in chosen]
