"""FlashAttention for Hopper in CUDA C++: warpgroup products (wgmma), one warpgroup that only copies, softmax under the other's products.

The schedule is that of FlashAttention-3 (Shah et al., arXiv 2407.08608): a warpgroup computes the scores of the next keys while its values
of the last ones are still being multiplied, and two warpgroups take turns at the tensor cores. Whole blocks of packed keys and values come
by TMA; queries, pages of any size, and the block in which a sequence ends (behind it lies another) by cp.async.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import cupy  # noqa: F401  absent CuPy makes this file "unavailable" when it is found, not when it is launched

from klab.kernels.contract import Chip, Config, Launch, Tensors, kernel
from klab.kernels.cuda_module import ELEMENT, CudaKernel, Int64, TensorMap
from klab.kernels.mma_attention import refusal, row_strides
from klab.kernels.prefill_attention.problem import PrefillAttention
from klab.kernels.prefill_tiles import Tiles
from klab.kernels.wgmma import wgmma_functions

if TYPE_CHECKING:
    import torch

SOURCE = """
#include "tma.cuh"
{products}
#include "flash_hopper.cuh"
"""


@dataclass(frozen=True)
class HopperConfig(Config):
    """A block of threads takes 64 `consumers` queries of one head and steps over keys in tiles of `block_n`, `stages` of them in memory.

    `tma`: whole blocks of keys come by the copy engine, else by cp.async of 128 threads, whose 170 instructions for 128 keys and head
    dimension 128 take an eighth of the issue slots. `take_turns`: the warpgroups issue their products in turn, so that one softens while
    the other multiplies; else as it comes.
    `heads_inner`: neighbouring blocks differ in head, else in queries of one head (fewer keys and values compete for the L2 cache).
    """

    consumers: int = 2
    block_n: int = 128
    stages: int = 2
    tma: bool = False
    take_turns: bool = True
    heads_inner: bool = True

    @property
    def block_m(self) -> int:
        """Queries of a block, for who ranks configurations by their tiles."""
        return 64 * self.consumers

    @property
    def warps(self) -> int:
        """Warps that multiply."""
        return 4 * self.consumers


def smem_bytes(problem: PrefillAttention, config: HopperConfig) -> int:
    """Panels of 64 columns (rows of 128 bytes) for queries, keys and values; the barriers; 1 KiB to begin at a multiple of it."""
    d, dv = (-(-dim // 64) * 128 for dim in (problem.head_dim, problem.dim_v))
    return 64 * config.consumers * d + config.stages * config.block_n * (d + dv) + 16 + 32 * config.stages + 1024


# Of 65,536 registers, in multiples of 8 a thread: what the producer leaves to each of two or three warpgroups.
REGISTERS = {1: (56, 240), 2: (40, 232), 3: (32, 160)}


def registers(problem: PrefillAttention, config: HopperConfig) -> int:
    """Estimated registers of a consumer: output, scores, packed weights, and 30 for addresses, maxima and sums.

    ptxas reports the 168 (or 128) that every thread starts with. By this count NVRTC 13.0 spills nothing up to the limit.
    """
    return problem.dim_v // 2 + config.block_n // 2 + config.block_n // 4 + 30


def fits(problem: PrefillAttention, config: HopperConfig, chip: Chip) -> str | None:
    """None when it can run; otherwise the reason in a few words."""
    if chip.target != 90:
        return "wgmma is Hopper's: sm_90 only"
    refused = problem.unserved("sinks", "softcap", "page_size", "kv_tokens") or refusal(problem, chip, multiple=8)
    if refused:
        return refused
    if config.consumers not in REGISTERS or config.block_n % 16 or not 16 <= config.block_n <= 256 or not 1 <= config.stages <= 8:
        return "consumers are 1 to 3, block_n is a multiple of 16 up to 256, stages are 1 to 8"
    if config.take_turns and config.consumers < 2:
        return "one warpgroup has nobody to take turns with"
    if config.tma and (problem.page_size or problem.head_dim % 64 or problem.dim_v % 64):
        return "the copy engine's boxes are of 64 columns and of packed keys"
    if smem_bytes(problem, config) > chip.smem_per_block_bytes:
        return f"needs {smem_bytes(problem, config)} B of shared memory, {chip.name} has {chip.smem_per_block_bytes}"
    if registers(problem, config) > REGISTERS[config.consumers][1]:
        return f"would spill: about {registers(problem, config)} registers per thread of {REGISTERS[config.consumers][1]}"
    return None


def space(problem: PrefillAttention, chip: Chip) -> Iterator[HopperConfig]:
    """Every combination that may be worth a measurement; invalid ones are dropped by `fits`."""
    for inner, turns, tma, stages, n, consumers in itertools.product(
        (True, False), (True, False), (True, False), (2, 3, 4), (64, 80, 96, 112, 128, 144, 160, 176, 192, 224), (2, 3, 1)
    ):
        yield HopperConfig(consumers, n, stages, tma, turns, inner)


def default(problem: PrefillAttention, chip: Chip) -> HopperConfig:
    """The longest steps that fit, in two warpgroups, or three where heads are short; a causal mask or a window wastes more of long ones.

    One warpgroup where two would leave half of the chip without work.
    """
    short = max(problem.head_dim, problem.dim_v) <= 64
    narrow = 0 < problem.window <= 512
    few = problem.heads * sum(-(-q_len // 128) for q_len in problem.q_lens) <= chip.sm_count // 2
    consumers = 1 if few else 3 if short and not narrow else 2
    longest = 64 if narrow else 128 if short or problem.causal else 176
    lengths = [n for n in (176, 128, 96, 80, 64) if n <= longest]
    preferred = [HopperConfig(consumers, n, tma=tma, take_turns=not few) for n in lengths for tma in (True, False)]
    preferred += [HopperConfig(2, 64), HopperConfig(2, 64, 1), HopperConfig(2, 32, 1)]
    return next((config for config in preferred if fits(problem, config, chip) is None), preferred[-1])


def _as_matrix(x: torch.Tensor) -> torch.Tensor:
    """[tokens, heads, dim] as one matrix of all heads side by side, with whatever lies between them."""
    return x.as_strided((x.shape[0], (x.shape[1] - 1) * x.stride(1) + x.shape[2]), (x.stride(0), 1))


@kernel(PrefillAttention, backend="cuda", config=HopperConfig, space=space, default=default, fits=fits)
def cuda_flash_hopper(problem: PrefillAttention, config: HopperConfig, chip: Chip) -> Launch:
    """Warp-specialised FlashAttention in CUDA C++ for Hopper (wgmma): persistent, packed or paged, window, sinks, soft-cap, GQA."""
    producer, consumer = REGISTERS[config.consumers]
    products = wgmma_functions("score_product", config.block_n, problem.dtype, left_in_registers=False, transposed=False)
    products += wgmma_functions("value_product", problem.dim_v, problem.dtype, left_in_registers=True, transposed=True)
    flash = CudaKernel(
        SOURCE.format(products=products),
        "flash_forward_hopper",
        chip,
        {
            "ELEMENT": ELEMENT[problem.dtype],
            "HEAD_DIM": problem.head_dim,
            "HEAD_DIM_V": problem.dim_v,
            "BLOCK_N": config.block_n,
            "CONSUMERS": config.consumers,
            "STAGES": config.stages,
            "TAKE_TURNS": int(config.take_turns),
            "HEADS_INNER": int(config.heads_inner),
            "PRODUCER_REGISTERS": producer,
            "CONSUMER_REGISTERS": consumer,
            "CAUSAL": int(problem.causal),
            "WINDOWED": int(problem.window > 0),
            "SINKS": int(problem.sinks),
            "SOFTCAP": int(problem.softcap > 0),
            "PAGE_SIZE": problem.page_size,
            "TMA": int(config.tma),
        },
        smem_bytes(problem, config),
    )
    tiles = Tiles(problem, 64 * config.consumers)
    scale_log2 = problem.scale * math.log2(math.e)
    keys, values = ("k_cache", "v_cache") if problem.page_size else ("k", "v")

    def launch(inputs: Tensors, outputs: Tensors) -> None:
        tensors = {"q": inputs["q"], keys: inputs[keys], values: inputs[values], "out": outputs["out"]}
        strides = {name: row_strides("cuda_flash_hopper", name, tensor) for name, tensor in tensors.items()}
        pages = [strides[name].pop(0) if problem.page_size else 0 for name in (keys, values)]
        maps = [TensorMap(_as_matrix(inputs[name]), config.block_n) for name in (keys, values)] if config.tma else []
        # What the code of this problem does not read is any pointer.
        table, sinks = inputs.get("block_table", inputs["q_offsets"]), inputs.get("sinks", inputs["q"])
        flash.launch(
            (min(chip.sm_count, len(tiles) * problem.heads), 1, 1),
            128 * (config.consumers + 1),
            [
                *maps, inputs["q"], inputs[keys], inputs[values], tiles.on(inputs["q"].device), table, sinks, outputs["out"],
                problem.heads, problem.heads // problem.kv_heads, len(tiles), *strides["q"], Int64(pages[0]), *strides[keys],
                Int64(pages[1]), *strides[values], *strides["out"], table.stride(0), problem.window, scale_log2, float(problem.softcap),
            ],
        )  # fmt: skip

    return launch
