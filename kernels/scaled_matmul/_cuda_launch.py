"""What the CUDA C++ kernels of this operator share: arguments, partial sums of splits along k, and their second pass."""

from __future__ import annotations

from typing import TYPE_CHECKING

from klab.kernels.contract import Chip, Launch, Tensors
from klab.kernels.cuda_module import ELEMENT, CudaKernel, Grid, Int64
from klab.kernels.errors import UsageError
from klab.kernels.scaled_matmul._tiles import row_strides
from klab.kernels.scaled_matmul.problem import ScaledMatmul
from klab.kernels.triton_support import cdiv

if TYPE_CHECKING:
    import torch

SUM_SOURCE = r"""
#include "device.cuh"
using namespace klab;

// Block (row, c): 256 columns; always in the order of the splits, so that the same inputs give the same bits.
KLAB_KERNEL(sum_splits, 256)(const float* __restrict__ parts, ELEMENT* __restrict__ out, int m, int n, int splits, int64_t out_stride) {
    const int64_t row = block_idx_x();
    const int column = block_idx_y() * 256 + thread_idx();
    if (column >= n) return;
    float total = 0.0f;
    for (int split = 0; split < splits; ++split) total += parts[(split * static_cast<int64_t>(m) + row) * n + column];
    out[row * out_stride + column] = from_float<ELEMENT>(total);
}
"""


def split_launch(problem: ScaledMatmul, multiply: CudaKernel, grid: Grid, threads: int, part: int, chip: Chip) -> Launch:
    """The launch of `multiply` on grid (tiles, splits of `part` of k, 1), and of the sum over the splits where there are several.

    `multiply` takes x, w, x_scale, w_scale, to, m, n, k, part, whether rows of `to` are whole 16-byte chunks, and the strides of x, w,
    to, x_scale and w_scale. UsageError at launch for rows that do not start at multiples of 16 bytes.
    """
    import torch

    p, splits = problem, grid[1]
    add_up = CudaKernel(SUM_SOURCE, "sum_splits", chip, {"ELEMENT": ELEMENT[p.dtype]})
    partials: dict[torch.device, torch.Tensor] = {}

    def launch(inputs: Tensors, outputs: Tensors) -> None:
        x, w, out = inputs["x"], inputs["w"], outputs["out"]
        if any(matrix.stride(0) % 16 or matrix.data_ptr() % 16 for matrix in (x, w)):
            raise UsageError(f"{multiply.name} needs x and w with rows that start at multiples of 16 bytes")
        to, to_stride = out, out.stride(0)
        if splits > 1:
            if out.device not in partials:
                partials[out.device] = torch.empty((splits, p.m, p.n), dtype=torch.float32, device=out.device)
            to, to_stride = partials[out.device], p.n
        chunk = 16 // to.element_size()
        aligned = p.n % chunk == 0 and to_stride % chunk == 0 and to.data_ptr() % 16 == 0
        strides = [Int64(stride) for stride in (x.stride(0), w.stride(0), to_stride, *row_strides(p, inputs))]
        multiply.launch(grid, threads, [x, w, inputs["x_scale"], inputs["w_scale"], to, p.m, p.n, p.k, part, int(aligned), *strides])
        if splits > 1:
            add_up.launch((p.m, cdiv(p.n, 256), 1), 256, [to, out, p.m, p.n, splits, Int64(out.stride(0))])

    return launch
