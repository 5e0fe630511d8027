"""The routed experts of a mixture-of-experts layer, from the router's choice to the weighted sum."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from klab.kernels.contract import Problem, Tensors
from klab.kernels.dtypes import SHORT, SIZE_BYTES, UNIT_ROUNDOFF, random_normal, torch_dtype
from klab.kernels.errors import UsageError
from klab.kernels.expert_routing import draw_experts, experts_hit, local_share, need_choices, with_rows_apart
from klab.kernels.quantize import activations, dequantize, quantize_fp8

if TYPE_CHECKING:
    import torch

BLOCK = 128  # DeepSeek's: weights share a scale per 128x128, activations per 1x128
SWIGLU_ALPHA = 1.702  # gpt-oss: gate * sigmoid(1.702 gate)


@dataclass(frozen=True)
class FusedMoe(Problem):
    """out[t] = sum over t's experts e < local_experts of topk_weights * (act(x[t] @ w_gate_up[e]^T) @ w_down[e]^T).

    inputs: x [tokens, hidden], w_gate_up [local, 2 intermediate, hidden] (gate rows first; without `gated` [local, intermediate, hidden]),
    w_down [local, hidden, intermediate], topk_ids int32 [tokens, top_k] in 0..experts-1 and distinct in a row, topk_weights float32
    [tokens, top_k]; `local` = local_experts or experts. Choices of experts >= local (they are on other GPUs) add nothing.
    outputs: out [tokens, hidden], `dtype`.

    act is silu(gate) * up; with swiglu_limit > 0 gpt-oss's min(gate, limit) * sigmoid(1.702 that) * (clamp(up, +-limit) + 1); without
    `gated` relu(up)^2 (Nemotron's, the ungated experts that are served).

    format "fp8_block": weights are float8_e4m3fn with float32 w_gate_up_scale and w_down_scale, one per 128x128; x and the activated
    rows are quantised to fp8 with a scale per 1x128 inside the launch. `skew` is the Zipf exponent of the experts' popularity.
    """

    operator: ClassVar[str] = "fused_moe"

    tokens: int
    hidden: int
    intermediate: int
    experts: int
    top_k: int
    dtype: str = "bfloat16"
    format: str = ""
    skew: float = 0.0
    local_experts: int = 0
    gated: bool = True
    swiglu_limit: float = 0.0

    def __post_init__(self) -> None:
        if min(self.tokens, self.hidden, self.intermediate) < 1:
            raise UsageError(f"fused_moe needs tokens, hidden, intermediate >= 1, not {self.tokens}, {self.hidden}, {self.intermediate}")
        need_choices("fused_moe", self.experts, self.top_k)
        if self.format not in ("", "fp8_block"):
            raise UsageError(f"fused_moe format is '' or fp8_block, not {self.format!r}")
        if not 0 <= self.local_experts <= self.experts:
            raise UsageError(f"fused_moe needs 0 <= local_experts <= experts, not {self.local_experts} of {self.experts}")
        if self.swiglu_limit and not self.gated:
            raise UsageError("fused_moe: swiglu_limit is for gated experts")

    @property
    def local(self) -> int:
        """Experts whose weights are here."""
        return self.local_experts or self.experts

    @property
    def up_rows(self) -> int:
        """Rows of one expert's first matrix."""
        return self.intermediate * (2 if self.gated else 1)

    def inputs(self, *, seed: int, device: str = "cpu", row_padding: int = 0) -> Tensors:
        import torch

        if device == "meta":
            return self._shapes(row_padding)
        ids = draw_experts(self.tokens, self.experts, self.top_k, self.skew, seed=seed + 3, device=device)
        choice = random_normal((self.tokens, self.top_k), "float32", seed=seed + 4, device=device)
        narrow = {"x": self._x(seed, device)}
        for i, (name, rows, columns) in enumerate(self._matrices()):
            # One expert at a time: DeepSeek V3's 256 are 7.5e9 elements, and float32 normals of all at once would be 30 GB.
            every = [self._expert(rows, columns, seed + 1000 * (i + 1) + e, device) for e in range(self.local)]
            if self.format:
                pairs = [quantize_fp8(w, (BLOCK, BLOCK)) for w in every]
                every = [w for w, _ in pairs]
                narrow[f"{name}_scale"] = torch.stack([scale for _, scale in pairs])
            narrow[name] = torch.stack(every)
        # Sigmoids, as DeepSeek V3's and Llama 4's: none is 1 and a token's do not sum to 1, so that a kernel that forgets or renormalises
        # them is found out even where top_k is 1.
        narrow["topk_weights"] = choice.sigmoid()
        return {"topk_ids": ids} | {name: with_rows_apart(tensor, row_padding) for name, tensor in narrow.items()}

    def _matrices(self) -> tuple[tuple[str, int, int], ...]:
        """(name, rows, columns) of an expert's two matrices."""
        return ("w_gate_up", self.up_rows, self.hidden), ("w_down", self.hidden, self.intermediate)

    def _x(self, seed: int, device: str) -> torch.Tensor:
        make = activations if self.format else random_normal
        return make((self.tokens, self.hidden), self.dtype, seed=seed, device=device)

    def _expert(self, rows: int, columns: int, seed: int, device: str) -> torch.Tensor:
        # 1/sqrt(columns) keeps gate, up and out of order one, as trained weights do.
        return random_normal((rows, columns), self.dtype, seed=seed, device=device, scale=columns**-0.5)

    def _shapes(self, row_padding: int) -> Tensors:
        import torch

        def empty(shape: tuple[int, ...], dtype: torch.dtype, padding: int = row_padding) -> torch.Tensor:
            return with_rows_apart(torch.empty(shape, dtype=dtype, device="meta"), padding)

        weights = torch.float8_e4m3fn if self.format else torch_dtype(self.dtype)
        chosen = (self.tokens, self.top_k)
        made = {"x": empty((self.tokens, self.hidden), torch_dtype(self.dtype)), "topk_ids": empty(chosen, torch.int32, 0)}
        for name, rows, columns in self._matrices():
            made[name] = empty((self.local, rows, columns), weights)
            if self.format:
                made[f"{name}_scale"] = empty((self.local, -(-rows // BLOCK), -(-columns // BLOCK)), torch.float32)
        return made | {"topk_weights": empty(chosen, torch.float32)}

    def outputs(self, *, device: str = "cpu") -> Tensors:
        import torch

        return {"out": torch.empty((self.tokens, self.hidden), dtype=torch_dtype(self.dtype), device=device)}

    def reference(self, inputs: Tensors) -> Tensors:
        import torch

        x, ids = self._rounded(inputs["x"].double()), inputs["topk_ids"]
        out = torch.zeros((self.tokens, self.hidden), dtype=torch.float64, device=x.device)
        for e in range(self.local):
            token, slot = (ids == e).nonzero(as_tuple=True)
            if len(token):
                up = x[token] @ self._weight(inputs, "w_gate_up", e).T
                down = self._rounded(self.activate(up)) @ self._weight(inputs, "w_down", e).T
                out.index_add_(0, token, down * inputs["topk_weights"][token, slot].double()[:, None])
        return {"out": out}

    def activate(self, up: torch.Tensor) -> torch.Tensor:
        """act of rows [.., up_rows], in their own precision: [.., intermediate]."""
        if not self.gated:
            return up.relu().square()
        gate, up = up[..., : self.intermediate], up[..., self.intermediate :]
        if self.swiglu_limit:
            gate, up = gate.clamp(max=self.swiglu_limit), up.clamp(-self.swiglu_limit, self.swiglu_limit)
            return gate * (SWIGLU_ALPHA * gate).sigmoid() * (up + 1)
        return gate * gate.sigmoid() * up

    def _rounded(self, rows: torch.Tensor) -> torch.Tensor:
        """Rows as the matrix product sees them, float64: through fp8 where the format says so."""
        return dequantize(*quantize_fp8(rows, (1, BLOCK)), (1, BLOCK)).double() if self.format else rows

    def _weight(self, inputs: Tensors, name: str, expert: int) -> torch.Tensor:
        weight = inputs[name][expert]
        return (dequantize(weight, inputs[f"{name}_scale"][expert], (BLOCK, BLOCK)) if self.format else weight).double()

    @property
    def visits(self) -> float:
        """Rows of the expert matrices' products: expected (it is the routing that is drawn), exact without skew and sharding."""
        return self.tokens * local_share(self.experts, self.top_k, self.skew, self.local)

    def flops(self) -> float:
        return 2.0 * self.visits * self.hidden * (self.up_rows + self.intermediate)

    def bytes_moved(self) -> float:
        # Only the weights of visited experts are read: their expected number, since each seed draws another routing.
        size = SIZE_BYTES["float8_e4m3fn" if self.format else self.dtype]
        weights = float(self.hidden * (self.up_rows + self.intermediate) * size)
        if self.format:
            weights += 4.0 * sum(-(-rows // BLOCK) * -(-columns // BLOCK) for _, rows, columns in self._matrices())
        hit = experts_hit(self.tokens, self.experts, self.top_k, self.skew, self.local)
        return hit * weights + self.tokens * (2.0 * self.hidden * SIZE_BYTES[self.dtype] + 8.0 * self.top_k)

    def tolerance(self) -> float:
        # Roundings to `dtype` on the way, each about 0.4 u in Frobenius norm: gate and up, the activated row, each expert's output, the
        # sum; together 0.9 u, and 2.2 u in one of 150 seeds for 64 outputs, where experts cancel. fp32 accumulates over hidden and over
        # intermediate.
        u = UNIT_ROUNDOFF[self.dtype]
        few = 2.0 if self.tokens * self.hidden < 256 else 1.0
        plain = 8.0 * u * max(self.hidden, self.intermediate, 64) ** 0.5 if self.dtype == "float32" else 2.0 * u * few
        if not self.format:
            return plain
        # Gate and up that were rounded to `dtype` before they are activated and quantised fall on the other side of an fp8 rounding
        # boundary in some elements, each by 2^-3 of itself. Of 500 to 2000 seeds the worst, of a right launch: with 144 activated elements
        # 4.3% in fp16 and 5.7% in bf16, with 2300 2.9% and 4.0%, with 6900 in bf16 3.4% (once; 99% stay below 2.6%). Every opening of a
        # problem draws a new seed. Rows of x that are not quantised move the output by 3.3% or more, activated rows by 1.8% or more:
        # float32, which rounds nothing before, tells both at any size.
        activated = self.visits * self.intermediate
        if self.dtype != "float32" and activated < 4096:
            return 0.08 if activated < 1024 else 0.045
        if self.dtype == "bfloat16":
            return 0.03
        return 0.025 if self.dtype == "float16" and activated < 16384 else 0.012

    @property
    def math_dtype(self) -> str:
        return "float8_e4m3fn" if self.format else self.dtype

    def wide(self) -> FusedMoe | None:
        return replace(self, format="") if self.format else None

    def wide_inputs(self, *, seed: int, device: str = "cpu") -> Tensors:
        import torch

        if not self.format:
            return super().wide_inputs(seed=seed, device=device)
        ours = self.inputs(seed=seed, device=device)
        for i, (name, rows, columns) in enumerate(self._matrices()):
            del ours[f"{name}_scale"]
            ours[name] = torch.stack([self._expert(rows, columns, seed + 1000 * (i + 1) + e, device) for e in range(self.local)])
        return ours

    def label(self) -> str:
        shape = f"{self.tokens}x{self.hidden}x{self.intermediate} {self.top_k}/{self.experts} experts"
        more = [f"{self.local_experts} local"] if self.local_experts else []
        more += [self.format.replace("_", " ")] if self.format else []
        more += [f"skew {self.skew:g}"] if self.skew else []
        more += [] if self.gated else ["ungated"]
        more += [f"limit {self.swiglu_limit:g}"] if self.swiglu_limit else []
        return " ".join(["fused_moe", shape, SHORT[self.dtype], *more])

    @classmethod
    def examples(cls) -> list[Problem]:
        made = [
            # One token, most experts unvisited; more visits than a tile of 16 rows holds; sizes that no tile divides.
            cls(1, 64, 32, 8, 2, "float16"),
            cls(3, 40, 24, 6, 2, "float32", local_experts=5, gated=False),
            cls(26, 72, 56, 2, 1, "float16", skew=1.0, swiglu_limit=0.5),
            cls(9, 96, 88, 6, 3, "float16", skew=1.2, local_experts=4),
            cls(1, 136, 144, 6, 1, "float16", "fp8_block"),
            cls(9, 256, 128, 4, 2, "float32", "fp8_block", local_experts=3),
            cls(12, 136, 144, 6, 2, "bfloat16", "fp8_block", local_experts=4),
        ]
        return [*made, replace(made[2], dtype="bfloat16"), replace(made[0], dtype="bfloat16")]

    @classmethod
    def approximations(cls, wide: Problem) -> list[Problem]:
        return [replace(wide, format="fp8_block")] if isinstance(wide, cls) and not wide.format and wide.dtype != "float32" else []

    @classmethod
    def at_scale(cls) -> list[Problem]:
        return [
            cls(4096, 2048, 768, 128, 8),  # Qwen3-30B-A3B
            cls(32, 7168, 256, 256, 8, format="fp8_block"),  # DeepSeek V3, one of 8 tensor-parallel shards
            cls(32, 2048, 768, 128, 8),
            cls(4096, 7168, 2048, 256, 8, format="fp8_block", local_experts=32),  # DeepSeek V3, one of 8 expert-parallel ranks
        ]
