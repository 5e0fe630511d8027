"""Family: problems that differ in size alone. Between the members of one, the share of the roofline that is reached varies smoothly."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from functools import cache
from operator import attrgetter
from typing import Any

from klab.kernels.contract import Problem

# Whole numbers that say what is done and not how much of it: another value is another code path.
FORM = frozenset({
    "head_dim", "head_dim_v", "window", "q_len", "page_size", "shared_prefix", "rotary_dim", "latent", "rope_dim", "kv_lora_rank", "qk_dim",
    "groups", "topk_groups", "stride", "padding", "group", "key_dim", "value_dim",
})  # fmt: skip
# The same name means a size elsewhere.
FORM_OF: Mapping[str, frozenset[str]] = {
    "causal_conv1d": frozenset({"width"}),
    "conv1d": frozenset({"width"}),
    "sampling": frozenset({"top_k"}),
}
# The same name means a size here.
SIZE_OF: Mapping[str, frozenset[str]] = {"index_scores": frozenset({"q_len"})}
# What moves a time by a few percent: where no member of the exact family is known, one that differs in these alone is asked.
MINOR = frozenset({
    "page_size", "logit_gain", "sinks", "softcap", "layout", "eps", "q_len", "swiglu_limit", "bias", "scale", "decay", "key_offset", "skew",
    "interleaved",
})  # fmt: skip
# A field left at 0 means as much as this other one.
AS_MUCH_AS = {"local_experts": "experts", "head_dim_v": "head_dim", "rotary_dim": "head_dim"}
# Half precisions run at one peak.
LIKE = {"float16": "bfloat16"}

Form = tuple[Any, ...]


@dataclasses.dataclass(frozen=True)
class Family:
    """How the problems of one operator are told apart: `sizes` (names of the axes), and two readings of what they are."""

    operator: str
    sizes: tuple[str, ...]
    minor: tuple[str, ...]
    size_of: Callable[[Problem], tuple[float, ...]]
    form_of: Callable[[Problem], Form]
    kin_of: Callable[[Problem], Form]


@cache
def family_of(problem_type: type[Problem]) -> Family:
    """The family of a type of problem, from its fields: whole numbers are sizes, all else is form."""
    fields = dataclasses.fields(problem_type)  # type: ignore[arg-type]
    own = (FORM | FORM_OF.get(problem_type.operator, frozenset())) - SIZE_OF.get(problem_type.operator, frozenset())
    lens = tuple(f.name for f in fields if "tuple" in str(f.type))
    whole = tuple(f.name for f in fields if str(f.type) == "int" and f.name not in own)
    form = tuple(f.name for f in fields if f.name not in lens and f.name not in whole)
    minor = tuple(name for name in form if name in MINOR)
    kin = tuple(name for name in form if name not in MINOR)
    axes = (("sequences", "queries", "keys") if "q_lens" in lens else ("sequences", "keys")) if lens else ()
    return Family(problem_type.operator, (*axes, *whole), minor, _sizes(lens, whole), _form(form), _form(kin))


def _form(names: tuple[str, ...]) -> Callable[[Problem], Form]:
    read = _reader(names)
    window = names.index("window") if "window" in names else None

    def form(problem: Any) -> Form:
        values: list[Any] = [LIKE.get(value, value) if type(value) is str else value for value in read(problem)]
        if window is not None and values[window] >= max(problem.kv_lens, default=0):
            values[window] = 0  # a window that reaches back to the first key is none
        return tuple(values)

    return form


def _sizes(lens: tuple[str, ...], whole: tuple[str, ...]) -> Callable[[Problem], tuple[float, ...]]:
    read = _reader(whole)
    if not lens:
        return read

    def sizes(problem: Any) -> tuple[float, ...]:
        queries = getattr(problem, "q_lens", ())
        keys = getattr(problem, "kv_lens", ()) or getattr(problem, "seq_lens", ())
        live = sum(1 for n in (queries or keys) if n) or 1
        heap = (live, sum(queries) / live, max(1, sum(keys)) / live) if queries else (live, sum(keys) / live)
        return (*heap, *read(problem))

    return sizes


def _reader(names: tuple[str, ...]) -> Callable[[Any], tuple[Any, ...]]:
    """The values of these fields, what is left at 0 by what it stands for."""
    plain: Callable[[Any], tuple[Any, ...]]
    plain = attrgetter(*names) if len(names) > 1 else lambda problem: tuple(getattr(problem, name) for name in names)
    stand_in = [(at, AS_MUCH_AS[name]) for at, name in enumerate(names) if name in AS_MUCH_AS]
    if not stand_in:
        return plain

    def read(problem: Any) -> tuple[Any, ...]:
        values = list(plain(problem))
        for at, other in stand_in:
            values[at] = values[at] or getattr(problem, other)
        return tuple(values)

    return read
