"""What the generic kernel tests do not ask of the grouped matmul kernels."""

import dataclasses
import importlib.util
from itertools import islice, pairwise

import pytest
import torch
from contest import BLACKWELL, CPU, HOPPER

from klab.harness.measure.check import check
from klab.kernels.discover import discover
from klab.kernels.grouped_matmul.problem import GroupedMatmul
from klab.kernels.quantize import dequantize

KERNELS = discover().kernels
NEED_TRITON = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
SERVED = [
    GroupedMatmul(1, 128, 8, 1536, 2048),
    GroupedMatmul(64, 8, 2, 3584, 4096),
    GroupedMatmul(8192, 128, 4, 5760, 2880, skew=1.0),
    GroupedMatmul(4096, 32, 2, 4096, 7168, format="fp8_block"),
]


def test_offsets_are_those_of_sorted_rows():
    problem = GroupedMatmul(50, 6, 2, 8, 8, skew=1.5)
    offsets = problem.inputs(seed=3)["offsets"]
    assert offsets.dtype == torch.int32 and offsets.tolist()[0] == 0 and offsets.tolist()[-1] == problem.rows == 100
    sizes = offsets.diff().tolist()
    assert min(sizes) >= 0 and max(sizes) <= 50 and max(sizes) > 2 * sorted(sizes)[2]  # no token twice with one expert; skewed
    assert torch.equal(offsets, problem.inputs(seed=3, row_padding=8)["offsets"])
    assert not torch.equal(offsets, problem.inputs(seed=4)["offsets"])


def test_work():
    problem = GroupedMatmul(4096, 8, 2, 256, 128)
    assert problem.flops() == 2.0 * 8192 * 256 * 128
    assert problem.bytes_moved() == pytest.approx(8 * 256 * 128 * 2 + 8192 * (256 + 128) * 2 + 4 * 9, rel=1e-6)
    few = GroupedMatmul(1, 64, 4, 256, 128)
    assert few.bytes_moved() == pytest.approx(4 * 256 * 128 * 2 + 4 * (256 + 128) * 2 + 4 * 65)
    narrow = dataclasses.replace(few, format="fp8_block")
    assert narrow.math_dtype == "float8_e4m3fn" and narrow.wide() == few


def multiplied(problem, *, fault=""):
    """The product in float32, right but for one fault."""

    def launch(inputs, outputs):
        x, w, k = inputs["x"].float(), inputs["w"].float(), problem.k
        if problem.format:
            x_scale, w_scale = inputs["x_scale"], inputs["w_scale"]
            x = dequantize(inputs["x"], x_scale.roll(1, dims=-1) if fault == "scale of the next block" else x_scale, (1, 128))
            w = dequantize(inputs["w"], w_scale.roll(1, dims=1) if fault == "scale of the next rows" else w_scale, (128, 128))
        for e, (first, end) in enumerate(pairwise(inputs["offsets"].tolist())):
            weight = w[e].clone()
            if fault == "last element of k":
                weight[:, k - 1] = 0
            rows = x[first:end] @ weight.T
            if fault == "last row of an expert" and len(rows):
                rows[-1] = 0
            if fault == "last column":
                rows[:, -1] = 0
            outputs["out"][first:end] = rows
        if fault == "border shifted":
            outputs["out"].copy_(outputs["out"].roll(1, dims=0))

    return launch


PLAIN = ["last element of k", "last row of an expert", "last column", "border shifted"]
FAULTS = [
    (GroupedMatmul(40, 3, 2, 72, 40, "float16"), PLAIN),
    (GroupedMatmul(50, 4, 1, 136, 96), PLAIN),
    (GroupedMatmul(30, 3, 2, 160, 200, format="fp8_block"), [*PLAIN, "scale of the next block", "scale of the next rows"]),
]


@pytest.mark.parametrize(("problem", "faults"), FAULTS, ids=lambda v: v.label() if isinstance(v, GroupedMatmul) else "")
def test_a_right_product_passes_and_a_wrong_one_does_not(problem, faults):
    for seed in (1, 2):
        right = check(problem, multiplied(problem), seed=seed)
        assert right.passed and right.error < 0.6 * right.tolerance
        for fault in faults:
            assert not check(problem, multiplied(problem, fault=fault), seed=seed).passed, fault


@pytest.mark.parametrize("name", ["triton_grouped", "cuda_grouped"])
def test_space_is_valid_and_led_by_the_default(name):
    if f"grouped_matmul/{name}" not in KERNELS:
        pytest.skip("its toolkit is not installed")
    kernel = KERNELS[f"grouped_matmul/{name}"]
    for problem in SERVED:
        for chip in (HOPPER, BLACKWELL):
            found = list(islice(kernel.space(problem, chip), 5000))
            if kernel.unfit(problem, chip) is not None:
                assert found == [] and problem.format
                continue
            assert found[0] == kernel.default(problem, chip)
            assert len(set(found)) == len(found) >= 50
            assert all(kernel.fits(problem, config, chip) is None for config in found[:50])
        assert kernel.unfit(problem, CPU) is not None


@NEED_TRITON
@pytest.mark.parametrize(
    ("change", "problem", "reason"),
    [
        ({"block_m": 96}, SERVED[2], "powers of two"),
        ({"block_n": 256, "num_warps": 4}, SERVED[2], "spill"),
        ({"num_stages": 8, "block_n": 256}, SERVED[2], "shared memory"),
        ({"group_m": 0}, SERVED[2], "at least 1"),
        ({"block_k": 256, "block_m": 16, "block_n": 32, "num_warps": 4}, SERVED[3], "at most 128"),
        ({}, dataclasses.replace(SERVED[2], k=2884), "descriptors"),
        ({}, dataclasses.replace(SERVED[2], n=48), "larger than the matrix"),
    ],
)
def test_refuses_what_cannot_work(change, problem, reason):
    kernel = KERNELS["grouped_matmul/triton_grouped"]
    assert reason in (kernel.fits(problem, dataclasses.replace(kernel.config_type(), **change), HOPPER) or "it fits")


def test_torch_grouped_mm_says_what_it_cannot_do():
    kernel = KERNELS["grouped_matmul/torch_grouped_mm"]
    assert "16 bytes" in kernel.unfit(dataclasses.replace(SERVED[0], k=1001), CPU)
    assert "bfloat16" in kernel.unfit(dataclasses.replace(SERVED[0], dtype="float16"), HOPPER)
    assert kernel.unfit(SERVED[0], HOPPER) is None


@pytest.mark.parametrize(("change", "reason"), [({"top_k": 200}, "top_k"), ({"format": "int4"}, "format"), ({"n": 0}, "of at least 1")])
def test_refuses_impossible_problems(change, reason):
    with pytest.raises(Exception, match=reason):
        dataclasses.replace(SERVED[0], **change)
