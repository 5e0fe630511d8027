"""Sampling by torch's operators, with a sort of the whole vocabulary where tokens are filtered, and by torch.compile."""

from __future__ import annotations

import functools

import torch

from klab.kernels.contract import Chip, Config, Launch, Tensors, kernel
from klab.kernels.inductor import compiled
from klab.kernels.sampling.problem import Sampling


def sample(problem: Sampling, inputs: Tensors, outputs: Tensors) -> None:
    """The definition, row by row in parallel; float32."""
    logits, draw = inputs["logits"], inputs["draw"]
    if problem.greedy:
        outputs["token"].copy_(logits.argmax(dim=-1))
        return
    logits = logits.float()
    if problem.filtered:
        descending = logits.sort(dim=-1, descending=True).values
        least = descending[:, -1:]
        if 0 < problem.top_k < problem.vocab:
            least = descending[:, problem.top_k - 1 : problem.top_k]
        if problem.top_p < 1:
            # Ties with the k-th logit are kept and count in the total.
            weights = ((descending - descending[:, :1]) / problem.temperature).exp() * (descending >= least)
            running = weights.cumsum(dim=-1)
            last = (running < problem.top_p * running[:, -1:]).sum(dim=-1, keepdim=True)
            least = torch.maximum(least, descending.gather(-1, last))
        logits = logits.masked_fill(logits < least, float("-inf"))
    running = torch.softmax(logits / problem.temperature, dim=-1).cumsum(dim=-1)
    # A draw of 1 - 2^-24 may round up to the total, which no token exceeds.
    total = running[:, -1:]
    target = torch.minimum(draw[:, None] * total, torch.nextafter(total, torch.zeros_like(total)))
    outputs["token"].copy_(torch.searchsorted(running, target, right=True)[:, 0])


@kernel(Sampling, backend="torch", library=True, kinds=("cuda", "cpu"))
def torch_sort(problem: Sampling, config: Config, chip: Chip) -> Launch:
    """torch's sort, softmax, cumsum and searchsorted (argmax when greedy), one launch after the other."""
    return functools.partial(sample, problem)


@kernel(Sampling, backend="torch", library=True)
def torch_compiled(problem: Sampling, config: Config, chip: Chip) -> Launch:
    """torch.compile (Inductor) of the same operators; the sort and the search stay torch's."""
    return compiled(functools.partial(sample, problem))
