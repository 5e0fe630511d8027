"""Replay of a closed-loop benchmark: so many requests in flight from the first moment on, on an engine whose steps cost what Steps says.

What the published figures are measured by. A steady state knows no start, where all prompts wait for one another; this does, so the two
together tell what of an error comes from the kernels and what from the formulas.
"""

from __future__ import annotations

import bisect
import heapq
import math
import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache

from klab.harness.cost.steps import PER_SEQUENCE, StepCost, Steps

# Points between which a step's time is taken linearly: steps of a fixed share in tokens and in keys.
GRID_GROWTH = 2.0


@dataclass(frozen=True)
class Benchmark:
    """`waves` x `concurrency` requests, lengths drawn evenly between `shortest` and 1 of the nominal ones; `seed` draws them.

    `chunk_tokens`: at most so many tokens per step. `whole_prompts`: a prompt is not cut (TensorRT-LLM without chunked context).
    `prefill_alone`: a step is either prompts or decoding, prompts first (SGLang); otherwise both ride together (vLLM, TensorRT-LLM).
    `intake_s`: seconds that the server takes to read a request before it can be scheduled, one after another.
    """

    isl: int
    osl: int
    concurrency: int
    shortest: float = 1.0
    waves: int = 10
    chunk_tokens: int = 8192
    whole_prompts: bool = False
    prefill_alone: bool = False
    intake_s: float = 0.0
    seed: int = 0


@dataclass(frozen=True)
class Replayed:
    """Means over all requests, in seconds, as the benchmarks report them; `seconds` from the first request to the last token."""

    ttft_s: float
    tpot_s: float
    requests_per_s: float
    seconds: float
    in_flight: int


class StepTimes:
    """Seconds of any step of a deployment, from few steps that are planned: linear between grid points."""

    def __init__(self, steps: Steps, host_us: float = 0.0) -> None:
        self.steps, self.host_us = steps, host_us
        self._heap = cache(lambda tokens: _rest(steps.prefill(tokens)))
        self._prompt = cache(lambda tokens: _per_sequence(steps.prefill(tokens)))
        self._decode_rest = cache(lambda batch: _rest(steps.decode(batch, 1024)))
        self._decode_own = cache(lambda batch, context: _per_sequence(steps.decode(batch, context)))

    def decode_s(self, batch: int, context: float) -> float:
        """One step of `batch` sequences with `context` keys each, on average."""
        return (self._decoding_us(batch, context) + self.host_us) * 1e-6

    def mixed_s(self, prompts: list[tuple[int, int]], batch: int, context: float) -> float:
        """One step with the `prompts` (new tokens, tokens before them) beside `batch` sequences that decode."""
        new = sum(tokens for tokens, _ in prompts)
        us = self._heap_us(new + batch) - (self._heap_us(batch) - self._decoding_us(batch, context) if batch else 0.0)
        return (us + sum(self._prompt_us(before + tokens) - self._prompt_us(before) for tokens, before in prompts) + self.host_us) * 1e-6

    def _decoding_us(self, batch: int, context: float) -> float:
        own = _between(batch, lambda b: _between(context, lambda keys: self._decode_own(b, keys)))
        return _between(batch, self._decode_rest) + own

    def _heap_us(self, tokens: int) -> float:
        return _between(tokens, self._heap)

    def _prompt_us(self, tokens: int) -> float:
        """Attention over a whole prompt; a piece of one costs the difference of two of them."""
        return _between(tokens, self._prompt) if tokens else 0.0


