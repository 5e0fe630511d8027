"""The emulator finds planted faults, by rule: whatever the order of threads and the moment at which copies arrive."""

from __future__ import annotations

import dataclasses
import importlib

import pytest
import torch
from contest import HOPPER

from cuda_emulator import EmulationError, Emulator
from klab.harness.measure.check import check
from klab.kernels.cuda_module import CudaKernel, Int64, backend
from klab.kernels.matmul.problem import Matmul

pytestmark = pytest.mark.skipif(bool(Emulator.missing()), reason=Emulator.missing() or "g++ is here")
EMULATORS = {"ascending": Emulator(0, False), "descending, early": Emulator(1, True), "shuffled": Emulator(5, False)}


def run(source, args, emulator=EMULATORS["ascending"], *, grid=(1, 1, 1), threads=32, smem_bytes=0, **defines):
    """Launch the kernel `f` of a source."""
    with backend(emulator):
        CudaKernel('#include "device.cuh"\nusing namespace klab;\n' + source, "f", HOPPER, defines, smem_bytes).launch(grid, threads, args)


PIPELINE = """
KLAB_KERNEL(f, 64)(const float* x, float* out, int n) {
    float* tile = shared_memory<float>();
    float sum = 0.0f;
    for (int i = 0; i < n; i += 256) {
        cp_async_16(tile + thread_idx() * 4, x + i + thread_idx() * 4, i + thread_idx() * 4 < n);
        cp_async_commit();
        cp_async_wait<0>();
        sync_threads();
        for (int j = 0; j < 4; ++j) sum += tile[(63 - thread_idx()) * 4 + j];
        sync_threads();
    }
    sum = warp_sum<32>(sum);
    if (thread_idx() % 32 == 0) tile[thread_idx() / 32] = sum;
    sync_threads();
    if (thread_idx() == 0) out[block_idx_x()] = tile[0] + tile[1];
}
"""
WAIT, SUM = "cp_async_wait<0>();", "sum += tile[(63 - thread_idx()) * 4 + j];"
SOURCE, INDEX, TOTAL = "x + i + thread_idx() * 4,", "(63 - thread_idx()) * 4 + j", "sum = warp_sum<32>(sum);"
LEAVE = "if (thread_idx() % 32 == 0) tile[thread_idx() / 32] = sum;"
FAULTS = {
    "no wait": (WAIT, "", "no cp_async_wait"),
    "no commit": ("cp_async_commit();", "", "no cp_async_wait"),
    "wait for one group too few": (WAIT, "cp_async_wait<1>();", "no cp_async_wait"),
    "no barrier behind the wait": (f"{WAIT}\n        sync_threads();", WAIT, "no sync_threads between"),
    "a warp's barrier for a block's": (f"{WAIT}\n        sync_threads();", f"{WAIT}\n        sync_warp();", "no sync_threads between"),
    "no barrier before overwriting": (f"{SUM}\n        sync_threads();", SUM, "no sync_threads between"),
    "no barrier behind a store": (f"{LEAVE}\n    sync_threads();", LEAVE, "no sync_threads between"),
    "all lanes store to one place": (LEAVE, "tile[thread_idx() / 32] = sum;", "no sync_warp between"),
    "copy from too far": (SOURCE, "x + i + thread_idx() * 4 + 4,", "of a tensor, of which 2560 are allowed"),
    "copy from before the start": (SOURCE, "x + i + thread_idx() * 4 - 4,", "read of 16 bytes at byte -16 of a tensor"),
    "copy without a mask": ("i + thread_idx() * 4 < n", "true", "of a tensor, of which 2560 are allowed"),
    "copy from an odd address": (SOURCE, "x + i + thread_idx() * 4 + 1,", "is not aligned"),
    "read behind shared memory": (INDEX, "(64 - thread_idx()) * 4 + j", "of shared memory, of which 1024 are allowed"),
    "store behind the output": ("out[block_idx_x()]", "out[block_idx_x() + 1]", "write of 4 bytes at byte 8 of a tensor"),
    "two blocks store to one place": ("out[block_idx_x()]", "out[0]", "another block wrote"),
    "a lane is left out": (TOTAL, f"if (thread_idx() != 5) {TOTAL}", "all 32 lanes must reach it together"),
    "a lane returns early": (TOTAL, f"if (thread_idx() == 63) return;\n    {TOTAL}", "all 32 lanes must reach it together"),
    "a warp misses the barrier": (LEAVE, f"{LEAVE}\n    if (thread_idx() < 32) sync_warp(); else", "deadlock|no sync_threads between"),
    "an index overflows": ("float sum = 0.0f;", "float sum = 0.0f; int big = 2147483647 - n; big += 2 * n; sum += big;", "signed overflow"),
    "an array is too short": ("float sum = 0.0f;", "float sum = 0.0f, part[4] = {}; sum += part[thread_idx() / 8];", "out of range"),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("emulator", EMULATORS.values(), ids=EMULATORS)
def test_fault_is_found(fault, emulator):
    before, after, says = FAULTS[fault]
    x, out = torch.randn(640), torch.zeros(2)
    run(PIPELINE, [x, out, 640], emulator, grid=(2, 1, 1), threads=64, smem_bytes=1024)
    assert torch.allclose(out, x.sum().expand(2), atol=1e-4)
    assert PIPELINE.count(before) == 1
    with pytest.raises(EmulationError, match=says):
        run(PIPELINE.replace(before, after), [x, out, 640], emulator, grid=(2, 1, 1), threads=64, smem_bytes=1024)


def test_reads_nothing_between_the_rows_of_a_view():
    buffer, out = torch.randn(4, 12), torch.zeros(2)
    source = "KLAB_KERNEL(f, 32)(const float* x, float* out) { if (thread_idx() == 0) out[0] = x[COLUMN]; }"
    run(source, [buffer[:, :8], out], COLUMN=7)
    assert out[0] == buffer[0, 7]
    with pytest.raises(EmulationError, match="read of 4 bytes at byte 32 of a tensor"):
        run(source, [buffer[:, :8], out], COLUMN=8)


@pytest.mark.parametrize(
    ("args", "says"),
    [
        ([torch.zeros(1), 1, 1.0], "takes 4 arguments and was launched with 3"),
        ([torch.zeros(1), 1, 1, 1.0], "argument 2 of f is int; the kernel declares int64_t"),
        ([torch.zeros(1).half(), 1, Int64(1), 1.0], "argument 0 of f is float16 tensor; the kernel declares float32 tensor"),
        ([torch.zeros(1), 1 << 40, Int64(1), 1.0], "more than 32 bits need Int64"),
    ],
)
def test_compares_arguments_with_the_signature(args, says):
    with pytest.raises(EmulationError, match=says):
        run("KLAB_KERNEL(f, 32)(float* x, int i, int64_t l, float f) {}", args)


MMA = ("cuda_mma", Matmul(100, 136, 200, "float16"), {"block_m": 64, "block_n": 64, "block_k": 32, "stages": 3, "group_m": 8})
GEMV = ("cuda_gemv", Matmul(5, 40, 300, "float32"), {"warps": 2, "stages": 3, "split": 2})
KERNEL_FAULTS = [
    (*MMA, "cp_async_wait<STAGES - 2>();", "", "no cp_async_wait"),
    (*MMA, "cp_async_wait<STAGES - 2>();", "cp_async_wait<STAGES - 1>();", "no cp_async_wait"),
    (*MMA, "sync_threads();  // this stage", "// this stage", "no sync_threads between"),
    (*MMA, "cp_async_wait<0>();\n    sync_threads();", "cp_async_wait<0>();", "no sync_threads between"),
    (*MMA, "row < rows_left && chunk * 8 < columns_left);", "row <= rows_left && chunk * 8 < columns_left);", "of a tensor"),
    (*MMA, "m0 + row < m && column < n", "m0 + row <= m && column < n", "of a tensor"),
    (*MMA, "step * 2 + lane / 16)", "step * 2 + 1 - lane / 16)", "off by"),
    (*MMA, "f.w[j][1] = r[1];", "f.w[j][1] = r[2];", "off by"),
    (*MMA, "+ lane % 4 * 4;", "+ (lane + 1) % 4 * 4;", "off by"),
    (*MMA, "n + lane % 8 + lane / 16 * 8", "n + lane % 16", "off by"),
    (*MMA, "(first_m + in_group % group_rows)", "(first_m + in_group % GROUP_M)", "not finite"),
    (*GEMV, "if (!HALVES) sync_warp();", "", "no sync_warp between"),
    (*GEMV, "    sums.leave();\n    sync_threads();", "    sums.leave();", "no sync_threads between"),
    (*GEMV, "row < p.n_left ? p.k_end - k : 0", "row <= p.n_left ? p.k_end - k : 0", "of a tensor"),
    (*GEMV, "if (column >= n) continue;", "", "of a tensor"),
    (*GEMV, "first + next * WARPS * STRIDE_K", "first + i * WARPS * STRIDE_K", "off by"),
]


@pytest.mark.parametrize(("name", "problem", "knobs", "before", "after", "says"), KERNEL_FAULTS, ids=range(len(KERNEL_FAULTS)))
def test_fault_in_a_matmul_is_found(monkeypatch, name, problem, knobs, before, after, says):
    module = importlib.import_module(f"klab.kernels.matmul.{name}")
    kernel = getattr(module, name)
    config = dataclasses.replace(kernel.default(problem, HOPPER), **knobs)

    def verdict() -> str:
        try:
            with backend(Emulator(order=1, land_early=True)):
                return check(problem, kernel.build(problem, config, HOPPER), seed=3).reason
        except EmulationError as error:
            return str(error)

    assert verdict() == ""
    assert module.SOURCE.count(before) == 1
    monkeypatch.setattr(module, "SOURCE", module.SOURCE.replace(before, after))
    assert says in verdict()
