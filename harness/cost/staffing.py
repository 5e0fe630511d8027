"""Staffing: how many replicas, GPUs and machines an arrangement takes for a demand, and what these cost and draw."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from klab.harness.cost.ranges import ZERO, Range
from klab.harness.cost.sides import Point, Side

if TYPE_CHECKING:
    from klab.harness.cost.place import Demand

# All-in provisioned power per GPU over its board's TDP, where nobody states it: H200 1.73 kW of 0.7, B200 2.17 of 1.0. A guess between.
PROVISIONED_OVER_TDP = 2.3


@dataclass(frozen=True)
class Terms:
    """What one GPU of a chip costs and draws: $/h (None: not known), provisioned kW (0: not known), and where both come from."""

    usd_per_gpu_hour: Range | None
    provisioned_kw: float
    price_label: str = ""
    power_label: str = ""


@dataclass(frozen=True)
class Pool:
    """Replicas of one side at one point that together take `rate_per_s` requests."""

    side: Side
    point: Point
    rate_per_s: float

    @property
    def needed(self) -> float:
        """Replicas, to a fraction."""
        return self.rate_per_s / self.point.requests_per_s.mid

    @property
    def replicas(self) -> int:
        """Whole ones."""
        return whole(self.needed)

    @property
    def role(self) -> str:
        """prefill, decode or both."""
        return self.point.role


@dataclass(frozen=True)
class Fleet:
    """What is paid for. `gpus`: by chip. Ranges hold the doubt of the kernels' times (more or fewer replicas) and of the prices. `board_w`:
    all boards on average, waiting included. `usd_per_hour` None where a price is not known. `busy_share`: of the GPU time that is paid for.
    """

    gpus: Mapping[str, Range]
    usd_per_hour: Range | None
    board_w: Range
    provisioned_kw: Range
    busy_share: float

    @property
    def all_gpus(self) -> float:
        """Of all chips, at mid."""
        return sum(one.mid for one in self.gpus.values())


def whole(number: float) -> int:
    """Up to the next whole one; what is off by rounding is not another one."""
    return math.ceil(number - 1e-9)


def fleet_of(pools: Sequence[Pool], demand: Demand, terms: Mapping[str, Terms]) -> Fleet:
    """The fleet of these pools as `demand.count` counts."""
    mid = _gpus(pools, demand, lambda one: one.mid)
    few, many = (_gpus(pools, demand, pick) for pick in (lambda one: one.high, lambda one: one.low))
    gpus = {chip: Range(few[chip], mid[chip], many[chip]) for chip in mid}
    known = [number * price for chip, number in gpus.items() if (price := terms[chip].usd_per_gpu_hour)]
    busy_gpu_s = sum(pool.side.deployment.tp * pool.point.busy_s for pool in pools)
    return Fleet(
        gpus,
        sum(known, ZERO) if len(known) == len(gpus) else None,
        _board_w(pools, demand, mid),
        sum((number * terms[chip].provisioned_kw for chip, number in gpus.items()), ZERO),
        min(1.0, demand.rate_per_s * busy_gpu_s / sum(mid.values())),
    )


def _gpus(pools: Sequence[Pool], demand: Demand, pick: Callable[[Range], float]) -> dict[str, float]:
    by_chip: dict[str, list[tuple[int, float]]] = {}
    for pool in pools:
        needed = pool.rate_per_s / pick(pool.point.requests_per_s)
        number = needed if demand.count == "fractions" else whole(needed)
        by_chip.setdefault(pool.side.deployment.chip.name, []).append((pool.side.deployment.tp, number))
    if demand.count != "machines":
        return {chip: sum(tp * number for tp, number in held) for chip, held in by_chip.items()}
    return {chip: demand.machine_gpus * machines(held, demand.machine_gpus) for chip, held in by_chip.items()}


def machines(held: Sequence[tuple[int, float]], size: int) -> int:
    """Machines of `size` GPUs that hold (tensor-parallel size, replicas) each: packed without gaps where every size divides the next and
    the machine; otherwise each pool has machines of its own. A replica larger than a machine takes whole ones.
    """
    sizes = sorted({tp for tp, _ in held} | {size})
    if sizes[-1] == size and all(large % small == 0 for small, large in itertools.pairwise(sizes)):
        return whole(sum(tp * number for tp, number in held) / size)
    return sum(whole(number / (size // tp)) if tp <= size else whole(number) * whole(tp / size) for tp, number in held)


def _board_w(pools: Sequence[Pool], demand: Demand, gpus: Mapping[str, float]) -> Range:
    """Work at the boards' power while there is some, idle power for the rest of all that is paid for."""
    total = ZERO
    left = dict(gpus)
    for pool in pools:
        busy_gpus = demand.rate_per_s * pool.point.busy_s * pool.side.deployment.tp
        total += pool.point.busy_joules * demand.rate_per_s
        left[pool.side.deployment.chip.name] -= busy_gpus
    for chip, idle in left.items():
        side = next(pool.side for pool in pools if pool.side.deployment.chip.name == chip)
        total += side.idle_w * (max(0.0, idle) / side.deployment.tp)
    return total
