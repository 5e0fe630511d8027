"""Flips: what would have to change for another placement to win, and how sure it is that this one does."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache

from klab.harness.cost.place import Option, Ranking, ranked
from klab.harness.cost.sides import Builder, Side
from klab.harness.cost.staffing import Terms
from klab.kernels.errors import UsageError

# How far each condition is moved, as factors.
PRICES = (0.1, 10.0)
LINKS = tuple(2.0**power for power in range(-6, 6))
RATES = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 2.0, 4.0, 8.0, 16.0)
LATENCIES = (0.5, 0.7, 0.85, 1.2, 1.5, 2.0, 4.0)
LENGTHS = (0.25, 0.5, 2.0, 4.0)
# Arrangements (by shape) that are worked out again at other lengths, and corners of the ranges that are looked at.
CONTENDERS, CORNER_CHIPS = 4, 4


@dataclass(frozen=True)
class Flip:
    """From `at` on (`up`) or below it another placement wins: `winner` (None: none meets the SLOs there). `behind`: by what share the
    present shape is then worse, and `behind_unrounded` the same to a fraction of a replica: at 0 or below it is the rounding that flips.
    None where it misses the SLOs. `kept`: where only some values were tried, the last on the way to `at` at which the present one wins.
    """

    at: float
    up: bool
    winner: Option | None
    behind: float | None = None
    behind_unrounded: float | None = None
    kept: float | None = None


@dataclass(frozen=True)
class Sensitivity:
    """One condition that was moved from `now` between `low` and `high`, and the nearest flips on either side (none: the same wins)."""

    what: str
    unit: str
    now: float
    low: float
    high: float
    flips: tuple[Flip, ...] = ()


def by_price(ranking: Ranking, terms: Mapping[str, Terms]) -> list[Sensitivity]:
    """The factor on each chip's price at which another arrangement gets cheaper: costs are linear in it, so these are exact."""
    winner = ranking.winner
    if winner is None or ranking.demand.objective != "cost":
        return []
    found = []
    chips = dict.fromkeys(chip for option in ranking.options for chip in option.chips)
    for chip in chips:
        price = terms[chip].usd_per_gpu_hour
        if price is None:
            continue
        own, rest = _parts(winner, chip, price.mid)
        # (factor, $/h for this chip there, arrangement): of those that tie with it at one factor, the one that gains most beyond.
        down: list[tuple[float, float, Option]] = []
        up: list[tuple[float, float, Option]] = []
        for other in ranking.options:
            if other.shape == winner.shape or other.value == math.inf:
                continue
            theirs, others_rest = _parts(other, chip, price.mid)
            if own == theirs:
                continue
            factor = (others_rest - rest) / (own - theirs)
            if own > theirs:
                up.append((max(1.0, factor), theirs, other))
            elif factor > 0:
                down.append((-min(1.0, factor), -theirs, other))
        low, high = PRICES
        first = [min(side, key=lambda one: (round(one[0], 9), one[1])) for side in (down, up) if side]
        flips = [Flip(abs(f) * price.mid, f > 0, other) for f, _, other in first if low <= abs(f) <= high]
        found.append(Sensitivity(f"price of {chip}", "$/GPU-h", price.mid, low * price.mid, high * price.mid, tuple(flips)))
    return found


def _parts(option: Option, chip: str, usd: float) -> tuple[float, float]:
    """($/h for this chip, for all others)."""
    own = option.fleet.gpus[chip].mid * usd if chip in option.fleet.gpus else 0.0
    return own, option.value - own


def by_link(sides: Sequence[Side], ranking: Ranking, terms: Mapping[str, Terms]) -> Sensitivity | None:
    """The network's speed per GPU at which another arrangement wins; None when the chips state none, or nothing can be apart."""
    apart = [option for option in ranking.options if option.transfer]
    base = ranking.winner
    if not apart or base is None:
        return None
    now = (base if base.transfer else apart[0]).transfer
    assert now is not None
    demand = ranking.demand
    speed = now.link.gb_per_s / demand.link_factor

    def ask(factor: float, count: str) -> Ranking:
        return ranked(sides, replace(demand, link_factor=factor, count=count), terms)

    return _sweep("network of each GPU, one way", "GB/s", speed, base, ask, LINKS, exact=True)


def by_rate(sides: Sequence[Side], ranking: Ranking, terms: Mapping[str, Terms]) -> Sensitivity | None:
    """At which rates whole machines make another arrangement win."""
    demand, base = ranking.demand, ranking.winner
    if base is None:
        return None

    def ask(factor: float, count: str) -> Ranking:
        return ranked(sides, replace(demand, rate_per_s=demand.rate_per_s * factor, count=count), terms)

    return _sweep("rate", "requests/s", demand.rate_per_s, base, ask, RATES)


def by_latency(sides: Sequence[Side], ranking: Ranking, terms: Mapping[str, Terms]) -> list[Sensitivity]:
    """At which other SLOs another arrangement wins."""
    demand, base, found = ranking.demand, ranking.winner, []
    w = demand.workload
    for what, slo, first in (("TTFT allowed", w.slo_ttft_s, True), ("TPOT allowed", w.slo_tpot_s, False)):
        if base is None or slo is None or w.offline:
            continue

        def ask(factor: float, count: str, slo: float = slo, first: bool = first) -> Ranking:
            workload = replace(w, slo_ttft_s=slo * factor) if first else replace(w, slo_tpot_s=slo * factor)
            return ranked(sides, replace(demand, workload=workload, count=count), terms)

        found.append(_sweep(what, "ms", 1e3 * slo, base, ask, LATENCIES))
    return found


