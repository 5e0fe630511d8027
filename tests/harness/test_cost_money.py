"""Dollars and joules of an operating point, held against the arithmetic done by hand."""

import dataclasses
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from klab.harness.catalog.chips import find_chip
from klab.harness.catalog.models import find_model
from klab.harness.cost.estimate import Estimator, Origin
from klab.harness.cost.mix import inverse
from klab.harness.cost.money import Selling, cached_ratio_of, efficiency_of, money_of
from klab.harness.cost.ranges import ZERO, Range
from klab.harness.cost.serving import OperatingPoint, operating_points
from klab.harness.cost.steps import Steps
from klab.harness.cost.workload import Deployment, Workload
from klab.kernels.errors import UsageError

MODEL, CHIP = find_model("qwen3-0.6b"), find_chip("h200")
PRICE, RATE, JOULES = Range(1.5, 2.0, 4.0), Range(4.0, 5.0, 8.0), Range(800.0, 1000.0, 1500.0)


def point(*, tp=2, rate=RATE, joules=JOULES, prompts=0.25, idle=ZERO, **workload):
    """A replica of two GPUs that ends 5 requests of 1000 + 100 tokens per second, a quarter of its time in prompts."""
    shares = {Origin.MODELLED: 1.0}
    asked = Workload(**{"isl": 1000, "osl": 100} | workload)
    return OperatingPoint(
        Deployment(MODEL, CHIP, tp), asked, 16, ZERO, Range(0.01, 0.02, 0.03), rate, joules, prompts, shares, shares, "", idle
    )


def test_dollars_by_hand():
    found = money_of(point(), PRICE)
    # 2 GPUs x 2 $/h = 4 $/h for 18,000 requests an hour.
    assert found.usd_per_request.mid == pytest.approx(4 / 18_000)
    assert found.usd_per_request.low == pytest.approx(3 / 28_800) and found.usd_per_request.high == pytest.approx(8 / 14_400)
    assert found.usd_per_mtok_total.mid == pytest.approx(4 / 18_000 / 1100 * 1e6)
    assert found.usd_per_mtok_input.mid == pytest.approx(0.25 * 4 / 18_000 / 1000 * 1e6)
    assert found.usd_per_mtok_output.mid == pytest.approx(0.75 * 4 / 18_000 / 100 * 1e6)
    # As benchmarks quote it: $/GPU-hour over tokens/s per GPU x 3600 / 1e6.
    one = point()
    assert found.usd_per_mtok_total.mid == pytest.approx(2.0 / (one.total_tokens_per_s_per_gpu.mid * 3600 / 1e6))
    assert found.usd_per_mtok_all_on_output.mid == pytest.approx(2.0 / (one.output_tokens_per_s_per_gpu.mid * 3600 / 1e6))
    assert found.gross_margin is None


@settings(deadline=None, max_examples=60)
@given(
    usd=st.floats(0.01, 100), rate=st.floats(0.01, 1000), prompts=st.floats(0, 1), hit=st.floats(0, 0.9), ratio=st.floats(0, 1),
    utilisation=st.floats(0.05, 1), osl=st.integers(1, 5000),
)  # fmt: skip
def test_the_parts_are_the_whole_and_scale_as_they_must(usd, rate, prompts, hit, ratio, utilisation, osl):
    one = point(rate=Range.exact(rate), prompts=prompts, prefix_hit=hit, utilisation=utilisation, osl=osl)
    w, price = one.workload, Range.exact(usd)
    found = money_of(one, price, cached_ratio=ratio)
    parts = found.usd_per_mtok_input.mid * w.new_tokens + found.usd_per_mtok_cached_input.mid * w.cached_tokens
    parts += found.usd_per_mtok_output.mid * w.osl
    assert parts / 1e6 == pytest.approx(found.usd_per_request.mid) == pytest.approx(found.usd_per_mtok_total.mid * (w.isl + w.osl) / 1e6)
    assert found.usd_per_mtok_cached_input.mid <= found.usd_per_mtok_input.mid
    twice = money_of(dataclasses.replace(one, requests_per_s=Range.exact(2 * rate)), price, cached_ratio=ratio)
    assert twice.usd_per_mtok_output.mid == pytest.approx(found.usd_per_mtok_output.mid / 2)
    assert money_of(one, price * 2, cached_ratio=ratio).usd_per_mtok_total.mid == pytest.approx(2 * found.usd_per_mtok_total.mid)
    idle = dataclasses.replace(one, workload=dataclasses.replace(w, utilisation=utilisation / 2))
    assert money_of(idle, price, cached_ratio=ratio).usd_per_request.mid == pytest.approx(2 * found.usd_per_request.mid)


def test_a_range_holds_what_any_price_and_any_speed_in_theirs_give():
    found = money_of(point(), PRICE, sell=(0.2, 2.0))
    for usd in (1.5, 2.0, 2.7, 4.0):
        for rate in (4.0, 5.0, 6.0, 8.0):
            exact = money_of(point(rate=Range.exact(rate)), Range.exact(usd), sell=(0.2, 2.0))
            for name in ("usd_per_request", "usd_per_mtok_total", "usd_per_mtok_input", "usd_per_mtok_output", "gross_margin"):
                wide, value = getattr(found, name), getattr(exact, name).mid
                assert wide.low - 1e-12 <= value <= wide.high + 1e-12


