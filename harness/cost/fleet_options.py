"""Fleet options: the ways in which a model that is asked for can be served, each with its best operating point."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from klab.harness.catalog import find_model
from klab.harness.catalog.prices import find_price, load_facility, read_price
from klab.harness.cost.answer import HOST_US, stored_format
from klab.harness.cost.demand import WIDE, Need
from klab.harness.cost.estimate import Estimator
from klab.harness.cost.mix import IDLE_POWER
from klab.harness.cost.modelled import UNKNOWN_TDP_W
from klab.harness.cost.price import as_range
from klab.harness.cost.ranges import Range
from klab.harness.cost.serving import OperatingPoint, meets, nearest, operating_points
from klab.harness.cost.sources import estimator_for
from klab.harness.cost.steps import Steps
from klab.harness.cost.workload import Deployment
from klab.kernels.contract import Chip
from klab.kernels.errors import UsageError

TENSOR_PARALLEL = (1, 2, 4, 8)


@dataclass(frozen=True)
class Supply:
    """A chip that can be had: its dollars per GPU-hour and the kW that a site must hold ready for one (None: nobody states them)."""

    chip: Chip
    estimator: Estimator
    usd_per_gpu_hour: Range
    kw_per_gpu: float | None
    price_label: str = ""


def supply_of(
    chip: Chip,
    *,
    contract: str = "reserved",
    price: str | None = None,
    prices: Path | None = None,
    kw_per_gpu: float | None = None,
    results: Sequence[Path] | None = None,
    reference: bool | None = None,
) -> Supply:
    """A chip with its price (`price` as `read_price` takes it, else the one of `contract`) and the best that is known of its times.

    UsageError for a chip without a price.
    """
    found = find_price(chip.name, contract, prices) if price is None else read_price(price, chip.name, prices)
    known = load_facility(prices if prices and prices.is_dir() else None).provisioned_kw(chip.name)
    if kw_per_gpu is not None and not 0 < kw_per_gpu < math.inf:
        raise UsageError(f"--kw-per-gpu of {chip.name} is a positive number of kilowatts, not {kw_per_gpu:g}")
    estimator = estimator_for(chip, results=results, reference=reference)
    return Supply(chip, estimator, as_range(found), kw_per_gpu or known, found.label)


@dataclass(frozen=True)
class Option:
    """One way to serve a need: replicas of `gpus` GPUs of one chip, at the operating point with the most requests per GPU that keeps the
    latencies.
    """

    need: int
    supply: Supply
    point: OperatingPoint

    @property
    def chip(self) -> str:
        """Its name."""
        return self.supply.chip.name

    @property
    def gpus(self) -> int:
        """Per replica."""
        return self.point.deployment.tp

    @property
    def requests_per_s(self) -> Range:
        """Of one replica at full load."""
        return self.point.requests_per_s

    @property
    def idle_w(self) -> Range:
        """Of a replica's boards without work: a share of the TDP (a guess of the serving model)."""
        tdp_w = self.supply.chip.tdp_w or UNKNOWN_TDP_W
        return Range(*(share * tdp_w * self.gpus for share in IDLE_POWER))

    @property
    def label(self) -> str:
        """`h200 x 8 fp8_block, 120 in flight`."""
        return f"{self.point.deployment.label}, {self.point.concurrency} in flight"


@dataclass(frozen=True)
class Unserved:
    """A need that nothing on offer serves; `nearest`: the point that misses its latencies by the least, where the model fits at all."""

    need: int
    reason: str
    nearest: OperatingPoint | None = None


