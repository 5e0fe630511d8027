"""The replay of a closed loop, held against an engine stepped one step at a time."""

from __future__ import annotations

import random
from collections import deque
from dataclasses import dataclass, replace

import pytest

from klab.harness.catalog import find_chip, find_model
from klab.harness.cost.closed_loop import Benchmark, StepTimes, replay
from klab.harness.cost.estimate import Estimator
from klab.harness.cost.steps import Steps
from klab.harness.cost.workload import Deployment


class Made:
    """Times that are sums of terms, and a memory of so many sequences."""

    def __init__(self, most: int = 1000) -> None:
        self.steps, self.most = self, most

    def most_sequences(self, context: int) -> int:
        return self.most

    def decode_s(self, batch: int, context: float) -> float:
        return 1.0 + 0.01 * batch + 0.0001 * batch * context

    def mixed_s(self, prompts: list[tuple[int, int]], batch: int, context: float) -> float:
        whole = sum(new * (1 + 0.001 * (before + new / 2)) for new, before in prompts)
        return 0.5 + 0.05 * whole + 0.02 * len(prompts) + (self.decode_s(batch, context) if batch else 0.0)


@dataclass
class One:
    """A request in the plain engine."""

    isl: int
    osl: int
    sent: float
    ready: float
    done: int = 0
    given: int = 0
    first: float = 0.0


def stepped(b: Benchmark, times: Made) -> tuple[float, float, float]:
    """Mean TTFT, mean TPOT and the end, one step after another, with a plain list of requests and nothing skipped."""
    draw = random.Random(b.seed)
    lens = deque(
        (draw.randint(max(1, int(b.isl * b.shortest)), b.isl), draw.randint(max(1, int(b.osl * b.shortest)), b.osl))
        for _ in range(b.waves * b.concurrency)
    )
    now, last_ready = 0.0, 0.0
    there: list[One] = []
    ttft, tpot = [], []

    def send() -> None:
        nonlocal last_ready
        if lens:
            last_ready = max(now, last_ready) + b.intake_s
            there.append(One(*lens.popleft(), now, last_ready))

    for _ in range(b.concurrency):
        send()
    while there:
        decoding = [one for one in there if one.given]
        waiting = [one for one in there if not one.given and one.ready <= now]
        budget = b.chunk_tokens - (0 if b.prefill_alone else len(decoding))
        taken: list[tuple[One, int]] = []
        for one in waiting:
            if len(decoding) + len(taken) >= min(b.concurrency, times.most) or budget <= 0:
                break
            left = one.isl - one.done
            if b.whole_prompts and left > budget and taken:
                break
            new = left if b.whole_prompts else min(left, budget)
            taken.append((one, new))
            budget -= new
        if not decoding and not taken:
            now = min(one.ready for one in there)
            continue
        alone = b.prefill_alone and taken
        batch = 0 if alone else len(decoding)
        keys = sum(one.isl + one.given for one in decoding) / max(1, len(decoding))
        prompts = [(new, one.done) for one, new in taken]
        if not prompts:
            now += times.decode_s(batch, keys + 1)
        else:
            now += times.mixed_s(prompts, batch, keys + 1 if batch else 0.0)
        gone = []
        for one in decoding if not alone else []:
            one.given += 1
            if one.given == one.osl:
                tpot.append((now - one.first) / (one.osl - 1))
                gone.append(one)
        for one, new in taken:
            one.done += new
            if one.done == one.isl:
                one.given, one.first = 1, now
                ttft.append(now - one.sent)
                if one.osl == 1:
                    gone.append(one)
        for one in gone:
            there.remove(one)
            send()
    return sum(ttft) / len(ttft), sum(tpot) / len(tpot) if tpot else 0.0, now


BASE = Benchmark(isl=40, osl=30, concurrency=5, shortest=0.5, waves=4, chunk_tokens=32)
VARIANTS = {
    "mixed": BASE,
    "whole prompts": replace(BASE, whole_prompts=True, chunk_tokens=64),
    "prompts alone": replace(BASE, prefill_alone=True, chunk_tokens=100),
    "all alike": replace(BASE, shortest=1.0),
    "slow intake": replace(BASE, intake_s=7.0, seed=3),
    "one user": replace(BASE, concurrency=1),
    "one token": replace(BASE, osl=1, shortest=1.0),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_replay_is_the_engine_stepped_one_by_one(name: str) -> None:
    bench, times = VARIANTS[name], Made()
    found = replay(bench, times)  # type: ignore[arg-type]
    assert found is not None
    ttft, tpot, end = stepped(bench, times)
    # Decode steps between two events are taken at the mean of their contexts: exact, for a time that is linear in them.
    assert found.ttft_s == pytest.approx(ttft, rel=1e-9)
    assert found.tpot_s == pytest.approx(tpot, rel=1e-9)
    assert found.seconds == pytest.approx(end, rel=1e-9)


def test_memory_keeps_requests_waiting() -> None:
    free, full = replay(BASE, Made()), replay(BASE, Made(most=2))  # type: ignore[arg-type]
    assert free and full
    assert full.in_flight == 2
    assert full.ttft_s > 2 * free.ttft_s
    ttft, tpot, _ = stepped(BASE, Made(most=2))
    assert (full.ttft_s, full.tpot_s) == (pytest.approx(ttft), pytest.approx(tpot))
    assert replay(BASE, Made(most=0)) is None  # type: ignore[arg-type]


def test_requests_in_flight_are_rate_times_stay() -> None:
    bench = replace(BASE, waves=60, shortest=1.0, osl=20)
    found = replay(bench, Made())  # type: ignore[arg-type]
    assert found
    stay = found.ttft_s + (bench.osl - 1) * found.tpot_s
    assert found.requests_per_s * stay == pytest.approx(bench.concurrency, rel=0.03)  # the ends of the run are not full


def test_times_of_steps_are_those_of_the_plan() -> None:
    chip = find_chip("h200")
    steps = Steps(Deployment(find_model("qwen3-8b"), chip), Estimator(chip))
    times = StepTimes(steps, host_us=100.0)
    assert times.decode_s(28, 1066) == pytest.approx((steps.decode(28, 1066).us.mid + 100) * 1e-6, rel=0.02)
    assert times.decode_s(20, 1300) == pytest.approx((steps.decode(20, 1300).us.mid + 100) * 1e-6, rel=0.05)
    assert times.mixed_s([(3000, 0)], 0, 0) == pytest.approx((steps.prefill(3000).us.mid + 100) * 1e-6, rel=0.05)
    assert times.mixed_s([(2000, 4000)], 20, 1300) == pytest.approx((steps.mixed(2000, 4000, 20, 1300).us.mid + 100) * 1e-6, rel=0.05)
    two, one = times.mixed_s([(1000, 0), (1000, 0)], 0, 0), times.mixed_s([(2000, 0)], 0, 0)
    assert two < one  # two short prompts attend to less than a long one
