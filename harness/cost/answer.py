"""Answer: of the ways to serve a workload on one kind of chip, the one that an objective prefers; or what comes nearest, and why."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from klab.harness.catalog.architecture import Experts, Model
from klab.harness.catalog.prices import Price
from klab.harness.cost.accuracy import FormatError
from klab.harness.cost.estimate import Estimator, Origin, label_of
from klab.harness.cost.fit import Fit, fit_of, least_tp
from klab.harness.cost.money import Efficiency, Money, Selling, cached_ratio_of, efficiency_of, money_of
from klab.harness.cost.ranges import ZERO, Range
from klab.harness.cost.remedies import to_fit, to_meet
from klab.harness.cost.serving import OperatingPoint, Replica, front, meets, nearest, operating_points
from klab.harness.cost.speculation import least_acceptance
from klab.harness.cost.steps import Steps
from klab.harness.cost.workload import MEMORY_SHARE, Deployment, Workload
from klab.harness.plan import plan
from klab.harness.plan.communication import BOARD_GPUS
from klab.harness.plan.quantization import format_of, formats_of
from klab.kernels.contract import Chip
from klab.kernels.discover import approximations_of
from klab.kernels.dtypes import long_name
from klab.kernels.errors import UsageError
from klab.kernels.matmul.problem import Matmul

OBJECTIVES = ("cost", "energy", "latency")
# Tensor-parallel sizes that are tried: all of a board; where none of these has the memory, the least that has, over several boards.
BOARD_TPS = (1, 2, 4, 8)
# Narrow enough for any chip of today, and what DeepSeek's experts are stored in.
EXPERTS_FORMAT = "fp8_block"
# The number of requests in flight at which an SLO ends is looked for this closely.
CLOSE = 0.01
PATIENCE = 10
# What a GPU waits between two steps of an engine. A guess: engines that prepare the next step meanwhile lose next to nothing, others some
# milliseconds. Of published deployments the sums of published launches lack half a millisecond per step in the median; half of them lie
# between -1.4 and 1.8 ms (docs/validation.md), which holds the errors of the launches' times too.
HOST_US = Range(0.0, 600.0, 2000.0)


@dataclass(frozen=True)
class Question:
    """What is asked. `tps` empty: tried out. `formats`: quantizations ("" is the wide model); the first is what is answered for, the others
    are compared with it, and with `max_error` those whose error against the unquantised output was measured to be at most that may be
    the answer. `host_us`: see `Steps`. `price` None: no dollars. `provisioned_kw`: per GPU, all in. `sell`, `sell_unit`: what customers
    pay, for tokens or (of models without) for a picture, an audio hour or a request.
    """

    model: Model
    chip: Chip
    workload: Workload = field(default_factory=Workload)
    tps: tuple[int, ...] = ()
    formats: tuple[str, ...] = ("",)
    dtype: str = ""
    kv_dtype: str = ""
    expert_parallel: bool = False
    memory_share: float = MEMORY_SHARE
    objective: str = "cost"
    price: Price | None = None
    provisioned_kw: float | None = None
    sell: Selling | None = None
    host_us: Range = HOST_US
    max_error: float | None = None
    sell_unit: float | None = None

    def __post_init__(self) -> None:
        """UsageError for what cannot be asked."""
        if self.objective not in OBJECTIVES:
            raise UsageError(f"--objective is {', '.join(OBJECTIVES)}, not {self.objective!r}")
        if any(tp < 1 for tp in self.tps):
            raise UsageError(f"--tp is at least 1, not {min(self.tps)}")
        lacking = {"prefill", "decode"} - set(self.chip.phases)
        if lacking:
            raise UsageError(f"{self.chip.name} is not made for {' and '.join(sorted(lacking))}: klab place puts it beside a chip that is")

    def deployment(self, tp: int, format: str, chip: Chip | None = None) -> Deployment:
        """The model on `tp` of these chips in a format."""
        chip = chip or self.chip
        kv_dtype = long_name(self.kv_dtype) if self.kv_dtype else ""
        return Deployment(self.model, chip, tp, self.dtype, format, kv_dtype, self.expert_parallel, self.memory_share)


@dataclass(frozen=True)
class Option:
    """One deployment. `points`: all that fit into memory; `best`: the one that the objective prefers of those that meet the SLOs; `close`:
    the one that misses them least. `points` are those that were looked at. `why_not`: why there are no points.
    """

    steps: Steps
    fit: Fit
    points: tuple[OperatingPoint, ...] = ()
    best: OperatingPoint | None = None
    close: OperatingPoint | None = None
    why_not: str = ""

    @property
    def deployment(self) -> Deployment:
        """What runs."""
        return self.steps.deployment

    @property
    def shown(self) -> OperatingPoint | None:
        """The point that stands for it."""
        return self.best or self.close


@dataclass(frozen=True)
class Priced:
    """A point with what it costs; `money` None without a price."""

    point: OperatingPoint
    efficiency: Efficiency
    money: Money | None

    def meets(self) -> bool:
        """Whether the SLOs hold."""
        return meets(self.point)


@dataclass(frozen=True)
class Answer:
    """`options`: every deployment that was tried, of all formats, and `shown` what stands for each. `chosen`: the answer's option, None
    where nothing fits; `feasible`: whether its point meets the SLOs. `front`: of all points, those that no other beats in both speed for
    the user and tokens per GPU. `offline`: the most tokens per GPU that any of the format's options gives, whatever the latency.
    `remedies`: what would make it feasible. `errors`: of the formats, where measured.
    """

    question: Question
    options: tuple[Option, ...]
    chosen: Option | None = None
    priced: Priced | None = None
    feasible: bool = False
    shown: tuple[Priced | None, ...] = ()
    front: tuple[Priced, ...] = ()
    offline: Priced | None = None
    contracts: tuple[tuple[Price, Money], ...] = ()
    remedies: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    errors: Mapping[str, FormatError] | None = None

    def by_format(self) -> list[tuple[str, Option, Priced | None]]:
        """The option that stands for each format: the one that the objective prefers of those that meet the SLOs, else the nearest."""
        found = []
        for format in dict.fromkeys(o.deployment.quantization for o in self.options):
            own = [(o, p) for o, p in zip(self.options, self.shown, strict=True) if o.deployment.quantization == format]
            points = [o.best for o, _ in own if o.best] or [o.close for o, _ in own if o.close]
            best = choose(points, self.question.objective) if any(o.best for o, _ in own) else nearest(points)
            found.append(next(((format, o, p) for o, p in own if p and p.point is best), (format, *own[-1])))
        return found

    @property
    def at_worst(self) -> dict[str, float]:
        """The SLOs that hold in the middle of the range and not at its upper end, with that end in seconds."""
        if self.priced is None or not self.feasible:
            return {}
        p, w = self.priced.point, self.question.workload
        ends = {"TTFT": (p.ttft_s.high, w.slo_ttft_s), "TPOT": (p.tpot_s.high, w.slo_tpot_s)}
        return {name: high for name, (high, slo) in ends.items() if slo and high > slo}

    @property
    def label(self) -> Origin:
        """What its times and dollars may be called."""
        return self._label("time_shares")

    @property
    def energy_label(self) -> Origin:
        """What its joules may be called."""
        return self._label("energy_shares")

    def _label(self, shares: str) -> Origin:
        return label_of(getattr(self.priced.point, shares), self.question.model.covered_share) if self.priced else Origin.MODELLED


def answer(
    question: Question, estimator: Estimator, others: Sequence[Price] = (), errors: Mapping[str, FormatError] | None = None
) -> Answer:
    """Try the deployments and choose. `others`: prices of other contracts, for comparison. `errors`: what the formats lose, where measured.

    UsageError where the model cannot be planned on this chip at all, or not in the tensor-parallel size that was asked for.
    """
    q = question
    options = [option for format in q.formats for option in options_of(q, format, estimator)]
    allowed = {q.formats[0], *(f for f, e in (errors or {}).items() if q.max_error is not None and e.worst <= q.max_error)}
    own = [option for option in options if option.deployment.quantization in allowed]
    best = choose([o.best for o in own if o.best], q.objective)
    point = best or nearest([p for o in own for p in o.points])
    chosen = next((o for o in own if point in (o.best, *o.points)), None)
    notes = tuple(_notes(q, estimator, chosen or own[-1], point))
    if point is None or chosen is None:
        return Answer(q, tuple(options), None, shown=(None,) * len(options), remedies=tuple(to_fit(q, own)), notes=notes, errors=errors)
    ratio = cached_ratio_of(chosen.steps, q.workload)

    def price(one: OperatingPoint) -> Priced:
        return priced(q, one, ratio)

    most = choose([p for o in own for p in o.points], "cost")
    return Answer(
        q,
        tuple(options),
        chosen,
        price(point),
        best is not None,
        shown=tuple(price(o.shown) if o.shown else None for o in options),
        front=tuple(price(one) for one in front([*(p for o in own for p in o.points), *_powers(chosen)])),
        offline=price(most) if most else None,
        contracts=tuple((p, _money(q, point, p, ratio)) for p in others),
        remedies=() if best else tuple(to_meet(q, own, estimator)),
        notes=notes,
        errors=errors,
    )


def stored_format(model: Model) -> str:
    """The format that a checkpoint is stored in, of those that klab plans; empty for a wide one, or one that klab does not know.

    Experts in a format that no kernel of klab's has would be planned wide: then `EXPERTS_FORMAT`, which may be slower and larger.
    """
    words = model.quantization.lower()
    bits = re.search(r"(\d+) bits", words)
    known = {
        "nvfp4": "nvfp4" in words,
        "mxfp4": "mxfp4" in words,
        "fp8_block": "fp8" in words and "blocks" in words,
        "fp8_row": "fbgemm" in words,
        "fp8_tensor": "fp8" in words,
        "w4a16": bool(bits) and bits is not None and bits[1] == "4",
        "w8a16": bool(bits) and bits is not None and bits[1] == "8",
    }
    found = next((name for name, so in known.items() if so), "")
    if not found or not any(isinstance(group.mlp, Experts) for group in model.stack.groups):
        return found
    # Checkpoints with 4-bit floats (gpt-oss) store the experts' weights so and keep activations in 16 bits.
    named = (found, f"w4a16_{found}", EXPERTS_FORMAT)
    return next(name for name in named if name in formats_of("fused_moe"))


def formats_for(model: Model) -> tuple[str, ...]:
    """The formats that most of a model's weights can be in: those of its experts, or of its layers where it has none."""
    experts = any(isinstance(group.mlp, Experts) for group in model.stack.groups)
    return tuple(sorted(formats_of("fused_moe" if experts else "matmul")))


