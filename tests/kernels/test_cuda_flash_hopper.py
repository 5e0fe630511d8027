"""The attention on warpgroup products: shapes beyond the examples, faults planted in its source, and that its products really overlap."""

from __future__ import annotations

import dataclasses
import re

import pytest
import torch
from contest import BLACKWELL, HOPPER
from cuda_emulator import EmulationError, Emulator

from klab.harness.measure.check import check
from klab.kernels.cuda_module import HEADERS, backend
from klab.kernels.prefill_attention.problem import PrefillAttention

pytest.importorskip("cupy")
from klab.kernels.prefill_attention import cuda_flash_hopper as file

KERNEL = file.cuda_flash_hopper
emulated = pytest.mark.skipif(bool(Emulator.missing()), reason=Emulator.missing() or "g++ is here")
# Few multiprocessors, so that each block of threads has several works: barriers and rings go around.
SMALL = dataclasses.replace(HOPPER, sm_count=2)


@pytest.fixture(autouse=True)
def nan_in_fresh_tensors():
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def found(problem, config, *, order=0, early=False, padding=0):
    with backend(Emulator(order, land_early=early)):
        return check(problem, KERNEL.build(problem, config, SMALL), seed=order, row_padding=padding)


@emulated
@pytest.mark.parametrize(
    ("problem", "config"),
    [
        # Three sequences, blocks that end inside one of them, three warpgroups of which some have no query or see no key of a block.
        (PrefillAttention((300, 5, 140), 2, 1, 64, dtype="float16"), file.HopperConfig(3, 32, 3, tma=True)),
        (
            PrefillAttention((150,), 2, 2, 64, prefix_lens=(150,), window=70, dtype="float16"),
            file.HopperConfig(2, 16, 1, heads_inner=False),
        ),
        (PrefillAttention((100,), 2, 2, 192, head_dim_v=128, causal=False), file.HopperConfig(2, 48, 2, tma=True, take_turns=False)),
        (
            PrefillAttention((130, 40), 4, 2, 96, prefix_lens=(50, 0), page_size=1, softcap=30.0, sinks=True, window=90),
            file.HopperConfig(2, 64, 2),
        ),
    ],
    ids=lambda v: v.label(),
)
def test_rings_and_works(problem, config):
    assert KERNEL.fits(problem, config, SMALL) is None
    for order, early in ((2, True), (3, False)):
        judged = found(problem, config, order=order, early=early, padding=8 * (order % 2))
        assert judged.passed, judged.reason


FAULTS = {
    "keys are overwritten before they are read": (
        "barrier_wait(of_keys ? &barriers->empty_k[stage] : &barriers->empty_v[stage], (turn_of_block / STAGES & 1) ^ 1);",
        "",
    ),
    "queries are overwritten before they are read": ("barrier_wait(&barriers->empty_q, (turn & 1) ^ 1);", ""),
    "a slot is called full before its copies have ended": ("cp_async_wait<LAG>();", ""),
    "the tensor cores are not told of the copies": ("fence_async_proxy();", ""),
    "keys are multiplied before they have come": ("await(barriers->full_k, i);\n                wait_for_turn();", "wait_for_turn();"),
    "keys are released before they are multiplied": ("wgmma_wait<1>();", ""),
    "the output is stored before its last product": (
        "multiply_values(to - 1);\n            wgmma_wait<0>();",
        "multiply_values(to - 1);",
    ),
    "the next 16 columns begin 16 bytes on": ("tile + step / 4 * KV_PANEL + step % 4 * 32", "tile + step / 4 * KV_PANEL + step % 4 * 16"),
    "the mask is off by one": ("CAUSAL ? column > position", "CAUSAL ? column > position + 1"),
    "older sums do not shrink": ("shrink_sums(sums, half, shrink[half]);", ""),
    "rows of the second half are stored over the first": ("int row = warp_row + half * 8 + lane / 4;", "int row = warp_row + lane / 4;"),
}


@emulated
@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found(fault, monkeypatch):
    right, wrong = FAULTS[fault]
    device_code = (HEADERS / "flash_hopper.cuh").read_text()
    assert device_code.count(right) == 1
    whole = file.SOURCE.replace("{products}", "PRODUCTS").replace('#include "flash_hopper.cuh"', device_code.replace(right, wrong))
    monkeypatch.setattr(file, "SOURCE", whole.replace("{", "{{").replace("}", "}}").replace("PRODUCTS", "{products}"))
    problem, config = PrefillAttention((200,), 2, 1, 64, dtype="float16"), file.HopperConfig(2, 32, 2)
    try:
        judged = [found(problem, config, order=order, early=early) for order, early in ((0, False), (1, True))]
    except EmulationError:
        return
    assert not all(one.passed for one in judged)


def test_other_chips_and_shapes_are_refused():
    plain = PrefillAttention((64,), 2, 1, 64)
    for problem, changes, chip, says in (
        (plain, {}, BLACKWELL, "sm_90 only"),
        (dataclasses.replace(plain, head_dim=80), {"tma": True}, HOPPER, "boxes are of 64 columns"),
        (dataclasses.replace(plain, prefix_lens=(64,), page_size=64), {"tma": True}, HOPPER, "packed keys"),
        (plain, {"consumers": 1}, HOPPER, "nobody to take turns with"),
        (dataclasses.replace(plain, head_dim=256), {"block_n": 176}, HOPPER, "shared memory"),
        (dataclasses.replace(plain, head_dim=128), {"consumers": 3, "block_n": 128}, HOPPER, "would spill"),
    ):
        reason = KERNEL.fits(problem, dataclasses.replace(file.HopperConfig(), **changes), chip)
        assert reason is not None and says in reason


@pytest.mark.parametrize(
    "problem",
    [
        *PrefillAttention.at_scale(),
        PrefillAttention((4608,), 24, 24, 128, causal=False),
        PrefillAttention((1500,) * 4, 20, 20, 64, causal=False),
    ],
    ids=lambda p: p.label(),
)
def test_defaults_spill_nothing_and_their_products_overlap(problem):
    pytest.importorskip("triton")  # brings the disassembler
    from klab.harness.tune.inspect_cubin import inspect_artifact, tool
    from klab.harness.tune.offline import compile_launch

    (artifact,), _ = compile_launch(KERNEL, problem, KERNEL.default(problem, HOPPER), HOPPER)
    resources = inspect_artifact(artifact)
    assert (resources.matrix_unit, resources.stack_bytes, resources.spill_instructions) == ("wgmma", 0, 0)
    assert resources.warp_specialised or resources.registers <= 128
    assert bool(resources.instructions["tma"]) == KERNEL.default(problem, HOPPER).tma
    # A compiler that cannot follow the accumulators waits behind each product. The source waits four times.
    assert len(re.findall(r"WARPGROUP\.DEPBAR", disassembled(tool("nvdisasm"), artifact.cubin))) == 4


def disassembled(nvdisasm, cubin):
    import subprocess
    import tempfile

    with tempfile.NamedTemporaryFile(suffix=".cubin") as binary:
        binary.write(cubin + b"\0")
        binary.flush()
        return subprocess.run([nvdisasm, "-c", binary.name], capture_output=True, text=True, check=True).stdout
