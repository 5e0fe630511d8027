"""The ground that CUDA C++ kernels stand on: primitives against the PTX ISA, compilation, launching."""

from __future__ import annotations

import itertools
import subprocess
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from contest import BLACKWELL, HOPPER, kernels
from cuda_emulator import Emulator

from klab.harness.measure.check import check
from klab.kernels import cuda_module
from klab.kernels.artifact import compile_only
from klab.kernels.cuda_module import ELEMENT, CompileError, CudaKernel, Int64, backend, device_arguments, include_dirs
from klab.kernels.errors import UsageError

pytest.importorskip("cupy", reason="needs cupy")

PRELUDE = '#include "device.cuh"\nusing namespace klab;\n'
emulated = pytest.mark.skipif(bool(Emulator.missing()), reason=Emulator.missing() or "g++ is here")
# The same primitives, emulated on the host and as the compiler makes them on a GPU.
PLACES = [pytest.param("cpu", marks=emulated, id="emulated"), pytest.param("cuda", marks=pytest.mark.gpu, id="device")]


def run(place, source, args, *, grid=(1, 1, 1), threads=32, smem_bytes=0, **defines):
    """Launch the kernel `f` of a source; tensors go to the place and their contents come back into them."""
    if place == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    kernel = CudaKernel(PRELUDE + source, "f", HOPPER, defines, smem_bytes)
    there = [arg.to(place) if isinstance(arg, torch.Tensor) else arg for arg in args]
    with backend(Emulator()) if place == "cpu" else nullcontext():
        kernel.launch(grid, threads, there)
    for arg, copy in zip(args, there, strict=True):
        if isinstance(arg, torch.Tensor):
            arg.copy_(copy)


# ------------------------------------------------------------------------------------------------ fragments, from the PTX ISA
# "Matrix Fragments for mma.m16n8k16 with floating point type": row and column of element i of a lane.
GROUP, PAIR = np.arange(32) // 4, np.arange(32) % 4
A = [(GROUP + (0 if i < 2 or 4 <= i < 6 else 8), PAIR * 2 + (i & 1) + (0 if i < 4 else 8)) for i in range(8)]
B = [(PAIR * 2 + (i & 1) + (0 if i < 2 else 8), GROUP) for i in range(4)]
D = [(GROUP + (0 if i < 2 else 8), PAIR * 2 + (i & 1)) for i in range(4)]


def fragments(matrix, places):
    """[32, len(places)]: what each lane holds of a matrix."""
    return torch.stack([matrix[torch.from_numpy(row), torch.from_numpy(column)] for row, column in places], dim=1).contiguous()


MMA = """
KLAB_KERNEL(f, 32)(const int* a, const int* b, float* d) {
    uint32_t x[4], y[2];
    float z[4];
    for (int i = 0; i < 4; ++i) x[i] = a[thread_idx() * 4 + i];
    for (int i = 0; i < 2; ++i) y[i] = b[thread_idx() * 2 + i];
    for (int i = 0; i < 4; ++i) z[i] = d[thread_idx() * 4 + i];
    mma_m16n8k16<ELEMENT>(z, x, y);
    for (int i = 0; i < 4; ++i) d[thread_idx() * 4 + i] = z[i];
}
"""


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_mma_multiplies_by_the_fragments_of_the_isa(place, dtype):
    torch.manual_seed(0)
    a, b, c = torch.randn(16, 16).to(getattr(torch, dtype)), torch.randn(16, 8).to(getattr(torch, dtype)), torch.randn(16, 8)
    d = fragments(c, D)
    run(place, MMA, [fragments(a, A).view(torch.int32), fragments(b, B).view(torch.int32), d], ELEMENT=ELEMENT[dtype])
    assert torch.allclose(d, fragments(a.float() @ b.float() + c, D), atol=1e-5)


