"""Placement: which chips prefill and which decode, together or apart, how many of each, so that a rate of requests is served best."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from klab.harness.cost.estimate import Origin, label_of
from klab.harness.cost.ranges import ZERO, Range
from klab.harness.cost.sides import Point, Side
from klab.harness.cost.staffing import Fleet, Pool, Terms, fleet_of
from klab.harness.cost.transfer import Transfer, link_between, transfer
from klab.harness.cost.workload import Workload
from klab.kernels.errors import UsageError

OBJECTIVES = ("cost", "energy", "kw")
# Of replicas: as many as needed to a fraction; whole ones; whole machines.
COUNTS = ("fractions", "replicas", "machines")


@dataclass(frozen=True)
class Demand:
    """What is to be served and by which figure: `rate_per_s` requests per second on average, 1/`workload.utilisation` times that at the
    peak, which sizes the fleet.

    `objective`: least "cost" ($/h), "energy" (J of the boards) or "kw" (provisioned power). `machine_gpus`: GPUs that are taken together.
    `count`: of COUNTS. `overlap`: a layer's cache leaves as soon as it is computed. `link_gb_per_s`: of every GPU's network, one way (None:
    as the chips state); `link_factor` scales it.
    """

    workload: Workload
    rate_per_s: float
    objective: str = "cost"
    machine_gpus: int = 8
    count: str = "machines"
    overlap: bool = True
    link_gb_per_s: float | None = None
    link_factor: float = 1.0

    def __post_init__(self) -> None:
        """UsageError for what nobody can be asked."""
        checks = (
            (0 < self.rate_per_s < math.inf, f"--rate is a positive number of requests per second, not {self.rate_per_s:g}"),
            (self.objective in OBJECTIVES, f"--objective is {', '.join(OBJECTIVES)}, not {self.objective!r}"),
            (self.machine_gpus >= 1, f"--machine is at least 1 GPU, not {self.machine_gpus}"),
            (self.count in COUNTS, f"counts are {', '.join(COUNTS)}, not {self.count!r}"),
            (self.link_gb_per_s is None or 0 < self.link_gb_per_s < math.inf, f"--link is GB/s above 0, not {self.link_gb_per_s}"),
            (self.workload.osl >= 2, f"--osl {self.workload.osl}: there is nothing to decode, so nothing to place; klab cost does"),
        )
        for good, words in checks:
            if not good:
                raise UsageError(words)

    @property
    def peak_per_s(self) -> float:
        """Requests per second while there is work."""
        return self.rate_per_s / self.workload.utilisation

    @property
    def slo_ttft_s(self) -> float:
        """Infinite where none is asked for."""
        return math.inf if self.workload.offline or self.workload.slo_ttft_s is None else self.workload.slo_ttft_s

    @property
    def slo_tpot_s(self) -> float:
        """Infinite where none is asked for."""
        return math.inf if self.workload.offline or self.workload.slo_tpot_s is None else self.workload.slo_tpot_s


@dataclass(frozen=True)
class Option:
    """One way to serve the demand: a pool that does both, or one that prefills and one that decodes. `transfer`: between these.

    `exposed_s`: what the first token waits for the transfer, others on its way included. `value` is what the objective counts.
    """

    demand: Demand
    pools: tuple[Pool, ...]
    fleet: Fleet
    ttft_s: Range
    tpot_s: Range
    transfer: Transfer | None = None
    exposed_s: Range = ZERO

    @property
    def apart(self) -> bool:
        """Whether prefill and decode have pools of their own."""
        return len(self.pools) == 2

    @property
    def kind(self) -> str:
        """`together`, `apart, one chip` or `apart, two chips`."""
        if not self.apart:
            return "together"
        return "apart, one chip" if len(self.chips) == 1 else "apart, two chips"

    @property
    def chips(self) -> tuple[str, ...]:
        """Names, prefill's first."""
        return tuple(dict.fromkeys(pool.side.deployment.chip.name for pool in self.pools))

    @property
    def name(self) -> str:
        """`h200 x 4`, or `b200 x 2 -> h200 x 4` for prefill and decode."""
        return " -> ".join(pool.side.name for pool in self.pools)

    @property
    def shape(self) -> tuple[tuple[str, str], ...]:
        """Which chip has which role: what a placement decides. Tensor-parallel sizes and numbers are details of it."""
        return tuple((pool.role, pool.side.deployment.chip.name) for pool in self.pools)

    @property
    def value(self) -> float:
        """$/h, watts or kW, by the objective."""
        worth = {"cost": self.fleet.usd_per_hour, "energy": self.fleet.board_w, "kw": self.fleet.provisioned_kw}[self.demand.objective]
        return worth.mid if worth else math.inf

    @property
    def missed(self) -> float:
        """The larger of TTFT and TPOT over its SLO, by middle values; up to 1 the SLOs are met."""
        return max(self.ttft_s.mid / self.demand.slo_ttft_s, self.tpot_s.mid / self.demand.slo_tpot_s)

    @property
    def surely_meets(self) -> bool:
        """Whether the SLOs hold at the slow end of the ranges too."""
        return max(self.ttft_s.high / self.demand.slo_ttft_s, self.tpot_s.high / self.demand.slo_tpot_s) <= 1

    @property
    def time_shares(self) -> dict[Origin, float]:
        """Of the busy GPU time of both pools, by what it rests on."""
        weights = [(pool.side.deployment.tp * pool.point.busy_s, pool.point.time_shares) for pool in self.pools]
        whole = sum(weight for weight, _ in weights)
        return {origin: sum(weight * shares.get(origin, 0.0) for weight, shares in weights) / whole for origin in Origin}

    @property
    def energy_shares(self) -> dict[Origin, float]:
        """Of what the boards draw, by what it rests on; what they draw while they wait is modelled."""
        work = [(self.demand.rate_per_s * pool.point.busy_joules.mid, pool.point.energy_shares) for pool in self.pools]
        all_w = self.fleet.board_w.mid
        found = {origin: sum(watts * shares.get(origin, 0.0) for watts, shares in work) / all_w for origin in Origin}
        return found | {Origin.MODELLED: max(0.0, 1.0 - sum(share for origin, share in found.items() if origin != Origin.MODELLED))}

    @property
    def label(self) -> Origin:
        """What its times may be called."""
        return self._label(self.time_shares)

    @property
    def energy_label(self) -> Origin:
        """What its joules may be called."""
        return self._label(self.energy_shares)

    def _label(self, shares: Mapping[Origin, float]) -> Origin:
        return label_of(shares, self.pools[0].side.deployment.model.covered_share)

    @property
    def usd_per_mtok(self) -> Range | None:
        """Per million prompt and generated tokens."""
        w = self.demand.workload
        millions = self.demand.rate_per_s * 3600 * (w.isl + w.osl) / 1e6
        return self.fleet.usd_per_hour * (1 / millions) if self.fleet.usd_per_hour else None

    @property
    def joules_per_token(self) -> Range:
        """Of the boards, per prompt or generated token, waiting included."""
        w = self.demand.workload
        return self.fleet.board_w * (1 / (self.demand.rate_per_s * (w.isl + w.osl)))

    @property
    def ratio(self) -> float | None:
        """Prefill replicas per decode replica, before rounding."""
        return self.pools[0].needed / self.pools[1].needed if self.apart else None


