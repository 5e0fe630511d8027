"""The positions of the largest scores of each row, in any order: what an indexer attends to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from klab.kernels.contract import Problem, Tensors
from klab.kernels.dtypes import SHORT, SIZE_BYTES, random_normal
from klab.kernels.errors import UsageError

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class TopkSelect(Problem):
    """The columns of the top_k largest scores of each row, each once, in any order; among equal scores at the threshold any will do.

    A score of -inf is hidden and never chosen: where a row has fewer than top_k others, the places left over hold -1 (anywhere). With
    `causal`, row r sees its first width - rows + r + 1 scores (none, where that is not positive), as the scores of a prefill chunk do.

    inputs: scores [rows, width] `dtype`.
    outputs: indices [rows, top_k] int32.
    """

    operator: ClassVar[str] = "topk_select"

    rows: int
    width: int
    top_k: int
    dtype: str = "float32"
    causal: bool = False

    def __post_init__(self) -> None:
        if min(self.rows, self.width, self.top_k) < 1:
            raise UsageError(f"topk_select needs positive sizes: {self.to_json()}")

    def visible(self, row: int) -> int:
        """Scores of this row that are not hidden."""
        return max(0, self.width - self.rows + row + 1) if self.causal else self.width

    def inputs(self, *, seed: int, device: str = "cpu", row_padding: int = 0) -> Tensors:
        import torch

        scores = random_normal((self.rows, self.width), self.dtype, seed=seed, device=device, row_padding=row_padding)
        if self.causal and device != "meta":
            last = torch.arange(self.rows, device=device)[:, None] + self.width - self.rows
            scores.masked_fill_(torch.arange(self.width, device=device) > last, float("-inf"))
        return {"scores": scores}

    def outputs(self, *, device: str = "cpu") -> Tensors:
        import torch

        return {"indices": torch.empty((self.rows, self.top_k), dtype=torch.int32, device=device)}

    def reference(self, inputs: Tensors) -> Tensors:
        """One right choice, and the scores by which to judge another."""
        import torch

        scores = inputs["scores"].float()
        found = scores.topk(min(self.top_k, self.width), dim=1)
        indices = torch.full((self.rows, self.top_k), -1, dtype=torch.int32, device=scores.device)
        indices[:, : found.indices.shape[1]] = found.indices.int().masked_fill_(found.values == float("-inf"), -1)
        return {"indices": indices, "scores": scores}

    def mismatch(self, output: str, got: torch.Tensor, reference: Tensors) -> str:
        """Another choice is as good if it names as many columns, each once, and their scores are the same, ties and all."""

        scores = reference["scores"]
        strange = int(((got < -1) | (got >= self.width)).sum())
        if strange:
            return f"{strange} of {got.numel()} indices are no column"

        def chosen(indices: torch.Tensor) -> torch.Tensor:
            found = scores.gather(1, indices.long().clamp(min=0)).masked_fill(indices < 0, float("-inf"))
            return found.sort(dim=1, descending=True).values

        columns = got.sort(dim=1).values
        twice = int(((columns[:, 1:] == columns[:, :-1]) & (columns[:, 1:] >= 0)).sum())
        if twice:
            return f"{twice} columns are chosen twice"
        hidden = int((scores.gather(1, got.long().clamp(min=0)).isneginf() & (got >= 0)).sum())
        if hidden:
            return f"{hidden} hidden columns are chosen"
        wrong = int((chosen(got) != chosen(reference["indices"])).any(dim=1).sum())
        return f"{wrong} of {self.rows} rows are not the {self.top_k} largest" if wrong else ""

    def flops(self) -> float:
        return float(sum(map(self.visible, range(self.rows))))  # each score is compared at least once

    def bytes_moved(self) -> float:
        # A hidden score must be read to be known as hidden.
        return float(self.rows * self.width * SIZE_BYTES[self.dtype] + 4 * self.rows * self.top_k)

    def tolerance(self) -> float:
        return 1e-9  # integers: judged by `mismatch` alone

    def label(self) -> str:
        return f"top {self.top_k} of {self.rows}x{self.width}{' causal' if self.causal else ''} {SHORT[self.dtype]}"

    @classmethod
    def examples(cls) -> list[Problem]:
        shapes: list[tuple[dict[str, object], tuple[str, ...]]] = [
            ({"rows": 1, "width": 1, "top_k": 1}, ("float32",)),
            ({"rows": 3, "width": 100, "top_k": 7}, ("float32", "float16", "bfloat16")),
            ({"rows": 2, "width": 1030, "top_k": 512}, ("float32", "bfloat16")),
            ({"rows": 5, "width": 70, "top_k": 64, "causal": True}, ("float32", "float16")),
            ({"rows": 4, "width": 3, "top_k": 5, "causal": True}, ("float32",)),
            ({"rows": 2, "width": 5003, "top_k": 2048}, ("float32",)),
        ]
        return [cls(**shape, dtype=dtype) for shape, dtypes in shapes for dtype in dtypes]  # type: ignore[arg-type]

    @classmethod
    def at_scale(cls) -> list[Problem]:
        return [cls(64, 32768, 2048), cls(4096, 32768, 2048, causal=True), cls(1, 131072, 2048)]  # DeepSeek V3.2: decode, prefill, one long
