"""A CPU kernel that unpacks a few rows of weights at a time, so that the unpacked ones never leave the cache."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

import torch

from klab.kernels.contract import Chip, Config, Launch, Tensors, kernel
from klab.kernels.dtypes import SIZE_BYTES, torch_dtype
from klab.kernels.weight_only_matmul._scratch import Scratch, dequantize_rows
from klab.kernels.weight_only_matmul.problem import WeightOnlyMatmul

# What a CPU that does not tell its cache has at least.
LEAST_CACHE_BYTES = 4 << 20


@dataclass(frozen=True)
class BlockedConfig(Config):
    """Rows of weights unpacked together, and the dtype they are unpacked to: that of the problem ("native") or "float32"."""

    block_n: int = 256
    compute: str = "native"

    def wide_dtype(self, problem: WeightOnlyMatmul) -> str:
        """The name of the dtype that is multiplied."""
        return problem.dtype if self.compute == "native" else "float32"


def fits(problem: WeightOnlyMatmul, config: BlockedConfig, chip: Chip) -> str | None:
    """The unpacked block stays in the last-level cache, unless it is as small as 16 rows."""
    if config.compute not in ("native", "float32"):
        return "compute is native or float32"
    if config.compute == "float32" and problem.dtype == "float32":
        return "float32 is native already"
    if config.block_n < 1:
        return "block_n must be at least 1"
    unpacked = config.block_n * problem.k * SIZE_BYTES[config.wide_dtype(problem)]
    if unpacked > max(chip.l2_bytes, LEAST_CACHE_BYTES) and config.block_n > 16:
        return "the unpacked block of weights does not fit the cache"
    return None


def default(problem: WeightOnlyMatmul, chip: Chip) -> BlockedConfig:
    """Blocks of about 2 MiB; float16 is multiplied in float32, since few CPUs multiply it."""
    compute = "float32" if problem.dtype == "float16" else "native"
    row_bytes = problem.k * SIZE_BYTES[BlockedConfig(1, compute).wide_dtype(problem)]
    block_n = 16
    while block_n < 512 and 2 * block_n * row_bytes <= 2 << 20:
        block_n *= 2
    return BlockedConfig(block_n, compute)


def space(problem: WeightOnlyMatmul, chip: Chip) -> Iterator[BlockedConfig]:
    """Blocks of 16 to 2048 rows in both precisions."""
    for block_n, compute in product((16, 32, 64, 128, 256, 512, 1024, 2048), ("native", "float32")):
        if block_n < 2 * max(problem.n, 16):
            yield BlockedConfig(block_n, compute)


@kernel(WeightOnlyMatmul, backend="cpu", config=BlockedConfig, space=space, default=default, fits=fits)
def cpu_blocked(problem: WeightOnlyMatmul, config: BlockedConfig, chip: Chip) -> Launch:
    """Unpacks cache-sized blocks of rows with torch's operators and multiplies each by BLAS."""
    m, n, block_n = problem.m, problem.n, config.block_n
    dtype = torch_dtype(config.wide_dtype(problem))
    scratch, sums = Scratch(), Scratch()

    def launch(inputs: Tensors, outputs: Tensors) -> None:
        x, w, scale, out = (*(inputs[name] for name in ("x", "w", "scale")), outputs["out"])
        if x.dtype != dtype:
            x = sums.get("x", m, problem.k, like=x, dtype=dtype).copy_(x)
        for n0 in range(0, n, block_n):
            rows = slice(n0, min(n0 + block_n, n))
            block = dequantize_rows(problem, w[rows], scale[rows], scratch, dtype)
            if out.dtype == dtype:
                torch.mm(x, block.t(), out=out[:, rows])
            else:
                out[:, rows].copy_(torch.mm(x, block.t(), out=sums.get("out", m, block.shape[0], like=x, dtype=dtype)))

    return launch
