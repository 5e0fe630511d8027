"""Narrow formats by definition: how tensors are scaled, rounded and packed, and what they stand for. References, not fast code.

fp8 is e4m3fn (largest 448) with float32 scales; int8 and int4 are symmetric; MX formats follow the OCP Microscaling specification 1.0
(blocks of 32, power-of-two scales); nvfp4 is NVIDIA's: blocks of 16 with e4m3 scales and one float32 scale per tensor. Packed formats
hold two elements per byte, the one with the even index in the low half. Scales multiply: value = element * scale.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from klab.kernels.dtypes import random_normal

if TYPE_CHECKING:
    import torch

FP8_MAX = 448.0
INT8_MAX = 127.0
INT4_MAX = 7.0
FP4_MAX = 6.0
MX_BLOCK = 32
NVFP4_BLOCK = 16
# The exponent of the largest power of two in e4m3 (256 = 2^8) and e2m1 (4 = 2^2).
EMAX = {"e4m3": 8, "e2m1": 2}
FP4_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
# A scale of zero or a denormal one would make what is divided by it infinite.
LEAST_AMAX = 1e-12

# Trained transformers have few channels whose activations are up to 20 times larger than the others (Dettmers et al. 2022,
# arXiv 2208.07339): one channel in 128 here, 16 times. They decide what a format with coarse scales loses.
OUTLIER_EVERY = 128
OUTLIER_GAIN = 16.0


def activations(shape: tuple[int, ...], dtype: str, *, seed: int, device: str, row_padding: int = 0, scale: float = 1.0) -> torch.Tensor:
    """Normal values times `scale` whose last dimension has outlier channels, the same ones in every row; see `random_normal`."""
    import torch

    values = random_normal(shape, dtype, seed=seed, device=device, row_padding=row_padding, scale=scale)
    if device != "meta":
        channels = torch.randperm(shape[-1], generator=torch.Generator().manual_seed(seed))[: max(1, shape[-1] // OUTLIER_EVERY)]
        values[..., channels.to(device)] *= OUTLIER_GAIN
    return values


def _blocked(x: torch.Tensor, block: tuple[int, int]) -> torch.Tensor:
    """[..., rows, columns] as [..., row blocks, block rows, column blocks, block columns], padded with zeros; 0: the whole dimension."""
    import torch

    rows, columns = x.shape[-2:]
    high, wide = block[0] or rows, block[1] or columns
    x = torch.nn.functional.pad(x.float(), (0, -columns % wide, 0, -rows % high))
    return x.reshape(*x.shape[:-2], -1, high, x.shape[-1] // wide, wide)


def _spread(scale: torch.Tensor, block: tuple[int, int], rows: int, columns: int) -> torch.Tensor:
    """Scales [..., row blocks, column blocks] as [..., rows, columns]."""
    high, wide = block[0] or rows, block[1] or columns
    return scale.float().repeat_interleave(high, dim=-2)[..., :rows, :].repeat_interleave(wide, dim=-1)[..., :columns]


def block_scales(x: torch.Tensor, block: tuple[int, int], largest: float) -> torch.Tensor:
    """float32 scales [..., row blocks, column blocks] that map the largest magnitude of each block to `largest`; 0: the whole dimension."""
    return _blocked(x, block).abs().amax(dim=(-3, -1)).clamp_min(LEAST_AMAX) / largest


def quantize_fp8(x: torch.Tensor, block: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """(e4m3fn [..., rows, columns], float32 scales [..., row blocks, column blocks]).

    block (0, 0): one scale per matrix; (1, 0): one per row; (1, 128) and (128, 128): DeepSeek's activations and weights.
    """
    import torch

    scale = block_scales(x, block, FP8_MAX)
    scaled = x.float() / _spread(scale, block, *x.shape[-2:])
    return scaled.clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn), scale


def quantize_int8(x: torch.Tensor, block: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """(int8, float32 scales); blocks as in `quantize_fp8`."""
    import torch

    scale = block_scales(x, block, INT8_MAX)
    scaled = (x.float() / _spread(scale, block, *x.shape[-2:])).round()
    return scaled.clamp(-INT8_MAX, INT8_MAX).to(torch.int8), scale


def dequantize(x: torch.Tensor, scale: torch.Tensor, block: tuple[int, int]) -> torch.Tensor:
    """float32 [..., rows, columns] of unpacked elements and scales [..., row blocks, column blocks]."""
    return x.float() * _spread(scale, block, *x.shape[-2:])


def quantize_int4(x: torch.Tensor, group: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Symmetric int4 in -7..7, a float32 scale per row and `group` columns: (packed [.., columns / 2], scales [.., columns / group])."""
    scale = block_scales(x, (1, group), INT4_MAX)
    return pack4((x.float() / _spread(scale, (1, group), *x.shape[-2:])).round().clamp(-INT4_MAX, INT4_MAX).to(_int8())), scale


