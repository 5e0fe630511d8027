"""What the generic kernel tests do not ask of the batched matmul kernels."""

import dataclasses
from itertools import islice, product

import pytest
import torch
from contest import BLACKWELL, HOPPER

from klab.harness.measure.check import check
from klab.harness.tune.inspect_cubin import inspect_artifact
from klab.harness.tune.offline import compile_launch
from klab.kernels.batched_matmul.problem import BatchedMatmul
from klab.kernels.discover import discover
from klab.kernels.errors import UsageError

KERNELS = discover().kernels
CUDA, TRITON = "batched_matmul/cuda_mma", "batched_matmul/triton_tiled"


def test_reference_is_a_matmul_per_head():
    problem = BatchedMatmul(3, 4, 5, 6, "float32")
    inputs = problem.inputs(seed=0)
    got = problem.reference(inputs)["out"]
    for head in range(3):
        torch.testing.assert_close(got[:, head], inputs["x"][:, head].double() @ inputs["w"][head].double().T)
    tensors = {**inputs, **problem.outputs()}
    assert problem.bytes_moved() == sum(t.numel() * t.element_size() for t in tensors.values())
    with pytest.raises(UsageError):
        BatchedMatmul(0, 1, 1, 1)


FAULTS = {
    "heads_swapped": (lambda i: i | {"w": i["w"].roll(1, 0)}, lambda p: p.batch > 1),
    "tokens_swapped": (lambda i: i | {"x": i["x"].roll(1, 0)}, lambda p: p.m > 1),
    "last_k_lost": (lambda i: i | {"x": torch.cat((i["x"][..., :-1], torch.zeros_like(i["x"][..., :1])), -1)}, lambda p: True),
    "last_row_is_the_one_before": (lambda i: i | {"w": torch.cat((i["w"][:, :-1], i["w"][:, -2:-1]), 1)}, lambda p: p.n > 1),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_examples_catch(fault):
    change, applies = FAULTS[fault]
    for problem in filter(applies, BatchedMatmul.examples()):

        def launch(inputs, outputs, problem=problem):
            outputs["out"].copy_(problem.reference(change(inputs))["out"])

        assert not check(problem, launch, seed=5).passed, problem.label()


@pytest.mark.parametrize("kernel_id", [CUDA, TRITON])
def test_space_is_valid_finite_and_led_by_the_default(kernel_id):
    if kernel_id not in KERNELS:
        pytest.skip("its toolkit is not installed")
    kernel, values = KERNELS[kernel_id], {}
    for chip, shape in product((HOPPER, BLACKWELL), [(1, 1, 1, 1), (128, 1, 512, 128), (128, 256, 128, 512), (16, 4096, 512, 128)]):
        problem = BatchedMatmul(*shape)
        found = list(islice(kernel.space(problem, chip), 20_000))
        assert found and found[0] == kernel.default(problem, chip)
        assert len(found) < 20_000 and len(set(found)) == len(found)
        for field in dataclasses.fields(found[0]):
            values.setdefault(field.name, set()).update(getattr(config, field.name) for config in found)
    assert all(len(v) > 1 for v in values.values()), values


REFUSED = [
    (CUDA, {"dtype": "float32"}, {}, "tensor-core"),
    (CUDA, {"batch": 70000}, {}, "heads"),
    (CUDA, {}, {"block_m": 24}, "16x8"),
    (CUDA, {}, {"stages": 1}, "two stages"),
    (CUDA, {}, {"stages": 8}, "shared memory"),
    (CUDA, {}, {"block_m": 256, "block_n": 256}, "registers"),
    (TRITON, {"batch": 70000}, {}, "heads"),
    (TRITON, {}, {"block_n": 96}, "powers of two"),
    (TRITON, {}, {"block_k": 8}, "at least 16"),
    (TRITON, {}, {"block_m": 256, "block_n": 256, "num_warps": 4}, "spill"),
    (TRITON, {}, {"num_stages": 9}, "shared memory"),
]


@pytest.mark.parametrize(("kernel_id", "change", "config", "reason"), REFUSED, ids=lambda v: str(v) if isinstance(v, dict) else "")
def test_refuses_what_cannot_work(kernel_id, change, config, reason):
    if kernel_id not in KERNELS:
        pytest.skip("its toolkit is not installed")
    kernel, base = KERNELS[kernel_id], BatchedMatmul(16, 512, 512, 512)
    problem = dataclasses.replace(base, **change)
    assert reason in (kernel.fits(problem, dataclasses.replace(kernel.default(base, HOPPER), **config), HOPPER) or "it fits")


@pytest.mark.parametrize(("chip", "unit"), [(HOPPER, "wgmma"), (BLACKWELL, "tcgen05")], ids=lambda v: getattr(v, "name", v))
def test_one_token_still_uses_the_matrix_unit(chip, unit):
    """Sixteen rows of x are too few for it, so the weights come first."""
    for kernel_id, wanted in ((TRITON, unit), (CUDA, "mma.sync")):
        if kernel_id not in KERNELS:
            continue
        kernel, problem = KERNELS[kernel_id], BatchedMatmul.at_scale()[2]
        artifacts, _ = compile_launch(kernel, problem, kernel.default(problem, chip), chip)
        found = inspect_artifact(artifacts[0])
        assert found.matrix_unit == wanted and found.spill_instructions == 0, found
