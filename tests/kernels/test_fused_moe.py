"""What the generic kernel tests do not ask of the fused MoE kernels."""

import dataclasses
import importlib.util
import subprocess
import sys
from itertools import islice
from pathlib import Path

import pytest
import torch
from contest import BLACKWELL, CPU, HOPPER
from cuda_emulator import Emulator

from klab.harness.measure.check import check
from klab.kernels.cuda_module import backend
from klab.kernels.discover import discover
from klab.kernels.expert_routing import draw_experts, experts_hit, inclusion, local_share, most_blocks
from klab.kernels.fused_moe.problem import FusedMoe
from klab.kernels.quantize import dequantize, quantize_fp8

KERNELS = discover().kernels
NEED_TRITON = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
SERVED = [
    FusedMoe(1, 2048, 768, 128, 8),
    FusedMoe(64, 4096, 1792, 8, 2),
    FusedMoe(4096, 2880, 2880, 128, 4, swiglu_limit=7.0),
    FusedMoe(16384, 7168, 2048, 256, 8, format="fp8_block", local_experts=32, skew=0.8),
]


# ------------------------------------------------------------------------------------------------------------------- routing
@pytest.mark.parametrize(("experts", "top_k", "skew"), [(8, 2, 0.0), (60, 4, 1.0), (5, 5, 0.7), (16, 3, 2.5), (7, 1, 1.0)])
def test_every_expert_is_chosen_as_often_as_it_should(experts, top_k, skew):
    expected = torch.tensor(inclusion(experts, top_k, skew))
    assert abs(float(expected.sum()) - top_k) < 1e-5 and float(expected.max()) <= 1.0 and float(expected.min()) > 0.0
    ids = draw_experts(6000, experts, top_k, skew, seed=3, device="cpu")
    assert ids.dtype == torch.int32 and ids.shape == (6000, top_k)
    assert all(len(set(row)) == top_k for row in ids[:200].tolist())
    found = torch.bincount(ids.flatten().long(), minlength=experts) / 6000
    assert float((found - expected).abs().max()) < 4 * (0.25 / 6000) ** 0.5


