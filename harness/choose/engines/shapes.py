"""A model's experts as an engine shards them, and the problems and names of tables that belong to them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

from klab.harness.catalog.architecture import Experts, Model
from klab.harness.choose.engines.names import MOE, TableName
from klab.harness.plan.feed_forward import SWIGLU_LIMIT
from klab.kernels.dtypes import long_name
from klab.kernels.fused_moe.problem import BLOCK, FusedMoe

# Sizes of groups of GPUs that a table may be for.
SHARDS = (1, 2, 4, 8, 16, 32, 64, 128)


@dataclass(frozen=True)
class Shape:
    """The experts of one kind of layer on one of `gpus` GPUs: slices of all of them, or with `expert_parallel` whole ones of a part.

    `problem` is theirs at one token, in 16 bits; `shared`: the model has shared experts too.
    """

    problem: FusedMoe
    gpus: int
    expert_parallel: bool
    shared: bool

    def at(self, tokens: int, dtype: str = "bfloat16", block_fp8: bool = False) -> FusedMoe:
        """The problem of a step of so many tokens."""
        return dataclasses.replace(self.problem, tokens=tokens, dtype=dtype, format="fp8_block" if block_fp8 else "")

    def name(self, device: str, *, block_fp8: bool = False, dtype: str = "bfloat16") -> TableName:
        """The table that an engine looks for."""
        return table_name(self.at(1, dtype, block_fp8), device)


def experts_of(model: Model) -> list[Experts]:
    """The kinds of routed experts that a model has, each once."""
    return list(dict.fromkeys(group.mlp for group in model.stack.groups if isinstance(group.mlp, Experts)))


def shapes_of(model: Model, gpus: int | None = None, *, expert_parallel: bool | None = None) -> Iterator[Shape]:
    """Every way in which this model's experts may be spread (over `gpus` GPUs alone, or in one way alone, where that is said)."""
    hidden = model.stack.hidden
    for experts in experts_of(model):
        limit = SWIGLU_LIMIT if experts.activation == "swiglu_clamped" else 0.0
        whole = FusedMoe(1, hidden, experts.intermediate, experts.experts, experts.top_k, gated=experts.gated, swiglu_limit=limit)
        for count in SHARDS if gpus is None else (gpus,):
            shared = experts.shared_intermediate > 0
            if expert_parallel is not True and experts.intermediate % count == 0:
                yield Shape(dataclasses.replace(whole, intermediate=experts.intermediate // count), count, False, shared)
            if expert_parallel is not False and count > 1 and experts.experts % count == 0:
                yield Shape(dataclasses.replace(whole, local_experts=experts.experts // count), count, True, shared)


def table_name(problem: FusedMoe, device: str) -> TableName:
    """What the table of these experts is called on this device (CUDA's name of it)."""
    block = (BLOCK, BLOCK) if problem.format else None
    dtype = "fp8_w8a8" if problem.format else "float32" if long_name(problem.dtype) == "float32" else ""
    return TableName(MOE, device, problem.intermediate, experts=problem.local, dtype=dtype, block=block)
