"""Serving: what a replica that batches in flight gives its users and takes of its GPUs, from one request at a time to a full memory."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from klab.harness.cost.estimate import Labelled, Origin
from klab.harness.cost.flow import Flow, Kind, flows
from klab.harness.cost.mix import (
    MOST_REQUESTS,
    Mix,
    decode_step,
    drafting,
    energy,
    grid,
    idle_joules,
    inverse,
    most_concurrent,
    most_scheduled,
    shares,
)
from klab.harness.cost.pools import PoolPoint, decode_pool, prefill_pool
from klab.harness.cost.ranges import ZERO, Range
from klab.harness.cost.steps import StepCost, Steps
from klab.harness.cost.workload import Deployment, Workload

__all__ = [
    "OperatingPoint", "PoolPoint", "decode_pool", "front", "meets", "most_concurrent", "nearest", "operating_points", "prefill_pool",
]  # fmt: skip

# Share of the steps' prompt budget above which prompts are what stops a replica.
FULL = 0.97
# Numbers of requests closer to one another than this share are not told apart.
CLOSE = 0.03


@dataclass(frozen=True)
class OperatingPoint(Labelled):
    """A replica in steady state with `concurrency` requests in flight.

    Latencies are means over requests, as `concurrency` clients see them who each send the next request when one ends; TTFT includes the
    wait for the prompts before it. `requests_per_s` is at full load. `joules_per_request`: boards of all GPUs of the replica, and what
    they draw while they wait where `utilisation` is below 1 (`idle_joules_per_request`, a part of it). `prefill_share`: of the GPU
    time, what prompts add to the steps; `prefill_s`: the same in seconds per request (None: that share of them). `limit`: what stops
    more requests in flight ("memory"; "chunk": the tokens of a step; "prefill": the prompts fill every step; "slo_ttft", "slo_tpot"; ""
    for nothing yet). `mix`: the steps that one request pays for, and how many of each.
    """

    deployment: Deployment
    workload: Workload
    concurrency: int
    ttft_s: Range
    tpot_s: Range
    requests_per_s: Range
    joules_per_request: Range
    prefill_share: float
    time_shares: Mapping[Origin, float]
    energy_shares: Mapping[Origin, float]
    limit: str = ""
    idle_joules_per_request: Range = ZERO
    mix: Mix = field(default=(), compare=False, repr=False)
    prefill_s: Range | None = None

    @property
    def output_tokens_per_s_per_gpu(self) -> Range:
        """Generated tokens at full load."""
        return self.requests_per_s * (self.workload.osl / self.deployment.tp)

    @property
    def total_tokens_per_s_per_gpu(self) -> Range:
        """Prompt (cached ones included) and generated tokens at full load."""
        return self.requests_per_s * ((self.workload.isl + self.workload.osl) / self.deployment.tp)

    @property
    def tokens_per_s_per_user(self) -> Range:
        """1 / TPOT; infinite where nothing is generated."""
        return inverse(self.tpot_s)

    @property
    def end_to_end_s(self) -> Range:
        """From a request's arrival to its last token."""
        return self.ttft_s + self.tpot_s * max(0, self.workload.osl - 1)

    @property
    def power_w(self) -> Range:
        """Of one GPU's board while there is work."""
        busy = Range.of(lambda all_j, idle_j: all_j - idle_j, self.joules_per_request, self.idle_joules_per_request)
        return Range.of(lambda j, s: j / s / self.deployment.tp, busy, inverse(self.requests_per_s))

    def by_operator(self) -> dict[str, Range]:
        """Seconds of the replica's time per request and operator, longest first; "host" is the time between steps."""
        found: dict[str, Range] = {}
        for count, step in self.mix:
            for name, us in [*step.by_operator().items(), ("host", step.host_us)]:
                found[name] = found.get(name, ZERO) + us * (count * 1e-6)
        return dict(sorted(((n, r) for n, r in found.items() if r.high), key=lambda item: -item[1].mid))


def operating_points(steps: Steps, workload: Workload, concurrencies: Sequence[int] | None = None) -> list[OperatingPoint]:
    """The replica at these numbers of requests in flight, rising; without any: a grid up to what fits, and the last that meets the SLOs.

    Numbers that do not fit into memory are left out: an empty list says that not even one request does.
    """
    most = most_concurrent(steps, workload)
    wanted = sorted({n for n in (concurrencies or grid(most)) if 1 <= n <= most})
    replica = Replica(steps, workload, most)
    if concurrencies is None and not workload.offline and (workload.slo_ttft_s or workload.slo_tpot_s):
        wanted = replica.refined(wanted)
    return [replica.point(n) for n in wanted]


