"""What a kernel on `mma_tile.cuh` may choose, and which of it can run: shared by the operators that are a matrix product in disguise."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product

from klab.kernels.contract import Chip, Config
from klab.kernels.cuda_module import ELEMENT
from klab.kernels.dtypes import SIZE_BYTES

# Copies of 16 bytes that a thread issues per stage; their addresses are registers: with 72, one warp spills 160 words.
MAX_COPIES_PER_THREAD = 36


@dataclass(frozen=True)
class MmaTileConfig(Config):
    """Tile of a block (elements), stages of the ring, and the warps that share a tile."""

    block_m: int = 128
    block_n: int = 128
    block_k: int = 64
    stages: int = 3
    warps_m: int = 2
    warps_n: int = 2

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
        """Per thread, estimated: the sums, two sets of fragments, 50 for addresses."""
        warp_m, warp_n = self.block_m // self.warps_m, self.block_n // self.warps_n
        return warp_m * warp_n // 32 + 2 * (warp_m // 4 + warp_n // 4) + 50

    def defines(self, dtype: str) -> dict[str, str | int]:
        """What `mma_tile.cuh` asks for, but ALIGNED and ALIGNED_OUT."""
        return {
            "ELEMENT": ELEMENT[dtype], "BLOCK_M": self.block_m, "BLOCK_N": self.block_n, "BLOCK_K": self.block_k, "STAGES": self.stages,
            "WARPS_M": self.warps_m, "WARPS_N": self.warps_n,
        }  # fmt: skip


def unfit(dtype: str, config: MmaTileConfig, chip: Chip) -> str | None:
    """Why this config cannot run with operands of `dtype`, or None."""
    c = config
    if SIZE_BYTES[dtype] != 2:
        return f"{dtype} has no tensor-core product of full precision"
    if chip.target < 80:
        return "needs compute capability 8.0"
    if min(c.warps_m, c.warps_n) < 1 or c.threads > 1024 or c.block_m < 16 or c.block_m % (16 * c.warps_m) or c.block_n % (8 * c.warps_n):
        return "a warp's tile is not a multiple of 16x8"
    if c.block_k not in (32, 64, 128) or c.block_n not in (32, 64, 128, 256) or c.threads % (c.block_k // 8):
        return "block_k is 32, 64 or 128, block_n 32 to 256, and the threads a multiple of the 16-byte chunks of a row"
    if c.stages < 2:
        return "needs two stages"
    if c.smem_bytes > chip.smem_per_block_bytes:
        return f"{c.smem_bytes} B of shared memory, {chip.smem_per_block_bytes} allowed"
    if (c.block_m + c.block_n) * c.block_k // 8 > MAX_COPIES_PER_THREAD * c.threads:
        return "the addresses of one stage's copies would spill registers"
    if c.registers > min(255, 65536 // c.threads):
        return f"about {c.registers} registers, {min(255, 65536 // c.threads)} allowed"
    return None


def default_tile(m: int, n: int, k: int, chip: Chip) -> MmaTileConfig:
    """128x128x64 with three stages, so that two blocks share an SM; flatter for few rows, narrower for few columns."""
    config = MmaTileConfig()
    if m <= 64:
        rows = 16 if m <= 16 else 32 if m <= 32 else 64
        config = MmaTileConfig(block_m=rows, block_n=64, stages=4, warps_m=2 if rows == 64 else 1, warps_n=2 if rows == 64 else 4)
    if n <= 64 and config.block_n == 128:
        config = replace(config, block_n=64)
    while config.stages > 2 and (config.smem_bytes > chip.smem_per_block_bytes or config.stages > -(-k // config.block_k)):
        config = replace(config, stages=config.stages - 1)
    return config


def tiles(m: int, n: int, k: int) -> Iterator[MmaTileConfig]:
    """Tiles not much larger than the product, rings of up to six stages, and warps of 16x8 to 64x64."""
    for block_m, block_n, block_k in product((16, 32, 64, 128, 256), (32, 64, 128, 256), (32, 64, 128)):
        if block_m >= 2 * max(m, 16) or block_n >= 2 * max(n, 32) or block_k >= 2 * max(k, 32):
            continue
        for stages, (warps_m, warps_n) in product((2, 3, 4, 5, 6), ((1, 1), (1, 2), (2, 1), (1, 4), (2, 2), (4, 1), (2, 4), (4, 2))):
            if stages <= max(2, -(-k // block_k)) and block_m * block_n >= 512 * warps_m * warps_n:
                yield MmaTileConfig(block_m, block_n, block_k, stages, warps_m, warps_n)
