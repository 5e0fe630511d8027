"""`klab plan`: the operators of a model on a chip, with their work and their roofline bound."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from klab.harness.cli import _options
from klab.harness.cli._console import emit, out, table, talk
from klab.harness.cli._options import AsJson

if TYPE_CHECKING:
    from pathlib import Path

    from klab.harness.plan import Plan, Row
    from klab.kernels.contract import Chip

Prefix = Annotated[int | None, typer.Option("--prefix", help="Prompt tokens that are in the cache already (part of --isl).")]
PrefillBatch = Annotated[int | None, typer.Option("--prefill-batch", help="Sequences per prefill (or samples per denoising step).")]
Page = Annotated[int | None, typer.Option("--page-size", help="Tokens per page of the KV cache.")]
QLen = Annotated[int | None, typer.Option("--q-len", help="Tokens per sequence and decode step: above 1 to verify speculated tokens.")]
Measured = Annotated[
    bool, typer.Option("--measured", help="Bounds by the peaks that klab calibrate measured on a device of this chip (the newest).")
]
Ep = Annotated[bool, typer.Option("--expert-parallel", help="Spread whole experts over the --tp GPUs instead of slices of each.")]


def command(app: typer.Typer) -> None:
    """Register the verb."""

    @app.command()
    def plan(
        model: _options.Model,
        chip: _options.Chip = "auto",
        isl: _options.Isl = None,
        osl: _options.Osl = None,
        batch: _options.Batch = None,
        tp: _options.Tp = 1,
        dtype: _options.Dtype = None,
        prefix: Prefix = None,
        prefill_batch: PrefillBatch = None,
        page_size: Page = None,
        q_len: QLen = None,
        expert_parallel: Ep = False,
        further: _options.With = None,
        measured: Measured = False,
        results: _options.Results = None,
        as_json: AsJson = False,
    ) -> None:
        """Show what a model computes on a chip: every operator and shape, how often, its flops, bytes and roofline bound."""
        from klab.harness.catalog import find_chip, find_model
        from klab.harness.plan import plan as make_plan
        from klab.harness.plan import scenario_for

        found_model, found_chip = find_model(model), find_chip(chip)
        if measured:
            found_chip = _measured(found_chip, results)
        given = {
            "isl": isl,
            "osl": osl,
            "batches": _options.integers(batch, "--batch"),
            "tp": tp,
            "dtype": dtype,
            "prefix_len": prefix,
            "prefill_batch": prefill_batch,
            "page_size": page_size,
            "q_len": q_len,
            "expert_parallel": expert_parallel or None,
        }
        scenario = scenario_for(found_model, found_chip, **given | _options.scenario_fields(further))
        made = make_plan(found_model, found_chip, scenario)
        if as_json:
            _emit(made)
        else:
            _show(made)


def _measured(chip: Chip, results: Path | None) -> Chip:
    """The chip with the measured peaks of its newest calibrated device; says which figures those are."""
    from klab.harness.measure.calibration import is_measured, measured_chip, newest_of
    from klab.harness.store.paths import folder_to_read

    found = newest_of(chip.name, [folder_to_read(results)])
    own = measured_chip(chip, found)
    kept = [dtype for dtype in own.peak_tflops if not is_measured(own, dtype)]
    talk.print(
        f"bounds by what {found.device} {found.device_uuid} reached on {found.at[:10]} (measured)"
        + (f"; as specified, for they were not measured: {', '.join(kept)}" if kept else ""),
        markup=False,
        soft_wrap=True,
    )
    return own


def _emit(plan: Plan) -> None:
    """One line for the plan, one per row, per step's totals and per note; `type` tells them apart."""
    emit(
        {
            "type": "plan",
            "model": plan.model.name,
            "chip": plan.chip.name,
            "dtype": plan.dtype,
            "scenario": vars(plan.scenario),
            "weight_bytes": plan.weight_bytes,
            "kv_bytes_per_token": plan.kv_bytes_per_token,
            "problems": len(plan.problems()),
            "covered_share": plan.model.covered_share,
        }
    )
    for row in plan.rows:
        emit({"type": "row", **row.to_json()})
    for total in plan.totals:
        emit({"type": "totals", **vars(total)})
    for note in plan.notes:
        emit({"type": "note", **vars(note)})


