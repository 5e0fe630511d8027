"""A CPU matmul that feeds BLAS blocks which stay in the cache, in the orientation and precision that this BLAS is good at."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

import torch

from klab.kernels.contract import Chip, Config, Launch, Tensors, kernel
from klab.kernels.dtypes import SIZE_BYTES, torch_dtype
from klab.kernels.matmul.problem import Matmul

# What a CPU that does not tell its cache has at least.
LEAST_CACHE_BYTES = 4 << 20


@dataclass(frozen=True)
class BlockedConfig(Config):
    """Blocks of the three dimensions (0: all of it), and how a block is multiplied.

    order: "xw" multiplies x by the weights' block, "wx" the block by x transposed, which is another BLAS routine and packs other
    operands. compute: "native" in the problem's dtype, "float32" after converting each block of weights while it is in the cache.
    """

    block_m: int = 0
    block_n: int = 0
    block_k: int = 0
    order: str = "xw"
    compute: str = "native"


def fits(problem: Matmul, config: BlockedConfig, chip: Chip) -> str | None:
    """Blocks smaller than the problem, sums in float32, and converted blocks that stay in the last-level cache."""
    if config.order not in ("xw", "wx") or config.compute not in ("native", "float32"):
        return "order is xw or wx, compute is native or float32"
    for name, block, length in (("m", config.block_m, problem.m), ("n", config.block_n, problem.n), ("k", config.block_k, problem.k)):
        if block < 0 or block >= length:
            return f"block_{name} must be smaller than {name}, or 0 for all of it"
    narrow = problem.dtype != "float32"
    if config.compute == "float32" and not narrow:
        return "float32 is native already"
    if config.compute == "native" and narrow and config.block_k:
        return "sums over blocks of k would be rounded to 16 bits"
    if config.compute == "float32":
        block_bytes = (config.block_n or problem.n) * (config.block_k or problem.k) * SIZE_BYTES["float32"]
        if block_bytes > max(chip.l2_bytes, LEAST_CACHE_BYTES):
            return "the converted block of weights does not fit the cache"
    return None


def default(problem: Matmul, chip: Chip) -> BlockedConfig:
    """BLAS on 512 columns at a time; float16 is converted in blocks of at most 2 MiB, since few CPUs multiply it.

    On an EPYC with avx512_bf16, torch's float16 takes 127 ms for m = 128, n = k = 2048 where blocks in float32 take 31, and 76 ms
    against 3.4 for one row in layout nn; only for a few rows in layout nt is it as fast.
    """
    block_n = 512 if problem.n > 512 else 0
    if problem.dtype == "float16" and (problem.layout == "nn" or problem.m > 4):
        block_k = 256 if problem.layout == "nn" else 1024
        block_n = 2048 if problem.layout == "nn" else 512
        return BlockedConfig(0, block_n if problem.n > block_n else 0, block_k if problem.k > block_k else 0, "xw", "float32")
    return BlockedConfig(block_n=block_n if problem.m > 16 else 0)


def space(problem: Matmul, chip: Chip) -> Iterator[BlockedConfig]:
    """Every combination of the block sizes that are smaller than the problem."""
    blocks_m = (0, 1) if problem.m <= 16 else (0, 16, 128)
    narrow = problem.dtype != "float32"
    for block_m, block_n, block_k, order, compute in product(
        blocks_m, (0, 128, 512, 2048), (0, 256, 1024, 4096), ("xw", "wx"), ("native", "float32") if narrow else ("native",)
    ):
        yield BlockedConfig(block_m, block_n, block_k, order, compute)


class _Scratch:
    """Buffers of one launch, made at its first call on a device and kept."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, torch.device], torch.Tensor] = {}

    def get(self, name: str, rows: int, columns: int, like: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """A dense [rows, columns] view of the buffer `name`, whose first request is its largest."""
        key = (name, like.device)
        if key not in self._buffers:
            self._buffers[key] = torch.empty(rows * columns, dtype=dtype, device=like.device)
        return self._buffers[key][: rows * columns].view(rows, columns)


@kernel(Matmul, backend="cpu", config=BlockedConfig, space=space, default=default, fits=fits, kinds=("cpu",))
def cpu_blocked(problem: Matmul, config: BlockedConfig, chip: Chip) -> Launch:
    """Torch's BLAS on cache-sized blocks: orientation, conversion to float32 and blocking are tunable."""
    m, n, k = problem.m, problem.n, problem.k
    block_m, block_n, block_k = config.block_m or m, config.block_n or n, config.block_k or k
    transposed, outer = problem.layout == "nt", config.order == "wx"
    convert = config.compute == "float32"
    sums_dtype = torch.float32 if convert else torch_dtype(problem.dtype)
    scratch = _Scratch()

    def weights(w: torch.Tensor, n0: int, n1: int, k0: int, k1: int) -> torch.Tensor:
        """The block of weights as [n1 - n0, k1 - k0], converted if asked for."""
        block = w[n0:n1, k0:k1] if transposed else w[k0:k1, n0:n1]
        if convert:
            block = scratch.get("w", block.shape[0], block.shape[1], like=w, dtype=torch.float32).copy_(block)
        return block if transposed else block.t()

    def launch(inputs: Tensors, outputs: Tensors) -> None:
        x, w, out = inputs["x"], inputs["w"], outputs["out"]
        if convert:
            x = scratch.get("x", m, k, like=x, dtype=torch.float32).copy_(x)
        for n0 in range(0, n, block_n):
            n1 = min(n0 + block_n, n)
            rows, columns = (n1 - n0, m) if outer else (m, n1 - n0)
            in_place = not outer and not convert
            sums = out[:, n0:n1] if in_place else scratch.get("sums", rows, columns, like=out, dtype=sums_dtype)
            for k0 in range(0, k, block_k):
                block = weights(w, n0, n1, k0, min(k0 + block_k, k))
                for m0 in range(0, m, block_m):
                    some = x[m0 : m0 + block_m, k0 : k0 + block_k]
                    left, right = (block, some.t()) if outer else (some, block.t())
                    part = sums[:, m0 : m0 + block_m] if outer else sums[m0 : m0 + block_m]
                    if k0 == 0:
                        torch.mm(left, right, out=part)
                    else:
                        part.addmm_(left, right)
            if not in_place:
                out[:, n0:n1].copy_(sums.t() if outer else sums)

    return launch
