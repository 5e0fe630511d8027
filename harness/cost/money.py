"""Money: what an operating point's tokens cost, in dollars and joules, and what selling them leaves."""

from __future__ import annotations

import math
from dataclasses import dataclass

from klab.harness.cost.mix import inverse
from klab.harness.cost.ranges import ZERO, Range
from klab.harness.cost.serving import OperatingPoint
from klab.harness.cost.steps import Steps
from klab.harness.cost.workload import Workload
from klab.kernels.contract import Json
from klab.kernels.errors import UsageError

MILLION = 1e6
# Where a workload has no cached prefix, what a cached token would cost is told at this share of the prompt.
SUPPOSED_HIT = 0.5


@dataclass(frozen=True)
class Selling:
    """Dollars per million tokens asked of a customer. `cached_input` None: cached tokens are sold as input."""

    input: float
    output: float
    cached_input: float | None = None

    def __post_init__(self) -> None:
        """UsageError for prices that are none."""
        given = [self.input, self.output, *([] if self.cached_input is None else [self.cached_input])]
        if not all(0 <= one < math.inf for one in given) or not any(given):
            shown = ",".join(f"{one:g}" for one in given)
            raise UsageError(f"--sell is dollars per million input,output[,cached input] tokens, not negative and not all 0; it is {shown}")

    def usd_per_request(self, workload: Workload) -> float:
        """What a request pays."""
        cached = self.input if self.cached_input is None else self.cached_input
        return (workload.new_tokens * self.input + workload.cached_tokens * cached + workload.osl * self.output) / MILLION


@dataclass(frozen=True)
class Efficiency:
    """What tokens take of energy and of a site. Joules of the GPU boards, waiting included where utilisation is below 1.

    `joules_per_token`: over prompt (cached included) and generated tokens; `joules_per_output_token`: the same joules over the generated
    alone, None where nothing is generated. `tokens_per_s_per_mw`: prompt and generated tokens per second in the time that there is work,
    per megawatt of what `megawatt` says: "provisioned" (all that a site holds ready) or "GPU boards" (what these draw; an upper bound).
    """

    joules_per_token: Range
    joules_per_output_token: Range | None
    tokens_per_s_per_mw: Range
    megawatt: str


@dataclass(frozen=True)
class Money(Efficiency):
    """Dollars per million tokens at a price per paid GPU-hour, used or not.

    `usd_per_mtok_total`: a request's cost over all its tokens. `usd_per_mtok_input`, `_output`: the cost split by the GPU time that
    prompts add to the steps, so that input x computed tokens + cached x cached tokens + output x generated tokens is the request's cost.
    `usd_per_mtok_cached_input`: the attention of prompts over it; its place in memory is not in it. `_output` is None
    where nothing is generated. `usd_per_mtok_all_on_output`: the whole cost over the generated tokens, as benchmarks quote it.
    `gross_margin`: share of the revenue that the GPUs' cost leaves; None without a selling price.
    """

    usd_per_request: Range
    usd_per_mtok_total: Range
    usd_per_mtok_input: Range
    usd_per_mtok_output: Range | None
    usd_per_mtok_cached_input: Range
    usd_per_mtok_all_on_output: Range | None
    gross_margin: Range | None = None

    def to_json(self) -> dict[str, Json]:
        """Every figure by its name; ranges as three numbers."""
        return {name: value.to_json() if isinstance(value, Range) else value for name, value in vars(self).items()}


def efficiency_of(point: OperatingPoint, provisioned_kw: float | None = None) -> Efficiency:
    """Energy per token, and tokens per second and megawatt: of `provisioned_kw` per GPU, or of the boards where that is not known.

    UsageError for a power that is none.
    """
    w, tp = point.workload, point.deployment.tp
    if provisioned_kw is not None and not 0 < provisioned_kw < math.inf:
        raise UsageError(f"provisioned power per GPU is a positive number of kW, not {provisioned_kw:g}")
    tokens = w.isl + w.osl
    if provisioned_kw is not None:
        per_mw, of = point.requests_per_s * (tokens * 1e3 / (provisioned_kw * tp)), "provisioned"
    else:
        busy = Range.of(lambda all_j, idle_j: all_j - idle_j, point.joules_per_request, point.idle_joules_per_request)
        per_mw, of = Range(*(tokens * 1e6 / joules for joules in (busy.high, busy.mid, busy.low))), "GPU boards"
    return Efficiency(
        joules_per_token=point.joules_per_request / tokens,
        joules_per_output_token=point.joules_per_request / w.osl if w.osl else None,
        tokens_per_s_per_mw=per_mw,
        megawatt=of,
    )


