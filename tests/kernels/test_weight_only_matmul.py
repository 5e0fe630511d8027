"""What the generic kernel tests do not ask of the weight-only kernels."""

import dataclasses
import re
from itertools import islice, product

import pytest
import torch
from contest import BLACKWELL, CPU, HOPPER
from cuda_emulator import Emulator

from klab.harness.measure.check import check
from klab.harness.tune.inspect_cubin import inspect_artifact
from klab.harness.tune.offline import compile_launch
from klab.kernels.cuda_module import backend
from klab.kernels.discover import discover
from klab.kernels.errors import UsageError
from klab.kernels.quantize import int4_values
from klab.kernels.weight_only_matmul._unpack_ptx import unpack_ptx
from klab.kernels.weight_only_matmul.problem import WeightOnlyMatmul

KERNELS = discover().kernels
CUDA = ["weight_only_matmul/cuda_gemv", "weight_only_matmul/cuda_mma"]
TRITON = "weight_only_matmul/triton_split_k"
NEED_TRITON = pytest.mark.skipif(TRITON not in KERNELS, reason="triton is not installed")
NEED_CUDA = pytest.mark.skipif(CUDA[0] not in KERNELS, reason="cupy is not installed")
SHAPES = [(1, 1, 2), (1, 14336, 4096), (8, 4096, 14336), (16, 28672, 4096), (64, 1000, 144), (200, 6144, 4096)]


def test_bytes_are_those_of_packed_weights():
    assert WeightOnlyMatmul(1, 256, 512).bytes_moved() == 2 * 512 + 256 * 256 + 2 * 256 * 4 + 2 * 256
    assert WeightOnlyMatmul(1, 256, 512, format="fp8", group=0).bytes_moved() == 2 * 512 + 256 * 512 + 4 * 256 + 2 * 256
    for problem in WeightOnlyMatmul.examples():
        tensors = {**problem.inputs(seed=0), **problem.outputs()}
        assert problem.bytes_moved() == sum(t.numel() * t.element_size() for t in tensors.values()), problem.label()


@pytest.mark.parametrize(("form", "group", "loss"), [("int4", 128, 0.2), ("int4", 32, 0.15), ("fp8", 0, 0.04)])
def test_approximates_the_wide_problem(form, group, loss):
    problem = WeightOnlyMatmul(8, 64, 512, "float32", form, group)
    wide = problem.wide()
    inputs, wide_inputs = problem.inputs(seed=3), problem.wide_inputs(seed=3)
    assert torch.equal(inputs["x"], wide_inputs["x"])
    got, want = problem.reference(inputs)["out"], wide.reference(wide_inputs)["out"]
    error = torch.linalg.vector_norm(got - want) / torch.linalg.vector_norm(want)
    assert loss / 5 < error < loss


@pytest.mark.parametrize("change", [{"k": 3}, {"group": 24}, {"group": -16}, {"format": "int3"}, {"m": 0}], ids=str)
def test_refuses_what_is_no_problem(change):
    with pytest.raises(UsageError):
        dataclasses.replace(WeightOnlyMatmul(4, 4, 4), **change)


def halves_swapped(problem, inputs):
    w = inputs["w"]
    return inputs | {"w": (w >> 4 | w << 4) if problem.format == "int4" else w.view(torch.uint8).roll(1, 1).view(w.dtype)}


def last_columns_lost(problem, inputs):
    x = inputs["x"].clone()
    x[:, -2:] = 0
    return inputs | {"x": x}


def rows_scales_swapped(problem, inputs):
    return inputs | {"scale": inputs["scale"].roll(1, 0)}


def groups_scales_swapped(problem, inputs):
    return inputs | {"scale": inputs["scale"].roll(1, 1)}


FAULTS = {
    halves_swapped: lambda p: p.k > 2,
    last_columns_lost: lambda p: True,
    rows_scales_swapped: lambda p: p.n > 1,
    groups_scales_swapped: lambda p: p.groups > 1,
}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda f: f.__name__)
def test_examples_catch(fault):
    for problem in filter(FAULTS[fault], WeightOnlyMatmul.examples()):

        def launch(inputs, outputs, problem=problem):
            outputs["out"].copy_(problem.reference(fault(problem, inputs))["out"])

        assert not check(problem, launch, seed=5).passed, problem.label()


