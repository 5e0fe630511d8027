"""Pools: replicas that only prefill or only decode, for deployments that keep the two apart."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from klab.harness.cost.estimate import Labelled, Origin
from klab.harness.cost.mix import Mix, decode_step, energy, grid, idle_joules, inverse, most_concurrent, most_scheduled, shares
from klab.harness.cost.ranges import ZERO, Range
from klab.harness.cost.steps import Steps
from klab.harness.cost.workload import Deployment, Workload

# Shares of its time in which a prefill replica works.
LOADS = (0.3, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95)
# Prompts per step are found to this.
SETTLED = 1e-9


@dataclass(frozen=True)
class PoolPoint(Labelled):
    """A replica that only prefills or only decodes (`role`).

    `latency_s`: mean TTFT without any transfer, or TPOT; `requests_per_s` at this point; `load`: share of the time in which the replica
    works. `concurrency`: prompts per step, or sequences that decode together. Joules: boards of all GPUs of the replica, waiting included.
    """

    deployment: Deployment
    workload: Workload
    role: str
    concurrency: int
    latency_s: Range
    requests_per_s: Range
    joules_per_request: Range
    time_shares: Mapping[Origin, float]
    energy_shares: Mapping[Origin, float]
    load: float = 1.0
    limit: str = ""
    mix: Mix = field(default=(), compare=False, repr=False)


def prefill_pool(steps: Steps, workload: Workload, loads: Sequence[float] = LOADS) -> list[PoolPoint]:
    """One prefill replica under rising load, prompts arriving at random (Poisson). Empty when the weights and one prompt do not fit.

    Long prompts are computed one after another: the queue with equal service times, s (1 + load/(2 (1 - load))). Of prompts that are
    shorter than half the budget of a step it takes all that came during the step before.
    """
    d = steps.deployment
    if steps.cache_bytes(workload.isl) > d.chip.memory_bytes * d.memory_share - steps.weight_bytes:
        return []
    most = max(1, workload.chunk_tokens // workload.new_tokens)
    return [_alone(steps, workload, load) if most == 1 else _together(steps, workload, load, most) for load in loads]


def _alone(steps: Steps, w: Workload, load: float) -> PoolPoint:
    """Who waits behind whom, and: the last step of a prompt is filled up with the next prompt, if there is one by then."""
    mix = prompt_mix(steps, w)
    service_s = sum((step.us * (count * 1e-6) for count, step in mix), ZERO)
    whole = math.ceil(w.new_tokens / w.chunk_tokens)
    filled = min(1.0, whole * w.chunk_tokens / w.new_tokens - 1) * load * (1 - (1 - load) / whole)
    return _prefilling(steps, w, 1, mix, load, service_s * (1 + load / (2 * (1 - load)) + filled), service_s * (1 / load))


def _together(steps: Steps, w: Workload, load: float, most: int) -> PoolPoint:
    """At `load` times the prompts per second that steps of `most` prompts reach.

    A step begins with all that came during the last one (x on average), or with the first that comes: x + exp(-x) prompts. A prompt
    waits for the rest of a step (half), then for its own step, in which others are too; near the limit also for what did not fit.
    """

    def step_of(prompts: float) -> tuple[Mix, Range]:
        low = 2 ** int(math.log2(prompts))
        high = min(2 * low, most)
        share = (prompts - low) / (high - low) if high > low else 0.0
        pair = [(1 - share, steps.prefill(w.new_tokens, w.cached_tokens, low)), (share, steps.prefill(w.new_tokens, w.cached_tokens, high))]
        mix = tuple((part, step) for part, step in pair if part > 0)
        return mix, sum((step.us * (part * 1e-6) for part, step in mix), ZERO)

    _, full_s = step_of(most)
    rate = load * most / full_s.mid
    prompts = 1.0
    for _ in range(50):
        came = rate * step_of(prompts)[1].mid
        change = 0.5 * (min(float(most), came + math.exp(-came)) - prompts)
        prompts += change
        if abs(change) < SETTLED:
            break
    mix, step_s = step_of(prompts)
    busy = min(1.0, rate * step_s.mid / prompts)
    _, own_s = step_of(min(float(most), 1 + busy * came))
    latency_s = step_s * (busy / 2) + own_s + full_s * (busy * busy * load / (2 * (1 - load)) / most)
    return _prefilling(
        steps, w, round(prompts), tuple((part / prompts, step) for part, step in mix), busy, latency_s, full_s * (1 / (load * most))
    )


def _prefilling(steps: Steps, w: Workload, prompts: int, mix: Mix, load: float, latency_s: Range, request_s: Range) -> PoolPoint:
    """`request_s`: between two requests at this load."""
    tp = steps.deployment.tp
    work_s = sum((step.us * (count * 1e-6) for count, step in mix), ZERO)
    idle = idle_joules(steps, work_s * max(0.0, 1 / (load * w.utilisation) - 1))
    return PoolPoint(
        steps.deployment,
        w,
        "prefill",
        prompts,
        latency_s=latency_s,
        requests_per_s=inverse(request_s),
        joules_per_request=energy(mix) * tp + idle,
        time_shares=shares(mix, energy=False),
        energy_shares=shares(mix, energy=True, modelled=idle.mid / tp),
        load=load,
        mix=mix,
    )


def decode_pool(steps: Steps, workload: Workload, concurrencies: Sequence[int] | None = None) -> list[PoolPoint]:
    """One decode replica by the sequences that it decodes together; the first token of each comes from elsewhere.

    Empty when not one sequence fits, or nothing is decoded.
    """
    w, tp = workload, steps.deployment.tp
    most = most_concurrent(steps, w)
    found = []
    wanted = grid(most) if concurrencies is None else sorted({n for n in concurrencies if 1 <= n <= most})
    for n in wanted if w.decode_steps else []:
        step = decode_step(steps, w, n)
        mix = ((w.decode_steps / n, step),)
        request_s = step.us * (1e-6 * w.decode_steps / n)
        idle = idle_joules(steps, request_s * (1 / w.utilisation - 1))
        found.append(
            PoolPoint(
                steps.deployment,
                w,
                "decode",
                n,
                latency_s=step.us * (1e-6 * w.decode_steps / (w.osl - 1)),
                requests_per_s=inverse(request_s),
                joules_per_request=energy(mix) * tp + idle,
                time_shares=shares(mix, energy=False),
                energy_shares=shares(mix, energy=True, modelled=idle.mid / tp),
                limit="memory" if n == most < most_scheduled(w) else "",
                mix=mix,
            )
        )
    return found


def prompt_mix(steps: Steps, w: Workload) -> Mix:
    """The steps that compute one prompt, a long one in chunks (each behind the mean of what is before it)."""
    if w.new_tokens <= w.chunk_tokens:
        return ((1.0, steps.prefill(w.new_tokens, w.cached_tokens)),)
    whole, rest = divmod(w.new_tokens, w.chunk_tokens)
    before = w.cached_tokens + (whole - 1) * w.chunk_tokens // 2
    found: Mix = ((float(whole), steps.prefill(w.chunk_tokens, before)),)
    return (*found, (1.0, steps.prefill(rest, w.isl - rest))) if rest else found
