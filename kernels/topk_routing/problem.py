"""The router of a mixture of experts: logits to the chosen experts and their weights."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING, ClassVar

from klab.kernels.contract import Problem, Tensors
from klab.kernels.dtypes import SHORT, SIZE_BYTES, random_normal
from klab.kernels.errors import UsageError

if TYPE_CHECKING:
    import torch

# Scores lie in 0..1 and are computed in float32: exponentials by ex2.approx are off by 2^-22, so scores this near to each other may come in
# either order.
TIE = 2e-6


@dataclass(frozen=True)
class TopkRouting(Problem):
    """The top_k experts of each token by score, and their weights.

    inputs: logits [tokens, experts], `dtype`; with `bias`, bias float32 [experts]. outputs: ids int32 [tokens, top_k], by falling score,
    and weights float32 [tokens, top_k].

    score is softmax or sigmoid of the logits, in float32; experts are chosen by score + bias and weighted by score alone, divided by the
    chosen ones' sum with `renormalize`, times `scale`. With `groups` > 1 the experts fall into that many groups of neighbours and only
    those of the best topk_groups groups can be chosen; a group is as good as the sum of its two best with `bias` (DeepSeek V3), as its
    best without (DeepSeek V2).
    """

    operator: ClassVar[str] = "topk_routing"

    tokens: int
    experts: int
    top_k: int
    scoring: str = "softmax"
    groups: int = 1
    topk_groups: int = 1
    renormalize: bool = True
    dtype: str = "bfloat16"
    bias: bool = False
    scale: float = 1.0

    def __post_init__(self) -> None:
        if self.tokens < 1 or self.scoring not in ("softmax", "sigmoid"):
            raise UsageError(f"topk_routing needs tokens >= 1 and scoring softmax or sigmoid, not {self.tokens}, {self.scoring!r}")
        if self.experts % max(1, self.groups) or not 1 <= self.topk_groups <= self.groups:
            raise UsageError("topk_routing needs groups that divide experts, and 1 <= topk_groups <= groups")
        if not 1 <= self.top_k <= self.topk_groups * self.group_size:
            raise UsageError(f"topk_routing needs 1 <= top_k <= {self.topk_groups * self.group_size} experts of the chosen groups")
        if self.bias and self.groups > 1 and self.group_size < 2:
            raise UsageError("topk_routing scores a group by its two best experts, so groups have at least two")

    @property
    def group_size(self) -> int:
        """Experts of a group."""
        return self.experts // self.groups

    def inputs(self, *, seed: int, device: str = "cpu", row_padding: int = 0) -> Tensors:
        import torch

        made: Tensors = {}
        if self.bias:
            made["bias"] = random_normal((self.experts,), "float32", seed=seed + 1, device=device, scale=0.1)
        logits = random_normal((self.tokens, self.experts), self.dtype, seed=seed, device=device, row_padding=row_padding)
        if device != "meta":
            logits[:, -1] += 1.0  # a lost last expert must be seen
            # Where a tie would change the weights, and not only which of two equals is taken, the answer would be the kernel's to choose:
            # such rows are drawn again.
            for attempt in range(1, 100):
                unsettled = self._unsettled(logits, made.get("bias"))
                if not bool(unsettled.any()):
                    break
                fresh = random_normal((self.tokens, self.experts), self.dtype, seed=seed + 1000 * attempt, device=device)
                logits.copy_(torch.where(unsettled[:, None], fresh, logits))
        return made | {"logits": logits}

    def outputs(self, *, device: str = "cpu") -> Tensors:
        import torch

        shape = (self.tokens, self.top_k)
        return {
            "ids": torch.empty(shape, dtype=torch.int32, device=device),
            "weights": torch.empty(shape, dtype=torch.float32, device=device),
        }

    def reference(self, inputs: Tensors) -> Tensors:
        score, choice, group = self._scores(inputs["logits"], inputs.get("bias"))
        allowed = choice
        if self.groups > 1:
            best = group.topk(self.topk_groups, dim=1).indices
            kept = group.new_zeros(group.shape).scatter(1, best, 1.0).bool()
            allowed = choice.masked_fill(~kept.repeat_interleave(self.group_size, dim=1), float("-inf"))
        ids = allowed.topk(self.top_k, dim=1).indices
        weights = score.gather(1, ids)
        if self.renormalize:
            weights = weights / weights.sum(dim=1, keepdim=True)
        return {"ids": ids.int(), "weights": weights * self.scale, "choice": choice, "group": group}

    def _scores(self, logits: torch.Tensor, bias: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """float64: the scores, what experts are chosen by, and what groups are chosen by [tokens, groups]."""
        logits = logits.double()
        score = logits.softmax(dim=1) if self.scoring == "softmax" else logits.sigmoid()
        choice = score if bias is None else score + bias.double()
        members = choice.view(-1, self.groups, self.group_size)
        group = members.amax(dim=2) if bias is None else members.topk(min(2, self.group_size), dim=2).values.sum(dim=2)
        return score, choice, group

    def _unsettled(self, logits: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """bool [tokens]: whether rounding may change the weights by another choice of group, or (with bias) of expert."""
        _, choice, group = self._scores(logits, bias)
        near = choice.new_zeros(self.tokens).bool()
        if self.topk_groups < self.groups:
            best = group.topk(self.topk_groups + 1, dim=1).values
            near |= best[:, -2] - best[:, -1] < 4 * TIE
        if bias is not None:
            best = choice.sort(dim=1, descending=True).values
            near |= (best[:, :-1] - best[:, 1:])[:, : self._settled_ranks()].amin(dim=1) < 4 * TIE if self.experts > 1 else near
        return near

    def _settled_ranks(self) -> int:
        """How many gaps between neighbours in the order of all experts can decide: top_k without groups, any with."""
        return self.top_k if self.groups == 1 else self.experts - 1

    def mismatch(self, output: str, got: torch.Tensor, reference: Tensors) -> str:
        """Experts must be distinct, and as good as the reference's within what rounding decides (TIE)."""
        want = reference["ids"]
        wrong = (got != want).any(dim=1).nonzero().flatten().tolist()
        for row in wrong:
            why = self._why_wrong(got[row].long(), reference["choice"][row], reference["group"][row])
            if why:
                return f"{output}[{row}] is {got[row].tolist()}, not {want[row].tolist()}: {why}"
        return ""

    def _why_wrong(self, ids: torch.Tensor, choice: torch.Tensor, group: torch.Tensor) -> str:
        if int(ids.min()) < 0 or int(ids.max()) >= self.experts:
            return "no such expert"
        if len(set(ids.tolist())) < self.top_k:
            return "an expert twice"
        scores = choice[ids]
        for groups in self._possible_groups(group):
            allowed = choice.view(self.groups, self.group_size)[list(groups)].flatten()
            best = allowed.topk(self.top_k).values
            if set((ids // self.group_size).tolist()) <= set(groups) and bool(((best - scores).abs() <= TIE).all()):
                return ""
        return "worse experts"

    def _possible_groups(self, group: torch.Tensor) -> list[tuple[int, ...]]:
        """Every choice of topk_groups groups that rounding may make."""
        last = group.topk(self.topk_groups).values[-1]
        sure = (group > last + TIE).nonzero().flatten().tolist()
        maybe = ((group <= last + TIE) & (group >= last - TIE)).nonzero().flatten().tolist()
        return [(*sure, *some) for some in combinations(maybe, self.topk_groups - len(sure))]

    def flops(self) -> float:
        # An exponential, a sum and a comparison per expert.
        return 3.0 * self.tokens * self.experts

    def bytes_moved(self) -> float:
        bias = 4.0 * self.experts if self.bias else 0.0
        return float(self.tokens) * (self.experts * SIZE_BYTES[self.dtype] + 8.0 * self.top_k) + bias

    def tolerance(self) -> float:
        # Weights are float32: exponentials by ex2.approx and one division, a few 2^-22 each.
        return 4e-6

    def label(self) -> str:
        more = [f"groups {self.topk_groups}/{self.groups}"] if self.groups > 1 else []
        more += ["bias"] if self.bias else []
        more += [] if self.renormalize else ["raw"]
        return " ".join([f"topk_routing {self.tokens}x{self.experts} top {self.top_k} {self.scoring}", SHORT[self.dtype], *more])

    @classmethod
    def examples(cls) -> list[Problem]:
        return [
            cls(1, 5, 2, dtype="float16"),
            cls(19, 60, 4, dtype="float32", renormalize=False),
            cls(7, 40, 1, "sigmoid", dtype="float32", scale=2.5, renormalize=False),  # one expert per token
            cls(21, 64, 6, "softmax", 8, 3, False, "float16", scale=16.0),  # DeepSeek V2
            cls(13, 96, 8, "sigmoid", 8, 4, True, "float32", bias=True, scale=2.5),  # DeepSeek V3 has 256
            cls(9, 128, 8, "sigmoid", dtype="float16", bias=True),
            cls(12, 130, 8, dtype="bfloat16"),
            cls(6, 256, 8, "sigmoid", 8, 4, True, "bfloat16", bias=True, scale=2.5),
        ]

    @classmethod
    def at_scale(cls) -> list[Problem]:
        return [
            cls(8192, 256, 8, "sigmoid", 8, 4, dtype="float32", bias=True, scale=2.5),  # DeepSeek V3
            cls(32, 128, 8),  # Qwen3
            cls(8192, 128, 4, dtype="bfloat16"),  # gpt-oss-120b
        ]