def native(deployment: Deployment) -> bool:
    """Whether the chip multiplies in the deployment's format (what it does not, it computes in wider numbers at their peak)."""
    for problem in approximations_of(Matmul(256, 256, 256)):
        if format_of(problem) == deployment.quantization:
            return problem.math_dtype in deployment.chip.peak_tflops
    return True


def options_of(q: Question, format: str, estimator: Estimator, tps: Sequence[int] = ()) -> list[Option]:
    """The deployments of one format; without sizes given, those of a board, and where none of these has the memory, the least that has."""
    given = tuple(tps) or q.tps
    sizes = given or (BOARD_TPS if estimator.chip.link_gb_per_s else (1,))
    found: list[Option] = []
    refused: UsageError | None = None
    for tp in sizes:
        try:
            found.append(_option(q, Steps(q.deployment(tp, format, estimator.chip), estimator, q.host_us)))
        except UsageError as error:
            if given:
                raise
            refused = refused or error
    if not found:
        assert refused is not None
        raise refused
    if not given and not any(o.points for o in found):
        least = least_tp(lambda tp: q.deployment(tp, format, estimator.chip), q.workload)
        if least and least > max(sizes):
            found.append(_option(q, Steps(q.deployment(least, format, estimator.chip), estimator, q.host_us)))
    return found


