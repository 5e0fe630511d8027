"""Steps: what one engine step of a deployment takes, made of the launches that the plan lists."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from klab.harness.cost.estimate import Estimate, Estimator, Origin
from klab.harness.cost.ranges import ZERO, Range
from klab.harness.cost.workload import Deployment
from klab.harness.plan.communication import KINDS, Collective
from klab.harness.plan.memory import cache_bytes, weight_bytes
from klab.harness.plan.planner import step_rows
from klab.harness.plan.precision import planned_dtype
from klab.harness.plan.rows import Row
from klab.kernels.dtypes import SIZE_BYTES, long_name
from klab.kernels.errors import UsageError

# Operators whose work depends on which sequence a token belongs to; all others see a step's tokens as one heap.
PER_SEQUENCE = frozenset({
    "prefill_attention", "decode_attention", "latent_attention", "sparse_latent_attention", "index_scores", "topk_select",
    "gated_delta_rule", "causal_conv1d",
})  # fmt: skip
# Rows that each half of a mixed step has of its own although they are matrices: latents are spread out in prefill, absorbed in decode.
OWN_ROLES = frozenset({"kv_b_proj", "q_absorb", "v_absorb"})
# Rows of a plan that see only the tokens whose logits are wanted; each is launched once in a step.
AT_THE_END = frozenset({"lm_head", "logits_gather", "sampling", "final_norm"})
# Heaps of more than SMALL_HEAP tokens are taken between HEAPS sizes per doubling: the time is nearly straight over a fifth of the size.
SMALL_HEAP, HEAPS = 256, 4


@dataclass(frozen=True)
class Part:
    """`count` equal launches of a step and what one of them takes."""

    role: str
    operator: str
    label: str
    count: int
    one: Estimate

    @property
    def us(self) -> Range:
        """All of them."""
        return self.one.us * self.count


@dataclass(frozen=True)
class StepCost:
    """One engine step on one GPU of the group (all of them work alike): `tokens` flow through the layers.

    `host_us` is what the GPU waits between two steps; its origin is always modelled.
    """

    phase: str
    tokens: int
    parts: tuple[Part, ...]
    host_us: Range = ZERO

    @cached_property
    def us(self) -> Range:
        """The whole step."""
        return sum((part.us for part in self.parts), self.host_us)

    @cached_property
    def joules(self) -> Range:
        """Of one GPU's board. Waiting for the host draws nothing here: it is short beside the launches."""
        return sum((part.one.joules * part.count for part in self.parts if part.one.joules), ZERO)

    @cached_property
    def time_shares(self) -> Mapping[Origin, float]:
        """Share of the step's time by what it rests on."""
        weights = [(part.one.origin, part.us.mid) for part in self.parts]
        return _shares([*weights, (Origin.MODELLED, self.host_us.mid)])

    @cached_property
    def energy_shares(self) -> Mapping[Origin, float]:
        """Share of the step's energy by what it rests on."""
        return _shares([(p.one.energy_origin, p.one.joules.mid * p.count) for p in self.parts if p.one.joules])

    def with_drafts(self, plain: StepCost, times: float) -> StepCost:
        """This step behind drafting that takes `times` a plain step's launches: a guess, so modelled."""
        us = sum((part.us for part in plain.parts), ZERO) * times
        joules = plain.joules * times
        one = Estimate(us, Origin.MODELLED, f"{times:.2g} of a plain decode step", joules)
        return replace(self, parts=(*self.parts, Part("draft", "draft", "speculated tokens", 1, one)))

    def by_operator(self) -> dict[str, Range]:
        """Microseconds per operator, longest first."""
        found: dict[str, Range] = {}
        for part in self.parts:
            found[part.operator] = found.get(part.operator, ZERO) + part.us
        return dict(sorted(found.items(), key=lambda item: -item[1].mid))


def _shares(weights: Sequence[tuple[Origin, float]]) -> dict[Origin, float]:
    whole = sum(weight for _, weight in weights)
    return {origin: sum(w for o, w in weights if o is origin) / whole if whole else 0.0 for origin in Origin}