def money_of(
    point: OperatingPoint,
    usd_per_gpu_hour: Range,
    provisioned_kw: float | None = None,
    sell: Selling | tuple[float, float] | None = None,
    *,
    cached_ratio: float = 0.0,
) -> Money:
    """The dollars of an operating point.

    usd_per_gpu_hour: what a GPU costs per hour, also in the hours without work (`utilisation` of the workload). provisioned_kw: per GPU,
    all in. sell: dollars per million (input, output) tokens. cached_ratio: cost of a cached prompt token over that of a computed one
    (`cached_ratio_of`). The price's range and the times' range are independent of one another. UsageError for figures that are none.
    """
    if not 0 < usd_per_gpu_hour.low <= usd_per_gpu_hour.high < math.inf:
        raise UsageError(f"a price per GPU-hour is a positive number, not {usd_per_gpu_hour.low:g}..{usd_per_gpu_hour.high:g}")
    if not 0 <= cached_ratio <= 1:
        raise ValueError(f"a cached token takes between none and all of a computed one's time, not {cached_ratio}")
    w = point.workload
    usd_per_s = usd_per_gpu_hour * (point.deployment.tp / 3600 / w.utilisation)
    request = usd_per_s / point.requests_per_s
    prompts_s, others_s = _split(point)
    one_input = usd_per_s * prompts_s * (MILLION / (w.new_tokens + cached_ratio * w.cached_tokens))
    selling = Selling(*sell) if isinstance(sell, tuple) else sell
    margin = None
    if selling is not None:
        revenue = selling.usd_per_request(w)
        if not revenue:
            raise UsageError("nothing is sold: the selling price is 0 for every token that this workload has")
        margin = Range(*(1 - usd / revenue for usd in (request.high, request.mid, request.low)))
    return Money(
        **vars(efficiency_of(point, provisioned_kw)),
        usd_per_request=request,
        usd_per_mtok_total=request * (MILLION / (w.isl + w.osl)),
        usd_per_mtok_input=one_input,
        usd_per_mtok_output=usd_per_s * others_s * (MILLION / w.osl) if w.osl else None,
        usd_per_mtok_cached_input=one_input * cached_ratio,
        usd_per_mtok_all_on_output=request * (MILLION / w.osl) if w.osl else None,
        gross_margin=margin,
    )


def _split(point: OperatingPoint) -> tuple[Range, Range]:
    """Seconds per request that prompts add to the steps, and all others. Their doubts differ: that of one half is not the other's."""
    whole = inverse(point.requests_per_s)
    if not point.workload.osl:
        return whole, ZERO
    prompts = point.prefill_s or whole * min(1.0, max(0.0, point.prefill_share))
    return prompts, Range.of(lambda all_s, s: max(0.0, all_s - s), whole, prompts)


def cached_ratio_of(steps: Steps, workload: Workload) -> float:
    """What one more cached prompt token adds to a prompt's GPU time, over what one more computed one adds.

    The cached one is attended to by the computed tokens behind it; the computed one too, and it passes through the layers and attends.
    At the workload's own prefix, or (where it has none) with half of the prompt cached.
    """
    cached = workload.cached_tokens or int(SUPPOSED_HIT * workload.isl)
    new = workload.isl - cached
    if not cached or new < 2:
        return 0.0
    behind = steps.prefill(new, cached).us.mid
    one_cached = (behind - steps.prefill(new).us.mid) / cached
    one_new = (behind - steps.prefill(new // 2, cached).us.mid) / (new - new // 2)
    return min(1.0, max(0.0, one_cached / one_new)) if one_new > 0 else 0.0
