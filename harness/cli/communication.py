"""`klab communication`: collectives between GPUs, modelled from the link, and measured where there are several."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from klab.harness.cli import _options
from klab.harness.cli._console import emit, out, table, talk
from klab.kernels.errors import CannotMeasure, UsageError

if TYPE_CHECKING:
    from klab.harness.fleet.devices import Device
    from klab.harness.plan.communication import Collective, Table
    from klab.kernels.contract import Chip

AModel = Annotated[str | None, typer.Option("--model", "-m", help="The messages of its plan with --tp. Default: a sweep of sizes.")]
Gpus = Annotated[int | None, typer.Option("--gpus", help="How many ranks. Default: --tp, or all GPUs of this machine.")]
Backend = Annotated[
    str, typer.Option("--backend", help="nccl: measure the GPUs here; gloo: CPU processes; none: model; auto: nccl, else none.")
]
Out = Annotated[Path | None, typer.Option("--out", help="Write what was measured to this file.")]
Read = Annotated[Path | None, typer.Option("--table", help="Use this earlier measurement (a file of --out) instead of measuring.")]


def command(app: typer.Typer) -> None:
    """Register the verb."""

    @app.command()
    def communication(
        chip: _options.Chip = "auto",
        model: AModel = None,
        gpus: Gpus = None,
        tp: _options.Tp = 1,
        isl: _options.Isl = None,
        osl: _options.Osl = None,
        batch: _options.Batch = None,
        dtype: _options.Dtype = None,
        further: _options.With = None,
        backend: Backend = "auto",
        out_file: Out = None,
        known: Read = None,
        as_json: _options.AsJson = False,
    ) -> None:
        """All-reduce, all-gather, reduce-scatter and all-to-all: microseconds per message size, each labelled measured or modelled."""
        from klab.harness.catalog import find_chip
        from klab.harness.choose.profile import write_text
        from klab.harness.plan.communication import read_table, sweep

        if backend not in ("auto", "none", "nccl", "gloo"):
            raise UsageError(f"--backend is auto, none, nccl or gloo, not {backend}")
        found_chip = find_chip(chip)
        here = _gpus_here(found_chip)
        ranks = gpus or (tp if tp > 1 else len(here))
        if ranks < 2:
            raise UsageError("a collective takes two or more GPUs: say --gpus N (the model then gives times without any)")
        counts: dict[Collective, str] = {}
        if model is not None:
            counts = _of_model(model, found_chip, _options.scenario_of(isl, osl, batch, ranks, dtype, further))
        wanted = list(counts) or sweep(ranks)
        if not counts and model is not None:
            raise UsageError(f"{model} with --tp {ranks} sends nothing between GPUs")
        how = backend if backend != "auto" else ("nccl" if len(here) >= ranks else "none")
        measured = read_table(known) if known else _measured(wanted, how, found_chip, ranks)
        if measured is not None:
            measured.require(found_chip)
        if out_file is not None:
            if measured is None:
                raise CannotMeasure(f"nothing was measured, so {out_file} was not written: {ranks} GPUs (or --backend gloo) are needed")
            write_text(out_file, json.dumps(measured.to_json(), indent=1) + "\n")
            talk.print(f"wrote {out_file}", markup=False, soft_wrap=True)
        _show(wanted, counts, measured, found_chip, as_json=as_json)


def _gpus_here(chip: Chip) -> list[Device]:
    """The GPUs of this machine that are this chip."""
    from klab.harness.fleet.devices import devices

    try:
        return [device for device in devices(chip) if device.kind == "cuda"]
    except CannotMeasure:
        return []


def _of_model(name: str, chip: Chip, given: dict[str, object]) -> dict[Collective, str]:
    """The plan's collectives, each with where it occurs."""
    from klab.harness.catalog import find_model
    from klab.harness.plan import plan, scenario_for
    from klab.harness.plan.communication import exchanges, messages

    model = find_model(name)
    made = plan(model, chip, scenario_for(model, chip, **given))
    found: dict[Collective, list[str]] = {}
    for steps in (messages(made), exchanges(made)):
        for (phase, batch), step in steps.items():
            for one, count in step.items():
                found.setdefault(one, []).append(f"{phase} {batch} x{count}")
    return {one: ", ".join(places) for one, places in sorted(found.items(), key=lambda item: (item[0].kind, item[0].message_bytes))}


def _measured(wanted: list[Collective], backend: str, chip: Chip, ranks: int) -> Table | None:
    from klab.harness.fleet.devices import devices
    from klab.harness.measure import environment
    from klab.harness.measure.communication import measure
    from klab.harness.measure.lock import exclusive
    from klab.harness.plan.communication import Table

    if backend == "none":
        return None
    if backend == "nccl" and chip.kind != "cuda":
        raise UsageError(f"nccl measures GPUs, and {chip.name} is none: say --backend gloo")
    if backend == "gloo" and chip.kind != "cpu":
        raise UsageError("gloo measures CPU processes, which says nothing of a GPU's links: say --chip cpu")
    chosen = devices(chip)[:ranks]  # CannotMeasure, saying what is here, when no device is this chip
    if backend == "nccl" and len(chosen) < ranks:
        raise CannotMeasure(f"{ranks} {chip.title} are needed and {len(chosen)} are here: --backend none gives the model's times")
    talk.print(f"measuring {len(wanted)} collectives over {ranks} ranks with {backend}", markup=False)
    with ExitStack() as locks:
        for device in chosen:
            locks.enter_context(exclusive(device.id))
        points = measure(wanted, backend=backend, devices=[device.index for device in chosen] if backend == "nccl" else ())
    return Table(chip.name, backend, tuple(points), environment.software() | environment.host())


def _show(wanted: list[Collective], counts: dict[Collective, str], measured: Table | None, chip: Chip, *, as_json: bool) -> None:
    from klab.harness.plan.communication import modelled

    rows = []
    for one in wanted:
        model = modelled(one, chip.link_gb_per_s) if chip.link_gb_per_s else None
        if measured is None and model is None:
            raise UsageError(f"chip {chip.name} states no link_gb_per_s, so nothing can be modelled: measure with --backend gloo or nccl")
        best = measured.expected(one, chip.link_gb_per_s) if measured else model
        assert best is not None
        rows.append((one, best, model))
    for one, best, model in rows if as_json else ():
        emit({**vars(one), "wire_bytes": one.wire_bytes, "us": best.us, "origin": best.origin, "how": best.how,
              "modelled_us": model.us if model else None, "where": counts.get(one, "")})  # fmt: skip
    if as_json:
        return
    cells = [
        (one.kind, one.gpus, f"{one.message_bytes:,}", f"{best.us:.4g}", best.origin, f"{one.wire_bytes / best.us / 1e3:.3g}",
         best.how, f"{model.us:.4g}" if model else "", counts.get(one, ""))
        for one, best, model in rows
    ]  # fmt: skip
    columns = ("collective", "GPUs", "bytes", "us", "label", "bus GB/s", "by", "modelled us", "where")
    table(f"Collectives on {chip.title}", columns, cells, ("GPUs", "bytes", "us", "bus GB/s", "modelled us"))
    if measured is None:
        out.print("modelled from the link's data sheet and NCCL's constants: nothing here was measured", markup=False, soft_wrap=True)
