"""Fleet size: how many chips, kW and dollars a demand takes month by month, and what a given power or number of chips can serve."""

from __future__ import annotations

import ctypes
import math
import os
import sys
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from klab.harness.cost.answer import HOST_US
from klab.harness.cost.demand import MOST_PER_SECOND, Need
from klab.harness.cost.estimate import Origin
from klab.harness.cost.fleet_month import Capacity, Limits, Month, RowPlan
from klab.harness.cost.fleet_options import TENSOR_PARALLEL, Option, Supply, Unserved, options_for
from klab.harness.cost.price import HOURS_PER_MONTH
from klab.harness.cost.ranges import ZERO, Range
from klab.kernels.errors import UsageError

# Seconds that the solver may take; and how far from the best its answer may be.
SOLVER_S, SOLVER_GAP = 20.0, 1e-6
# SciPy's word for it.
OUT_OF_TIME = 1
# Weight of GPUs beside that of whole machines: of two choices that take as many machines, the one that leaves more of them free.
TIE = 1e-4


class FleetSize:
    """A demand and the options for it. `needs` that nothing serves are left out of every figure (`unserved` says why)."""

    def __init__(
        self, needs: Sequence[Need], options: Sequence[Option], unserved: Sequence[Unserved] = (), limits: Limits | None = None
    ) -> None:
        self.needs, self.options, self.unserved = list(needs), list(options), list(unserved)
        self.limits = limits or Limits()
        self.served = sorted({option.need for option in options})
        self.gap = 0.0  # how far from the best an answer may be for which the solver had not time enough
        self.chips: dict[str, Supply] = {option.chip: option.supply for option in options}
        if self.limits.kw is not None or self.limits.objective == "kw":
            for chip, supply in self.chips.items():
                if supply.kw_per_gpu is None:
                    raise UsageError(f"nobody states the provisioned kW per GPU of {chip}: give --kw-per-gpu {chip}=KW")

    @property
    def notes(self) -> list[str]:
        """What a reader should know beside the figures."""
        found = [f"{chip}: {note}" for chip, supply in self.chips.items() for note in supply.estimator.notes]
        found += [f"{s.price_label}: taken as paid for all hours" for s in self.chips.values() if " on_demand " in s.price_label]
        if self.gap:
            found.append(f"the solver ran out of its {SOLVER_S:g} s: a fleet that is up to {self.gap:.2%} better may exist")
        for at in self.served:
            need, model = self.needs[at], next(o.point.deployment.model for o in self.options if o.need == at)
            if model.max_tokens and need.tokens_per_request > model.max_tokens:
                found.append(
                    f"{need.name}: isl + osl = {need.tokens_per_request} exceeds the {model.max_tokens} tokens {model.name} was made for"
                )
        return found

    def months(self, count: int) -> list[Month]:
        """Month 0 to `count`. Each need's option is chosen for the largest month and kept. UsageError for growth beyond all measure."""
        for at in self.served:
            need = self.needs[at]
            if need.peak(count) > MOST_PER_SECOND:
                raise UsageError(
                    f"{need.name}: growth of {need.growth_per_month:g} a month makes {need.peak(count):.3g} requests per second in month "
                    f"{count}, more than {MOST_PER_SECOND:g}: look fewer months ahead (--months) or let it grow less"
                )
        chosen = self.chosen(self._largest(count))
        return [self._month(month, chosen) for month in range(count + 1)]

    def chosen(self, month: int) -> dict[int, int]:
        """Need -> option: those that make the month's total of whole machines smallest."""
        if not self.options:
            return {}
        least = [self._replicas(option, month) for option in self.options]
        return self._assigned(least, {chip: self._weight(chip) for chip in self.chips})

    def _assigned(self, least: Sequence[int], weights: Mapping[str, float]) -> dict[int, int]:
        """Need -> option, where each option takes so many replicas and a GPU of a chip weighs so much."""
        n = len(self.options)
        # Variables: which option serves (one per need), then machines per chip.
        cost = [TIE * c * o.gpus * weights[o.chip] for c, o in zip(least, self.options, strict=True)] + [
            self.limits.machine * weights[chip] for chip in self.chips
        ]
        rows: list[list[float]] = []
        low: list[float] = []
        high: list[float] = []
        for need in self.served:
            rows.append([float(option.need == need) for option in self.options] + [0.0] * len(self.chips))
            low.append(1.0)
            high.append(1.0)
        for at, chip in enumerate(self.chips):
            used = [c * self.limits.share_of_machine(o.gpus) * (o.chip == chip) for c, o in zip(least, self.options, strict=True)]
            rows.append(used + [-float(k == at) for k in range(len(self.chips))])
            low.append(-np.inf)
            high.append(0.0)
        answer = self._solve(cost, rows, low, high, upper=[1.0] * n + [np.inf] * len(self.chips))
        if answer is None:  # one option per need always fits where machines are not limited: the solver ran out of time
            raise UsageError(f"no choice for {len(self.served)} rows found in {SOLVER_S:g} s: offer fewer chips or sizes (--chips, --tp)")
        return {option.need: at for at, option in enumerate(self.options) if answer[at] > 0.5}

    def best_of(self, need: int, chip: str, month: int) -> tuple[int, int] | None:
        """(option, replicas) with the fewest GPUs for one need on one chip; None where it is not served there."""
        found = [(at, self._replicas(o, month)) for at, o in enumerate(self.options) if (o.need, o.chip) == (need, chip)]
        return min(found, key=lambda one: one[1] * self.limits.share_of_machine(self.options[one[0]].gpus), default=None)

    def capacity(self, month: int = 0) -> Capacity | None:
        """The largest multiple of a month's demand that the limits allow; several options may share a need. None: not even the least
        number of replicas of each need fits. UsageError without a limit.
        """
        if self.limits.kw is None and self.limits.gpus is None:
            raise UsageError("a capacity needs a limit: --kw or --gpus")
        middle = self._scale(month, "mid", self.served)
        if middle is None:
            return None
        ends = [found[0] if (found := self._scale(month, end, self.served)) else 0.0 for end in ("low", "high")]
        scale, replicas = middle
        alone = {need: found[0] for need in self.served if (found := self._scale(month, "mid", [need]))}
        gpus = self._gpus(replicas)
        usd = sum((self.chips[chip].usd_per_gpu_hour * (count * HOURS_PER_MONTH) for chip, count in gpus.items()), ZERO)
        tokens = scale * sum(self.needs[need].tokens_per_month(month) for need in self.served)
        span = Range(min(scale, ends[0]), scale, max(scale, ends[1]))
        return Capacity(span, replicas, gpus, self._kw(gpus), usd, tokens, alone)

    def least(self) -> tuple[dict[str, int], float | None]:
        """(GPUs by chip, kW) of the smallest fleet that has the least number of replicas of each need: in kW where these are limited,
        else in GPUs.
        """
        by_kw = self.limits.kw is not None
        weights = {chip: (supply.kw_per_gpu or 0.0) if by_kw else 1.0 for chip, supply in self.chips.items()}
        chosen = self._assigned([self.limits.least_replicas] * len(self.options), weights)
        gpus = self._gpus(dict.fromkeys(chosen.values(), self.limits.least_replicas))
        return gpus, self._kw(gpus)

    def lasts(self, count: int) -> int | None:
        """The first month up to `count` whose demand no longer fits into the limits; None: all fit."""

        def full(month: int) -> bool:
            found = self._scale(month, "mid", self.served)
            return found is None or found[0] < 1 - 1e-6

        months = range(count + 1)
        if any(self.needs[at].growth_per_month < 0 for at in self.served):
            return next((month for month in months if full(month)), None)
        first = bisect_left(months, True, key=full)
        return first if first <= count else None

    def label(self, fleet: Month | Capacity, *, energy: bool = False) -> Origin:
        """What a fleet's figures (or its board power but for idle boards, a guess) may be called: as the weakest of its options."""
        order, points = list(Origin), [self.options[at].point for at in fleet.replicas]
        return max((point.energy_label if energy else point.label for point in points), key=order.index)

    def _scale(self, month: int, end: str, needs: Sequence[int]) -> tuple[float, dict[int, int]] | None:
        """The largest scale (throughputs at this end) and the replicas by option."""
        options = [(at, option) for at, option in enumerate(self.options) if option.need in needs]
        n, chips, limits = len(options), list(self.chips), self.limits
        if not n:
            return None
        rows: list[list[float]] = []
        low: list[float] = []
        high: list[float] = []
        for need in needs:  # capacity - scale * peak >= 0, and the least number of replicas
            rate = [_at(o, end) * (1 - limits.headroom) * (o.need == need) for _, o in options]
            peak = self.needs[need].peak(month)
            rows += [
                [r / peak for r in rate] + [0.0] * len(chips) + [-1.0],
                [float(o.need == need) for _, o in options] + [0.0] * (len(chips) + 1),
            ]
            low += [0.0, float(limits.least_replicas)]
            high += [np.inf, np.inf]
        for at, chip in enumerate(chips):
            used = [limits.share_of_machine(o.gpus) * (o.chip == chip) for _, o in options]
            rows.append([*used, *(-float(k == at) for k in range(len(chips))), 0.0])
            low.append(-np.inf)
            high.append(0.0)
        if limits.kw is not None:
            rows.append([0.0] * n + [limits.machine * (self.chips[chip].kw_per_gpu or 0.0) for chip in chips] + [0.0])
            low.append(-np.inf)
            high.append(limits.kw)
        most = [np.inf if limits.gpus is None else float(limits.gpus.get(chip, 0) // limits.machine) for chip in chips]
        upper = [np.inf] * n + most + [np.inf]
        whole = [1] * (n + len(chips)) + [0]
        best = self._solve([0.0] * (n + len(chips)) + [-1.0], rows, low, high, upper, whole=whole)
        if best is None:
            return None
        # Once more, for the fewest GPUs that do it: what is not needed for the scale would be filled anyhow.
        least = [0.0] * (n + len(chips)) + [best[-1] * (1 - SOLVER_GAP)]
        cost = [o.gpus * (self._weight(o.chip) or 1.0) for _, o in options] + [0.0] * (len(chips) + 1)
        answer = self._solve(cost, rows, low, high, upper, whole=whole, lower=least) or best
        replicas = {at: round(answer[k]) for k, (at, _) in enumerate(options) if answer[k] > 0.5}
        served = [
            sum(c * _at(self.options[at], end) for at, c in replicas.items() if self.options[at].need == need)
            * (1 - limits.headroom)
            / self.needs[need].peak(month)
            for need in needs
        ]
        return min(served), replicas

    def _largest(self, count: int) -> int:
        """The month with the most work, weighed by what each need takes at least."""

        def work(month: int) -> float:
            return sum(
                min(self._replicas(o, month) * o.gpus * self._weight(o.chip) for o in self.options if o.need == n) for n in self.served
            )

        return max(range(count + 1), key=work)

    def _month(self, month: int, chosen: Mapping[int, int]) -> Month:
        sizes = {
            end: self._gpus({at: self._replicas(self.options[at], month, end) for at in chosen.values()}) for end in ("low", "mid", "high")
        }
        gpus, usd = sizes["mid"], ZERO
        for chip in gpus:
            usd += (
                self._range(*(sizes[end].get(chip, 0) for end in ("high", "mid", "low")))
                * self.chips[chip].usd_per_gpu_hour
                * HOURS_PER_MONTH
            )
        span = self._range(*(sum(sizes[end].values()) for end in ("high", "mid", "low")))
        return Month(month, tuple(self._row(month, at) for at in chosen.values()), gpus, span, usd, self._kw(gpus))

    def _row(self, month: int, at: int) -> RowPlan:
        option = self.options[at]
        need, per_gpu = self.needs[option.need], option.supply.kw_per_gpu
        many, count, few = (self._replicas(option, month, end) for end in ("low", "mid", "high"))
        busy = need.average(month) / option.requests_per_s.mid  # replicas at work on average
        return RowPlan(
            option=at,
            offline=need.workload.offline,
            replicas=count,
            gpus=count * option.gpus,
            usd=self._range(few, count, many) * option.supply.usd_per_gpu_hour * (option.gpus * HOURS_PER_MONTH),
            kw=None if per_gpu is None else per_gpu * count * option.gpus,
            board_kw=option.point.joules_per_request * (need.average(month) * 1e-3) + option.idle_w * (max(0.0, count - busy) * 1e-3),
            busy_gpus=busy * option.gpus,
            tokens=need.tokens_per_month(month),
            revenue_usd=need.usd_per_month(month),
        )

    @staticmethod
    def _range(few: float, count: float, many: float) -> Range:
        return Range(min(few, count), count, max(many, count))

    def _replicas(self, option: Option, month: int, end: str = "mid") -> int:
        rate = _at(option, end) * (1 - self.limits.headroom)
        return max(self.limits.least_replicas, math.ceil(self.needs[option.need].peak(month) / rate - 1e-9))

    def _gpus(self, replicas: Mapping[int, int]) -> dict[str, int]:
        """Whole machines of each chip."""
        machines: dict[str, float] = {}
        for at, count in replicas.items():
            option = self.options[at]
            machines[option.chip] = machines.get(option.chip, 0.0) + count * self.limits.share_of_machine(option.gpus)
        return {chip: self.limits.machine * math.ceil(value * (1 - 1e-12)) for chip, value in machines.items()}

    def _kw(self, gpus: Mapping[str, int]) -> float | None:
        known = [(count, self.chips[chip].kw_per_gpu) for chip, count in gpus.items()]
        return None if any(kw is None for _, kw in known) else sum(count * (kw or 0.0) for count, kw in known)

    def _solve(self, *task: Sequence[Any], **options: Sequence[Any] | None) -> list[float] | None:
        answer, gap = _solve(*task, **options)  # type: ignore[arg-type]
        self.gap = max(self.gap, gap)
        return answer

    def _weight(self, chip: str) -> float:
        supply = self.chips[chip]
        return (supply.kw_per_gpu or 0.0) if self.limits.objective == "kw" else supply.usd_per_gpu_hour.mid


def fleet_for(
    needs: Sequence[Need],
    supplies: Sequence[Supply],
    limits: Limits | None = None,
    sizes: Sequence[int] = TENSOR_PARALLEL,
    host_us: Range = HOST_US,
) -> FleetSize:
    """The fleet of a demand on chips that can be had. UsageError for an unknown model or format."""
    options: list[Option] = []
    unserved: list[Unserved] = []
    for at, need in enumerate(needs):
        found = options_for(at, need, supplies, sizes, host_us)
        if isinstance(found, Unserved):
            unserved.append(found)
        else:
            options += found
    return FleetSize(needs, options, unserved, limits)


def _at(option: Option, end: str) -> float:
    """A replica's requests per second at the low, mid or high of its range."""
    return float(getattr(option.requests_per_s, end))


def _solve(
    cost: Sequence[float],
    rows: Sequence[Sequence[float]],
    low: Sequence[float],
    high: Sequence[float],
    upper: Sequence[float],
    whole: Sequence[int] | None = None,
    lower: Sequence[float] | None = None,
) -> tuple[list[float] | None, float]:
    """(the best whole numbers by SciPy's HiGHS, or None where there are none; by what share a better answer may exist: 0 unless time ran
    out).
    """
    from scipy.optimize import Bounds, LinearConstraint, milp

    with _silent():
        found = milp(
            np.asarray(cost),
            constraints=LinearConstraint(np.asarray(rows), np.asarray(low), np.asarray(high)),
            bounds=Bounds(np.asarray(lower or [0.0] * len(upper)), np.asarray(upper)),
            integrality=np.asarray(whole or [1] * len(upper)),
            options={"time_limit": SOLVER_S, "mip_rel_gap": SOLVER_GAP},
        )
    if found.x is None:
        return None, 0.0
    return [float(value) for value in found.x], float(found.mip_gap) if found.status == OUT_OF_TIME else 0.0


@contextmanager
def _silent() -> Iterator[None]:
    """HiGHS prints lines of its own to the process's stdout, whatever its options say; what klab prints there must stay JSON."""
    library = ctypes.CDLL(None)
    if sys.stdout:
        sys.stdout.flush()
    library.fflush(None)
    try:
        kept = os.dup(1)
    except OSError:  # there is no stdout
        yield
        return
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.close(nowhere)
    try:
        yield
    finally:
        library.fflush(None)
        os.dup2(kept, 1)
        os.close(kept)
