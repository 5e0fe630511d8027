"""Sides: the deployments that may take part in a placement, each with what one replica can do in every role."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from klab.harness.cost.estimate import Estimator, Origin
from klab.harness.cost.fit import fit_of
from klab.harness.cost.mix import Mix, energy, idle_joules, shares
from klab.harness.cost.pools import PoolPoint
from klab.harness.cost.ranges import ZERO, Range
from klab.harness.cost.serving import OperatingPoint, Replica, decode_pool, meets, prefill_pool
from klab.harness.cost.steps import Steps
from klab.harness.cost.workload import Deployment, Workload
from klab.kernels.contract import Chip
from klab.kernels.errors import UsageError

ROLES = ("prefill", "decode", "both")
# Shares of the time in which a prefill replica works; with few replicas it is seldom near its limit.
LOADS = (0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.45, 0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95)
# Tensor-parallel sizes that are tried, at most SIZES of them per chip: the smallest that fit. Beyond a board of 8 only if need be.
TENSOR_PARALLEL, BEYOND, SIZES = (1, 2, 4, 8), (16, 32), 3
# Tokens per step that a replica which does both is also tried with.
SMALL_CHUNKS = (512,)
# Points are looked at until their latency is PAST times what is allowed (other SLOs are asked about too), and the last that is in time is
# found to CLOSE of its requests.
PAST, CLOSE = 4.0, 0.02
# Between two such points others are taken evenly, each so many times the one before.
GAP = 1.1


@dataclass(frozen=True)
class Point:
    """What one replica does in a role. TTFT without any transfer; TPOT 0 for one that only prefills, TTFT 0 for one that only decodes.

    `busy_s` of the replica and `busy_joules` of its boards per request, waiting apart; `energy_shares`: of these, by what they rest on.
    """

    role: str
    concurrency: int
    ttft_s: Range
    tpot_s: Range
    requests_per_s: Range
    busy_s: float
    busy_joules: Range
    time_shares: Mapping[Origin, float]
    limit: str = ""
    chunk_tokens: int = 0
    energy_shares: Mapping[Origin, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Side:
    """One deployment. `most`: sequences that fit into a replica's memory; `prompt_s`: one prompt computed alone; `idle_w`: a replica that
    waits; `cache_dtype`: of the cache as it is sent.
    """

    deployment: Deployment
    by_role: Mapping[str, tuple[Point, ...]] = field(hash=False)
    most: int
    prompt_s: Range
    idle_w: Range
    cache_dtype: str

    @property
    def name(self) -> str:
        """`h200 x 4`."""
        return f"{self.deployment.chip.name} x {self.deployment.tp}"

    def points(self, role: str) -> tuple[Point, ...]:
        """Those of a role; none where the chip is not made for it or has no room."""
        return self.by_role.get(role, ())


class NoRoom(UsageError):
    """A deployment whose memory holds not one request."""


class Builder:
    """Makes sides of deployments; keeps the estimators and the steps, so that another workload costs only what is new."""

    def __init__(self, estimators: Mapping[str, Estimator], host_us: Range = ZERO, small_chunks: Sequence[int] = SMALL_CHUNKS) -> None:
        self.estimators, self.host_us, self.small_chunks = estimators, host_us, small_chunks
        self._steps: dict[tuple[str, int], Steps] = {}

    def side(self, deployment: Deployment, workload: Workload, roles: Iterable[str] = ROLES, *, rough: bool = False) -> Side:
        """With `rough` fewer points are worked out near the SLOs.

        UsageError when it cannot be planned, or not one request fits.
        """
        steps = self._steps_of(deployment)
        fit = fit_of(steps, workload)
        if fit.why_not:
            raise NoRoom(fit.why_not)
        phases = deployment.chip.phases
        roles = {role for role in roles if role in phases or (role == "both" and len(phases) == 2)}
        prefill = prefill_pool(steps, workload, LOADS)
        alone = prefill[0].mix
        prompt_s = sum((step.us * (count * 1e-6) for count, step in alone), ZERO)
        found: dict[str, tuple[Point, ...]] = {}
        if "prefill" in roles:
            found["prefill"] = tuple(_prefilling(point) for point in prefill)
        if "decode" in roles:
            found["decode"] = between([_decoding(point) for point in self._decoding(steps, workload, fit.requests, rough)])
        if "both" in roles:
            found["both"] = between([_both(point) for point in self._both(steps, workload, fit.requests, rough)])
        d = deployment
        return Side(d, found, fit.requests, prompt_s, idle_joules(steps, Range.exact(1.0)), d.kv_dtype or steps.dtype)

    def _steps_of(self, deployment: Deployment) -> Steps:
        key = (deployment.chip.name, deployment.tp)
        if key not in self._steps or self._steps[key].deployment != deployment:
            self._steps[key] = Steps(deployment, self.estimators[deployment.chip.name], self.host_us)
        return self._steps[key]

    def _both(self, steps: Steps, workload: Workload, most: int, rough: bool) -> list[OperatingPoint]:
        """With the steps that were asked for, and with smaller ones around the most requests that meet the SLOs: these may let more in."""
        replica = Replica(steps, workload, most)
        found = list(climb(replica.point, lambda point: _late(workload, point.ttft_s, point.tpot_s), most, rough=rough).values())
        last = max((point.concurrency for point in found if meets(point)), default=1)
        for tokens in self.small_chunks:
            if tokens < workload.chunk_tokens and _hurried(workload):
                smaller = Replica(steps, replace(workload, chunk_tokens=tokens), most)
                found.append(smaller.point(last))
                late = _late(workload, found[-1].ttft_s, found[-1].tpot_s)
                if late < 1:
                    # Latencies grow about with the requests.
                    found.append(smaller.point(min(most, max(last + 1, int(last / late)))))
        return found

    def _decoding(self, steps: Steps, workload: Workload, most: int, rough: bool) -> list[PoolPoint]:
        found = climb(
            lambda n: decode_pool(steps, workload, [n])[0],
            lambda point: _late(workload, ZERO, point.latency_s),
            most,
            rough=rough,
        )
        return [found[n] for n in sorted(found)]


def climb(at: Callable[[int], Any], late: Callable[[Any], float], most: int, *, rough: bool = False) -> dict[int, Any]:
    """Points by their number of requests: 1, 4, 16, ... up to `most`, or until one is PAST what is allowed; then closer and closer (CLOSE)
    to the last that is not late (`rough`: two tries). `late`: its latency over what is allowed.
    """
    found: dict[int, Any] = {}
    for n in sorted({*(4**power for power in range(1 + most.bit_length() // 2) if 4**power <= most), most}):
        found[n] = at(n)
        if late(found[n]) > PAST:
            break
    low = max((n for n, point in found.items() if late(point) <= 1), default=0)
    high = min((n for n in found if n > low), default=0)
    while low and high - low > max(1, CLOSE * low):
        # As if it grew evenly between both.
        share = (1 - late(found[low])) / (late(found[high]) - late(found[low]))
        middle = min(high - 1, max(low + 1, round(low + share * (high - low))))
        found[middle] = at(middle)
        low, high = (middle, high) if late(found[middle]) <= 1 else (low, middle)
        # From one side alone it would never close in: look right beside the last try as well.
        beside = low + max(1, int(CLOSE * low)) if low == middle else high - max(1, int(CLOSE * high))
        if low < beside < high:
            found[beside] = at(beside)
            low, high = (beside, high) if late(found[beside]) <= 1 else (low, beside)
        if rough:
            break
    return found


def between(points: Sequence[Point]) -> tuple[Point, ...]:
    """With points every GAP between those of the same steps: the time that all requests in flight take for one round, and the joules of it,
    grow evenly with their number, as a step's do but for the corners of its kernels' tiles.
    """
    found = list(points)
    by_chunk: dict[int, list[Point]] = {}
    for point in sorted(points, key=lambda one: one.concurrency):
        by_chunk.setdefault(point.chunk_tokens, []).append(point)
    for low, high in (pair for held in by_chunk.values() for pair in itertools.pairwise(held)):
        n = max(low.concurrency + 1, round(low.concurrency * GAP))
        while n < high.concurrency:
            found.append(_mixed(low, high, n))
            n = max(n + 1, round(n * GAP))
    return tuple(sorted(found, key=lambda one: (one.chunk_tokens, one.concurrency)))


def _mixed(low: Point, high: Point, n: int) -> Point:
    share = (n - low.concurrency) / (high.concurrency - low.concurrency)

    def even(first: Range, second: Range) -> Range:
        return first * (1 - share) + second * share

    def mixed(first: Mapping[Origin, float], second: Mapping[Origin, float]) -> dict[Origin, float]:
        return {origin: (1 - share) * first.get(origin, 0.0) + share * second.get(origin, 0.0) for origin in Origin}

    joules = even(low.busy_joules * low.concurrency, high.busy_joules * high.concurrency) * (1 / n)
    rounds = [Range(*(point.concurrency / rate for rate in _ends(point))) for point in (low, high)]
    round_s = even(*rounds)
    rate = Range(n / round_s.high, n / round_s.mid, n / round_s.low)
    times = (even(low.ttft_s, high.ttft_s), even(low.tpot_s, high.tpot_s), rate, 1 / rate.mid)
    by_time, by_energy = mixed(low.time_shares, high.time_shares), mixed(low.energy_shares, high.energy_shares)
    return Point(low.role, n, *times, joules, by_time, chunk_tokens=low.chunk_tokens, energy_shares=by_energy)


def _ends(point: Point) -> tuple[float, float, float]:
    """Rates from the highest to the lowest."""
    return point.requests_per_s.high, point.requests_per_s.mid, point.requests_per_s.low


def _hurried(workload: Workload) -> bool:
    return not workload.offline and bool(workload.slo_ttft_s or workload.slo_tpot_s)


def _late(workload: Workload, ttft_s: Range, tpot_s: Range) -> float:
    if workload.offline:
        return 0.0
    slos = ((ttft_s.mid, workload.slo_ttft_s), (tpot_s.mid, workload.slo_tpot_s))
    return max((seconds / slo for seconds, slo in slos if slo), default=0.0)


def sides_of(
    chip: Chip, sizes: Sequence[int] | None, like: Deployment, workload: Workload, builder: Builder
) -> tuple[list[Side], list[str]]:
    """The sides of one chip at these tensor-parallel sizes (None: the smallest that fit, SIZES of them), with the fields of `like`.

    Also in a line each: why a size that was asked for, or the chip, is not among them.
    """
    found: list[Side] = []
    reasons: dict[int, UsageError] = {}
    for tp in sizes or (*TENSOR_PARALLEL, *BEYOND):
        if sizes is None and (len(found) == SIZES or (found and tp in BEYOND)):
            break
        try:
            found.append(builder.side(replace(like, chip=chip, tp=tp), workload))
        except UsageError as error:
            reasons[tp] = error
    if sizes is None:
        # Of sizes that were only tried, the last tells why the chip is left out: the last without room, as others may just not divide.
        short = {tp: error for tp, error in reasons.items() if isinstance(error, NoRoom)}
        reasons = {} if found else dict(list((short or reasons).items())[-1:])
    return found, [f"{chip.name} x {tp}: {reason}" for tp, reason in reasons.items()]


def _prefilling(point: PoolPoint) -> Point:
    busy_s = point.load / point.requests_per_s.mid
    times = (point.latency_s, ZERO, point.requests_per_s, busy_s)
    return _point("prefill", point, times)


def _decoding(point: PoolPoint) -> Point:
    busy_s = 1 / point.requests_per_s.mid
    times = (ZERO, point.latency_s, point.requests_per_s, busy_s)
    return _point("decode", point, times)


def _both(point: OperatingPoint) -> Point:
    busy_s = 1 / point.requests_per_s.mid
    times = (point.ttft_s, point.tpot_s, point.requests_per_s, busy_s)
    return _point("both", point, times, point.workload.chunk_tokens)


def _point(role: str, point: PoolPoint | OperatingPoint, times: tuple[Range, Range, Range, float], chunk_tokens: int = 0) -> Point:
    mix: Mix = point.mix
    joules, by_energy = energy(mix) * point.deployment.tp, shares(mix, energy=True)
    return Point(role, point.concurrency, *times, joules, point.time_shares, point.limit, chunk_tokens, by_energy)
