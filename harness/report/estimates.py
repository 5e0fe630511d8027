"""What the page asks of harness/cost: launches, operating points and placements that rest on the page's own choices. Kept in the cache."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path

import klab.harness.catalog
import klab.harness.cost
import klab.harness.plan
import klab.harness.store.reference
import klab.kernels
from klab.harness.catalog.prices import Price, find_price, load_facility, load_prices
from klab.harness.choose.select import Selection
from klab.harness.cost.answer import HOST_US, Question, choose, options_of, stored_format
from klab.harness.cost.estimate import Estimator, Origin, Source, label_of
from klab.harness.cost.fit import least_tp
from klab.harness.cost.flips import certainty
from klab.harness.cost.known import Interpolated, Known
from klab.harness.cost.mix import inverse
from klab.harness.cost.own import facts_in, facts_of, problem_of
from klab.harness.cost.place import Demand, Option, ranked
from klab.harness.cost.ranges import Range
from klab.harness.cost.reference_source import AGAIN, sources_for
from klab.harness.cost.serving import OperatingPoint, front, meets, operating_points
from klab.harness.cost.sides import Builder, sides_of
from klab.harness.cost.single_pass import serves
from klab.harness.cost.staffing import PROVISIONED_OVER_TDP, Terms
from klab.harness.cost.workload import Deployment, Workload
from klab.harness.plan.quantization import format_of
from klab.harness.plan.rows import Plan
from klab.harness.report.subject import Story, Subject
from klab.harness.store.result import Result, Status
from klab.harness.tune.objective import LATENCY
from klab.kernels.contract import Chip, Json, digest
from klab.kernels.disk_cache import DiskCache, cache_root
from klab.kernels.dtypes import SHORT
from klab.kernels.errors import KlabError

SCHEMA = 1
MILLION = 1e6
CONTRACT = "on_demand"
# What `klab cost` and `klab place` promise on GPUs where nothing is said.
SLO_TTFT_S, SLO_TPOT_S = 2.0, 0.025
# Requests in flight of the points on a curve, beside those that `klab cost` looks at.
IN_FLIGHT = tuple(2**power for power in range(11))
# Chips and formats on one page: each curve takes some tenths of a second where it is not in the cache.
MOST_CHIPS, MOST_FORMATS = 4, 3
# Workloads of the placement map, in tokens; and the GPUs of a replica beside the fewest that fit, times these.
PROMPTS, GENERATED = (512, 2048, 8192, 32768, 131072), (128, 1024, 4096)
SIZES, BOARD = 4, 8
# Placements are counted to a fraction of a replica, so the rate changes nothing.
RATE_PER_S = 1.0

Cells = dict[str, Json]
"""One row of a table: numbers and texts by the names of its columns."""

Made = tuple[list[Cells], list[str]]
"""Rows, and why something is not among them."""


@dataclass(frozen=True)
class Served:
    """The chips of the page whose tokens can be told: their plans by name, and why others are left out."""

    plans: Mapping[str, Plan]
    left_out: tuple[str, ...] = ()


def served(story: Story) -> Served:
    """The GPUs with a plan of the model asked for, at most MOST_CHIPS. Without a model, or on CPUs alone: none, and nothing left out."""
    plans = {chip: plan for chip, plan in sorted(story.plans.items()) if plan.chip.kind != "cpu"}
    model = next((plan.model for plan in plans.values()), None)
    if model is not None and serves(model):
        return Served({}, (f"{model.name} is not billed by the token: klab cost --model {model.name} tells what it takes.",))
    kept = dict(list(plans.items())[:MOST_CHIPS])
    left = [f"Of {len(plans)} chips the first {MOST_CHIPS} are shown."] if len(plans) > MOST_CHIPS else []
    return Served(kept, tuple(left))


def estimator_of(subject: Subject | None, chip: Chip, *, published: bool = True) -> Estimator:
    """What is known of a chip: the page's choices and its measurements in narrower formats, then published rows of the page, then (with
    `published`, where they are installed) published tables, then the model.
    """
    sources: list[Source] = []
    notes: list[str] = []
    own, others = known(subject) if subject else ([], [])
    sources += [Interpolated(facts, chip) for facts in (own, others) if facts]
    if published:
        # Tables that cannot be read are what `klab cost` complains of; a page does without.
        with suppress(KlabError):
            sources += sources_for(chip, None, notes)
    return Estimator(chip, sources, notes)


def known(subject: Subject) -> tuple[list[Known], list[Known]]:
    """(own facts, published ones): the choices, of further problems the best candidate, and the fastest published row of each problem."""
    chosen = {choice.wanted.problem_key for choice in subject.profile.choices}
    further = [row for row in subject.rows if row.problem_key not in chosen and row.wide_key]
    own = facts_in(Selection(further, LATENCY, chip=subject.chip)) if further else []
    others = []
    for row, us in fastest_published(subject).values():
        problem = problem_of(row.operator, row.problem)
        if problem is not None:
            others.append(Known(problem, us, Origin.REFERENCE, None, row.kernel, dict(row.config), "published"))
    return [*own, *facts_of(subject.profile.choices)], others


def fastest_published(subject: Subject) -> dict[str, tuple[Result, Range]]:
    """By problem key the fastest published row and its time in us, as far off as tables of the same thing are (AGAIN)."""
    found: dict[str, tuple[Result, Range]] = {}
    for row in subject.reference:
        median = row.median_us if row.status is Status.OK else None
        if median is None or not 0 < median < math.inf:
            continue
        if row.problem_key not in found or median < found[row.problem_key][1].mid:
            found[row.problem_key] = (row, Range(*(share * median for share in AGAIN)))
    return found


def workload_of(plan: Plan, isl: int | None = None, osl: int | None = None) -> Workload:
    """The plan's lengths (or these) and the promises that `klab cost` makes by default."""
    s = plan.scenario
    return Workload(isl or s.isl, s.osl if osl is None else osl, slo_ttft_s=SLO_TTFT_S, slo_tpot_s=SLO_TPOT_S)


