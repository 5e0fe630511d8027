"""What the generic kernel tests do not ask of the convolution kernels."""

import dataclasses
from itertools import islice, product

import pytest
import torch
from contest import BLACKWELL, HOPPER

from klab.harness.measure.check import check
from klab.harness.tune.inspect_cubin import inspect_artifact
from klab.harness.tune.offline import compile_launch
from klab.kernels.conv1d.problem import Conv1d
from klab.kernels.discover import discover
from klab.kernels.errors import UsageError

KERNELS = discover().kernels
CUDA, TRITON = "conv1d/cuda_implicit_gemm", "conv1d/triton_implicit_gemm"


@pytest.mark.parametrize("shape", [(2, 9, 5, 7, 3, 1), (1, 10, 4, 3, 3, 2), (1, 7, 2, 2, 2, 1), (1, 3, 2, 2, 5, 3)], ids=str)
def test_reference_agrees_with_torch(shape):
    problem = Conv1d(*shape, dtype="float32")
    inputs = problem.inputs(seed=1)
    x, w = inputs["x"].double().transpose(1, 2), inputs["w"].double().transpose(1, 2)
    want = torch.nn.functional.conv1d(x, w, stride=problem.stride, padding=problem.padding).transpose(1, 2)
    torch.testing.assert_close(problem.reference(inputs)["out"], want)
    assert problem.outputs()["out"].shape == want.shape
    tensors = {**inputs, **problem.outputs()}
    assert problem.bytes_moved() == sum(t.numel() * t.element_size() for t in tensors.values())


def test_whisper_halves_its_frames():
    assert [p.frames_out for p in Conv1d.at_scale()] == [1500, 3000, 1500]


@pytest.mark.parametrize("change", [{"frames": 0}, {"padding": -1}, {"padding": 3}, {"width": 9}], ids=str)
def test_refuses_what_is_no_problem(change):
    with pytest.raises(UsageError):
        dataclasses.replace(Conv1d(1, 5, 4, 4), **change)


FAULTS = {
    "taps_reversed": (lambda i: i | {"w": i["w"].flip(1)}, lambda p: p.frames > 1),
    "one_frame_late": (lambda i: i | {"x": i["x"].roll(1, 1)}, lambda p: p.frames > 1),
    "last_frame_lost": (lambda i: i | {"x": torch.cat((i["x"][:, :-1], torch.zeros_like(i["x"][:, :1])), 1)}, lambda p: True),
    "padding_is_the_border": (None, lambda p: p.frames > 1),
    "last_channel_lost": (lambda i: i | {"x": torch.cat((i["x"][..., :-1], torch.zeros_like(i["x"][..., :1])), -1)}, lambda p: True),
    "sequences_swapped": (lambda i: i | {"x": i["x"].roll(1, 0)}, lambda p: p.batch > 1),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_examples_catch(fault):
    change, applies = FAULTS[fault]
    for problem in filter(applies, Conv1d.examples()):

        def launch(inputs, outputs, problem=problem):
            if change is None:  # the frames outside repeat the first and the last one, instead of being zero
                x = torch.nn.functional.pad(inputs["x"].double().transpose(1, 2), (problem.padding,) * 2, mode="replicate")
                wrong = torch.nn.functional.conv1d(x, inputs["w"].double().transpose(1, 2), stride=problem.stride).transpose(1, 2)
                outputs["out"].copy_(wrong)
            else:
                outputs["out"].copy_(problem.reference(change(inputs))["out"])

        assert not check(problem, launch, seed=5).passed, problem.label()


@pytest.mark.parametrize("kernel_id", [CUDA, TRITON])
def test_space_is_valid_finite_and_led_by_the_default(kernel_id):
    if kernel_id not in KERNELS:
        pytest.skip("its toolkit is not installed")
    kernel, values = KERNELS[kernel_id], {}
    for chip, problem in product((HOPPER, BLACKWELL), [*Conv1d.at_scale(), Conv1d(1, 1, 1, 1), Conv1d(1, 3000, 80, 384)]):
        found = list(islice(kernel.space(problem, chip), 20_000))
        assert found and found[0] == kernel.default(problem, chip)
        assert len(found) < 20_000 and len(set(found)) == len(found)
        for field in dataclasses.fields(found[0]):
            values.setdefault(field.name, set()).update(getattr(config, field.name) for config in found)
    assert all(len(v) > 1 for v in values.values()), values


REFUSED = [
    (CUDA, {"dtype": "float32"}, {}, "tensor-core"),
    (CUDA, {"batch": 70000}, {}, "sequences"),
    (CUDA, {"frames": 2_000_000}, {}, "32-bit"),
    (CUDA, {}, {"block_n": 512}, "block_n"),
    (CUDA, {}, {"stages": 8}, "shared memory"),
    (TRITON, {"batch": 70000}, {}, "sequences"),
    (TRITON, {"frames": 2_000_000}, {}, "32-bit"),
    (TRITON, {}, {"block_c": 48}, "powers of two"),
    (TRITON, {}, {"block_o": 2048}, "larger"),
    (TRITON, {}, {"block_o": 256, "num_warps": 4}, "spill"),
]


@pytest.mark.parametrize(("kernel_id", "change", "config", "reason"), REFUSED, ids=lambda v: str(v) if isinstance(v, dict) else "")
def test_refuses_what_cannot_work(kernel_id, change, config, reason):
    if kernel_id not in KERNELS:
        pytest.skip("its toolkit is not installed")
    kernel, base = KERNELS[kernel_id], Conv1d(1, 3000, 1280, 1024, stride=2)
    problem = dataclasses.replace(base, **change)
    assert reason in (kernel.fits(problem, dataclasses.replace(kernel.default(base, HOPPER), **config), HOPPER) or "it fits")


@pytest.mark.parametrize(("chip", "unit"), [(HOPPER, "wgmma"), (BLACKWELL, "tcgen05")], ids=lambda v: getattr(v, "name", v))
def test_one_clip_compiles_without_spilling(chip, unit):
    for kernel_id, wanted in ((TRITON, unit), (CUDA, "mma.sync")):
        if kernel_id not in KERNELS:
            continue
        kernel, problem = KERNELS[kernel_id], Conv1d.at_scale()[2]
        artifacts, _ = compile_launch(kernel, problem, kernel.default(problem, chip), chip)
        found = inspect_artifact(artifacts[0])
        assert found.matrix_unit == wanted and found.spill_instructions == 0, found
