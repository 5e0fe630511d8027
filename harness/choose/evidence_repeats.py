"""The same trials in several runs: how far their medians and joules lie apart, and whether the same kernels win."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from klab.harness.choose.candidates import Candidate, candidates, why_not
from klab.harness.choose.compare import best, tie_set
from klab.harness.store.result import Result
from klab.harness.tune.objective import LATENCY
from klab.harness.tune.replay.export import policy_key
from klab.kernels.contract import canonical_json


@dataclass(frozen=True)
class Repeated:
    """A trial that was measured in two runs and more. values: (run, device) -> the median of that run's rows, in microseconds or joules."""

    problem: str
    kernel: str
    config: str
    values: Mapping[tuple[str, str], float]

    @property
    def runs(self) -> int:
        """In so many runs."""
        return len({run for run, _ in self.values})

    @property
    def spread(self) -> float:
        """(largest - smallest) / median, over all runs and devices."""
        return relative_range(list(self.values.values()))

    @property
    def on_one_device(self) -> float | None:
        """The same over the runs of one device, the widest of the devices; None where no device ran it twice."""
        by_device: dict[str, list[float]] = defaultdict(list)
        for (_, device), value in self.values.items():
            by_device[device].append(value)
        return max((relative_range(values) for values in by_device.values() if len(values) > 1), default=None)


@dataclass(frozen=True)
class Stability:
    """A problem of which the same candidates were measured in several runs. `ties`: by run, those that could not be told from its best."""

    problem: str
    candidates: int
    ties: Mapping[str, frozenset[str]]
    winners: Mapping[str, str]

    @property
    def stable(self) -> bool:
        """True when some candidate is among the best of every run."""
        return bool(frozenset.intersection(*self.ties.values()))

    @property
    def same_winner(self) -> bool:
        """True when one candidate was the fastest in every run."""
        return len(set(self.winners.values())) == 1


@dataclass(frozen=True)
class Repeats:
    """What several runs of a chip say of one another. runs: those that timed anything; devices: those they ran on."""

    runs: tuple[str, ...]
    devices: tuple[str, ...]
    times: tuple[Repeated, ...]
    energies: tuple[Repeated, ...]
    problems: tuple[Stability, ...]


def repeats(rows: Iterable[Result]) -> Repeats:
    """Of rows as they were measured, not corrected for their devices. A trial is a kernel's code with a configuration, measured alike."""
    fine = [row for row in rows if why_not(row) is None]
    return Repeats(
        tuple(sorted({row.run_id for row in fine})),
        tuple(sorted({row.device_uuid or row.device for row in fine})),
        _repeated(fine, lambda row: row.median_us),
        _repeated(fine, lambda row: row.energy_j),
        tuple(_stabilities(fine)),
    )


def relative_range(values: Sequence[float]) -> float:
    """(largest - smallest) / median."""
    return (max(values) - min(values)) / statistics.median(values)


def _repeated(rows: Iterable[Result], value: Callable[[Result], float | None]) -> tuple[Repeated, ...]:
    groups: dict[tuple[str, ...], dict[tuple[str, str], list[float]]] = defaultdict(lambda: defaultdict(list))
    labels: dict[str, str] = {}
    for row in rows:
        found = value(row)
        if found is None or found <= 0:
            continue
        labels[row.problem_key] = row.problem_label
        name = (row.problem_key, row.kernel, canonical_json(dict(row.config)), row.source_digest, policy_key(row))
        groups[name][row.run_id, row.device_uuid or row.device].append(found)
    made = (
        Repeated(labels[key], kernel, config, {where: statistics.median(values) for where, values in by_run.items()})
        for (key, kernel, config, _, _), by_run in groups.items()
    )
    return tuple(sorted((one for one in made if one.runs > 1), key=lambda one: (-one.spread, one.problem, one.kernel, one.config)))


def _stabilities(rows: Iterable[Result]) -> list[Stability]:
    by_problem: dict[str, dict[str, list[Result]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        by_problem[row.problem_key][row.run_id].append(row)
    found = []
    for by_run in by_problem.values():
        contests = {run: made for run, group in sorted(by_run.items()) if len(made := {_name(c): c for c in candidates(group)}) > 1}
        runs, common = _shared({run: frozenset(made) for run, made in contests.items()})
        ties, winners = {}, {}
        for run in runs:
            field = [contests[run][name] for name in sorted(common)]
            first = best(field, LATENCY)
            ties[run], winners[run] = frozenset(map(_name, tie_set(field, first, LATENCY))), _name(first)
        if not ties:
            continue
        label = next(row.problem_label for group in by_run.values() for row in group)
        found.append(Stability(label, len(common), ties, winners))
    return sorted(found, key=lambda one: (one.stable, one.same_winner, one.problem))


def _shared(measured: Mapping[str, frozenset[str]]) -> tuple[list[str], frozenset[str]]:
    """The most runs, and of so many those, that have two candidates and more in common, and these candidates; nothing where none have.

    Not of all runs at once: one that measured a single new kernel would leave nothing in common.
    """
    where: dict[str, frozenset[str]] = {
        name: frozenset(run for run in measured if name in measured[run]) for name in set().union(*measured.values())
    }
    sets = set(where.values())
    found = [
        (len(runs), len(common), sorted(runs), common)
        for runs in sorted({a & b for a in sets for b in sets}, key=sorted)
        if len(runs) > 1 and len(common := frozenset(name for name, there in where.items() if there >= runs)) > 1
    ]
    _, _, runs, common = max(found, key=lambda one: one[:3], default=(0, 0, [], frozenset()))
    return runs, common


def _name(candidate: Candidate) -> str:
    return f"{candidate.kernel} {candidate.config} {candidate.source_digest}"
