"""Validation: what klab predicts of a deployment beside what others measured on it, and how far apart the two are."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path

from klab.harness.catalog import find_chip
from klab.harness.cost.closed_loop import Benchmark, Replayed, StepTimes, replay
from klab.harness.cost.estimate import ENOUGH, Estimator, Origin, label_of
from klab.harness.cost.published import WAVES, Published
from klab.harness.cost.ranges import ZERO, Range
from klab.harness.cost.reference_source import sources_for
from klab.harness.cost.serving import most_concurrent, operating_points
from klab.harness.cost.steps import Steps
from klab.harness.plan import plan
from klab.harness.store.reference.tables import BACKENDS, package_version
from klab.kernels.errors import UsageError

# What is aimed at, as medians of |predicted / measured - 1| over points whose kernels are covered.
GOAL_TPOT, GOAL_TTFT = 0.10, 0.25


@dataclass(frozen=True)
class Overhead:
    """What an engine adds to its kernels: `host_us` between two steps; before a first token `first_s`, and `token_s` per prompt token
    (reading the request, launches outside a graph, the way back). Nothing by default.
    """

    host_us: Range = ZERO
    first_s: float = 0.0
    token_s: float = 0.0

    def before_first_s(self, isl: int) -> float:
        """Seconds that a request of so many prompt tokens waits beside its kernels."""
        return self.first_s + self.token_s * isl


@dataclass(frozen=True)
class Checked:
    """One point and its prediction. `why_not`: why there is none ("" where there is one); `replayed`: the benchmark itself, replayed.

    `label` is what the time may be called, `covered` the share of it on measured or reference kernels; `operators`: seconds per request.
    """

    point: Published
    ttft_s: Range = ZERO
    tpot_s: Range = ZERO
    label: Origin = Origin.MODELLED
    covered: float = 0.0
    replayed: Replayed | None = None
    operators: Mapping[str, float] = field(default_factory=dict, hash=False)
    why_not: str = ""
    with_overheads: bool = False


@dataclass(frozen=True)
class Errors:
    """Of |predicted / measured - 1|: median and 90th percentile; of predicted / measured: the median. `inside`: share of the measured
    values that lie in the predicted range.
    """

    count: int
    median: float
    p90: float
    ratio: float
    inside: float = math.nan


class Estimators:
    """The Estimator of a point: published tables of its chip, those of its own engine first; without a folder the roofline alone."""

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self._made: dict[tuple[str, str], Estimator] = {}

    def __call__(self, point: Published) -> Estimator:
        """Made once per chip and engine."""
        key = (point.chip, point.backend)
        if key not in self._made:
            chip = find_chip(point.chip)
            engines = [point.backend, *(name for name in BACKENDS if name != point.backend)]
            self._made[key] = Estimator(chip, sources_for(chip, self._folder, [], engines) if self._folder else [])
        return self._made[key]

    @property
    def notes(self) -> list[str]:
        """What the times rest on."""
        chips = ", ".join(sorted({chip for chip, _ in self._made}))
        if self._folder is None:
            return [f"kernels of {chips}: the roofline and a usual share of it"]
        return [
            f"kernels of {chips}: published tables ({package_version(self._folder)}), those of a point's own engine first; else modelled"
        ]


class Predictor:
    """Predictions of published points: the steady state that `klab cost` gives, and the benchmark replayed on the same steps.

    `estimators`: the Estimator of a point (per chip, or per chip and backend); each deployment's steps are planned once.
    """

    def __init__(
        self, estimators: Callable[[Published], Estimator], overheads: Mapping[str, Overhead] | None = None, *, replays: bool = True
    ) -> None:
        self._estimators, self._overheads, self._replays = estimators, overheads or {}, replays
        self._steps: dict[object, Steps] = {}
        self._times: dict[object, StepTimes] = {}

    def check(self, point: Published) -> Checked:
        """The prediction of one point, or why there is none."""
        extra = self._overheads.get(point.backend, Overhead())
        if point.setting not in self._steps:
            try:
                steps = Steps(point.deployment, self._estimators(point), extra.host_us)
                if wide := _wide_experts(point):
                    return Checked(point, why_not=wide)
            except UsageError as error:
                return Checked(point, why_not=str(error))
            self._steps[point.setting] = steps
            self._times[point.setting] = StepTimes(steps)
        steps = self._steps[point.setting]
        most = most_concurrent(steps, point.workload)
        if most < point.concurrency:
            return Checked(point, why_not="the memory holds fewer requests than were sent: they queue")
        found = operating_points(steps, point.workload, [point.concurrency])[0]
        replayed = self.replay(point, extra) if self._replays else None
        covered = sum(found.time_shares.get(origin, 0.0) for origin in (Origin.MEASURED, Origin.REFERENCE))
        operators = {name: seconds.mid for name, seconds in found.by_operator().items()}
        label = label_of(found.time_shares)
        return Checked(point, found.ttft_s + extra.before_first_s(point.workload.isl), found.tpot_s, label, covered, replayed, operators)

    def replay(self, point: Published, extra: Overhead) -> Replayed | None:
        """The benchmark as its script runs it, on the engine's own way of filling a step."""
        bench = Benchmark(
            point.isl, point.osl, point.concurrency, point.shortest, WAVES, point.chunk_tokens,
            whole_prompts=point.backend == "trtllm", prefill_alone=point.prefill_alone, intake_s=point.intake_s,
        )  # fmt: skip
        times = copy(self._times[point.setting])  # it shares what it knows of the steps
        times.host_us = extra.host_us.mid
        found = replay(bench, times)
        if found is None:
            return None
        return replace(found, ttft_s=found.ttft_s + extra.before_first_s(point.workload.isl) + point.waits_steps * found.tpot_s)


