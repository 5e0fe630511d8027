"""The model of last resort: more work never takes less time, and a little more work never much more."""

import itertools

import pytest

from klab.harness.catalog import find_chip
from klab.harness.cost.modelled import Modelled
from klab.kernels.fused_moe.problem import FusedMoe
from klab.kernels.matmul.problem import Matmul
from klab.kernels.norm.problem import Norm


def experts(tokens):
    return FusedMoe(tokens, 4096, 14336, 8, 2)


@pytest.mark.parametrize("chip", ["h200", "b200"])
@pytest.mark.parametrize("problem", [lambda m: Matmul(m, 8192, 8192), experts, lambda m: Norm(m, 8192)])
def test_times_rise_without_a_jump_where_the_limit_changes(chip, problem):
    model = Modelled(find_chip(chip))
    sizes = [round(64 * 1.1**k) for k in range(60)]
    limits = {model.bound(problem(m))[1] for m in sizes}
    assert limits == ({"memory"} if problem(64).operator == "norm" else {"memory", "compute"})
    for one, other in itertools.pairwise(model.us(problem(m))[0] for m in sizes):
        for end in ("low", "mid", "high"):
            assert getattr(one, end) <= getattr(other, end) <= 1.16 * getattr(one, end)


def test_a_time_is_its_limit_over_the_share_that_is_told():
    model = Modelled(find_chip("h200"))
    us, how = model.us(Matmul(8192, 8192, 8192))
    assert how == "4 us and 72% of the compute roofline"
    assert us.mid == pytest.approx(4 + model.bound(Matmul(8192, 8192, 8192))[0] / 0.72)
    few, how = model.us(experts(16))
    assert "memory" in how and few.low < few.mid < few.high
