"""What "best" means: time, energy, their product, or money per launch. The one place where a Result becomes a number to minimise."""

from __future__ import annotations

import math
from dataclasses import dataclass

from klab.harness.measure.stats import FLOOR_ROUNDS, counting, spread
from klab.harness.store.result import Result
from klab.kernels.errors import UsageError

# name -> (unit, what it is)
OBJECTIVES = {
    "latency": ("us", "median time"),
    "energy": ("J", "joules per launch"),
    "energy-delay": ("J s", "energy times time"),
    "cost": ("USD", "time at a price per hour plus energy at a price per kWh"),
}
US_PER_HOUR = 3.6e9
J_PER_KWH = 3.6e6


@dataclass(frozen=True)
class Interval:
    """A median with its 95% interval, in the unit of the objective."""

    median: float
    low: float
    high: float

    def overlaps(self, other: Interval) -> bool:
        """True when the two cannot be told apart by their intervals."""
        return self.low <= other.high and other.low <= self.high

    def __mul__(self, other: Interval) -> Interval:
        """The product of two positive quantities, its ends at their worst: no independence is assumed (energy contains time)."""
        return Interval(self.median * other.median, self.low * other.low, self.high * other.high)

    def __add__(self, other: Interval) -> Interval:
        """The sum, its ends at their worst."""
        return Interval(self.median + other.median, self.low + other.low, self.high + other.high)

    def scaled(self, factor: float) -> Interval:
        """In another unit; `factor` is not negative."""
        return Interval(self.median * factor, self.low * factor, self.high * factor)


def counting_rounds(result: Result) -> list[float]:
    """The samples of the rounds that count, in order."""
    if len(result.marked) != len(result.samples_us):
        return list(result.samples_us)
    return counting(result.samples_us, result.marked)


def latency(result: Result) -> Interval | None:
    """Microseconds per launch, as stored; from the samples where the interval was not stored. None without rounds enough for one."""
    if result.median_us is not None and result.ci_low_us is not None and result.ci_high_us is not None:
        return Interval(result.median_us, result.ci_low_us, result.ci_high_us)
    samples = counting_rounds(result)
    if len(samples) < FLOOR_ROUNDS:
        return None
    found = spread(samples)
    return Interval(found.median, found.low, found.high)


def energy(result: Result) -> Interval | None:
    """Joules per launch with its interval, or None: what was not measured is not zero."""
    if result.energy_j is None or result.energy_ci_low_j is None or result.energy_ci_high_j is None:
        return None
    return Interval(result.energy_j, result.energy_ci_low_j, result.energy_ci_high_j)


@dataclass(frozen=True)
class Objective:
    """What is minimised, by name (OBJECTIVES). Prices are in US dollars, of one device, and for `cost` alone."""

    name: str = "latency"
    usd_per_hour: float | None = None
    usd_per_kwh: float | None = None

    def __post_init__(self) -> None:
        if self.name not in OBJECTIVES:
            raise UsageError(f"unknown objective {self.name!r}; known: {', '.join(OBJECTIVES)}")
        prices = {"--usd-per-hour": self.usd_per_hour, "--usd-per-kwh": self.usd_per_kwh}
        if self.name != "cost":
            given = [option for option, price in prices.items() if price is not None]
            if given:
                raise UsageError(f"{' and '.join(given)} is for --objective cost, not {self.name}")
            return
        missing = [option for option, price in prices.items() if price is None]
        if missing:
            raise UsageError(f"the objective cost needs {' and '.join(missing)}: the price of an hour of the device, and of a kWh")
        for option, price in prices.items():
            if price is not None and not (math.isfinite(price) and price >= 0):
                raise UsageError(f"{option} {price} is not a price; give dollars, 0 or more")
        if not any(prices.values()):
            raise UsageError("the objective cost with both prices 0 makes everything equal: give --usd-per-hour or --usd-per-kwh above 0")

    @classmethod
    def parse(cls, name: str, usd_per_hour: float | None = None, usd_per_kwh: float | None = None) -> Objective:
        """From the options of a command; UsageError names what is unknown, missing or out of place."""
        return cls(name.strip().lower(), usd_per_hour, usd_per_kwh)

    @property
    def needs_energy(self) -> bool:
        """True when a result without energy has no value."""
        return self.name != "latency"

    @property
    def unit(self) -> str:
        """Of `value`."""
        return OBJECTIVES[self.name][0]

    def __str__(self) -> str:
        if self.name != "cost":
            return self.name
        return f"cost at {self.usd_per_hour:g} USD/h and {self.usd_per_kwh:g} USD/kWh"

    def interval(self, result: Result) -> Interval | None:
        """The value of one launch with its interval in `unit`; None where a part of it was not measured."""
        time = latency(result)
        if time is None or self.name == "latency":
            return time
        joules = energy(result)
        if joules is None or self.name == "energy":
            return joules
        if self.name == "energy-delay":
            return joules * time.scaled(1e-6)
        assert self.usd_per_hour is not None and self.usd_per_kwh is not None
        return time.scaled(self.usd_per_hour / US_PER_HOUR) + joules.scaled(self.usd_per_kwh / J_PER_KWH)

    def value(self, result: Result) -> float | None:
        """The median of `interval`: lower is better, None is not measured."""
        found = self.interval(result)
        return None if found is None else found.median


LATENCY = Objective()


def as_objective(objective: Objective | str) -> Objective:
    """An objective by its name alone, or as it is."""
    return objective if isinstance(objective, Objective) else Objective.parse(objective)
