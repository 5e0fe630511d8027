"""The routed experts of a mixture whose weights alone are narrow: int4 (Kimi K2) and mxfp4 (gpt-oss)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from klab.kernels.contract import Problem, Tensors
from klab.kernels.dtypes import SHORT, SIZE_BYTES, UNIT_ROUNDOFF, torch_dtype
from klab.kernels.errors import UsageError
from klab.kernels.expert_routing import experts_hit, with_rows_apart
from klab.kernels.fused_moe.problem import FusedMoe
from klab.kernels.quantize import MX_BLOCK, activations, fp4_values, int4_values, mx_scales, quantize_int4, quantize_mx, unpack4

if TYPE_CHECKING:
    import torch

FORMATS = ("int4", "mxfp4")
MATRICES = ("w_gate_up", "w_down")


@dataclass(frozen=True)
class WeightOnlyMoe(Problem):
    """FusedMoe's sum with weights that are unpacked to `dtype` before they are multiplied; activations stay as they are.

    inputs: x, topk_ids, topk_weights as FusedMoe's; w_gate_up uint8 [local, up_rows, hidden / 2] and w_down uint8 [local, hidden,
    intermediate / 2], the even column in the low half of a byte (quantize.pack4); their scales w_gate_up_scale and w_down_scale [local,
    rows, groups], one per row and `group` columns, the last group may be short: of `dtype` for "int4" (-7..7, as compressed-tensors
    checkpoints hold them), biased exponents uint8 for "mxfp4" (e2m1 elements, scale 2^(e - 127), always groups of 32).
    outputs: out [tokens, hidden], `dtype`.
    """

    operator: ClassVar[str] = "weight_only_moe"

    tokens: int
    hidden: int
    intermediate: int
    experts: int
    top_k: int
    dtype: str = "bfloat16"
    format: str = "mxfp4"
    group: int = MX_BLOCK
    skew: float = 0.0
    local_experts: int = 0
    gated: bool = True
    swiglu_limit: float = 0.0

    def __post_init__(self) -> None:
        if self.format not in FORMATS:
            raise UsageError(f"weight_only_moe knows {' and '.join(FORMATS)}, not {self.format!r}")
        if self.hidden % 2 or self.intermediate % 2:
            raise UsageError(f"two columns share a byte: hidden and intermediate are even, not {self.hidden} and {self.intermediate}")
        if self.group < MX_BLOCK or self.group & (self.group - 1) or (self.format == "mxfp4" and self.group != MX_BLOCK):
            raise UsageError(f"group is a power of two of at least {MX_BLOCK} (mxfp4: {MX_BLOCK}), not {self.group}")
        _ = self.plain  # the other fields are checked there

    @property
    def plain(self) -> FusedMoe:
        """The same experts with weights of `dtype`."""
        shape = (self.tokens, self.hidden, self.intermediate, self.experts, self.top_k, self.dtype)
        return FusedMoe(*shape, "", self.skew, self.local_experts, self.gated, self.swiglu_limit)

    @property
    def local(self) -> int:
        """Experts whose weights are here."""
        return self.plain.local

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """(rows, columns) of an expert's two matrices."""
        return {"w_gate_up": (self.plain.up_rows, self.hidden), "w_down": (self.hidden, self.intermediate)}

    @property
    def scale_dtype(self) -> str:
        """The name of the scales' dtype."""
        return self.dtype if self.format == "int4" else "uint8"

    def inputs(self, *, seed: int, device: str = "cpu", row_padding: int = 0) -> Tensors:
        import torch

        of_scales = torch.uint8 if self.format == "mxfp4" else torch_dtype(self.dtype)
        if device == "meta":
            made = {
                name: t for name, t in self.plain.inputs(seed=seed, device=device, row_padding=row_padding).items() if name not in MATRICES
            }
            for name, (rows, columns) in self.shapes.items():
                made[name] = with_rows_apart(
                    torch.empty((self.local, rows, columns // 2), dtype=torch.uint8, device="meta"), 2 * row_padding
                )
                scales = torch.empty((self.local, rows, -(-columns // self.group)), dtype=of_scales, device="meta")
                made[f"{name}_scale"] = with_rows_apart(scales, row_padding)
            return made
        wide = self.wide_inputs(seed=seed, device=device)
        made = {"topk_ids": wide["topk_ids"]} | {name: with_rows_apart(wide[name], row_padding) for name in ("x", "topk_weights")}
        for name, (rows, columns) in self.shapes.items():
            packed = torch.empty((self.local, rows, columns // 2), dtype=torch.uint8, device=device)
            scales = torch.empty((self.local, rows, -(-columns // self.group)), dtype=of_scales, device=device)
            for e in range(self.local):  # one expert at a time: float32 copies of all would take gigabytes
                narrow, scale = self._packed(wide[name][e])
                packed[e].copy_(narrow)
                scales[e].copy_(scale)
            # Packed rows lie as many bytes further apart as rows of 16-bit floats do.
            made[name], made[f"{name}_scale"] = with_rows_apart(packed, 2 * row_padding), with_rows_apart(scales, row_padding)
        return made

    def _packed(self, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(packed, scales) of one matrix; the last group is filled up with zeros, which are not kept."""
        import torch

        columns = weight.shape[1]
        whole = torch.nn.functional.pad(weight, (0, -columns % self.group))
        narrow, scale = quantize_int4(whole, self.group) if self.format == "int4" else quantize_mx(whole, "e2m1")
        return narrow[:, : columns // 2], scale

    def unpacked(self, inputs: Tensors, name: str, expert: int) -> torch.Tensor:
        """float32 [rows, columns] of one expert's matrix."""
        import torch

        packed, scale = inputs[name][expert], inputs[f"{name}_scale"][expert]
        values, factors = (
            (int4_values(packed).float(), scale.float()) if self.format == "int4" else (fp4_values(unpack4(packed)), mx_scales(scale))
        )
        spread = factors.repeat_interleave(self.group, dim=1)[:, : values.shape[1]]
        return torch.mul(values, spread)

    def outputs(self, *, device: str = "cpu") -> Tensors:
        return self.plain.outputs(device=device)

    def reference(self, inputs: Tensors) -> Tensors:
        import torch

        wide = {name: inputs[name] for name in ("x", "topk_ids", "topk_weights")}
        for name in MATRICES:
            wide[name] = torch.stack([self.unpacked(inputs, name, e) for e in range(self.local)])
        return self.plain.reference(wide)

    def activate(self, up: torch.Tensor) -> torch.Tensor:
        """FusedMoe.activate."""
        return self.plain.activate(up)

    def flops(self) -> float:
        return self.plain.flops()

    def bytes_moved(self) -> float:
        # Of the visited experts' weights alone, in their packed size and with their scales.
        scale_bytes = SIZE_BYTES[self.dtype] if self.format == "int4" else 1
        weights = sum(rows * (columns / 2 + scale_bytes * -(-columns // self.group)) for rows, columns in self.shapes.values())
        hit = experts_hit(self.tokens, self.experts, self.top_k, self.skew, self.local)
        return hit * weights + self.tokens * (2.0 * self.hidden * SIZE_BYTES[self.dtype] + 8.0 * self.top_k)

    def tolerance(self) -> float:
        # Weights that are scaled in `dtype` before the product are rounded once more than FusedMoe's (mxfp4's powers of two are not).
        u = UNIT_ROUNDOFF[self.dtype]
        return self.plain.tolerance() + (u if self.dtype != "float32" else 0.0)

    def wide(self) -> FusedMoe:
        return self.plain

    def wide_inputs(self, *, seed: int, device: str = "cpu") -> Tensors:
        found = self.plain.inputs(seed=seed, device=device)
        found["x"] = activations((self.tokens, self.hidden), self.dtype, seed=seed, device=device)
        return found

    def label(self) -> str:
        plain = self.plain.label().removeprefix("fused_moe ").replace(f" {SHORT[self.dtype]}", "", 1)
        return f"weight_only_moe {plain} {self.format}g{self.group} {SHORT[self.dtype]}"

    @property
    def quantization(self) -> str:
        """The format's name in a plan. The experts of gpt-oss are mxfp4 with activations of 16 bits, which "mxfp4" alone would not say."""
        return {"int4": "w4a16", "mxfp4": "w4a16_mxfp4"}[self.format]

    @classmethod
    def examples(cls) -> list[Problem]:
        made = [
            # Short last groups, most experts unvisited; more visits than a tile of 16 rows holds; experts elsewhere; one of many choices.
            cls(1, 80, 48, 8, 2, "float16"),
            cls(3, 40, 24, 6, 2, "float32", local_experts=5, gated=False),
            cls(26, 72, 56, 2, 1, "float16", skew=1.0, swiglu_limit=0.5),
            cls(9, 160, 136, 6, 3, "float16", "int4", 64, skew=1.2, local_experts=4),
            cls(2, 136, 70, 12, 1, "float32", "int4", 128),
        ]
        return [*made, cls(9, 160, 136, 6, 3, "bfloat16", "int4", 32), cls(1, 80, 48, 8, 2, "bfloat16")]

    @classmethod
    def approximations(cls, wide: Problem) -> list[Problem]:
        if not isinstance(wide, FusedMoe) or wide.format or wide.dtype == "float32" or wide.hidden % 2 or wide.intermediate % 2:
            return []
        shape = (wide.tokens, wide.hidden, wide.intermediate, wide.experts, wide.top_k, wide.dtype)
        rest = (wide.skew, wide.local_experts, wide.gated, wide.swiglu_limit)
        return [cls(*shape, "mxfp4", MX_BLOCK, *rest), cls(*shape, "int4", MX_BLOCK, *rest)]

    @classmethod
    def at_scale(cls) -> list[Problem]:
        """gpt-oss-120b's experts for a decode step and a prefill, Kimi K2's (one of 8 tensor-parallel shards) for a decode step."""
        return [
            cls(32, 2880, 2880, 128, 4, swiglu_limit=7.0),
            cls(1, 2880, 2880, 128, 4, swiglu_limit=7.0),
            cls(4096, 2880, 2880, 128, 4, swiglu_limit=7.0),
            cls(32, 7168, 256, 384, 8, format="int4"),
        ]
