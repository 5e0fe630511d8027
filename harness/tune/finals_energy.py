"""The second half of a final by another objective than latency: whose energy is worth measuring, and who wins by the value."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from klab.harness.measure.contest import GROUP_SLOTS
from klab.harness.plan.trial import Trial
from klab.harness.tune.finals_rule import Verdict
from klab.harness.tune.objective import Interval
from klab.harness.tune.pareto import SLACK


@dataclass(frozen=True)
class ByValue:
    """`winner` is None where nothing has a value. `why` is as in a Verdict; "faster" means lower than the default."""

    winner: str | None
    ties: tuple[str, ...]
    why: str
    values: Mapping[str, Interval]


def near_leader(verdict: Verdict, default: str | None) -> list[str]:
    """The leader, the default, and the nearest of the others that may lie within SLACK of the leader by time: one group in all."""
    found = {s.name: s.to_leader for s in verdict.standings if s.state in ("winner", "tie", "slower")}
    ratios = {name: (1.0, 1.0) if ratio is None else (ratio.ratio, ratio.low) for name, ratio in found.items()}
    near = sorted((name for name, (_, low) in ratios.items() if low <= 1.0 + SLACK), key=lambda name: ratios[name])
    chosen = near[:GROUP_SLOTS]
    if default in found and default not in chosen:
        chosen = [*near[: GROUP_SLOTS - 1], default]
    return chosen


def energy_trials_of(verdict: Verdict, names: Mapping[str, Trial], default: str, seed: int, rounds: int) -> list[Trial]:
    """Their trials, with energy, in a block of its own."""
    changes: dict[str, object] = {"seed": seed, "min_rounds": rounds, "max_rounds": rounds, "energy": True}
    return [names[name].with_policy(**changes) for name in near_leader(verdict, default)]


def by_value(values: Mapping[str, Interval], default: str, pick: Callable[[Sequence[str]], str]) -> ByValue:
    """The lowest value; those whose interval overlaps its tie with it. The default wins a tie that it is in; of the others one wins whose
    interval lies below the default's.
    """
    if not values:
        return ByValue(None, (), "nobody", values)
    leader = min(values, key=lambda name: (values[name].median, name))
    tied = [name for name in values if values[name].overlaps(values[leader])]
    if default in tied:
        winner, why = default, "tie"
    elif default in values:
        winner, why = pick([name for name in tied if values[name].high < values[default].low]), "faster"
    else:
        winner, why = pick(tied), "no default"
    return ByValue(winner, tuple(sorted(tied, key=lambda name: name != winner)), why, values)
