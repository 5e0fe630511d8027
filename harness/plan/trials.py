"""Problems x Kernels -> Trials, minus what cannot run and what the store already has."""

from __future__ import annotations

import itertools
import random
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from klab.harness.plan.rows import Plan
from klab.harness.plan.trial import Policy, Trial
from klab.kernels.contract import Chip, Config, Kernel, Problem
from klab.kernels.errors import UsageError

# A space is listed no further than this before candidates are drawn from it: listing costs about 1 ms per 100 candidates.
SPACE_LIMIT = 50_000


@dataclass(frozen=True)
class Skipped:
    """A kernel that cannot compete on a problem here, and why."""

    kernel: str
    problem: Problem
    reason: str


class Trials(NamedTuple):
    """What to measure, grouped by problem in the order of the problems, and what was left out."""

    trials: list[Trial]
    skipped: list[Skipped]


def default_policy(chip: Chip) -> Policy:
    """How a trial on this kind of chip is measured unless somebody says otherwise.

    Without energy: that takes 6 s and more per trial, so it is asked for afterwards, for the few that matter (tune/pick.py). On a GPU at
    most 2 s go into one trial, so that the 140 trials of a model end in minutes. A CPU's clock is steady after milliseconds and its
    launches are long, so its rounds are fewer and longer, and a trial is held to a second.
    """
    if chip.kind == "cuda":
        return Policy(warmup_ms=25.0, max_rounds=100, limit_s=2.0)
    return Policy(warmup_ms=10.0, min_rounds=7, max_rounds=40, round_ms=10.0, target_ci=0.02, limit_s=1.0)


def trials(
    plan_or_problems: Plan | Iterable[Problem],
    kernels: Sequence[Kernel],
    chip: Chip,
    policy: Policy | None = None,
    candidates: str = "default",
) -> Trials:
    """Every kernel on every problem that it fits, once each.

    `candidates`: "default" (one configuration per kernel), "sample:N" (the default and up to N - 1 others, the same ones every time,
    and among them those of any smaller N) or "all". UsageError for anything else. A kernel whose own code raises is skipped, with the
    reason.
    """
    problems = plan_or_problems.problems() if isinstance(plan_or_problems, Plan) else list(plan_or_problems)
    policy = policy or default_policy(chip)
    limit = _limit(candidates)
    found: dict[str, Trial] = {}
    skipped: list[Skipped] = []
    for problem in {p.key: p for p in problems}.values():
        for kernel in kernels:
            if kernel.problem_type.operator != problem.operator:
                continue
            reason = safe_unfit(kernel, problem, chip)
            if reason is not None:
                skipped.append(Skipped(kernel.id, problem, reason))
                continue
            try:
                made = [Trial.of(kernel, problem, config, chip.name, policy) for config in _candidates(kernel, problem, chip, limit)]
                found |= {trial.key: trial for trial in made if trial.key not in found}
            except Exception as error:  # noqa: BLE001  a user's file may raise anything, and must not stop the other kernels
                skipped.append(Skipped(kernel.id, problem, f"its space raised {_named(error)}"))
    return Trials(list(found.values()), skipped)


def safe_unfit(kernel: Kernel, problem: Problem, chip: Chip) -> str | None:
    """`kernel.unfit`, where an exception of the kernel's own code is a reason like any other."""
    try:
        return kernel.unfit(problem, chip)
    except Exception as error:  # noqa: BLE001  a user's file may raise anything, and must not stop the other kernels
        return f"its fits or default raised {_named(error)}"


def _named(error: Exception) -> str:
    """`ZeroDivisionError: division by zero`: the first line alone."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}".rstrip(": ")


def missing(trials: Iterable[Trial], done_keys: Collection[str]) -> list[Trial]:
    """The trials whose key is not among those already done, in the same order."""
    done = done_keys if isinstance(done_keys, set | frozenset | dict) else set(done_keys)
    return [trial for trial in trials if trial.key not in done]


def _limit(candidates: str) -> int | None:
    """How many configurations per kernel and problem; None for all."""
    if candidates == "default":
        return 1
    if candidates == "all":
        return None
    kind, _, number = candidates.partition(":")
    if kind == "sample" and number.isdecimal() and int(number) >= 1:
        return int(number)
    raise UsageError(f"candidates are default, sample:N (N at least 1) or all, not {candidates!r}")


def _candidates(kernel: Kernel, problem: Problem, chip: Chip, limit: int | None) -> list[Config]:
    if limit == 1:
        return [kernel.default(problem, chip)]
    space = kernel.space(problem, chip)
    if limit is None:
        return list(space)
    default, *others = itertools.islice(space, SPACE_LIMIT)
    # Seeded by what is tuned, so that a run that is resumed asks for the same trials; one order for every N, so that a larger sample
    # contains a smaller one.
    order = list(range(len(others)))
    random.Random(f"{kernel.id} {problem.key}").shuffle(order)
    return [default, *(others[i] for i in sorted(order[: limit - 1]))]
