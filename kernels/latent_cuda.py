"""Configurations, limits and the launch of the CUDA C++ kernels on `latent.cuh`."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING

from klab.kernels.contract import Chip, Config, Launch, Tensors
from klab.kernels.cuda_module import ELEMENT, CudaKernel, Int64
from klab.kernels.latent_tiles import LatentShape, choose, per_split, split_counts, unfit_splits
from klab.kernels.mma_attention import MAX_GRID_YZ, REGISTERS_PER_SM, over_budget, row_bytes, row_strides
from klab.kernels.triton_support import KIB, cdiv, next_power_of_2

if TYPE_CHECKING:
    import torch

SOURCE = '#include "latent.cuh"\nusing namespace klab;'


@dataclass(frozen=True)
class MmaLatentConfig(Config):
    """A block takes 16 * `row_fragments` query rows and tiles of `block_n` keys in `stages` buffers; `warps` share the output's columns.

    `num_splits` pieces for the longest sequence: 0 lets `choose_splits` decide for the chip.
    """

    row_fragments: int = 1
    block_n: int = 32
    warps: int = 4
    stages: int = 3
    num_splits: int = 0


def smem_bytes(shape: LatentShape, config: MmaLatentConfig) -> int:
    """Shared memory of a block, as `latent.cuh` lays it out: queries, tiles, weights, places of rows, maxima and factors."""
    rows, keys = 16 * config.row_fragments, config.block_n
    places = (config.stages + 1) * keys * 8
    return (
        (rows + config.stages * keys) * row_bytes(shape.dim)
        + rows * row_bytes(keys)
        + places
        + (min(config.warps, keys // 16) + 1) * rows * 4
    )


def registers(shape: LatentShape, config: MmaLatentConfig) -> int:
    """Estimated 32-bit registers of a thread: output sums, scores, a fragment of weights for each row tile, and 60 for addresses."""
    sums = 16 * config.row_fragments * shape.rank // (32 * config.warps)
    scores = 16 * config.row_fragments * config.block_n // (32 * config.warps)
    return sums + scores + 4 * config.row_fragments + 60


def splits_of(shape: LatentShape, config: MmaLatentConfig, chip: Chip) -> int:
    """Pieces of the longest sequence: as configured, or by the split rule."""
    if config.num_splits:
        return config.num_splits
    by_registers = REGISTERS_PER_SM // (32 * config.warps * min(255, registers(shape, config)))
    fitting = min(chip.smem_per_sm_bytes // (smem_bytes(shape, config) + KIB), by_registers)
    return choose(shape, chip, block_m=16 * config.row_fragments, block_n=config.block_n, programs_per_sm=fitting)


def fits(shape: LatentShape, config: MmaLatentConfig, chip: Chip) -> str | None:
    """None when it can run; otherwise the reason in a few words."""
    fragments, keys, warps = config.row_fragments, config.block_n, config.warps
    if shape.dtype not in ("float16", "bfloat16") or shape.narrow:
        return f"tensor cores multiply fp16 and bf16 here, not {'an fp8 cache' if shape.narrow else shape.dtype}"
    if chip.compute_capability < (8, 0):
        return f"needs cp.async and bf16 tensor cores (compute capability 8.0), {chip.name} has {chip.compute_capability}"
    if shape.rank % 128 or shape.rank > 1024 or shape.rope % 64:
        return f"kv_lora_rank is a multiple of 128 up to 1024 and rope_dim one of 64, not {shape.rank} and {shape.rope}"
    if fragments not in (1, 2, 4) or keys not in (16, 32, 64, 128) or warps not in (1, 2, 4, 8, 16) or not 1 <= config.stages <= 6:
        return "row_fragments is 1, 2 or 4, block_n 16 to 128, warps 1 to 16, stages 1 to 6"
    if 16 * fragments > max(16, next_power_of_2(shape.rows)):
        return f"row_fragments={fragments} is more than the queries fill"
    if fragments % (warps // min(warps, keys // 16)) or shape.rank % (16 * warps) or keys > 32 * warps:
        return "the warps cannot share rows, keys and columns evenly"
    chosen = splits_of(shape, config, chip)
    if chosen > MAX_GRID_YZ:
        return f"a grid has at most {MAX_GRID_YZ} splits"
    uneven = unfit_splits(shape, chip, block_n=keys, num_splits=config.num_splits, chosen=chosen)
    return uneven or over_budget(smem_bytes(shape, config), registers(shape, config), warps, chip)


def default(shape: LatentShape, chip: Chip) -> MmaLatentConfig:
    """Up to 64 rows, whose scores and sums 8 warps share; two tiles under way beside the one that is read, where there is room."""
    fragments = max(1, min(4, next_power_of_2(cdiv(shape.rows, 16))))
    if fragments == 1:
        keys = 64 if max(shape.lengths) > 32 else 16 if max(shape.lengths) <= 16 else 32
        return MmaLatentConfig(1, keys, warps=keys // 16, stages=2) if shape.rank <= 512 else MmaLatentConfig(1, 128, warps=8, stages=1)
    keys = 64 if max(shape.lengths) > 32 else 32 if max(shape.lengths) > 16 else 16
    return MmaLatentConfig(fragments, keys, warps=min(8, fragments * keys // 16), stages=2)


def space(shape: LatentShape, chip: Chip) -> Iterator[MmaLatentConfig]:
    """Every combination that may be worth a measurement; invalid ones are dropped by `fits`."""
    for fragments, warps, keys, stages in product((1, 2, 4), (4, 8, 2, 16), (32, 64, 16, 128), (2, 3, 1, 4)):
        rule = MmaLatentConfig(fragments, keys, warps, stages)
        if fits(shape, rule, chip) is None:
            for splits in split_counts(splits_of(shape, rule, chip)):
                yield MmaLatentConfig(fragments, keys, warps, stages, splits)


def mma_launch(name: str, shape: LatentShape, config: MmaLatentConfig, chip: Chip) -> Launch:
    """The launch of `latent.cuh`'s kernels. inputs: q, kv_cache, and block_table with kv_lens, or indices."""
    import torch

    splits = splits_of(shape, config, chip)
    tiles_per_piece = per_split(shape, config.block_n, splits)
    defines: dict[str, str | int] = {
        "ELEMENT": ELEMENT[shape.dtype],
        "RANK": shape.rank,
        "ROPE": shape.rope,
        "PAGE_SIZE": shape.page_size,
        "LISTED": shape.lengths[0] if shape.listed else 0,
        "ROW_FRAGMENTS": config.row_fragments,
        "BLOCK_N": config.block_n,
        "WARPS": config.warps,
        "STAGES": config.stages,
    }
    read = CudaKernel(SOURCE, "read_latents", chip, defines, smem_bytes(shape, config))
    merge = CudaKernel(SOURCE, "merge_latents", chip, defines)
    row_tiles, rows = cdiv(shape.rows, 16 * config.row_fragments), shape.sequences * shape.rows
    scale_log2 = shape.scale * math.log2(math.e)
    workspaces: dict[torch.device, tuple[torch.Tensor, torch.Tensor]] = {}

    def workspace(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        if device not in workspaces:
            entries = rows * splits if splits > 1 else 1  # one piece goes straight to the output
            sums, stats = (torch.empty((entries, width), dtype=torch.float32, device=device) for width in (shape.rank, 2))
            workspaces[device] = sums, stats
        return workspaces[device]

    def launch(inputs: Tensors, outputs: Tensors) -> None:
        q, cache, out = inputs["q"], inputs["kv_cache"], outputs["out"]
        slots = inputs["indices"] if shape.listed else inputs["block_table"]
        lens = slots if shape.listed else inputs["kv_lens"]
        sums, stats = workspace(q.device)
        q_batch, *q_inner = row_strides(name, "q", q)
        q_token, q_head = q_inner if len(q_inner) == 2 else (0, q_inner[0])
        page, row = row_strides(name, "kv_cache", cache)
        strides = [q_batch, q_token, q_head, Int64(page), row, slots.stride(0)]
        numbers = [shape.heads, shape.q_len, row_tiles, *strides, tiles_per_piece, splits, scale_log2]
        read.launch((shape.sequences * row_tiles, splits, 1), 32 * config.warps, [q, cache, slots, lens, out, sums, stats, *numbers])
        if splits > 1:
            merge.launch((rows, 1, 1), shape.rank // 4, [sums, stats, lens, out, shape.rows, tiles_per_piece, splits])

    return launch
