"""Workload: what a request brings, and how many steps its tokens take."""

import random

import pytest

from klab.harness.catalog import find_chip, find_model
from klab.harness.cost.workload import Deployment, Workload
from klab.kernels.errors import UsageError


@pytest.mark.parametrize(
    ("fields", "says"),
    [({"isl": 0}, "--isl"), ({"osl": -1}, "--osl"), ({"prefix_hit": 1.0}, "--prefix-hit"), ({"chunk_tokens": 8}, "--chunk"),
     ({"draft_tokens": 17}, "--draft"), ({"acceptance": 1.1}, "--acceptance"), ({"draft_cost": -1}, "--draft-cost"),
     ({"utilisation": 0}, "--utilisation"), ({"utilisation": 1e-310}, "--utilisation"), ({"draft_cost": 1e305}, "--draft-cost"),
     ({"slo_ttft_s": 0}, "--slo-ttft"), ({"slo_tpot_s": -1}, "--slo-tpot")],
)  # fmt: skip
def test_impossible_workloads(fields, says):
    with pytest.raises(UsageError, match=says):
        Workload(**fields)


def test_at_least_one_token_is_computed():
    assert Workload(isl=1000, prefix_hit=0.75).new_tokens == 250
    assert Workload(isl=10, prefix_hit=0.999).new_tokens == 1
    assert Workload(isl=1, prefix_hit=0.5).new_tokens == 1


@pytest.mark.parametrize(
    ("osl", "drafts", "acceptance"),
    [(1024, 3, 0.7), (20, 3, 0.7), (20, 8, 0.9), (64, 2, 0.0), (33, 4, 1.0), (10, 8, 1.0), (4, 8, 0.7), (10, 8, 0.99)],
)
def test_the_steps_of_a_request_are_those_of_chance(osl, drafts, acceptance):
    """A draft is accepted while all before it were; a request ends with the step that gives its last token."""
    rng, taken, times = random.Random(0), 0, 2000 if osl < 100 else 200
    for _ in range(times):
        made = 1
        while made < osl:
            step = 1
            while step <= drafts and rng.random() < acceptance:
                step += 1
            made, taken = made + step, taken + 1
    workload = Workload(osl=osl, draft_tokens=drafts, acceptance=acceptance)
    assert workload.decode_steps == pytest.approx(taken / times, rel=0.03)


def test_steps_without_drafts():
    assert Workload(osl=100).decode_steps == 99
    assert Workload(osl=1).decode_steps == Workload(osl=0).decode_steps == 0


def test_a_deployment_says_what_it_is():
    d = Deployment(find_model("llama-3.1-70b"), find_chip("h200"), 4, quantization="fp8_block", kv_dtype="fp8")
    assert d.label == "h200 x 4 fp8_block kv fp8"
    assert d.scenario(isl=100).kv_dtype == "float8_e4m3fn"
    with pytest.raises(UsageError, match="--memory-share"):
        Deployment(d.model, d.chip, memory_share=0)
