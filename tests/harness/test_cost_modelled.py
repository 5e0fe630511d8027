"""What nobody measured: within the limits of the chip, growing with the work, and of the power that is published."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from klab.harness.catalog import find_chip
from klab.harness.cost.estimate import Estimator, Origin
from klab.harness.cost.modelled import OTHER, USUAL, Modelled
from klab.harness.plan.communication import Collective, modelled
from klab.kernels.decode_attention.problem import DecodeAttention
from klab.kernels.discover import operators
from klab.kernels.fused_moe.problem import FusedMoe
from klab.kernels.matmul.problem import Matmul
from klab.kernels.norm.problem import Norm
from klab.kernels.prefill_attention.problem import PrefillAttention

H200, B200, CPU = find_chip("h200"), find_chip("b200"), find_chip("cpu")


@given(st.integers(1, 9000), st.sampled_from([64, 1024, 8192]), st.sampled_from([256, 4096]))
@settings(max_examples=60, deadline=None)
def test_no_launch_beats_the_roofline_and_more_work_takes_no_less(m, n, k):
    model = Modelled(H200)
    small, large = Matmul(m, n, k), Matmul(2 * m, n, k)
    us, more = model.us(small)[0], model.us(large)[0]
    assert model.bound(small)[0] < us.low < us.mid < us.high
    assert all(getattr(us, end) <= getattr(more, end) for end in ("low", "mid", "high"))


def test_large_launches_reach_the_usual_share_and_small_ones_take_their_start():
    model = Modelled(H200)
    product = Matmul(16384, 16384, 16384)
    assert model.us(product)[0].mid == pytest.approx(model.bound(product)[0] / 0.72, rel=0.01)
    assert model.us(Norm(1, 64))[0].mid == pytest.approx(OTHER.start_us[1], rel=0.01)
    assert set(USUAL) <= set(operators())


def test_some_published_rows_lie_in_the_range():
    # aiconfigurator-core 0.12.0, h200_sxm, trtllm 1.3.0rc20, rounded.
    rows = {
        Matmul(64, 7168, 8192): 32.6,
        Matmul(8192, 7168, 8192): 1380.0,
        PrefillAttention((8192,), 8, 1, 128): 344.0,
        FusedMoe(64, 7168, 256, 256, 8, format="fp8_block"): 507.0,
    }
    for problem, us in rows.items():
        found = Modelled(H200).us(problem)[0]
        assert found.low <= us <= found.high and 0.5 < us / found.mid < 2


def test_power_follows_the_limit_and_how_near_it_is():
    model = Modelled(B200)
    product, norm, decode = Matmul(16384, 16384, 16384), Norm(16384, 16384), DecodeAttention((16384,) * 64, 32, 8, 128)

    def watts(problem, share):
        return model.power_w(problem, model.bound(problem)[0] / share)

    assert watts(product, 0.7).mid == pytest.approx(970) and watts(norm, 0.8).mid == pytest.approx(930)
    assert watts(decode, 0.5).mid == pytest.approx(440) and watts(decode, 0.95).mid == pytest.approx(670)
    for problem in (product, norm, decode):
        drawn = [watts(problem, share) for share in (0.01, 0.1, 0.3, 0.7, 0.9, 1.1)]
        assert all(one.mid <= other.mid for one, other in itertools.pairwise(drawn))
        assert all(0.2 * B200.tdp_w < one.low < one.mid < one.high <= B200.tdp_w for one in drawn)
    # A tenth of the time at its limit draws more than a tenth of the energy.
    assert watts(norm, 0.05).mid > 0.4 * B200.tdp_w


def test_energy_is_the_time_by_the_power():
    whole = Estimator(H200)
    found = whole.launch(Norm(8192, 4096))
    power_w = whole.modelled.power_w(Norm(8192, 4096), found.us.mid)
    assert found.joules.mid == pytest.approx(found.us.mid * power_w.mid * 1e-6) and found.energy_origin is Origin.MODELLED


def test_a_collective_is_by_its_own_constants_and_needs_a_link():
    one = Collective("all_reduce", 8, 1 << 20)
    us, how = Modelled(H200).collective_us(one)
    assert us.mid == modelled(one, 450.0).us and us.low < us.mid < us.high and "NCCL" in how
    assert Modelled(CPU).collective_us(one)[0].mid == float("inf")


def test_a_chip_without_a_stated_power_has_one_within_a_factor_of_two():
    drawn = Modelled(CPU).power_w(Norm(8192, 4096), 1e4)
    assert 30 < drawn.low < drawn.high <= 150
