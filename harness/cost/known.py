"""Known facts: measured launches, and what they say of the sizes between them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import TYPE_CHECKING

from klab.harness.cost.estimate import Estimate, Origin
from klab.harness.cost.family import Family, Form, family_of
from klab.harness.cost.interpolate import Between, Sizes, between, logs_of, spread
from klab.harness.cost.modelled import OTHER, Modelled
from klab.harness.cost.ranges import Range
from klab.harness.plan.communication import Collective
from klab.kernels.contract import Chip, Json, Problem

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Numbers = NDArray[np.float64]
    Rows = NDArray[np.intp]

# Further than this many powers of two beyond the known sizes, or from the nearest of them, nothing is said.
REACH, FURTHEST = 2.0, 4.0
# Doubt per power of two beyond what is known: a guess, twice what the share changes by per power of two where launches are large.
OUTSIDE_DOUBT = 0.1
# What a relative that differs in a minor matter (pages, sinks, a cap, verified tokens) may be off by: a guess.
KIN_DOUBT = 0.1
# The least doubt of an interpolated figure: the same row measured again differs by as much (median of NVIDIA's re-collections).
LEAST_DOUBT = 0.03
# Neighbours that predict each other no better than within a factor of two say nothing.
MOST_DOUBT = math.log(2)
# Kernels with tiles have edges: with less, intervals of left-out matmuls hold 70% of them instead of 90% (23,885 published rows of H200
# with their own doubt taken off).
EDGE_DOUBT = {"matmul": 0.10, "scaled_matmul": 0.10, "weight_only_matmul": 0.10}
# So many measured launches of an operator tell how it fares here where none is near.
LEAST_TO_SCALE = 5
# One known power says nothing of another size's.
LEAST_POWERS = 2
# Neither does one known time of a size further away than this many powers of two, nor do several of a size that many beyond all of them:
# such an answer is a model of its own.
ALONE_REACH, BEYOND_REACH = 0.3, 1.0


@dataclass(frozen=True)
class Known:
    """One measured fact: microseconds and joules (of the GPU's board) of a launch, by which kernel. `how` says who measured it."""

    problem: Problem
    us: Range
    origin: Origin
    joules: Range | None = None
    kernel: str = ""
    config: Mapping[str, Json] = field(default_factory=dict)
    how: str = ""


class Interpolated:
    """A Source: measured facts of one chip and the sizes between them, by interpolating the share of the roofline that is reached.

    A problem that is known is answered as it was measured. Of several facts of one problem the fastest counts.
    """

    def __init__(self, known: Iterable[Known], chip: Chip) -> None:
        self._modelled = Modelled(chip)
        self._operators: dict[str, _Operator] = {}
        for fact in known:
            name = fact.problem.operator
            if name not in self._operators:
                self._operators[name] = _Operator(family_of(type(fact.problem)), self._modelled)
            self._operators[name].facts.append(fact)

    def launch(self, problem: Problem) -> Estimate | None:
        """None for a problem that nothing is known near of; `why_not` says why."""
        operator = self._operators.get(problem.operator)
        return operator.launch(problem) if operator else None

    def collective(self, one: Collective) -> Estimate | None:
        """None: launches are on one GPU."""
        return None

    def usual(self, operator: str) -> Range | None:
        """How many times the model's time launches of an operator took that klab measured on this chip: a tenth of them less, half, nine
        tenths. None where it measured too few.
        """
        found = self._operators.get(operator)
        return found.usual() if found else None

    def why_not(self, problem: Problem) -> str:
        """Why `launch` gave None for a problem, in a few words."""
        operator = self._operators.get(problem.operator)
        return operator.why_not(problem) if operator else f"no {problem.operator} is known"


class _Operator:
    """The facts of one operator, told apart by form when one is first asked for."""

    def __init__(self, family: Family, modelled: Modelled) -> None:
        self.facts: list[Known] = []
        self._family, self._modelled = family, modelled
        self._forms: dict[Form, list[Known]] = {}
        self._exact: dict[Form, Members | None] = {}
        self._kin: dict[Form, Members | None] = {}

    def launch(self, problem: Problem) -> Estimate | None:
        members = self._members(self._family.form_of(problem))
        found = members.launch(problem) if members else None
        if found is None:
            members = self._relatives(self._family.kin_of(problem))
            found = members.launch(problem) if members else None
        return found

    def usual(self) -> Range | None:
        import numpy as np

        own = [fact for fact in self.facts if fact.origin is Origin.MEASURED]
        if len(own) < LEAST_TO_SCALE:
            return None
        ratios = [fact.us.mid / self._modelled.us(fact.problem)[0].mid for fact in own]
        return Range(*(float(q) for q in np.quantile(ratios, (0.1, 0.5, 0.9))))

    def why_not(self, problem: Problem) -> str:
        members = self._relatives(self._family.kin_of(problem))
        return members.why_not(problem) if members else f"no {problem.operator} of this form is known"

    def _members(self, form: Form) -> Members | None:
        if not self._forms:
            for fact in self.facts:
                self._forms.setdefault(self._family.form_of(fact.problem), []).append(fact)
        if form not in self._exact:
            facts = self._forms.get(form)
            self._exact[form] = members_of(facts, self._family, self._modelled) if facts else None
        return self._exact[form]

    def _relatives(self, kin: Form) -> Members | None:
        if kin not in self._kin:
            groups = [facts for facts in self._forms.values() if self._family.kin_of(facts[0].problem) == kin]
            self._kin[kin] = members_of(list(chain(*groups)), self._family, self._modelled) if groups else None
        return self._kin[kin]


def members_of(facts: Sequence[Known], family: Family, modelled: Modelled) -> Members:
    """The members of a family; of several facts of one size, the one nearest the limits (of one problem: the fastest)."""
    import numpy as np

    def share(fact: Known) -> float:
        return limit_us(fact.problem, modelled) / fact.us.mid

    best: dict[tuple[float, ...], Known] = {}
    for fact in facts:
        other = best.setdefault(family.size_of(fact.problem), fact)
        if other is not fact and (fact.us.mid < other.us.mid if fact.problem == other.problem else share(fact) > share(other)):
            best[family.size_of(fact.problem)] = fact
    kept = list(best.values())
    return Members(np.array(list(best), dtype=float), kept.__getitem__, family, modelled)


@dataclass(frozen=True)
class _Around:
    """Facts near a size, the nearest first, and the logarithm of the share that they tell of it; `most` is the largest of theirs."""

    facts: Sequence[Known]
    points: Numbers
    between: Between
    most: float


class Members:
    """Facts of one family: problems that differ in size alone (and, for relatives, in minor matters).

    `sizes` [facts, axes], axes as in `family.sizes`. `fact` gives one of them by its row, or None for a row that is not to be used: only
    those near to what is asked are made, so that a table of 1e5 rows costs no more than its sizes.
    """

    def __init__(self, sizes: Numbers, fact: Callable[[int], Known | None], family: Family, modelled: Modelled) -> None:
        self._sizes, self._fact, self._family, self._modelled = Sizes(sizes), fact, family, modelled
        self._made: dict[int, Known | None] = {}
        self._shares: dict[int, float] = {}

    def launch(self, problem: Problem) -> Estimate | None:
        """What is known at this problem, or between its neighbours; None where those are too far, or do not tell each other."""
        import numpy as np

        logs = logs_of(np.array(self._family.size_of(problem), dtype=float))
        outside, inside = self._sizes.outside(logs), self._sizes.inward(logs)
        rows, distances = self._sizes.nearest(inside)
        for row in rows[distances == 0]:
            fact = self._of(int(row))
            if fact is not None and fact.problem == problem:
                return _as_measured(fact)
        near = self._around(inside, rows, distances) if outside <= REACH and distances[0] <= FURTHEST else None
        if near is None:
            return None
        series = self._sizes.series(inside) if near.between.error > LEAST_DOUBT else None
        others = self._around(inside, *self._sizes.nearest(inside, series)) if series is not None else None
        near = min((one for one in (others, near) if one), key=lambda one: one.between.error)
        facts, found = near.facts, near.between
        own = float(np.median([fact.us.doubt for fact in facts]))
        form = self._family.form_of(problem)
        kin = next((fact.problem for fact in facts if self._family.form_of(fact.problem) != form), None)
        least = EDGE_DOUBT.get(problem.operator, LEAST_DOUBT)
        error = max(math.hypot(found.error, own), least) + OUTSIDE_DOUBT * outside + (KIN_DOUBT if kin else 0.0)
        if error > MOST_DOUBT:
            return None
        # No launch beats the roofline, but for those whose neighbours do.
        most = max(found.value, near.most, 0.0)
        logs_of_share = (min(found.value + error, most), found.value, found.value - error)
        us = limit_us(problem, self._modelled) * Range(*(math.exp(-log) for log in logs_of_share))
        joules, origin = _joules(near.points, facts, inside, us), _weakest(facts) if outside <= BEYOND_REACH else Origin.MODELLED
        how = f"{facts[0].how or origin} at {len(facts)} sizes near this one, which tell it within {math.expm1(error):.0%}"
        if len(facts) == 1:
            away = float(np.linalg.norm(near.points[0] - logs))
            origin = origin if away <= ALONE_REACH else Origin.MODELLED
            how = f"as near the roofline as the one size that is known ({facts[0].how or facts[0].origin}), {2**away:.2g} times off"
        how += f"; the nearest is {2**outside:.1f} times off" if outside and len(facts) > 1 else ""
        how += f"; {self._differs(problem, kin)}" if kin else ""
        energy = _weakest([fact for fact in facts if fact.joules]) if joules else Origin.MODELLED
        return Estimate(us, origin, how, joules, energy, facts[0].kernel, facts[0].config)

    def why_not(self, problem: Problem) -> str:
        """Why these say nothing of a problem."""
        import numpy as np

        logs = logs_of(np.array(self._family.size_of(problem), dtype=float))
        away = max(self._sizes.outside(logs), float(self._sizes.nearest(logs)[1][0]))
        if away > REACH:
            return f"the nearest {problem.operator} that is known is {2**away:.0f} times smaller or larger"
        return f"the {len(self._sizes.logs)} that are known of {problem.operator} do not tell each other within a factor of 2"

    def _differs(self, problem: Problem, other: Problem) -> str:
        names = [name for name in self._family.minor if getattr(problem, name) != getattr(other, name)]
        return "measured with " + ", ".join(f"{name} {getattr(other, name)}" for name in names) if names else "in its wider family"

    def _around(self, logs: Numbers, rows: Rows, distances: Numbers) -> _Around | None:
        """What the usable ones of the facts in these rows say of a size that they are near to."""
        import numpy as np

        points = self._sizes.logs[rows]
        chosen = spread(points, distances, lambda at: self._of(int(rows[at])) is not None)
        if not chosen:
            return None
        facts = [fact for row in rows[chosen] if (fact := self._of(int(row)))]
        shares = np.array([self._share(int(row), fact) for row, fact in zip(rows[chosen], facts, strict=True)])
        found = between(points[chosen], shares, logs)
        return _Around(facts, points[chosen], found, float(shares.max()))

    def _of(self, row: int) -> Known | None:
        if row not in self._made:
            self._made[row] = self._fact(row)
        return self._made[row]

    def _share(self, row: int, fact: Known) -> float:
        """Logarithm of the share of what the limits allow that a fact reaches."""
        if row not in self._shares:
            self._shares[row] = math.log(limit_us(fact.problem, self._modelled) / fact.us.mid)
        return self._shares[row]


def limit_us(problem: Problem, modelled: Modelled) -> float:
    """The roofline behind a launch's fixed start. Without the start, the share of small launches changes with their size, and held-out
    attention rows are further off (90th percentile 0.22 against 0.17 where a batch is missing).
    """
    return OTHER.start_us[1] + modelled.bound(problem)[0]


def _as_measured(fact: Known) -> Estimate:
    energy = fact.origin if fact.joules else Origin.MODELLED
    return Estimate(fact.us, fact.origin, f"{fact.how or fact.origin} at this shape", fact.joules, energy, fact.kernel, fact.config)


def _weakest(facts: Iterable[Known]) -> Origin:
    return Origin.MEASURED if all(fact.origin is Origin.MEASURED for fact in facts) else Origin.REFERENCE


def _joules(points: Numbers, facts: Sequence[Known], at: Numbers, us: Range) -> Range | None:
    """The time by the power, interpolated between the neighbours that know theirs; None where too few do."""
    import numpy as np

    known = [index for index, fact in enumerate(facts) if fact.joules]
    if len(known) < LEAST_POWERS:
        return None
    drawn = [(fact.joules, fact.us) for fact in facts if fact.joules]
    watts = np.array([joules.mid / time.mid * 1e6 for joules, time in drawn])
    found: Between = between(points[known], np.log(watts), at)
    error = max(math.hypot(found.error, float(np.median([joules.doubt for joules, _ in drawn]))), LEAST_DOUBT)
    power_w = Range(*(math.exp(found.value + sign * error) for sign in (-1, 0, 1)))
    return us * power_w * 1e-6
