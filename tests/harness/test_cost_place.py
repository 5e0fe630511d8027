"""Placement: the search against trying everything, and what it costs."""

import dataclasses
import itertools
import math

import numpy as np
import pytest
from made_sides import ASKED, CARD, MODEL, TERMS, about, made_up, point, side, terms_of

from klab.harness.catalog import find_chip, find_model
from klab.harness.cost.estimate import Estimator, Origin
from klab.harness.cost.place import COUNTS, Demand, _with_room, ranked
from klab.harness.cost.serving import decode_pool, operating_points
from klab.harness.cost.sides import Builder, climb, sides_of
from klab.harness.cost.staffing import machines
from klab.harness.cost.steps import Steps
from klab.harness.cost.workload import Deployment, Workload


def by_hand(sides, demand, terms):
    """Every pair of points of every pair of sides, counted out in plain arithmetic: {(names, prices): least $/h}."""
    w, found = demand.workload, {}

    def take(name, parts):
        usd, held = 0.0, {}
        for s, rate in parts:
            needed = demand.peak_per_s / rate
            number = needed if demand.count == "fractions" else math.ceil(needed - 1e-9)
            held[s.deployment.chip.name] = held.get(s.deployment.chip.name, 0.0) + number * s.deployment.tp
        for chip, gpus in held.items():
            if demand.count == "machines":
                gpus = demand.machine_gpus * math.ceil(gpus / demand.machine_gpus - 1e-9)
            usd += gpus * terms[chip].usd_per_gpu_hour.mid
        found[name] = min(found.get(name, math.inf), usd)

    for s in sides:
        for p in s.points("both"):
            if p.ttft_s.mid <= w.slo_ttft_s and p.tpot_s.mid <= w.slo_tpot_s:
                take(s.name, [(s, p.requests_per_s.mid)])
    for first, second in itertools.product(sides, sides):
        whole = 8192 * 327_680
        effective = 50e9 * 0.6
        for p, d in itertools.product(first.points("prefill"), second.points("decode")):
            move_s = max(whole / first.deployment.tp, whole / second.deployment.tp) / effective
            exposed_s = max(move_s - first.prompt_s.mid * 79 / 80, move_s / 80) + 0.01
            one_s = whole / second.deployment.tp / effective
            rate_d = min(d.requests_per_s.mid, 0.8 / one_s)
            rate_p = min(p.requests_per_s.mid, effective * first.deployment.tp / whole)
            load = min(rate_d * one_s, 0.8)
            wait_s = load * one_s / (2 * (1 - load))
            if d.tpot_s.mid <= w.slo_tpot_s and p.ttft_s.mid + exposed_s + wait_s <= w.slo_ttft_s:
                take(f"{first.name} -> {second.name}", [(first, rate_p), (second, rate_d)])
    return found


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("seed", range(4))
def test_the_search_finds_what_trying_everything_finds(seed, count):
    sides = made_up(seed)
    demand = Demand(ASKED, 17.0, count=count)
    found = {option.name: option.value for option in ranked(sides, demand, TERMS).options}
    tried = by_hand(sides, demand, TERMS)
    # A decode pool that does less waits less on its link: rarely that makes room for a cheaper prefill, which is not searched for.
    assert set(found) <= set(tried) and len(found) >= 0.9 * len(tried)
    assert all(found[name] >= tried[name] - 1e-9 for name in found)
    assert sum(found[name] <= tried[name] * (1 + 1e-9) for name in found) >= 0.95 * len(found)
    assert min(found.values()) == pytest.approx(min(tried.values()))


