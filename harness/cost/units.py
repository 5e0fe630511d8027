"""Units: what a picture, a video, an hour of speech or an encoder's request costs, for models that are not billed by the token."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from klab.harness.catalog.prices import Price
from klab.harness.cost.answer import BOARD_TPS, Question, host_note
from klab.harness.cost.estimate import Estimator, Origin, label_of
from klab.harness.cost.ranges import Range
from klab.harness.cost.remedies import rounded_up
from klab.harness.cost.single_pass import PassPoint, Task, pass_points
from klab.harness.cost.steps import Steps
from klab.kernels.contract import Json
from klab.kernels.errors import UsageError

# A larger batch that gains less than this is not worth its wait.
ALIKE = 0.01


@dataclass(frozen=True)
class UnitMoney:
    """Of one unit ("image", "audio hour", ...). Joules of the GPU boards. `usd_per_unit` None without a price, `gross_margin` without a
    selling price too. `units_per_s_per_mw`: at work, per megawatt of what `megawatt` says ("provisioned" or "GPU boards").
    """

    usd_per_unit: Range | None
    joules_per_unit: Range
    units_per_s_per_mw: Range
    megawatt: str
    gross_margin: Range | None = None

    def to_json(self) -> dict[str, Json]:
        """Every figure by its name; ranges as three numbers."""
        return {name: value.to_json() if isinstance(value, Range) else value for name, value in vars(self).items()}


@dataclass(frozen=True)
class UnitOption:
    """One deployment: its batches, the one that the objective prefers of those that end in time, and the fastest. `why_not`: why none."""

    steps: Steps
    points: tuple[PassPoint, ...]
    best: PassPoint | None
    fastest: PassPoint | None
    why_not: str = ""


@dataclass(frozen=True)
class UnitAnswer:
    """`point` None: nothing fits. `feasible`: whether it ends in time. `options`: of all formats; the first is what is answered for."""

    question: Question
    task: Task
    options: tuple[UnitOption, ...]
    point: PassPoint | None
    feasible: bool
    money: UnitMoney | None
    contracts: tuple[tuple[Price, UnitMoney], ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def remedies(self) -> list[str]:
        """What would make it feasible."""
        return [] if self.point is None or self.feasible else [f"--slo {rounded_up(self.point.latency_s.mid)} would be met"]

    @property
    def label(self) -> Origin:
        """What its times and dollars may be called."""
        return self._label("time_shares")

    @property
    def energy_label(self) -> Origin:
        """What its joules may be called."""
        return self._label("energy_shares")

    def _label(self, shares: str) -> Origin:
        return label_of(getattr(self.point, shares), self.question.model.covered_share) if self.point else Origin.MODELLED

    def money_of(self, point: PassPoint) -> UnitMoney:
        """Of any of its points, at the question's price."""
        return unit_money(point, self.question.price, self.question.provisioned_kw, self.question.sell_unit)


def unit_money(point: PassPoint, price: Price | None, provisioned_kw: float | None = None, sell: float | None = None) -> UnitMoney:
    """What a unit costs: `price` per paid GPU-hour, used or not; `provisioned_kw` per GPU; `sell` dollars per unit. UsageError for a price
    that is none.
    """
    tp = point.deployment.tp
    if sell is not None and not 0 < sell < math.inf:
        raise UsageError(f"--sell is dollars per {point.unit}, a positive number, not {sell:g}")
    usd = None
    if price is not None:
        usd = Range(price.low, price.mid, price.high) * (tp / 3600 / point.task.utilisation) / point.units_per_s
    if provisioned_kw is not None:
        per_mw, of = point.units_per_s * (1e3 / (provisioned_kw * tp)), "provisioned"
    else:
        per_mw, of = (
            Range(*(1e6 / joules for joules in (point.joules_per_unit.high, point.joules_per_unit.mid, point.joules_per_unit.low))),
            "GPU boards",
        )
    margin = Range(*(1 - one / sell for one in (usd.high, usd.mid, usd.low))) if usd is not None and sell is not None else None
    return UnitMoney(usd, point.joules_per_unit, per_mw, of, margin)


def answer_units(question: Question, task: Task, estimator: Estimator, others: Sequence[Price] = ()) -> UnitAnswer:
    """Try sizes, formats and batches and choose; the sizes of a board where none is given. UsageError where nothing can be planned."""
    q = question
    options = [one for format in q.formats for one in _options(q, format, task, estimator)]
    own = [one for one in options if one.steps.deployment.quantization == q.formats[0]]
    best = _choose((one.best for one in own if one.best), q.objective)
    point = best or _choose((one.fastest for one in own if one.fastest), "latency")
    notes = [*estimator.notes, *(point.notes if point else ()), *host_note(q.host_us)]
    if point is None:
        return UnitAnswer(q, task, tuple(options), None, False, None, notes=tuple(notes))
    return UnitAnswer(
        q,
        task,
        tuple(options),
        point,
        best is not None,
        unit_money(point, q.price, q.provisioned_kw, q.sell_unit),
        tuple((price, unit_money(point, price, q.provisioned_kw, q.sell_unit)) for price in others),
        tuple(notes),
    )


def _options(q: Question, format: str, task: Task, estimator: Estimator) -> list[UnitOption]:
    found, refused = [], None
    for tp in q.tps or (BOARD_TPS if q.chip.link_gb_per_s else (1,)):
        try:
            steps = Steps(q.deployment(tp, format), estimator, q.host_us)
            points = tuple(pass_points(steps, task))
        except UsageError as error:
            if q.tps:
                raise
            refused = refused or error
            continue
        usable = q.chip.memory_bytes * q.memory_share
        why_not = (
            "" if points else f"{steps.weight_bytes / 1e9:.1f} GB of weights and one at work exceed the {usable / 1e9:.0f} GB of a GPU"
        )
        best = _choose((p for p in points if p.meets), q.objective)
        found.append(UnitOption(steps, points, best, _choose(points, "latency"), why_not))
    if refused is not None and not found:
        raise refused
    return found


def _choose(points: Iterable[PassPoint], objective: str) -> PassPoint | None:
    """The cheapest, the one of least energy, or the fastest; of points within ALIKE of it, the fastest on the fewest GPUs."""

    def value(p: PassPoint) -> float:
        if objective == "latency":
            return p.latency_s.mid
        return p.joules_per_unit.mid if objective == "energy" else p.deployment.tp / p.units_per_s.mid

    found = list(points)
    least = min(map(value, found), default=0.0)
    return min((p for p in found if value(p) <= least * (1 + ALIKE)), key=lambda p: (p.latency_s.mid, p.deployment.tp), default=None)
