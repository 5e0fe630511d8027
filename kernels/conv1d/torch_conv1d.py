"""PyTorch's convolution: cuDNN on a GPU, oneDNN on a CPU; and the matrix multiplication that a convolution is."""

from __future__ import annotations

import torch
from torch.nn import functional

from klab.kernels.contract import Chip, Config, Launch, Tensors, kernel
from klab.kernels.conv1d.problem import Conv1d


def _exact_sums() -> None:
    """No TF32 and no partial sums in the output's dtype: process-wide switches, set to what the problem defines."""
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False


@kernel(Conv1d, backend="torch", kinds=("cuda", "cpu"), library=True)
def torch_conv1d(problem: Conv1d, config: Config, chip: Chip) -> Launch:
    """torch conv1d on transposed views (the library may copy them to its own order); its result is copied to the output."""
    _exact_sums()

    def launch(inputs: Tensors, outputs: Tensors) -> None:
        x, w = inputs["x"].transpose(1, 2), inputs["w"].transpose(1, 2)
        result = functional.conv1d(x, w, stride=problem.stride, padding=problem.padding)
        outputs["out"].copy_(result.transpose(1, 2))

    return launch


@kernel(Conv1d, backend="torch", kinds=("cuda", "cpu"), library=True)
def torch_conv2d_channels_last(problem: Conv1d, config: Config, chip: Chip) -> Launch:
    """torch conv2d of height 1 in memory format channels_last, which is the tensors' own; its result is copied to the output."""
    _exact_sums()

    def launch(inputs: Tensors, outputs: Tensors) -> None:
        x, w = inputs["x"], inputs["w"]
        # [batch, channels, 1, frames] over the same memory; a size of 1 gets the stride that the format asks for.
        x = x.as_strided((x.shape[0], x.shape[2], 1, x.shape[1]), (x.stride(0), 1, x.stride(0), x.stride(1)), x.storage_offset())
        w = w.as_strided((w.shape[0], w.shape[2], 1, w.shape[1]), (w.stride(0), 1, w.stride(0), w.stride(1)), w.storage_offset())
        result = functional.conv2d(x, w, stride=(1, problem.stride), padding=(0, problem.padding))
        outputs["out"].copy_(result[:, :, 0].transpose(1, 2))

    return launch


@kernel(Conv1d, backend="torch", kinds=("cuda", "cpu"))
def torch_unfold_mm(problem: Conv1d, config: Config, chip: Chip) -> Launch:
    """Copies the frames of every output beside each other (width times the bytes of x) and multiplies once by torch.mm."""
    _exact_sums()
    p = problem
    buffers: dict[torch.device, tuple[torch.Tensor, torch.Tensor]] = {}

    def launch(inputs: Tensors, outputs: Tensors) -> None:
        x, w, out = inputs["x"], inputs["w"], outputs["out"]
        if x.device not in buffers:
            # The frames of padding are zero once and for all.
            padded = torch.zeros((p.batch, p.frames + 2 * p.padding, p.channels_in), dtype=x.dtype, device=x.device)
            buffers[x.device] = padded, torch.empty((p.batch, p.frames_out, p.width, p.channels_in), dtype=x.dtype, device=x.device)
        padded, columns = buffers[x.device]
        padded[:, p.padding : p.padding + p.frames].copy_(x)
        columns.copy_(padded.unfold(1, p.width, p.stride).transpose(2, 3))
        w = w.reshape(p.channels_out, p.taps)  # a view, unless its rows are padded
        torch.mm(columns.view(-1, p.taps), w.t(), out=out.view(-1, p.channels_out))

    return launch
