"""What the generic kernel tests do not ask of the matmul kernels."""

import dataclasses
import importlib.util
import subprocess
import sys
import types
from contextlib import contextmanager
from itertools import islice, product
from pathlib import Path

import numpy
import pytest
import torch
from contest import BLACKWELL, CPU, HOPPER
from matmul_inputs import cancelling, nan_padded

from klab.harness.measure.check import check, compare, poison
from klab.harness.tune.inspect_cubin import inspect_artifact
from klab.harness.tune.offline import compile_launch
from klab.kernels.discover import ROOT, discover
from klab.kernels.errors import UsageError
from klab.kernels.matmul.problem import Matmul

KERNELS = discover().kernels
TRITON = ["matmul/triton_tiled", "matmul/triton_persistent"]
NEED_TRITON = pytest.mark.skipif("matmul/triton_tiled" not in KERNELS, reason="triton is not installed")
# From one output to a logits matrix: (m, n, k).
SHAPES = [
    (1, 1, 1), (1, 14336, 4096), (7, 24, 8), (16, 4096, 14336), (64, 1000, 40), (100, 128, 64), (512, 6144, 4096), (4096, 14336, 4096),
    (16384, 152064, 8192),
]  # fmt: skip


def space(kernel, problem, chip, at_most=20_000):
    return list(islice(kernel.space(problem, chip), at_most))


