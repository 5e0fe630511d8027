"""What is known before the first measurement: seeds and expected times, from the store's results and from the analytic model."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from klab.harness.plan.trials import safe_unfit
from klab.harness.store.query import age
from klab.harness.store.result import Result, Status
from klab.harness.tune.space import KERNEL, Space, config_of
from klab.harness.tune.strategy import Prior
from klab.harness.tune.transfer import Float, accumulate, from_one, mean
from klab.kernels.contract import Chip, Config, Json, Kernel, Problem, canonical_json
from klab.kernels.errors import KlabError

Model = Callable[[Problem, Kernel, Config, Chip], float | None]
"""Modelled microseconds of a configuration, or None where the model has nothing to say."""

# How records weigh, by their distance in doublings: 1 / (NEAREST + distance). Records of this very problem on this very chip weigh 4, of a
# shape one doubling away 0.8, of one four doublings away 0.24.
NEAREST = 0.25
# Another chip counts as so many doublings, and so does another dtype, layout or flag of the problem.
OTHER_CHIP = 1.0
OTHER_FLAG = 2.0
# Results of an older version of the kernels' code weigh this share of results of the present one.
STALE = 0.5
# The analytic model weighs like records of a shape two doublings away: it knows the roofline and the waves, not the compiler.
ANALYTIC = 1.0 / (NEAREST + 2.0)
# Of the tuned shapes and chips, so many are used, the nearest. The two best of each of the nearest become seeds: a budget of 20 evaluations
# must have room for more than other problems' winners.
MOST_SOURCES = 8
SEEDING_SHAPES = 3
SEEDING_CHIPS = 2
SEEDS_PER_SOURCE = 2
# Of what tables of serving engines recommend (`klab import`), so many become seeds, of shapes at most so many doublings away.
MOST_RECOMMENDED = 3
RECOMMENDED_WITHIN = 1.0
# Beyond so many candidates the analytic model is asked for evenly spaced ones alone: it takes about 10 us each.
MOST_MODELLED = 100_000

_FAILED = {Status.COMPILE_ERROR, Status.INCORRECT, Status.OUT_OF_MEMORY, Status.CRASHED, Status.TIMEOUT, Status.UNSUPPORTED}


@dataclass(frozen=True)
class Source:
    """The records of one problem on one chip in one state of the cache, as a space with times in microseconds (infinite: failed)."""

    space: Space
    time_us: Float
    chip: str
    distance: float
    fresh: float  # share of its rows that are of the kernels' present code

    @property
    def weight(self) -> float:
        """What it counts beside other sources."""
        return (STALE + (1.0 - STALE) * self.fresh) / (NEAREST + self.distance)


def prior_for(
    space: Space,
    problem: Problem,
    chip: Chip,
    kernels: Mapping[str, Kernel],
    results: Iterable[Result],
    *,
    expected_us: Model | None = None,
) -> Prior:
    """The prior of a search of `space`, which `kernel_points` made for this problem and chip. `kernels` by id.

    Seeds: the default of every kernel; then what rows of kind "reference" without a time recommend for this shape or one near it (they are
    of a serving engine's table); then the best of the nearest tuned shapes of this operator on this chip, the nearest first; then the best
    of other chips' records. Expected: the mean of logarithms of what each source of records says (transfer.py), weighted by nearness and
    by whether it is of the kernels' present code, and of the analytic model, which enters by its ratios alone: its scale is fitted to the
    records. Where neither says anything it is nan, and None when that is so of every candidate.
    """
    rows = list(results)
    sources = sources_of(rows, problem, chip, kernels)
    recommended = _recommended(space, rows, problem, chip, kernels)
    seeds = [*_defaults(space, problem, chip, kernels), *recommended, *_winners(space, sources, chip)]
    total, mass = np.zeros(len(space)), np.zeros(len(space))
    for source in sources:
        expected, trust = from_one(space, source.space, source.time_us)
        accumulate(total, mass, expected, source.weight * trust)
    if expected_us is not None:
        modelled = _modelled(space, problem, chip, kernels, expected_us)
        accumulate(total, mass, modelled, np.full(len(space), ANALYTIC))
    combined = np.exp(mean(total, mass))
    return Prior(tuple(dict.fromkeys(seeds)), combined if np.isfinite(combined).any() else None)


def sources_of(results: Iterable[Result], problem: Problem, chip: Chip, kernels: Mapping[str, Kernel]) -> list[Source]:
    """What the results know of this operator, a source for each problem, chip and state of the cache; the MOST_SOURCES nearest, in order.

    Of several rows of one point, one of the present code goes before an older one's, then the newest; rows that were only screened or were
    throttled say nothing. Rows of kernels that are not among `kernels`, or of problems that can no longer be read, are left out.
    """
    groups: dict[tuple[Json, ...], list[Result]] = defaultdict(list)
    for row in results:
        if row.operator != problem.operator or row.kernel not in kernels or row.kind != "measured":
            continue
        if row.status in _FAILED or (row.status is Status.OK and row.median_us):
            groups[row.problem_key, row.chip, row.l2_state or row.policy.get("l2"), row.policy.get("threads", 0)].append(row)
    near = []
    for rows in groups.values():
        apart = _distance(problem, rows[0].problem)
        if apart is not None and any(row.status is Status.OK for row in rows):
            near.append((apart + (OTHER_CHIP if rows[0].chip != chip.name else 0.0), rows))
    near.sort(key=lambda found: found[0])
    # Twice as many as are used: the present code may put a farther one before a nearer.
    digests = {name: kernel.source_digest for name, kernel in kernels.items()}
    found = [_source(rows, apart, digests) for apart, rows in near[: 2 * MOST_SOURCES]]
    return sorted(found, key=lambda s: (-s.weight, s.chip, -len(s.space)))[:MOST_SOURCES]


def _source(rows: Sequence[Result], distance: float, digests: Mapping[str, str]) -> Source:
    points: dict[str, Result] = {}
    for row in rows:
        point = canonical_json([row.kernel, row.config])
        if point not in points or _standing(points[point], digests) < _standing(row, digests):
            points[point] = row
    standing = list(points.values())
    time_us = np.array([float(row.median_us or 0.0) if row.status is Status.OK else math.inf for row in standing])
    fresh = sum(digests[row.kernel] == row.source_digest for row in standing) / len(standing)
    return Source(Space.of({KERNEL: row.kernel, **row.config} for row in standing), time_us, rows[0].chip, distance, fresh)


def _standing(row: Result, digests: Mapping[str, str]) -> tuple[Json, ...]:
    return digests[row.kernel] == row.source_digest, age(row)


def _distance(problem: Problem, other: Mapping[str, Json]) -> float | None:
    """How many doublings of a size lie between two problems of one operator; None when the other cannot be read."""
    try:
        there = type(problem).from_json(other)
    except (KlabError, TypeError, ValueError):
        return None
    apart = 0.0
    for f in dataclasses.fields(problem):  # type: ignore[arg-type]
        ours, theirs = getattr(problem, f.name), getattr(there, f.name)
        if ours == theirs:
            continue
        sizes = [_sizes(ours), _sizes(theirs)]
        if sizes[0] and len(sizes[0]) == len(sizes[1]):
            apart += sum(abs(math.log2(a / b)) for a, b in zip(*sizes, strict=True))
        else:
            apart += OTHER_FLAG
    return apart


def _sizes(value: object) -> list[float]:
    """What of a field is a size: a positive number; of lengths, how many they are and their mean. Nothing of flags and names."""
    if isinstance(value, bool):
        return []
    if isinstance(value, int | float):
        return [float(value)] if value > 0 else []
    if isinstance(value, tuple) and value and all(isinstance(v, int | float) and not isinstance(v, bool) and v >= 0 for v in value):
        return [float(len(value)), max(sum(value) / len(value), 1.0)]
    return []


def _defaults(space: Space, problem: Problem, chip: Chip, kernels: Mapping[str, Kernel]) -> list[int]:
    found = []
    for kernel in kernels.values():
        if kernel.problem_type.operator == problem.operator and safe_unfit(kernel, problem, chip) is None:
            found.append(space.find({KERNEL: kernel.id, **kernel.default(problem, chip).to_json_full()}))
    return [candidate for candidate in found if candidate is not None]


def _recommended(space: Space, rows: Iterable[Result], problem: Problem, chip: Chip, kernels: Mapping[str, Kernel]) -> list[int]:
    """What others found best on this chip, nearest shapes first, as far as it is a candidate here. Nothing is believed of their times."""
    near: list[tuple[float, int]] = []
    for row in rows:
        if row.kind != "reference" or row.median_us is not None or (row.operator, row.chip) != (problem.operator, chip.name):
            continue
        here = space.find({KERNEL: row.kernel, **row.config}) if row.kernel in kernels else None
        apart = _distance(problem, row.problem) if here is not None else None
        if here is not None and apart is not None and apart <= RECOMMENDED_WITHIN:
            near.append((apart, here))
    return list(dict.fromkeys(candidate for _, candidate in sorted(near)))[:MOST_RECOMMENDED]


def _winners(space: Space, sources: Sequence[Source], chip: Chip) -> list[int]:
    """The best of the nearest sources that are candidates here: this chip's shapes, then other chips' records; then their second best."""
    shapes = [s for s in sources if s.chip == chip.name][:SEEDING_SHAPES]
    ranked = []
    for source in shapes + [s for s in sources if s.chip != chip.name][:SEEDING_CHIPS]:
        order = np.argsort(source.time_us, kind="stable")[: int(np.isfinite(source.time_us).sum())]
        here = (space.find(source.space.point(int(candidate))) for candidate in order)
        ranked.append(list(itertools.islice((c for c in here if c is not None), SEEDS_PER_SOURCE)))
    return [best[place] for place in range(SEEDS_PER_SOURCE) for best in ranked if place < len(best)]


def _modelled(space: Space, problem: Problem, chip: Chip, kernels: Mapping[str, Kernel], expected_us: Model) -> Float:
    """Logarithms of the modelled times, nan where the model says nothing."""
    found = np.full(len(space), np.nan)
    for candidate in range(0, len(space), -(-len(space) // MOST_MODELLED)):
        time_us = expected_us(problem, *config_of(space.point(candidate), kernels), chip)
        if time_us is not None and 0.0 < time_us < math.inf:
            found[candidate] = math.log(time_us)
    return found
