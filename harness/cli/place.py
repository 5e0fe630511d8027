"""`klab place`: which chips prefill and which decode, together or apart, how many of each, and what would change that."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from klab.harness.cli import _options
from klab.harness.cli._options import AsJson
from klab.harness.cli.cost import NONE, SLO_TPOT, SLO_TTFT, HostUs, Quantization, Reference, Results, duration
from klab.kernels.errors import UsageError

if TYPE_CHECKING:
    from klab.harness.catalog.architecture import Model
    from klab.harness.cost.ranges import Range
    from klab.harness.cost.staffing import Terms
    from klab.kernels.contract import Chip

Chips = Annotated[str, typer.Option("--chips", help="Chips that may take part, by name or TOML file: h200,b200,mine.toml.")]
Rate = Annotated[float, typer.Option("--rate", help="Requests per second on average.")]
IslOf = Annotated[int, typer.Option("--isl", help="Prompt tokens per request.")]
OslOf = Annotated[int, typer.Option("--osl", help="Tokens generated per request.")]
Ttft = Annotated[str, typer.Option("--slo-ttft", help="Mean time to the first token that is allowed: 2s, 500ms, none.")]
Tpot = Annotated[str, typer.Option("--slo-tpot", help="Mean time per further token that is allowed: 25ms, none.")]
Sizes = Annotated[str, typer.Option("--tp", help="Tensor-parallel sizes: 2,4,8, or auto: the three smallest that fit.")]
KvDtype = Annotated[str, typer.Option("--kv-dtype", help="fp8: a narrower cache, which also halves the transfer.")]
Ep = Annotated[bool, typer.Option("--expert-parallel", help="Whole experts are spread over the GPUs of a replica.")]
Hit = Annotated[float, typer.Option("--prefix-hit", help="Share of the prompt that the prefill finds in its cache.")]
Chunk = Annotated[int | None, typer.Option("--chunk", help="Tokens per step. Default: 8192; replicas that do both also try smaller ones.")]
DraftOf = Annotated[int, typer.Option("--draft", help="Speculated tokens per step.")]
Accept = Annotated[float, typer.Option("--acceptance", help="Probability that a speculated token is accepted.")]
DraftCost = Annotated[float, typer.Option("--draft-cost", help="What drafting one token takes, of a plain decode step.")]
Used = Annotated[
    float, typer.Option("--utilisation", help="Share of the paid time in which there is work; the fleet is sized for that time.")
]
Offline = Annotated[bool, typer.Option("--offline", help="A batch job: no latency is promised.")]
Goal = Annotated[str, typer.Option("--objective", help="What is made small: cost ($/h), energy (J of the boards) or kw (provisioned).")]
Contract = Annotated[str, typer.Option("--contract", help="Whose price: on_demand, reserved or owned (klab price shows them).")]
PriceOf = Annotated[
    list[str] | None,
    typer.Option("--price", "-p", help="CHIP=PRICE: $ per GPU-hour, one figure or low,mid,high; a contract; or a file. Repeatable."),
]
Prices = Annotated[Path | None, typer.Option("--prices", help="Your own file or folder of prices, in the form of profiles/prices.")]
KwPer = Annotated[list[str] | None, typer.Option("--kw-per-gpu", help="CHIP=KW that a site must provide per GPU, all in. Repeatable.")]
LinkOf = Annotated[float | None, typer.Option("--link", help="GB/s of each GPU's network, one way. Default: as the chips' files state.")]
Overlap = Annotated[
    bool, typer.Option("--overlap/--no-overlap", help="Whether a layer's cache is sent as soon as it is computed, or all of it at the end.")
]
Machine = Annotated[int, typer.Option("--machine", help="GPUs that are had together; 1 where single GPUs can be had.")]
Top = Annotated[int, typer.Option("--top", help="How many arrangements are shown.")]


def command(app: typer.Typer) -> None:
    """Register the verb."""

    @app.command()
    def place(
        model: _options.Model,
        chips: Chips,
        rate: Rate,
        isl: IslOf = 8192,
        osl: OslOf = 1024,
        slo_ttft: Ttft = SLO_TTFT,
        slo_tpot: Tpot = SLO_TPOT,
        tp: Sizes = "auto",
        dtype: _options.Dtype = None,
        quantization: Quantization = None,
        kv_dtype: KvDtype = "",
        expert_parallel: Ep = False,
        prefix_hit: Hit = 0.0,
        chunk: Chunk = None,
        draft: DraftOf = 0,
        acceptance: Accept = 0.7,
        draft_cost: DraftCost = 0.05,
        utilisation: Used = 1.0,
        offline: Offline = False,
        objective: Goal = "cost",
        contract: Contract = "on_demand",
        price: PriceOf = None,
        prices: Prices = None,
        kw_per_gpu: KwPer = None,
        link: LinkOf = None,
        overlap: Overlap = True,
        machine: Machine = 8,
        host_us: HostUs = None,
        results: Results = None,
        reference: Reference = None,
        top: Top = 8,
        as_json: AsJson = False,
    ) -> None:
        """Compare serving a model on one or several kinds of chips, prefill and decode together or apart, at a rate and within SLOs.

        Says which arrangement takes the least, why, what would flip that, and what whole machines do to it. Exit 1: none meets the SLOs.
        """
        from klab.harness.catalog import find_chip, find_model
        from klab.harness.cli._placed import emit_all, show
        from klab.harness.cost.answer import HOST_US
        from klab.harness.cost.place import Demand
        from klab.harness.cost.placement import Question
        from klab.harness.cost.placement import place as answer_of
        from klab.harness.cost.sides import SMALL_CHUNKS
        from klab.harness.cost.sources import estimator_for
        from klab.harness.cost.workload import CHUNK_TOKENS, Workload
        from klab.kernels.dtypes import long_name

        workload = Workload(
            isl, osl, prefix_hit, chunk or CHUNK_TOKENS, draft, acceptance, draft_cost, utilisation, offline,
            _slo(slo_ttft, "--slo-ttft", offline), _slo(slo_tpot, "--slo-tpot", offline),
        )  # fmt: skip
        demand = Demand(workload, rate, objective, machine, overlap=overlap, link_gb_per_s=link)
        found_model = find_model(model)
        found = [find_chip(name) for name in chips.split(",") if name.strip()]
        terms = _terms(found, contract, _by_chip(price, "--price", found), prices, _by_chip(kw_per_gpu, "--kw-per-gpu", found), objective)
        question = Question(
            found_model, found, demand, terms, _sizes(tp), long_name(dtype) if dtype else "", _format(quantization, found_model),
            long_name(kv_dtype) if kv_dtype else "", expert_parallel,
            host_us=_range(host_us, "--host-us") if host_us else HOST_US, small_chunks=() if chunk else SMALL_CHUNKS,
        )  # fmt: skip
        # Nobody publishes what a chip measures that exists as a datasheet alone: it takes part whichever tables were asked for.
        tables = {chip.name: False if chip.kind == "datasheet" else _tables(reference) for chip in found}
        estimators = {chip.name: estimator_for(chip, results=results, reference=tables[chip.name]) for chip in found}
        answer = answer_of(question, estimators, os.cpu_count() or 1)
        if as_json:
            emit_all(answer, top)
        else:
            show(answer, top)
        if answer.ranking.winner is None:
            raise typer.Exit(1)


def _slo(text: str, option: str, offline: bool) -> float | None:
    """None where no latency is promised."""
    return None if offline or text.strip().lower() in NONE else duration(text, option)


def _format(text: str | None, model: Model) -> str:
    """As klab cost has it: as the checkpoint is stored, unless another one is asked for."""
    from klab.harness.cost.answer import stored_format

    if text == "all":
        raise UsageError("--quantization all compares formats on one chip: klab cost does; here all chips have the same")
    return stored_format(model) if text is None else "" if text.lower() in NONE else text


def _tables(text: str | None) -> Path | bool | None:
    return None if text is None else {"yes": True, "no": False}.get(text.strip().lower(), Path(text))


def _sizes(text: str) -> tuple[int, ...]:
    return () if text.strip().lower() == "auto" else tuple(dict.fromkeys(_options.integers(text, "--tp") or ()))


def _range(text: str, option: str) -> Range:
    from klab.harness.cost.ranges import Range

    try:
        parts = [float(part) for part in text.split(",")]
        low, mid, high = parts if len(parts) == 3 else parts * 3
        if low < 0 or high == float("inf"):
            raise ValueError
        return Range(low, mid, high)
    except (ValueError, TypeError):
        raise UsageError(f"{option} {text!r}: one figure of at least 0, or low,mid,high") from None


def _by_chip(texts: list[str] | None, option: str, chips: list[Chip]) -> dict[str, str]:
    """`["h200=2.5"]` -> {"h200": "2.5"}."""
    found = {}
    for text in texts or ():
        name, equals, value = text.partition("=")
        name = name.strip().lower()
        if not equals or not value.strip():
            raise UsageError(f"{option} {text!r}: write CHIP=VALUE, {chips[0].name if chips else 'h200'}=2.5 say")
        if name not in {chip.name for chip in chips}:
            raise UsageError(f"{option} {text!r}: {name} is not among --chips ({', '.join(chip.name for chip in chips)})")
        found[name] = value.strip()
    return found


def _terms(
    chips: list[Chip], contract: str, given: dict[str, str], root: Path | None, kw_per_gpu: dict[str, str], objective: str
) -> dict[str, Terms]:
    """Price and power of every chip. UsageError for a price that is missing where dollars decide."""
    from klab.harness.catalog.prices import CONTRACTS, find_price, load_facility, read_price
    from klab.harness.cost.ranges import Range
    from klab.harness.cost.staffing import PROVISIONED_OVER_TDP, Terms

    contract = contract.strip().lower().replace("-", "_")
    if contract not in CONTRACTS:
        raise UsageError(f"--contract is {', '.join(CONTRACTS)}, not {contract!r}")
    facility = load_facility()
    found = {}
    for chip in chips:
        try:
            one = read_price(given[chip.name], chip.name) if chip.name in given else find_price(chip.name, contract, root)
        except UsageError as error:
            if objective == "cost" or chip.name in given:
                raise UsageError(f"{error} (--price {chip.name}=...)") from error
            one = None
        stated = facility.provisioned_kw(chip.name)
        if chip.name in kw_per_gpu:
            kw, power = _range(kw_per_gpu[chip.name], "--kw-per-gpu").mid, "given by you"
            if not kw > 0:
                raise UsageError(f"--kw-per-gpu {chip.name}={kw_per_gpu[chip.name]}: a GPU takes more than nothing")
        elif stated is not None:
            kw, power = stated, "profiles/prices/facility.toml"
        else:
            kw, power = PROVISIONED_OVER_TDP * (chip.tdp_w or 0.0) / 1e3, f"a guess, {PROVISIONED_OVER_TDP:g} x its TDP"
        price = Range(one.low, one.mid, one.high) if one else None
        found[chip.name] = Terms(price, kw, one.label if one else "", f"{kw:.2f} kW per GPU provisioned ({power})")
    return found