@dataclass
class _Engine:
    """The state of a replay: who decodes (by the decode step at which he ends), who waits, the clock."""

    bench: Benchmark
    times: StepTimes
    in_flight: int
    now: float = 0.0
    step: int = 0
    keys: float = 0.0
    running: list[tuple[int, float, int, int]] = field(default_factory=list)  # ends at step, first token at, osl, keys at the end
    coming: deque[tuple[float, float, int, int]] = field(default_factory=deque)  # read at, sent at, isl, osl
    waiting: deque[list[float]] = field(default_factory=deque)  # sent at, isl, osl, tokens done
    ttft: list[float] = field(default_factory=list)
    tpot: list[float] = field(default_factory=list)

    def admit(self) -> list[tuple[int, int]]:
        """Tokens of the waiting that the next step takes; those whose prompt is done by it are still in front of the queue."""
        bench, room = self.bench, self.in_flight - len(self.running)
        budget = bench.chunk_tokens - (0 if bench.prefill_alone else len(self.running))
        taken: list[tuple[int, int]] = []
        for one in self.waiting:
            if budget <= 0 or len(taken) == room:
                break
            left = int(one[1] - one[3])
            if bench.whole_prompts and left > budget and taken:
                break
            now = left if bench.whole_prompts else min(left, budget)
            taken.append((now, int(one[3])))
            one[3] += now
            budget -= now
        return taken

    def run(self, requests: deque[tuple[int, int]]) -> None:
        """Until nobody is left."""
        for _ in range(min(self.bench.concurrency, len(requests))):
            self.next(requests)
        while self.running or self.waiting or self.coming:
            if not self.running and not self.waiting:
                self.now = max(self.now, self.coming[0][0])
            while self.coming and self.coming[0][0] <= self.now:
                _, sent, isl, osl = self.coming.popleft()
                self.waiting.append([sent, float(isl), float(osl), 0.0])
            prompts = self.admit() if self.waiting and len(self.running) < self.in_flight else []
            batch, context = len(self.running), self.keys / max(1, len(self.running))
            if not prompts:
                self.decode(batch, context, requests)
            elif self.bench.prefill_alone or not batch:
                self.now += self.times.mixed_s(prompts, 0, 0.0)
                self.first_tokens(requests)
            else:
                self.now += self.times.mixed_s(prompts, batch, context + 1)
                self.advance(1, requests)
                self.first_tokens(requests)

    def decode(self, batch: int, context: float, requests: deque[tuple[int, int]]) -> None:
        """Steps without prompts, until a sequence ends or a request is there that can be let in."""
        count = self.running[0][0] - self.step
        if self.coming and batch < self.in_flight:
            left = self.coming[0][0] - self.now
            count = min(count, max(1, math.ceil(left / self.times.decode_s(batch, context + 1))))
            # Contexts grow, so steps take longer than the first: fewer of them may do.
            while count > 1 and (count - 1) * self.times.decode_s(batch, context + count / 2) >= left:
                count -= 1
        self.now += count * self.times.decode_s(batch, context + (count + 1) / 2)
        self.advance(count, requests)

    def advance(self, count: int, requests: deque[tuple[int, int]]) -> None:
        """`count` decode steps have passed."""
        self.step += count
        self.keys += count * len(self.running)
        while self.running and self.running[0][0] <= self.step:
            _, first, osl, keys = heapq.heappop(self.running)
            self.keys -= keys
            self.tpot.append((self.now - first) / (osl - 1))
            self.next(requests)

    def first_tokens(self, requests: deque[tuple[int, int]]) -> None:
        """Prompts that are done give their first token."""
        while self.waiting and self.waiting[0][3] >= self.waiting[0][1]:
            arrived, isl, osl, _ = self.waiting.popleft()
            self.ttft.append(self.now - arrived)
            if osl > 1:
                heapq.heappush(self.running, (self.step + int(osl) - 1, self.now, int(osl), int(isl + osl)))
                self.keys += isl + 1
            else:
                self.next(requests)

    def next(self, requests: deque[tuple[int, int]]) -> None:
        """The client sends another one as soon as one is done."""
        if requests:
            isl, osl = requests.popleft()
            free = max(self.now, self.coming[-1][0] if self.coming else 0.0)
            self.coming.append((free + self.bench.intake_s, self.now, isl, osl))


def replay(bench: Benchmark, times: StepTimes) -> Replayed | None:
    """The benchmark on that engine; None when the memory holds not even one request."""
    steps = times.steps
    in_flight = min(bench.concurrency, steps.most_sequences(bench.isl + bench.osl))
    if in_flight < 1:
        return None
    draw = random.Random(bench.seed)
    requests = deque(
        (draw.randint(max(1, int(bench.isl * bench.shortest)), bench.isl), draw.randint(max(1, int(bench.osl * bench.shortest)), bench.osl))
        for _ in range(bench.waves * bench.concurrency)
    )
    engine, count = _Engine(bench, times, in_flight), len(requests)
    engine.run(requests)
    tpot = sum(engine.tpot) / len(engine.tpot) if engine.tpot else 0.0
    return Replayed(sum(engine.ttft) / count, tpot, count / engine.now, engine.now, in_flight)


def _rest(cost: StepCost) -> float:
    return sum(part.us.mid for part in cost.parts if part.operator not in PER_SEQUENCE)


def _per_sequence(cost: StepCost) -> float:
    return sum(part.us.mid for part in cost.parts if part.operator in PER_SEQUENCE)


@cache
def _grid() -> list[int]:
    found = [1]
    while found[-1] < 2_000_000:
        found.append(max(found[-1] + 1, math.ceil(found[-1] * GRID_GROWTH)))
    return found


def _between(size: float, of: Callable[[int], float]) -> float:
    """Linear between the grid points around `size`."""
    grid = _grid()
    at = bisect.bisect_left(grid, size)
    if at == 0 or grid[at] == size:
        return of(grid[at])
    low, high = grid[at - 1], grid[at]
    share = (size - low) / (high - low)
    return (1 - share) * of(low) + share * of(high)
