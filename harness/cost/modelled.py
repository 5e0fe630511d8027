"""What a launch takes when nobody has measured it: the roofline, and the share of it that measured kernels reach."""

from __future__ import annotations

import math

from klab.harness.cost.ranges import Range
from klab.harness.plan.communication import Collective, modelled
from klab.harness.plan.roofline import Roofline
from klab.kernels.contract import Chip, Problem

# Shares of the dense peak and of the bandwidth that rows with a bound above 100 us reach in NVIDIA's published tables
# (aiconfigurator-core 0.12.0): bf16 on H200 0.69, on B200 0.62; memory 0.84 on H200. The band holds most of them.
COMPUTE_SHARE = (0.80, 0.65, 0.45)
MEMORY_SHARE = (0.90, 0.80, 0.50)
# A launch inside a CUDA graph takes this long whatever it does: a block's start and end, one trip to memory and back.
FLOOR_US = (1.5, 3.0, 6.0)
# Board power over TDP. The same tables: H200 691 W of 700 where compute binds, 627 W where memory does; B200 985 W of 1000.
COMPUTE_POWER, MEMORY_POWER = (0.85, 0.97, 1.0), (0.65, 0.85, 0.95)
LINK_POWER = (0.3, 0.45, 0.7)
# A collective by NCCL's constants: half to twice.
LINK_BAND = (0.7, 1.0, 2.0)
# Watts of a chip whose profile states no TDP (a CPU): known within a factor of two.
UNKNOWN_TDP_W = 150.0


class Modelled:
    """Times and powers of one chip by its limits."""

    def __init__(self, chip: Chip) -> None:
        self.chip = chip
        self._roofline = Roofline(chip, "bfloat16")
        self._tdp_w = chip.tdp_w or UNKNOWN_TDP_W

    def bound(self, problem: Problem) -> tuple[float, str]:
        """(microseconds, "compute" or "memory") of the roofline at the problem's own peak."""
        return self._roofline.of(problem.math_dtype).bound(problem.flops(), problem.bytes_moved())

    def us(self, problem: Problem) -> tuple[Range, str]:
        """The roofline's time over a usual share of it, behind a fixed start, and words for it."""
        bound_us, limit = self.bound(problem)
        best, usual, worst = COMPUTE_SHARE if limit == "compute" else MEMORY_SHARE
        first, floor, last = FLOOR_US
        return Range(first + bound_us / best, floor + bound_us / usual, last + bound_us / worst), f"{usual:.0%} of the {limit} roofline"

    def power_w(self, problem: Problem) -> Range:
        """Board power while it runs, by what limits it."""
        _, limit = self.bound(problem)
        low, usual, high = COMPUTE_POWER if limit == "compute" else MEMORY_POWER
        return Range(low * self._tdp_w, usual * self._tdp_w, high * self._tdp_w)

    @property
    def link_power_w(self) -> Range:
        """Board power during a collective."""
        low, usual, high = LINK_POWER
        return Range(low * self._tdp_w, usual * self._tdp_w, high * self._tdp_w)

    def collective_us(self, one: Collective) -> tuple[Range, str]:
        """By NCCL's own constants (plan/communication.py)."""
        if self.chip.link_gb_per_s is None:
            return Range(math.inf, math.inf, math.inf), "this chip states no link"
        found = modelled(one, self.chip.link_gb_per_s)
        return Range(*(share * found.us for share in LINK_BAND)), f"{found.how}, by NCCL's constants"