def test_shares_of_prefill_and_decode_follow_their_rates():
    """n_p/n_d = (ISL / prefill tokens per s) / (OSL / decode tokens per s), and $ per request the sum of both parts."""
    sides = [side("a", 2, [point("prefill", 0.5, 0, 4.0)]), side("b", 4, [point("decode", 0, 0.01, 6.0)])]
    (best,) = ranked(sides, Demand(ASKED, 24.0, count="fractions"), TERMS).options
    assert best.ratio == pytest.approx((8192 / (4.0 * 8192)) / (1024 / (6.0 * 1024)))
    per_request = 2 * 3.0 / 3600 / 4.0 + 4 * 5.0 / 3600 / 6.0
    assert best.fleet.usd_per_hour.mid == pytest.approx(24.0 * 3600 * per_request)
    assert best.usd_per_mtok.mid == pytest.approx(per_request / 9216 * 1e6)
    assert best.fleet.usd_per_hour.low == pytest.approx(24 * (2 / 4.4 * 3.0 * 0.7 + 4 / 6.6 * 5.0 * 0.7))
    # Boards: 1 kJ per request each, and idle power for what is not busy (nothing here).
    assert best.fleet.board_w.mid == pytest.approx(24 * 2000.0)


def test_joules_are_called_by_what_they_rest_on():
    """Published times need not come with published powers; what waits is modelled; of a model half understood all is."""
    told = {Origin.REFERENCE: 0.95, Origin.MODELLED: 0.05}
    both = dataclasses.replace(point("both", 0.1, 0.01, 10.0), time_shares=told, energy_shares=told)
    demand = Demand(ASKED, 10.0, count="fractions")
    (full,) = ranked([side("a", 2, [both])], demand, TERMS).options
    assert full.label == full.energy_label == Origin.REFERENCE and full.energy_shares == pytest.approx(full.time_shares)
    (idle,) = ranked([side("a", 2, [both])], dataclasses.replace(demand, rate_per_s=1.0, count="machines"), TERMS).options
    # 1 kW of work and 780 W of waiting.
    assert (idle.label, idle.energy_label) == (Origin.REFERENCE, Origin.MODELLED)
    assert idle.energy_shares[Origin.REFERENCE] == pytest.approx(0.95 * 1000 / 1780)
    assert sum(idle.energy_shares.values()) == pytest.approx(1)
    (powerless,) = ranked([side("a", 2, [dataclasses.replace(both, energy_shares={Origin.MODELLED: 1.0})])], demand, TERMS).options
    assert (powerless.label, powerless.energy_label) == (Origin.REFERENCE, Origin.MODELLED)


def test_what_waits_draws_power():
    sides = [side("a", 2, [point("both", 0.1, 0.01, 10.0)])]
    (best,) = ranked(sides, Demand(ASKED, 1.0), TERMS).options
    # One machine of 8; 2 GPUs busy for a tenth of the time, 200 W for each pair that waits.
    assert best.fleet.gpus["a"].mid == 8 and best.fleet.busy_share == pytest.approx(0.2 / 8)
    assert best.fleet.board_w.mid == pytest.approx(1000.0 + 7.8 / 2 * 200.0)


@pytest.mark.parametrize("objective", ["cost", "energy", "kw"])
def test_scaling(objective):
    sides = made_up(1)
    demand = Demand(ASKED, 10.0, objective, count="fractions")
    one, two = (ranked(sides, dataclasses.replace(demand, rate_per_s=rate), TERMS).winner for rate in (10.0, 20.0))
    assert (two.name, two.value) == (one.name, pytest.approx(2 * one.value))
    half = ranked(sides, dataclasses.replace(demand, workload=dataclasses.replace(ASKED, utilisation=0.5)), TERMS).winner
    assert half.value > one.value * (1.999 if objective != "energy" else 1.0)
    if objective == "cost":
        dear = ranked(sides, demand, terms_of(6.0, 10.0, 4.0)).winner
        assert (dear.name, dear.value) == (one.name, pytest.approx(2 * one.value))


def test_more_room_never_costs_more():
    sides = made_up(2)
    values = []
    for slack in (0.15, 0.4, 0.7, 1.0, 2.0):
        w = dataclasses.replace(ASKED, slo_ttft_s=2.0 * slack, slo_tpot_s=0.02 * slack)
        best = ranked(sides, Demand(w, 300.0), TERMS).winner
        values.append(best.value if best else math.inf)
    assert values == sorted(values, reverse=True) and values[0] > values[-1]
    counted = [ranked(sides, Demand(ASKED, 30.0, count=count), TERMS).winner.value for count in COUNTS]
    assert counted == sorted(counted)


