"""Placement as an answer: what was compared, which arrangement wins, why, what flips it, and what whole machines do to it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from klab.harness.catalog.architecture import Model
from klab.harness.cost.answer import HOST_US
from klab.harness.cost.estimate import Estimator, Origin
from klab.harness.cost.flips import Certainty, Sensitivity, by_latency, by_length, by_link, by_price, by_rate, certainty
from klab.harness.cost.place import COUNTS, Demand, Option, Ranking, ranked
from klab.harness.cost.ranges import Range
from klab.harness.cost.side_jobs import sides_of_all
from klab.harness.cost.sides import SMALL_CHUNKS, Builder, Side
from klab.harness.cost.staffing import Pool, Terms
from klab.harness.cost.workload import MEMORY_SHARE, Deployment
from klab.harness.plan.communication import BOARD_GPUS
from klab.harness.plan.quantization import check_format
from klab.kernels.contract import Chip
from klab.kernels.errors import UsageError


@dataclass(frozen=True)
class Question:
    """What is asked. `terms` by chip; `tps` empty: the smallest that fit; `small_chunks`: steps that replicas which do both are also tried
    with. Other fields as in Deployment and Steps.
    """

    model: Model
    chips: Sequence[Chip]
    demand: Demand
    terms: Mapping[str, Terms]
    tps: tuple[int, ...] = ()
    dtype: str = ""
    quantization: str = ""
    kv_dtype: str = ""
    expert_parallel: bool = False
    memory_share: float = MEMORY_SHARE
    host_us: Range = HOST_US
    small_chunks: tuple[int, ...] = SMALL_CHUNKS

    def __post_init__(self) -> None:
        """UsageError for what cannot be asked."""
        if self.model.kind != "llm":
            raise UsageError(f"{self.model.name} is no language model that prefills and decodes: klab cost tells what it takes on a chip")
        if not self.chips:
            raise UsageError("--chips names at least one chip: h200,b200")
        names = [chip.name for chip in self.chips]
        if len(set(names)) < len(names):
            raise UsageError(f"--chips names {max(names, key=names.count)} twice")
        check_format(self.quantization)

    @property
    def like(self) -> Deployment:
        """Of which only chip and tensor parallelism change."""
        wide = (self.dtype, self.quantization, self.kv_dtype, self.expert_parallel, self.memory_share)
        return Deployment(self.model, self.chips[0], 1, *wide)


@dataclass(frozen=True)
class RoleCost:
    """What a role costs on a chip, at its best tensor-parallel size within the SLOs: per 1000 requests, to a fraction of a replica.

    `per_1000`: of `unit`, by the objective; `requests_per_s_per_gpu` at that point.
    """

    role: str
    side: Side
    pool: Pool
    per_1000: float
    unit: str

    @property
    def requests_per_s_per_gpu(self) -> Range:
        """At full load within the SLOs."""
        return self.pool.point.requests_per_s * (1 / self.side.deployment.tp)


@dataclass(frozen=True)
class Answer:
    """`ranking`: in whole machines; `by_count`: the same to a fraction and in whole replicas. `sure_of_times`, `sure_of_all`: over the
    corners of times, and of times and prices (None unless cost is the objective).
    """

    question: Question
    ranking: Ranking
    by_count: Mapping[str, Ranking]
    roles: tuple[RoleCost, ...] = ()
    reasons: tuple[str, ...] = ()
    sensitivities: tuple[Sensitivity, ...] = ()
    sure_of_times: Certainty | None = None
    sure_of_all: Certainty | None = None
    notes: tuple[str, ...] = ()
    left_out: tuple[str, ...] = field(default=())

    @property
    def label(self) -> Origin:
        """What the winner's times may be called."""
        shown = self.ranking.winner or self.ranking.nearest
        return shown.label if shown else Origin.MODELLED

    @property
    def energy_label(self) -> Origin:
        """What the winner's joules may be called."""
        shown = self.ranking.winner or self.ranking.nearest
        return shown.energy_label if shown else Origin.MODELLED

    @property
    def verdict(self) -> str:
        """How far the choice of chips and roles can be relied on: the lead over the next placement, and the corners."""
        winner = self.ranking.winner
        if winner is None:
            return ""
        other = next((option for option in self.ranking.options if option.shape != winner.shape), None)
        if other is None:
            return "It is the only placement that meets the SLOs."
        lead = f"the next placement, {other.name}{'' if other.apart else ' together'}, takes {other.value / winner.value - 1:.1%} more"
        times, both = self.sure_of_times, self.sure_of_all
        if times is None or both is None:
            return f"At the middle of the ranges {lead}."
        if both.share == 1:
            return f"Settled: {lead}, and no corner of times and prices changes who wins."
        if times.share == 1:
            return f"It hangs on the prices alone: {lead}."
        return f"{'Leaning' if min(times.share, both.share) >= 0.5 else 'Open'}: {lead}, within the doubt of times and prices."