def test_routing_is_seeded_and_skewed():
    same = [draw_experts(50, 32, 4, 1.0, seed=seed, device="cpu") for seed in (1, 1, 2)]
    assert torch.equal(same[0], same[1]) and not torch.equal(same[0], same[2])
    # The popular experts are spread: every quarter of the indices has one of the four most popular.
    best = sorted(range(32), key=lambda e: -inclusion(32, 4, 1.0)[e])[:4]
    assert len({e // 8 for e in best}) >= 3


def test_experts_hit_is_what_drawing_finds():
    for skew, local in ((0.0, 0), (1.2, 0), (1.2, 10)):
        seen = [(draw_experts(20, 40, 3, skew, seed=seed, device="cpu") < (local or 40)).sum() for seed in range(40)]
        hit = [
            len({e for e in draw_experts(20, 40, 3, skew, seed=seed, device="cpu").flatten().tolist() if e < (local or 40)})
            for seed in range(40)
        ]
        assert abs(sum(hit) / 40 - experts_hit(20, 40, 3, skew, local)) < 1.0
        assert abs(float(sum(seen)) / 800 - local_share(40, 3, skew, local)) < 0.15
    assert experts_hit(1, 128, 8) == pytest.approx(8.0)


def test_work_counts_what_is_visited():
    dense, sparse = FusedMoe(4096, 256, 128, 16, 4), FusedMoe(1, 256, 128, 16, 4)
    weights = 3 * 256 * 128
    assert dense.flops() == 2.0 * 4096 * 4 * weights
    assert dense.bytes_moved() == pytest.approx(16 * weights * 2 + 4096 * (2 * 256 * 2 + 8 * 4), rel=1e-6)
    assert sparse.bytes_moved() == pytest.approx(4 * weights * 2 + 2 * 256 * 2 + 8 * 4, rel=1e-6)
    shard = dataclasses.replace(dense, local_experts=4)
    assert shard.flops() == pytest.approx(dense.flops() / 4)
    assert dataclasses.replace(dense, gated=False).flops() == pytest.approx(dense.flops() * 2 / 3)
    narrow = dataclasses.replace(sparse, format="fp8_block")
    assert narrow.math_dtype == "float8_e4m3fn" and narrow.wide() == sparse
    assert narrow.bytes_moved() < 0.55 * sparse.bytes_moved()


# -------------------------------------------------------------------------------------------------------------- the check bites
def correct(problem, *, fault=""):
    """The layer in float32, right but for one fault."""

    def launch(inputs, outputs):
        p, out = problem, torch.zeros(problem.tokens, problem.hidden)
        ids, weights = inputs["topk_ids"], inputs["topk_weights"].clone()
        if fault == "weights of the neighbour":
            weights = weights.roll(1, dims=1)
        if fault == "weights forgotten":
            weights = torch.ones_like(weights)
        if fault == "weights renormalised":
            weights = weights / weights.sum(dim=1, keepdim=True)

        def rounded(rows):
            return dequantize(*quantize_fp8(rows, (1, 128)), (1, 128)) if p.format else rows

        def weight(name, e):
            w = inputs[name][e]
            if not p.format:
                return w.float()
            scale = inputs[f"{name}_scale"][e]
            return dequantize(w, scale.roll(1, dims=-1) if fault == "scale of the next block" else scale, (128, 128))

        x = inputs["x"].float()
        for e in range(p.local):
            token, slot = (ids == e).nonzero(as_tuple=True)
            if fault == "last row of an expert" and len(token) > 1:
                token, slot = token[:-1], slot[:-1]
            rows = x[token] if fault == "x not quantised" else rounded(x[token])
            w_up, w_down = weight("w_gate_up", e), weight("w_down", e)
            if fault == "last element of k":
                w_up = torch.cat([w_up[:, :-1], torch.zeros(len(w_up), 1)], dim=1)
            up = rows @ w_up.T
            if fault == "gate and up exchanged":
                up = up.roll(p.intermediate, dims=1)
            up = (dataclasses.replace(p, swiglu_limit=1e9) if fault == "no clamp" else p).activate(up)
            up = up if fault == "active not quantised" else rounded(up)
            out.index_add_(0, token, (up @ w_down.T) * weights[token, slot][:, None])
        if fault == "another shard's expert":
            token, slot = (ids == p.local).nonzero(as_tuple=True)
            out[token] += 0.1
        outputs["out"].copy_(out)

    return launch


PLAIN = ["weights of the neighbour", "last row of an expert", "last element of k", "gate and up exchanged"]
FAULTS = [
    (FusedMoe(30, 72, 56, 4, 2, "float16"), PLAIN),
    (FusedMoe(30, 96, 64, 6, 2, "bfloat16", local_experts=4), [*PLAIN, "another shard's expert"]),
    (FusedMoe(30, 96, 64, 6, 2, "bfloat16", swiglu_limit=0.5), [*PLAIN, "no clamp"]),
    (FusedMoe(20, 200, 160, 4, 2, "float32", "fp8_block"), [*PLAIN, "scale of the next block", "x not quantised", "active not quantised"]),
    (FusedMoe(20, 200, 160, 4, 2, "float16", "fp8_block"), [*PLAIN, "scale of the next block", "x not quantised"]),
    (FusedMoe(20, 200, 160, 4, 2, "bfloat16", "fp8_block"), ["weights of the neighbour", "scale of the next block", "x not quantised"]),
    *((problem, ["weights forgotten", "weights renormalised"]) for problem in FusedMoe.examples()),
]


@pytest.mark.parametrize(("problem", "faults"), FAULTS, ids=lambda v: v.label() if isinstance(v, FusedMoe) else "")
def test_a_right_layer_passes_and_a_wrong_one_does_not(problem, faults):
    for seed in (1, 2):
        right = check(problem, correct(problem), seed=seed)
        assert right.passed and right.error < 0.5 * right.tolerance, right
        for fault in faults:
            assert not check(problem, correct(problem, fault=fault), seed=seed).passed, fault


def test_quantisation_error_is_seen_against_the_wide_problem():
    problem = FusedMoe(20, 256, 128, 4, 2, format="fp8_block")
    wide = problem.wide()
    unquantised = wide.reference(problem.wide_inputs(seed=5))["out"]
    error = float((problem.reference(problem.inputs(seed=5))["out"] - unquantised).norm() / unquantised.norm())
    assert 0.02 < error < 0.12
    assert set(problem.wide_inputs(seed=5)) == set(wide.inputs(seed=5))


# ------------------------------------------------------------------------------------------------------------------- sorting
def sorted_by_definition(ids, local, block_m):
    slots, experts = [], []
    for e in range(local):
        mine = (ids.flatten() == e).nonzero().flatten().tolist()
        slots += mine + [ids.numel()] * (-len(mine) % block_m)
        experts += [e] * -(-len(mine) // block_m)
    return slots, experts


# By one program, as in the examples, and by two.
SORTS = [(5, 6, 3, 4, 16), (140, 40, 8, 30, 16)]


def sorts_rightly(found, ids, local, block_m):
    slots, experts = sorted_by_definition(ids, local, block_m)
    assert int(found.padded) == len(slots) <= most_blocks(ids.numel(), local, block_m) * block_m
    assert found.slots[: len(slots)].tolist() == slots
    assert found.block_experts[: len(experts)].tolist() == experts


@pytest.mark.skipif(bool(Emulator.missing()), reason=Emulator.missing() or "g++ is here")
def test_cuda_sorts_choices():
    pytest.importorskip("cupy")
    from klab.kernels.fused_moe._cuda_align import Align

    # The examples run the sort by one block.
    tokens, experts, top_k, local, block_m = SORTS[-1]
    ids = draw_experts(tokens, experts, top_k, 0.7, seed=3, device="cpu")
    align = Align(ids.numel(), top_k, local, block_m, HOPPER)
    found = align.workspace(torch.device("cpu"))
    with backend(Emulator(order=1)):
        align.launch(ids, found)
    sorts_rightly(found, ids, local, block_m)


SORT_IN_TRITON = """
import os, sys
os.environ["TRITON_INTERPRET"] = "1"
sys.path[:0] = sys.argv[1:]
import torch
from test_fused_moe import SORTS, sorts_rightly
from klab.kernels.expert_routing import draw_experts
from klab.kernels.triton_align import align, workspace
for tokens, experts, top_k, local, block_m in SORTS:
    ids = draw_experts(tokens, experts, top_k, 0.7, seed=3, device="cpu")
    found = workspace(ids.numel(), local, block_m, torch.device("cpu"))
    align(ids, local, block_m, found)
    sorts_rightly(found, ids, local, block_m)
"""


@NEED_TRITON
@pytest.mark.interpreter
def test_triton_sorts_choices():
    here = Path(__file__).parent
    done = subprocess.run([sys.executable, "-c", SORT_IN_TRITON, str(here), str(here.parent)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]


# -------------------------------------------------------------------------------------------------------------------- spaces
GPU_KERNELS = ["triton_engine", "triton_fused", "triton_few", "cuda_moe"]


@pytest.mark.parametrize("name", GPU_KERNELS)
def test_space_is_valid_and_led_by_the_default(name):
    if f"fused_moe/{name}" not in KERNELS:
        pytest.skip("its toolkit is not installed")
    kernel = KERNELS[f"fused_moe/{name}"]
    for problem in SERVED:
        for chip in (HOPPER, BLACKWELL):
            found = list(islice(kernel.space(problem, chip), 3000))
            if kernel.unfit(problem, chip) is not None:
                assert found == []
                continue
            assert found[0] == kernel.default(problem, chip)
            assert len(set(found)) == len(found) >= 50
            assert all(kernel.fits(problem, config, chip) is None for config in found[:50])
        assert kernel.unfit(problem, CPU) is not None


@NEED_TRITON
def test_every_16_bit_and_fp8_layer_has_a_triton_kernel_and_few_tokens_a_special_one():
    for problem in SERVED:
        assert all(KERNELS[f"fused_moe/{name}"].unfit(problem, HOPPER) is None for name in ("triton_engine", "triton_fused"))
    assert KERNELS["fused_moe/triton_few"].unfit(SERVED[0], HOPPER) is None
    assert "sorting" in KERNELS["fused_moe/triton_few"].unfit(SERVED[2], HOPPER)


@NEED_TRITON
def test_the_engines_defaults_compete():
    from klab.kernels.fused_moe._engine_config import EngineConfig, sglang_default, vllm_default

    kernel = KERNELS["fused_moe/triton_engine"]
    names = ["BLOCK_SIZE_M", "BLOCK_SIZE_N", "BLOCK_SIZE_K", "GROUP_SIZE_M", "num_warps", "num_stages", "SPLIT_K"]
    assert [field.name for field in dataclasses.fields(kernel.config_type)] == names
    for problem in SERVED:
        for engine in (vllm_default, sglang_default):
            assert engine(problem) in list(islice(kernel.space(problem, HOPPER), 4)), (problem.label(), engine.__name__)
    # As their sources have them.
    assert vllm_default(FusedMoe(16, 4096, 768, 128, 8)) == EngineConfig(16, 64, 128, 1, 4, 4)
    assert vllm_default(FusedMoe(4096, 4096, 1792, 8, 2)) == EngineConfig(128, 128, 64, 16, 8, 3)
    assert sglang_default(FusedMoe(64, 4096, 1792, 128, 2)) == EngineConfig(16, 32, 64, 1, 4, 3)
    assert sglang_default(FusedMoe(512, 4096, 1792, 128, 2)) == EngineConfig(64, 64, 32, 8, 4, 3)
    assert vllm_default(FusedMoe(64, 7168, 2048, 256, 8, format="fp8_block")) == EngineConfig(16, 128, 128, 32, 4, 3)
    assert "SPLIT_K" in (kernel.fits(SERVED[0], EngineConfig(SPLIT_K=2), HOPPER) or "it fits")


# Entries of vLLM's files E=128,N=384,device_name=NVIDIA_(B200|H200)[,dtype=fp8_w8a8,block_shape=[128,128]].json.
TABLES = [
    (BLACKWELL, "", 1, (16, 32, 64, 1, 4, 4)),
    (BLACKWELL, "", 2048, (128, 256, 64, 16, 8, 4)),
    (BLACKWELL, "", 8192, (256, 256, 64, 1, 8, 3)),
    (BLACKWELL, "fp8_block", 64, (16, 128, 256, 1, 4, 5)),
    (BLACKWELL, "fp8_block", 4096, (64, 128, 256, 32, 4, 4)),
    (HOPPER, "", 8, (16, 64, 128, 16, 4, 2)),
    (HOPPER, "", 4096, (128, 256, 64, 1, 8, 4)),
    (HOPPER, "fp8_block", 2048, (64, 128, 128, 16, 4, 4)),
]


@NEED_TRITON
@pytest.mark.parametrize(("chip", "format", "tokens", "entry"), TABLES, ids=str)
def test_entries_of_the_engines_tables_fit(chip, format, tokens, entry):
    from klab.kernels.fused_moe._engine_config import EngineConfig

    kernel = KERNELS["fused_moe/triton_engine"]
    assert kernel.fits(FusedMoe(tokens, 4096, 384, 128, 8, format=format), EngineConfig(*entry), chip) is None


@NEED_TRITON
def test_sums_beyond_registers_need_tensor_memory():
    from klab.kernels.fused_moe._engine_config import EngineConfig

    kernel, largest = KERNELS["fused_moe/triton_engine"], EngineConfig(256, 256, 64, 1, 8, 3)
    layer = FusedMoe(8192, 4096, 384, 128, 8)
    for problem, config, chip in (
        (layer, largest, HOPPER),
        (layer, EngineConfig(256, 256, 64, 1, 4, 3), BLACKWELL),
        (dataclasses.replace(layer, format="fp8_block"), EngineConfig(128, 256, 64, 1, 8, 3), BLACKWELL),
        (dataclasses.replace(layer, intermediate=376), largest, BLACKWELL),
    ):
        assert "spill" in kernel.fits(problem, config, chip)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"experts": 2, "top_k": 3}, "top_k"),
        ({"format": "int4"}, "format"),
        ({"local_experts": 200}, "local_experts"),
        ({"tokens": 0}, "tokens"),
        ({"gated": False, "swiglu_limit": 7.0}, "gated"),
    ],
)
def test_refuses_impossible_problems(change, reason):
    with pytest.raises(Exception, match=reason):
        dataclasses.replace(SERVED[0], **change)
