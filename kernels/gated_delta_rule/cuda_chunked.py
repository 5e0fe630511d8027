"""The gated delta rule in chunks of 64 tokens in CUDA C++: one launch solves every chunk, one scans the state and writes the output."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

import cupy  # noqa: F401  where it is absent, so is this kernel
import torch

from klab.kernels.contract import Chip, Config, Launch, Tensors, kernel
from klab.kernels.cuda_module import ELEMENT, CudaKernel, Int64
from klab.kernels.dtypes import SIZE_BYTES, torch_dtype
from klab.kernels.gated_delta_rule._chunks import Chunks, count_chunks
from klab.kernels.gated_delta_rule._cuda_chunks import SCAN
from klab.kernels.gated_delta_rule._cuda_prepare import PREPARE
from klab.kernels.gated_delta_rule._cuda_rows import row_strides
from klab.kernels.gated_delta_rule.problem import NORM_EPSILON, GatedDeltaRule

CHUNK = 64
PREPARE_WARPS = 4  # one per 16 rows of a chunk
MAX_GRID_YZ = 65535


@dataclass(frozen=True)
class ScanConfig(Config):
    """Warps of a block of the scan, 16 columns of the state each, which share what `stages` chunks bring to shared memory."""

    warps: int = 2
    stages: int = 2


def prepare_smem_bytes(problem: GatedDeltaRule) -> int:
    """Tiles of keys, queries and values, two squares of 16 bits, and five numbers for each token."""
    return CHUNK * 2 * (2 * problem.key_dim + problem.value_dim + 2 * CHUNK) + 5 * CHUNK * 4


def scan_smem_bytes(problem: GatedDeltaRule, config: ScanConfig) -> int:
    """Per stage: two tiles of keys and one of queries, the weights, three numbers for each token."""
    return config.stages * (CHUNK * 2 * (3 * problem.key_dim + CHUNK) + 3 * CHUNK * 4)


def fits(problem: GatedDeltaRule, config: ScanConfig, chip: Chip) -> str | None:
    """16-bit types, dimensions that the tiles divide, and stages that fit the shared memory."""
    p, c = problem, config
    if p.is_short:
        return "16-bit products are not precise enough for so few tokens: step by step costs no more"
    if SIZE_BYTES[p.dtype] != 2:
        return f"{p.dtype} has no tensor-core product of full precision"
    if chip.target < 80:
        return "needs compute capability 8.0"
    if p.key_dim not in (32, 64, 128) or p.value_dim not in (32, 64, 128, 256):
        return "key_dim is 32, 64 or 128, value_dim 32, 64, 128 or 256"
    if c.warps not in (1, 2, 4, 8, 16) or p.value_dim % (16 * c.warps):
        return "value_dim is not a multiple of the columns of a block"
    if not 2 <= c.stages <= 4:
        return "stages are 2 to 4"
    smem_bytes = max(prepare_smem_bytes(p), scan_smem_bytes(p, c))
    if smem_bytes > chip.smem_per_block_bytes:
        return f"{smem_bytes} B of shared memory, {chip.smem_per_block_bytes} allowed"
    if max(p.value_heads, p.batch) > MAX_GRID_YZ:
        return f"more than {MAX_GRID_YZ} heads or sequences"
    # A lane's state, corrections and outputs, and what is on its way: more than 8 warps would not have the registers.
    if c.warps > 8:
        return "about 200 registers for each of more than 256 threads"
    needed = count_chunks(p, CHUNK) * p.value_heads * CHUNK * 2 * (p.value_dim + p.key_dim + CHUNK + 6)
    if needed > chip.memory_bytes // 4:
        return f"the workspace takes {needed / 1e9:.0f} GB"
    return None


def default(problem: GatedDeltaRule, chip: Chip) -> ScanConfig:
    """As many warps to a block as still leave most multiprocessors a block, since they share what is loaded."""
    warps = min(8, problem.value_dim // 16)
    while warps > 2 and problem.batch * problem.value_heads * problem.value_dim // (16 * warps) < 3 * chip.sm_count // 4:
        warps //= 2
    return ScanConfig(warps)


def space(problem: GatedDeltaRule, chip: Chip) -> Iterator[ScanConfig]:
    """16 to 128 columns, 2 to 4 stages."""
    for stages, warps in product((2, 3, 4), (1, 2, 4, 8)):
        yield ScanConfig(warps, stages)


class _Workspace:
    """What the first launch hands to the second (see `_cuda_chunks`), made at the first call on a device and kept."""

    def __init__(self, problem: GatedDeltaRule, chunks: int) -> None:
        self.dtype = torch_dtype(problem.dtype)
        self.each = chunks * problem.value_heads
        self.sizes = (problem.value_dim * CHUNK, CHUNK * problem.key_dim, CHUNK * CHUNK)
        self._on: dict[torch.device, list[torch.Tensor]] = {}

    def on(self, device: torch.device) -> list[torch.Tensor]:
        """values, keys, weights and gates."""
        if device not in self._on:
            made = [torch.empty(self.each * size, dtype=self.dtype, device=device) for size in self.sizes]
            self._on[device] = [*made, torch.empty(self.each * 3 * CHUNK, dtype=torch.float32, device=device)]
        return self._on[device]


@kernel(GatedDeltaRule, backend="cuda", config=ScanConfig, fits=fits, default=default, space=space)
def cuda_chunked(problem: GatedDeltaRule, config: ScanConfig, chip: Chip) -> Launch:
    """CUDA C++ in chunks (WY form, mma.sync): the state stays in a warp's registers as accumulator and operand, never in shared memory."""
    p, c = problem, config
    chunks = Chunks(p, CHUNK)
    workspace = _Workspace(p, len(chunks))
    shape: dict[str, str | int] = {"ELEMENT": ELEMENT[p.dtype], "KEY_DIM": p.key_dim, "VALUE_DIM": p.value_dim}
    prepare = CudaKernel(PREPARE, "delta_prepare", chip, {**shape, "WARPS": PREPARE_WARPS}, prepare_smem_bytes(p))
    scan = CudaKernel(
        SCAN, "delta_scan", chip, {**shape, "WARPS": c.warps, "STAGES": c.stages, "STATE": ELEMENT[p.state_dtype]}, scan_smem_bytes(p, c)
    )
    heads = [p.value_heads, p.value_heads // p.key_heads]

    def launch(inputs: Tensors, outputs: Tensors) -> None:
        q, k, v, g, beta, state = (inputs[name] for name in ("q", "k", "v", "g", "beta", "initial_state"))
        rows, sequences = chunks.on(q.device)
        passed = workspace.on(q.device)
        of_qk = [*row_strides("cuda_chunked", "q", q), *row_strides("cuda_chunked", "k", k)]
        gates = [Int64(g.stride(0)), Int64(beta.stride(0))]
        strides = [*of_qk, *row_strides("cuda_chunked", "v", v), *gates]
        if len(chunks):
            arguments = [q, k, v, g, beta, rows, *passed, *heads, *strides, int(p.qk_norm), p.scale, NORM_EPSILON]
            prepare.launch((len(chunks), p.value_heads, 1), 32 * PREPARE_WARPS, arguments)
        tensors = [q, k, state, sequences, *passed, outputs["out"], outputs["final_state"]]
        grid = (p.value_dim // (16 * c.warps), p.value_heads, p.batch)
        scan.launch(grid, 32 * c.warps, [*tensors, *heads, *of_qk, *(Int64(stride) for stride in state.stride()[:3])])

    return launch