def test_prompts_known_well_do_not_make_generated_tokens_known_well():
    """Prompts take 0.05 s per request whatever happens, all others 0.15 s within a factor of two."""
    one = dataclasses.replace(point(rate=inverse(Range(0.125, 0.2, 0.35))), prefill_s=Range.exact(0.05))
    found = money_of(one, Range.exact(2.0))
    usd_per_s = 2 * 2.0 / 3600
    assert found.usd_per_mtok_input.low == pytest.approx(0.05 * usd_per_s / 1000 * 1e6) == pytest.approx(found.usd_per_mtok_input.high)
    ends = (found.usd_per_mtok_output.low, found.usd_per_mtok_output.mid, found.usd_per_mtok_output.high)
    assert ends == pytest.approx([seconds * usd_per_s / 100 * 1e6 for seconds in (0.075, 0.15, 0.30)])
    real = operating_points(Steps(Deployment(MODEL, CHIP), Estimator(CHIP)), Workload(1000, 100), [8])[0]
    assert real.prefill_s.mid * real.requests_per_s.mid == pytest.approx(real.prefill_share)
    told = money_of(real, Range.exact(2.0))
    for end in ("low", "mid", "high"):
        parts = getattr(told.usd_per_mtok_input, end) * 1000 + getattr(told.usd_per_mtok_output, end) * 100
        assert parts / 1e6 == pytest.approx(getattr(told.usd_per_request, end))


def test_the_margin_is_what_the_revenue_leaves():
    one = point(prefix_hit=0.4)
    selling = Selling(0.1, 1.0, cached_input=0.01)
    revenue = (600 * 0.1 + 400 * 0.01 + 100 * 1.0) / 1e6
    found = money_of(one, PRICE, sell=selling).gross_margin
    assert found.mid == pytest.approx(1 - 4 / 18_000 / revenue)
    assert found.low == pytest.approx(1 - 8 / 14_400 / revenue) and found.low < 0 < found.high
    # Without a price of their own, cached tokens sell as input.
    assert Selling(0.1, 1.0).usd_per_request(one.workload) == pytest.approx((1000 * 0.1 + 100) / 1e6)
    # Sold at what it costs, nothing is left.
    cost = money_of(one, Range.exact(2.0), cached_ratio=0.1)
    sold = Selling(cost.usd_per_mtok_input.mid, cost.usd_per_mtok_output.mid, cost.usd_per_mtok_cached_input.mid)
    even = money_of(dataclasses.replace(one, requests_per_s=Range.exact(5.0)), Range.exact(2.0), sell=sold, cached_ratio=0.1)
    assert even.gross_margin.mid == pytest.approx(0.0, abs=1e-9)


def test_energy_and_megawatts():
    found = efficiency_of(point(), 1.73)
    assert found.joules_per_token.mid == pytest.approx(1000 / 1100) and found.joules_per_output_token.mid == pytest.approx(10)
    # 5500 tokens/s on 2 x 1.73 kW.
    assert found.tokens_per_s_per_mw.mid == pytest.approx(5500 / (2 * 1.73e-3)) and found.megawatt == "provisioned"
    # Without a site: of what the boards draw at work, 1000 J per request less what they draw while they wait.
    boards = efficiency_of(point(idle=Range.exact(200.0), utilisation=0.5))
    assert boards.megawatt == "GPU boards" and boards.tokens_per_s_per_mw.mid == pytest.approx(1100 / 800 * 1e6)
    one = point(idle=Range.exact(200.0), utilisation=0.5)
    assert boards.tokens_per_s_per_mw.mid == pytest.approx(5500 / (one.power_w.mid * 2) * 1e6)


def test_what_generates_nothing_has_no_output_price():
    found = money_of(point(osl=0, prompts=0.9), PRICE)
    assert found.usd_per_mtok_output is None and found.usd_per_mtok_all_on_output is None and found.joules_per_output_token is None
    assert found.usd_per_mtok_input.mid == pytest.approx(found.usd_per_mtok_total.mid)


def test_a_cached_token_costs_the_attention_over_it():
    steps = Steps(Deployment(MODEL, CHIP), Estimator(CHIP))
    assert cached_ratio_of(steps, Workload(isl=1, osl=1)) == 0
    short, long = (cached_ratio_of(steps, Workload(isl=isl, osl=1, prefix_hit=0.5)) for isl in (4096, 65_536))
    assert 0 <= short < 0.5 < long < 1
    # Where nothing is cached, it is told for half of the prompt.
    assert cached_ratio_of(steps, Workload(isl=65_536, osl=1)) == long
    # By flops: attention over a token, 4 x heads x width per computed token behind it, against that and 2 per parameter.
    attention = MODEL.stack.groups[0].mixers[0]
    over = sum(group.count for group in MODEL.stack.groups) * 4 * attention.heads * attention.head_dim
    layers = 2 * 0.44e9
    assert long == pytest.approx(over * 32_768 / (layers + over * 65_536), rel=0.25)


@pytest.mark.parametrize("bad", [Range(0, 1, 1), Range(-1, 1, 1), Range(1, math.inf, math.inf)])
def test_prices_that_are_none(bad):
    with pytest.raises(UsageError, match="price per GPU-hour"):
        money_of(point(), bad)


def test_other_figures_that_are_none():
    for sell in ((-1.0, 2.0), (0.0, 0.0), (math.nan, 1.0)):
        with pytest.raises(UsageError, match="--sell"):
            money_of(point(), PRICE, sell=sell)
    with pytest.raises(UsageError, match="nothing is sold"):
        money_of(point(osl=0), PRICE, sell=(0.0, 3.0))
    with pytest.raises(UsageError, match="kW"):
        money_of(point(), PRICE, 0.0)
    with pytest.raises(ValueError, match="cached"):
        money_of(point(), PRICE, cached_ratio=2.0)