def pack4(x: torch.Tensor) -> torch.Tensor:
    """Two elements of 4 bits (the low bits of an integer tensor) per byte, the even index in the low half; the last dimension is even."""
    import torch

    low, high = x[..., 0::2].to(torch.uint8) & 15, x[..., 1::2].to(torch.uint8) & 15
    return low | high << 4


def unpack4(packed: torch.Tensor) -> torch.Tensor:
    """The inverse of `pack4`: uint8 values of 0..15, twice as many columns."""
    import torch

    return torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2)


def int4_values(packed: torch.Tensor) -> torch.Tensor:
    """int8 values -8..7 of packed two's-complement nibbles."""
    nibbles = unpack4(packed).to(_int8())
    return nibbles - 16 * (nibbles > 7)


def encode_fp4(x: torch.Tensor) -> torch.Tensor:
    """e2m1 codes 0..15 (bit 3 is the sign) of the nearest values, ties to the even code; magnitudes above 6 become 6."""
    import torch

    size = x.float().abs().clamp_max(FP4_MAX)
    # Steps of 0.5, 1 and 2 below 2, 4 and 6. A code and its count of steps are odd together, so that `round`'s ties to even are ours.
    code = torch.where(size < 2, (size * 2).round(), torch.where(size < 4, size.round() + 2, (size / 2).round() + 4))
    return (code + 8 * (x < 0)).to(torch.uint8)


def fp4_values(codes: torch.Tensor) -> torch.Tensor:
    """float32 values of e2m1 codes; no table, which would have to be copied to the device (and may not be while a graph is captured)."""
    import torch

    # Sign, exponent and mantissa where float16 has its own, whose exponents are biased by 15 instead of 1.
    wide = codes.to(torch.int16)
    return ((wide << 12 & -0x8000) | (wide & 7) << 9).view(torch.float16).float() * 2.0**14


def quantize_mx(x: torch.Tensor, element: str) -> tuple[torch.Tensor, torch.Tensor]:
    """MX blocks of 32 columns: (e4m3fn, or packed e2m1 as uint8; biased exponents uint8 [..., columns / 32], scale = 2^(e - 127)).

    `element` is "e4m3" or "e2m1". Columns are a multiple of 32.
    """
    import torch

    blocks = x.float().reshape(*x.shape[:-1], -1, MX_BLOCK)
    amax = blocks.abs().amax(dim=-1).clamp_min(2.0**-120)
    # From the bits: log2 of the largest float32 below a power of two rounds up to that power's. frexp's mantissa is in [0.5, 1).
    exponent = (torch.frexp(amax).exponent - 1 - EMAX[element]).clamp(-127, 127).float()
    scaled = (blocks / torch.exp2(exponent)[..., None]).flatten(-2)
    biased = (exponent + 127).to(torch.uint8)
    if element == "e4m3":
        return scaled.clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn), biased
    return pack4(encode_fp4(scaled)), biased


def mx_scales(biased: torch.Tensor) -> torch.Tensor:
    """float32 scales of biased exponents."""
    import torch

    return torch.exp2(biased.float() - 127.0)


def quantize_nvfp4(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """nvfp4 blocks of 16 columns: (packed e2m1 uint8, e4m3fn scales [..., columns / 16], float32 scale of the tensor [1])."""
    import torch

    whole = (x.float().abs().amax().clamp_min(LEAST_AMAX) / (FP8_MAX * FP4_MAX)).reshape(1)
    blocks = x.float().reshape(*x.shape[:-1], -1, NVFP4_BLOCK)
    scale = (blocks.abs().amax(dim=-1) / FP4_MAX / whole).clamp(2.0**-9, FP8_MAX).to(torch.float8_e4m3fn)
    return pack4(encode_fp4((blocks / (scale.float() * whole)[..., None]).flatten(-2))), scale, whole


def _int8() -> torch.dtype:
    import torch

    return torch.int8
