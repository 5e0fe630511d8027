"""Configurations of the CUDA C++ tiles that multiply experts (expert_mma.cuh): what fits, and which are worth trying."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product

from klab.kernels.contract import Chip, Config
from klab.kernels.dtypes import SIZE_BYTES


@dataclass(frozen=True)
class TileConfig(Config):
    """Tile of a block (elements), stages of the ring, the warps that share a tile, and blocks of rows walked together for the L2's sake."""

    block_m: int = 128
    block_n: int = 128
    block_k: int = 64
    stages: int = 3
    warps_m: int = 2
    warps_n: int = 2
    group_m: int = 8

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return self.warps_m * self.warps_n * 32

    @property
    def smem_bytes(self) -> int:
        """The ring, or the tile of the output that passes through the same memory."""
        return 2 * max(self.stages * (self.block_m + self.block_n) * self.block_k, self.block_m * self.block_n)

    @property
    def registers(self) -> int:
        """Per thread, estimated: the sums, two sets of fragments, two for each row of x to load, 45 for the rest."""
        warp_m, warp_n = self.block_m // self.warps_m, self.block_n // self.warps_n
        loads = self.block_m * self.block_k // 8 // self.threads
        return warp_m * warp_n // 32 + 2 * (warp_m // 4 + warp_n // 4) + 2 * loads + 45


def tile_fits(config: TileConfig, dtype: str, chip: Chip) -> str | None:
    """Why this config cannot run, or None. Odd sizes and strides run too, by a slower load."""
    c = config
    if SIZE_BYTES[dtype] != 2:
        return f"{dtype} has no tensor-core product of full precision"
    if chip.target < 80:
        return "needs compute capability 8.0"
    if min(c.block_m, c.block_n, c.warps_m, c.warps_n, c.group_m) < 1 or c.block_m % (16 * c.warps_m) or c.block_n % (16 * c.warps_n):
        return "a warp's tile is not a multiple of 16x16"
    if c.block_k not in (32, 64, 128) or c.block_n % 64 or c.threads % (c.block_k // 8) or c.threads > 1024:
        return "block_k is 32, 64 or 128, block_n a multiple of 64, and the threads a multiple of the 16-byte chunks of a row"
    if c.stages < 2:
        return "needs two stages"
    if c.smem_bytes > chip.smem_per_block_bytes:
        return f"{c.smem_bytes} B of shared memory, {chip.smem_per_block_bytes} allowed"
    if c.registers > min(255, 65536 // c.threads):
        return f"about {c.registers} registers, {min(255, 65536 // c.threads)} allowed"
    return None


def tile_default(rows: float, chip: Chip) -> TileConfig:
    """By the rows of a visited expert: flat tiles and a deep ring for few, 128x128 with two blocks per SM for many."""
    if rows <= 16:
        config = TileConfig(16, 128, 64, 4, 1, 4, 1)
    elif rows <= 96:
        config = TileConfig(32, 128, 64, 4, 1, 4, 1) if rows <= 32 else TileConfig(64, 128, 64, 4, 2, 2, 8)
    else:
        config = TileConfig()
    while config.stages > 2 and config.smem_bytes > chip.smem_per_block_bytes:
        config = replace(config, stages=config.stages - 1)
    return config


def tile_space(rows: float, n: int, k: int) -> Iterator[TileConfig]:
    """Tiles not much larger than what a visited expert has, every ring that fits, and warps of 16x16 to 64x64."""
    for block_m, block_n, block_k in product((16, 32, 64, 128, 256), (64, 128, 256), (32, 64, 128)):
        if (block_m > 16 and block_m >= 4 * rows) or 16 * block_m <= rows or block_n >= 2 * max(n, 64) or block_k >= 2 * max(k, 32):
            continue
        for stages, (warps_m, warps_n) in product((2, 3, 4, 5, 6), ((1, 2), (2, 1), (1, 4), (2, 2), (4, 1), (2, 4), (4, 2))):
            if stages <= max(2, -(-k // block_k)):
                for group_m in (1, 8, 16):
                    yield TileConfig(block_m, block_n, block_k, stages, warps_m, warps_n, group_m)
