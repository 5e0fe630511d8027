"""An engine that batches in flight, simulated step by step: what the closed formulas of harness/cost are held against."""

from __future__ import annotations

import collections
import random
from collections.abc import Callable
from dataclasses import dataclass, field

from klab.harness.cost.estimate import Estimate, Origin
from klab.harness.cost.ranges import Range
from klab.harness.cost.steps import Part, StepCost


@dataclass
class Request:
    arrived_s: float
    prompt: int  # tokens of it that are still to be computed
    cached: int
    wanted: int
    made: int = 0
    first_s: float = 0.0
    steps: int = 0


@dataclass(frozen=True)
class Law:
    """Microseconds of a step: weights once, a price per token, per pair of a new token and a key, per key read in decode."""

    floor: float = 12_000.0
    token: float = 60.0
    pair: float = 0.0012
    key: float = 0.025
    host: float = 300.0

    def us(self, prompts: list[tuple[int, int]], decoding: int, context: float, width: int = 1) -> float:
        """`prompts`: (new tokens, tokens before them)."""
        tokens = decoding * width + sum(new for new, _ in prompts)
        pairs = sum(new * (before + new / 2) for new, before in prompts)
        return self.host + max(self.floor, self.token * tokens) + self.pair * pairs + self.key * decoding * context


class LawSteps:
    """Stands for cost.Steps: steps by a Law, of which a share is doubt."""

    def __init__(self, deployment, law: Law = Law(), doubt: float = 0.0) -> None:
        self.deployment, self.law, self.doubt = deployment, law, doubt
        self.weight_bytes = 0.0

    def cache_bytes(self, context):
        return 0.0

    def _cost(self, phase, tokens, us):
        us = Range(us * (1 - self.doubt), us, us * (1 + self.doubt))
        return StepCost(phase, tokens, (Part("all", "all", "", 1, Estimate(us, Origin.MEASURED, "", us * 500e-6, Origin.MEASURED)),))

    def prefill(self, new, prefix=0, batch=1):
        return self._cost("prefill", new * batch, self.law.us([(new, prefix)] * batch, 0, 0))

    def decode(self, batch, context, q_len=1):
        return self._cost("decode", batch * q_len, self.law.us([], batch, context, q_len))

    def mixed(self, new, prefix, batch, context, q_len=1, prompts=1):
        return self._cost("mixed", new * prompts + batch * q_len, self.law.us([(new, prefix)] * prompts, batch, context, q_len))


@dataclass
class Seen:
    """Means of a simulation after its warm-up."""

    ttft_s: float
    tpot_s: float
    requests_per_s: float
    gpu_s_per_request: float
    steps: collections.Counter = field(default_factory=collections.Counter)


def simulate(
    workload, concurrency: int, law: Law, *, requests: int = 2000, spread: float = 0.2, prompt_spread: float = 0.0, seed: int = 1,
    draft: Callable[[int, float], float] | None = None,
) -> Seen:  # fmt: skip
    """`concurrency` clients, each sending its next request when the last one ended, until `requests` have ended.

    A step takes every decoding sequence, then prompts in order of arrival as far as the budget goes. Lengths vary evenly by +-`spread`.
    """
    rng = random.Random(seed)

    def request(now: float, left: float = 1.0) -> Request:
        size = workload.isl * (1 + prompt_spread * rng.uniform(-1, 1))
        cached = int(workload.prefix_hit * size)
        return Request(now, max(1, round(size) - cached), cached, max(1, round(left * workload.osl * (1 + spread * rng.uniform(-1, 1)))))

    now, width = 0.0, workload.draft_tokens + 1
    # The first requests end one after another, so that the steady state need not be waited for.
    queue = collections.deque(request(0.0, rng.random()) for _ in range(concurrency))
    running: list[Request] = []
    ended: list[tuple[Request, float]] = []
    busy_s, steps, begin = 0.0, collections.Counter(), (0.0, 0)
    while len(ended) < requests:
        left = max(0, workload.chunk_tokens - width * len(running))
        pieces, done = [], []
        while queue and left:
            first = queue[0]
            new = min(left, first.prompt)
            pieces.append((new, first.cached))
            first.prompt, first.cached, left = first.prompt - new, first.cached + new, left - new
            if not first.prompt:
                done.append(queue.popleft())
        context = sum(r.cached + r.made for r in running) / len(running) if running else 0.0
        us = law.us(pieces, len(running), context, width)
        if running and workload.draft_tokens:
            us += workload.draft_tokens * workload.draft_cost * law.us([], len(running), context)
        now += us * 1e-6
        busy_s += us * 1e-6
        steps["mixed" if pieces else "decode"] += 1
        still, fresh = [], []
        for r in running:
            made = 1
            while made < width and rng.random() < workload.acceptance:
                made += 1
            r.made += made
            r.steps += 1
            if r.made >= r.wanted:
                ended.append((r, now))
                fresh.append(request(now))
            else:
                still.append(r)
        for r in done:
            r.first_s, r.made = now, 1
            if r.wanted <= 1:
                ended.append((r, now))
                fresh.append(request(now))
            else:
                still.append(r)
        running = still
        queue.extend(fresh)
        if len(ended) >= requests // 4 and not begin[1]:
            begin = (now, len(ended))
            busy_s, steps = 0.0, collections.Counter()
    counted = ended[begin[1] :]
    generated = [(r, end) for r, end in counted if r.wanted > 1]
    return Seen(
        sum(r.first_s - r.arrived_s for r, _ in counted) / len(counted),
        sum((end - r.first_s) / (r.wanted - 1) for r, end in generated) / len(generated) if generated else 0.0,
        (len(ended) - begin[1]) / (now - begin[0]),
        busy_s / (len(ended) - begin[1]),
        steps,
    )


def simulate_prefill(workload, requests_per_s: float, law: Law, *, requests: int = 2000, seed: int = 1) -> Seen:
    """A replica that only prefills, prompts arriving at random."""
    rng = random.Random(seed)
    arrivals, at = [], 0.0
    for _ in range(requests):
        at += rng.expovariate(requests_per_s)
        arrivals.append(at)
    now = busy_s = waited_s = 0.0
    queue: collections.deque[list[float]] = collections.deque()
    came = ended = 0
    while ended < requests:
        if not queue:
            now = max(now, arrivals[came])
        while came < requests and arrivals[came] <= now:
            queue.append([arrivals[came], workload.new_tokens, workload.cached_tokens])
            came += 1
        left, pieces, done = workload.chunk_tokens, [], []
        while queue and left:
            first = queue[0]
            new = int(min(left, first[1]))
            pieces.append((new, int(first[2])))
            first[1], first[2], left = first[1] - new, first[2] + new, left - new
            if not first[1]:
                done.append(queue.popleft()[0])
        step_s = law.us(pieces, 0, 0) * 1e-6
        now, busy_s = now + step_s, busy_s + step_s
        waited_s += sum(now - arrived for arrived in done)
        ended += len(done)
    return Seen(waited_s / requests, 0.0, requests / now, busy_s / requests)