def options_for(
    at: int, need: Need, supplies: Sequence[Supply], sizes: Sequence[int] = TENSOR_PARALLEL, host_us: Range = HOST_US
) -> list[Option] | Unserved:
    """Every chip and size that serves a need within its latencies, or why none does. UsageError for an unknown model or format, or a model
    that has no tokens. `host_us`: see `Steps`.
    """
    found: list[Option] = []
    missed: list[OperatingPoint] = []
    reasons: dict[str, str] = {}  # by chip, of the largest size that was tried
    model = find_model(need.model)
    if model.kind != "llm":
        raise UsageError(
            f"{need.name}: {model.name} is not billed by the token ({model.kind}); klab cost knows such models, a demand does not"
        )
    words = need.quantization.strip().lower()
    quantization = "" if words in WIDE else words or stored_format(model)
    for supply in supplies:
        if set(supply.chip.phases) != {"prefill", "decode"}:
            only = " and ".join(supply.chip.phases)
            reasons[supply.chip.name] = (
                f"{supply.chip.name} is made for {only} alone, and replicas here do both; klab place takes them apart"
            )
            continue
        for tp in (need.tp,) if need.tp else sizes:
            try:
                deployment = Deployment(
                    model, supply.chip, tp, quantization=quantization, kv_dtype=need.kv_dtype, expert_parallel=need.expert_parallel
                )
                steps = Steps(deployment, supply.estimator, host_us)
                points = operating_points(steps, need.workload)
            except UsageError as error:
                reasons[supply.chip.name] = f"{deployment.label}: {error}"
                continue
            if not points:
                reasons[supply.chip.name] = f"{deployment.label}: {_too_large(steps, need.workload.isl + need.workload.osl)}"
                continue
            good = [point for point in points if meets(point)]
            if good:
                found.append(Option(at, supply, max(good, key=lambda point: point.requests_per_s.mid)))
            else:
                missed += [point for point in (nearest(points),) if point]
    return found or _unserved(at, need, missed, reasons)


def _too_large(steps: Steps, tokens: int) -> str:
    """Why not even one request fits, and what would hold it."""
    d = steps.deployment
    free = d.chip.memory_bytes * d.memory_share
    cache = steps.cache_bytes(tokens)
    if steps.weight_bytes < free:
        room = _tokens_that_fit(steps, tokens)
        held = f"{steps.weight_bytes / 1e9:.0f} GB of weights and {cache / 1e9:.3g} GB of cache for one request of {tokens} tokens"
        return f"{held} do not fit into {free / 1e9:.0f} GB per GPU; up to {room} tokens do"
    least = math.ceil(steps.weight_bytes * d.tp / free)
    larger = f" (--tp {2 ** math.ceil(math.log2(least))} may hold it{'' if d.quantization else ', or narrower weights, fp8_block say'})"
    words = f"{steps.weight_bytes / 1e9:.0f} GB of weights per GPU and one request do not fit into {free / 1e9:.0f} GB"
    return words + (larger if least > d.tp else "")


def _tokens_that_fit(steps: Steps, most: int) -> int:
    """Prompt and generated tokens of the longest request that fits alone, below `most`."""
    low, high = 0, most
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if steps.most_sequences(middle) else (low, middle)
    return low


def _unserved(at: int, need: Need, missed: Sequence[OperatingPoint], reasons: Mapping[str, str]) -> Unserved:
    best = nearest(missed)
    if best is None:
        return Unserved(at, f"{need.name}: nothing on offer holds it: {'; '.join(reasons.values())}")
    w, wanted = need.workload, []
    if w.slo_ttft_s:
        wanted.append(f"TTFT {w.slo_ttft_s * 1e3:.3g} ms")
    if w.slo_tpot_s:
        wanted.append(f"TPOT {w.slo_tpot_s * 1e3:.3g} ms")
    at_best = f"{best.deployment.label} with {best.concurrency} in flight"
    seen = f"TTFT {best.ttft_s.mid * 1e3:.0f} ms, TPOT {best.tpot_s.mid * 1e3:.1f} ms ({best.label})"
    return Unserved(at, f"{need.name}: nothing on offer meets {' and '.join(wanted)}; nearest is {at_best}: {seen}", best)