class Replica:
    """The operating points of one replica, each worked out once."""

    def __init__(self, steps: Steps, workload: Workload, most: int) -> None:
        self.steps, self.workload, self.most = steps, workload, most
        self._points: dict[int, OperatingPoint] = {}

    def point(self, n: int) -> OperatingPoint:
        """The steady state with n requests in flight."""
        if n not in self._points:
            self._points[n] = self._point(flows(self.workload, self.most)[n - 1])
        return self._points[n]

    def refined(self, wanted: Sequence[int]) -> list[int]:
        """With the largest number that meets the SLOs (within CLOSE), and the one after it that does not, between neighbours of which
        only the first does.
        """
        for low, high in itertools.pairwise(wanted):
            if meets(self.point(low)) and not meets(self.point(high)):
                while high - low > max(1, CLOSE * low):
                    middle = (low + high) // 2
                    low, high = (middle, high) if meets(self.point(middle)) else (low, middle)
                self._points[low] = replace(self.point(low), limit=_broken(self.point(high)))
                return sorted({*wanted, low, high})
        return list(wanted)

    def _point(self, flow: Flow) -> OperatingPoint:
        w, n, tp = self.workload, flow.concurrency, self.steps.deployment.tp
        kinds = [(kind, self._step(kind, n)) for kind in flow.kinds]
        mean_us = sum((step.us * kind.share for kind, step in kinds), ZERO)
        mix = tuple((kind.share / flow.requests, step) for kind, step in kinds)
        # Whoever does not decode in a step waits for its first token: by Little's law shares of requests are shares of latency.
        ttft_us = sum((step.us * (kind.share * (n - kind.decoding) / flow.requests) for kind, step in kinds), ZERO)
        tpot_us = ZERO
        if w.decode_steps:
            tpot_us = sum((step.us * (kind.share * kind.decoding / flow.requests) for kind, step in kinds), ZERO) * (1 / (w.osl - 1))
        request_us = mean_us * (1 / flow.requests)
        idle = idle_joules(self.steps, request_us * (1e-6 * (1 / w.utilisation - 1)))
        plain_us = decode_step(self.steps, w, n).us if w.decode_steps else ZERO
        added_us = [
            Range.of(lambda all_us, us: max(0.0, all_us - us), step.us, plain_us if kind.decoding >= 0.5 else ZERO) * kind.share
            for kind, step in kinds
            if kind.prompts
        ]
        prefill_us = Range.of(min, sum(added_us, ZERO), mean_us)
        point = OperatingPoint(
            self.steps.deployment,
            w,
            n,
            ttft_s=ttft_us * 1e-6,
            tpot_s=tpot_us * 1e-6,
            requests_per_s=inverse(request_us * 1e-6),
            joules_per_request=energy(mix) * tp + idle,
            prefill_share=prefill_us.mid / mean_us.mid,
            time_shares=shares(mix, energy=False),
            energy_shares=shares(mix, energy=True, modelled=idle.mid / tp),
            idle_joules_per_request=idle,
            mix=mix,
            prefill_s=prefill_us * (1e-6 / flow.requests),
        )
        if broken := _broken(point):
            return replace(point, limit=broken)
        if n == self.most and n < MOST_REQUESTS:
            return replace(point, limit="memory" if n < most_scheduled(w) else "chunk")
        return replace(point, limit="prefill" if flow.busy >= FULL else "")

    def _step(self, kind: Kind, n: int) -> StepCost:
        """What such a step takes. Sequences are rounded: to all in flight where nearly all decode, so that steps share what they launch.
        A full step stays full.
        """
        w, batch = self.workload, round(kind.decoding)
        if n - batch <= CLOSE * n:
            batch = n
        if not kind.prompts:
            return decode_step(self.steps, w, batch)
        new, width = kind.new, w.draft_tokens + 1
        if new + batch * width != w.chunk_tokens and abs(new + batch * width - w.chunk_tokens) <= width * (1 + CLOSE * n):
            new = w.chunk_tokens - batch * width
        prefix = w.cached_tokens + max(0, w.new_tokens - new) // 2
        return drafting(self.steps.mixed(new, prefix, batch, w.context, width, kind.prompts), self.steps, w, batch)


def front(points: Sequence[OperatingPoint]) -> list[OperatingPoint]:
    """The points that no other beats in both tokens/s per user and generated tokens/s per GPU, fastest for the user first.

    Where nothing is generated: requests per second against TTFT.
    """
    found: list[OperatingPoint] = []
    for point in sorted(points, key=lambda p: (_latency(p), -_rate(p))):
        if not found or _rate(point) > _rate(found[-1]):
            found.append(point)
    return found


def meets(point: OperatingPoint) -> bool:
    """Whether the SLOs of its workload hold (their middle values); a batch job has none."""
    return not _broken(point)


def nearest(points: Sequence[OperatingPoint]) -> OperatingPoint | None:
    """The point that misses the SLOs by the smallest factor; None without points."""

    def missed(p: OperatingPoint) -> float:
        slos = ((p.ttft_s.mid, p.workload.slo_ttft_s), (p.tpot_s.mid, p.workload.slo_tpot_s))
        return max((seconds / slo for seconds, slo in slos if slo), default=0.0)

    return min(points, key=missed, default=None)


def _broken(point: OperatingPoint) -> str:
    w = point.workload
    if w.offline:
        return ""
    if w.slo_tpot_s and point.tpot_s.mid > w.slo_tpot_s:
        return "slo_tpot"
    return "slo_ttft" if w.slo_ttft_s and point.ttft_s.mid > w.slo_ttft_s else ""


def _latency(point: OperatingPoint) -> float:
    return point.tpot_s.mid or point.ttft_s.mid


def _rate(point: OperatingPoint) -> float:
    return point.requests_per_s.mid / point.deployment.tp