def formats_of(plan: Plan, subject: Subject | None) -> tuple[str, ...]:
    """What is priced: the format that was asked for or that the checkpoint is stored in, as `klab cost` has it; the plan's; and those of
    which the page has most measurements.
    """
    first = plan.scenario.quantization or stored_format(plan.model)
    counted: dict[str, int] = {}
    for row in subject.rows if subject else ():
        problem = problem_of(row.operator, row.problem) if row.wide_key and row.status is Status.OK else None
        if problem is not None and (name := format_of(problem)):
            counted[name] = counted.get(name, 0) + 1
    measured = sorted(counted, key=lambda name: (-counted[name], name))
    return tuple(dict.fromkeys((first, plan.scenario.quantization, *measured)))[:MOST_FORMATS]


def serving(story: Story) -> Made:
    """A row per operating point. Ranges are three columns: the name, and it with _low and _high.

    Per chip and format the points that no other beats in both speed and GPU time, of one to eight GPUs and of 1, 2, 4, ... requests in
    flight, and the one that `klab cost` would choose (`best`: the least GPU time within the SLOs). Shares are of the GPU time.
    """
    asked = served(story)
    subjects = {subject.chip: subject for subject in story.subjects}
    rows: list[Cells] = []
    left_out = list(asked.left_out)
    for name, plan in asked.plans.items():
        subject = subjects.get(name)
        for format in formats_of(plan, subject):
            try:
                made, why = _kept("serving", [format, *_asked(plan, subject)], partial(_serving, plan, subject, format))
            except KlabError as error:
                made, why = [], [f"{name} in {_format(plan, format)}: {error}"]
            rows += made
            left_out += why
    return rows, left_out


def _serving(plan: Plan, subject: Subject | None, format: str) -> Made:
    s = plan.scenario
    workload = workload_of(plan)
    question = Question(
        plan.model, plan.chip, workload, formats=(format,), dtype=s.dtype, kv_dtype=s.kv_dtype, expert_parallel=s.expert_parallel
    )
    options = [one for one in options_of(question, format, estimator_of(subject, plan.chip)) if one.points]
    name = _format(plan, format)
    if not options:
        return [], [f"{plan.chip.name} in {name}: not even one request fits into the memory of the GPUs that were tried."]
    points = [point for one in options for point in (*one.points, *operating_points(one.steps, workload, IN_FLIGHT))]
    best = choose([one.best for one in options if one.best], "cost")
    if not points[0].tpot_s.mid:
        return [], [f"{plan.chip.name}: nothing is decoded, so there is no speed for the user."]
    shown = front(points)
    shown += [best] if best and best not in shown else []
    shown.sort(key=lambda point: -point.tokens_per_s_per_user.mid)
    why = [] if best else [f"{plan.chip.name} in {name}: no number of requests in flight keeps the SLOs."]
    return [_point(point, plan, name, point == best) for point in shown], why