@dataclass(frozen=True)
class Ranking:
    """Every arrangement that was looked at and meets the SLOs, best first. Without any, `nearest` misses them by the least."""

    demand: Demand
    options: tuple[Option, ...]
    compared: int
    nearest: Option | None = None
    left_out: tuple[str, ...] = ()

    @property
    def winner(self) -> Option | None:
        """The best one."""
        return self.options[0] if self.options else None

    def best_of(self, kind: str) -> Option | None:
        """The best of a kind."""
        return next((option for option in self.options if option.kind == kind), None)


def ranked(sides: Sequence[Side], demand: Demand, terms: Mapping[str, Terms]) -> Ranking:
    """Every side serving alone and every pair of sides, each at its best point for the demand."""
    found: list[Option] = []
    nearest: list[Option] = []
    left_out: dict[str, None] = {}
    compared = 0
    for side in sides:
        if side.points("both"):
            compared += 1
            _file(_together(side, demand, terms), found, nearest)
    for first, second in itertools.product(sides, sides):
        if not (first.points("prefill") and second.points("decode")):
            continue
        try:
            way = _transfer(first, second, demand)
        except UsageError as error:
            left_out[str(error)] = None
            continue
        compared += 1
        _file(_apart(first, second, way, demand, terms), found, nearest)
    found.sort(key=lambda option: (round(option.value, 9), not option.surely_meets, option.ttft_s.mid, option.name))
    # Of arrangements that miss by the same factor (one chip decodes, many could prefill) the cheapest is of use.
    closest = min(nearest, key=lambda option: (round(option.missed, 3), option.value), default=None)
    return Ranking(demand, tuple(found), compared, None if found else closest, tuple(left_out))


