"""Mix: the steps that a request pays for, what they add up to, and how many requests fit into memory."""

from __future__ import annotations

import math

from klab.harness.cost.estimate import Origin
from klab.harness.cost.modelled import UNKNOWN_TDP_W
from klab.harness.cost.ranges import ZERO, Range
from klab.harness.cost.steps import StepCost, Steps
from klab.harness.cost.workload import Workload

# Requests in flight beyond which no engine is run (vLLM's default max_num_seqs is 256, of servers on large GPUs 1024).
MOST_REQUESTS = 1024
# Board power of a GPU that holds a model and waits, over TDP: a guess around 75 to 140 W of an H200's 700.
IDLE_POWER = (0.10, 0.15, 0.20)

Mix = tuple[tuple[float, StepCost], ...]
"""Steps and how many of each one request takes (a share of those that it is in, by the requests in them)."""


def grid(most: int) -> list[int]:
    """1, 2, 3, 4, 6, 8, 12, ... and `most`."""
    powers = range(max(1, most).bit_length())
    return sorted({n for k in powers for n in (2**k, 3 * 2 ** (k - 1) if k else 1) if n <= most} | ({most} if most else set()))


def most_scheduled(workload: Workload) -> int:
    """Sequences that an engine decodes in one step: a step takes `chunk_tokens` tokens."""
    return max(1, min(MOST_REQUESTS, workload.chunk_tokens // (workload.draft_tokens + 1)))


def most_concurrent(steps: Steps, workload: Workload) -> int:
    """Requests in flight that fit into memory, at most `most_scheduled`; 0 when not even one does.

    Sequences are evenly spread over their generation: their cache is that of isl + osl/2 tokens with a standard deviation of osl/sqrt(12)
    each, and the mean plus two deviations fits (else an engine would throw sequences out and compute them again). A cached prefix counts
    for every sequence.
    """
    free = steps.deployment.chip.memory_bytes * steps.deployment.memory_share - steps.weight_bytes
    last = workload.isl + workload.osl
    mean, full = steps.cache_bytes(workload.isl + workload.osl // 2), steps.cache_bytes(last)
    if free <= 0 or full > free:
        return 0
    if not mean:
        return most_scheduled(workload)
    spread = 2 * 2 * (full - mean) / math.sqrt(12)
    # n mean + spread sqrt(n) = free
    root = (-spread + math.sqrt(spread * spread + 4 * mean * free)) / (2 * mean)
    return max(1, min(most_scheduled(workload), int(root * root)))


def decode_step(steps: Steps, w: Workload, batch: int) -> StepCost:
    """A decode step half way through the generation, with what drafting takes."""
    return drafting(steps.decode(batch, w.context, w.draft_tokens + 1), steps, w, batch)


def drafting(step: StepCost, steps: Steps, w: Workload, batch: int) -> StepCost:
    """The step with the drafts for `batch` sequences before it: `draft_cost` of a plain decode step for each, modelled."""
    if not (w.draft_tokens and w.draft_cost and batch):
        return step
    return step.with_drafts(steps.decode(batch, w.context), w.draft_tokens * w.draft_cost)


def energy(mix: Mix) -> Range:
    """Joules of one GPU."""
    return sum((step.joules * count for count, step in mix), ZERO)


def shares(mix: Mix, *, energy: bool, modelled: float = 0.0) -> dict[Origin, float]:
    """Shares of time (or energy) by what they rest on; `modelled` joules come on top."""
    found = dict.fromkeys(Origin, 0.0)
    found[Origin.MODELLED] = modelled
    for count, step in mix:
        whole = (step.joules if energy else step.us).mid * count
        for origin, share in (step.energy_shares if energy else step.time_shares).items():
            found[origin] += share * whole
    whole = sum(found.values())
    return {origin: value / whole if whole else 0.0 for origin, value in found.items()}


def idle_joules(steps: Steps, seconds: Range) -> Range:
    """Of all GPUs of a replica that waits."""
    tdp_w = steps.deployment.chip.tdp_w or UNKNOWN_TDP_W
    return Range(*(share * tdp_w * steps.deployment.tp for share in IDLE_POWER)) * seconds


def inverse(one: Range) -> Range:
    """1 over it; infinite for 0."""
    return Range(*(1 / value if value else math.inf for value in (one.high, one.mid, one.low)))
