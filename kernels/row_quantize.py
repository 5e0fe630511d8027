"""fp8 by rows or by groups of 128 columns, as norms and activations write it for the matmul behind them: the definition, not fast code.

Formats: "" (none), "fp8_row" (one float32 scale per row), "fp8_group" (one per 128 columns; the last group may be shorter).
value = fp8 * scale; the largest magnitude of a row or group becomes 448.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from klab.kernels.dtypes import SIZE_BYTES, UNIT_ROUNDOFF, torch_dtype
from klab.kernels.errors import UsageError
from klab.kernels.quantize import FP8_MAX, LEAST_AMAX, quantize_fp8

if TYPE_CHECKING:
    import torch

FORMATS = ("", "fp8_row", "fp8_group")
GROUP = 128


def check_format(operator: str, quantize: str) -> None:
    """UsageError for an unknown format."""
    if quantize not in FORMATS:
        raise UsageError(f"{operator} quantises to {', '.join(filter(None, FORMATS))} or not at all, not to {quantize!r}")


def scales_per_row(width: int, quantize: str) -> int:
    """Scales of a row of `width` elements; 0 without quantisation."""
    return {"": 0, "fp8_row": 1, "fp8_group": -(-width // GROUP)}[quantize]


def output_bytes(rows: int, width: int, quantize: str, dtype: str) -> int:
    """Bytes of `rows` x `width` outputs with their scales."""
    return rows * (width * (1 if quantize else SIZE_BYTES[dtype]) + 4 * scales_per_row(width, quantize))


def outputs(rows: int, width: int, quantize: str, dtype: str, device: str) -> dict[str, torch.Tensor]:
    """Uninitialised "out" [rows, width] (float8_e4m3fn when quantised) and, when quantised, "scale" [rows, scales per row] float32."""
    import torch

    out = torch.empty((rows, width), dtype=torch_dtype("float8_e4m3fn" if quantize else dtype), device=device)
    if not quantize:
        return {"out": out}
    return {"out": out, "scale": torch.empty((rows, scales_per_row(width, quantize)), dtype=torch.float32, device=device)}


def reference(wide: torch.Tensor, quantize: str) -> dict[str, torch.Tensor]:
    """What `outputs` hold for these unrounded values [rows, width]; fp8 values as float32."""
    if not quantize:
        return {"out": wide}
    out, scale = quantize_fp8(wide, (1, GROUP if quantize == "fp8_group" else 0))
    return {"out": out.float(), "scale": scale}


def fp8_tolerance(elements: int, dtype: str) -> float:
    """For fp8 values against the rightly rounded ones.

    A value that was first rounded to bf16 (off by at most 2^-9 of itself) ends on the other side of a tie in about 2% of cases, and is then
    off by one step of 1/8 to 1/16 of it: sqrt(0.02) * 0.09 = 1.3% in Frobenius norm. Truncation is 6% off the rounded values. A single flip
    among few elements does not average.
    """
    share = {"bfloat16": 0.025, "float16": 0.01, "float32": 0.003}[dtype]
    return share + 0.25 / math.sqrt(elements)


def scale_tolerance(dtype: str) -> float:
    """A scale is the largest magnitude times a constant: as exact as the values, which may have been rounded to `dtype` once."""
    return max(UNIT_ROUNDOFF[dtype], 1e-5)


def eager(wide: torch.Tensor, quantize: str, outputs: Mapping[str, torch.Tensor]) -> None:
    """Write what `reference` defines with torch's operators, for the baselines: `wide` [rows, width] in float32 or its own dtype."""
    import torch

    if not quantize:
        outputs["out"].copy_(wide)
        return
    rows, width = wide.shape
    group = GROUP if quantize == "fp8_group" else width
    wide = wide.float()
    padded = torch.nn.functional.pad(wide, (0, -width % group)) if width % group else wide
    blocks = padded.reshape(rows, -1, group)
    scale = blocks.abs().amax(dim=-1).clamp_min(LEAST_AMAX) / FP8_MAX
    outputs["scale"].copy_(scale)
    outputs["out"].copy_((blocks / scale[..., None]).reshape(rows, -1)[:, :width])
