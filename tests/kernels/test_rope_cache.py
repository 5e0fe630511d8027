"""The rotation's problem bites, its defaults fit, and what Inductor is given is right."""

import itertools

import pytest
import torch
from contest import BLACKWELL, HOPPER, kernels

from klab.harness.measure.check import check
from klab.kernels.errors import UsageError
from klab.kernels.rope_cache._eager import rope_cache
from klab.kernels.rope_cache.problem import RopeCache

KERNELS = {kernel.name: kernel for kernel in kernels("triton", "cuda", "torch") if kernel.problem_type is RopeCache}
FP8 = "float8_e4m3fn"


def positions(inputs):
    return {**inputs, "positions": (inputs["positions"] + 1) % inputs["cos"].shape[0]}


def slots(inputs):
    return {**inputs, "slot_mapping": inputs["slot_mapping"].roll(1)}


def sine(inputs):
    return {**inputs, "sin": -inputs["sin"]}


def scale(inputs):
    return {**inputs, **{name: inputs[name].roll(1) * 1.06 for name in inputs if name.endswith("_scale")}}


def last_value(inputs):
    name = "latent" if "latent" in inputs else "v"
    value = inputs[name].clone()
    value[..., -1] = 0
    return {**inputs, name: value}


FAULTS = [positions, slots, sine, last_value]
PROBLEMS = [
    RopeCache(33, 8, 2, 64),
    RopeCache(9, 6, 3, 96, rotary_dim=32, head_dim_v=48, interleaved=True),
    RopeCache(33, 4, 1, 64, latent=128, interleaved=True, page_size=4),
    RopeCache(33, 4, 2, 64, kv_dtype=FP8),
    RopeCache(33, 4, 2, 64, latent=128, kv_dtype=FP8),
]
UNCACHED = RopeCache(9, 4, 2, 64, cache=False, interleaved=True)


@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda p: p.label())
def test_a_right_rotation_passes_and_a_wrong_one_does_not(problem):
    found = check(problem, lambda i, o: rope_cache(problem, i, o), seed=1)
    assert found.passed and found.error < 0.7 * found.tolerance
    for fault in [*FAULTS, *([scale] if problem.kv_dtype else [])]:
        assert not check(problem, lambda i, o, fault=fault: rope_cache(problem, fault(i), o), seed=1).passed, fault.__name__


def test_without_a_cache_only_queries_and_keys_are_turned():
    assert set(UNCACHED.inputs(seed=1)) == {"q", "k", "positions", "cos", "sin"} and set(UNCACHED.outputs()) == {"q", "k"}
    assert check(UNCACHED, lambda i, o: rope_cache(UNCACHED, i, o), seed=1).passed
    for fault in (positions, sine):
        assert not check(UNCACHED, lambda i, o, fault=fault: rope_cache(UNCACHED, fault(i), o), seed=1).passed, fault.__name__

    def keys_stay(inputs, outputs):
        rope_cache(UNCACHED, inputs, outputs)
        outputs["k"].copy_(inputs["k"])

    assert not check(UNCACHED, keys_stay, seed=1).passed
    # q and k read and written in 2 bytes, a position and 32 cosines and sines a token.
    assert UNCACHED.bytes_moved() == 9 * (6 * 64 * 2 * 2 + 4 + 2 * 32 * 4)
    assert UNCACHED.label().startswith("rope 9 ") and UNCACHED.flops() == 9 * 6 * 64 * 3


def test_one_pairing_is_not_the_other():
    a, b = RopeCache(9, 4, 2, 64), RopeCache(9, 4, 2, 64, interleaved=True)
    assert not check(a, lambda i, o: rope_cache(b, i, o), seed=1).passed
    assert not check(b, lambda i, o: rope_cache(a, i, o), seed=1).passed


def test_slots_are_a_permutation_of_pages():
    for tokens, page_size in ((1, 16), (16, 16), (37, 16), (130, 64), (9, 1)):
        slots = RopeCache(tokens, 1, 1, 8, page_size=page_size).inputs(seed=5)["slot_mapping"].tolist()
        assert sorted(slots) == list(range(tokens))
        assert all(b == a + 1 for a, b in itertools.pairwise(slots) if b % page_size)


def test_what_inductor_is_given_is_right(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    for problem in RopeCache.examples():
        found = check(problem, KERNELS["torch_compiled"].build(problem, None, HOPPER), seed=2, row_padding=8)
        assert found.passed, f"{problem.label()}: {found.reason}"


@pytest.mark.parametrize("name", ["triton_rope", "cuda_rope"])
def test_the_default_fits_wherever_models_go(name):
    for tokens, chip in itertools.product((1, 64, 16384), (HOPPER, BLACKWELL)):
        for problem in (
            RopeCache(tokens, 32, 8, 128),
            RopeCache(tokens, 128, 1, 64, latent=512, interleaved=True),
            RopeCache(tokens, 16, 16, 256, dtype="float32"),
            RopeCache(tokens, 12, 12, 80, rotary_dim=32),
            RopeCache(tokens, 1, 1, 128, kv_dtype=FP8, rotary=False),
            RopeCache(2 * tokens, 40, 40, 128, cache=False),
        ):
            assert KERNELS[name].unfit(problem, chip) is None, problem.label()
    assert len(list(KERNELS[name].space(RopeCache(8192, 32, 8, 128), HOPPER))) >= 8


def test_refuses_what_has_no_meaning():
    uncached = [{"cache": False, **other} for other in ({"rotary": False}, {"latent": 8}, {"kv_dtype": FP8}, {"head_dim_v": 4})]
    for wrong in ({"rotary_dim": 3}, {"rotary_dim": 10}, {"kv_dtype": "int8"}, {"tokens": 0}, *uncached):
        with pytest.raises(UsageError):
            RopeCache(**{"tokens": 2, "heads": 2, "kv_heads": 1, "head_dim": 8, **wrong})