def test_machines_against_packing_by_hand():
    def packed(held, size):
        """Largest first into the fullest machine that has room: exact for sizes that divide one another."""
        free = []
        for tp in sorted((tp for tp, number in held for _ in range(number)), reverse=True):
            at = next((i for i, room in sorted(enumerate(free), key=lambda one: one[1]) if room >= tp), None)
            if at is None:
                free.append(size)
                at = len(free) - 1
            free[at] -= tp
        return len(free)

    rng = np.random.default_rng(3)
    for _ in range(200):
        held = [(int(rng.choice([1, 2, 4, 8])), int(rng.integers(1, 9))) for _ in range(rng.integers(1, 3))]
        assert machines(held, 8) == packed(held, 8)
    assert machines([(3, 5)], 8) == 3 and machines([(6, 2), (4, 2)], 8) == 3
    assert machines([(16, 2)], 8) == 4 and machines([(16, 1), (4, 1)], 8) == 3
    assert machines([(4, 3)], 1) == 12


def test_whole_machines_may_hold_both_pools():
    pools = [point("prefill", 0.5, 0, 10.0), point("decode", 0, 0.01, 10.0)]
    demand = Demand(ASKED, 10.0)
    same = ranked([side("a", 4, pools)], demand, TERMS).winner
    assert same.kind == "apart, one chip" and same.fleet.gpus["a"].mid == 8
    two = ranked([side("a", 4, pools[:1]), side("b", 4, pools[1:])], demand, TERMS).winner
    assert two.kind == "apart, two chips" and {chip: gpus.mid for chip, gpus in two.fleet.gpus.items()} == {"a": 8, "b": 8}


def test_a_slow_network_caps_and_delays():
    def best(gb_per_s, overlap=True):
        sides = [side("a", 2, [point("prefill", 0.2, 0, 5.0)], prompt_s=0.2), side("b", 2, [point("decode", 0, 0.01, 5.0)])]
        w = dataclasses.replace(ASKED, slo_ttft_s=60.0)
        return ranked(sides, Demand(w, 50.0, count="fractions", link_gb_per_s=gb_per_s, overlap=overlap), TERMS).winner

    fast, slow = best(500.0), best(5.0)
    assert fast.pools[0].point.limit == "" and [pool.point.limit for pool in slow.pools] == ["link", "link"]
    way = slow.transfer
    assert slow.pools[0].needed == pytest.approx(50.0 / way.sends_per_s.mid)
    assert slow.ttft_s.mid > fast.ttft_s.mid and slow.value > fast.value
    assert best(50.0, overlap=False).exposed_s.mid > best(50.0).exposed_s.mid
    assert fast.ttft_s.mid == pytest.approx(0.2 + fast.exposed_s.mid)


def test_caches_on_their_way_take_room():
    points = [point("decode", 0, 0.01, n * 1.0, n) for n in (1, 8, 9, 10)]
    # 8 decoding at 8 requests/s that hold their room for 0.2 s beforehand: 9.6 of 10.
    assert [p.concurrency for p in _with_room(points, 10, 0.2)] == [1, 8]
    (squeezed,) = _with_room(points[:1], 1, 3.0)
    # One at a time: 3 s on its way, 1 s decoding.
    assert squeezed.requests_per_s.mid == pytest.approx(1 / 4) and squeezed.limit == "memory"


