"""A plan in a narrower format: the weights of the layers are replaced, by whatever approximates them in that format."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache, lru_cache

from klab.harness.catalog.architecture import Note
from klab.harness.plan.step import Draft, drafted
from klab.kernels.contract import Problem
from klab.kernels.discover import approximations_of
from klab.kernels.errors import UsageError
from klab.kernels.fused_moe.problem import FusedMoe
from klab.kernels.matmul.problem import Matmul

# Operators whose weights a checkpoint quantises.
WEIGHTED = frozenset({"matmul", "fused_moe"})
# What checkpoints leave wide: the head, and the small matrices that decide where a token goes.
WIDE_ROLES = frozenset({"lm_head", "router", "shared_gate", "index_weights_proj"})


@cache
def formats_of(operator: str) -> frozenset[str]:
    """The formats of weights that a linear layer ("matmul") or routed experts ("fused_moe") have."""
    wide: dict[str, Problem] = {"matmul": Matmul(256, 256, 256), "fused_moe": FusedMoe(256, 256, 256, 8, 2)}
    return frozenset(format_of(p) for p in approximations_of(wide[operator])) - {""}


def formats() -> tuple[str, ...]:
    """The formats that linear layers or experts have."""
    return tuple(sorted(formats_of("matmul") | formats_of("fused_moe")))


def check_format(name: str) -> None:
    """UsageError for a format that no operator has."""
    if name and name not in formats():
        raise UsageError(f"quantization is one of {', '.join(formats())}, not {name!r}")


def quantised(draft: Draft, name: str) -> Draft:
    """The draft in the format `name`, where its operator has that; the same draft where not."""
    if not name or draft.problem is None or draft.role in WIDE_ROLES:
        return draft
    problem = _in_format(draft.problem, name)
    return drafted(draft.role, problem) if problem else draft


@lru_cache(maxsize=1024)
def _in_format(wide: Problem, name: str) -> Problem | None:
    return next((problem for problem in approximations_of(wide) if format_of(problem) == name), None)


def left_wide(drafts: Iterable[Draft], name: str) -> list[Note]:
    """A note where weights stay wide although a format was asked for, because their operator has no such format: a warning, unless the
    format is one of experts alone (gpt-oss: its other layers are in 16 bits).
    """
    stay = sorted(
        {d.operator for d in drafts if name and d.operator in WEIGHTED and d.role not in WIDE_ROLES and format_of_draft(d) != name}
    )
    words = f"{', '.join(stay)} has no {name}: its weights are planned wide (formats: {', '.join(formats())})"
    meant = stay == ["matmul"] and name not in formats_of("matmul")
    return [Note("quantization", words, 1.0, "info" if meant else "warning")] if stay else []


def format_of_draft(draft: Draft) -> str:
    """The format of a draft's problem, or an empty string."""
    return format_of(draft.problem) if draft.problem else ""


def format_of(problem: Problem) -> str:
    """The name of the narrower format of a problem, or an empty string."""
    return str(getattr(problem, "quantization", "") or getattr(problem, "format", ""))
