"""PyTorch's copy."""

from __future__ import annotations

import torch  # noqa: F401  where it is absent, so is this kernel

from klab.kernels.contract import Chip, Config, Launch, Tensors, kernel
from klab.kernels.copy.problem import Copy


@kernel(Copy, backend="torch", kinds=("cuda", "cpu"), library=True)
def torch_copy(problem: Copy, config: Config, chip: Chip) -> Launch:
    """Tensor.copy_: cudaMemcpy where rows are dense, else an element-wise kernel."""

    def launch(inputs: Tensors, outputs: Tensors) -> None:
        outputs["out"].copy_(inputs["x"])

    return launch
