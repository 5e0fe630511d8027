"""`klab layer`: one whole decoder layer in one CUDA graph, beside the sum of its parts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from klab.harness.cli import _options
from klab.harness.cli._console import emit, out, table, talk

if TYPE_CHECKING:
    from klab.harness.measure.layer import Chosen, LayerTime
    from klab.harness.plan.layer import Parts
    from klab.harness.plan.step import Step
    from klab.kernels.contract import Chip
    from klab.kernels.discover import Catalogue

Phase = Annotated[str, typer.Option("--phase", help="decode or prefill.")]
OneBatch = Annotated[int | None, typer.Option("--batch", help="Sequences of the step. Default: the scenario's first.")]
Kind = Annotated[int, typer.Option("--group", help="Which kind of layer, where a model has several: 0 is the most frequent.")]
Laps = Annotated[int, typer.Option("--laps", help="How often the whole and every part are timed in turn.")]
Which = Annotated[
    str,
    typer.Option(
        "--pick",
        help="chosen: what klab choose would take from the results, else a library; library: the quickest; own: klab's quickest default.",
    ),
]


def command(app: typer.Typer) -> None:
    """Register the verb."""

    @app.command()
    def layer(
        model: _options.Model,
        chip: _options.Chip = "auto",
        phase: Phase = "decode",
        batch: OneBatch = None,
        isl: _options.Isl = None,
        osl: _options.Osl = None,
        tp: _options.Tp = 1,
        dtype: _options.Dtype = None,
        further: _options.With = None,
        group: Kind = 0,
        pick: Which = "chosen",
        laps: Laps = 15,
        results: _options.Results = None,
        as_json: _options.AsJson = False,
    ) -> None:
        """Compose a layer of chosen kernels, check its output, and time it as a whole and in parts: does the sum predict the whole?"""
        from klab.harness.catalog import find_model
        from klab.harness.catalog.chips import find_real_chip
        from klab.harness.measure.layer import CheckFailed, measure_layer
        from klab.harness.measure.lock import exclusive
        from klab.harness.plan import scenario_for
        from klab.harness.plan.layer import groups_of, layer_of
        from klab.harness.plan.planner import step_of
        from klab.harness.plan.trials import default_policy
        from klab.harness.store.paths import folders_to_read
        from klab.kernels.discover import discover
        from klab.kernels.errors import CannotMeasure, UsageError

        found_model, found_chip = find_model(model), find_real_chip(chip)
        if phase not in ("decode", "prefill"):
            raise UsageError(f"--phase is decode or prefill, not {phase}")
        if pick not in ("chosen", "library", "own"):
            raise UsageError(f"--pick is chosen, library or own, not {pick}")
        if laps < 5:
            raise UsageError("--laps is at least 5: an interval needs that many")
        given = _options.scenario_of(isl, osl, str(batch) if batch else None, tp, dtype, further)
        if given.get("quantization"):
            raise UsageError("a whole layer is composed of unquantised problems: leave out --with quantization")
        if phase == "prefill" and batch:
            given["prefill_batch"] = batch
        scenario = scenario_for(found_model, found_chip, **given)
        step = step_of(found_model, found_chip, scenario, phase)
        groups = groups_of(found_model)
        if not 0 <= group < len(groups):
            raise UsageError(f"--group {group}: this model has {len(groups)} kinds of layers, 0 to {len(groups) - 1}")
        parts = layer_of(groups[group], found_model.stack.hidden, step)
        catalogue = discover()
        timer, device = _timer(found_chip)
        policy = default_policy(found_chip)
        with exclusive(device):
            chosen = _pick(parts, pick, catalogue, found_chip, timer, folders_to_read([results] if results else None))
            try:
                found = measure_layer(parts, chosen, found_chip, timer, policy, laps=laps, tell=lambda line: talk.print(line, markup=False))
            except CheckFailed as error:
                raise CannotMeasure(f"nothing was timed: {error}") from None
            except (RuntimeError, MemoryError) as error:  # torch's allocators, for the most part
                raise CannotMeasure(f"the layer cannot be measured here: {(str(error).splitlines() or ['out of memory'])[0]}") from None
        tokens = f"{phase} {step.batch}x{step.new} behind {step.prefix} tokens"
        title = f"{found_model.name}, {groups[group].count} such layers, {tokens}, {step.dtype}"
        if as_json:
            _emit(found, title, found_chip)
        else:
            _show(found, title, step)


def _pick(parts: Parts, how: str, catalogue: Catalogue, chip: Chip, timer: Any, folders: list[Any]) -> dict[str, Chosen]:
    """A kernel with its configuration for every part; UsageError for a problem that no kernel takes here."""
    from klab.harness.choose.choose import choose
    from klab.harness.choose.profile import Wanted
    from klab.harness.measure.layer import Chosen, quickest
    from klab.harness.plan.layer import Part
    from klab.harness.plan.trials import safe_unfit
    from klab.harness.store.read import ReadReport, iter_results
    from klab.kernels.errors import UsageError

    problems = {part.problem.key: part.problem for part in parts if isinstance(part, Part)}
    known: dict[str, Chosen] = {}
    if how == "chosen":
        rows = [row for row in iter_results([f for f in folders if f.exists()], ReadReport()) if row.chip == chip.name]
        wanted = [Wanted(key, p.operator, p.label(), p.to_json()) for key, p in problems.items()]
        sources = {kernel.id: kernel.source_digest for kernel in catalogue.kernels.values()}
        for choice in choose(rows, wanted, chip=chip.name, sources=sources, current_only=True).choices:
            kernel = catalogue.kernels.get(choice.kernel)
            if kernel is not None:
                known[choice.wanted.problem_key] = Chosen(kernel, kernel.config_type.from_json(choice.config), "chosen")
    found = {}
    for part in parts:
        if not isinstance(part, Part):
            continue
        one = known.get(part.problem.key)
        if one is None:
            fitting = [k for k in catalogue.of(part.problem.operator) if safe_unfit(k, part.problem, chip) is None]
            if not fitting:
                raise UsageError(f"no kernel takes {part.problem.label()} on {chip.name}")
            kernel = quickest(part.problem, [k for k in fitting if k.library == (how != "own")] or fitting, chip, timer)
            one = Chosen(kernel, kernel.default(part.problem, chip), "library" if kernel.library else "own")
        found[part.role] = one
    return found


def _timer(chip: Chip) -> tuple[Any, str]:
    """The timer of the device of this machine, and the name of the device's lock."""
    import torch

    from klab.harness.measure.power import NullMeter
    from klab.harness.measure.timer import CpuTimer

    torch.set_grad_enabled(False)
    if chip.kind == "cpu":
        return CpuTimer(chip, NullMeter("no power sensor on this CPU")), "cpu"
    from klab.harness.fleet.devices import devices
    from klab.harness.measure.cuda_timer import CudaTimer
    from klab.harness.measure.nvml import open_meter

    device = devices(chip)[0]  # CannotMeasure where none of them is this chip
    torch.cuda.set_device(device.index)
    return CudaTimer(chip, open_meter(torch.cuda.get_device_properties(device.index))), device.id


