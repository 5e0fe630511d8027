"""Workload and Deployment: what is asked of a model, and on what it runs."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

from klab.harness.catalog.architecture import Model
from klab.harness.plan.scenario import Scenario, scenario_for
from klab.kernels.contract import Chip
from klab.kernels.errors import UsageError

# Tokens that an engine puts through one step: vLLM's max_num_batched_tokens for servers and SGLang's chunked_prefill_size on large GPUs.
CHUNK_TOKENS = 8192
# Of a GPU's memory, what engines give to weights and cache (vLLM's gpu_memory_utilization, SGLang's mem_fraction_static).
MEMORY_SHARE = 0.9
# Beyond these a figure is a slip of the pen, and no float holds what follows from it.
LEAST_UTILISATION, MOST_DRAFT_COST = 1e-6, 1e3
# Up to so many generated tokens the steps that speculation takes are counted exactly.
COUNTED = 256


@dataclass(frozen=True)
class Workload:
    """Requests of `isl` prompt and `osl` generated tokens.

    `prefix_hit`: share of the prompt's tokens that are in the cache already. `chunk_tokens`: tokens an engine puts through one step (a
    longer prompt is cut). `draft_tokens`: speculated per step, each accepted with probability `acceptance`; drafting one costs
    `draft_cost` of a plain decode step. `utilisation`: share of the paid time in which there is work. `offline`: a batch job, for which
    no latency is promised. SLOs in seconds, None: none.
    """

    isl: int = 8192
    osl: int = 1024
    prefix_hit: float = 0.0
    chunk_tokens: int = CHUNK_TOKENS
    draft_tokens: int = 0
    acceptance: float = 0.7
    draft_cost: float = 0.05
    utilisation: float = 1.0
    offline: bool = False
    slo_ttft_s: float | None = None
    slo_tpot_s: float | None = None

    def __post_init__(self) -> None:
        """UsageError for what no workload has."""
        checks = (
            (self.isl >= 1, f"--isl is at least 1, not {self.isl}"),
            (self.osl >= 0, f"--osl is at least 0, not {self.osl}"),
            (0 <= self.prefix_hit < 1, f"--prefix-hit is a share below 1 of the prompt's tokens, not {self.prefix_hit:g}"),
            (self.chunk_tokens >= 16, f"--chunk is at least 16 tokens per step, not {self.chunk_tokens}"),
            (0 <= self.draft_tokens <= 16, f"--draft is 0 to 16 speculated tokens per step, not {self.draft_tokens}"),
            (0 <= self.acceptance <= 1, f"--acceptance is a probability, not {self.acceptance:g}"),
            (
                0 <= self.draft_cost <= MOST_DRAFT_COST,
                f"--draft-cost is a share of a decode step, at most {MOST_DRAFT_COST:g}, not {self.draft_cost:g}",
            ),
            (
                LEAST_UTILISATION <= self.utilisation <= 1,
                f"--utilisation is a share above 0 and at most 1 (from {LEAST_UTILISATION:g} on), not {self.utilisation:g}",
            ),
            (self.slo_ttft_s is None or 0 < self.slo_ttft_s < math.inf, f"--slo-ttft is a positive time, not {self.slo_ttft_s}"),
            (self.slo_tpot_s is None or 0 < self.slo_tpot_s < math.inf, f"--slo-tpot is a positive time, not {self.slo_tpot_s}"),
        )
        for good, words in checks:
            if not good:
                raise UsageError(words)

    @property
    def cached_tokens(self) -> int:
        """Prompt tokens found in the cache; at least one token is always computed."""
        return min(int(self.prefix_hit * self.isl), self.isl - 1)

    @property
    def new_tokens(self) -> int:
        """Prompt tokens that prefill computes."""
        return self.isl - self.cached_tokens

    @property
    def context(self) -> int:
        """Keys per sequence half way through its generation."""
        return self.isl + self.osl // 2

    @property
    def tokens_per_step(self) -> float:
        """Tokens that one decode step gives a sequence: (1 - a^(k+1)) / (1 - a) with k drafts accepted with probability a."""
        a, k = self.acceptance, self.draft_tokens
        return float(k + 1) if a == 1 else (1 - a ** (k + 1)) / (1 - a)

    @property
    def decode_steps(self) -> float:
        """Decode steps of one request: the first token comes from the prompt's step, the last step may give more than is wanted."""
        return _mean_steps(max(0, self.osl - 1), self.draft_tokens, self.acceptance)


@lru_cache(maxsize=1024)
def _mean_steps(wanted: int, drafts: int, a: float) -> float:
    """Steps until `wanted` tokens are there, of X tokens each: of few exactly, of many by renewal theory (the mean of a sum of X that
    passes its goal exceeds it by (E[X^2]/E[X] - 1)/2).
    """
    if not drafts or a in (0.0, 1.0):
        return float(math.ceil(wanted / (drafts + 1 if a else 1)))
    if wanted > COUNTED:
        # A step gives at least j tokens with probability a^(j-1), so E[X^2] is the sum of (2j - 1) of these.
        squares = sum((2 * j - 1) * a ** (j - 1) for j in range(1, drafts + 2))
        mean = sum(a**j for j in range(drafts + 1))
        return (wanted + (squares / mean - 1) / 2) / mean
    shares = [a**j * (1 - a) for j in range(drafts)] + [a**drafts]
    needed = [0.0]
    for left in range(1, wanted + 1):
        needed.append(1 + sum(share * needed[max(0, left - j - 1)] for j, share in enumerate(shares)))
    return needed[wanted]


@dataclass(frozen=True)
class Deployment:
    """A model on `tp` GPUs of one kind that work as one replica. Fields as in Scenario; the memory share is of each GPU's memory."""

    model: Model
    chip: Chip
    tp: int = 1
    dtype: str = ""
    quantization: str = ""
    kv_dtype: str = ""
    expert_parallel: bool = False
    memory_share: float = MEMORY_SHARE

    def __post_init__(self) -> None:
        """UsageError for what cannot be deployed."""
        if not 0 < self.memory_share <= 1:
            raise UsageError(f"--memory-share is a share above 0 and at most 1, not {self.memory_share:g}")

    def scenario(self, **fields: object) -> Scenario:
        """A Scenario of this deployment with these fields; UsageError for impossible ones."""
        own: dict[str, object] = {
            "tp": self.tp,
            "dtype": self.dtype,
            "quantization": self.quantization,
            "kv_dtype": self.kv_dtype,
            "expert_parallel": self.expert_parallel,
        }
        return scenario_for(self.model, self.chip, **own | fields)

    @property
    def label(self) -> str:
        """`h200 x 4 fp8_block`."""
        extras = [self.quantization, f"kv {self.kv_dtype}" if self.kv_dtype else "", "expert parallel" if self.expert_parallel else ""]
        return " ".join([self.chip.name, *([f"x {self.tp}"] if self.tp > 1 else []), *filter(None, extras)])