@pytest.mark.parametrize("kernel_id", [*TRITON, "matmul/cpu_blocked"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_space_is_valid_finite_and_led_by_the_default(kernel_id, shape):
    if kernel_id not in KERNELS:
        pytest.skip("triton is not installed")
    kernel = KERNELS[kernel_id]
    for chip, dtype, layout in product((HOPPER, BLACKWELL, CPU), ("bfloat16", "float32"), ("nt", "nn")):
        problem = Matmul(*shape, dtype, layout)
        found = space(kernel, problem, chip)
        if kernel.unfit(problem, chip) is not None:
            assert found == []
            continue
        assert found[0] == kernel.default(problem, chip)
        assert len(found) < 20_000
        assert len(set(found)) == len(found)
        assert all(kernel.fits(problem, config, chip) is None for config in found)
        assert kernel.config_type.from_json(found[-1].to_json_full()) == found[-1]


@NEED_TRITON
@pytest.mark.parametrize("chip", [HOPPER, BLACKWELL], ids=lambda chip: chip.name)
def test_pointers_do_every_problem_and_descriptors_every_aligned_one(chip):
    for shape, dtype, layout in product(SHAPES, ("bfloat16", "float16", "float32"), ("nt", "nn")):
        problem = Matmul(*shape, dtype, layout)
        assert KERNELS["matmul/triton_tiled"].unfit(problem, chip) is None, problem.label()
        aligned = problem.k % 8 == 0 and problem.n % 8 == 0 and dtype != "float32"
        assert (KERNELS["matmul/triton_persistent"].unfit(problem, chip) is None) == aligned, problem.label()


@NEED_TRITON
def test_space_is_worth_tuning():
    for kernel_id, m in product(TRITON, (1, 64, 4096)):
        found = space(KERNELS[kernel_id], Matmul(m, 14336, 4096), HOPPER)
        assert len(found) >= 100, (kernel_id, m)
        # Every knob must offer a choice somewhere in the space of some m.
    for kernel_id in TRITON:
        found = [c for m in (1, 64, 4096) for chip in (HOPPER, BLACKWELL) for c in space(KERNELS[kernel_id], Matmul(m, 4096, 4096), chip)]
        for field in dataclasses.fields(found[0]):
            assert len({getattr(config, field.name) for config in found}) > 1, (kernel_id, field.name)


REFUSED = [
    ("matmul/triton_tiled", {"block_m": 96}, HOPPER, "powers of two"),
    ("matmul/triton_tiled", {"block_k": 8}, HOPPER, "at least 16"),
    ("matmul/triton_tiled", {"num_stages": 8, "block_n": 256}, HOPPER, "shared memory"),
    ("matmul/triton_tiled", {"block_n": 256, "num_warps": 4}, HOPPER, "spill"),
    ("matmul/triton_tiled", {"split_k": 128}, HOPPER, "more splits"),
    ("matmul/triton_tiled", {"group_m": 0}, HOPPER, "at least 1"),
    ("matmul/triton_tiled", {"block_m": 16, "block_n": 16, "num_warps": 8}, HOPPER, "too many warps"),
    ("matmul/triton_persistent", {"epilogue_subtiles": 3}, HOPPER, "slices"),
    ("matmul/triton_persistent", {"num_stages": 8, "block_n": 256}, HOPPER, "shared memory"),
    ("matmul/triton_persistent", {"block_n": 256, "num_warps": 4}, HOPPER, "spill"),
    ("matmul/triton_persistent", {"block_m": 256, "block_n": 256, "num_stages": 1, "epilogue_subtiles": 4}, BLACKWELL, "tensor memory"),
    ("matmul/triton_persistent", {"warp_specialize": True}, HOPPER, "no-op"),
    ("matmul/triton_persistent", {"warp_specialize": True, "flatten": False}, HOPPER, "no-op"),
    ("matmul/triton_persistent", {"warp_specialize": True, "num_warps": 4}, HOPPER, "no-op"),
    ("matmul/triton_persistent", {"warp_specialize": True, "num_warps": 4, "flatten": False, "block_m": 64}, HOPPER, "64 rows"),
    ("matmul/triton_persistent", {"warp_specialize": True, "block_m": 32, "num_warps": 4}, BLACKWELL, "tcgen05"),
    ("matmul/cpu_blocked", {"block_n": 4096}, CPU, "block_n"),
    ("matmul/cpu_blocked", {"block_k": 64}, CPU, "rounded"),
    ("matmul/cpu_blocked", {"compute": "float32"}, CPU, "cache"),
    ("matmul/cpu_blocked", {"order": "wxw"}, CPU, "order"),
]


@NEED_TRITON
@pytest.mark.parametrize(("kernel_id", "change", "chip", "reason"), REFUSED, ids=lambda v: str(v) if isinstance(v, dict) else "")
def test_refuses_what_cannot_work(kernel_id, change, chip, reason):
    kernel = KERNELS[kernel_id]
    config = kernel.config_type(**change)
    assert reason in (kernel.fits(Matmul(4096, 4096, 4096), config, chip) or "it fits")


@NEED_TRITON
def test_refuses_tiles_larger_than_the_problem():
    for kernel_id, size in product(TRITON, ("m", "n", "k")):
        kernel = KERNELS[kernel_id]
        problem = dataclasses.replace(Matmul(4096, 4096, 4096), **{size: 32})
        config = dataclasses.replace(kernel.config_type(), block_m=128, block_n=128, block_k=64)
        assert f"block_{size} is larger" in (kernel.fits(problem, config, HOPPER) or "")


@NEED_TRITON
@pytest.mark.interpreter
@pytest.mark.parametrize("kernel_id", TRITON)
def test_hostile_inputs_and_repeated_launches_in_the_interpreter(kernel_id):
    script = Path(__file__).with_name("interpreted_matmul.py")
    done = subprocess.run([sys.executable, str(script), kernel_id], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


@NEED_TRITON
def test_descriptors_refuse_unaligned_rows_at_launch():
    problem, kernel = Matmul(16, 64, 64), KERNELS["matmul/triton_persistent"]
    launch = kernel.build(problem, kernel.default(problem, HOPPER), HOPPER)
    with pytest.raises(UsageError, match="needs x with dense rows"):
        launch(problem.inputs(seed=0, device="meta", row_padding=1), problem.outputs(device="meta"))


def compiled(kernel_id, problem, chip, **change):
    kernel = KERNELS[kernel_id]
    config = dataclasses.replace(kernel.default(problem, chip), **change)
    assert kernel.fits(problem, config, chip) is None
    artifacts, _ = compile_launch(kernel, problem, config, chip)
    return artifacts, [inspect_artifact(artifact) for artifact in artifacts]


@NEED_TRITON
@pytest.mark.parametrize(("chip", "unit"), [(HOPPER, "wgmma"), (BLACKWELL, "tcgen05")], ids=lambda v: getattr(v, "name", v))
@pytest.mark.parametrize("kernel_id", TRITON)
@pytest.mark.parametrize("m", [16, 4096])
def test_defaults_compile_to_the_chips_matrix_unit_without_spilling(kernel_id, m, chip, unit):
    _, (found, *_) = compiled(kernel_id, Matmul(m, 14336, 4096), chip)
    # 16 rows by pointers are too few for wgmma and tcgen05 (64), and memory-bound anyway; descriptors pad to 64 for free.
    assert found.matrix_unit == ("mma.sync" if m == 16 and kernel_id == "matmul/triton_tiled" else unit)
    assert found.stack_bytes <= 16  # ptxas trades up to two registers for occupancy, outside the loop
    assert bool(found.instructions["tma"]) == (kernel_id == "matmul/triton_persistent")
    assert found.smem_bytes <= chip.smem_per_block_bytes


@NEED_TRITON
@pytest.mark.parametrize("chip", [HOPPER, BLACKWELL], ids=lambda chip: chip.name)
def test_specialisation_in_the_space_is_real(chip):
    problem, kernel = Matmul(4096, 14336, 4096), KERNELS["matmul/triton_persistent"]
    specialised = [config for config in space(kernel, problem, chip) if config.warp_specialize]
    assert len(specialised) > 100
    for config in specialised[:: len(specialised) // 3]:
        artifacts, _ = compile_launch(kernel, problem, config, chip)
        found = inspect_artifact(artifacts[0])
        assert found.warp_specialised and found.stack_bytes == 0, config.label()


@NEED_TRITON
def test_float32_stays_float32_and_splits_take_a_second_pass():
    problem = Matmul(16, 256, 4096, "float32")
    assert KERNELS["matmul/triton_tiled"].default(problem, HOPPER).split_k > 1
    artifacts, resources = compiled("matmul/triton_tiled", problem, HOPPER)
    assert [r.matrix_unit for r in resources] == ["none", "none"]
    assert all("tf32" not in artifact.ptx for artifact in artifacts)


@pytest.mark.parametrize(("order", "compute"), list(product(("xw", "wx"), ("native", "float32"))))
@pytest.mark.parametrize("layout", ["nt", "nn"])
def test_cpu_blocks_with_hostile_inputs(order, compute, layout):
    kernel = KERNELS["matmul/cpu_blocked"]
    problem = Matmul(5, 40, 192, "bfloat16", layout)
    config = kernel.config_type(block_m=2, block_n=16, block_k=50 if compute == "float32" else 0, order=order, compute=compute)
    assert kernel.fits(problem, config, CPU) is None
    launch = kernel.build(problem, config, CPU)
    for inputs in (cancelling(problem), nan_padded(problem)):
        outputs = problem.outputs()
        poison(outputs)
        launch(inputs, outputs)
        found = compare(problem, outputs, problem.reference(inputs))
        assert found.passed, found.reason


def test_float16_on_a_cpu():
    for kernel_id, layout in product(("matmul/cpu_blocked", "matmul/torch_matmul"), ("nt", "nn")):
        kernel, problem = KERNELS[kernel_id], Matmul(6, 2100, 1100, "float16", layout)
        found = check(problem, kernel.build(problem, kernel.default(problem, CPU), CPU), seed=4)
        assert found.passed, f"{kernel_id} {layout}: {found.reason}"


def test_torch_never_uses_tf32_nor_narrow_sums():
    torch.set_float32_matmul_precision("medium")
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = True
    try:
        KERNELS["matmul/torch_matmul"].build(Matmul(4, 4, 4, "float32"), None, CPU)
        assert torch.get_float32_matmul_precision() == "highest"
        assert not torch.backends.cuda.matmul.allow_tf32
        assert not torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction
    finally:
        torch.set_float32_matmul_precision("highest")


@pytest.fixture
def cupy_on_numpy(monkeypatch):
    """The CuPy kernel's file, loaded with a stand-in for cupy that works on NumPy and notes what it is asked."""
    asked = []

    @contextmanager
    def entered(*what):
        asked.append(("enter", *what))
        yield
        asked.append(("leave", *what))

    def matmul(a, b, out):
        asked.append(("matmul", a.shape, b.shape))
        out[...] = a.astype(numpy.float32) @ b.astype(numpy.float32)
        return out

    cuda = types.SimpleNamespace(
        Device=lambda index: entered("device", index), ExternalStream=lambda pointer, index: entered("stream", pointer, index)
    )
    stand_in = types.ModuleType("cupy")
    stand_in.__dict__.update(cuda=cuda, matmul=matmul, from_dlpack=lambda tensor: tensor.numpy())
    monkeypatch.setitem(sys.modules, "cupy", stand_in)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: types.SimpleNamespace(cuda_stream=4711))
    spec = importlib.util.spec_from_file_location("cupy_matmul_on_numpy", ROOT / "matmul" / "cupy_matmul.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    return module.cupy_matmul, asked


@pytest.mark.parametrize("layout", ["nt", "nn"])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("row_padding", [0, 8])
def test_cupy_gets_the_right_operands_on_torchs_stream(cupy_on_numpy, dtype, layout, row_padding):
    kernel, asked = cupy_on_numpy
    problem = Matmul(3, 17, 33, dtype, layout)
    assert kernel.unfit(problem, HOPPER) is None
    found = check(problem, kernel.build(problem, kernel.default(problem, HOPPER), HOPPER), seed=0, row_padding=row_padding)
    assert found.passed, found.reason
    enter = [("enter", "device", None), ("enter", "stream", 4711, None)]
    leave = [("leave", "stream", 4711, None), ("leave", "device", None)]
    assert asked == [*enter, ("matmul", (3, 33), (33, 17)), *leave]


def test_cupy_refuses_bfloat16_and_tf32(cupy_on_numpy, monkeypatch):
    kernel, _ = cupy_on_numpy
    assert "bfloat16" in kernel.unfit(Matmul(3, 17, 33, "bfloat16"), HOPPER)
    monkeypatch.setenv("CUPY_TF32", "1")
    assert "TF32" in kernel.unfit(Matmul(3, 17, 33, "float32"), HOPPER)
    assert kernel.unfit(Matmul(3, 17, 33, "float16"), HOPPER) is None
