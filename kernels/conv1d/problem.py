"""Convolution over time, as the front end of a speech encoder does it: every output frame sees a few neighbours and all channels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from klab.kernels.contract import Problem, Tensors
from klab.kernels.dtypes import SHORT, SIZE_BYTES, UNIT_ROUNDOFF, random_normal, torch_dtype
from klab.kernels.errors import UsageError


@dataclass(frozen=True)
class Conv1d(Problem):
    """out[b, t, o] = sum over j < width and c of x[b, t * stride + j - padding, c] * w[o, j, c]; frames outside x are zero.

    inputs: x [batch, frames, channels_in], w [channels_out, width, channels_in]; outputs: out [batch, frames_out, channels_out]; all
    `dtype`, summed in float32. Channels lie together, as in the encoder's layers: a checkpoint's [channels_out, channels_in, width] is
    permuted once when it is loaded. No bias.
    """

    operator: ClassVar[str] = "conv1d"

    batch: int
    frames: int
    channels_in: int
    channels_out: int
    width: int = 3
    stride: int = 1
    dtype: str = "bfloat16"
    padding: int = 1

    def __post_init__(self) -> None:
        if min(self.batch, self.frames, self.channels_in, self.channels_out, self.width, self.stride) < 1 or self.padding < 0:
            raise UsageError("conv1d needs a batch, frames, channels, width and stride of at least 1, and no negative padding")
        if self.padding >= self.width or self.frames + 2 * self.padding < self.width:
            raise UsageError(f"conv1d of width {self.width} has no output for {self.frames} frames and padding {self.padding}")

    @property
    def frames_out(self) -> int:
        """Frames of the output."""
        return (self.frames + 2 * self.padding - self.width) // self.stride + 1

    @property
    def taps(self) -> int:
        """Products per output: the k of the matrix multiplication that this is."""
        return self.width * self.channels_in

    def inputs(self, *, seed: int, device: str = "cpu", row_padding: int = 0) -> Tensors:
        x_shape, w_shape = (self.batch, self.frames, self.channels_in), (self.channels_out, self.width, self.channels_in)
        return {
            "x": random_normal(x_shape, self.dtype, seed=seed, device=device, row_padding=row_padding),
            # 1/sqrt(taps) keeps outputs of order one, as trained weights do.
            "w": random_normal(w_shape, self.dtype, seed=seed + 1, device=device, row_padding=row_padding, scale=self.taps**-0.5),
        }

    def outputs(self, *, device: str = "cpu") -> Tensors:
        import torch

        return {"out": torch.empty((self.batch, self.frames_out, self.channels_out), dtype=torch_dtype(self.dtype), device=device)}

    def reference(self, inputs: Tensors) -> Tensors:
        import torch

        x = torch.nn.functional.pad(inputs["x"].double(), (0, 0, self.padding, self.padding))
        w, end = inputs["w"].double(), (self.frames_out - 1) * self.stride + 1
        return {"out": torch.stack([x[:, j : j + end : self.stride] @ w[:, j].T for j in range(self.width)]).sum(0)}

    def flops(self) -> float:
        # Products with the zeros outside x are not needed, but every library computes them: they are 2 of 3 * frames.
        return 2.0 * self.batch * self.frames_out * self.channels_out * self.taps

    def bytes_moved(self) -> float:
        activations = self.batch * (self.frames * self.channels_in + self.frames_out * self.channels_out)
        return float(SIZE_BYTES[self.dtype]) * (activations + self.channels_out * self.taps)

    def tolerance(self) -> float:
        # As for matmul: one rounding costs about u/2; in float32 the order of accumulation dominates, and TF32 must fail.
        u = UNIT_ROUNDOFF[self.dtype] * (2.0 if self.batch * self.frames_out * self.channels_out < 64 else 1.0)
        return 4.0 * u * max(self.taps, 64) ** 0.5 if self.dtype == "float32" else u

    def label(self) -> str:
        shape = f"{self.batch}x{self.frames}x{self.channels_in}->{self.channels_out}"
        return f"conv1d {shape} w{self.width} s{self.stride} {SHORT[self.dtype]}"

    @classmethod
    def examples(cls) -> list[Problem]:
        shapes = [
            (1, 1, 1, 1, 3, 1, ("float16", "float32", "bfloat16")), (2, 33, 40, 72, 3, 2, ("float16", "bfloat16")),
            (1, 70, 16, 24, 3, 1, ("float32", "bfloat16")), (2, 6, 5, 7, 3, 2, ("float16", "float32")),
            (1, 9, 24, 130, 2, 1, ("float16", "float32")),
        ]  # fmt: skip
        return [
            cls(batch, frames, c_in, c_out, width, stride, dtype)
            for batch, frames, c_in, c_out, width, stride, dtypes in shapes
            for dtype in dtypes
        ]

    @classmethod
    def at_scale(cls) -> list[Problem]:
        """Whisper large v3: the second layer, which has nine tenths of the work, and the first, for eight clips of 30 s; then one clip."""
        return [cls(8, 3000, 1280, 1280, stride=2), cls(8, 3000, 128, 1280), cls(1, 3000, 1280, 1280, stride=2)]