def _emit(found: LayerTime, title: str, chip: Chip) -> None:
    for part in found.parts:
        emit({"type": "part", **{k: v for k, v in vars(part).items() if k != "time"}, **_time(part.time)})
    whole = {k: v for k, v in vars(found).items() if k != "whole"} | {"parts": len(found.parts)}
    emit({"type": "layer", "title": title, "chip": chip.name, **whole, **_time(found.whole)})


def _time(time: Any) -> dict[str, float]:
    return {"median_us": time.median, "ci_low_us": time.low, "ci_high_us": time.high}


def _cells(time: Any) -> tuple[str, str]:
    return f"{time.median:.4g}", f"{time.low:.4g}..{time.high:.4g}"


def _show(found: LayerTime, title: str, step: Step) -> None:
    total = sum(part.time.median for part in found.parts)
    rows = [(p.role, p.label, p.kernel, p.origin, *_cells(p.time), f"{p.time.median / total:.1%}") for p in found.parts]
    columns = ("part", "problem", "kernel", "picked", "us", "95%", "share")
    table(title, columns, rows, ("us", "share"))
    ratio, bare = found.ratio, found.bare_ratio
    glue = sum(p.time.median for p in found.parts if p.origin == "glue")
    out.print(
        f"sum of the parts {total:.5g} us, of it {glue:.4g} us of copies that an engine does not make; the whole, in one "
        f"{'CUDA graph' if found.launch_mode == 'graph' else found.launch_mode}, {found.whole.median:.5g} us "
        f"({found.whole.low:.5g}..{found.whole.high:.5g})\n"
        f"whole / sum = {ratio[0]:.3f} ({ratio[1]:.3f}..{ratio[2]:.3f}), without the copies {bare[0]:.3f} ({bare[1]:.3f}..{bare[2]:.3f}); "
        f"the median of the ratios lap by lap; {found.laps} laps, {found.sets} copies of the layer, cache {found.l2_state}\n"
        f"output off by {found.error:.2e} from the composed references (tolerance {found.tolerance:.2e})",
        markup=False,
        soft_wrap=True,
    )