def _option(q: Question, steps: Steps) -> Option:
    fit = fit_of(steps, q.workload)
    if fit.why_not:
        return Option(steps, fit, why_not=fit.why_not)
    replica = Replica(steps, q.workload, fit.requests)
    points = [replica.point(n) for n in _looked_at(replica)]
    for at, (point, after) in enumerate(itertools.pairwise(points)):
        if not point.limit and meets(point) and not meets(after):
            points[at] = replace(point, limit=after.limit)
    return Option(steps, fit, tuple(points), choose([p for p in points if meets(p)], q.objective), nearest(points))


def _looked_at(replica: Replica) -> list[int]:
    """Requests in flight that an objective may prefer: one, the most that fit (and half of them), and where the SLOs end.

    Times rise nearly in proportion to the requests: the line through the two points nearest to the SLO tells where to look next (the secant
    method, kept between what meets and what does not); the middle, should that take long.
    """
    low, high = 1, replica.most
    found = {low, high}
    if not meets(replica.point(low)) or meets(replica.point(high)):
        return sorted(found | {max(1, high // 2)})
    while high - low > (step := max(1, int(CLOSE * low))):
        guess = (low + high) // 2
        if len(found) < PATIENCE:
            one, other = sorted(found, key=lambda n: abs(missed_by(replica.point(n)) - 1))[:2]
            at, then = missed_by(replica.point(one)), missed_by(replica.point(other))
            if at != then:
                guess = min(high - step, max(low + step, round(one + (other - one) * (1 - at) / (then - at))))
        found.add(guess)
        low, high = (guess, high) if meets(replica.point(guess)) else (low, guess)
    return sorted(found)


def _powers(option: Option) -> list[OperatingPoint]:
    """1, 4, 16, ... requests in flight, but those that were looked at already."""
    known = {p.concurrency for p in option.points}
    wanted = [n for n in (4**k for k in range(6)) if n <= option.fit.requests and n not in known]
    return operating_points(option.steps, option.points[0].workload, wanted) if wanted else []


def missed_by(point: OperatingPoint) -> float:
    """The largest latency over its SLO: above 1 where one is missed."""
    w = point.workload
    slos = ((point.ttft_s.mid, w.slo_ttft_s), (point.tpot_s.mid, w.slo_tpot_s))
    return max((seconds / slo for seconds, slo in slos if slo), default=0.0)


def choose(points: Iterable[OperatingPoint], objective: str) -> OperatingPoint | None:
    """The point that an objective prefers: the most requests per GPU, the fewest joules per request, or the shortest time per token (where
    nothing is generated, to the answer). Of equal ones that on fewer GPUs. None without points.
    """

    def value(p: OperatingPoint) -> tuple[float, ...]:
        rate = -p.requests_per_s.mid / p.deployment.tp
        if objective == "energy":
            return p.joules_per_request.mid, rate, p.deployment.tp
        if objective == "latency":
            return p.tpot_s.mid or p.ttft_s.mid, p.ttft_s.mid, rate, p.deployment.tp
        return rate, p.tpot_s.mid, p.deployment.tp

    return min(points, key=value, default=None)


def priced(q: Question, point: OperatingPoint, cached_ratio: float) -> Priced:
    """The point with its dollars, where there is a price."""
    money = _money(q, point, q.price, cached_ratio) if q.price else None
    return Priced(point, money or efficiency_of(point, q.provisioned_kw), money)


def _money(q: Question, point: OperatingPoint, price: Price, cached_ratio: float) -> Money:
    usd = Range(price.low, price.mid, price.high)
    return money_of(point, usd, q.provisioned_kw, q.sell, cached_ratio=cached_ratio)


def host_note(host: Range) -> list[str]:
    """What is assumed between two steps, and whether somebody said so."""
    if host == ZERO:
        return []
    whose = "a guess (--host-us), near what published launches lack per step (docs/validation.md)" if host == HOST_US else "as given"
    return [f"between steps a GPU waits for the host for {host.mid:g} us ({host.low:g} to {host.high:g}): {whose}"]


def _notes(q: Question, estimator: Estimator, option: Option, point: OperatingPoint | None) -> list[str]:
    """What a reader must know: of the sources, of the plan, of what was assumed."""
    d, w = option.deployment, q.workload
    found = list(estimator.notes)
    made = plan(d.model, d.chip, d.scenario(isl=16, osl=1, batches=(1,), prefix_len=0))
    # Memory is told by the fit, the length by the question, the checkpoint's format below.
    told = ("memory", "max_position_embeddings", "quantization_config")
    found += dict.fromkeys(note.text for note in made.notes if note.level == "warning" and note.field not in told)
    if q.model.quantization:
        found.append(f"the checkpoint is stored as {q.model.quantization}; this is for {d.quantization or d.dtype or made.dtype}")
    if q.model.max_tokens and w.isl + w.osl > q.model.max_tokens:
        found.append(f"isl + osl = {w.isl + w.osl} exceeds the {q.model.max_tokens} tokens that {q.model.name} was made for")
    if d.tp > BOARD_GPUS:
        found.append(f"more than {BOARD_GPUS} GPUs are modelled as if they were on one board: between boards, links are slower")
    if w.draft_tokens:
        steps = f"{w.tokens_per_step:.2f} tokens per step"
        found.append(
            f"speculation: {w.draft_tokens} drafts, accepted with {w.acceptance:.0%}, give {steps}; what drafting costs is a guess"
        )
        if point is not None:
            least = least_acceptance(option.steps, w, point.concurrency)
            when = "at no acceptance" if least is None else f"from an acceptance of {least:.0%} on"
            found.append(f"with {point.concurrency} in flight these drafts give more requests per second than none {when}")
    found += host_note(q.host_us)
    if q.objective == "energy":
        found.append("the kernels are the fastest known ones; klab choose --objective energy makes a profile of the thriftiest (--profile)")
    if q.sell and w.cached_tokens and q.sell.cached_input is None:
        found.append("cached prompt tokens are sold at the price of input; --sell IN,OUT,CACHED says otherwise")
    return found
