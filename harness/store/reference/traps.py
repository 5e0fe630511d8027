"""Traps: rows of published tables that are no measurement of what they are filed under."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING

from klab.kernels.contract import Chip

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

NOT_A_TIME = "its time is zero, negative or missing"
TOO_FAST = "it is faster than this chip can be"
WARM = "it is faster than this chip's memory: its operands stayed in the cache"
FEWER = "it visited fewer experts than even chance would, or its operands stayed in the cache"
LAUNCHES = "its time is that of launches, whatever its size"
FOREIGN = "it was measured on another device"
HICCUP = "more of the same takes less than a fifth as long"
MIXED = "it is of another version than the rest of its table"
NO_PROVENANCE = "it does not say on what, or with which version, it was measured"

# Below this share of the least possible time a row is wrong; memory runs up to 3% above its datasheet (6144 bit x 3201 MHz on the H200).
LEAST_SHARE = 0.95
# A problem whose bound is below this is all launch; and rows within this factor of what such problems take may be as well.
SMALL_US, LAUNCH_FACTOR = 2.0, 3.0
# A larger problem that takes less than this share of a row's time tells that something else ran there: a few rows in 1e5 take 10 to 200
# times as long as their neighbours. Factors below 5 may be a kernel's own choice for a size.
HICCUP_SHARE = 0.2
# So few small rows say nothing of a table's launches.
LEAST_SMALL = 8


@dataclass(frozen=True, slots=True)
class Limits:
    """What a chip can do in one dtype: microseconds per FLOP by the specification and at the highest clock, and per byte; the cache."""

    per_flop: float
    least_per_flop: float
    per_byte: float
    cache_bytes: float

    @classmethod
    def of(cls, chip: Chip, dtype: str) -> Limits:
        """A dtype without a peak of its own is not bound by one (it may be computed in a narrower one)."""
        peak = chip.peak_flops(dtype) or math.inf
        highest = max(1.0, chip.max_clock_mhz / chip.spec_clock_mhz) if chip.spec_clock_mhz else 1.0
        return cls(1e6 / peak, 1e6 / peak / highest, 1e-3 / chip.memory_gb_per_s, float(chip.l2_bytes))

    def bound(self, flops: float, bytes_moved: float) -> tuple[float, str]:
        """(the roofline's microseconds, "compute" or "memory")."""
        compute, memory = flops * self.per_flop, bytes_moved * self.per_byte
        return (compute, "compute") if compute > memory else (memory, "memory")

    def impossible(self, flops: float, bytes_moved: float, us: float) -> str:
        """NOT_A_TIME, TOO_FAST, WARM or "" for a time.

        Too fast: than the peak at the highest clock, or than memory even if the whole cache held its part. Warm: than memory alone.
        """
        if not (us > 0 and math.isfinite(us)):
            return NOT_A_TIME
        if us < LEAST_SHARE * max(flops * self.least_per_flop, (bytes_moved - self.cache_bytes) * self.per_byte):
            return TOO_FAST
        return WARM if us < LEAST_SHARE * bytes_moved * self.per_byte else ""


def launch_floor_us(bounds_us: Sequence[float], times_us: Sequence[float], least_us: float) -> float:
    """What a launch of this table takes at least where that is more than `least_us` (it was not measured in a graph); 0 where not.

    The median of the rows that have next to nothing to do.
    """
    small = [us for bound, us in zip(bounds_us, times_us, strict=True) if bound < SMALL_US]
    floor = median(small) if len(small) >= LEAST_SMALL else 0.0
    return floor if floor > least_us else 0.0


def strange(device: str, version: str, system: str, usual_version: str) -> str:
    """NO_PROVENANCE, FOREIGN, MIXED or "" for a row of a table of this system, most of whose rows are of `usual_version`.

    A system's name begins with its chip's: h200_sxm is of devices whose names have the word H200.
    """
    if not device or not version:
        return NO_PROVENANCE
    if not re.search(rf"\b{re.escape(system.split('_')[0])}\b", device, re.IGNORECASE):
        return FOREIGN
    return MIXED if version != usual_version else ""


def hiccups(groups: NDArray[np.int64], amounts: NDArray[np.float64], times_us: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Which rows are slower than more of the same: rows of one group differ in their amount (of tokens, of sequences) alone.

    Times that are none (0 or not a number) neither condemn nor are condemned.
    """
    import numpy as np

    logs = np.log(np.where(times_us > 0, times_us, np.inf))
    order = np.lexsort((amounts, groups))[::-1]
    # Logarithms of microseconds lie within 100 of each other: groups are visited downwards, and each lies below all that came before.
    ordered = np.where(np.isfinite(logs), logs, 99.0)[order] + 100.0 * groups[order]
    best = np.empty(len(order))
    best[order] = np.minimum.accumulate(ordered) - 100.0 * groups[order]
    slow: NDArray[np.bool_] = np.isfinite(logs) & (best < logs + np.log(HICCUP_SHARE))
    return slow