@pytest.mark.parametrize("kernel_id", [*CUDA, TRITON, "weight_only_matmul/cpu_blocked"])
def test_space_is_valid_finite_and_led_by_the_default(kernel_id):
    if kernel_id not in KERNELS:
        pytest.skip("its toolkit is not installed")
    kernel, sizes = KERNELS[kernel_id], {}
    for chip, shape, (form, group) in product((HOPPER, BLACKWELL, CPU), SHAPES, (("int4", 128), ("int4", 0), ("fp8", 0))):
        problem = WeightOnlyMatmul(*shape, format=form, group=group)
        found = list(islice(kernel.space(problem, chip), 20_000))
        if kernel.unfit(problem, chip) is not None:
            assert found == []
            continue
        assert found[0] == kernel.default(problem, chip)
        assert len(found) < 20_000 and len(set(found)) == len(found)
        assert kernel.config_type.from_json(found[-1].to_json_full()) == found[-1]
        for field in dataclasses.fields(found[0]):
            sizes.setdefault(field.name, set()).update(getattr(config, field.name) for config in found)
    # Every knob offers a choice somewhere.
    assert sizes and all(len(values) > 1 for values in sizes.values()), sizes


@pytest.mark.parametrize("kernel_id", [*CUDA, TRITON])
def test_examples_reach_the_second_pass(kernel_id):
    """The sum over the parts of k is run by the generic tests only if the default splits for some example."""
    if kernel_id not in KERNELS:
        pytest.skip("its toolkit is not installed")
    kernel = KERNELS[kernel_id]
    defaults = [kernel.default(p, HOPPER) for p in WeightOnlyMatmul.examples() if kernel.unfit(p, HOPPER) is None]
    assert any(getattr(c, "split_k", 0) > 1 or getattr(c, "split", 0) > 1 for c in defaults)


REFUSED = [
    (CUDA[0], {"m": 9}, {}, "up to 8 rows"),
    (CUDA[0], {"group": 64}, {}, "several scales"),
    (CUDA[0], {"dtype": "float32"}, {}, "tensor-core"),
    (CUDA[0], {}, {"stages": 16, "unroll": 4}, "shared memory"),
    (CUDA[0], {}, {"split": 4096}, "parts"),
    (CUDA[1], {"group": 32}, {}, "several scales"),
    (CUDA[1], {}, {"block_m": 24}, "block_m"),
    (CUDA[1], {}, {"block_m": 64, "row_tiles": 4, "warps_n": 2}, "registers"),
    (CUDA[1], {}, {"warps_n": 8, "warps_k": 4}, "16 warps"),
    (TRITON, {"dtype": "float32"}, {}, "tensor-core"),
    (TRITON, {"k": 130}, {}, "multiple of 4"),
    (TRITON, {"group": 32}, {}, "several scales"),
    (TRITON, {}, {"block_k": 256}, "several scales"),
    (TRITON, {}, {"block_n": 96}, "powers of two"),
    (TRITON, {}, {"block_n": 256}, "spill"),
    (TRITON, {}, {"split_k": 64}, "more splits"),
    ("weight_only_matmul/cpu_blocked", {}, {"block_n": 8192}, "cache"),
]


@pytest.mark.parametrize(("kernel_id", "change", "config", "reason"), REFUSED, ids=lambda v: str(v) if isinstance(v, dict) else "")
def test_refuses_what_cannot_work(kernel_id, change, config, reason):
    if kernel_id not in KERNELS:
        pytest.skip("its toolkit is not installed")
    kernel = KERNELS[kernel_id]
    chip = CPU if kernel.kinds == ("cpu",) else HOPPER
    base = WeightOnlyMatmul(8, 4096, 4096)
    problem = dataclasses.replace(base, **change)
    assert reason in (kernel.fits(problem, dataclasses.replace(kernel.default(base, chip), **config), chip) or "it fits")


def run_ptx(text, packed):
    """The results of PTX on one 32-bit register per element of `packed` (int64): the few instructions that `unpack_ptx` uses."""
    register, results = {}, {}
    number = {"int4": 4, "fp8": 2}["int4" if "$4" in text else "fp8"]

    def value(name):
        if name.startswith("$"):
            assert int(name[1:]) == number
            return packed
        return torch.full_like(packed, int(name, 16 if name.startswith("0x") else 10)) if name[0].isdigit() else register[name]

    def floats(word, dtype):
        halves = torch.stack((word & 0xFFFF, word >> 16), -1)
        return (halves - 0x10000 * (halves > 0x7FFF)).to(torch.int16).view(dtype).float()

    for line in text.strip("{}\n").split("\n"):
        operation, *operands = re.findall(r"[\w.$]+", line)
        if operation == ".reg":
            continue
        to, *sources = operands
        a = [value(s) for s in sources]
        if operation.startswith("fma"):
            dtype = torch.bfloat16 if "bf16" in operation else torch.float16
            x, y, z = (floats(v, dtype) for v in a)
            results[int(to[1:])] = (x * y + z).to(dtype)
            continue
        if operation.startswith("lop3"):
            table = int(sources[3], 16)
            out = torch.zeros_like(packed)
            for row in range(8):
                term = torch.full_like(packed, 0xFFFFFFFF if table >> row & 1 else 0)
                for bit, word in zip((4, 2, 1), a[:3], strict=True):
                    term &= word if row & bit else ~word & 0xFFFFFFFF
                out |= term
        else:
            name = operation.split(".")[0]
            out = {"mov": lambda v: v, "shr": lambda v, n: v >> n, "shl": lambda v, n: v << n & 0xFFFFFFFF, "and": lambda v, n: v & n}[
                name
            ](*a)
        register[to] = out
    return [results[i] for i in range(number)]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("form", ["int4", "fp8"])