@cache
def _wide_experts(point: Published) -> str:
    """Why the experts are planned in 16 bits although the measured ones were narrower; "" where they are not. UsageError as `plan`."""
    d = point.deployment
    notes = plan(d.model, d.chip, d.scenario(isl=16, osl=1, batches=(1,))).notes
    wide = [note.message.split(":")[0] for note in notes if note.field == "quantization" and "fused_moe" in note.message]
    return f"{point.model} on {d.tp} GPUs: {wide[0]}" if wide else ""


def first_half(point: Published) -> bool:
    """Whether a point belongs to the half on which overheads are fitted; a deployment's points are all on one side."""
    return hashlib.sha256(repr(point.setting).encode()).digest()[0] % 2 == 0


def fitted(checked: Iterable[Checked], again: Callable[[Published, Overhead], Replayed | None]) -> dict[str, Overhead]:
    """Per engine: the time per step that brings the mean of TPOT's errors down most, its range the quartiles of what is missing; then, with
    that time between its steps (`again` replays a point with it), the same for the time to a first token. From predictions without either.
    """
    found: dict[str, Overhead] = {}
    by_backend: dict[str, list[Checked]] = {}
    for one in checked:
        if not one.why_not:
            by_backend.setdefault(one.point.backend, []).append(one)
    for backend, group in by_backend.items():
        missing = [(c.point.tpot_s - c.tpot_s.mid, 1 / c.point.tpot_s) for c in group]
        host = Overhead(Range(*(max(0.0, weighted(missing, share)) * 1e6 for share in (0.25, 0.5, 0.75))))
        replays = [(c.point, again(c.point, host)) for c in group if c.replayed]
        later = [(float(p.workload.isl), p.ttft_s - r.ttft_s, 1 / p.ttft_s) for p, r in replays if r]
        found[backend] = Overhead(host.host_us, *(_line(later) if later else (0.0, 0.0)))
    return found


def _line(points: Sequence[tuple[float, float, float]]) -> tuple[float, float]:
    """(a, b), neither negative, of the line a + b x through (x, y, weight) with the least sum of weighted absolute errors."""
    import numpy as np
    from scipy.optimize import linprog

    x, y, weights = (np.array(column) for column in zip(*points, strict=True))
    count, scale = len(x), float(np.max(np.abs(x))) or 1.0
    # Errors are split into what is above and what is below: y - a - b x = above - below.
    equations = np.hstack([np.ones((count, 1)), (x / scale)[:, None], np.eye(count), -np.eye(count)])
    found = linprog(np.concatenate([[0.0, 0.0], weights, weights]), A_eq=equations, b_eq=y, method="highs")
    return float(found.x[0]), float(found.x[1]) / scale


