"""Scales of blocks of 16 or 32 in the order that Blackwell's tensor cores and cuBLAS read them: tiles of 128 rows by 4 scales.

A tile is 512 bytes: byte 16 (row % 32) + 4 (row / 32) + column for row 0..127 and column 0..3; tiles follow each other along k first
(cuBLAS documentation, "1D Block Scaling Factors Layout"; PTX ISA, tcgen05 block scaling).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from klab.kernels.triton_support import cdiv

if TYPE_CHECKING:
    import torch

ROWS, COLUMNS = 128, 4


def tiles_of(scale: torch.Tensor) -> tuple[int, int]:
    """How many tiles along the rows, and along k, hold the scales [rows, columns]."""
    return cdiv(scale.shape[0], ROWS), cdiv(scale.shape[1], COLUMNS)


def pack(scale: torch.Tensor, padded: torch.Tensor, packed: torch.Tensor) -> None:
    """Write uint8 scales [rows, columns] in the packed order to `packed`, a flat tensor of all bytes of the tiles.

    `padded` is zeroed uint8 [row tiles * 128, column tiles * 4], whose rest stays zero.
    """
    high, wide = tiles_of(scale)
    padded[: scale.shape[0], : scale.shape[1]].copy_(scale)
    packed.view(high, wide, 32, 4, 4).copy_(padded.view(high, 4, 32, wide, 4).permute(0, 3, 2, 1, 4))
