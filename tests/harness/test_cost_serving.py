"""Serving: the closed formulas against a simulated engine, the laws they must keep, and what memory and SLOs stop."""

import dataclasses
import itertools
import math

import pytest
from engine_simulation import LawSteps, simulate, simulate_prefill

from klab.harness.catalog import find_chip, find_model
from klab.harness.cost.estimate import Estimator, Origin
from klab.harness.cost.flow import flows
from klab.harness.cost.mix import MOST_REQUESTS, grid, most_concurrent, most_scheduled
from klab.harness.cost.ranges import Range
from klab.harness.cost.serving import decode_pool, front, meets, nearest, operating_points, prefill_pool
from klab.harness.cost.speculation import least_acceptance
from klab.harness.cost.steps import Steps
from klab.harness.cost.workload import Deployment, Workload

H200 = find_chip("h200")
LLAMA = Deployment(find_model("llama-3.1-8b"), H200)
LAW = LawSteps(LLAMA)
CHAT, LONG = Workload(isl=1024, osl=256), Workload(isl=8192, osl=1024)


def modelled(name="llama-3.1-8b", tp=1, **fields):
    return Steps(Deployment(find_model(name), H200, tp, **fields), Estimator(H200))


def at(workload, n, steps=LAW):
    return operating_points(steps, workload, [n])[0]


# (workload, requests in flight, how far TTFT may be off: where requests queue the tail of a few hundred is not the mean)
SIMULATED = [
    (LONG, 1, 0.02), (LONG, 16, 0.08), (LONG, 64, 0.05), (Workload(isl=8192, osl=256), 64, 0.08),  # one prompt fills a step
    (CHAT, 4, 0.08), (CHAT, 64, 0.10), (Workload(isl=256, osl=32), 128, 0.08),  # prompts come together
    (Workload(isl=128, osl=512), 128, 0.05),
    (Workload(isl=16000, osl=200), 16, 0.12), (Workload(isl=16000, osl=200), 128, 0.05),  # chunks; more than the prompts' budget serves
    (Workload(isl=4000, osl=200, chunk_tokens=2048), 32, 0.15),
    (Workload(isl=8192, osl=512, prefix_hit=0.8), 64, 0.10),
    (Workload(isl=1024, osl=512, draft_tokens=3, acceptance=0.6), 64, 0.10),
    (Workload(isl=500, osl=1), 64, 0.03),  # nothing is decoded
    (Workload(isl=100, osl=200, chunk_tokens=32), 32, 0.05), (Workload(isl=16, osl=500, chunk_tokens=128), 128, 0.15),  # decoding fills it
]  # fmt: skip


@pytest.mark.parametrize(("workload", "n", "ttft_off"), SIMULATED)
def test_the_formulas_say_what_a_simulated_engine_does(workload, n, ttft_off):
    point = at(workload, n)
    seen = simulate(workload, n, LAW.law, requests=max(150, (20 if workload.isl == 16000 else 6) * n), spread=0.3, prompt_spread=0.2)
    assert point.requests_per_s.mid == pytest.approx(seen.requests_per_s, rel=0.03)
    assert point.tpot_s.mid == pytest.approx(seen.tpot_s, rel=0.03)
    assert point.ttft_s.mid == pytest.approx(seen.ttft_s, rel=ttft_off)


@pytest.mark.parametrize("workload", [LONG, CHAT, Workload(isl=100, osl=1), Workload(isl=3000, osl=64, chunk_tokens=1024, draft_tokens=4)])
def test_nothing_is_lost_between_steps_and_requests(workload):
    """Prompts and sequences of all kinds of steps add up, and so do latencies (Little's law), at any number in flight."""
    most = min(300, most_scheduled(workload))
    for flow in flows(workload, most):
        assert sum(kind.share for kind in flow.kinds) == pytest.approx(1, abs=1e-4)
        assert sum(kind.share * kind.prompts * kind.new for kind in flow.kinds) == pytest.approx(
            flow.requests * workload.new_tokens, rel=0.03
        )
        assert sum(kind.share * kind.decoding for kind in flow.kinds) == pytest.approx(
            flow.requests * workload.decode_steps, rel=0.02, abs=0.07
        )
        assert all(0 <= kind.decoding <= flow.concurrency for kind in flow.kinds)
    for n in (1, 7, 100, most):
        point = at(workload, n)
        assert (point.requests_per_s.mid * point.end_to_end_s.mid) == pytest.approx(n, rel=0.02)


@pytest.mark.parametrize("workload", [Workload(isl=16, osl=1000, chunk_tokens=256), Workload(isl=100, osl=200, chunk_tokens=16)])
def test_no_more_tokens_flow_than_steps_take(workload):
    found = flows(workload, workload.chunk_tokens)
    for before, after in itertools.pairwise(found):
        assert after.requests * (workload.new_tokens + workload.decode_steps) <= workload.chunk_tokens * (1 + 1e-9)
        assert after.waiting >= before.waiting * (1 - 1e-9) and after.requests >= before.requests * 0.97


