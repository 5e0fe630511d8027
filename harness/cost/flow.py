"""Flow: how prompts and generated tokens share the steps of an engine that batches in flight, in steady state."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property, lru_cache

from klab.harness.cost.workload import Workload

# Shares below this of what one request needs are rounding.
NOTHING = 1e-6


@dataclass(frozen=True)
class Kind:
    """A kind of step: which share of all steps it is, the prompts that it carries (`new` tokens of each) and the sequences that decode."""

    share: float
    prompts: int
    new: int
    decoding: float


@dataclass(frozen=True)
class Flow:
    """The steady state with `concurrency` requests in flight, counted in steps: it does not depend on how long a step takes.

    `requests`: finished per step; `waiting`: steps from a request's arrival to its first token; `mixed`: share of the steps that carry
    prompts; `budget`: tokens of prompts that fit into one; `busy`: share of the budget that is used.
    """

    workload: Workload
    concurrency: int
    requests: float
    waiting: float
    mixed: float
    budget: float
    busy: float

    @property
    def prompting(self) -> float:
        """Requests without a first token, on average over the steps (Little's law)."""
        return self.requests * self.waiting

    @cached_property
    def kinds(self) -> tuple[Kind, ...]:
        """The steps by what they carry. Over all of them, prompts and sequences add up to what arrives: nothing is lost in rounding."""
        steps = self._packed() if self.budget >= self.workload.new_tokens else self._cut()
        alone = Kind(1 - self.mixed, 0, 0, float(self.concurrency))
        return (
            *(kind for kind in steps if kind.share > NOTHING * self.requests),
            *([alone] if alone.share > NOTHING * self.requests else []),
        )

    def _cut(self) -> tuple[Kind, Kind]:
        """Prompts longer than the budget: full steps, and steps with a prompt's rest, in which nobody waits unless all steps are full."""
        new, n = self.workload.new_tokens, self.concurrency if self.workload.decode_steps else 0
        full = min(self.mixed, self.requests * math.floor(new / self.budget))
        rest = max(0.0, self.mixed - full)
        tokens = (self.requests * new - full * self.budget) / rest if rest > NOTHING * self.requests else 0.0
        there = (1 - self.busy) + self.busy * self.prompting / self.mixed
        before = (self.prompting - rest * there) / full
        return Kind(full, 1, round(self.budget), max(0.0, n - before)), Kind(rest, 1, max(1, round(tokens)), max(0.0, n - there))

    def _packed(self) -> tuple[Kind, Kind]:
        """Prompts of which several fit: two kinds of steps, with prompts of the mean and about the spread of chance arrivals."""
        new, n = self.workload.new_tokens, self.concurrency if self.workload.decode_steps else 0
        mean = self.requests / self.mixed
        spread = math.sqrt(max(0.0, mean * (1 + (1 - 1 / self.concurrency) * self.requests) - mean * mean))
        few = max(1, math.floor(mean - spread + NOTHING))
        many = max(few, min(math.ceil(mean + spread - NOTHING), math.ceil(self.budget / new)), math.ceil(mean - NOTHING))
        share = (mean - few) / (many - few) if many > few else 0.0
        behind = max(0.0, self.prompting - self.requests) / self.mixed
        return tuple(  # type: ignore[return-value]
            Kind(self.mixed * part, count, new, max(0.0, n - behind - count)) for part, count in ((1 - share, few), (share, many))
        )


@lru_cache(maxsize=64)
def flows(workload: Workload, most: int) -> tuple[Flow, ...]:
    """The steady state for 1 to `most` requests in flight, each replaced when it ends (a benchmark's fixed concurrency).

    A step takes `chunk_tokens` tokens: first all decoding sequences, then prompts in order of arrival, cut to what is left. Requests go
    round between two stations: decode, where nobody waits (`decode_steps` steps), and the prompts' share of the budget, a server that
    needs new tokens / what is left steps per prompt. Mean value analysis (Reiser and Lavenberg 1980), with the residual of a server whose
    service times are alike (half), gives waiting times one request more at a time. Prompts start and end with steps, so one that finds
    the server free takes whole steps.
    """
    steps, new, width = workload.decode_steps, workload.new_tokens, workload.draft_tokens + 1
    # A request takes this share of the budget of a step, for its prompt and its decoding: no more of them end than fill all steps.
    share = (new + width * steps) / workload.chunk_tokens
    least = max(1.0, new / share)
    found: list[Flow] = []
    queued = busy = decoding = 0.0
    for n in range(1, most + 1):
        budget = max(least, workload.chunk_tokens - width * decoding)
        service = new / budget
        whole = math.ceil(service)
        wait = service * max(0.0, queued - busy) + busy * service / 2
        response = max(1.0, wait + (1 - busy) * whole + busy * (service + 0.5))
        requests = min(n / (steps + response), 1 / service, 1 / share)
        response = n / requests - steps
        busy = min(1.0, requests * service)
        queued = requests * (response - (1 - busy) * (whole - service) - busy / 2)
        decoding = requests * steps
        chance = 1 - (1 - min(1.0, requests / n)) ** n
        used = requests * ((1 - busy) * whole + busy * service) if whole > 1 else busy
        mixed = min(1.0, max(used, chance), n - decoding) if steps else 1.0
        found.append(Flow(workload, n, requests, response, mixed, budget, busy))
    return tuple(found)
