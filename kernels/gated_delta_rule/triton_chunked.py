"""The gated delta rule in chunks, in Triton: matrix products within a chunk, and a scan of the state from chunk to chunk.

prepare  every chunk and head at once: the inverse of the chunk's equations, and what it makes of v and k;
scan     one chunk after the other, columns of the state in parallel: the corrections, the next state;
output   every chunk at once again, or within the scan (`fuse_output`): queries times the state and the corrections before them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product

import triton  # noqa: F401  where it is absent, so is this kernel

from klab.kernels.contract import Chip, Config, Launch, Tensors, kernel
from klab.kernels.dtypes import SIZE_BYTES
from klab.kernels.gated_delta_rule._chunks import Chunks, Workspace, count_chunks, workspace_bytes
from klab.kernels.gated_delta_rule._triton_chunks import output, prepare, scan
from klab.kernels.gated_delta_rule.problem import NORM_EPSILON, GatedDeltaRule
from klab.kernels.triton_support import cdiv, pipeline_smem_bytes

LOG2_E = 1.4426950408889634
MAX_GRID_YZ = 65535
# float32 has no tensor cores under IEEE rules: every multiply-add of a product is an unrolled instruction.
MAX_FMAS_PER_PRODUCT_FP32 = 4096
# Head dimensions of 128 spill 400 to 6700 bytes whatever the blocks.
MAX_DIM_FP32 = 64


@dataclass(frozen=True)
class ChunkedConfig(Config):
    """`block_v` columns of the state are one program of the scan, which keeps `scan_stages` chunks on their way."""

    chunk: int = 64
    block_v: int = 32
    scan_warps: int = 4
    scan_stages: int = 2
    prepare_warps: int = 4
    fuse_output: bool = False
    output_warps: int = 4


def scan_smem_bytes(problem: GatedDeltaRule, config: ChunkedConfig) -> int:
    """Shared memory of a program of the scan: what it loads per chunk and stage; the state and the corrections on their way to tl.dot."""
    c, size = config, SIZE_BYTES[problem.dtype]
    stage = c.chunk * (2 * problem.key_dim + c.block_v) + c.fuse_output * c.chunk * (problem.key_dim + c.chunk)
    return pipeline_smem_bytes(stage * size, c.scan_stages, (problem.key_dim + 2 * c.chunk) * c.block_v * size)


def prepare_smem_bytes(problem: GatedDeltaRule, config: ChunkedConfig) -> int:
    """Shared memory of a program that prepares: keys, values or queries, and two square factors in float32."""
    size = SIZE_BYTES[problem.dtype]
    return config.chunk * (problem.key_dim + max(problem.key_dim, problem.value_dim)) * size + 3 * config.chunk**2 * 4


def fits(problem: GatedDeltaRule, config: ChunkedConfig, chip: Chip) -> str | None:
    """Dimensions and blocks are powers of two, tiles fit shared memory and registers, and the workspace the chip's memory."""
    p, c = problem, config
    if p.is_decode:
        return "one token is no chunk"
    if p.is_short and p.dtype != "float32":
        return "16-bit products are not precise enough for so few tokens: step by step costs no more"
    dims, blocks = (p.key_dim, p.value_dim), (c.chunk, c.block_v, c.scan_warps, c.prepare_warps, c.output_warps)
    if any(value < 1 or value & (value - 1) for value in (*dims, *blocks)):
        return "head dimensions, chunks, blocks and warps must be powers of two"
    if min(*dims, c.chunk, c.block_v) < 16 or max(dims) > 256 or c.chunk > 64:
        return "head dimensions are 16 to 256, chunks 16 to 64, block_v from 16"
    if p.dtype == "float32" and max(dims) > MAX_DIM_FP32:
        return f"float32 products of more than {MAX_DIM_FP32} elements spill: they are unrolled"
    if c.block_v > p.value_dim:
        return "block_v is wider than the values"
    if c.chunk >= 2 * max(16, max(p.seq_lens)):
        return "the chunk is more than twice the longest sequence"
    if not 1 <= c.scan_stages <= 6 or max(c.scan_warps, c.prepare_warps, c.output_warps) > 8:
        return "scan_stages are 1 to 6, warps at most 8"
    if c.fuse_output and c.output_warps != ChunkedConfig.output_warps:
        return "output_warps means nothing when the output is fused"
    if max(p.value_heads, p.batch) > MAX_GRID_YZ:
        return f"more than {MAX_GRID_YZ} heads or sequences"
    needed = workspace_bytes(p, count_chunks(p, c.chunk), c.chunk, SIZE_BYTES[p.dtype], weights=c.fuse_output, states=not c.fuse_output)
    if needed > chip.memory_bytes // 4:
        return f"the workspace takes {needed / 1e9:.0f} GB"
    return _unfit_tiles(p, c, chip)


