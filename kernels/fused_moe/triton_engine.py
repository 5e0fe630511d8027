"""The engines' Triton fused MoE by structure and by knobs, so that what is tuned here is a table for vLLM and SGLang."""

# Triton functions take no annotations but tl.constexpr.
# mypy: disable-error-code="no-untyped-def,untyped-decorator"

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product

import torch
import triton
import triton.language as tl

from klab.kernels.contract import Chip, Launch, Tensors, kernel
from klab.kernels.dtypes import SIZE_BYTES, torch_dtype
from klab.kernels.expert_routing import experts_hit, most_blocks
from klab.kernels.fused_moe._engine_config import EngineConfig, sglang_default, vllm_default
from klab.kernels.fused_moe.problem import BLOCK, FusedMoe
from klab.kernels.triton_align import Aligned, align, workspace
from klab.kernels.triton_experts import activate, quantize_rows, sum_experts
from klab.kernels.triton_support import cdiv, next_power_of_2, pipeline_smem_bytes

# As in a plain matmul, 128 float32 sums per thread leave room for pointers; fp8 blocks keep a step's sums beside the scaled ones.
MAX_SUMS_PER_THREAD = {"": 128, "fp8_block": 64}
MAX_FMAS_PER_STEP_FP32 = 4096


@triton.jit
def _experts(
    x,
    x_scale,
    w,
    w_scale,
    out,
    topk_weights,
    slots,
    block_experts,
    padded,
    n,
    k,
    blocks_m,
    choices,
    stride_x,
    stride_xs,
    stride_we,
    stride_wn,
    stride_wse,
    stride_wsn,
    stride_out,
    stride_tw,
    CHOICES_PER_X: tl.constexpr,
    TOP_K: tl.constexpr,
    WEIGHTED: tl.constexpr,
    SCALE_BLOCK: tl.constexpr,
    EVEN_N: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_SIZE_M: tl.constexpr,
    BLOCK_SIZE_N: tl.constexpr,
    BLOCK_SIZE_K: tl.constexpr,
    GROUP_SIZE_M: tl.constexpr,
):
    tile = tl.program_id(0)
    tiles_n = tl.cdiv(n, BLOCK_SIZE_N)
    per_group = GROUP_SIZE_M * tiles_n
    first_m = tile // per_group * GROUP_SIZE_M
    rows = min(blocks_m - first_m, GROUP_SIZE_M)
    tile_m = first_m + tile % per_group % rows
    tile_n = tile % per_group // rows
    if tile_m * BLOCK_SIZE_M >= tl.load(padded):
        return
    choice = tl.load(slots + tile_m * BLOCK_SIZE_M + tl.arange(0, BLOCK_SIZE_M))
    inside_m = choice < choices
    expert = tl.load(block_experts + tile_m).to(tl.int64)

    # Where the tile starts is reckoned in 64 bits, offsets within it in 32; rows of x are gathered from anywhere.
    offs_n = tl.arange(0, BLOCK_SIZE_N)
    offs_k = tl.arange(0, BLOCK_SIZE_K)
    inside_n = tile_n * BLOCK_SIZE_N + offs_n < n
    x_rows = choice // CHOICES_PER_X
    x_tile = x + x_rows[:, None].to(tl.int64) * stride_x + offs_k[None, :]
    w_tile = w + expert * stride_we + (tile_n * BLOCK_SIZE_N).to(tl.int64) * stride_wn + offs_n[None, :] * stride_wn + offs_k[:, None]
    if SCALE_BLOCK > 0:
        xs = x_scale + x_rows.to(tl.int64) * stride_xs
        ws = w_scale + expert * stride_wse
        if BLOCK_SIZE_N <= SCALE_BLOCK:
            ws += tile_n * BLOCK_SIZE_N // SCALE_BLOCK * stride_wsn
        else:
            ws += (tile_n * BLOCK_SIZE_N + offs_n) // SCALE_BLOCK * stride_wsn

    sums = tl.zeros((BLOCK_SIZE_M, BLOCK_SIZE_N), dtype=tl.float32)
    for start in range(0, k, BLOCK_SIZE_K):
        inside_k = offs_k < k - start
        a = tl.load(x_tile, mask=inside_m[:, None] if EVEN_K else inside_m[:, None] & inside_k[None, :], other=0.0)
        if EVEN_K and EVEN_N:
            b = tl.load(w_tile)
        elif EVEN_K:
            b = tl.load(w_tile, mask=inside_n[None, :], other=0.0)
        else:
            b = tl.load(w_tile, mask=inside_n[None, :] & inside_k[:, None], other=0.0)
        if SCALE_BLOCK > 0:
            scale = tl.load(xs + start // SCALE_BLOCK, mask=inside_m, other=0.0)
            if BLOCK_SIZE_N <= SCALE_BLOCK:
                sums += tl.dot(a, b) * (scale * tl.load(ws + start // SCALE_BLOCK))[:, None]
            else:
                sums += tl.dot(a, b) * scale[:, None] * tl.load(ws + start // SCALE_BLOCK, mask=inside_n, other=0.0)[None, :]
        else:
            sums = tl.dot(a, b, sums, input_precision="ieee")
        x_tile += BLOCK_SIZE_K
        w_tile += BLOCK_SIZE_K

    if WEIGHTED:
        sums *= tl.load(topk_weights + choice // TOP_K * stride_tw + choice % TOP_K, mask=inside_m, other=0.0)[:, None]
    to = out + choice[:, None].to(tl.int64) * stride_out + tile_n * BLOCK_SIZE_N + offs_n[None, :]
    tl.store(to, sums.to(out.dtype.element_ty), mask=inside_m[:, None] & inside_n[None, :])


def fits(problem: FusedMoe, config: EngineConfig, chip: Chip) -> str | None:
    """Tiles are powers of two; stages fit shared memory and sums fit registers. Tiles larger than the problem run, as in the engines."""
    c, size = config, SIZE_BYTES["float8_e4m3fn" if problem.format else problem.dtype]
    bm, bn, bk, warps = c.BLOCK_SIZE_M, c.BLOCK_SIZE_N, _block_k(problem, c), c.num_warps
    if any(value < 1 or value & (value - 1) for value in (bm, bn, bk, warps)):
        return "tiles and warps must be powers of two"
    if min(bm, bn) < 16 or bk < (32 if problem.format else 16) or max(bm, bn, bk) > 256:
        return "tiles go from 16 (fp8: 32 along k) to 256"
    if c.SPLIT_K != 1:
        return "the engines run this kernel with SPLIT_K 1, whatever the table says"
    if min(c.GROUP_SIZE_M, c.num_stages) < 1:
        return "GROUP_SIZE_M and num_stages must be at least 1"
    if problem.format and chip.target < 89:
        return "fp8 needs compute capability 8.9"
    if max(problem.hidden, problem.intermediate) * bn >= 2**31:
        return "rows are too long for 32-bit offsets within a tile"
    threads, fp32 = 32 * warps, problem.dtype == "float32" and not problem.format
    if warps > 16 or (bm // 16) * (bn // 8) < warps:
        return "too many warps for the tile"
    if bm * bn // threads > _most_sums(problem, config, chip):
        return "the sums would spill registers"
    if fp32 and bm * bn * bk // threads > MAX_FMAS_PER_STEP_FP32:
        return "one step would unroll too many multiply-adds"
    if pipeline_smem_bytes((bm + bn) * bk * size, c.num_stages) > chip.smem_per_block_bytes:
        return "too much shared memory"
    return None


def _most_sums(problem: FusedMoe, config: EngineConfig, chip: Chip) -> int:
    """Per thread. On sm_100, 16-bit sums of 64 rows or more lie in tensor memory and pass through registers at the end.

    Compiled with Triton 3.7.1, 256 of them make 252 registers and no spill where sizes are multiples of 16; others spill 700 bytes.
    """
    if problem.dtype == "float32" and not problem.format:
        return 64
    in_tensor_memory = chip.target >= 100 and config.BLOCK_SIZE_M >= 64 and config.num_warps >= 4 and not problem.format
    if in_tensor_memory and problem.hidden % 16 == 0 and problem.intermediate % 16 == 0:
        return 256
    return MAX_SUMS_PER_THREAD[problem.format]


def _block_k(problem: FusedMoe, config: EngineConfig) -> int:
    """The engines' rule: a step along k stays within one block of scales."""
    return min(config.BLOCK_SIZE_K, BLOCK) if problem.format else config.BLOCK_SIZE_K


def rows_per_expert(problem: FusedMoe) -> float:
    """Expected rows of a visited expert."""
    hit = experts_hit(problem.tokens, problem.experts, problem.top_k, problem.skew, problem.local)
    return problem.visits / hit if hit else 1.0


def default(problem: FusedMoe, chip: Chip) -> EngineConfig:
    """Rows by how many a visited expert has; large tiles for prefills, thin ones with deep pipelines where it waits for memory."""
    rows = rows_per_expert(problem)
    bm = 16 if rows <= 16 else 32 if rows <= 32 else 64 if rows <= 96 else 128
    if problem.dtype == "float32" and not problem.format:
        return EngineConfig(min(bm, 64), 64, 32, 1, 4, 2)
    if problem.format:
        # 128x128 with 8 warps keeps the 64 sums per thread that two sets of them allow.
        config = EngineConfig(bm, 128, 128, 16, 8 if bm == 128 else 4, 4 if bm <= 64 else 3)
    elif bm == 128:
        config = EngineConfig(128, 256 if rows >= 256 else 128, 64, 16, 8, 3)
    else:
        config = EngineConfig(bm, 128 if bm == 64 else 64, 128, 16 if bm == 64 else 1, 4, 4)
    # Masked rows of awkward lengths are loaded element by element: smaller tiles keep their pointers in registers.
    if problem.hidden % 16 or problem.intermediate % 16:
        config = EngineConfig(min(bm, 64), 64, 64 if problem.format else 32, 1, 4, 2)
    while config.num_stages > 2 and fits(problem, config, chip) == "too much shared memory":
        config = replace(config, num_stages=config.num_stages - 1)
    return config


def space(problem: FusedMoe, chip: Chip) -> Iterator[EngineConfig]:
    """What the engines run untuned, then the ranges of vLLM's own tuner (benchmark_moe.py), less what is hopeless for the shape."""
    engines = dict.fromkeys((vllm_default(problem), sglang_default(problem)))
    yield from engines
    rows = rows_per_expert(problem)
    narrow, deep = max(problem.up_rows, problem.hidden), max(problem.hidden, problem.intermediate)
    for bm, bn, bk in product((16, 32, 64, 128, 256), (32, 64, 128, 256), (64, 128) if problem.format else (64, 128, 256)):
        if (bm > 16 and bm >= 4 * rows) or 16 * bm <= rows or bn > next_power_of_2(narrow) or bk > max(64, next_power_of_2(deep)):
            continue  # most rows are padding, or the weights are read from L2 too often; beyond the problem's edges
        blocks = most_blocks(problem.tokens * problem.top_k, problem.local, bm)
        for group, warps, stages in product((1, 8, 16, 32, 64), (4, 8), (2, 3, 4, 5)):
            if (group > 1 and group // 2 >= blocks) or bm * bn < 256 * warps or stages - 1 > cdiv(deep, bk):
                continue  # the same order as fewer; idle warps, idle stages
            config = EngineConfig(bm, bn, bk, group, warps, stages)
            if config not in engines:
                yield config


@dataclass(frozen=True)
class _Workspace:
    """Per device: the sorted choices and what one step leaves for the next."""

    aligned: Aligned
    x: torch.Tensor
    x_scale: torch.Tensor
    up: torch.Tensor
    active: torch.Tensor
    active_scale: torch.Tensor
    down: torch.Tensor


def _workspace(problem: FusedMoe, block_m: int, device: torch.device) -> _Workspace:
    p, choices = problem, problem.tokens * problem.top_k
    dtype = torch_dtype(p.dtype)
    operand = torch.float8_e4m3fn if p.format else dtype

    def empty(rows: int, columns: int, of: torch.dtype) -> torch.Tensor:
        return torch.empty((rows, columns), dtype=of, device=device)

    return _Workspace(
        aligned=workspace(choices, p.local, block_m, device),
        x=empty(p.tokens if p.format else 1, p.hidden, operand),
        x_scale=empty(p.tokens if p.format else 1, cdiv(p.hidden, BLOCK), torch.float32),
        up=empty(choices, p.up_rows, dtype),
        active=empty(choices, p.intermediate, operand),
        active_scale=empty(choices if p.format else 1, cdiv(p.intermediate, BLOCK), torch.float32),
        down=empty(choices, p.hidden, dtype),
    )


@kernel(FusedMoe, backend="triton", config=EngineConfig, space=space, default=default, fits=fits)
def triton_engine(problem: FusedMoe, config: EngineConfig, chip: Chip) -> Launch:
    """Triton as vLLM and SGLang run it: align, gate and up, activation, down with router weights, sum; their tuned tables fit."""
    p, c = problem, config
    workspaces: dict[torch.device, _Workspace] = {}
    blocks_m = most_blocks(p.tokens * p.top_k, p.local, c.BLOCK_SIZE_M)

    def matmul(
        x: torch.Tensor, x_scale: torch.Tensor, w: torch.Tensor, w_scale: torch.Tensor, out: torch.Tensor, *, inputs: Tensors, at: Aligned
    ) -> None:
        n, k = w.shape[1:]
        down = w is inputs["w_down"]
        scales = w_scale.stride() if p.format else (0, 0)
        block_k = _block_k(p, c)
        _experts[(blocks_m * cdiv(n, c.BLOCK_SIZE_N),)](
            x,
            x_scale,
            w,
            w_scale,
            out,
            inputs["topk_weights"],
            at.slots,
            at.block_experts,
            at.padded,
            n,
            k,
            blocks_m,
            p.tokens * p.top_k,
            x.stride(0),
            x_scale.stride(0),
            *w.stride()[:2],
            *scales[:2],
            out.stride(0),
            inputs["topk_weights"].stride(0),
            CHOICES_PER_X=1 if down else p.top_k,
            TOP_K=p.top_k,
            WEIGHTED=down,
            SCALE_BLOCK=BLOCK if p.format else 0,
            EVEN_N=n % c.BLOCK_SIZE_N == 0,
            EVEN_K=k % block_k == 0,
            BLOCK_SIZE_M=c.BLOCK_SIZE_M,
            BLOCK_SIZE_N=c.BLOCK_SIZE_N,
            BLOCK_SIZE_K=block_k,
            GROUP_SIZE_M=c.GROUP_SIZE_M,
            num_warps=c.num_warps,
            num_stages=c.num_stages,
        )

    def launch(inputs: Tensors, outputs: Tensors) -> None:
        x, ids, device = inputs["x"], inputs["topk_ids"], inputs["x"].device
        if device not in workspaces:
            workspaces[device] = _workspace(p, c.BLOCK_SIZE_M, device)
        to = workspaces[device]
        align(ids, p.local, c.BLOCK_SIZE_M, to.aligned)
        if p.format:
            quantize_rows(x, to.x, to.x_scale)
            x = to.x
        scales = [inputs[f"{name}_scale"] if p.format else to.x_scale for name in ("w_gate_up", "w_down")]
        matmul(x, to.x_scale, inputs["w_gate_up"], scales[0], to.up, inputs=inputs, at=to.aligned)
        activate(p, to.up, ids, to.active, to.active_scale)
        matmul(to.active, to.active_scale, inputs["w_down"], scales[1], to.down, inputs=inputs, at=to.aligned)
        sum_experts(p, to.down, ids, outputs["out"])

    return launch
