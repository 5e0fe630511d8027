"""Names of dtypes, their sizes and what a rounding costs; plus seeded random tensors."""

from __future__ import annotations

from typing import TYPE_CHECKING

from klab.kernels.errors import UsageError

if TYPE_CHECKING:
    import torch

SIZE_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2, "float8_e4m3fn": 1, "int8": 1, "uint8": 1, "int32": 4, "int64": 8}
SHORT = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16", "float8_e4m3fn": "fp8", "int8": "int8", "float64": "fp64"}
LONG = {short: long for long, short in SHORT.items()} | {"half": "float16", "float": "float32"}

# Unit round-off: half the distance from 1 to the next number. bf16 has 8 significand bits, fp16 11, fp32 24.
UNIT_ROUNDOFF = {"bfloat16": 2.0**-8, "float16": 2.0**-11, "float32": 2.0**-24, "float8_e4m3fn": 2.0**-4}


def long_name(name: str) -> str:
    """Accept `bf16` and `bfloat16` alike; UsageError lists what is known."""
    name = LONG.get(name, name)
    if name not in SIZE_BYTES:
        raise UsageError(f"unknown dtype {name!r}; known: {', '.join(sorted(SHORT.values()))}")
    return name


def torch_dtype(name: str) -> torch.dtype:
    """The torch dtype of a long name."""
    import torch

    dtype: torch.dtype = getattr(torch, name)
    return dtype


def random_normal(shape: tuple[int, ...], dtype: str, *, seed: int, device: str, row_padding: int = 0, scale: float = 1.0) -> torch.Tensor:
    """Standard normal values times `scale`, drawn in float32 and rounded once; the same seed and device give the same tensor.

    Never zeros or a ramp: an H200 multiplies zeros 13% faster than random numbers, because they cost no switching power.
    With `row_padding`, the rows of the last dimension lie that many elements further apart. On "meta" only the shape is made.
    """
    import torch

    padded = (*shape[:-1], shape[-1] + row_padding)
    if device == "meta":
        return torch.empty(padded, dtype=torch_dtype(dtype), device=device)[..., : shape[-1]]
    generator = torch.Generator(device=device).manual_seed(seed)
    values = torch.randn(padded, generator=generator, device=device, dtype=torch.float32)
    return values.mul_(scale).to(torch_dtype(dtype))[..., : shape[-1]]
