import torch

from klab.kernels.contract import kernel
from klab.kernels.matmul.problem import Matmul


@kernel(Matmul, backend="torch", kinds=("cpu",), library=True)
def good(problem, config, chip):
    """Right."""
    return lambda inputs, outputs: torch.matmul(inputs["x"], inputs["w"].T, out=outputs["out"])
