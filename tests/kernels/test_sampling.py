"""Which tokens the sampling problem takes and which not, and that what Inductor is given is right."""

import dataclasses
import itertools

import pytest
import torch
from contest import BLACKWELL, HOPPER, kernels

from klab.harness.measure.check import check
from klab.kernels.errors import UsageError
from klab.kernels.sampling.problem import Sampling
from klab.kernels.sampling.torch_sort import sample

KERNELS = {kernel.name: kernel for kernel in kernels("triton", "cuda", "torch") if kernel.problem_type is Sampling}
GREEDY = Sampling(16, 1500, temperature=0.0)
PLAIN = Sampling(16, 1500)
NUCLEUS = Sampling(16, 1500, top_p=0.9)
BOTH = Sampling(16, 1500, top_k=20, top_p=0.98, temperature=1.5)


def shifted_token(outputs):
    outputs["token"] += 1


def first_row_for_all(outputs):
    outputs["token"][:] = int(outputs["token"][0])


@pytest.mark.parametrize("problem", [GREEDY, PLAIN, NUCLEUS, BOTH], ids=lambda p: p.label())
@pytest.mark.parametrize("fault", [shifted_token, first_row_for_all])
def test_a_wrong_token_fails(problem, fault):
    def launch(inputs, outputs):
        sample(problem, inputs, outputs)
        fault(outputs)

    assert not check(problem, launch, seed=1).passed


@pytest.mark.parametrize(
    ("problem", "change"),
    [
        (PLAIN, {"temperature": 1.1}),
        (NUCLEUS, {"top_p": 1.0}),
        (NUCLEUS, {"top_p": 0.88}),
        (BOTH, {"top_k": 0}),
        (BOTH, {"top_k": 19}),
        (BOTH, {"top_k": 21, "top_p": 1.0}),
        (Sampling(64, 1500, top_k=20), {"top_k": 21}),
        (GREEDY, {"temperature": 1.0}),
    ],
    ids=str,
)
def test_another_rule_fails(problem, change):
    for candidate, right in ((problem, True), (dataclasses.replace(problem, **change), False)):
        seeds = range(3)
        passed = [check(problem, lambda i, o, c=candidate: sample(c, i, o), seed=seed).passed for seed in seeds]
        assert all(passed) if right else not all(passed), change


def judged(problem, logits, draw, tokens):
    logits = torch.tensor(logits, dtype=torch.float32)
    inputs = {"logits": logits, "draw": torch.full((logits.shape[0],), draw)}
    reference = problem.reference(inputs)
    return [problem.mismatch("token", torch.tensor([token], dtype=torch.int32), reference) == "" for token in tokens]


def test_ties_stay_together():
    # Weights e, 1, 1, 1/e^2: top_k = 2 keeps three, and so does a nucleus that needs but one of the two.
    logits = [[1.0, 0.0, 0.0, -2.0]]
    assert judged(Sampling(1, 4, top_k=2), logits, 0.99, [0, 1, 2, 3]) == [False, False, True, False]
    assert judged(Sampling(1, 4, top_p=0.7), logits, 0.99, [0, 1, 2, 3]) == [False, False, True, False]
    assert judged(Sampling(1, 4, temperature=0.0), [[1.0, 3.0, 3.0, 2.0]], 0.5, [0, 1, 2, 3]) == [False, True, True, False]


def test_what_rounding_may_decide_is_accepted_either_way():
    # Two equal tokens: the draw is their border. Of four equal pairs, 0.5 of the mass is exactly two.
    assert judged(Sampling(1, 2), [[0.0, 0.0]], 0.5, [0, 1]) == [True, True]
    assert judged(Sampling(1, 2), [[0.0, 0.0]], 0.51, [0, 1]) == [False, True]
    half = Sampling(1, 4, top_p=0.5)
    assert judged(half, [[1.0, 1.0, 1.0 - 1e-7, -9.0]], 0.999, [0, 1, 2, 3]) == [False, True, False, False]
    border = [[0.0, float(torch.tensor(1 / 3).log()), float(torch.tensor(2 / 3).log()), -30.0]]  # shares 1/2, 1/6, 1/3
    assert judged(half, border, 0.3, [0, 1, 2, 3]) == [True, False, False, False]
    assert judged(half, border, 0.9, [0, 1, 2, 3]) == [True, False, True, False]


def test_a_forbidden_token_is_never_right():
    logits = [[float("-inf"), 0.0, float("-inf"), 0.0, float("-inf")]]
    for draw, token in ((0.0, 1), (0.5 - 2**-20, 1), (1 - 2**-24, 3)):
        assert judged(Sampling(1, 5), logits, draw, range(5)) == [i == token or (draw == 0.5 - 2**-20 and i == 3) for i in range(5)]


def test_what_inductor_is_given_is_right(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    for problem in Sampling.examples():
        found = check(problem, KERNELS["torch_compiled"].build(problem, None, HOPPER), seed=2, row_padding=8)
        assert found.passed, f"{problem.label()}: {found.reason}"


@pytest.mark.parametrize("name", ["triton_bisect", "cuda_bisect"])
def test_the_default_fits_wherever_models_go(name):
    for rows, vocab, dtype, chip in itertools.product((1, 64, 1024), (32000, 128256, 262144), ("float32", "bfloat16"), (HOPPER, BLACKWELL)):
        for rule in ({}, {"temperature": 0.0}, {"top_p": 0.9}, {"top_k": 50}):
            problem = Sampling(rows, vocab, dtype=dtype, **rule)
            assert KERNELS[name].unfit(problem, chip) is None, problem.label()
    for problem in Sampling.at_scale():
        assert len(list(KERNELS[name].space(problem, HOPPER))) >= 8


def test_refuses_what_has_no_meaning():
    for wrong in ({"top_p": 0.0}, {"top_p": 1.1}, {"temperature": -1.0}, {"top_k": -1}, {"vocab": 0}):
        with pytest.raises(UsageError):
            Sampling(**{"rows": 1, "vocab": 8, **wrong})
