"""What the generic kernel tests do not ask of the scaled products: formats, scales, specialisation, and the library's wrappers."""

import dataclasses
import itertools
import subprocess

import pytest
import torch
from contest import BLACKWELL, CPU, HOPPER
from cuda_emulator import Emulator

from klab.harness.measure.check import check, compare
from klab.harness.tune.inspect_cubin import inspect_artifact, tool
from klab.harness.tune.offline import compile_launch
from klab.kernels.cuda_module import CudaKernel, backend
from klab.kernels.discover import discover
from klab.kernels.errors import UsageError
from klab.kernels.scaled_matmul import _packed_scales
from klab.kernels.scaled_matmul.problem import FORMATS, MICRO, ScaledMatmul

KERNELS = {k.name: k for k in discover().of("scaled_matmul")}
TUNED = sorted(name for name, k in KERNELS.items() if k.backend != "torch" and not k.library)
NEED_TRITON = pytest.mark.skipif("triton_tiled" not in KERNELS, reason="triton is not installed")
NEED_GXX = pytest.mark.skipif(bool(Emulator.missing()), reason=Emulator.missing() or "g++ is here")
SHAPES = [(1, 17, 96), (1, 7168, 16384), (33, 512, 576), (64, 24576, 1536), (4096, 7168, 16384)]


def problem_of(format: str, m: int = 4096, n: int = 7168, k: int = 16384, dtype: str = "bfloat16") -> ScaledMatmul:
    return ScaledMatmul(m, n, k, dtype, format)


# ------------------------------------------------------------------------------------------------------------------ the problem
@pytest.mark.parametrize("format", FORMATS)
def test_the_quantised_problem_approximates_the_wide_one(format):
    problem = problem_of(format, 40, 272, 512, "float32")
    wide = problem.wide()
    assert dataclasses.replace(problem, dtype="bfloat16") in ScaledMatmul.approximations(dataclasses.replace(wide, dtype="bfloat16"))
    want = wide.reference(problem.wide_inputs(seed=3))["out"]
    got = problem.reference(problem.inputs(seed=3))["out"]
    error = float((got - want).norm() / want.norm())
    expected = {"fp8_tensor": 0.04, "fp8_row": 0.04, "fp8_block": 0.04, "int8_row": 0.06, "mxfp8": 0.06, "mxfp4": 0.25, "nvfp4": 0.2}
    assert 0.002 < error < expected[format]


@pytest.mark.parametrize("format", FORMATS)
def test_meta_inputs_and_padding_keep_shapes_and_values(format):
    problem = problem_of(format, 5, 48, 160)
    plain, padded, meta = (problem.inputs(seed=1, device=d, row_padding=p) for d, p in (("cpu", 0), ("cpu", 8), ("meta", 8)))
    for name, tensor in plain.items():
        assert torch.equal(padded[name].contiguous().view(torch.uint8), tensor.view(torch.uint8))
        assert (padded[name].shape, padded[name].stride(), padded[name].dtype) == (meta[name].shape, meta[name].stride(), meta[name].dtype)
    # In elements of bfloat16: 16 bytes, so that rows stay aligned as those of the wide operands do.
    assert padded["w"].stride(0) == plain["w"].stride(0) + 16


def test_bytes_are_those_of_the_inputs_and_the_output():
    for problem in ScaledMatmul.examples():
        tensors = [*problem.inputs(seed=0, device="meta").values(), *problem.outputs(device="meta").values()]
        assert problem.bytes_moved() == sum(t.numel() * t.element_size() for t in tensors), problem.label()


def test_math_dtypes_have_peaks_where_a_chip_multiplies_them():
    names = {f: problem_of(f).math_dtype for f in FORMATS}
    assert set(names.values()) == {"float8_e4m3fn", "int8", "float4_e2m1"}
    assert names["fp8_block"] == names["mxfp8"] == "float8_e4m3fn" and names["nvfp4"] == "float4_e2m1"