LDMATRIX = """
KLAB_KERNEL(f, 32)(const half_t* rows, int* out, int count, int trans) {
    half_t* tile = shared_memory<half_t>();
    for (int i = 0; i < 8; ++i) tile[thread_idx() * 8 + i] = rows[thread_idx() * 8 + i];
    sync_warp();
    const half_t* row = tile + thread_idx() * 8;
    if (count == 4) {
        uint32_t r[4];
        if (trans) ldmatrix_x4_trans(r, row); else ldmatrix_x4(r, row);
        for (int i = 0; i < 4; ++i) out[thread_idx() * 4 + i] = r[i];
    } else {
        uint32_t r[2];
        if (trans) ldmatrix_x2_trans(r, row); else ldmatrix_x2(r, row);
        for (int i = 0; i < 2; ++i) out[thread_idx() * 2 + i] = r[i];
    }
}
"""


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(("count", "trans"), [(4, 0), (4, 1), (2, 0), (2, 1)])
def test_ldmatrix_gives_the_fragments_of_the_isa(place, count, trans):
    rows = torch.arange(256, dtype=torch.float16).view(4, 8, 8)
    out = torch.zeros(32, count, dtype=torch.int32)
    run(place, LDMATRIX, [rows, out, count, trans], smem_bytes=512)
    # "each thread receives the fragment of one row": row lane / 4, elements 2 (lane % 4) and the next; transposed, of one column.
    tiles = rows.transpose(1, 2) if trans else rows
    expected = torch.stack([fragments(tiles[i], [(GROUP, 2 * PAIR), (GROUP, 2 * PAIR + 1)]) for i in range(count)], dim=1)
    assert torch.equal(out.view(torch.float16).view(32, count, 2), expected)