def _between(low: Part, high: Part, share: float) -> Part:
    """The same launches between two sizes; of the nearer one the words."""
    near, one, other = (low if share < 0.5 else high), low.one, high.one
    joules = one.joules * (1 - share) + other.joules * share if one.joules and other.joules else None
    return replace(near, one=replace(near.one, us=one.us * (1 - share) + other.us * share, joules=joules))


class Steps:
    """The steps of one deployment. Every different step is planned and estimated once.

    `host_us`: between two steps of an engine (scheduling, sampling's copy to the host); 0 for a replay of the graph alone.
    UsageError when the deployment cannot be planned (tensor parallelism that does not divide, no link).
    """

    def __init__(self, deployment: Deployment, estimator: Estimator, host_us: Range = ZERO) -> None:
        self.deployment, self.estimator, self.host_us = deployment, estimator, host_us
        self._steps: dict[tuple[object, ...], StepCost] = {}
        self._parts: dict[tuple[object, ...], tuple[Part, ...]] = {}
        self._decodes: dict[tuple[int, int, int], list[Row]] = {}

    def prefill(self, new: int, prefix: int = 0, batch: int = 1) -> StepCost:
        """`batch` prompts of `new` tokens each behind `prefix` cached ones; the last token of each gets its logits."""
        key = ("prefill", new, prefix, batch)
        if key not in self._steps:
            self._steps[key] = self._cost("prefill", batch * new, self._prefill_rows(new, prefix, batch))
        return self._steps[key]

    def decode(self, batch: int, context: int, q_len: int = 1) -> StepCost:
        """One step of `batch` sequences with `context` keys each, the `q_len` new ones included."""
        key = ("decode", batch, context, q_len)
        if key not in self._steps:
            self._steps[key] = self._cost("decode", batch * q_len, self._decode_rows(batch, context, q_len))
        return self._steps[key]

    def mixed(self, new: int, prefix: int, batch: int, context: int, q_len: int = 1, prompts: int = 1) -> StepCost:
        """A step in which `new` tokens of each of `prompts` prompts (behind `prefix`) ride along with a decode step of `batch` sequences.

        Everything that sees tokens as one heap runs once on all of them; attention runs apart for both; logits are those of the decode.
        """
        if batch == 0:
            return self.prefill(new, prefix, prompts)
        key = ("mixed", new, prefix, batch, context, q_len, prompts)
        if key not in self._steps:
            tokens = prompts * new + batch * q_len
            halves = self._heap(tokens)
            halves += self._kept(("prompts", new, prefix, prompts), lambda: filter(_own, self._prefill_rows(new, prefix, prompts)))
            halves += self._kept(("decoding", batch, context, q_len), lambda: self._decoding(batch, context, q_len))
            self._steps[key] = StepCost("mixed", tokens, halves, self.host_us)
        return self._steps[key]

    def of(self, phase: str, tokens: int, **fields: object) -> StepCost:
        """The step of a phase in a scenario with these fields: "denoise", and the steps of models that are no decoders alone."""
        key = ("of", phase, *sorted(fields.items()))
        if key not in self._steps:
            self._steps[key] = self._cost(phase, tokens, self._rows(phase, **fields))
        return self._steps[key]

    @cached_property
    def weight_bytes(self) -> float:
        """Per GPU."""
        return weight_bytes(self.deployment.model, self.dtype, self.deployment.tp, self.deployment.quantization)

    def cache_bytes(self, context: int) -> float:
        """Per GPU and sequence of `context` tokens."""
        d = self.deployment
        return cache_bytes(d.model, long_name(d.kv_dtype) if d.kv_dtype else self.dtype, context, d.tp)

    @cached_property
    def dtype(self) -> str:
        """In which the model is planned."""
        d = self.deployment
        return planned_dtype(d.model, d.chip, d.scenario().dtype, d.quantization)[0]

    def most_sequences(self, context: int) -> int:
        """How many sequences of `context` tokens fit beside the weights; 0 when not even one does."""
        free = self.deployment.chip.memory_bytes * self.deployment.memory_share - self.weight_bytes
        one = self.cache_bytes(context)
        return max(0, int(free // one)) if one else 1_000_000

    def _heap(self, tokens: int) -> tuple[Part, ...]:
        """What sees all tokens of a mixed step alike. Large heaps lie between two of HEAPS per doubling, so that steps share launches."""
        step = 2 ** (tokens.bit_length() - 1) // HEAPS
        if tokens <= SMALL_HEAP or tokens % step == 0:
            return self._exact_heap(tokens)
        below = tokens // step * step
        low, high = self._exact_heap(below), self._exact_heap(below + step)
        if [part.role for part in low] != [part.role for part in high]:  # merged otherwise: not the same launches
            return self._exact_heap(tokens)
        return tuple(_between(one, other, (tokens - below) / step) for one, other in zip(low, high, strict=True))

    def _exact_heap(self, tokens: int) -> tuple[Part, ...]:
        def rows() -> list[Row]:
            return [row for row in self._prefill_rows(tokens, 0, 1) if not _own(row) and not _ends(row)]

        return self._kept(("heap", tokens), rows)

    def _decoding(self, batch: int, context: int, q_len: int) -> list[Row]:
        """Rows of a mixed step that only its decode half has. A plan may merge what is launched once with equal work of the layers."""
        rows = self._decode_rows(batch, context, q_len)
        return [row if _own(row) else replace(row, role=_ends(row), count=1, layers=1) for row in rows if _own(row) or _ends(row)]

    def _kept(self, key: tuple[object, ...], rows: Callable[[], Iterable[Row]]) -> tuple[Part, ...]:
        """The parts of rows, estimated once per key."""
        if key not in self._parts:
            self._parts[key] = tuple(self._part(row) for row in rows())
        return self._parts[key]

    def _prefill_rows(self, new: int, prefix: int, batch: int) -> list[Row]:
        return self._rows("prefill", isl=new + prefix, prefix_len=prefix, prefill_batch=batch, batches=(), osl=1)

    def _decode_rows(self, batch: int, context: int, q_len: int) -> list[Row]:
        # Mixed steps ask for them again. A decode step of the plan is at isl + osl/2: with osl 1 that is isl.
        key = (batch, context, q_len)
        if key not in self._decodes:
            self._decodes[key] = self._rows("decode", isl=max(context, q_len), batches=(batch,), osl=1, q_len=q_len)
        return self._decodes[key]

    def _rows(self, phase: str, **fields: object) -> list[Row]:
        d = self.deployment
        return step_rows(d.model, d.chip, d.scenario(**fields), phase)

    def _cost(self, phase: str, tokens: int, rows: Sequence[Row]) -> StepCost:
        return StepCost(phase, tokens, tuple(self._part(row) for row in rows), self.host_us)

    def _part(self, row: Row) -> Part:
        if row.problem is not None:
            return Part(row.role, row.operator, row.problem.label(), row.count, self.estimator.launch(row.problem))
        if row.operator not in KINDS:
            raise UsageError(f"{row.operator} is in the plan of {self.deployment.model.name} and klab has no problem for it ({row.why})")
        size = int(row.shape["rows"]) * int(row.shape["width"]) * SIZE_BYTES[self.dtype]
        one = Collective(row.operator, int(row.shape["gpus"]), size)
        return Part(row.role, row.operator, f"{row.operator} {size} B x {one.gpus}", row.count, self.estimator.collective(one))


def _own(row: Row) -> bool:
    """Whether a row belongs to one half of a mixed step alone."""
    return row.operator in PER_SEQUENCE or set(row.role.split(" + ")) <= OWN_ROLES


def _ends(row: Row) -> str:
    """The part of a row's role that is launched once, behind the layers; empty for the others."""
    return next((role for role in row.role.split(" + ") if role in AT_THE_END), "")