def _point(point: OperatingPoint, plan: Plan, format: str, best: bool) -> Cells:
    tokens = point.workload.isl + point.workload.osl
    figures = {
        "tokens_per_s_per_user": point.tokens_per_s_per_user,
        "gpu_s_per_mtok": inverse(point.requests_per_s) * (point.deployment.tp * MILLION / tokens),
        "joules_per_token": point.joules_per_request / tokens,
    }
    shares = {origin: point.time_shares.get(origin, 0.0) for origin in Origin}
    return {
        "chip": plan.chip.name, "model": plan.model.name, "format": format, "gpus": point.deployment.tp, "in_flight": point.concurrency,
        **{f"{name}{end}": value for name, one in figures.items() for end, value in zip(ENDS, (one.mid, one.low, one.high), strict=True)},
        "ttft_s": point.ttft_s.mid, "tpot_s": point.tpot_s.mid, "keeps_slos": meets(point), "best": best,
        **{f"{origin}_share": share for origin, share in shares.items()},
        "times_are": str(label_of(point.time_shares, plan.model.covered_share)),
        "joules_are": str(label_of(point.energy_shares, plan.model.covered_share)),
    }  # fmt: skip


ENDS = ("", "_low", "_high")


def price_of(chip: str) -> Price | None:
    """The newest price by the hour; None where none is known."""
    try:
        return find_price(chip, CONTRACT)
    except KlabError:
        return None


def no_price(chip: str) -> str:
    """Why `price_of` knows none."""
    try:
        several = sum((one.chip, one.contract) == (chip, CONTRACT) for one in load_prices()) > 1
    except KlabError as error:
        return f"Prices cannot be read ({error})"
    return f"{'Several prices' if several else 'No price'} of {chip} {'are' if several else 'is'} known"


def placements(story: Story) -> Made:
    """A row per workload: which arrangement of the page's chips costs least per token within the SLOs.

    Counted to a fraction of a replica (a large fleet). Fewer than two priced chips: no rows. Tensor-parallel sizes: the fewest GPUs that
    hold the model, and SIZES times as many.
    """
    asked = served(story)
    if len(asked.plans) < 2:
        return [], list(asked.left_out)
    prices = {name: price for name in asked.plans if (price := price_of(name))}
    lacking = [f"{no_price(name)}, so it takes no part." for name in asked.plans if name not in prices]
    if len(prices) < 2:
        return [], [*asked.left_out, *lacking]
    subjects = {subject.chip: subject for subject in story.subjects}
    plans = {name: asked.plans[name] for name in prices}
    inputs = [[*_asked(plan, subjects.get(name)), repr(prices[name])] for name, plan in plans.items()]
    try:
        rows, reasons = _kept("placements", inputs, partial(_placements, plans, subjects, prices))
    except KlabError as error:
        return [], [*asked.left_out, *lacking, str(error)]
    return rows, [*asked.left_out, *lacking, *reasons]


