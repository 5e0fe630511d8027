"""Steps: what one engine step of a deployment takes, made of the launches that the plan lists."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from klab.harness.cost.estimate import Estimate, Estimator, Origin
from klab.harness.cost.ranges import ZERO, Range
from klab.harness.cost.workload import Deployment
from klab.harness.plan import plan
from klab.harness.plan.communication import KINDS, Collective
from klab.harness.plan.memory import cache_bytes
from klab.harness.plan.rows import Plan, Row
from klab.kernels.dtypes import SIZE_BYTES
from klab.kernels.errors import UsageError

# Operators whose work depends on which sequence a token belongs to; all others see a step's tokens as one heap.
PER_SEQUENCE = frozenset({
    "prefill_attention", "decode_attention", "latent_attention", "sparse_latent_attention", "index_scores", "topk_select",
    "gated_delta_rule", "causal_conv1d",
})  # fmt: skip
# Rows of a plan that see only the tokens whose logits are wanted.
AT_THE_END = frozenset({"lm_head", "logits_gather", "sampling", "final_norm"})


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

    def by_operator(self) -> dict[str, Range]:
        """Microseconds per operator, longest first."""
        found: dict[str, Range] = {}
        for part in self.parts:
            found[part.operator] = found.get(part.operator, ZERO) + part.us
        return dict(sorted(found.items(), key=lambda item: -item[1].mid))


def _shares(weights: Sequence[tuple[Origin, float]]) -> dict[Origin, float]:
    whole = sum(weight for _, weight in weights)
    return {origin: sum(w for o, w in weights if o is origin) / whole if whole else 0.0 for origin in Origin}


class Steps:
    """The steps of one deployment. Every different step is planned and estimated once.

    `host_us`: between two steps of an engine (scheduling, sampling's copy to the host); 0 for a replay of the graph alone.
    UsageError when the deployment cannot be planned (tensor parallelism that does not divide, no link).
    """

    def __init__(self, deployment: Deployment, estimator: Estimator, host_us: Range = ZERO) -> None:
        self.deployment, self.estimator, self.host_us = deployment, estimator, host_us
        self._steps: dict[tuple[object, ...], StepCost] = {}
        self._plans: dict[tuple[int, ...], Plan] = {}

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

    def mixed(self, new: int, prefix: int, batch: int, context: int, q_len: int = 1) -> StepCost:
        """A step in which `new` tokens of a prompt (behind `prefix`) ride along with a decode step of `batch` sequences.

        Everything that sees tokens as one heap runs once on all of them; attention runs apart for both.
        """
        if batch == 0:
            return self.prefill(new, prefix)
        key = ("mixed", new, prefix, batch, context, q_len)
        if key not in self._steps:
            heap = [row for row in self._prefill_rows(new + batch * q_len, 0, 1) if not _alone(row)]
            rows = [row for row in self._prefill_rows(new, prefix, 1) if row.operator in PER_SEQUENCE]
            rows += [row for row in self._decode_rows(batch, context, q_len) if _alone(row)]
            self._steps[key] = self._cost("mixed", new + batch * q_len, [*heap, *rows])
        return self._steps[key]

    @cached_property
    def weight_bytes(self) -> float:
        """Per GPU."""
        return self._plan(16, 0, 1, (), 0).weight_bytes

    def cache_bytes(self, context: int) -> float:
        """Per GPU and sequence of `context` tokens."""
        d = self.deployment
        return cache_bytes(d.model, d.kv_dtype or self.dtype, context, d.tp)

    @cached_property
    def dtype(self) -> str:
        """In which the model is planned."""
        return self._plan(16, 0, 1, (), 0).dtype

    def most_sequences(self, context: int) -> int:
        """How many sequences of `context` tokens fit beside the weights; 0 when not even one does."""
        free = self.deployment.chip.memory_bytes * self.deployment.memory_share - self.weight_bytes
        one = self.cache_bytes(context)
        return max(0, int(free // one)) if one else 1_000_000

    def _prefill_rows(self, new: int, prefix: int, batch: int) -> list[Row]:
        found = self._plan(new + prefix, prefix, batch, (), 1)
        return found.step("prefill", batch)

    def _decode_rows(self, batch: int, context: int, q_len: int) -> list[Row]:
        # A decode step of the plan is at isl + osl/2: with osl 1 that is isl.
        found = self._plan(max(context, q_len), 0, 1, (batch,), 1, q_len)
        return found.step("decode", batch)

    def _plan(self, isl: int, prefix: int, prefill_batch: int, batches: tuple[int, ...], osl: int, q_len: int = 1) -> Plan:
        key = (isl, prefix, prefill_batch, *batches, osl, q_len)
        if key not in self._plans:
            d = self.deployment
            fields = {"isl": isl, "prefix_len": prefix, "prefill_batch": prefill_batch, "batches": batches, "osl": osl, "q_len": q_len}
            self._plans[key] = plan(d.model, d.chip, d.scenario(**fields))
        return self._plans[key]

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


def _alone(row: Row) -> bool:
    """Whether a row of a mixed step comes from the decode half: attention, and what sees only the tokens with logits."""
    return row.operator in PER_SEQUENCE or any(role in AT_THE_END for role in row.role.split(" + "))
