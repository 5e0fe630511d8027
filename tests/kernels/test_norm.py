"""The norm's problem bites, its defaults fit, and what Inductor is given is right."""

import dataclasses
import itertools

import pytest
import torch
from contest import BLACKWELL, CPU, HOPPER, kernels

from klab.harness.measure.check import check
from klab.kernels.errors import UsageError
from klab.kernels.norm.problem import Norm
from klab.kernels.row_quantize import eager

KERNELS = {kernel.name: kernel for kernel in kernels("triton", "cuda", "torch", "cpu") if kernel.problem_type is Norm}


def norm(problem, *, fault=""):
    """A right norm in float32, but for one fault."""

    def launch(inputs, outputs):
        h = inputs["x"].float()
        if problem.residual:
            if fault != "residual is not added":
                h = h + inputs["residual"].float()
            outputs["residual"].copy_(h)
            h = outputs["residual"].float()
        if problem.kind == "layer" and fault != "mean stays":
            h = h - h.mean(-1, keepdim=True)
        square = h.square()
        if fault == "last column is lost":
            square[:, -1] = 0
        if fault == "first column is lost":
            square[:, 0] = 0
        mean = square.sum(-1, keepdim=True) / (problem.width + (fault == "width is off by one"))
        if fault == "statistics of the next row":
            mean = mean.roll(1, 0)
        h = h * torch.rsqrt(mean + problem.eps) * inputs["weight"].float().roll(int(fault == "weights are shifted"))
        if problem.kind == "layer" and fault != "no bias":
            h = h + inputs["bias"].float()
        if problem.gated:
            gate = inputs["gate"].float()
            h = h * (torch.sigmoid(gate) if fault == "sigmoid for silu" else torch.nn.functional.silu(gate))
        eager(h, problem.quantize, outputs)
        if fault == "scales are swapped":
            outputs["scale"].copy_(outputs["scale"].roll(1, -1 if problem.quantize == "fp8_group" else 0))
        if fault == "fp8 is truncated":
            outputs["out"].copy_(truncated(h, problem, outputs["scale"]))
        if fault == "an element is lost":
            outputs["out"][-1, -1] = 0.0

    return launch


def truncated(h, problem, scale):
    """fp8 rounded towards zero."""
    wide = h / scale.repeat_interleave(128 if problem.quantize == "fp8_group" else problem.width, -1)[:, : problem.width]
    near = wide.to(torch.float8_e4m3fn)
    above = near.float().abs() > wide.abs()
    return torch.where(above, near.view(torch.uint8) - 1, near.view(torch.uint8)).view(torch.float8_e4m3fn).float()


FAULTS = {
    Norm(12, 2048): [
        "last column is lost",
        "first column is lost",
        "statistics of the next row",
        "weights are shifted",
        "an element is lost",
    ],
    Norm(6, 96, gated=True): ["width is off by one", "sigmoid for silu"],
    Norm(8, 2048, "layer", residual=True): ["mean stays", "no bias", "residual is not added", "last column is lost"],
    Norm(8, 1024, residual=True, quantize="fp8_row"): [
        "scales are swapped",
        "fp8 is truncated",
        "last column is lost",
        "weights are shifted",
    ],
    Norm(8, 1024, quantize="fp8_group"): ["scales are swapped", "fp8 is truncated", "statistics of the next row"],
}


@pytest.mark.parametrize("problem", FAULTS, ids=lambda p: p.label())
def test_a_right_norm_passes_and_a_wrong_one_does_not(problem):
    found = check(problem, norm(problem), seed=1)
    assert found.passed and found.error < 0.7 * found.tolerance, found
    for fault, seed in itertools.product(FAULTS[problem], (1, 2)):
        assert not check(problem, norm(problem, fault=fault), seed=seed).passed, fault


def test_what_inductor_is_given_is_right(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    for problem in Norm.examples():
        found = check(problem, KERNELS["torch_compiled"].build(problem, None, HOPPER), seed=2, row_padding=8)
        assert found.passed, f"{problem.label()}: {found.reason}"


SHAPES = [
    Norm(rows, width, kind, residual, quantize, gated, dtype)
    for rows, width, dtype in itertools.product((1, 5, 300, 16384), (1, 127, 128, 576, 4096, 7168, 16384), ("bfloat16", "float32"))
    for kind, residual, quantize, gated in (("rms", True, "", False), ("layer", True, "fp8_group", True), ("rms", False, "fp8_row", False))
]


@pytest.mark.parametrize("name", ["triton_norm", "cuda_norm", "cpu_blocked"])
def test_the_default_fits_wherever_models_go_and_few_candidates_do_not(name):
    kernel = KERNELS[name]
    for problem in SHAPES:
        if problem.width == 16384 and (problem.dtype == "float32" or (name == "triton_norm" and problem.gated)):
            continue  # the 64 registers of each of 1024 threads do not hold the row; cuda_norm_long takes it
        for chip in [CPU] if name == "cpu_blocked" else [HOPPER, BLACKWELL]:
            assert kernel.unfit(problem, chip) is None, problem.label()
    serving = Norm(8192, 4096, residual=True)
    space = list(kernel.space(serving, CPU if name == "cpu_blocked" else HOPPER))
    assert len(space) == len(set(space)) >= 8
    for field in dataclasses.fields(space[0]):
        assert len({getattr(config, field.name) for config in space}) > 1, field.name


def test_long_rows_have_a_kernel_of_their_own():
    kernel = KERNELS["cuda_norm_long"]
    for width, dtype, chip in itertools.product((16385, 65536), ("bfloat16", "float16"), (HOPPER, BLACKWELL)):
        for kind, quantize in itertools.product(("rms", "layer"), ("", "fp8_row", "fp8_group")):
            problem = Norm(3, width, kind, residual=True, quantize=quantize, gated=True, dtype=dtype)
            assert kernel.unfit(problem, chip) is None, problem.label()
            assert all("spill" in KERNELS[name].unfit(problem, chip) for name in ("triton_norm", "cuda_norm"))
    assert kernel.unfit(Norm(3, 16384, dtype="float32"), HOPPER) is None
    assert "shared memory" in kernel.unfit(Norm(3, 65536, dtype="float32"), HOPPER)
    assert "at least" in kernel.unfit(Norm(3, 2048), HOPPER)
    assert len(list(kernel.space(Norm(64, 32768, residual=True), HOPPER))) >= 8


def test_refuses_what_cannot_work():
    triton, cuda = KERNELS["triton_norm"], KERNELS["cuda_norm"]
    problem = Norm(8192, 16384)
    assert "spill" in triton.fits(problem, triton.config_type(num_warps=2), HOPPER)
    assert "stages need" in triton.fits(problem, triton.config_type(num_warps=32, num_stages=2), HOPPER)
    assert "hold fewer" in cuda.fits(problem, cuda.config_type(lanes=256, vectors=4), HOPPER)
    assert "nothing to do" in cuda.fits(Norm(8, 128), cuda.config_type(), HOPPER)
    assert "needs 16 lanes" in cuda.fits(Norm(8, 128, quantize="fp8_group"), cuda.config_type(lanes=8), HOPPER)
    for wrong in ({"kind": "batch"}, {"quantize": "int8"}, {"rows": 0}):
        with pytest.raises(UsageError):
            Norm(**{"rows": 1, "width": 8, **wrong})