def test_refuses_what_is_no_problem():
    for wrong in (
        {"format": "fp7"},
        {"m": 0},
        {"format": "mxfp4", "k": 80},
        {"format": "nvfp4", "k": 24},
        {"format": "int8_row", "k": 1 << 18},
    ):
        with pytest.raises(UsageError):
            dataclasses.replace(problem_of("fp8_row"), **wrong)


def swapped(tensor, dim):
    """Each scale at its neighbour's place; None where there is no neighbour."""
    return tensor.roll(1, dims=dim) if tensor.shape[dim] > 1 else None


FAULTS = {
    "x's scales of the row above": lambda p, i: {"x_scale": swapped(i["x_scale"], 0)},
    "w's scales of the row above": lambda p, i: {"w_scale": swapped(i["w_scale"], 0)},
    "x's scales of the block before": lambda p, i: {"x_scale": swapped(i["x_scale"], 1)},
    "w's scales of the block before": lambda p, i: {"w_scale": swapped(i["w_scale"], 1)},
    "the last byte of k is lost": lambda p, i: {"x": torch.cat((i["x"][:, :-1], torch.zeros_like(i["x"][:, -1:])), dim=1)},
    "the tensor's scale is lost": lambda p, i: {"x_global": torch.ones(1) if p.format == "nvfp4" else None},
    "elements are packed the other way round": lambda p, i: {"x": (i["x"] >> 4 | i["x"] << 4) if i["x"].dtype == torch.uint8 else None},
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_check_finds_wrong_scales(fault):
    found = 0
    for problem in ScaledMatmul.examples():
        inputs = problem.inputs(seed=2)
        wrong = FAULTS[fault](problem, inputs)
        if any(value is None for value in wrong.values()) or all(torch.equal(v.float(), inputs[n].float()) for n, v in wrong.items()):
            continue
        outputs = problem.reference(inputs | wrong)
        assert not compare(problem, outputs, problem.reference(inputs)).passed, problem.label()
        found += 1
    assert found >= 2


def accumulated_in_14_bits(x, w):
    """x @ w^T, 32 of k at a time; what is added up keeps 13 bits behind its leading one, as Hopper's tensor cores do (in the mean)."""
    total = torch.zeros(x.shape[0], w.shape[0], dtype=torch.float64)
    for k in range(0, x.shape[1], 32):
        total += x[:, k : k + 32] @ w[:, k : k + 32].T
        mantissa, exponent = torch.frexp(total)
        total = torch.ldexp(torch.trunc(mantissa * 2**14), exponent - 14)
    return total


def test_fast_accumulation_is_within_tolerance_and_bfloat16_sums_are_not():
    problem = problem_of("fp8_row", 32, 64, 8192)
    inputs = problem.inputs(seed=4)
    x, w = (problem.values(inputs, name).double() for name in ("x", "w"))
    reference = problem.reference(inputs)
    fast = accumulated_in_14_bits(x, w)
    assert compare(problem, {"out": fast.bfloat16()}, reference).passed
    assert compare(dataclasses.replace(problem, format="fp8_block"), {"out": reference["out"].bfloat16()}, reference).passed
    parts = torch.zeros_like(fast, dtype=torch.bfloat16)
    for k in range(0, problem.k, 32):
        parts += (x[:, k : k + 32] @ w[:, k : k + 32].T).bfloat16()
    assert not compare(problem, {"out": parts}, reference).passed


# ------------------------------------------------------------------------------------------------------------------ the spaces
@pytest.mark.parametrize("name", TUNED)
def test_spaces_are_valid_finite_and_led_by_the_default(name):
    kernel, seen = KERNELS[name], []
    for shape, format, chip in itertools.product(SHAPES, FORMATS, (HOPPER, BLACKWELL, CPU)):
        if shape[2] % MICRO.get(format, 1):
            continue
        problem = problem_of(format, *shape)
        some = list(itertools.islice(kernel.space(problem, chip), 300))
        assert bool(some) == (kernel.unfit(problem, chip) is None)
        if some:
            assert some[0] == kernel.default(problem, chip)
            assert len(set(some)) == len(some)
            assert kernel.config_type.from_json(some[-1].to_json_full()) == some[-1]
            seen += some
    large = problem_of("mxfp4" if "micro" in name or "upcast" in name else "fp8_block")
    chip = CPU if name.startswith("cpu") else HOPPER if name == "cuda_wgmma" else BLACKWELL
    seen += kernel.space(large, chip)
    assert seen
    for field in dataclasses.fields(seen[0]):
        assert len({getattr(config, field.name) for config in seen}) > 1, field.name
    assert sum(1 for _ in kernel.space(large, chip)) < 20_000


REFUSED = [
    ("triton_tiled", "fp8_row", {"block_m": 96}, HOPPER, "powers of two"),
    ("triton_tiled", "fp8_row", {"block_k": 16}, HOPPER, "32 of k"),
    ("triton_tiled", "fp8_block", {"block_k": 256}, HOPPER, "one block of scales"),
    ("triton_tiled", "fp8_block", {"num_warps": 4}, HOPPER, "spill"),
    ("triton_tiled", "fp8_row", {"promote": 128}, BLACKWELL, "changes nothing"),
    ("triton_tiled", "fp8_block", {"promote": 128}, HOPPER, "changes nothing"),
    ("triton_tiled", "mxfp8", {}, HOPPER, "blocks of 16 or 32"),
    ("triton_tiled", "fp8_row", {"split_k": 256}, HOPPER, "more splits"),
    ("triton_persistent", "fp8_block", {"block_n": 256}, HOPPER, "one block of scales"),
    ("triton_persistent", "fp8_block", {"warp_specialize": True}, HOPPER, "no-op"),
    ("triton_persistent", "fp8_row", {"ctas_per_sm": 3}, HOPPER, "shared memory"),
    ("triton_persistent", "int8_row", {"warp_specialize": True}, BLACKWELL, "no integers"),
    ("triton_persistent", "fp8_row", {"warp_specialize": True, "num_warps": 4, "block_n": 256, "epilogue_subtiles": 2}, BLACKWELL, "spill"),
    ("triton_microscaled", "mxfp4", {}, HOPPER, "Blackwell"),
    ("triton_microscaled", "mxfp4", {"block_m": 64}, BLACKWELL, "128 or 256"),
    ("triton_microscaled", "mxfp4", {"flatten": True}, BLACKWELL, "tensor memory"),
    ("triton_upcast", "fp8_row", {}, HOPPER, "mxfp8"),
    ("triton_upcast", "mxfp4", {"block_m": 128, "block_n": 128}, HOPPER, "spill"),
    ("cuda_mma", "fp8_row", {"warps_m": 3}, HOPPER, "multiple of 16x16"),
    ("cuda_mma", "fp8_block", {"warps_m": 1, "warps_n": 2, "block_m": 128}, HOPPER, "registers"),
    ("cuda_wgmma", "fp8_block", {}, BLACKWELL, "Hopper"),
    ("cuda_wgmma", "fp8_block", {"unroll": 1}, HOPPER, "2 or 4 steps"),
    ("cuda_wgmma", "fp8_block", {"groups": 3, "stages": 4}, HOPPER, "registers"),
    ("cuda_wgmma", "fp8_row", {"unroll": 2}, HOPPER, "unroll is 1"),
    ("cpu_blocked", "fp8_row", {"compute": "bfloat16"}, CPU, "round"),
    ("cpu_blocked", "fp8_row", {"block_n": 100}, CPU, "multiple of 128"),
    ("torch_scaled_mm", "mxfp8", {}, HOPPER, "Blackwell"),
    ("torch_scaled_mm", "fp8_block", {}, BLACKWELL, "sm_90 alone"),
    ("torch_scaled_mm_fast", "fp8_row", {}, BLACKWELL, "Hopper"),
    ("torch_int_mm", "fp8_row", {}, HOPPER, "int8_row"),
]


@pytest.mark.parametrize(("name", "format", "change", "chip", "reason"), REFUSED, ids=lambda v: str(v) if isinstance(v, dict) else "")
def test_refuses_what_cannot_work(name, format, change, chip, reason):
    if name not in KERNELS:
        pytest.skip(f"{name} is not available here")
    kernel, problem = KERNELS[name], problem_of(format)
    base = kernel.default(problem, chip) if name in ("triton_microscaled", "cuda_mma", "cuda_wgmma") else kernel.config_type()
    assert reason in (kernel.fits(problem, dataclasses.replace(base, **change), chip) or "it fits")


# ------------------------------------------------------------------------------------------------------- compiled, with no GPU
def compiled(name, problem, chip, **change):
    kernel = KERNELS[name]
    config = dataclasses.replace(kernel.default(problem, chip), **change)
    assert kernel.fits(problem, config, chip) is None, kernel.fits(problem, config, chip)
    artifacts, _ = compile_launch(kernel, problem, config, chip)
    return artifacts, [inspect_artifact(artifact) for artifact in artifacts]


# What test_compiled.py, which takes the first two problems that fit, does not reach.
UNITS = [
    ("triton_tiled", "fp8_row", 4096, HOPPER, "wgmma"), ("triton_persistent", "int8_row", 4096, HOPPER, "wgmma"),
    ("triton_persistent", "fp8_row", 4096, BLACKWELL, "tcgen05"), ("triton_microscaled", "nvfp4", 4096, BLACKWELL, "tcgen05"),
    ("triton_microscaled", "mxfp4", 4096, BLACKWELL, "tcgen05"), ("triton_tiled", "fp8_block", 4096, BLACKWELL, "tcgen05"),
    ("triton_tiled", "fp8_block", 32, BLACKWELL, "mma.sync"), ("cuda_mma", "fp8_block", 32, HOPPER, "mma.sync"),
    ("cuda_mma", "int8_row", 4096, BLACKWELL, "mma.sync"),
]  # fmt: skip


@NEED_TRITON
@pytest.mark.parametrize(("name", "format", "m", "chip", "unit"), UNITS, ids=lambda v: getattr(v, "name", v))
def test_defaults_use_the_chips_matrix_unit_without_spilling(name, format, m, chip, unit):
    artifacts, resources = compiled(name, problem_of(format, m), chip)
    assert unit in {r.matrix_unit for r in resources}
    assert not any(r.spill_instructions for r in resources), [(r.name, r.spill_instructions) for r in resources]
    if name == "triton_microscaled":
        # The packed scales go to tensor memory as they are, and the product is of the format's own kind.
        kind = {"mxfp4": "mxf4", "nvfp4": "mxf4nvf4"}[format]
        assert f"kind::{kind}.block_scale" in artifacts[-1].ptx and "tcgen05.cp" in artifacts[-1].ptx


@NEED_TRITON
@pytest.mark.parametrize(
    ("format", "chip", "change"),
    [
        ("fp8_block", HOPPER, {"num_warps": 4, "flatten": False, "num_stages": 4}),
        ("fp8_row", HOPPER, {"num_warps": 4, "flatten": False, "promote": 128, "block_n": 128, "epilogue_subtiles": 1}),
        ("fp8_block", BLACKWELL, {"num_warps": 8, "flatten": True, "num_stages": 4}),
    ],
    ids=str,
)
def test_specialisation_is_real_and_does_not_spill(format, chip, change):
    _, (found, *_) = compiled("triton_persistent", problem_of(format), chip, block_m=128, ctas_per_sm=1, warp_specialize=True, **change)
    assert found.warp_specialised and found.stack_bytes == 0 and found.instructions["tma"]


@pytest.mark.parametrize("format", ["fp8_block", "fp8_row"])
def test_warpgroup_products_run_behind_each_other(format, tmp_path):
    """ptxas puts a wait behind every wgmma (and says so only in its log) where it finds sums read while some are under way."""
    if "cuda_wgmma" not in KERNELS:
        pytest.skip("cupy is not installed")
    (artifact, *_), (found, *_) = compiled("cuda_wgmma", problem_of(format), HOPPER)
    assert found.matrix_unit == "wgmma" and found.spill_instructions == 0
    listing = tmp_path / "kernel.cubin"
    listing.write_bytes(artifact.cubin + b"\0")
    sass = subprocess.run([tool("nvdisasm"), "-c", str(listing)], capture_output=True, text=True, check=True).stdout
    waits, products = sass.count("WARPGROUP.DEPBAR"), sass.count("GMMA.")
    assert products >= 4 and waits <= products // 4 + 1, (waits, products)


# --------------------------------------------------------------------------------------------------------- fp8.cuh on the host
CONVERT = """
#include "fp8.cuh"
using namespace klab;
KLAB_KERNEL(convert, 32)(const float* x, void* codes, float* back, int n) {
    for (int i = thread_idx(); i < n; i += 32) {
        fp8_t* to = static_cast<fp8_t*>(codes) + i;
        *to = from_float<fp8_t>(x[i]);
        back[i] = to_float(*to);
    }
}
"""


@NEED_GXX
def test_fp8_conversions_are_torchs():
    every = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    values = every[every.isfinite()].unique()
    ties = (values[1:] + values[:-1]) / 2
    x = torch.cat((values, ties, ties.nextafter(torch.tensor(1e9)), torch.randn(500) * 100, torch.tensor([448.0, 464.0, -1e6])))
    codes, back = torch.empty(len(x), dtype=torch.float8_e4m3fn), torch.empty(len(x))
    with backend(Emulator()):
        CudaKernel(CONVERT, "convert", HOPPER).launch((1, 1, 1), 32, [x, codes, back, len(x)])
    want = x.clamp(-448, 448).to(torch.float8_e4m3fn)
    assert torch.equal(codes.float(), want.float()) and torch.equal(back, want.float())


INTEGERS = """
#include "fp8.cuh"
using namespace klab;
KLAB_KERNEL(products, 32)(const void* a, const void* b, int* d) {
    const int lane = thread_idx(), group = lane / 4, pair = lane % 4;
    const uint32_t* words_a = static_cast<const uint32_t*>(a);  // [16][8]
    const uint32_t* words_b = static_cast<const uint32_t*>(b);  // [8][8], transposed
    const uint32_t left[4] = {words_a[group * 8 + pair], words_a[(group + 8) * 8 + pair], words_a[group * 8 + pair + 4],
                              words_a[(group + 8) * 8 + pair + 4]};
    const uint32_t right[2] = {words_b[group * 8 + pair], words_b[group * 8 + pair + 4]};
    int32_t sum[4] = {1, 1, 1, 1};
    mma_m16n8k32_s8(sum, left, right);
    for (int i = 0; i < 4; ++i) d[(group + i / 2 * 8) * 8 + 2 * pair + i % 2] = sum[i];
}
"""


@NEED_GXX
def test_int8_products_are_exact():
    a, b = (torch.randint(-128, 128, (rows, 32), dtype=torch.int8, generator=torch.Generator().manual_seed(rows)) for rows in (16, 8))
    d = torch.zeros((16, 8), dtype=torch.int32)
    with backend(Emulator()):
        CudaKernel(INTEGERS, "products", HOPPER).launch((1, 1, 1), 32, [a.view(torch.int32), b.view(torch.int32), d])
    assert torch.equal(d, a.int() @ b.int().T + 1)


# ----------------------------------------------------------------------------------------------------------- library wrappers
def unpacked(packed, rows, columns):
    """Scales in the packed order, by the formula of the documentation, one by one."""
    tiles_k = -(-columns // 4)
    row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    return packed[(row // 128 * tiles_k + column // 4) * 512 + row % 32 * 16 + row % 128 // 32 * 4 + column % 4]


def test_packed_scales_follow_the_documented_order():
    scale = torch.randint(0, 256, (200, 6), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    padded, packed = torch.zeros((256, 8), dtype=torch.uint8), torch.full((2 * 2 * 512,), 7, dtype=torch.uint8)
    _packed_scales.pack(scale, padded, packed)
    assert torch.equal(unpacked(packed, 200, 6), scale)
    assert packed.count_nonzero() == scale.count_nonzero()


@pytest.mark.parametrize("m", [8, 5])
def test_block_scales_reach_cublas_in_its_layout(monkeypatch, m):
    problem = problem_of("fp8_block", m, 272, 1024)

    def stand_in(x, w, x_scale, w_scale, *, out_dtype, use_fast_accum, out):
        assert x.stride(1) == 1 and w.stride(0) == 1 and not use_fast_accum
        assert x_scale.shape == (8, 8) and x_scale.stride() == (1, 8)
        assert w_scale.shape == (8, 3) and w_scale.t().is_contiguous()
        assert x.shape[0] == out.shape[0] == 8 and not x[m:].float().any()
        values = problem.values({"x": x, "x_scale": x_scale, "w": w.t(), "w_scale": w_scale.t()}, "x")
        weights = problem.values({"w": w.t(), "w_scale": w_scale.t()}, "w")
        return out.copy_(values @ weights.T)

    monkeypatch.setattr(torch, "_scaled_mm", stand_in)
    kernel = KERNELS["torch_scaled_mm"]
    assert kernel.unfit(problem, HOPPER) is None
    assert check(problem, kernel.build(problem, kernel.default(problem, HOPPER), HOPPER), seed=5).passed


def test_few_rows_reach_the_integer_product_among_zeros(monkeypatch):
    problem = problem_of("int8_row", 3, 48, 80)
    kernel, multiply = KERNELS["torch_int_mm"], torch._int_mm

    def stand_in(x, w, *, out):
        assert x.shape == (32, 80) and not x[3:].any()
        return multiply(x, w, out=out)

    monkeypatch.setattr(torch, "_int_mm", stand_in)
    assert kernel.unfit(problem, HOPPER) is None
    assert check(problem, kernel.build(problem, kernel.default(problem, HOPPER), HOPPER), seed=5).passed


@pytest.mark.parametrize("format", FORMATS)
def test_bfloat16_holds_microscaled_values_exactly(format, monkeypatch):
    problem, kernel, multiplied = problem_of(format, 5, 272, 160), KERNELS["torch_dequantized_bf16"], {}
    inputs = problem.inputs(seed=6, row_padding=8)

    def stand_in(x, w, *, out):
        multiplied.update(x=x, w=w.t())

    monkeypatch.setattr(torch, "mm", stand_in)
    kernel.build(problem, kernel.default(problem, CPU), CPU)(inputs, problem.outputs())
    for name in ("x", "w"):
        want = problem.values(inputs, name)
        assert torch.equal(multiplied[name], want.bfloat16())
        assert torch.equal(multiplied[name].float(), want) == (format in ("mxfp8", "mxfp4"))


@pytest.mark.parametrize("format", MICRO)
def test_micro_scales_reach_cublas_packed(monkeypatch, format):
    problem = problem_of(format, 130, 144, 384)
    vector = MICRO[format]

    def stand_in(x, w, x_scales, x_recipe, x_swizzle, w_scales, w_recipe, w_swizzle, bias, out_dtype, *, out):
        names = torch.nn.functional
        blocks = names.ScalingType.BlockWise1x16 if format == "nvfp4" else names.ScalingType.BlockWise1x32
        two = format == "nvfp4"
        assert x_recipe == w_recipe == [blocks.value, *([names.ScalingType.TensorWise.value] if two else [])]
        assert x_swizzle == w_swizzle == [names.SwizzleType.SWIZZLE_32_4_4.value, *([names.SwizzleType.NO_SWIZZLE.value] if two else [])]
        given = {}
        for name, tensor, scales in (("x", x, x_scales), ("w", w.t(), w_scales)):
            plain = problem.inputs(seed=5)[name]
            scale = unpacked(scales[0].view(torch.uint8), tensor.shape[0], problem.k // vector)
            given |= {name: tensor.view(plain.dtype), f"{name}_scale": scale.view(torch.float8_e4m3fn) if two else scale}
            given |= {f"{name}_global": scales[1]} if two else {}
        return out.copy_(problem.values(given, "x") @ problem.values(given, "w").T)

    monkeypatch.setattr(torch, "_scaled_mm_v2", stand_in)
    kernel = KERNELS["torch_scaled_mm"]
    assert kernel.unfit(problem, BLACKWELL) is None
    assert check(problem, kernel.build(problem, kernel.default(problem, BLACKWELL), BLACKWELL), seed=5).passed