def test_room_and_waiting_count_in_the_whole():
    """A decode replica of 8 sequences takes 3 s for each and holds its room for 1 s before: 6 decode, 2 are on their way."""
    decoding = [point("decode", 0, 3.0 / 1023, n / 3.0, n) for n in (2, 4, 6, 8)]
    sides = [side("a", 1, [point("prefill", 1.0, 0, 1.0)], prompt_s=0.9), side("b", 1, decoding, most=8)]
    w = dataclasses.replace(ASKED, slo_ttft_s=60.0)
    (best,) = ranked(sides, Demand(w, 2.0, count="fractions", link_gb_per_s=2000.0), TERMS).options
    assert best.pools[1].point.concurrency == 6
    way, rate = best.transfer, best.pools[1].point.requests_per_s.mid
    assert way.waiting_s(rate) > 0
    assert best.ttft_s.mid == pytest.approx(1.0 + way.exposed_s(about(0.9), True).mid + way.waiting_s(rate))


def test_a_chip_that_only_decodes_gets_no_prompts():
    builder = Builder({"decode-card": Estimator(find_chip(CARD))})
    found, reasons = sides_of(find_chip(CARD), (2, 3), Deployment(MODEL, find_chip(CARD)), ASKED, builder)
    assert [s.name for s in found] == ["decode-card x 2"] and "tensor parallelism of 3" in reasons[0]
    assert found[0].points("decode") and not found[0].points("prefill") and not found[0].points("both")


def test_points_between_and_at_the_slo():
    """Against every number of sequences planned for itself."""
    chip, model = find_chip("h200"), find_model("qwen3-8b")
    w = Workload(2048, 256, slo_tpot_s=0.006, chunk_tokens=512)
    built = Builder({"h200": Estimator(chip)}).side(Deployment(model, chip, 1), w)
    steps = Steps(built.deployment, Estimator(chip))
    last = max(p.concurrency for p in built.points("decode") if p.tpot_s.mid <= 0.006)
    (beyond,) = decode_pool(steps, w, [math.ceil(last * 1.03) + 1])
    assert beyond.latency_s.mid > 0.006 and beyond.concurrency < built.most
    for n in (3, 11, 40):
        near = min(built.points("decode"), key=lambda p: abs(p.concurrency - n))
        (exact,) = decode_pool(steps, w, [near.concurrency])
        assert near.tpot_s.mid == pytest.approx(exact.latency_s.mid, rel=0.03)
        assert near.requests_per_s.mid == pytest.approx(exact.requests_per_s.mid, rel=0.03)
        assert near.busy_joules.mid == pytest.approx(exact.joules_per_request.mid, rel=0.05)
        both = min(built.points("both"), key=lambda p: abs(p.concurrency - n))
        (whole,) = operating_points(steps, w, [both.concurrency])
        assert both.tpot_s.mid == pytest.approx(whole.tpot_s.mid, rel=0.05)
        assert both.requests_per_s.mid == pytest.approx(whole.requests_per_s.mid, rel=0.05)
    numbers = [p.concurrency for p in built.points("decode")]
    assert numbers == sorted(set(numbers)) and max(b / a for a, b in itertools.pairwise(numbers) if a > 10) < 1.2


@pytest.mark.parametrize("bend", [1.0, 3.0, 0.3])
def test_climbing_finds_the_last_in_time(bend):
    asked = []

    def late(n):
        return (n / 137) ** bend

    found = climb(lambda n: asked.append(n) or n, late, 1000)
    last = max(n for n in found if late(n) <= 1)
    assert 137 * 0.97 <= last <= 137 and len(asked) == len(found) <= 18
    assert max(climb(lambda n: n, lambda n: 0.0, 100)) == 100 and list(climb(lambda n: n, lambda n: 9.0, 100)) == [1]


def test_when_nothing_meets_the_slos_the_nearest_is_told():
    w = dataclasses.replace(ASKED, slo_tpot_s=0.0005)
    found = ranked(made_up(0), Demand(w, 5.0), TERMS)
    assert found.winner is None and found.nearest.missed > 1
    fastest = min(p.tpot_s.mid for s in made_up(0) for role in ("decode", "both") for p in s.points(role))
    assert found.nearest.missed == pytest.approx(fastest / 0.0005)