# ------------------------------------------------------------------------------------------------------ scalars and swizzle
CONVERT = """
KLAB_KERNEL(f, 128)(const float* x, int* bits, const int* words, float* pairs, int n) {
    const int i = block_idx_x() * 128 + thread_idx();
    if (i >= n) return;
    bits[i] = pack2<ELEMENT>(x[i], x[n - 1 - i]);
    const Pair p = unpack2<ELEMENT>(words[i]);
    pairs[2 * i] = p.x;
    pairs[2 * i + 1] = p.y;
}
"""


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_conversions_round_as_torch_does(place, dtype):
    every = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(getattr(torch, dtype))
    halfway = (every[:-1].float() + every[1:].float()) / 2  # ties, which go to even
    edges = torch.tensor([0.0, -0.0, float("inf"), -float("inf"), 65519.9, 65520.0, 1e-8, 5.96e-8, 2.98e-8, 3.4e38, 6.1e-5])
    x = torch.cat([every.float(), halfway, edges, torch.randn(1000) * 100])
    x = x[~x.isnan()].contiguous()
    n = len(x)
    words = torch.randint(-(2**31), 2**31, (n,), dtype=torch.int32)
    bits, pairs = torch.zeros(n, dtype=torch.int32), torch.zeros(n, 2)
    run(place, CONVERT, [x, bits, words, pairs, n], grid=(-(-n // 128), 1, 1), threads=128, ELEMENT=ELEMENT[dtype])
    got = bits.view(getattr(torch, dtype)).view(n, 2).float()
    want = torch.stack([x, x.flip(0)], dim=1).to(getattr(torch, dtype)).float()
    assert torch.equal(got, want)
    assert torch.equal(pairs.nan_to_num(), words.view(getattr(torch, dtype)).view(n, 2).float().nan_to_num())


MOVES = """
KLAB_KERNEL(f, 32)(float* out) {
    const float lane = thread_idx();
    float* o = out + thread_idx() * 8;
    o[0] = shfl_xor(lane, 5);
    o[1] = shfl(lane, (thread_idx() + 3) % 32);
    o[2] = warp_sum<32>(lane);
    o[3] = warp_max<4>(lane);
    o[4] = exp2f_fast(lane - 40.0f);
    o[5] = log2f_fast(lane + 1.0f);
    o[6] = exp2f_fast(-infinity());
    o[7] = max_of(-infinity(), -lane);
}
"""


@pytest.mark.parametrize("place", PLACES)
def test_shuffles_and_mathematics(place):
    out, lane = torch.full((32, 8), float("nan")), torch.arange(32.0)
    run(place, MOVES, [out])
    four = (torch.arange(32) // 4 * 4 + 3).float()
    want = [
        (torch.arange(32) ^ 5).float(),
        (lane + 3) % 32,
        torch.full((32,), 496.0),
        four,
        2 ** (lane - 40),
        (lane + 1).log2(),
        0 * lane,
        -lane,
    ]
    assert torch.allclose(out, torch.stack(want, dim=1), rtol=1e-6, atol=1e-6)


SWIZZLE = """
KLAB_KERNEL(f, 32)(int* out, int rows) {
    for (int row = thread_idx(); row < rows; row += 32)
        for (int chunk = 0; chunk < ROW_BYTES / 16; ++chunk) out[row * (ROW_BYTES / 16) + chunk] = swizzle<ROW_BYTES>(row, chunk);
}
"""


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("row_bytes", [16, 32, 64, 128, 256, 384, 512])
def test_swizzle_is_a_permutation_without_bank_conflicts(place, row_bytes):
    rows, chunks = 32, row_bytes // 16
    out = torch.zeros(rows, chunks, dtype=torch.int32)
    run(place, SWIZZLE, [out, rows], ROW_BYTES=row_bytes)
    offsets = out.numpy()
    assert sorted(offsets.flatten()) == list(range(0, rows * row_bytes, 16))
    assert (offsets // row_bytes == np.arange(rows)[:, None]).all()
    for row, chunk in itertools.product(range(0, rows, 8), range(chunks)):
        # What one phase of ldmatrix reads: eight rows of 16 bytes, each on banks of its own.
        assert len(set(offsets[row : row + 8, chunk] % 128)) == 8


# ------------------------------------------------------------------------------------------------------- odd addresses
@emulated
@pytest.mark.parametrize("kernel", [k for k in kernels("cuda") if k.problem_type.operator == "matmul"], ids=lambda k: k.id)
@pytest.mark.parametrize("layout", ["nt", "nn"])
def test_matmul_with_rows_at_any_address(kernel, layout):
    """Or it says that it takes rows of whole 16 bytes only: the copy engine cannot do otherwise."""
    problem = kernel.problem_type(13, 48, 128, "bfloat16", layout)
    if kernel.name == "cuda_wgmma":
        if kernel.unfit(problem, HOPPER) is None:
            with pytest.raises(UsageError, match="16 bytes"), backend(Emulator()):
                check(problem, kernel.build(problem, kernel.default(problem, HOPPER), HOPPER), seed=0, row_padding=3)
        return
    with backend(Emulator()):
        found = check(problem, kernel.build(problem, kernel.default(problem, HOPPER), HOPPER), seed=0, row_padding=3)
    assert found.passed, found.reason


# ---------------------------------------------------------------------------------------------------------- compilation
def resources(cubin, tmp_path):
    """(registers, stack bytes) by function, from the cuobjdump that Triton brings; skips where it does not."""
    triton = pytest.importorskip("triton")
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    if not tool.exists():
        pytest.skip("this Triton brings no cuobjdump")
    path = tmp_path / "x.cubin"
    path.write_bytes(cubin)
    lines = subprocess.run([tool, "-res-usage", path], capture_output=True, text=True, check=True).stdout.split("Function ")[1:]
    values = [dict(item.split(":")[:2] for item in text.split("\n")[1].split() if item[0] in "RS" and "[" not in item) for text in lines]
    return [(int(v["REG"]), int(v["STACK"])) for v in values]


@pytest.mark.parametrize("chip", [HOPPER, BLACKWELL], ids=lambda chip: chip.arch)
@pytest.mark.parametrize("kernel", kernels("cuda"), ids=lambda k: k.id)
def test_every_kernel_compiles_and_its_default_spills_nothing(kernel, chip, tmp_path):
    problems = [p for p in kernel.problem_type.examples() if kernel.unfit(p, chip) is None]
    if not problems:
        pytest.skip(f"{kernel.id} is not for {chip.name}")
    for problem in (problems[0], problems[-1]):
        sample = itertools.islice(kernel.space(problem, chip), 0, 60, 20)
        for config in sample:
            with compile_only() as artifacts:
                kernel.build(problem, config, chip)(problem.inputs(seed=0, device="meta"), problem.outputs(device="meta"))
            assert artifacts
            for artifact in artifacts:
                for registers, stack_bytes in resources(artifact.cubin, tmp_path):
                    assert registers * artifact.threads <= 65536
                    if config == kernel.default(problem, chip):
                        assert stack_bytes == 0, f"{problem.label()} [{config.label()}] spills {stack_bytes} B"


def test_compile_error_is_one_line():
    with pytest.raises(CompileError) as caught:
        CudaKernel(PRELUDE + "KLAB_KERNEL(f, 32)(float* x) {\n    x[0] = missing;\n}", "f", HOPPER).cubin()
    assert str(caught.value) == 'f does not compile for sm_90a: f.cu(4): error: identifier "missing" is undefined'


def test_what_ptxas_calls_fatal_is_told():
    told = "(C7602) Insufficient registers (128) to compile instruction at line 322 in function f."
    log = f"info: 1 kernel\nptxas fatal   : {told}\nptxas fatal   : Ptx assembly aborted due to errors\n"
    assert cuda_module.first_error(log) == f"ptxas fatal   : {told}"


def test_compile_only_records_what_would_be_launched():
    kernel = CudaKernel(PRELUDE + "KLAB_KERNEL(f, N)(float* x) { x[thread_idx()] = N; }", "f", BLACKWELL, {"N": 64}, 1234)
    with compile_only() as artifacts:
        kernel.launch((1, 1, 1), 64, [torch.empty(64, device="meta")])
    (artifact,) = artifacts
    assert (artifact.name, artifact.threads, artifact.dynamic_smem_bytes) == ("f", 64, 1234)
    assert artifact.cubin[:4] == b"\x7fELF"


def test_a_cubin_that_lost_its_last_byte_is_made_whole():
    cubin = CudaKernel(PRELUDE + "KLAB_KERNEL(f, 32)(float* x) { x[0] = 1; }", "f", HOPPER).cubin()
    assert cuda_module._whole_elf(cubin) == cubin
    assert cuda_module._whole_elf(cubin[:-1]) == cubin[:-1] + b"\0"


def test_device_arguments_have_the_width_that_the_kernel_declares():
    tensor = torch.zeros(4)
    values = device_arguments([tensor, 3, Int64(1 << 40), 0.5])
    assert [value.dtype for value in values] == [np.uint64, np.int32, np.int64, np.float32]
    assert int(values[0]) == tensor.data_ptr()
    with pytest.raises(OverflowError, match="Int64"):
        device_arguments([1 << 31])


def test_headers_are_found():
    assert any((Path(folder) / "device.cuh").exists() for folder in include_dirs())


@pytest.mark.gpu
@pytest.mark.parametrize("smem_bytes", [1024, 100 << 10])
def test_launch_on_the_device_and_in_a_graph(smem_bytes):
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    x = torch.zeros(32, device="cuda")
    source = """KLAB_KERNEL(f, 32)(float* x, int64_t stride, float by) {
        shared_memory<float>()[BYTES / 4 - 32 + thread_idx()] = by;
        sync_threads();
        x[thread_idx() * stride] += shared_memory<float>()[BYTES / 4 - 1 - thread_idx()];
    }"""
    kernel = CudaKernel(PRELUDE + source, "f", HOPPER, {"BYTES": smem_bytes}, smem_bytes)
    kernel.launch((1, 1, 1), 32, [x, Int64(1), 1.5])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kernel.launch((1, 1, 1), 32, [x, Int64(1), 1.0])
    graph.replay()
    graph.replay()
    torch.cuda.synchronize()
    assert (x == 3.5).all()
