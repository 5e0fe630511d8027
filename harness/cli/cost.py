"""`klab cost`: what a model's tokens take on a chip, in time, dollars and joules, and what these figures rest on."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from klab.harness.cli import _options
from klab.kernels.errors import UsageError

if TYPE_CHECKING:
    from klab.harness.catalog.architecture import Model
    from klab.harness.catalog.prices import Price
    from klab.harness.cost.accuracy import FormatError
    from klab.harness.cost.answer import Question
    from klab.harness.cost.money import Selling
    from klab.harness.cost.ranges import Range
    from klab.harness.cost.single_pass import Task
    from klab.harness.cost.workload import Workload
    from klab.kernels.contract import Chip

NONE = ("none", "off")
# What is promised where nothing is said, on chips that serve users.
SLO_TTFT, SLO_TPOT = "2s", "25ms"

SloTtft = Annotated[
    str | None, typer.Option("--slo-ttft", help=f"Time to first token that is promised: 2s, 500ms, none. Default {SLO_TTFT} on GPUs.")
]
SloTpot = Annotated[
    str | None, typer.Option("--slo-tpot", help=f"Time per output token that is promised: 25ms, none. Default {SLO_TPOT} on GPUs.")
]
Tp = Annotated[str, typer.Option("--tp", help="Tensor-parallel sizes: auto, 4, or 2,4,8 to compare.")]
Quantization = Annotated[
    str | None,
    typer.Option(
        "--quantization", "-q", help="A format, none, or all to compare (with what each loses). Default: as the checkpoint is stored."
    ),
]
KvDtype = Annotated[str, typer.Option("--kv-dtype", help="fp8 for a cache of 8 bits.")]
Ep = Annotated[bool, typer.Option("--expert-parallel", help="Spread whole experts over the --tp GPUs instead of slices of each.")]
MemoryShare = Annotated[
    float | None, typer.Option("--memory-share", help="Of a GPU's memory, what weights and cache may take. Default 0.9.")
]
MaxError = Annotated[
    float | None,
    typer.Option("--max-error", help="Compare all formats; the answer may be in any that was measured to be this near to the unquantised."),
]
Objective = Annotated[str, typer.Option("--objective", help="cost ($ per token), energy (joules per request) or latency.")]
PrefixHit = Annotated[float, typer.Option("--prefix-hit", help="Share of the prompt's tokens that are in the cache already.")]
Chunk = Annotated[int | None, typer.Option("--chunk", help="Tokens that an engine puts through one step. Default 8192.")]
Draft = Annotated[int, typer.Option("--draft", help="Tokens speculated per step.")]
Acceptance = Annotated[float, typer.Option("--acceptance", help="Probability that a speculated token is right.")]
DraftCost = Annotated[float, typer.Option("--draft-cost", help="Speculating one token, as a share of a decode step.")]
Offline = Annotated[bool, typer.Option("--offline", help="A batch job: no latency is promised.")]
Utilisation = Annotated[float, typer.Option("--utilisation", "-u", help="Share of the paid time in which there is work.")]
Steps = Annotated[int | None, typer.Option("--steps", help="Denoising steps per picture. Default 50.")]
Guidance = Annotated[
    bool | None,
    typer.Option("--guidance/--no-guidance", help="Compute every denoising step with and without the prompt. Default: as the model needs."),
]
Slo = Annotated[str | None, typer.Option("--slo", help="For models without tokens: within which time a batch is to end.")]
PriceOption = Annotated[
    str | None,
    typer.Option(
        "--price", "-p", help="$ per GPU-hour (2.5, or low,mid,high), a contract (on_demand, reserved, owned), or a file of prices."
    ),
]
Sell = Annotated[
    str | None,
    typer.Option("--sell", help="Selling price, $ per million tokens: INPUT,OUTPUT[,CACHED INPUT]; or $ per picture, audio hour, request."),
]
Kw = Annotated[
    float | None, typer.Option("--kw-per-gpu", help="Provisioned kW per GPU, all in. Default: of profiles/prices/facility.toml.")
]
HostUs = Annotated[
    str | None,
    typer.Option("--host-us", help="Microseconds between two steps of the engine: one figure, or low,mid,high. A guess by default."),
]
Results = Annotated[
    list[Path] | None, typer.Option("--results", help="Folder or file of own results. Repeatable. Default: where klab keeps them.")
]
Profile = Annotated[Path | None, typer.Option("--profile", help="A chosen pack (klab choose): its kernels stand before other results.")]
Reference = Annotated[
    str | None, typer.Option("--reference", help="Published tables: a folder of them, yes, or no. Default: where they are installed.")
]
Table = Annotated[Path | None, typer.Option("--table", help="Measured collectives: a file of `klab communication --out`.")]


def command(app: typer.Typer) -> None:
    """Register the verb."""

    @app.command()
    def cost(
        model: _options.Model,
        chip: _options.Chip = "auto",
        isl: _options.Isl = None,
        osl: _options.Osl = None,
        slo_ttft: SloTtft = None,
        slo_tpot: SloTpot = None,
        tp: Tp = "auto",
        dtype: _options.Dtype = None,
        quantization: Quantization = None,
        kv_dtype: KvDtype = "",
        expert_parallel: Ep = False,
        memory_share: MemoryShare = None,
        max_error: MaxError = None,
        objective: Objective = "cost",
        prefix_hit: PrefixHit = 0.0,
        chunk: Chunk = None,
        draft: Draft = 0,
        acceptance: Acceptance = 0.7,
        draft_cost: DraftCost = 0.05,
        offline: Offline = False,
        utilisation: Utilisation = 1.0,
        steps: Steps = None,
        guidance: Guidance = None,
        slo: Slo = None,
        price: PriceOption = None,
        sell: Sell = None,
        kw_per_gpu: Kw = None,
        host_us: HostUs = None,
        results: Results = None,
        profile: Profile = None,
        reference: Reference = None,
        table: Table = None,
        as_json: _options.AsJson = False,
    ) -> None:
        """What tokens (or pictures, or hours of speech) take: latency, throughput, dollars and joules, with ranges and what they rest on.
        Exit 1 where no configuration fits or keeps the SLOs.
        """
        from klab.harness.catalog import find_chip, find_model
        from klab.harness.catalog.architecture import Experts
        from klab.harness.cost.answer import HOST_US, Question, answer, formats_for, stored_format
        from klab.harness.cost.ranges import ZERO
        from klab.harness.cost.single_pass import serves
        from klab.harness.cost.sources import estimator_for
        from klab.harness.cost.units import answer_units
        from klab.harness.cost.workload import MEMORY_SHARE
        from klab.harness.plan.quantization import check_format

        found_model, found_chip = find_model(model), find_chip(chip)
        stored = stored_format(found_model)
        first = stored if quantization in (None, "all") else "" if quantization in NONE else quantization
        check_format(first)
        every = quantization == "all" or max_error is not None
        prices = _prices(price, found_chip)
        base = Question(
            found_model,
            found_chip,
            tps=() if tp == "auto" else _options.integers(tp, "--tp") or (),
            formats=tuple(dict.fromkeys((first, "", *formats_for(found_model)))) if every else (first,),
            dtype=dtype or "",
            kv_dtype=kv_dtype,
            expert_parallel=expert_parallel,
            memory_share=MEMORY_SHARE if memory_share is None else memory_share,
            objective=objective,
            price=prices[0] if prices else None,
            provisioned_kw=_kw(kw_per_gpu, found_chip),
            host_us=_host(host_us) or (HOST_US if found_chip.kind != "cpu" else ZERO),
            max_error=_options.checked_error(max_error),
        )
        for_tokens = {
            "--slo-ttft": slo_ttft, "--slo-tpot": slo_tpot, "--prefix-hit": prefix_hit or None, "--chunk": chunk, "--draft": draft or None,
            "--max-error": max_error, "--kv-dtype": kv_dtype or None, "--expert-parallel": expert_parallel or None,
        }  # fmt: skip
        if expert_parallel and not any(isinstance(group.mlp, Experts) for group in found_model.stack.groups):
            raise UsageError(f"--expert-parallel: {found_model.name} has no experts")
        if serves(found_model):
            _refuse(for_tokens, f"{found_model.name} is not billed by the token")
            if found_model.kind != "diffusion_transformer":
                _refuse({"--steps": steps, "--guidance": guidance}, f"{found_model.name} draws nothing")
            question = replace(base, sell_unit=_sell_unit(sell))
            task = _task(isl, osl, steps, guidance=guidance, utilisation=utilisation, slo_s=duration(slo, "--slo") if slo else None)
        else:
            _refuse({"--steps": steps, "--guidance": guidance, "--slo": slo}, f"{found_model.name} generates text")
            workload = _workload(
                found_model, found_chip, isl, osl, slo_ttft, slo_tpot, prefix_hit=prefix_hit, chunk_tokens=chunk, draft_tokens=draft,
                acceptance=acceptance, draft_cost=draft_cost, utilisation=utilisation, offline=offline,
            )  # fmt: skip
            question, task = replace(base, workload=workload, sell=_sell(sell)), None
        asked = _reference(reference)
        estimator = estimator_for(found_chip, results=results, profile=profile, reference=asked, table=table)
        if task is not None:
            from klab.harness.cli._units import emit_units, show_units

            units = answer_units(question, task, estimator, prices[1:])
            (emit_units if as_json else show_units)(units, model, chip)
            feasible = units.feasible
        else:
            from klab.harness.cli._cost import emit_answer, show_answer

            found = answer(question, estimator, prices[1:], _errors(question, results) if every else None)
            (emit_answer if as_json else show_answer)(found, model, chip)
            feasible = found.feasible
        if not feasible:
            raise typer.Exit(1)


def _refuse(options: Mapping[str, object], why: str) -> None:
    given = [name for name, value in options.items() if value is not None]
    if given:
        raise UsageError(f"{', '.join(given)}: {why}")


def _task(isl: int | None, osl: int | None, steps: int | None, **given: Any) -> Task:
    """Lengths as a scenario has them: --isl are latent or text tokens, --osl the text tokens of a window of speech."""
    from klab.harness.cost.single_pass import DENOISE_STEPS, WINDOW_TOKENS, Task

    if isl is not None and isl < 1:
        raise UsageError(f"--isl is at least 1, not {isl}")
    return Task(isl or 0, DENOISE_STEPS if steps is None else steps, window_tokens=WINDOW_TOKENS if osl is None else osl, **given)


def _workload(
    model: Model,
    chip: Chip,
    isl: int | None,
    osl: int | None,
    slo_ttft: str | None,
    slo_tpot: str | None,
    *,
    offline: bool,
    chunk_tokens: int | None,
    **given: Any,
) -> Workload:
    """Lengths: the usual ones of this kind of chip, within the model's context. SLOs: the usual ones on chips that serve users."""
    from klab.harness.cost.workload import CHUNK_TOKENS, Workload
    from klab.harness.plan.scenario import scenario_for

    usual = scenario_for(model, chip)
    promised = chip.kind != "cpu" and not offline
    return Workload(
        isl=usual.isl if isl is None else isl,
        osl=usual.osl if osl is None else osl,
        chunk_tokens=CHUNK_TOKENS if chunk_tokens is None else chunk_tokens,
        offline=offline,
        slo_ttft_s=_slo(slo_ttft, SLO_TTFT if promised else None, "--slo-ttft", offline=offline),
        slo_tpot_s=_slo(slo_tpot, SLO_TPOT if promised else None, "--slo-tpot", offline=offline),
        **given,
    )