def by_length(builder: Builder, sides: Sequence[Side], ranking: Ranking, terms: Mapping[str, Terms]) -> Sensitivity | None:
    """At which prompt lengths another of the contenders wins (the best of each shape, with their chips and tensor-parallel sizes; prompts
    are also tried on all others of `sides` of the chips that prefill in them: longer ones take more GPUs).
    """
    demand, base = ranking.demand, ranking.winner
    if base is None:
        return None
    shapes: dict[tuple[tuple[str, str], ...], Option] = {}
    for option in ranking.options:
        shapes.setdefault(option.shape, option)
    # The leaders, and the best that does both: it is what most people run.
    together = ranking.best_of("together")
    contenders = [*list(shapes.values())[:CONTENDERS], *([together] if together else [])]
    roles: dict[Side, set[str]] = {}
    for pool in (pool for option in contenders for pool in option.pools):
        roles.setdefault(pool.side, set()).add(pool.role)
    prefilling = {side.deployment.chip.name for side, wanted in roles.items() if "prefill" in wanted}
    for side in sides:
        if side.deployment.chip.name in prefilling:
            roles.setdefault(side, set()).add("prefill")
    model = base.pools[0].side.deployment.model
    longest = (model.max_tokens or math.inf) - demand.workload.osl
    factors = [factor for factor in LENGTHS if 16 <= factor * demand.workload.isl <= longest]

    @cache
    def sides_at(factor: float) -> list[Side]:
        workload = replace(demand.workload, isl=round(demand.workload.isl * factor))
        made = []
        for side, wanted in roles.items():
            with suppress(UsageError):  # longer prompts may not fit
                made.append(builder.side(side.deployment, workload, wanted, rough=True))
        return made

    def ask(factor: float, count: str) -> Ranking:
        workload = replace(demand.workload, isl=round(demand.workload.isl * factor))
        return ranked(sides_at(factor), replace(demand, workload=workload, count=count), terms)

    return _sweep("prompt length", "tokens", demand.workload.isl, base, ask, factors) if factors else None


def _sweep(
    what: str, unit: str, now: float, base: Option, ask: Callable[[float, str], Ranking], factors: Iterable[float], *, exact: bool = False
) -> Sensitivity:
    """The nearest factor below 1 and above 1 at which another shape wins; with `exact`, narrowed down to 2%."""
    count = base.demand.count
    tried = sorted({1.0, *factors})
    flips = []
    for side in ([f for f in reversed(tried) if f < 1], [f for f in tried if f > 1]):
        last = 1.0
        for factor in side:
            found = ask(factor, count)
            if _flipped(found, base):
                while exact and max(last, factor) / min(last, factor) > 1.02:
                    middle = math.sqrt(last * factor)
                    between = ask(middle, count)
                    last, factor, found = (last, middle, between) if _flipped(between, base) else (middle, factor, found)
                unrounded = _behind(ask(factor, "fractions"), base, found.winner)
                behind, kept = _behind(found, base, found.winner), None if exact else now * last
                flips.append(Flip(now * factor, factor > 1, found.winner, behind, unrounded, kept))
                break
            last = factor
    return Sensitivity(what, unit, now, now * tried[0], now * tried[-1], tuple(flips))


def _flipped(found: Ranking, base: Option) -> bool:
    """Whether another shape is strictly better, or nothing meets the SLOs."""
    if found.winner is None:
        return True
    same = next((option for option in found.options if option.shape == base.shape), None)
    return same is None or found.winner.value < same.value * (1 - 1e-9)


def _behind(found: Ranking, base: Option, winner: Option | None) -> float | None:
    """By what share the shape of `base` is worse than that of `winner`."""
    shapes = {option.shape: option for option in reversed(found.options)}
    same, best = shapes.get(base.shape), shapes.get(winner.shape) if winner else None
    return same.value / best.value - 1 if same and best and best.value else None


@dataclass(frozen=True)
class Certainty:
    """Of so many corners, the share in which the winner's shape still costs least, and who wins most of the others.

    A corner: the price of every chip and the times of all that runs on it, each at its low or its high end.
    """

    corners: int
    share: float
    rival: Option | None = None


def certainty(ranking: Ranking, terms: Mapping[str, Terms], *, prices: bool) -> Certainty | None:
    """Over the ends of times and, with `prices`, of prices. None unless cost is the objective. Of more than CORNER_CHIPS chips the leading
    arrangements' alone; SLOs stay judged by middle values.
    """
    winner = ranking.winner
    if winner is None or ranking.demand.objective != "cost":
        return None
    chips = list(dict.fromkeys(chip for option in ranking.options for chip in option.chips))[:CORNER_CHIPS]
    among = [option for option in ranking.options if set(option.chips) <= set(chips)]
    ends: dict[str, list[tuple[float, bool]]] = {}
    for chip in chips:
        price = terms[chip].usd_per_gpu_hour
        assert price is not None
        ends[chip] = [(usd, slow) for usd in ({price.low, price.high} if prices else {price.mid}) for slow in (False, True)]
    kept, whole = 0, 0
    others: dict[tuple[tuple[str, str], ...], tuple[int, Option]] = {}
    for corner in itertools.product(*ends.values()):
        at = dict(zip(ends, corner, strict=True))

        def cost(option: Option, at: Mapping[str, tuple[float, bool]] = at) -> float:
            return sum(at[chip][0] * (gpus.high if at[chip][1] else gpus.low) for chip, gpus in option.fleet.gpus.items())

        best = min(among, key=cost)
        whole += 1
        if best.shape == winner.shape or min(cost(o) for o in among if o.shape == winner.shape) <= cost(best):
            kept += 1
        else:
            count, first = others.get(best.shape, (0, best))
            others[best.shape] = (count + 1, first)
    rival = max(others.values(), key=lambda one: one[0], default=None)
    return Certainty(whole, kept / whole, rival[1] if rival else None)