_COLUMNS = ("role", "operator and shape", "launches", "GFLOP", "MB", "FLOP/B", "bound us", "limit", "% time", "kernel")
_RIGHT = ("launches", "GFLOP", "MB", "FLOP/B", "bound us", "% time")


def _show(plan: Plan) -> None:
    s = plan.scenario
    gpus = f" x {s.tp}" if s.tp > 1 else ""
    out.print(
        f"{plan.model.name} on {plan.chip.title}{gpus}, {plan.dtype}: {plan.weight_bytes / 1e9:.1f} GB of weights per chip",
        markup=False,
        soft_wrap=True,
    )
    understood = _understood(plan.model.covered_share)
    for total in plan.totals:
        rows = plan.step(total.phase, total.batch)
        table(_title(plan, total.phase, total.batch), _COLUMNS, [_cells(row, total.bound_us) for row in rows], right=_RIGHT)
        sent = f", {total.link_bytes / 1e6:.1f} MB to other chips" if total.link_bytes else ""
        out.print(
            f"in all {_figure(total.flops / 1e9)} GFLOP, {_figure(total.bytes_moved / 1e6)} MB{sent}, at least {_time(total.bound_us)}; "
            f"klab measures {total.covered_flops_share:.1%} of the flops and {total.covered_time_share:.1%} of that time{understood}\n",
            markup=False,
            soft_wrap=True,
        )
    out.print(
        f"{len(plan.problems())} problems to measure. Launches are per layer x layers; GFLOP, MB and bound are of one launch on one chip.",
        soft_wrap=True,
    )
    for note in plan.notes:
        out.print(f"{note.level}: {note.text}", style="yellow" if note.level == "warning" else None, markup=False, soft_wrap=True)


def _understood(share: float | None) -> str:
    """What the shares of a step are shares of, where a part of the model is not in the plan; None: how large a part is not known."""
    if share == 1.0:
        return ""
    of = "an unknown share" if share is None else f"{share:.1%}"
    return f", of what is understood of this model ({of} of its flops, see the warnings below)"


def _title(plan: Plan, phase: str, batch: int) -> str:
    s = plan.scenario
    if phase == "denoise":
        return f"One denoising step, batch {batch}: {s.isl:,} latent tokens + {plan.model.text_tokens} of text"
    if plan.model.encoder is not None:
        source = plan.model.encoder.tokens or s.isl
        return f"{phase.capitalize()}, batch {batch}: {source:,} encoder tokens" + ("" if phase == "prefill" else f", {s.osl} to generate")
    if phase == "prefill":
        return f"Prefill, batch {batch}: {s.isl - s.prefix_len:,} new tokens" + (f" behind {s.prefix_len:,} cached" if s.prefix_len else "")
    return f"Decode, batch {batch}: context {s.context:,} (isl + osl/2)" + (f", {s.q_len} tokens each" if s.q_len > 1 else "")


def _cells(row: Row, whole_us: float) -> tuple[object, ...]:
    shape = " ".join(f"{name}={value}" for name, value in row.shape.items())
    # Twice in each of 28 layers; once outside them; where layers differ, the count alone.
    often = f"{row.count // row.layers} x {row.layers}" if row.count % row.layers == 0 else str(row.count)
    return (
        row.role,
        row.problem.label() if row.problem else f"{row.operator} {shape}",
        often,
        _figure(row.flops / 1e9),
        _figure(row.bytes_moved / 1e6),
        _figure(row.intensity),
        _figure(row.bound_us),
        row.limit,
        f"{row.count * row.bound_us / whole_us:.1%}" if whole_us else "",
        "yes" if row.problem else "not yet",
    )


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _time(us: float) -> str:
    return f"{us / 1e6:.2f} s" if us >= 1e6 else f"{us / 1e3:.2f} ms" if us >= 1e3 else f"{us:.1f} us"
