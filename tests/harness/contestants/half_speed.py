import torch

from klab.kernels.contract import kernel
from klab.kernels.matmul.problem import Matmul


@kernel(Matmul, backend="cpu", kinds=("cpu",))
def half_speed(problem, config, chip):
    """Right, with twice the work."""

    def launch(inputs, outputs):
        for _ in range(2):
            torch.matmul(inputs["x"], inputs["w"].T, out=outputs["out"])

    return launch
