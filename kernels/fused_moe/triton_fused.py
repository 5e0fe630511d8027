"""A fused MoE in Triton whose first product ends in the activation, so that gate and up never reach memory; weights come by TMA."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product

import torch

from klab.kernels.contract import Chip, Config, Launch, Tensors, kernel
from klab.kernels.dtypes import SIZE_BYTES, torch_dtype
from klab.kernels.expert_routing import experts_hit, most_blocks
from klab.kernels.fused_moe._triton_products import down_product, gate_up_product
from klab.kernels.fused_moe.problem import BLOCK, FusedMoe
from klab.kernels.triton_align import Aligned, align, workspace
from klab.kernels.triton_experts import quantize_rows, sum_experts
from klab.kernels.triton_support import cdiv, ensure_allocator, pipeline_smem_bytes, row_is_aligned

# As in a plain matmul, 128 float32 sums per thread leave room for pointers; fp8 blocks keep a step's sums beside the scaled ones.
MAX_SUMS_PER_THREAD = {"": 128, "fp8_block": 64}


@dataclass(frozen=True)
class FusedConfig(Config):
    """Gate and up: block_m rows of one expert by block_n activated columns (twice as many of weights), block_k at a time.

    Down: block_m rows by down_n columns, down_k at a time. group_m blocks of rows are walked column by column. tma: weights and activated
    rows come by tensor descriptors; rows of x are gathered by pointers.
    """

    block_m: int = 128
    block_n: int = 128
    block_k: int = 64
    down_n: int = 256
    down_k: int = 64
    group_m: int = 16
    num_warps: int = 8
    num_stages: int = 3
    tma: bool = True


def fits(problem: FusedMoe, config: FusedConfig, chip: Chip) -> str | None:
    """Tiles are powers of two; both products' stages fit shared memory and their sums registers; TMA needs aligned rows."""
    c, size = config, _operand_bytes(problem)
    tiles = (c.block_m, c.block_n, c.block_k, c.down_n, c.down_k)
    if any(value < 1 or value & (value - 1) for value in (*tiles, c.num_warps)):
        return "tiles and warps must be powers of two"
    if min(tiles) < 16 or min(c.block_k, c.down_k) < (32 if problem.format else 16) or max(tiles) > 256:
        return "tiles go from 16 (fp8: 32 along k) to 256"
    if problem.format and (c.block_n != BLOCK or max(c.block_k, c.down_k) > BLOCK or chip.target < 89):
        return "with fp8 blocks a tile has 128 columns to quantise, 128 along k at most, and the chip compute capability 8.9"
    if min(c.group_m, c.num_stages) < 1:
        return "group_m and num_stages must be at least 1"
    fp32 = problem.dtype == "float32" and not problem.format
    if c.tma and (chip.target < 90 or fp32 or not all(row_is_aligned(k, size) for k in (problem.hidden, problem.intermediate))):
        return "tensor descriptors need Hopper, 8 or 16 bits and rows in multiples of 16 bytes"
    if problem.local * problem.up_rows >= 2**31 or max(problem.hidden, problem.intermediate) * max(tiles) >= 2**31:
        return "too large for 32-bit offsets within a tile"
    threads, halves = 32 * c.num_warps, 2 if problem.gated else 1
    if c.num_warps > 16 or any((c.block_m // 16) * (n // 8) < c.num_warps for n in (c.block_n, c.down_n)):
        return "too many warps for the tile"
    if max(halves * c.block_n, c.down_n) * c.block_m // threads > (64 if fp32 else MAX_SUMS_PER_THREAD[problem.format]):
        return "the sums would spill registers"
    stage = max((c.block_m + halves * c.block_n) * c.block_k, (c.block_m + c.down_n) * c.down_k)
    if pipeline_smem_bytes(stage * size, c.num_stages) > chip.smem_per_block_bytes:
        return "too much shared memory"
    return None


def _operand_bytes(problem: FusedMoe) -> int:
    return SIZE_BYTES["float8_e4m3fn" if problem.format else problem.dtype]


def rows_per_expert(problem: FusedMoe) -> float:
    """Expected rows of a visited expert."""
    hit = experts_hit(problem.tokens, problem.experts, problem.top_k, problem.skew, problem.local)
    return problem.visits / hit if hit else 1.0


def default(problem: FusedMoe, chip: Chip) -> FusedConfig:
    """Rows by how many a visited expert has; large tiles for prefills, thin ones with deep pipelines where it waits for memory."""
    rows, size = rows_per_expert(problem), _operand_bytes(problem)
    bm = 16 if rows <= 16 else 32 if rows <= 32 else 64 if rows <= 96 else 128
    aligned = all(row_is_aligned(k, size) for k in (problem.hidden, problem.intermediate))
    if problem.dtype == "float32" and not problem.format:
        return FusedConfig(min(bm, 32), 32, 32, 32, 32, 1, 4, 2, False)
    if problem.format:
        # 4 warps of 16 rows hold 16x256 sums twice, and fragments of 128x256 weights: 168 registers and a spill, 98 with 8.
        config = FusedConfig(min(bm, 64), 128, 128, 128, 128, 16, 8, 4)
    elif bm == 128:
        # Triton learns alignment only of sizes that 16 divides: 128 columns of 360 are stored one by one, and spill 528 bytes.
        config = FusedConfig(block_n=128 if problem.intermediate % 16 == 0 else 64)
    else:
        config = FusedConfig(bm, 64 if bm == 64 else 32, 128, 128 if bm == 64 else 64, 128, 16 if bm == 64 else 1, 4, 4)
    if not aligned:
        # Rows that start anywhere are loaded element by element: small tiles keep their pointers in registers.
        n, k = (BLOCK, 64) if problem.format else (32, 32)
        config = FusedConfig(min(bm, 32), n, k, 32, k, 1, 8 if problem.format else 4, 2)
    config = replace(config, tma=aligned and chip.target >= 90)
    while config.num_stages > 2 and fits(problem, config, chip) == "too much shared memory":
        config = replace(config, num_stages=config.num_stages - 1)
    return config


def space(problem: FusedMoe, chip: Chip) -> Iterator[FusedConfig]:
    """All tiles that are not hopeless for the shape, by TMA and by pointers."""
    rows = rows_per_expert(problem)
    blocks_k = (64, 128) if problem.format else (32, 64, 128)
    for bm, bn, bk in product((16, 32, 64, 128), (BLOCK,) if problem.format else (32, 64, 128), blocks_k):
        if (bm > 16 and bm >= 4 * rows) or 16 * bm <= rows or bn >= 2 * max(problem.intermediate, 32) or bk >= 2 * problem.hidden:
            continue  # most rows are padding, or the weights are read from L2 too often; beyond the problem's edges
        blocks = most_blocks(problem.tokens * problem.top_k, problem.local, bm)
        for down_n, down_k, tma in product((64, 128, 256), blocks_k, (True, False)):
            if down_n >= 2 * max(problem.hidden, 64) or down_k >= 2 * max(problem.intermediate, 32):
                continue
            for group, warps, stages in product((1, 8, 16), (4, 8), (2, 3, 4, 5)):
                if (group > 1 and group // 2 >= blocks) or bm * bn < 128 * warps or stages - 1 > cdiv(problem.hidden, bk):
                    continue  # the same order as fewer; idle warps, idle stages
                yield FusedConfig(bm, bn, bk, down_n, down_k, group, warps, stages, tma)


@dataclass(frozen=True)
class _Workspace:
    """Per device: the sorted choices and what one step leaves for the next."""

    aligned: Aligned
    x: torch.Tensor
    x_scale: torch.Tensor
    active: torch.Tensor
    active_scale: torch.Tensor
    down: torch.Tensor


def _workspace(problem: FusedMoe, block_m: int, device: torch.device) -> _Workspace:
    p, choices = problem, problem.tokens * problem.top_k
    slots, scaled = most_blocks(choices, p.local, block_m) * block_m, bool(p.format)
    operand = torch.float8_e4m3fn if scaled else torch_dtype(p.dtype)

    def empty(rows: int, columns: int, of: torch.dtype) -> torch.Tensor:
        return torch.empty((rows, columns), dtype=of, device=device)

    return _Workspace(
        aligned=workspace(choices, p.local, block_m, device),
        x=empty(p.tokens if scaled else 1, p.hidden, operand),
        x_scale=empty(p.tokens if scaled else 1, cdiv(p.hidden, BLOCK), torch.float32),
        # Rows at multiples of 16 elements, which is what Triton needs to know to store more than one at a time.
        active=empty(slots, cdiv(p.intermediate, 16) * 16, operand)[:, : p.intermediate],
        active_scale=empty(slots if scaled else 1, cdiv(p.intermediate, BLOCK), torch.float32),
        down=empty(choices, p.hidden, torch_dtype(p.dtype)),
    )


def _for_tma(tensor: torch.Tensor) -> bool:
    """Whether its rows start at multiples of 16 bytes and its matrices follow each other. Others go by pointers."""
    rows = tensor.stride(-2) * tensor.element_size() % 16 == 0 and tensor.data_ptr() % 16 == 0
    return rows and tensor.stride(0) == tensor.shape[1] * tensor.stride(1)


@kernel(FusedMoe, backend="triton", config=FusedConfig, space=space, default=default, fits=fits)
def triton_fused(problem: FusedMoe, config: FusedConfig, chip: Chip) -> Launch:
    """Triton, 4 launches (fp8: 5): sort, gate and up with the activation (and its quantisation) in the epilogue, down, sum."""
    p, c = problem, config
    workspaces: dict[torch.device, _Workspace] = {}
    choices = p.tokens * p.top_k
    blocks_m = most_blocks(choices, p.local, c.block_m)
    scale_block = BLOCK if p.format else 0

    def launch(inputs: Tensors, outputs: Tensors) -> None:
        x, ids, gate_up, down = inputs["x"], inputs["topk_ids"], inputs["w_gate_up"], inputs["w_down"]
        if x.device not in workspaces:
            workspaces[x.device] = _workspace(p, c.block_m, x.device)
        to = workspaces[x.device]
        at, weights = to.aligned, inputs["topk_weights"]
        tma = c.tma and _for_tma(gate_up) and _for_tma(down)
        if tma:
            ensure_allocator(x.device)
        align(ids, p.local, c.block_m, at)
        if p.format:
            quantize_rows(x, to.x, to.x_scale)
            x = to.x
        up_scale, down_scale = (inputs["w_gate_up_scale"], inputs["w_down_scale"]) if p.format else (gate_up, down)
        gate_up_product[(blocks_m * cdiv(p.intermediate, c.block_n),)](
            x,
            to.x_scale,
            gate_up,
            up_scale,
            to.active,
            to.active_scale,
            at.slots,
            at.block_experts,
            at.padded,
            p.intermediate,
            p.hidden,
            choices,
            x.stride(0),
            to.x_scale.stride(0),
            *gate_up.stride()[:2],
            *up_scale.stride()[:2],
            to.active.stride(0),
            to.active_scale.stride(0),
            TOP_K=p.top_k,
            LOCAL=p.local,
            GATED=p.gated,
            LIMIT=p.swiglu_limit,
            SCALE_BLOCK=scale_block,
            WHOLE_BLOCKS=p.intermediate % BLOCK == 0,
            EVEN_N=p.intermediate % c.block_n == 0,
            EVEN_K=p.hidden % c.block_k == 0,
            BLOCK_M=c.block_m,
            BLOCK_N=c.block_n,
            BLOCK_K=c.block_k,
            GROUP_M=c.group_m,
            TMA=tma,
            num_warps=c.num_warps,
            num_stages=c.num_stages,
        )
        down_product[(blocks_m * cdiv(p.hidden, c.down_n),)](
            to.active,
            to.active_scale,
            down,
            down_scale,
            to.down,
            weights,
            at.slots,
            at.block_experts,
            at.padded,
            p.hidden,
            p.intermediate,
            blocks_m,
            choices,
            to.active.stride(0),
            to.active_scale.stride(0),
            *down.stride()[:2],
            *down_scale.stride()[:2],
            to.down.stride(0),
            weights.stride(0),
            TOP_K=p.top_k,
            LOCAL=p.local,
            SCALE_BLOCK=scale_block,
            EVEN_N=p.hidden % c.down_n == 0,
            EVEN_K=p.intermediate % c.down_k == 0,
            BLOCK_M=c.block_m,
            BLOCK_N=c.down_n,
            BLOCK_K=c.down_k,
            GROUP_M=c.group_m,
            TMA=tma,
            num_warps=c.num_warps,
            num_stages=c.num_stages,
        )
        sum_experts(p, to.down, ids, outputs["out"])

    return launch