def place(question: Question, estimators: Mapping[str, Estimator], jobs: int = 1) -> Answer:
    """Compare every arrangement; `jobs`: processes. UsageError when the model fits nowhere, or nothing can serve."""
    q, demand = question, question.demand
    builder = Builder(estimators, q.host_us, q.small_chunks)
    sides, left_out = sides_of_all(q.chips, q.tps or None, q.like, demand.workload, builder, jobs)
    if not sides:
        raise UsageError(
            f"{q.model.name} runs on none of these: {'; '.join(left_out)}. A format of fewer bytes (--quantization fp8_block), a larger "
            "--tp or a chip with more memory would hold it"
        )
    by_count = {count: ranked(sides, replace(demand, count=count), q.terms) for count in COUNTS}
    ranking = by_count[demand.count]
    left_out += ranking.left_out
    if not ranking.compared:
        raise UsageError(f"nothing here both prefills and decodes: {'; '.join(left_out) or ', '.join(chip.name for chip in q.chips)}")
    found = [
        *by_price(ranking, q.terms),
        by_length(builder, sides, ranking, q.terms),
        by_link(sides, ranking, q.terms),
        by_rate(sides, ranking, q.terms),
        *by_latency(sides, ranking, q.terms),
    ]
    roles = _roles(by_count["fractions"], q.terms)
    return Answer(
        q,
        ranking,
        by_count,
        roles,
        tuple(_reasons(q, ranking, by_count, roles)),
        tuple(one for one in found if one),
        certainty(ranking, q.terms, prices=False),
        certainty(ranking, q.terms, prices=True),
        tuple(_notes(q, estimators, sides, ranking)),
        tuple(left_out),
    )


def _roles(fractions: Ranking, terms: Mapping[str, Terms]) -> tuple[RoleCost, ...]:
    """The cheapest pool of each chip in each role, among all arrangements that meet the SLOs."""
    demand = fractions.demand
    best: dict[tuple[str, str], RoleCost] = {}
    for option in fractions.options:
        for pool in option.pools:
            chip = pool.side.deployment.chip.name
            worth = _per_1000(pool, demand, terms[chip])
            key = (pool.role, chip)
            if worth is not None and (key not in best or worth[0] < best[key].per_1000):
                best[key] = RoleCost(pool.role, pool.side, pool, *worth)
    order = {"prefill": 0, "decode": 1, "both": 2}
    return tuple(sorted(best.values(), key=lambda one: (order[one.role], one.per_1000)))


def _per_1000(pool: Pool, demand: Demand, terms: Terms) -> tuple[float, str] | None:
    gpu_s = 1000 * pool.side.deployment.tp / pool.point.requests_per_s.mid / demand.workload.utilisation
    if demand.objective == "energy":
        return 1000 * pool.point.busy_joules.mid / 3.6e6, "kWh"
    if demand.objective == "kw":
        return gpu_s / 3600 * terms.provisioned_kw, "kW h provisioned"
    return (gpu_s / 3600 * terms.usd_per_gpu_hour.mid, "$") if terms.usd_per_gpu_hour else None


def _reasons(q: Question, ranking: Ranking, by_count: Mapping[str, Ranking], roles: Sequence[RoleCost]) -> list[str]:
    """Why the winner wins, in sentences of figures."""
    winner = ranking.winner
    if winner is None:
        return []
    found = []
    for kind in ("together", "apart, one chip", "apart, two chips"):
        other = ranking.best_of(kind)
        if kind != winner.kind and other is not None:
            more = other.value / winner.value - 1
            than = f"{more:.0%} more" if more >= 0.005 else "as much (latency decides)"
            found.append(f"The best {kind} ({other.name}) takes {than}.")
    for role in ("prefill", "decode", "both"):
        costs = [one for one in roles if one.role == role]
        if len(costs) > 1:
            least, *rest = costs
            others = ", ".join(f"{one.side.name} {_of(one)}" for one in rest)
            words = {"both": "Doing both"}.get(role, role.capitalize())
            found.append(f"{words} takes the least on {least.side.name}: {_of(least)} per 1000 requests ({others}).")
    alone = next((pool for pool in winner.pools if pool.role == "decode"), None)
    together = by_count["fractions"].best_of("together")
    if alone is not None and together is not None:
        point = together.pools[0].point
        # To a fraction, a pool runs at the most sequences that the SLO allows.
        free = next((o.pools[-1] for o in by_count["fractions"].options if o.apart and o.pools[-1].side == alone.side), alone)
        found.append(
            f"Without prompts in its steps a replica of {alone.side.name} decodes {free.point.concurrency} sequences at a time{_stop(free)}"
            f"; where they are in them, one of {together.name} keeps {point.concurrency} in flight{_stop(together.pools[0])}."
        )
    if winner.transfer:
        found.append(_of_transfer(winner))
    found += _per_dollar(q, winner)
    return found