def _placements(plans: Mapping[str, Plan], subjects: Mapping[str, Subject], prices: Mapping[str, Price]) -> Made:
    first = next(iter(plans.values()))
    s, model = first.scenario, first.model
    like = Deployment(model, first.chip, 1, s.dtype, formats_of(first, None)[0], s.kv_dtype, s.expert_parallel)
    terms = {name: _terms(plan.chip, prices[name]) for name, plan in plans.items()}
    builder = Builder({name: estimator_of(subjects.get(name), plan.chip) for name, plan in plans.items()}, HOST_US)
    sizes = {name: _sizes(plan, like) for name, plan in plans.items()}
    reasons = [f"{name}: {BOARD} GPUs do not hold the model." for name, held in sizes.items() if not held]
    if len(reasons) > len(plans) - 2:
        return [], reasons
    rows: list[Cells] = []
    for osl in GENERATED:
        for isl in PROMPTS:
            if model.max_tokens and isl + osl > model.max_tokens:
                continue
            workload = workload_of(first, isl, osl)
            sides = [
                side
                for name, plan in plans.items()
                for side in (sides_of(plan.chip, sizes[name], like, workload, builder)[0] if sizes[name] else ())
            ]
            ranking = ranked(sides, Demand(workload, RATE_PER_S, count="fractions"), terms)
            cell: Cells = {"model": model.name, "prompt_tokens": isl, "generated_tokens": osl, "format": _format(first, like.quantization)}
            winner = ranking.winner
            if winner is None:
                rows.append(cell | {"chip": [], "wins": "", "nearest": ranking.nearest.name if ranking.nearest else ""})
                continue
            rival = next((option for option in ranking.options if option.shape != winner.shape), None)
            times, both = (certainty(ranking, terms, prices=moved) for moved in (False, True))
            assert times is not None and both is not None and winner.usd_per_mtok is not None
            usd = winner.usd_per_mtok
            rows.append(
                cell
                | {
                    "chip": list(winner.chips), "wins": roles(winner), "replicas": winner.name, "nearest": "",
                    "usd_per_mtok": usd.mid, "usd_per_mtok_low": usd.low, "usd_per_mtok_high": usd.high,
                    "runner_up": roles(rival) if rival else "", "runner_up_more_share": rival.value / winner.value - 1 if rival else None,
                    "corners_of_times_share": times.share, "corners_of_all_share": both.share, "times_are": str(winner.label),
                    "measured_share": winner.time_shares.get(Origin.MEASURED, 0.0),
                    "reference_share": winner.time_shares.get(Origin.REFERENCE, 0.0),
                }
            )  # fmt: skip
    return rows, reasons


def roles(option: Option) -> str:
    """`b200 together`, or `b200 → h200` for prefill and decode apart."""
    chips = [pool.side.deployment.chip.name for pool in option.pools]
    return " → ".join(chips) if option.apart else f"{chips[0]} together"


def _sizes(plan: Plan, like: Deployment) -> tuple[int, ...]:
    least = least_tp(lambda tp: replace(like, chip=plan.chip, tp=tp), workload_of(plan))
    return tuple(sorted({least, min(BOARD, SIZES * least)})) if least and least <= BOARD else ()


def _terms(chip: Chip, price: Price) -> Terms:
    kw = load_facility().provisioned_kw(chip.name)
    return Terms(Range(price.low, price.mid, price.high), kw or PROVISIONED_OVER_TDP * (chip.tdp_w or 0.0) / 1e3, price.label)


def _format(plan: Plan, format: str) -> str:
    return format or SHORT.get(plan.dtype, plan.dtype)


def _asked(plan: Plan, subject: Subject | None) -> list[Json]:
    """What an answer depends on, but for the code and what was asked."""
    facts = [repr(fact) for held in known(subject) for fact in held] if subject else []
    return [repr(plan.model), repr(plan.chip), repr(plan.scenario), sorted(facts)]


def _kept(kind: str, inputs: Sequence[Json], make: Callable[[], Made]) -> Made:
    """What `make` gives, from the cache where the same was asked of the same code."""
    store = DiskCache(cache_root() / "report", most_per_folder=8)
    key = digest([SCHEMA, kind, _code(), *inputs])
    found = store.get(key)
    if found is None:
        found = json.dumps(make()).encode()
        store.put(key, found)
    rows, said = json.loads(found)
    return rows, said


@cache
def _code() -> str:
    """The digest of what such an answer is computed by, and of the published tables that are installed."""
    rooms = (klab.harness.cost, klab.harness.plan, klab.harness.catalog, klab.harness.store.reference, klab.kernels)
    files = [path for room in rooms for path in Path(room.__path__[0]).glob("*.py")]
    files += [Path(__file__), *Path(klab.kernels.__path__[0]).glob("*/problem.py")]
    summed = hashlib.sha256()
    for path in sorted(files):
        summed.update(path.read_bytes())
    return summed.hexdigest() + published_tables()


def published_tables() -> str:
    """Which published tables are at hand: folder, version, state of the files and whether they can be read; empty where none are."""
    from klab.harness.store.reference.tables import available, package_version

    try:
        root = available()
    except KlabError:
        return ""
    if root is None:
        return ""
    state: list[Json] = [[str(path), path.stat().st_size, path.stat().st_mtime_ns] for path in sorted((root / "data").rglob("*.parquet"))]
    return f"{root} {package_version(root)} {digest([state, importlib.util.find_spec('duckdb') is not None])}"
