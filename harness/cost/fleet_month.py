"""Fleet months: what limits a fleet, what a month of it takes, row by row, and what the limits let it serve."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from klab.harness.cost.demand import SECONDS_PER_MONTH
from klab.harness.cost.ranges import ZERO, Range
from klab.kernels.errors import UsageError

# More GPUs, kilowatts or replicas than any company has: a slip of the pen.
MOST_GPUS, MOST_KW, MOST_MACHINE, MOST_REPLICAS = 10**8, 1e8, 10**4, 10**6


@dataclass(frozen=True)
class Limits:
    """`headroom`: share of the capacity that is kept free at the peak. `machine`: GPUs that are had together. `least_replicas`: of each
    need, whatever its rate. `kw`: what the site provides (all in); `gpus`: how many of each chip there are. None: no limit.
    `objective`: "cost" or "kw", what is made small.
    """

    headroom: float = 0.2
    machine: int = 8
    least_replicas: int = 1
    kw: float | None = None
    gpus: Mapping[str, int] | None = None
    objective: str = "cost"

    def __post_init__(self) -> None:
        """UsageError for limits that are none."""
        checks = (
            (0 <= self.headroom < 1, f"--headroom is a share of the capacity, below 1, not {self.headroom:g}"),
            (self.headroom <= 0.999, f"--headroom is at most 0.999, not {self.headroom!r}"),
            (1 <= self.machine <= MOST_MACHINE, f"--machine is at least 1 GPU and at most {MOST_MACHINE}, not {self.machine}"),
            (
                1 <= self.least_replicas <= MOST_REPLICAS,
                f"--least-replicas is at least 1 and at most {MOST_REPLICAS}, not {self.least_replicas}",
            ),
            (self.kw is None or 0 < self.kw <= MOST_KW, f"--kw is a positive number of kilowatts, at most {MOST_KW:g}, not {self.kw}"),
            (self.objective in ("cost", "kw"), f"--objective is cost or kw, not {self.objective}"),
        )
        for good, words in checks:
            if not good:
                raise UsageError(words)
        for chip, count in (self.gpus or {}).items():
            if count > MOST_GPUS:
                raise UsageError(f"--gpus: {count} of {chip} is more than {MOST_GPUS}")
            if count < 1 or count % self.machine:
                raise UsageError(f"--gpus: {count} of {chip} is no number of whole machines of {self.machine} (--machine)")

    def share_of_machine(self, gpus: int) -> float:
        """What a replica takes of a machine: replicas do not straddle two, unless they are larger than one."""
        return 1 / (self.machine // gpus) if gpus <= self.machine else float(math.ceil(gpus / self.machine))


@dataclass(frozen=True)
class RowPlan:
    """What one need takes in a month. `usd`, `kw`: of its own GPUs, without the rest of a machine that nobody uses (`kw` None where it is
    not known for the chip). `board_kw`: what the GPU boards draw on average, idle ones too. `busy_gpus`: at work on average.
    """

    option: int
    offline: bool
    replicas: int
    gpus: int
    usd: Range
    kw: float | None
    board_kw: Range
    busy_gpus: float
    tokens: float
    revenue_usd: float | None

    @property
    def use(self) -> float:
        """Average load over capacity."""
        return self.busy_gpus / self.gpus

    @property
    def usd_per_mtok(self) -> Range:
        """Dollars per million tokens, prompt and generated, at the average load."""
        return self.usd * (1e6 / self.tokens)


@dataclass(frozen=True)
class Month:
    """What one month takes: its rows, and by chip the GPUs of whole machines with their dollars and kW (what the site holds ready; None
    where it is not known for a chip). `gpus_range`: with every throughput at its high and its low end.
    """

    month: int
    rows: tuple[RowPlan, ...]
    gpus: Mapping[str, int]
    gpus_range: Range
    usd: Range
    kw: float | None

    @property
    def replicas(self) -> dict[int, int]:
        """By option."""
        return {row.option: row.replicas for row in self.rows}

    @property
    def tokens(self) -> float:
        """Prompt and generated."""
        return sum(row.tokens for row in self.rows)

    @property
    def tokens_per_s(self) -> float:
        """On average."""
        return self.tokens / SECONDS_PER_MONTH

    @property
    def board_kw(self) -> Range:
        """What the GPU boards of all rows draw on average."""
        return sum((row.board_kw for row in self.rows), ZERO)

    @property
    def use(self) -> float:
        """Average load over the capacity of the rows' GPUs."""
        return sum(row.busy_gpus for row in self.rows) / sum(row.gpus for row in self.rows)

    @property
    def idle_gpus(self) -> float:
        """Of the rows with latencies, how many have no work on average."""
        return sum(row.gpus - row.busy_gpus for row in self.rows if not row.offline)

    @property
    def batch_gpus(self) -> float:
        """How many the offline rows keep busy."""
        return sum(row.busy_gpus for row in self.rows if row.offline)

    @property
    def usd_per_mtok(self) -> Range:
        """Dollars per million tokens, prompt and generated, at the average load."""
        return self.usd * (1e6 / self.tokens)

    @property
    def revenue_usd(self) -> float | None:
        """What the tokens are sold for; None where not every need states its selling price."""
        found = [row.revenue_usd for row in self.rows]
        return None if None in found else sum(one or 0.0 for one in found)

    @property
    def gross_margin(self) -> Range | None:
        """What the dollars above leave of the revenue, as a share; None without a revenue."""
        if not self.revenue_usd:
            return None
        revenue = self.revenue_usd
        return Range.of(lambda usd: 1 - usd / revenue, self.usd)


@dataclass(frozen=True)
class Capacity:
    """What limits allow: `scale` times the demand of a month (all rows in the same proportion), by these replicas of each option on these
    GPUs of whole machines, for `usd` a month. `tokens`: prompt and generated ones of a month at the middle of the scale.
    """

    scale: Range
    replicas: Mapping[int, int]
    gpus: Mapping[str, int]
    kw: float | None
    usd: Range
    tokens: float
    alone: Mapping[int, float] = field(default_factory=dict)

    @property
    def usd_per_mtok(self) -> Range:
        """Dollars per million tokens of `scale` times the demand, peaks and troughs as it has them; the doubt of the throughput is that of
        the scale, where something is served at its low end.
        """
        low, high = (self.scale.mid / end if end else 1.0 for end in (self.scale.high, self.scale.low))
        each = self.usd * (1e6 / self.tokens)
        return Range(each.low * low, each.mid, each.high * high)