def _of(cost: RoleCost) -> str:
    return f"${cost.per_1000:.3g}" if cost.unit == "$" else f"{cost.per_1000:.3g} {cost.unit}"


def _stop(pool: Pool) -> str:
    stops = {"memory": "memory ends it", "prefill": "prompts fill its steps", "link": "the link ends it"}
    return f" ({stops[pool.point.limit]})" if pool.point.limit in stops else " (the SLOs allow no more)"


def _of_transfer(option: Option) -> str:
    way = option.transfer
    assert way is not None
    whole = way.received_bytes * option.pools[1].side.deployment.tp
    layered = " while it is still computed" if option.demand.overlap else " when it is computed"
    return (
        f"A prompt's cache is {whole / 1e9:.2f} GB on its way; {way.seconds.mid * 1e3:.0f} ms ({way.seconds.low * 1e3:.0f} to "
        f"{way.seconds.high * 1e3:.0f}) over {way.link.gb_per_s:g} GB/s per GPU, sent{layered}: the first token waits "
        f"{option.exposed_s.mid * 1e3:.0f} ms ({option.exposed_s.low * 1e3:.0f} to {option.exposed_s.high * 1e3:.0f}) of it."
    )


def _per_dollar(q: Question, winner: Option) -> list[str]:
    """Peak and bandwidth for a dollar, where several chips compete."""
    dtype = winner.pools[0].side.cache_dtype if winner.pools[0].side.cache_dtype in ("bfloat16", "float16") else "bfloat16"
    parts = []
    for chip in q.chips:
        price, peak = q.terms[chip.name].usd_per_gpu_hour, chip.peak_flops(dtype)
        if price is not None and peak is not None:
            parts.append(f"{chip.name} {peak / 1e12 / price.mid:.0f} and {chip.memory_gb_per_s / 1e3 / price.mid:.2f}")
    if len(parts) < 2 or q.demand.objective != "cost":
        return []
    return [f"For a dollar an hour, dense 16-bit TFLOP/s (prefill's need) and TB/s of memory (decode's): {', '.join(parts)}."]


def _notes(q: Question, estimators: Mapping[str, Estimator], sides: Sequence[Side], ranking: Ranking) -> list[str]:
    """What a reader must know."""
    w, demand = q.demand.workload, q.demand
    paper = {chip.name for chip in q.chips if chip.kind == "datasheet"}
    found = [f"{name}: {note}" for name, estimator in estimators.items() if name not in paper for note in estimator.notes]
    for chip in q.chips:
        terms = q.terms[chip.name]
        found.append(f"{chip.name}: {terms.price_label or 'no price'}; {terms.power_label}")
        if chip.name in paper:
            found.append(
                f"{chip.name} is known from a datasheet alone: all of it is modelled, and that its software reaches that is a guess"
            )
    if w.slo_ttft_s is None and w.slo_tpot_s is None and not w.offline:
        found.append("no SLO was given, so nothing bounds the latencies: --slo-ttft 2s --slo-tpot 25ms would")
    if q.model.max_tokens and w.isl + w.osl > q.model.max_tokens:
        found.append(f"isl + osl = {w.isl + w.osl} exceeds the {q.model.max_tokens} tokens that {q.model.name} was made for")
    if any(side.deployment.tp > BOARD_GPUS for side in sides):
        found.append(f"more than {BOARD_GPUS} GPUs are modelled as if they were on one board: between boards, links are slower")
    if any(option.apart for option in ranking.options):
        found.append(
            "apart: the cache crosses the network, also where both pools are on one kind of chip; what share of the link it gets is "
            "0.3 to 0.9, and its start 1 to 60 ms, from what engines report"
        )
    found.append("TTFT and TPOT are means over requests: tails are longer, most where prefill replicas are nearly always busy")
    host = q.host_us
    if host.high:
        found.append(f"between steps a GPU waits for the host for {host.mid:g} us ({host.low:g} to {host.high:g}): a guess (--host-us)")
    if demand.workload.utilisation < 1:
        peak = f"{demand.peak_per_s:.4g} requests/s at the peak"
        found.append(f"the fleet is sized for {peak}: work comes in {w.utilisation:.0%} of the time")
    return found


def overhead(answer: Answer) -> list[tuple[str, Option]]:
    """(count, winner) to a fraction, in whole replicas and in whole machines."""
    return [(count, ranking.winner) for count, ranking in answer.by_count.items() if ranking.winner and math.isfinite(ranking.winner.value)]
