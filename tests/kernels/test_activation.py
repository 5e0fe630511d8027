"""The activation's problem bites, its defaults fit, and what Inductor is given is right."""

import itertools

import pytest
import torch
from contest import BLACKWELL, HOPPER, kernels

from klab.harness.measure.check import check
from klab.kernels.activation._eager import act
from klab.kernels.activation.problem import KINDS, Activation
from klab.kernels.errors import UsageError
from klab.kernels.row_quantize import eager

KERNELS = {kernel.name: kernel for kernel in kernels("triton", "cuda", "torch", "cpu") if kernel.problem_type is Activation}


def changed(problem, change):
    """A right activation whose input was changed before, or whose output after."""

    def launch(inputs, outputs):
        x = change(inputs["x"].float().clone(), problem.width)
        eager(act(problem, x), problem.quantize, outputs)

    return launch


def swapped(x, width):
    return torch.cat([x[:, width:], x[:, :width]], dim=1)


def shifted(x, width):
    return torch.cat([x[:, :width].roll(1, 1), x[:, width:]], dim=1)


def last_lost(x, width):
    x[:, width - 1] = 0
    return x


@pytest.mark.parametrize("kind", KINDS)
def test_wrong_halves_and_columns_fail(kind):
    problem = Activation(4, 512, kind)
    assert check(problem, changed(problem, lambda x, width: x), seed=1).passed
    faults = [swapped, shifted] if kind != "sigmoid" else [swapped, shifted, last_lost]
    for fault in faults:
        assert not check(problem, changed(problem, fault), seed=1).passed, fault.__name__


@pytest.mark.parametrize("kind", ["gelu", "gelu_tanh", "silu"])
def test_one_gelu_is_not_another(kind):
    problem = Activation(64, 1024, kind, dtype="float32")
    for other in {"gelu", "gelu_tanh", "silu"} - {kind}:
        wrong = Activation(64, 1024, other, dtype="float32")
        assert not check(problem, changed(wrong, lambda x, width: x), seed=1).passed


@pytest.mark.parametrize("quantize", ["fp8_row", "fp8_group"])
def test_a_maximum_that_misses_an_end_fails(quantize):
    problem = Activation(6, 640, quantize=quantize)
    right = check(problem, changed(problem, lambda x, width: x), seed=1)
    assert right.passed and right.error < 0.5 * right.tolerance

    def missing(column):
        def launch(inputs, outputs):
            wide = act(problem, inputs["x"].float())
            eager(wide, quantize, outputs)
            kept = wide.clone()
            kept[:, column] = 0.0
            narrow = {name: torch.empty_like(tensor) for name, tensor in outputs.items()}
            eager(kept, quantize, narrow)
            outputs["scale"].copy_(narrow["scale"])

        return launch

    for column in (0, -1):
        assert not check(problem, missing(column), seed=1).passed


def test_what_inductor_is_given_is_right(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    for problem in Activation.examples():
        found = check(problem, KERNELS["torch_compiled"].build(problem, None, HOPPER), seed=2, row_padding=8)
        assert found.passed, f"{problem.label()}: {found.reason}"


@pytest.mark.parametrize("name", ["triton_activation", "cuda_activation"])
def test_the_default_fits_wherever_models_go(name):
    for rows, width, quantize, chip in itertools.product(
        (1, 7, 300, 16384), (1, 128, 700, 2048, 14336, 18432, 28672), ("", "fp8_row", "fp8_group"), (HOPPER, BLACKWELL)
    ):
        for dtype in ("bfloat16",) if quantize == "fp8_row" else ("bfloat16", "float32"):
            problem = Activation(rows, width, quantize=quantize, dtype=dtype)
            assert KERNELS[name].unfit(problem, chip) is None, problem.label()
    assert len(list(KERNELS[name].space(Activation(8192, 14336), HOPPER))) >= 20


def test_refuses_what_has_no_meaning():
    for wrong in ({"kind": "tanh"}, {"kind": "swiglu_clamped", "gated": False}, {"quantize": "int4"}, {"width": 0}):
        with pytest.raises(UsageError):
            Activation(**{"rows": 2, "width": 8, **wrong})
