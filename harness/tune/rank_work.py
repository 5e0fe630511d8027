"""How a launch divides a problem into tiles, read off the configuration's fields: what the analytic rank reckons with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from klab.kernels.contract import Chip, Config, Problem
from klab.kernels.decode_attention.problem import DecodeAttention
from klab.kernels.dtypes import SIZE_BYTES
from klab.kernels.matmul.problem import Matmul
from klab.kernels.prefill_attention.problem import PrefillAttention
from klab.kernels.prefill_tiles import key_span
from klab.kernels.split_rule import choose_splits, tiles_per_split
from klab.kernels.triton_support import cdiv

# A tensor core multiplies at least 16 rows (mma.sync m16n8k16).
LEAST_ROWS = 16
# Of the L2, what one operand may fill before the others push it out: half, a rule of thumb.
L2_SHARE = 0.5


@dataclass(frozen=True)
class Work:
    """A launch as the model sees it. Per tile and on average: `flops` (padding included), `load_bytes` from L2, loop `steps`, `scores`
    (elements that pass through a softmax), and the `carried` sums that each step rescales. `largest` and `smallest` tile are in units of
    the mean.

    operands: elements of shared memory that one step reads, as (once, per 64 or 128 rows of the tile). memory_bytes: from DRAM for the
    whole launch. merge_bytes: of partial results, written and read. rows: of a tile (0: unknown); stages: of the load pipeline.
    """

    tiles: int
    flops: float
    load_bytes: float
    steps: float
    memory_bytes: float
    rows: int = 0
    columns: int = 0
    scores: float = 0.0
    carried: float = 0.0
    operands: tuple[float, float] = (0.0, 0.0)
    stage_bytes: float = 0.0
    stages: int = 1
    threads: int = 128
    merge_bytes: float = 0.0
    launches: int = 1
    largest: float = 1.0
    smallest: float = 1.0


def work_of(problem: Problem, config: Config, chip: Chip, blocks: int | None) -> Work | None:
    """The work of one launch; None where the fields do not tell and `blocks` (those of the launch's grid) is unknown."""
    found: Work | None = None
    if isinstance(problem, Matmul):
        found = _matmul(problem, config, chip)
    elif isinstance(problem, PrefillAttention):
        found = _prefill(problem, config, chip)
    elif isinstance(problem, DecodeAttention):
        found = _decode(problem, config, chip)
    if found is None and blocks:
        found = _even(problem, config, blocks)
    return found


def number(config: Config, *names: str, default: int | None = None) -> int | None:
    """The first of these fields that the configuration has as an integer."""
    for name in names:
        value = getattr(config, name, None)
        if isinstance(value, int) and not isinstance(value, bool):
            return value
    return default


def flag(config: Config, *names: str) -> bool:
    """Whether one of these fields is set."""
    return any(getattr(config, name, False) is True for name in names)


def _threads(config: Config) -> int:
    warps_m, warps_n = number(config, "warps_m"), number(config, "warps_n")
    warps = number(config, "num_warps", "warps") or (warps_m * warps_n if warps_m and warps_n else 4)
    return 32 * warps


def _stages(config: Config) -> int:
    return max(1, number(config, "num_stages", "stages", default=2) or 2)


def _matmul(problem: Matmul, config: Config, chip: Chip) -> Work | None:
    bm, bn, bk = (number(config, f"block_{axis}", f"b{axis}", f"tile_{axis}") for axis in "mnk")
    if not bm or not bn:
        return None
    bk = bk or 64
    splits = max(1, number(config, "split_k", "splits", "split", "num_splits") or 1)
    size = SIZE_BYTES[problem.dtype]
    tiles_m, tiles_n = cdiv(problem.m, bm), cdiv(problem.n, bn)
    steps = cdiv(cdiv(problem.k, bk), splits)
    # Rows beyond the edge are multiplied and not read.
    rows, columns = min(bm, problem.m), min(bn, problem.n)
    tiles = tiles_m * tiles_n * splits
    partial = 4.0 * splits * problem.m * problem.n if splits > 1 else 0.0
    return Work(
        tiles=tiles,
        flops=2.0 * max(bm, LEAST_ROWS) * bn * steps * bk,
        load_bytes=float(size) * (rows + columns) * min(steps * bk, problem.k),
        steps=steps,
        memory_bytes=_matmul_bytes(problem, chip, bm, bn, number(config, "group_m") or 1, tiles_m, tiles_n),
        rows=bm,
        columns=bn,
        operands=(float(bm * bk), float(bn * bk)),
        stage_bytes=float(size) * (bm + bn) * bk,
        stages=_stages(config),
        threads=_threads(config),
        merge_bytes=2 * partial,
        launches=2 if splits > 1 else 1,
    )


def _matmul_bytes(problem: Matmul, chip: Chip, bm: int, bn: int, group: int, tiles_m: int, tiles_n: int) -> float:
    """Bytes from memory: a matrix that stays in L2 is read once, another once for every set of tiles that runs together."""
    size = float(SIZE_BYTES[problem.dtype])
    x, w = size * problem.m * problem.k, size * problem.n * problem.k
    together = min(tiles_m * tiles_n, chip.sm_count)
    # Tiles are numbered down a group of rows, then to the right: what runs together is a rectangle.
    high = min(group, tiles_m, together)
    wide = min(tiles_n, -(-together // high))
    high = min(tiles_m, max(high, -(-together // wide)))
    sets = tiles_m * tiles_n / (high * wide)
    fits = L2_SHARE * chip.l2_bytes
    x_read = x if x <= fits else max(x, min(size * high * bm * problem.k * sets, x * tiles_n))
    w_read = w if w <= fits else max(w, min(size * wide * bn * problem.k * sets, w * tiles_m))
    return x_read + w_read + size * problem.m * problem.n


def _prefill(problem: PrefillAttention, config: Config, chip: Chip) -> Work | None:
    bm, bn = number(config, "block_m", "bm", "tile_m"), number(config, "block_n", "bn", "tile_n")
    if not bm or not bn:
        return None
    size, dim = SIZE_BYTES[problem.dtype], problem.head_dim + problem.dim_v
    per_token = problem.heads // problem.kv_heads if flag(config, "pack_gqa") else 1
    blocks, mean, largest, smallest = _key_spans(problem, bm, bn, per_token)
    if not blocks or not mean:
        return None
    tiles = blocks * (problem.heads // per_token)
    keys_bytes = float(size) * sum(problem.kv_lens) * problem.kv_heads * dim
    queries_bytes = problem.bytes_moved() - keys_bytes
    load = float(size) * mean * dim
    sets = -(-tiles // chip.sm_count)
    reread = keys_bytes if keys_bytes <= L2_SHARE * chip.l2_bytes else max(keys_bytes, min(tiles * load, sets * keys_bytes))
    return Work(
        tiles=tiles,
        flops=2.0 * max(bm, LEAST_ROWS) * mean * dim,
        load_bytes=load,
        steps=mean / bn,
        memory_bytes=reread + max(0.0, queries_bytes),
        rows=bm,
        columns=bn,
        scores=bm * mean,
        carried=float(bm * problem.dim_v),
        operands=(float(bm * problem.head_dim), float(bn * dim)),
        stage_bytes=float(size) * bn * dim,
        stages=_stages(config),
        threads=_threads(config),
        largest=largest / mean,
        smallest=smallest / mean,
    )


@lru_cache(maxsize=1024)
def _key_spans(problem: PrefillAttention, block_m: int, block_n: int, rows_per_token: int) -> tuple[int, float, float, float]:
    """Blocks of query rows over all sequences, and the mean, most and fewest keys that one of them sees, in whole steps of block_n."""
    spans = []
    for i, q_len in enumerate(problem.q_lens):
        for block in range(-(-q_len * rows_per_token // block_m)):
            first = block * block_m // rows_per_token
            last = min(q_len - 1, ((block + 1) * block_m - 1) // rows_per_token)
            begin, end = key_span(problem, i, first, last)
            spans.append(-(-(end - begin) // block_n) * block_n)
    return (len(spans), sum(spans) / len(spans), float(max(spans)), float(min(spans))) if spans else (0, 0.0, 0.0, 0.0)


def _decode(problem: DecodeAttention, config: Config, chip: Chip) -> Work | None:
    bn = number(config, "block_n", "bn", "tile_n")
    if not bn:
        return None
    size, dim = SIZE_BYTES[problem.dtype], problem.head_dim + problem.dim_v
    rows = problem.q_len * (problem.heads // problem.kv_heads)
    fragments = number(config, "row_fragments")
    bm = LEAST_ROWS * fragments if fragments else -(-rows // LEAST_ROWS) * LEAST_ROWS
    if fragments:
        # Who counts rows in fragments of a warp gives each warp keys and buffers of its own: a step takes the keys of all.
        bn *= _threads(config) // 32
    lengths = tuple(min(n, problem.window + problem.q_len - 1) if problem.window else n for n in problem.kv_lens)
    programs = problem.kv_heads * -(-rows // bm)
    tiles, mean, largest, splits = _pieces(lengths, bn, programs, number(config, "num_splits", "splits", "split") or 0, chip.sm_count)
    results = float(problem.batch * problem.q_len * problem.heads)
    return Work(
        tiles=tiles,
        flops=2.0 * bm * mean * dim,
        load_bytes=float(size) * mean * dim,
        steps=mean / bn,
        memory_bytes=problem.bytes_moved(),
        rows=bm,
        columns=bn,
        scores=bm * mean,
        carried=float(bm * problem.dim_v),
        operands=(float(bm * problem.head_dim), float(bn * dim)),
        stage_bytes=float(size) * bn * dim,
        stages=_stages(config),
        threads=_threads(config),
        merge_bytes=2 * 4.0 * results * splits * (problem.dim_v + 2) if splits > 1 else 0.0,
        launches=2 if splits > 1 else 1,
        largest=largest / mean,
        smallest=0.0 if len(set(lengths)) > 1 else 1.0,
    )


@lru_cache(maxsize=1024)
def _pieces(lengths: Sequence[int], block_n: int, programs: int, splits: int, slots: int) -> tuple[int, float, float, int]:
    """(pieces of all sequences and heads, mean and most keys of one, splits of the longest); splits 0: by the split rule."""
    steps = [-(-n // block_n) for n in lengths]
    splits = splits or choose_splits(steps, programs * len(steps), slots)
    piece = tiles_per_split(max(steps), splits)
    counts = [max(1, -(-n // piece)) for n in steps]
    pieces = programs * sum(counts)
    return pieces, max(1.0, programs * block_n * sum(steps) / pieces), float(min(piece, max(steps)) * block_n), max(counts)


def _even(problem: Problem, config: Config, blocks: int) -> Work:
    """A launch of which only the grid is known: every block does the same, and nothing is read twice. Stages of 16 bytes a thread."""
    threads = _threads(config)
    load = problem.bytes_moved() / blocks
    unroll = max(1, number(config, "unroll", default=1) or 1)
    stage: float = 16.0 * threads * unroll
    splits = max(1, number(config, "split_k", "splits", "split", "num_splits") or 1)
    outputs: Any = getattr(problem, "m", 0) * getattr(problem, "n", 0)
    return Work(
        tiles=blocks,
        flops=problem.flops() / blocks,
        load_bytes=load,
        steps=max(1.0, load / stage),
        memory_bytes=problem.bytes_moved(),
        stage_bytes=stage,
        stages=_stages(config),
        threads=threads,
        merge_bytes=8.0 * splits * outputs if splits > 1 else 0.0,
        launches=2 if splits > 1 else 1,
    )
