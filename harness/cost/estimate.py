"""Estimate: what one launch takes, in time and energy, and what that figure rests on."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Protocol

from klab.harness.cost.modelled import Modelled
from klab.harness.cost.ranges import Range
from klab.harness.plan.communication import Collective
from klab.kernels.contract import Chip, Json, Problem


class Origin(StrEnum):
    """What a figure rests on; of a sum, the weakest of what makes up 90% of it (`label_of`)."""

    MEASURED = "measured"  # by klab, on this chip, at this shape or between shapes that were
    REFERENCE = "reference"  # published measurements of this chip by somebody else
    MODELLED = "modelled"  # a roofline with a usual share of it


# Below this share of the time (or energy) on measured kernels of this chip, a total is not called measured.
ENOUGH = 0.9
# An answer that may be off by more than this (between far neighbours, say) stands only where no later source is surer: a guess.
SURE = 0.25


@dataclass(frozen=True)
class Estimate:
    """One launch on one GPU. `joules` of the GPU board; None where the source knows no energy (the estimator then models it).

    `how` is for people: which kernel, measured or between how many neighbours, how far off these predict each other. `kernel` and
    `config` name the choice where the source has one.
    """

    us: Range
    origin: Origin
    how: str
    joules: Range | None = None
    energy_origin: Origin = Origin.MODELLED
    kernel: str = ""
    config: Mapping[str, Json] = field(default_factory=dict)


class Source(Protocol):
    """Somebody who knows launches: own results, published tables, a model. None: not this one."""

    def launch(self, problem: Problem) -> Estimate | None:
        """Time, and energy where known."""

    def collective(self, one: Collective) -> Estimate | None:
        """Time of a collective over the chip's links."""


class Estimator:
    """Asks sources in order (an earlier one that is unsure gives way to a surer one); the last resort is the model.

    `hidden`: a source whose answers are not to be used for this chip is simply not given. Answers are kept: a problem is asked once.
    `notes` say what the sources rest on. A source may have `why_not(problem)`: why it gave None, for people.
    """

    def __init__(self, chip: Chip, sources: Sequence[Source] = (), notes: Sequence[str] = ()) -> None:
        self.chip, self.notes = chip, list(notes)
        self.modelled = Modelled(chip)
        self.sources = tuple(sources)
        self._launches: dict[Problem, Estimate] = {}
        self._collectives: dict[Collective, Estimate] = {}

    def launch(self, problem: Problem) -> Estimate:
        """Time and energy of one launch of the best known kernel for a problem."""
        found = self._launches.get(problem)
        if found is None:
            found = _first_sure(source.launch(problem) for source in self.sources)
            if found is None:
                us, how = self._modelled_us(problem)
                found = Estimate(us, Origin.MODELLED, how + self._why_modelled(problem))
            if found.joules is None:
                power_w = self.modelled.power_w(problem, found.us.mid)
                found = replace(found, joules=found.us * power_w * 1e-6, energy_origin=Origin.MODELLED)
            self._launches[problem] = found
        return found

    def _modelled_us(self, problem: Problem) -> tuple[Range, str]:
        """The model's time; where klab measured launches of this operator here, as many times that as those took: a chip on which all
        kernels are slower than the model must not look best where nobody measured.
        """
        us, how = self.modelled.us(problem)
        usual = next((found for s in self.sources if (ask := getattr(s, "usual", None)) and (found := ask(problem.operator))), None)
        if usual is None:
            return us, how
        low, high = min(usual.low, 0.9 * usual.mid), max(usual.high, 1.1 * usual.mid)
        return us.mid * Range(
            low, usual.mid, high
        ), f"{how}, {usual.mid:.2g} times as long as usual, as what was measured of {problem.operator} here"

    def _why_modelled(self, problem: Problem) -> str:
        """What the sources that know this operator say of not knowing this problem."""
        reasons = [reason for source in self.sources if (ask := getattr(source, "why_not", None)) and (reason := ask(problem))]
        return f" ({'; '.join(reasons)})" if reasons else ""

    def collective(self, one: Collective) -> Estimate:
        """Time and energy of one collective."""
        found = self._collectives.get(one)
        if found is None:
            found = _first_sure(source.collective(one) for source in self.sources)
            if found is None:
                us, how = self.modelled.collective_us(one)
                found = Estimate(us, Origin.MODELLED, how)
            if found.joules is None:
                found = replace(found, joules=found.us * self.modelled.link_power_w * 1e-6, energy_origin=Origin.MODELLED)
            self._collectives[one] = found
        return found

    @property
    def answers(self) -> tuple[Mapping[Problem, Estimate], Mapping[Collective, Estimate]]:
        """All that was asked so far."""
        return self._launches, self._collectives

    def learn(self, answers: tuple[Mapping[Problem, Estimate], Mapping[Collective, Estimate]]) -> None:
        """Take over what an estimator of the same chip and sources was asked in another process."""
        self._launches.update(answers[0])
        self._collectives.update(answers[1])


def _first_sure(answers: Iterable[Estimate | None]) -> Estimate | None:
    """The first answer of little doubt that rests on measurements; where none does, the one of least doubt, models last."""
    unsure: list[Estimate] = []
    for answer in filter(None, answers):
        if answer.us.doubt <= SURE and answer.origin is not Origin.MODELLED:
            return answer
        unsure.append(answer)
    return min(unsure, key=lambda one: (one.origin is Origin.MODELLED, one.us.doubt), default=None)


def label_of(shares: Mapping[Origin, float], understood: float | None = 1.0) -> Origin:
    """What a total may be called: measured or reference only when 90% of it is (measured counts towards reference).

    `understood`: the model's covered share; of one that is not wholly understood, measured kernels are not the whole.
    """
    if understood != 1:
        return Origin.MODELLED
    measured = shares.get(Origin.MEASURED, 0.0)
    if measured >= ENOUGH:
        return Origin.MEASURED
    return Origin.REFERENCE if measured + shares.get(Origin.REFERENCE, 0.0) >= ENOUGH else Origin.MODELLED


class Labelled:
    """What has shares of its time and energy by what they rest on."""

    time_shares: Mapping[Origin, float]
    energy_shares: Mapping[Origin, float]

    @property
    def label(self) -> Origin:
        """What its times may be called."""
        return label_of(self.time_shares)

    @property
    def energy_label(self) -> Origin:
        """What its energy may be called."""
        return label_of(self.energy_shares)