def duration(text: str, option: str) -> float:
    """Seconds of `2s`, `25ms`, `1m` or a bare number of seconds; UsageError for anything that is no positive time."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*(us|ms|s|m|h|)\s*", text)
    value = float(found[1]) * {"us": 1e-6, "ms": 1e-3, "s": 1.0, "": 1.0, "m": 60.0, "h": 3600.0}[found[2]] if found else 0.0
    if not value:
        raise UsageError(f"{option} {text!r} is not a positive time; write 2s, 25ms or none")
    return value


def _slo(text: str | None, usual: str | None, option: str, *, offline: bool) -> float | None:
    if text is not None and text.strip().lower() not in NONE:
        if offline:
            raise UsageError(f"{option} and --offline contradict each other: for a batch job no latency is promised")
        return duration(text, option)
    return duration(usual, option) if usual and text is None else None


def _prices(given: str | None, chip: Chip) -> list[Price]:
    """The price that counts, and those of the other contracts to compare it with; none where none is known and none was given."""
    from klab.harness.catalog.prices import load_prices, read_price

    known = {one.contract: one for one in load_prices() if one.chip == chip.name}
    if given is not None:
        first = read_price(given, chip.name)
    elif not known:
        return []
    else:
        first = next(iter(known.values()))
    return [first, *(one for contract, one in known.items() if contract != first.contract)]


def _kw(given: float | None, chip: Chip) -> float | None:
    from klab.harness.catalog.prices import load_facility

    if given is not None and not 0 < given < math.inf:
        raise UsageError(f"--kw-per-gpu is a positive number of kW, not {given:g}")
    return given if given is not None else load_facility().provisioned_kw(chip.name)


def _numbers(text: str, option: str, counts: tuple[int, ...], words: str) -> list[float]:
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError:
        values = []
    if len(values) not in counts or not all(0 <= value < math.inf for value in values):
        raise UsageError(f"{option} {text!r}: write {words}, none of them negative")
    return values


def _sell(text: str | None) -> Selling | None:
    from klab.harness.cost.money import Selling

    return (
        None
        if text is None
        else Selling(*_numbers(text, "--sell", (2, 3), "dollars per million INPUT,OUTPUT or INPUT,OUTPUT,CACHED tokens"))
    )


def _sell_unit(text: str | None) -> float | None:
    return None if text is None else _numbers(text, "--sell", (1,), "dollars per picture, audio hour or request")[0]


def _host(text: str | None) -> Range | None:
    from klab.harness.cost.ranges import Range

    if text is None:
        return None
    values = _numbers(text, "--host-us", (1, 3), "microseconds, one figure or low,mid,high")
    if sorted(values) != values:
        raise UsageError(f"--host-us {text!r}: low, mid and high are not in this order")
    return Range(*(values * 3 if len(values) == 1 else values))


def _reference(text: str | None) -> Path | bool | None:
    if text is None:
        return None
    return {"yes": True, "no": False}.get(text.strip().lower(), Path(text))


def _errors(question: Question, results: list[Path] | None) -> dict[str, FormatError]:
    """What the store says of the formats' errors: of this model's own problems where measured, else of others."""
    from klab.harness.cost.accuracy import format_errors
    from klab.harness.plan import plan
    from klab.harness.store.paths import folders_to_read
    from klab.harness.store.read import iter_results

    w = question.workload
    planned = {}
    for format in question.formats:
        d = question.deployment((question.tps or (1,))[0], format)
        made = plan(d.model, d.chip, d.scenario(isl=w.isl, osl=w.osl, batches=(1, 8, 32, 128)))
        planned[format] = [problem.key for problem in made.problems()]
    return format_errors(iter_results([folder for folder in folders_to_read(results) if folder.exists()]), planned)
