"""A CPU product that dequantises the weights block by block, while a block stays in the cache."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

import torch

from klab.kernels.contract import Chip, Config, Launch, Tensors, kernel
from klab.kernels.dtypes import torch_dtype
from klab.kernels.scaled_matmul.problem import BLOCK, ScaledMatmul
from klab.kernels.triton_support import cdiv

# What a CPU that does not tell its cache has at least.
LEAST_CACHE_BYTES = 4 << 20


@dataclass(frozen=True)
class BlockedConfig(Config):
    """Rows of w that are dequantised and multiplied at a time, in multiples of 128 (0: all); and what they are multiplied in."""

    block_n: int = 512
    compute: str = "float32"


def fits(problem: ScaledMatmul, config: BlockedConfig, chip: Chip) -> str | None:
    """Blocks of whole scales, smaller than the problem; bfloat16 where every dequantised value is one."""
    if config.compute not in ("float32", "bfloat16"):
        return "compute is float32 or bfloat16"
    # Powers of two times e4m3 or e2m1 have at most 4 significant bits of bfloat16's 8; float32 scales have 24.
    if config.compute == "bfloat16" and (problem.format not in ("mxfp8", "mxfp4") or problem.dtype != "bfloat16"):
        return "bfloat16 would round the dequantised values, or the sums"
    if config.block_n < 0 or config.block_n % BLOCK or config.block_n >= problem.n:
        return "block_n must be a multiple of 128 that is smaller than n, or 0 for all of it"
    return None


def default(problem: ScaledMatmul, chip: Chip) -> BlockedConfig:
    """Blocks of about a quarter of the cache, and at least 128 rows."""
    rows = max(chip.l2_bytes, LEAST_CACHE_BYTES) // (16 * problem.k) // BLOCK * BLOCK
    rows = max(BLOCK, min(rows, 2048))
    return BlockedConfig(rows if rows < problem.n else 0)


def space(problem: ScaledMatmul, chip: Chip) -> Iterator[BlockedConfig]:
    """From 128 rows to all of them."""
    for block_n, compute in product((0, 128, 256, 512, 1024, 2048, 4096), ("float32", "bfloat16")):
        yield BlockedConfig(block_n, compute)


@kernel(ScaledMatmul, backend="cpu", config=BlockedConfig, space=space, default=default, fits=fits)
def cpu_blocked(problem: ScaledMatmul, config: BlockedConfig, chip: Chip) -> Launch:
    """Emulated on torch's BLAS: x once, then blocks of w dequantised in the cache and multiplied at once."""
    n, block_n = problem.n, config.block_n or problem.n
    dtype = torch_dtype(config.compute)

    def block_of(inputs: Tensors, n0: int, n1: int) -> Tensors:
        """The weights' rows n0..n1 and their scales; n0 is a multiple of 128."""
        scale = inputs["w_scale"]
        if problem.format == "fp8_block":
            scale = scale[n0 // BLOCK : cdiv(n1, BLOCK)]
        elif problem.format != "fp8_tensor":
            scale = scale[n0:n1]
        return {**inputs, "w": inputs["w"][n0:n1], "w_scale": scale}

    def launch(inputs: Tensors, outputs: Tensors) -> None:
        x, out = problem.values(inputs, "x").to(dtype), outputs["out"]
        for n0 in range(0, n, block_n):
            n1 = min(n0 + block_n, n)
            w = problem.values(block_of(inputs, n0, n1), "w").to(dtype)
            out[:, n0:n1].copy_(torch.mm(x, w.t()))

    return launch
