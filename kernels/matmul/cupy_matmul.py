"""CuPy's matmul, on torch's tensors and torch's current stream."""

from __future__ import annotations

import os

import cupy
import torch

from klab.kernels.artifact import recording
from klab.kernels.contract import Chip, Config, Launch, Tensors, kernel
from klab.kernels.matmul.problem import Matmul


def fits(problem: Matmul, config: Config, chip: Chip) -> str | None:
    """16-bit floats and float32; bfloat16 needs a package that CuPy does not require, and TF32 is another problem."""
    if problem.dtype not in ("float16", "float32"):
        return f"CuPy has no {problem.dtype} of its own (bfloat16 only through ml_dtypes)"
    if problem.dtype == "float32" and os.environ.get("CUPY_TF32", "0") not in ("", "0"):
        return "CUPY_TF32 is set, which rounds float32 to TF32: unset it"
    return None


@kernel(Matmul, backend="cupy", library=True, fits=fits)
def cupy_matmul(problem: Matmul, config: Config, chip: Chip) -> Launch:
    """cupy.matmul: cuBLAS gemmEx without torch's heuristics; float16 and float32."""
    transposed = problem.layout == "nt"

    def launch(inputs: Tensors, outputs: Tensors) -> None:
        if recording() is not None:
            return  # a library has nothing to compile
        x, w, out = inputs["x"], inputs["w"], outputs["out"]
        device = out.device.index
        # Tensors are lent without a copy, and on one and the same stream without an event between the two, so a CUDA graph
        # captures it. The first call makes the cuBLAS handle, which capture forbids: warm up before. Padded rows are copied by
        # CuPy, which allocates: capture those only after a warm-up on the capturing stream.
        with cupy.cuda.Device(device), cupy.cuda.ExternalStream(torch.cuda.current_stream(device).cuda_stream, device):
            lent = cupy.from_dlpack(w)
            cupy.matmul(cupy.from_dlpack(x), lent.T if transposed else lent, out=cupy.from_dlpack(out))

    return launch
