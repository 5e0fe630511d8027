"""What the CUDA C++ weight-only kernels share on the host: their defines and what they refuse."""

from __future__ import annotations

from typing import TYPE_CHECKING

from klab.kernels.contract import Chip
from klab.kernels.cuda_module import ELEMENT
from klab.kernels.dtypes import SIZE_BYTES
from klab.kernels.weight_only_matmul.problem import WeightOnlyMatmul

if TYPE_CHECKING:
    import torch

# Columns of k in the 64 bytes of a row that a warp takes at a time.
STEP_K = {"int4": 128, "fp8": 64}


def unfit(problem: WeightOnlyMatmul, chip: Chip) -> str | None:
    """Why no configuration can run here, or None."""
    if SIZE_BYTES[problem.dtype] != 2:
        return f"{problem.dtype} has no tensor-core product of full precision"
    if chip.target < 80:
        return "needs compute capability 8.0"
    if problem.groups > 1 and problem.group % STEP_K[problem.format]:
        return f"a step of {STEP_K[problem.format]} columns would have several scales"
    return None


def common_defines(problem: WeightOnlyMatmul) -> dict[str, str | int]:
    """The defines that `_cuda_fragments` asks for, but ALIGNED; one group is one scale per row."""
    return {
        "ELEMENT": ELEMENT[problem.dtype],
        "SCALE": ELEMENT[problem.scale_dtype],
        "INT4": int(problem.format == "int4"),
        "GROUP": problem.group if problem.groups > 1 else 0,
    }


def in_chunks(matrix: torch.Tensor) -> bool:
    """Whether each row is whole 16-byte chunks at multiples of 16 bytes, so that no chunk runs over the row's end."""
    size = matrix.element_size()
    return all(value % 16 == 0 for value in (matrix.shape[1] * size, matrix.stride(0) * size, matrix.data_ptr()))
