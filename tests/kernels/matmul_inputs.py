"""Inputs for a matmul that show what random ones hide."""

import torch

from klab.kernels.dtypes import torch_dtype


def cancelling(problem):
    """Sums that pass 65504 (fp16's largest) on the way, and cancel to a fortieth: a partial sum in 16 bits cannot survive it."""
    third = problem.k // 3
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(problem.m, problem.k, generator=generator) * 30
    w = torch.randn(problem.n, problem.k, generator=generator) * 30
    x[:, :third] *= 32
    x[:, third : 2 * third] = x[:, :third]
    w[:, third : 2 * third] = -w[:, :third]
    dtype = torch_dtype(problem.dtype)
    return {"x": x.to(dtype), "w": (w if problem.layout == "nt" else w.T.contiguous()).to(dtype)}


def nan_padded(problem):
    """Inputs whose rows lie in a wider buffer of NaN: whatever reads past a row's end shows."""
    padded = {}
    for name, tensor in problem.inputs(seed=3).items():
        wide = torch.full((tensor.shape[0], tensor.shape[1] + 8), float("nan"), dtype=tensor.dtype)
        padded[name] = wide[:, : tensor.shape[1]].copy_(tensor)
    return padded
