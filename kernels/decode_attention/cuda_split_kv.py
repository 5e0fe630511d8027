"""Flash-decoding in CUDA C++: split keys, paged cache, the query heads of a group packed as rows of tensor-core tiles.

Splitting the keys over blocks and merging by their maxima and sums is the scheme of Flash-Decoding (Dao and others, 2023). The device
code is in split_attention.cuh.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache

import cupy  # noqa: F401  absent CuPy makes this file "unavailable" when it is found, not when it is launched
import torch

from klab.kernels.contract import Chip, Config, Launch, Tensors, kernel
from klab.kernels.cuda_module import ELEMENT, CudaKernel
from klab.kernels.decode_attention.problem import DecodeAttention
from klab.kernels.dtypes import SIZE_BYTES
from klab.kernels.mma_attention import MAX_GRID_YZ, REGISTERS_PER_SM, REGISTERS_PER_THREAD, over_budget, refusal, row_bytes, row_strides
from klab.kernels.split_rule import COMBINE_TILES, MERGE_TILES, OVERHEAD_TILES, choose_splits, tiles_per_split

COMBINE_THREADS = 128

COMBINE_SOURCE = '#include "split_pieces.cuh"\nusing namespace klab;'
SOURCE = '#include "split_attention.cuh"'


@dataclass(frozen=True)
class SplitConfig(Config):
    """Each of `warps` warps streams tiles of `block_n` keys through `stages` buffers of its own.

    A block takes 16 * `row_fragments` (query token, head) pairs of one key/value head; where there are more, further blocks read the
    same keys again. `num_splits` pieces for the longest sequence: 0 lets `choose_splits` decide for the chip.
    """

    block_n: int = 16
    warps: int = 4
    stages: int = 3
    row_fragments: int = 1
    num_splits: int = 0


def smem_bytes(problem: DecodeAttention, config: SplitConfig) -> int:
    """Shared memory of a block: queries and every warp's tiles, rows padded to 128 bytes; at the end it holds the warps' float sums."""
    rows, size = 16 * config.row_fragments, SIZE_BYTES[problem.cache_dtype]
    k_row, v_row = row_bytes(problem.head_dim, size), row_bytes(problem.dim_v, size)
    tiles = rows * row_bytes(problem.head_dim) + config.warps * config.stages * config.block_n * (k_row + v_row)
    tiles += 4 * rows if problem.kv_dtype else 0  # the power of two of each query
    return max(tiles, config.warps * rows * 4 * (2 + problem.dim_v + 8))


def key_bytes(problem: DecodeAttention) -> int:
    """Bytes of one key and its value on one head."""
    return SIZE_BYTES[problem.cache_dtype] * (problem.head_dim + problem.dim_v)


def registers(problem: DecodeAttention, config: SplitConfig) -> int:
    """Estimated 32-bit registers of a thread: output sums, scores, one fragment of queries, and 72 for addresses, pages and operands.

    A 16 x n tile of float sums spreads over 32 lanes as n / 2 registers. The packed weights reuse the scores' registers.
    """
    return config.row_fragments * (problem.dim_v // 2 + config.block_n // 2 + 8) + 72


def blocks_per_sm(problem: DecodeAttention, config: SplitConfig, chip: Chip) -> int:
    """Blocks of an SM that bring more bandwidth: as many as fit, by shared memory (1 KiB of each is the system's) and registers.

    But not more than keep 128 KiB on their way, of which 36 KiB (4.8 TB/s over 132 SMs for 1 us) are needed.
    """
    by_smem = chip.smem_per_sm_bytes // (smem_bytes(problem, config) + 1024)
    by_registers = REGISTERS_PER_SM // (32 * config.warps * min(registers(problem, config), REGISTERS_PER_THREAD))
    waiting = config.warps * max(1, config.stages - 1) * config.block_n * key_bytes(problem)
    return max(1, min(by_smem, by_registers, -(-(128 << 10) // waiting)))


def row_tiles(problem: DecodeAttention, config: SplitConfig) -> int:
    """Blocks that share one key/value head of one sequence because its queries do not fit one block."""
    return -(-problem.q_len * (problem.heads // problem.kv_heads) // (16 * config.row_fragments))


@lru_cache(maxsize=4096)
def pieces(problem: DecodeAttention, config: SplitConfig, chip: Chip) -> tuple[int, int]:
    """(tiles of a piece, pieces of the longest sequence); a tile is `warps * block_n` keys that some query sees."""
    tile = config.warps * config.block_n
    visible = [min(n, problem.window + problem.q_len - 1) if problem.window else n for n in problem.kv_lens]
    tiles = [-(-n // tile) for n in visible]
    splits = config.num_splits
    if not splits:
        programs = problem.batch * problem.kv_heads * row_tiles(problem, config)
        unit = 32768 / (tile * key_bytes(problem))  # the rule's constants are for tiles of 32 KiB
        splits = choose_splits(
            tiles,
            programs,
            chip.sm_count * blocks_per_sm(problem, config, chip),
            overhead_tiles=OVERHEAD_TILES * unit,
            merge_tiles=MERGE_TILES * unit,
            combine_tiles=COMBINE_TILES * unit,
        )
    piece = tiles_per_split(max(tiles), splits)
    return piece, -(-max(tiles) // piece)


def fits(problem: DecodeAttention, config: SplitConfig, chip: Chip) -> str | None:
    """None when it can run; otherwise the reason in a few words."""
    refused = refusal(problem, chip, multiple=32 if problem.kv_dtype else 16)
    if refused:
        return refused
    if problem.kv_dtype and chip.compute_capability < (8, 9):
        return f"needs conversions of fp8 (compute capability 8.9), {chip.name} has {chip.compute_capability}"
    if config.block_n not in (16, 32, 64) or not 1 <= config.warps <= 16 or not 1 <= config.stages <= 8 or config.num_splits < 0:
        return "block_n is 16, 32 or 64, warps 1 to 16, stages 1 to 8, num_splits 0 or more"
    if not 1 <= config.row_fragments <= max(1, -(-problem.q_len * (problem.heads // problem.kv_heads) // 16)):
        return f"row_fragments={config.row_fragments} is more than the queries of a key/value head fill"
    if problem.batch > MAX_GRID_YZ or config.num_splits > MAX_GRID_YZ:
        return f"a grid has at most {MAX_GRID_YZ} sequences and splits"
    if config.num_splits and pieces(problem, config, chip)[1] != config.num_splits:
        return f"the longest sequence cannot be cut into {config.num_splits} even pieces of {config.warps * config.block_n} keys and more"
    return over_budget(smem_bytes(problem, config), registers(problem, config), config.warps, chip)


def space(problem: DecodeAttention, chip: Chip) -> Iterator[SplitConfig]:
    """Every combination that may be worth a measurement; invalid ones are dropped by `fits`."""
    splits = (0, 1, 2, 4, 8, 16, 32, 64, 128)
    for num_splits, fragments, warps, block_n, stages in itertools.product(splits, (1, 2), (4, 2, 8, 1), (16, 32, 64), (3, 2, 4, 1)):
        config = SplitConfig(block_n, warps, stages, fragments, num_splits)
        if not num_splits or pieces(problem, replace(config, num_splits=0), chip)[1] != num_splits:  # else it is the rule's choice
            yield config


def default(problem: DecodeAttention, chip: Chip) -> SplitConfig:
    """16 keys of 128 columns, or as many bytes, per warp and stage: 4 warps x 3 stages x 2 blocks keep 128 KiB per SM in flight.

    4.8 TB/s over 132 SMs for about a microsecond of latency need 36 KiB. Two fragments where a group has more than 16 rows.
    """
    fragments = 2 if problem.q_len * (problem.heads // problem.kv_heads) > 16 and problem.dim_v <= 128 else 1
    both = key_bytes(problem)
    return SplitConfig(block_n=32 if both <= 256 else 16, stages=3 if both <= 512 else 2, row_fragments=fragments)


@kernel(DecodeAttention, backend="cuda", config=SplitConfig, space=space, default=default, fits=fits)
def cuda_split_kv(problem: DecodeAttention, config: SplitConfig, chip: Chip) -> Launch:
    """Flash-decoding in CUDA C++ (mma.sync, cp.async): split keys over a paged cache, GQA packed into tensor-core rows."""
    shared: dict[str, str | int] = {
        "ELEMENT": ELEMENT[problem.dtype],
        "HEAD_DIM_V": problem.dim_v,
        "TILE": config.warps * config.block_n,
        "WINDOWED": int(problem.window > 0),
        "SINKS": int(problem.sinks),
    }
    defines: dict[str, str | int] = shared | {
        "HEAD_DIM": problem.head_dim,
        "PAGE_SIZE": problem.page_size,
        "BLOCK_N": config.block_n,
        "WARPS": config.warps,
        "STAGES": config.stages,
        "ROW_FRAGMENTS": config.row_fragments,
        "MIN_BLOCKS": blocks_per_sm(problem, config, chip),
        "NARROW": int(bool(problem.kv_dtype)),
        "CAPPED": int(problem.softcap > 0),
    }
    split = CudaKernel(SOURCE, "split_attention", chip, defines, smem_bytes(problem, config))
    columns_bytes = COMBINE_THREADS // (problem.dim_v // 4) * (problem.dim_v + 2) * 4
    combine = CudaKernel(COMBINE_SOURCE, "combine_pieces", chip, shared | {"COMBINE_THREADS": COMBINE_THREADS}, columns_bytes)
    tiles_per_piece, max_pieces = pieces(problem, config, chip)
    group, rows = problem.heads // problem.kv_heads, problem.batch * problem.q_len * problem.heads
    scale_log2 = problem.scale * math.log2(math.e)
    workspaces: dict[torch.device, tuple[torch.Tensor, torch.Tensor]] = {}

    def workspace(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        if device not in workspaces:
            entries = rows * max_pieces if max_pieces > 1 else 1  # one piece goes straight to the output
            sums, stats = (torch.empty((entries, width), dtype=torch.float32, device=device) for width in (problem.dim_v, 2))
            workspaces[device] = sums, stats
        return workspaces[device]

    def launch(inputs: Tensors, outputs: Tensors) -> None:
        q, k, v, table, kv_lens, out = *(inputs[n] for n in ("q", "k_cache", "v_cache", "block_table", "kv_lens")), outputs["out"]
        sums, stats = workspace(q.device)
        if problem.kv_dtype:
            k, v = k.view(torch.uint8), v.view(torch.uint8)
        k_scale, v_scale, sinks = (inputs.get(name, stats) for name in ("k_scale", "v_scale", "sinks"))
        strides = [s for name, tensor in zip("qkv", (q, k, v), strict=True) for s in row_strides("cuda_split_kv", name, tensor)]
        shape = [problem.q_len, problem.kv_heads, group, table.stride(0), *strides, problem.window, tiles_per_piece, max_pieces]
        numbers = [scale_log2, float(problem.softcap)]
        grid = (problem.kv_heads * row_tiles(problem, config), max_pieces, problem.batch)
        split.launch(grid, 32 * config.warps, [q, k, v, k_scale, v_scale, sinks, table, kv_lens, out, sums, stats, *shape, *numbers])
        if max_pieces > 1:
            shape = [problem.q_len * problem.heads, problem.q_len, problem.window, tiles_per_piece, max_pieces]
            combine.launch((rows, 1, 1), COMBINE_THREADS, [sums, stats, sinks, kv_lens, out, *shape])

    return launch