def weighted(pairs: Iterable[tuple[float, float]], share: float) -> float:
    """The quantile of (value, weight) pairs; with weights 1/y the median is what minimises the sum of |value error| / y."""
    ordered = sorted(pairs)
    whole, seen = sum(weight for _, weight in ordered), 0.0
    for value, weight in ordered:
        seen += weight
        if seen >= share * whole:
            return value
    return math.nan


def errors(pairs: Sequence[tuple[float | Range, float]]) -> Errors:
    """Of (predicted, measured) pairs; counts 0 for none."""
    if not pairs:
        return Errors(0, math.nan, math.nan, math.nan)
    middles = [(p.mid if isinstance(p, Range) else p, measured) for p, measured in pairs]
    misses = sorted(abs(p / measured - 1) for p, measured in middles)
    ratios = sorted(p / measured for p, measured in middles)
    ranged = [p.low <= measured <= p.high for p, measured in pairs if isinstance(p, Range)]
    inside = sum(ranged) / len(ranged) if ranged else math.nan
    return Errors(len(pairs), quantile(misses, 0.5), quantile(misses, 0.9), quantile(ratios, 0.5), inside)


def quantile(ordered: Sequence[float], share: float) -> float:
    """Linear between order statistics."""
    at = share * (len(ordered) - 1)
    low = math.floor(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (at - low) * (ordered[high] - ordered[low])


@dataclass(frozen=True)
class Summary:
    """Errors of one group of points: the steady state's and the replay's, TPOT and TTFT."""

    group: tuple[str, ...]
    tpot: Errors
    ttft: Errors
    tpot_replayed: Errors
    ttft_replayed: Errors
    covered: float


def summarise(checked: Iterable[Checked], by: Callable[[Checked], tuple[str, ...]]) -> list[Summary]:
    """One Summary per group, in order of their names."""
    groups: dict[tuple[str, ...], list[Checked]] = {}
    for one in checked:
        if not one.why_not:
            groups.setdefault(by(one), []).append(one)
    return [_summary(name, groups[name]) for name in sorted(groups)]


def _summary(name: tuple[str, ...], group: Sequence[Checked]) -> Summary:
    again = [(c, c.replayed) for c in group if c.replayed]
    return Summary(
        name,
        tpot=errors([(c.tpot_s, c.point.tpot_s) for c in group]),
        ttft=errors([(c.ttft_s, c.point.ttft_s) for c in group]),
        tpot_replayed=errors([(r.tpot_s, c.point.tpot_s) for c, r in again]),
        ttft_replayed=errors([(r.ttft_s, c.point.ttft_s) for c, r in again]),
        covered=sum(c.covered for c in group) / len(group),
    )


@dataclass(frozen=True)
class Validation:
    """Everything that the page shows. `checked`: all points without any overhead; `held_out`: the half on which no overhead was fitted,
    with them. `skipped`: why rows were left out (reason: rows).
    """

    checked: tuple[Checked, ...]
    held_out: tuple[Checked, ...]
    overheads: Mapping[str, Overhead]
    skipped: Mapping[str, int]


def validate(
    points: Sequence[Published],
    estimators: Callable[[Published], Estimator],
    skipped: Mapping[str, int] | None = None,
    tell: Callable[[str], None] = lambda line: None,
) -> Validation:
    """All points predicted; then overheads fitted on half of the deployments and the other half predicted with them."""
    plain = Predictor(estimators)
    checked = []
    for number, point in enumerate(points):
        if number and number % 200 == 0:
            tell(f"{number} of {len(points)} points")
        checked.append(plain.check(point))
    tell("overheads, on one half of the deployments")
    half = [one for one in checked if first_half(one.point)]
    # Where kernels are modelled, what is missing says more of the model than of the engine.
    overheads = fitted([one for one in half if one.covered >= ENOUGH] or half, plain.replay)
    later = [point for point in points if not first_half(point) and point.backend in overheads]
    tell(f"{len(later)} points of the other half of the deployments, with the overheads of the first")
    with_overheads = Predictor(estimators, overheads)
    held_out = [replace(with_overheads.check(point), with_overheads=True) for point in later]
    left_out = dict(skipped or {})
    for one in checked:
        if one.why_not:
            left_out[one.why_not] = left_out.get(one.why_not, 0) + 1
    return Validation(tuple(checked), tuple(held_out), overheads, left_out)