def _file(option: Option | None, found: list[Option], nearest: list[Option]) -> None:
    if option is not None:
        (found if option.missed <= 1 else nearest).append(option)


def _together(side: Side, demand: Demand, terms: Mapping[str, Terms]) -> Option | None:
    def late(point: Point) -> float:
        return max(point.ttft_s.mid / demand.slo_ttft_s, point.tpot_s.mid / demand.slo_tpot_s)

    point = _pick(side, side.points("both"), demand, late)
    if point is None:
        return None
    pool = Pool(side, point, demand.peak_per_s)
    return Option(demand, (pool,), fleet_of((pool,), demand, terms), point.ttft_s, point.tpot_s)


def _apart(first: Side, second: Side, way: Transfer, demand: Demand, terms: Mapping[str, Terms]) -> Option | None:
    moved_s = way.exposed_s(first.prompt_s, demand.overlap)
    # A decode replica keeps room for the caches on their way to it: from the start of the prefill where layers are sent one by one.
    held_s = moved_s.mid + (first.prompt_s.mid if demand.overlap else 0.0)
    received, sent = way.receipts_per_s, way.sends_per_s
    decoding = [_capped(point, received) for point in second.points("decode")]
    decode = _pick(second, _with_room(decoding, second.most, held_s), demand, lambda point: point.tpot_s.mid / demand.slo_tpot_s)
    if decode is None:
        return None
    exposed_s = moved_s + way.waiting_s(decode.requests_per_s.mid)
    prefilling = [_capped(point, sent) for point in first.points("prefill")]
    prefill = _pick(first, prefilling, demand, lambda point: (point.ttft_s.mid + exposed_s.mid) / demand.slo_ttft_s)
    if prefill is None:
        return None
    pools = (Pool(first, prefill, demand.peak_per_s), Pool(second, decode, demand.peak_per_s))
    return Option(demand, pools, fleet_of(pools, demand, terms), prefill.ttft_s + exposed_s, decode.tpot_s, way, exposed_s)


def _transfer(first: Side, second: Side, demand: Demand) -> Transfer:
    link = link_between(first.deployment.chip, second.deployment.chip, demand.link_gb_per_s)
    link = replace(link, gb_per_s=link.gb_per_s * demand.link_factor)
    model = first.deployment.model
    return transfer(model, second.cache_dtype, demand.workload.isl, first.deployment.tp, second.deployment.tp, link)


def _capped(point: Point, most: Range) -> Point:
    """The point with no more requests per second than a link lets through; what it waits for that is not busy."""
    if point.requests_per_s.high <= most.low:
        return point
    rate = Range(*(min(getattr(point.requests_per_s, end), getattr(most, end)) for end in ("low", "mid", "high")))
    return replace(point, requests_per_s=rate, limit="link" if most.mid < point.requests_per_s.mid else point.limit)


def _with_room(points: Sequence[Point], most: int, held_s: float) -> list[Point]:
    """The points that leave room for the caches on their way (each holds its own for `held_s`). Where none does, the smallest: it then
    takes fewer requests, so that those that decode and those on their way are `most`.
    """
    found = [point for point in points if point.concurrency + point.requests_per_s.mid * held_s <= most]
    if found or not points:
        return found
    least = min(points, key=lambda point: point.concurrency)
    share = min(1.0, most / (least.concurrency + least.requests_per_s.mid * held_s))
    return [replace(least, requests_per_s=least.requests_per_s * share, limit="memory")]


def _pick(side: Side, points: Iterable[Point], demand: Demand, late: Callable[[Point], float]) -> Point | None:
    """The point that serves the demand with the fewest replicas (the least energy, where that is the objective), and of those that need as
    many the one that is soonest done. When none is in time (`late` above 1), the soonest.
    """
    all_points = list(points)
    good = [point for point in all_points if late(point) <= 1]
    if not good:
        return min(all_points, key=late, default=None)

    def burden(point: Point) -> tuple[float, float, float]:
        needed = demand.peak_per_s / point.requests_per_s.mid
        number = needed if demand.count == "fractions" else math.ceil(needed - 1e-9)
        energy = point.busy_joules.mid + side.idle_w.mid * (number / demand.rate_per_s - point.busy_s)
        return (energy if demand.objective == "energy" else number, point.tpot_s.mid, point.ttft_s.mid)

    return min(good, key=burden)