def test_ptx_unpacks_every_value_exactly(form, dtype):
    words = torch.arange(0x10000).to(torch.int64)
    packed = words | (words.flip(0) << 16)  # the upper half is another word
    results = run_ptx(unpack_ptx(form, dtype), packed)
    for half, word in enumerate((packed & 0xFFFF, packed >> 16)):
        data = torch.stack((word & 0xFF, word >> 8), -1).to(torch.uint8)
        want = int4_values(data).float() if form == "int4" else data.view(torch.float8_e4m3fn).float()
        for i, result in enumerate(results):
            number = ~want[:, i].isnan()  # e4m3 has one NaN per sign, which inputs never have
            assert torch.equal(result[number, half].float(), want[number, i]), (form, i, half)


@NEED_CUDA
@pytest.mark.skipif(bool(Emulator.missing()), reason=Emulator.missing() or "g++ is here")
@pytest.mark.parametrize(("kernel_id", "form"), [(CUDA[0], "int4"), (CUDA[1], "fp8")])
def test_cuda_unpacks_every_value_exactly(kernel_id, form):
    """Rows of x that are unit vectors read weights back one by one, all that a byte can be."""
    problem = WeightOnlyMatmul(8, 16, 256, "bfloat16", form, 0)
    inputs, outputs = problem.inputs(seed=0), problem.outputs()
    data = torch.arange(16 * problem.packed_k).remainder(256).to(torch.uint8).view(16, -1)
    if form == "fp8":
        data[(data & 127) == 127] = 0
    inputs["w"].copy_(data if form == "int4" else data.view(torch.float8_e4m3fn))
    inputs["scale"].fill_(1.0)
    launch = KERNELS[kernel_id].build(problem, KERNELS[kernel_id].default(problem, HOPPER), HOPPER)
    want = int4_values(data).float() if form == "int4" else data.view(torch.float8_e4m3fn).float()
    for start in (0, 104, 248):
        inputs["x"].zero_()
        inputs["x"][range(8), range(start, start + 8)] = 1.0
        with backend(Emulator()):
            launch(inputs, outputs)
        assert torch.equal(outputs["out"].float(), want[:, start : start + 8].T)


@NEED_TRITON
def test_triton_refuses_rows_at_odd_addresses():
    problem, kernel = WeightOnlyMatmul(16, 64, 128, format="fp8", group=0), KERNELS[TRITON]
    launch = kernel.build(problem, kernel.default(problem, HOPPER), HOPPER)
    with pytest.raises(UsageError, match="even addresses"):
        launch(problem.inputs(seed=0, device="meta", row_padding=1), problem.outputs(device="meta"))


@pytest.mark.parametrize(("chip", "unit"), [(HOPPER, "wgmma"), (BLACKWELL, "tcgen05")], ids=lambda v: getattr(v, "name", v))
@pytest.mark.parametrize("problem", WeightOnlyMatmul.at_scale()[2:], ids=lambda p: p.label().replace(" ", "-"))
def test_defaults_compile_without_spilling(problem, chip, unit):
    """For the problems that test_compiled.py leaves out."""
    for kernel_id in [*CUDA, TRITON]:
        kernel = KERNELS.get(kernel_id)
        if kernel is None or kernel.unfit(problem, chip) is not None:
            continue
        artifacts, _ = compile_launch(kernel, problem, kernel.default(problem, chip), chip)
        first = inspect_artifact(artifacts[0])
        assert first.spill_instructions == 0 and first.stack_bytes == 0, (kernel_id, first)
        assert first.matrix_unit == (unit if kernel_id == TRITON else "mma.sync"), (kernel_id, first)