def _unfit_tiles(p: GatedDeltaRule, c: ChunkedConfig, chip: Chip) -> str | None:
    """Why the tiles do not fit a block's registers and shared memory, or None."""
    if max(scan_smem_bytes(p, c), prepare_smem_bytes(p, c)) > chip.smem_per_block_bytes:
        return "too much shared memory"
    # The scan's sums (the state, kept, the corrections and, fused, the results), and two tiles of keys on their way to shared memory.
    # With fewer than four warps there are no warp-group instructions, and all operands pass through registers once more: two warps
    # that hold 32 columns spill 5256 bytes for key_dim 128, four none.
    sums = c.block_v * (p.key_dim + c.chunk * (2 + c.fuse_output)) // (32 * c.scan_warps)
    loads = c.chunk * p.key_dim // (32 * c.scan_warps) * (1 if c.scan_warps >= 4 else 2)
    square = c.chunk * (max(p.key_dim, p.value_dim) + c.chunk) // 32
    if sums > 128 or sums + loads > 200 or square // min(c.prepare_warps, c.output_warps) >= 160:
        return "the sums would spill registers"
    strips = c.chunk // 16
    if strips * c.block_v // 8 < c.scan_warps or strips**2 * 2 < c.prepare_warps or strips * p.value_dim // 8 < c.output_warps:
        return "too many warps for the tile"
    if p.dtype == "float32":
        widest = max(p.key_dim, p.value_dim)
        products = (
            p.key_dim * c.block_v / c.scan_warps,
            max(widest, c.chunk) * c.chunk / c.prepare_warps,
            p.key_dim * p.value_dim / c.output_warps,
        )
        if c.chunk * max(products) / 32 > MAX_FMAS_PER_PRODUCT_FP32:
            return "one product would unroll too many multiply-adds"
    return None


def default(problem: GatedDeltaRule, chip: Chip) -> ChunkedConfig:
    """Chunks of 64 (16 in float32, where 32 spill 984 bytes); columns as wide as leave most multiprocessors a program, at least 16."""
    longest = max(problem.seq_lens)
    config = ChunkedConfig(chunk=16 if longest <= 16 or problem.dtype == "float32" else 32 if longest <= 32 else 64)
    block_v = min(64, problem.value_dim)
    while block_v > 16 and problem.batch * problem.value_heads * cdiv(problem.value_dim, block_v) < 3 * chip.sm_count // 4:
        block_v //= 2
    config = replace(config, block_v=block_v, prepare_warps=4 if config.chunk > 16 else 2)
    # Where the columns fill the chip, memory is the limit, and the states need not go through it.
    for fused, warps, stages in product((True, False), (4, 8, 2), (2, 1)):
        tried = replace(config, fuse_output=fused, scan_warps=warps, scan_stages=stages)
        if fits(problem, tried, chip) is None:
            return tried
    return config


def space(problem: GatedDeltaRule, chip: Chip) -> Iterator[ChunkedConfig]:
    """Chunks of 32 and 64 (16 where sequences are that short), all widths of the scan, fused or not."""
    chunks = (16, 32) if max(problem.seq_lens) <= 16 or problem.dtype == "float32" else (64, 32)
    for chunk, block_v, scan_warps, stages, prepare_warps in product(chunks, (16, 32, 64, 128), (2, 4, 8), (1, 2, 3), (2, 4, 8)):
        config = ChunkedConfig(chunk, block_v, scan_warps, stages, prepare_warps)
        yield from (replace(config, output_warps=warps) for warps in (2, 4, 8))
        yield replace(config, fuse_output=True)


@kernel(GatedDeltaRule, backend="triton", config=ChunkedConfig, space=space, default=default, fits=fits)
def triton_chunked(problem: GatedDeltaRule, config: ChunkedConfig, chip: Chip) -> Launch:
    """Triton in chunks (WY form): tensor cores within a chunk, the state scanned from chunk to chunk in float32 sums."""
    p, c = problem, config
    chunks = Chunks(p, c.chunk)
    workspace = Workspace(p, len(chunks), c.chunk, weights=c.fuse_output, states=not c.fuse_output)
    shape = {
        "HEADS": p.value_heads, "GROUP": p.value_heads // p.key_heads, "KEY_DIM": p.key_dim, "VALUE_DIM": p.value_dim, "CHUNK": c.chunk,
        "QK_NORM": p.qk_norm,
    }  # fmt: skip

    def launch(inputs: Tensors, outputs: Tensors) -> None:
        q, k, v, g, beta, state = (inputs[name] for name in ("q", "k", "v", "g", "beta", "initial_state"))
        out, final_state = outputs["out"], outputs["final_state"]
        rows, sequences = chunks.on(out.device)
        w = workspace.on(out.device)
        of_qk = (*q.stride()[:2], *k.stride()[:2])
        gates = (g.stride(0), beta.stride(0))
        prepare[(len(chunks), p.value_heads)](
            q, k, v, g, beta, rows, w["corrections"], w["keys"], w["gates"], w["weights"], *of_qk, *v.stride()[:2], *gates, LOG2_E,
            NORM_EPSILON, WEIGHTS=c.fuse_output, LEVELS=c.chunk.bit_length() - 1, num_warps=c.prepare_warps, num_stages=1, **shape,
        )  # fmt: skip
        scan[(p.value_dim // c.block_v, p.value_heads, p.batch)](
            q, k, state, sequences, w["corrections"], w["keys"], w["gates"], w["weights"], w["states"], out, final_state, *of_qk,
            *state.stride()[:3], p.scale, NORM_EPSILON, BLOCK_V=c.block_v, FUSE_OUTPUT=c.fuse_output, num_warps=c.scan_warps,
            num_stages=c.scan_stages, **shape,
        )  # fmt: skip
        if not c.fuse_output:
            output[(len(chunks), p.value_heads)](
                q, k, rows, w["corrections"], w["gates"], w["states"], out, *of_qk, p.scale, NORM_EPSILON, num_warps=c.output_warps,
                num_stages=1, **shape,
            )  # fmt: skip

    return launch
