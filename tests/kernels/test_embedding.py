"""The embedding's problem bites and its defaults fit."""

import itertools

import pytest
import torch
from contest import BLACKWELL, HOPPER, kernels

from klab.harness.measure.check import check
from klab.kernels.embedding.problem import Embedding

KERNELS = {kernel.name: kernel for kernel in kernels("triton", "cuda", "torch") if kernel.problem_type is Embedding}


@pytest.mark.parametrize("fault", ["", "next row", "last column", "last token"])
def test_a_right_gather_passes_and_a_wrong_one_does_not(fault):
    problem = Embedding(40, 300, 264)

    def launch(inputs, outputs):
        ids = inputs["ids"].long()
        rows = inputs["weight"][(ids + 1) % problem.vocab if fault == "next row" else ids].clone()
        if fault == "last column":
            rows[0, -1] = rows[0, -2]
        if fault == "last token":
            rows[-1] = rows[-2]
        outputs["out"].copy_(rows)

    assert check(problem, launch, seed=1).passed == (not fault)


def test_the_ends_of_the_table_are_among_the_tokens():
    for tokens in (1, 2, 50):
        ids = Embedding(tokens, 1000, 8).inputs(seed=3)["ids"]
        assert int(ids.max()) == 999 and (tokens == 1 or int(ids.min()) == 0)


def test_what_inductor_is_given_is_right(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    for problem in Embedding.examples():
        assert check(problem, KERNELS["torch_compiled"].build(problem, None, HOPPER), seed=2, row_padding=8).passed


@pytest.mark.parametrize("name", ["triton_embedding", "cuda_embedding"])
def test_the_default_fits_wherever_models_go(name):
    for tokens, width, dtype, chip in itertools.product(
        (1, 33, 16384), (1, 130, 2048, 16384), ("bfloat16", "float32"), (HOPPER, BLACKWELL)
    ):
        problem = Embedding(tokens, 128256, width, dtype)
        assert KERNELS[name].unfit(problem, chip) is None, problem.label()
