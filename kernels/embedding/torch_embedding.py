"""torch's gathers, and torch.compile's."""

from __future__ import annotations

import torch

from klab.kernels.contract import Chip, Config, Launch, Tensors, kernel
from klab.kernels.embedding.problem import Embedding
from klab.kernels.inductor import compiled


@kernel(Embedding, backend="torch", library=True, kinds=("cuda", "cpu"))
def torch_index_select(problem: Embedding, config: Config, chip: Chip) -> Launch:
    """torch.index_select straight into the output."""

    def launch(inputs: Tensors, outputs: Tensors) -> None:
        torch.index_select(inputs["weight"], 0, inputs["ids"], out=outputs["out"])

    return launch


@kernel(Embedding, backend="torch", library=True, kinds=("cuda", "cpu"))
def torch_embedding(problem: Embedding, config: Config, chip: Chip) -> Launch:
    """torch.nn.functional.embedding, which has no out= and is copied."""

    def launch(inputs: Tensors, outputs: Tensors) -> None:
        outputs["out"].copy_(torch.nn.functional.embedding(inputs["ids"], inputs["weight"]))

    return launch


def gather(inputs: Tensors, outputs: Tensors) -> None:
    """What Inductor is given."""
    outputs["out"].copy_(inputs["weight"][inputs["ids"]])


@kernel(Embedding, backend="torch", library=True)
def torch_compiled(problem: Embedding, config: Config, chip: Chip) -> Launch:
    """torch.compile (Inductor) of an indexed read."""
    return compiled(gather)