def test_one_request_alone_meets_nobody():
    point = at(LONG, 1)
    law = LAW.law
    assert point.ttft_s.mid == pytest.approx(law.us([(8192, 0)], 0, 0) * 1e-6)
    assert point.tpot_s.mid == pytest.approx(law.us([], 1, LONG.context) * 1e-6, rel=1e-3)
    assert point.joules_per_request.mid == pytest.approx(500 * 1 / point.requests_per_s.mid, rel=1e-6)
    assert point.power_w.mid == pytest.approx(500)
    two = dataclasses.replace(LLAMA, tp=2)
    assert at(LONG, 1, LawSteps(two)).joules_per_request.mid == pytest.approx(2 * point.joules_per_request.mid)
    assert at(LONG, 1, LawSteps(two)).power_w.mid == pytest.approx(500)
    assert at(LONG, 1, LawSteps(two)).output_tokens_per_s_per_gpu.mid == pytest.approx(point.output_tokens_per_s_per_gpu.mid / 2)


def test_more_in_flight_gives_more_and_later():
    points = operating_points(LAW, CHAT, range(1, 200, 3))
    for before, after in itertools.pairwise(points):
        assert after.tpot_s.mid > before.tpot_s.mid
        assert after.requests_per_s.mid > before.requests_per_s.mid * 0.999
        assert after.joules_per_request.mid < before.joules_per_request.mid * 1.001


def test_doubt_is_carried_through():
    sure, unsure = at(CHAT, 32), at(CHAT, 32, LawSteps(LLAMA, doubt=0.1))
    assert sure.tpot_s.doubt == pytest.approx(0, abs=1e-9)
    assert unsure.tpot_s.doubt == pytest.approx(0.1)
    assert unsure.ttft_s.doubt == pytest.approx(0.1)
    assert unsure.requests_per_s.low == pytest.approx(sure.requests_per_s.mid / 1.1)
    assert unsure.power_w.doubt == pytest.approx(0, abs=1e-9), "energy and time are wrong together"
    assert unsure.label is Origin.MEASURED
    assert operating_points(modelled(), CHAT, [8])[0].label is Origin.MODELLED


def test_slos_are_met_up_to_a_number_that_is_found():
    w = dataclasses.replace(CHAT, slo_tpot_s=0.030)
    points = operating_points(LAW, w)
    good = [p for p in points if meets(p)]
    last = good[-1]
    assert last.limit == "slo_tpot"
    beyond = at(w, math.ceil(1.04 * last.concurrency))
    assert beyond.tpot_s.mid > 0.030 >= last.tpot_s.mid
    assert not meets(beyond) and beyond.limit == "slo_tpot"
    late = dataclasses.replace(CHAT, slo_ttft_s=0.080)
    assert [p.limit for p in operating_points(LAW, late) if meets(p)][-1] == "slo_ttft"
    assert all(meets(p) for p in operating_points(LAW, dataclasses.replace(w, offline=True)))


def test_the_nearest_point_where_none_is_good_enough():
    w = dataclasses.replace(CHAT, slo_tpot_s=0.001, slo_ttft_s=10.0)
    points = operating_points(LAW, w)
    assert not any(meets(p) for p in points)
    assert nearest(points).concurrency == 1
    assert nearest([]) is None
    slow = dataclasses.replace(CHAT, slo_ttft_s=1e-6)
    assert nearest(operating_points(LAW, slow)).ttft_s.mid == min(p.ttft_s.mid for p in operating_points(LAW, slow))


def test_the_front_is_what_nothing_beats():
    points = operating_points(LAW, CHAT)
    kept = front([*points, *points[::-1]])
    assert kept and all(
        not any(q.tpot_s.mid < p.tpot_s.mid and q.output_tokens_per_s_per_gpu.mid > p.output_tokens_per_s_per_gpu.mid for q in points)
        for p in kept
    )
    worse = dataclasses.replace(points[3], tpot_s=points[3].tpot_s * 1.5)
    assert worse not in front([*points, worse])
    encoding = operating_points(LAW, Workload(isl=500, osl=1))
    assert math.isinf(encoding[0].tokens_per_s_per_user.mid) and front(encoding)


def test_memory_stops_the_number_in_flight():
    steps = modelled("llama-3.1-70b", 4)
    most = most_concurrent(steps, LONG)
    free = 0.9 * H200.memory_bytes - steps.weight_bytes
    mean, spread = steps.cache_bytes(8192 + 512), (steps.cache_bytes(9216) - steps.cache_bytes(8704)) * 2 / math.sqrt(12)
    assert most * mean + 2 * spread * math.sqrt(most) <= free < (most + 1) * mean + 2 * spread * math.sqrt(most + 1)
    points = operating_points(steps, LONG)
    assert points[-1].concurrency == most and points[-1].limit == "memory"
    assert operating_points(steps, LONG, [most, most + 1]) == [points[-1]]
    assert operating_points(modelled("llama-3.1-70b", 1), LONG) == [], "141 GB of weights do not fit beside anything"
    assert most_concurrent(modelled("llama-3.1-70b", 4, kv_dtype="fp8"), LONG) >= 2 * most - 1
    assert grid(12) == [1, 2, 3, 4, 6, 8, 12] and grid(5)[-1] == 5 and grid(0) == []
    small = modelled("qwen3-0.6b")
    assert most_concurrent(small, Workload(isl=16, osl=16)) == MOST_REQUESTS
    drafting = Workload(isl=16, osl=16, chunk_tokens=512, draft_tokens=3)
    assert most_concurrent(small, drafting) == 128 and operating_points(small, drafting, [128])[0].limit == "chunk"


