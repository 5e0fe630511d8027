"""What a launch takes when nobody has measured it: the roofline, and the share of it that measured kernels reach."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from klab.harness.cost.ranges import Range
from klab.harness.plan.communication import Collective, modelled
from klab.harness.plan.roofline import Roofline
from klab.harness.plan.step import flops_and_bytes
from klab.kernels.contract import Chip, Problem


@dataclass(frozen=True)
class Usual:
    """How kernels of one kind fare: (best, usual, worst) start in microseconds, share of the peak, share of the bandwidth.

    `overlap`: computing hides behind moving or the other way; else both take their time.
    """

    start_us: tuple[float, float, float]
    compute: tuple[float, float, float]
    memory: tuple[float, float, float]
    overlap: bool = True


# A launch inside a CUDA graph takes this long whatever it does: a block's start and end, one trip to memory and back. Of what nobody
# published a table (norms, activations, ...): guesses, the memory's share as of large matmuls.
OTHER = Usual((1.5, 3.0, 6.0), (0.80, 0.65, 0.45), (0.90, 0.80, 0.50))
# Fitted to NVIDIA's published tables of H200 and B200 (aiconfigurator-core 0.12.0: trtllm, vllm and sglang together), so that the middle
# has no bias and at most one row in ten is faster than the best; at most one in ten (of experts: one in six, where a skewed routing fills
# one of them) is slower than the worst. Their fp8 matmuls quantise the activations too, and experts are a chain of launches: where both
# bounds are alike they take 1.8 times the larger one at its share, and matmuls 1.1 times.
NARROW = Usual((5.0, 11.0, 20.0), (0.65, 0.50, 0.33), (0.85, 0.70, 0.45))
EXPERTS = Usual((18.0, 32.0, 60.0), (0.50, 0.25, 0.10), (0.95, 0.60, 0.20), overlap=False)
DECODE = Usual((8.0, 12.0, 18.0), (0.60, 0.35, 0.20), (0.92, 0.82, 0.50))
USUAL: Mapping[str, Usual] = {
    "matmul": Usual((2.0, 4.0, 7.0), (0.82, 0.72, 0.58), (0.92, 0.80, 0.55)),
    "scaled_matmul": NARROW,
    "weight_only_matmul": NARROW,
    "prefill_attention": Usual((10.0, 20.0, 35.0), (0.65, 0.48, 0.28), (0.30, 0.20, 0.12)),
    "decode_attention": DECODE,
    "latent_attention": DECODE,
    "sparse_latent_attention": DECODE,
    "fused_moe": EXPERTS,
    "weight_only_moe": EXPERTS,
    "grouped_matmul": EXPERTS,
}


@dataclass(frozen=True)
class Draw:
    """Board power over TDP, (low, usual, high): of launches that reach no more than a share `idle` of their roofline, and of those that
    reach `busy` of it; between them in proportion.
    """

    least: tuple[float, float, float]
    most: tuple[float, float, float]
    idle: float
    busy: float

    def at(self, share: float) -> tuple[float, float, float]:
        """For a launch that reaches this share of its roofline."""
        part = min(1.0, max(0.0, (share - self.idle) / (self.busy - self.idle)))
        low, usual, high = ((1 - part) * first + part * last for first, last in zip(self.least, self.most, strict=True))
        return low, usual, high


# Medians and 10% to 90% of the board power in the tables that have any (aiconfigurator-core 0.12.0, B200 of 1000 W, vLLM 0.22.0: 12,920
# rows of prefill attention, 16,362 of experts, 13,851 of decode attention); the busy middles between those and H200's (691 W of 700 where
# compute binds, 627 W where memory does). Attention of a decode step waits for memory and draws far less than other readers of it.
COMPUTE_DRAW = Draw((0.50, 0.62, 0.84), (0.72, 0.97, 1.0), 0.0, 0.25)
MEMORY_DRAW = Draw((0.32, 0.50, 0.72), (0.70, 0.93, 1.0), 0.0, 0.6)
DECODE_DRAW = Draw((0.29, 0.44, 0.69), (0.52, 0.67, 0.85), 0.6, 0.95)
# Of a collective: a guess.
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
        return self._roofline.of(problem.math_dtype).bound(*flops_and_bytes(problem))

    def us(self, problem: Problem) -> tuple[Range, str]:
        """What its limits take at their usual shares, behind a fixed start, and words for it."""
        bound_us, limit = self.bound(problem)
        usual = USUAL.get(problem.operator, OTHER)
        roofline = self._roofline.of(problem.math_dtype)
        flops, bytes_moved = flops_and_bytes(problem)
        flops_us, bytes_us = roofline.bound(flops, 0.0)[0], roofline.bound(0.0, bytes_moved)[0]
        together = max if usual.overlap else sum
        parts = zip(usual.start_us, usual.compute, usual.memory, strict=True)
        us = Range(*(start + together((flops_us / compute, bytes_us / memory)) for start, compute, memory in parts))
        share = bound_us / (us.mid - usual.start_us[1]) if bound_us else 1.0
        return us, f"{usual.start_us[1]:g} us and {share:.0%} of the {limit} roofline"

    def power_w(self, problem: Problem, us: float) -> Range:
        """Board power while it runs for so many microseconds, by what limits it and how near it comes to that."""
        bound_us, limit = self.bound(problem)
        kind = DECODE_DRAW if USUAL.get(problem.operator) is DECODE else COMPUTE_DRAW if limit == "compute" else MEMORY_DRAW
        return Range(*(part * self._tdp_w for part in kind.at(bound_us / us)))

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
