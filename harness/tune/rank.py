"""The analytic rank: a modelled time for a candidate that nobody measured, from its tiles, its registers and the chip's limits.

It orders candidates, and its microseconds are modelled, never measured: no constant here was fitted to, or held against, measurements.
It reckons a roofline (the matrix unit that is really used, memory, L2, shared memory) with whole waves of tiles, padding included, the
latency of a pipeline of a given depth, merging of split results and launches. What it does not see: bank conflicts, instruction
scheduling, clocks under power limits, and how well phases overlap.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from klab.harness.tune.rank_work import Work, flag, work_of
from klab.kernels.contract import Chip, Config, Json, Kernel, Problem
from klab.kernels.dtypes import SIZE_BYTES

# A device-to-device copy on an H200 moves 4.3 of 4.8 TB/s (own reading, 2026-10).
MEMORY_SHARE = 0.9
# From a load to its data under traffic: published microbenchmarks of Hopper give 0.3 us on an idle chip (about 480 to 600 cycles), and
# queues double it.
LATENCY_US = 0.7
# A wave of blocks that nothing overlaps: the first loads' latency, starting a block (about 0.2 us) and storing its tile (about 0.3 us).
WAVE_US = LATENCY_US + 0.5
# A launch from a graph until its first block runs, and as much for each further one that waits for it: 2 to 3 us by flashinfer's pull
# request 4904, whose rule split_rule.py follows.
LAUNCH_US = 2.0
# Bytes per clock: an SM's shared memory (CUDA programming guide: 32 banks of 4 bytes), its port to the L2 (half of that), and its share of
# the L2 when all SMs read (published readings of an H100 lie between 25 and 45).
SMEM_BYTES_PER_CLOCK = 128.0
PORT_BYTES_PER_CLOCK = 64.0
L2_BYTES_PER_CLOCK = 40.0
# mma.sync multiplies half as fast as wgmma on Hopper (nvMatmulHeuristics models 490 of 989 TFLOP/s there); on Blackwell it is taken to have
# kept Hopper's rate per SM, a quarter of tcgen05's.
MMA_SYNC_SHARE = {90: 0.5, 100: 0.25}
# A score of attention: one exponential of the 16 that an SM makes per clock, and about 6 other float32 instructions of 128 (CUDA
# programming guide, throughput of arithmetic instructions). Rescaling the sums takes one of the 128 for each.
CLOCKS_PER_SCORE = 1 / 16 + 6 / 128
# Of the shorter of products and softmax, what stays visible where other warps or blocks could hide it. A judgement: FlashAttention-3
# reaches 66% of the peak at head dim 128 with both overlapped, FlashAttention-2's way about 40%.
UNHIDDEN = 0.3
# A step of the loop waits at two barriers or their like, of about 20 clocks each; a judgement, as is the exponent below: two limits that
# are equally close cost 12% more than either, since what shares a chip never overlaps perfectly.
STEP_CLOCKS = 40.0
SHARPNESS = 6.0
REGISTERS_PER_SM, THREADS_PER_SM, BLOCKS_PER_SM, TMEM_COLUMNS, RESERVED_SMEM_BYTES = 65536, 2048, 32, 512, 1024
_STRENGTH = ("none", "mma.sync", "wgmma", "tcgen05")


def expected_us(problem: Problem, kernel: Kernel, config: Config, chip: Chip, functions: Sequence[dict[str, Json]] = ()) -> float | None:
    """Modelled microseconds of one launch with cold caches; sharper with `functions`, the rows that screening read from the binaries.

    None for libraries and CPU kernels, on a CPU, and where the configuration's fields name no tile and no grid is known.
    """
    if kernel.library or chip.kind != "cuda" or kernel.backend not in ("triton", "cuda"):
        return None
    main = max(functions, key=lambda f: (_STRENGTH.index(f["matrix_unit"]), f["smem_bytes"]), default=None)
    grid: int = math.prod(main.get("grid") or [0]) if main else 0
    work = work_of(problem, config, chip, grid or None)
    if work is None:
        return None
    unit = main["matrix_unit"] if main else _likely_unit(problem, kernel, work, chip)
    resident = _resident(work, chip, main)
    if 0 < grid < work.tiles:  # persistent: no more blocks than were launched
        resident = min(resident, -(-grid // chip.sm_count))
    rounds = -(-work.tiles // (chip.sm_count * resident))
    overlapped = flag(config, "warp_specialize") or resident > 1
    clocks = _tile_clocks(problem, work, chip, unit, main, overlapped)

    busy_us = _waves_us(work, chip, clocks)
    # With `stages` buffers, stages - 1 loads are on their way while one is used; with one buffer, loading and using take turns.
    latency_us = max(rounds * work.smallest, work.largest, 1.0) * work.steps * LATENCY_US / max(0.5, work.stages - 1)
    memory_us = work.memory_bytes / (MEMORY_SHARE * chip.memory_gb_per_s * 1e3)

    # A persistent loop that is flattened or specialised loads the next tile while it stores the last one.
    waves = 1 if flag(config, "flatten", "warp_specialize") else rounds
    merge_us = _merge_us(work, chip)
    return _soft_max(max(busy_us, memory_us), latency_us) + waves * WAVE_US + work.launches * LAUNCH_US + merge_us


def _soft_max(*times_us: float) -> float:
    """At least the largest, and more where others come close."""
    most = max(times_us)
    return most * math.pow(math.fsum(math.pow(t / most, SHARPNESS) for t in times_us), 1 / SHARPNESS)


def _waves_us(work: Work, chip: Chip, clocks: float) -> float:
    """Whole waves of a tile per SM, then the rest: fewer tiles at once share memory and L2 among fewer, but each takes its clocks."""

    def tile_us(active: int) -> float:
        """One tile beside active - 1 others."""
        clocks_per_us = chip.spec_clock_mhz
        loads = work.load_bytes / (min(PORT_BYTES_PER_CLOCK, L2_BYTES_PER_CLOCK * chip.sm_count / active) * clocks_per_us)
        memory = work.memory_bytes / work.tiles * active / (MEMORY_SHARE * chip.memory_gb_per_s * 1e3)
        return _soft_max(clocks / clocks_per_us, loads, memory)

    full, rest = divmod(work.tiles, chip.sm_count)
    if work.smallest == work.largest:
        return (full * tile_us(chip.sm_count) if full else 0.0) + (tile_us(rest) if rest else 0.0)
    # Of unequal tiles the largest start first, so that the small ones fill up: no whole waves of the mean, but none of the least either.
    per_sm = max(work.tiles / chip.sm_count, work.largest, -(-work.tiles // chip.sm_count) * work.smallest)
    return per_sm * tile_us(min(work.tiles, chip.sm_count))


def _likely_unit(problem: Problem, kernel: Kernel, work: Work, chip: Chip) -> str:
    """The matrix unit that a compiler takes for such a tile: wgmma and tcgen05 multiply 64 rows at least, by 4 warps."""
    if problem.dtype == "float32":
        return "none"
    if kernel.backend != "triton" or work.rows < 64 or work.threads < 128 or chip.target < 90:
        return "mma.sync"
    return "tcgen05" if chip.target >= 100 else "wgmma"


def _flops_per_clock(problem: Problem, chip: Chip, unit: str) -> float:
    """Of one SM, for a dtype and matrix unit."""
    # Triton multiplies float32 on tensor cores as three products of tf32 each.
    wide = problem.dtype == "float32"
    name = "float32" if unit == "none" else "tensorfloat32" if wide else problem.dtype
    peak = chip.peak_flops(name) or chip.peak_flops("float32") or 1e12
    share = 1.0 if unit in ("wgmma", "tcgen05", "none") or chip.target < 90 else MMA_SYNC_SHARE[100 if chip.target >= 100 else 90]
    return peak * share / (3.0 if wide and unit != "none" else 1.0) / (chip.sm_count * chip.spec_clock_mhz * 1e6)


def _tile_clocks(problem: Problem, work: Work, chip: Chip, unit: str, main: dict[str, Json] | None, overlapped: bool) -> float:
    """Clocks of an SM for one tile: products or the shared memory that feeds them, and the softmax."""
    size = SIZE_BYTES[problem.dtype]
    products = work.flops / _flops_per_clock(problem, chip, unit)
    once, again = work.operands
    if unit == "tcgen05":
        products *= 2 if 0 < work.rows < 128 else 1  # 64 rows use half of the unit
        repeats = -(-work.rows // 128)
    elif unit == "wgmma":
        repeats = -(-work.rows // 64)  # each group of 64 rows reads the columns again
    else:
        # The warps share the tile as a square of them: each reads its rows and its columns.
        across = 1 << (max(1, work.threads // 32).bit_length() - 1) // 2
        once, repeats = once * across, max(1, work.threads // 32 // across)
    feed = work.steps * (once + again * repeats) * size / SMEM_BYTES_PER_CLOCK
    if main is not None and main["stack_bytes"]:
        # What is spilled is written and read once per step, through the same path as shared memory.
        feed += work.steps * 2.0 * main["stack_bytes"] * main["threads"] / SMEM_BYTES_PER_CLOCK
    products = max(products, feed) + work.steps * STEP_CLOCKS
    softmax = work.scores * CLOCKS_PER_SCORE + work.steps * work.carried / 128
    if not overlapped:
        return products + softmax
    return max(products, softmax) + UNHIDDEN * min(products, softmax)


def _resident(work: Work, chip: Chip, main: dict[str, Json] | None) -> int:
    """Blocks of an SM at a time, by registers, shared memory, threads and tensor memory."""
    threads, registers, smem, tmem = work.threads, 0, 0, 0
    if main is not None:
        threads, registers, smem, tmem = (int(main[name]) for name in ("threads", "registers", "smem_bytes", "tmem_columns"))
    else:
        # The float32 sums, and 64 for addresses and operands.
        registers = min(255, work.rows * work.columns // threads + 64)
        smem = int(work.stages * work.stage_bytes)
    per_warp = -(-max(1, registers) * 32 // 256) * 256  # registers are allotted in units of 256 per warp
    found = [REGISTERS_PER_SM // (per_warp * -(-max(1, threads) // 32)), THREADS_PER_SM // max(1, threads), BLOCKS_PER_SM]
    found.append(chip.smem_per_sm_bytes // (smem + RESERVED_SMEM_BYTES))
    if tmem:
        found.append(TMEM_COLUMNS // tmem)
    return max(1, min(found))


def _merge_us(work: Work, chip: Chip) -> float:
    """Writing and reading partial results: in L2 where they fit, else in memory."""
    if work.merge_bytes / 2 <= chip.l2_bytes / 2:
        return work.merge_bytes / (L2_BYTES_PER_CLOCK * chip.sm_count * chip.spec_clock_mhz)
    return work.merge_bytes / (MEMORY_SHARE * chip.memory_gb_per_s * 1e3)
