"""Estimate: what one launch takes, in time and energy, and what that figure rests on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
    """Asks sources in order; the last resort is the model, which answers everything.

    `hidden`: a source whose answers are not to be used for this chip is simply not given. Answers are kept: a problem is asked once.
    """

    def __init__(self, chip: Chip, sources: Sequence[Source] = ()) -> None:
        self.chip = chip
        self.modelled = Modelled(chip)
        self.sources = tuple(sources)
        self._launches: dict[str, Estimate] = {}
        self._collectives: dict[Collective, Estimate] = {}

    def launch(self, problem: Problem) -> Estimate:
        """Time and energy of one launch of the best known kernel for a problem."""
        found = self._launches.get(problem.key)
        if found is None:
            found = next((answer for source in self.sources if (answer := source.launch(problem))), None)
            if found is None:
                us, how = self.modelled.us(problem)
                found = Estimate(us, Origin.MODELLED, how)
            if found.joules is None:
                found = replace(found, joules=found.us * self.modelled.power_w(problem) * 1e-6, energy_origin=Origin.MODELLED)
            self._launches[problem.key] = found
        return found

    def collective(self, one: Collective) -> Estimate:
        """Time and energy of one collective."""
        found = self._collectives.get(one)
        if found is None:
            found = next((answer for source in self.sources if (answer := source.collective(one))), None)
            if found is None:
                us, how = self.modelled.collective_us(one)
                found = Estimate(us, Origin.MODELLED, how)
            if found.joules is None:
                found = replace(found, joules=found.us * self.modelled.link_power_w * 1e-6, energy_origin=Origin.MODELLED)
            self._collectives[one] = found
        return found


def label_of(shares: Mapping[Origin, float]) -> Origin:
    """What a total may be called: measured or reference only when 90% of it is (measured counts towards reference)."""
    measured = shares.get(Origin.MEASURED, 0.0)
    if measured >= ENOUGH:
        return Origin.MEASURED
    return Origin.REFERENCE if measured + shares.get(Origin.REFERENCE, 0.0) >= ENOUGH else Origin.MODELLED
