"""A CPU product that dequantises the weights block by block, while a block stays in the cache."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

import torch

from klab.kernels.contract import Chip, Config, Launch, Tensors, kernel
from klab.kernels.scaled_matmul.problem import BLOCK, MICRO, ScaledMatmul

# What a CPU that does not tell its cache has at least.
LEAST_CACHE_BYTES = 4 << 20


@dataclass(frozen=True)
class BlockedConfig(Config):
    """Rows of w that are dequantised and multiplied at a time, in multiples of 128 (0: all); and what a block is multiplied in."""

    block_n: int = 512
    compute: str = "float32"


def fits(problem: ScaledMatmul, config: BlockedConfig, chip: Chip) -> str | None:
    """Blocks of whole scales, smaller than the problem; bfloat16 where every dequantised value is one."""
    if config.compute not in ("float32", "bfloat16"):
        return "compute is float32 or bfloat16"
    if config.compute == "bfloat16" and not is_exact_in_bfloat16(problem):
        return f"{problem.format} into {problem.dtype}: bfloat16 would round the values, or the sums"
    if config.block_n < 0 or config.block_n % BLOCK or config.block_n >= problem.n:
        return "block_n must be a multiple of 128 that is smaller than n, or 0 for all of it"
    if config.block_n * problem.k * 4 > 4 * max(chip.l2_bytes, LEAST_CACHE_BYTES):
        return "a dequantised block is far larger than the cache"
    return None


def is_exact_in_bfloat16(problem: ScaledMatmul) -> bool:
    """Powers of two times e4m3 or e2m1 have at most 4 significant bits, e4m3 times e2m1 has 6: bfloat16 has 8."""
    return problem.format in MICRO and problem.dtype == "bfloat16"


def default(problem: ScaledMatmul, chip: Chip) -> BlockedConfig:
    """Blocks of about a quarter of the cache."""
    rows = max(chip.l2_bytes, LEAST_CACHE_BYTES) // (16 * problem.k) // BLOCK * BLOCK
    rows = max(BLOCK, min(rows, 2048))
    return BlockedConfig(block_n=rows if rows < problem.n else 0)


def space(problem: ScaledMatmul, chip: Chip) -> Iterator[BlockedConfig]:
    """From 128 rows to all of them."""
    for block_n, compute in product((0, 128, 256, 512, 1024, 2048, 4096), ("float32", "bfloat16")):
        yield BlockedConfig(block_n, compute)


@kernel(ScaledMatmul, backend="cpu", config=BlockedConfig, space=space, default=default, fits=fits)
def cpu_blocked(problem: ScaledMatmul, config: BlockedConfig, chip: Chip) -> Launch:
    """Emulated on torch's BLAS: x once, then blocks of w dequantised in the cache and multiplied at once."""
    n, block_n = problem.n, config.block_n or problem.n
    dtype = torch.float32 if config.compute == "float32" else torch.bfloat16
    block = {"w": problem.format == "fp8_block"}
    # A tensor's own scale comes last, where bfloat16 holds the values without it alone.
    last = problem.format == "nvfp4"

    def values(inputs: Tensors, name: str) -> torch.Tensor:
        given = {**inputs, f"{name}_global": torch.ones(1)} if last else inputs
        return problem.values(given, name).to(dtype)

    def rows(inputs: Tensors, n0: int, n1: int) -> Tensors:
        """The weights' rows n0..n1 with their scales; n0 is a multiple of 128."""
        scale = inputs["w_scale"]
        if problem.format != "fp8_tensor":
            scale = scale[n0 // BLOCK : -(-n1 // BLOCK)] if block["w"] else scale[n0:n1]
        return {"w": inputs["w"][n0:n1], "w_scale": scale}

    def launch(inputs: Tensors, outputs: Tensors) -> None:
        x, out = values(inputs, "x"), outputs["out"]
        whole = inputs["x_global"] * inputs["w_global"] if last else None
        for n0 in range(0, n, block_n):
            n1 = min(n0 + block_n, n)
            w = values(rows(inputs, n0, n1), "w")
            part = torch.mm(x, w.t()) if dtype == torch.float32 or whole is None else torch.mm(x.float(), w.float().t())
            out[:, n0:n1].copy_(part if whole is None else part * whole)

    return launch