def test_idle_time_costs_energy_and_no_rate():
    whole, half = at(CHAT, 32), at(dataclasses.replace(CHAT, utilisation=0.5), 32)
    assert half.requests_per_s == whole.requests_per_s and half.power_w.mid == pytest.approx(whole.power_w.mid)
    assert half.joules_per_request.mid == pytest.approx(whole.joules_per_request.mid + 0.15 * 700 / whole.requests_per_s.mid)
    assert half.energy_shares[Origin.MODELLED] > 0 == whole.energy_shares[Origin.MODELLED]


def test_a_cached_prefix_and_small_chunks():
    plain, cached = at(LONG, 32), at(dataclasses.replace(LONG, prefix_hit=0.9), 32)
    assert cached.ttft_s.mid < 0.3 * plain.ttft_s.mid
    assert cached.requests_per_s.mid > plain.requests_per_s.mid
    assert cached.prefill_share < plain.prefill_share
    small = at(dataclasses.replace(LONG, chunk_tokens=1024), 32)
    assert small.ttft_s.mid > plain.ttft_s.mid, "a prompt shares more steps with those that decode"
    assert max(step.tokens for _, step in small.mix) == 1024


def test_drafts_pay_for_few_and_not_for_many():
    def gain(n, k):
        drafting, plain = (at(Workload(isl=1024, osl=512, acceptance=0.8, draft_tokens=drafts), n) for drafts in (k, 0))
        return drafting.requests_per_s.mid / plain.requests_per_s.mid

    assert gain(2, 4) > gain(2, 1) > 1.5
    assert gain(256, 4) < gain(256, 1) < 1.1
    needed = [least_acceptance(LAW, Workload(isl=1024, osl=512, draft_tokens=3), n) for n in (2, 64)]
    assert 0 < needed[0] < needed[1] <= 1
    assert least_acceptance(LAW, Workload(isl=1024, osl=512, draft_tokens=3, draft_cost=1.0), 2) is None, (
        "a draft costs a step and gives at most a token"
    )
    assert least_acceptance(LAW, CHAT, 8) is None


@pytest.mark.parametrize("isl", [100, 1000, 5000, 20000])
def test_a_prefill_pool_queues_as_simulated(isl):
    workload = Workload(isl=isl, osl=64)
    for point in prefill_pool(LAW, workload)[1:6:2]:
        seen = simulate_prefill(workload, point.requests_per_s.mid, LAW.law, requests=4000)
        assert point.latency_s.mid == pytest.approx(seen.ttft_s, rel=0.22 if isl == 100 else 0.10)
        assert point.load == pytest.approx(seen.gpu_s_per_request * point.requests_per_s.mid, abs=0.07)


def test_pools_are_the_halves_of_a_replica():
    steps = modelled("llama-3.1-8b")
    decode = decode_pool(steps, CHAT)
    assert [p.concurrency for p in decode] == grid(most_concurrent(steps, CHAT)) and decode[-1].limit == "memory"
    for p in decode:
        assert p.requests_per_s.mid * p.latency_s.mid * (CHAT.osl - 1) == pytest.approx(p.concurrency)
    step = steps.decode(64, CHAT.context)
    assert next(p for p in decode if p.concurrency == 64).latency_s.mid == pytest.approx(step.us.mid * 1e-6)
    prefill = prefill_pool(steps, LONG)
    assert [p.load for p in prefill] == sorted(p.load for p in prefill)
    whole = steps.prefill(8192).us.mid * 1e-6
    assert prefill[0].requests_per_s.mid == pytest.approx(0.3 / whole)
    assert all(p.latency_s.mid > whole for p in prefill)
    assert prefill[0].joules_per_request.mid > prefill[-1].joules_per_request.mid, "waiting draws power too"
    assert decode_pool(steps, Workload(isl=10, osl=1)) == []
    assert prefill_pool(modelled("llama-3.1-70b"), LONG) == [] == decode_pool(modelled("llama-3.1-70b"), LONG)


def test_where_the_time_goes():
    point = operating_points(modelled("llama-3.1-70b", 4), LONG, [16])[0]
    parts = point.by_operator()
    assert sum(r.mid for r in parts.values()) == pytest.approx(1 / point.requests_per_s.mid)
    assert next(iter(parts)) == "matmul" and {"prefill_attention", "decode_attention", "all_reduce"} <= set(parts)
    waiting = Steps(LLAMA, Estimator(H200), host_us=Range(200, 400, 800))
    assert operating_points(waiting, CHAT, [1])[0].by_operator()["host"].mid == pytest.approx(256 * 400e-6)
