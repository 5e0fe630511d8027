"""`klab export`: what was measured and verified, as the tables that a serving engine loads, or as a profile for code of one's own."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from klab.harness.cli import _options
from klab.harness.cli._console import emit, out, table, talk
from klab.harness.cli.choose import Current, Objective, UsdPerHour, UsdPerKwh, Where

if TYPE_CHECKING:
    from klab.harness.catalog.architecture import Model
    from klab.harness.choose.engines.names import Dialect
    from klab.harness.choose.engines.tables import Tables
    from klab.harness.choose.engines.writing import Written
    from klab.harness.tune.objective import Objective as Goal
    from klab.kernels.contract import Chip
    from klab.kernels.discover import Catalogue

Engine = Annotated[str, typer.Option("--engine", "-e", help="vllm, sglang, or json: a profile for klab.kernels.apply.")]
Folder = Annotated[Path, typer.Option("--out", "-o", help="Folder for the tables and their evidence.")]
Tp = Annotated[int | None, typer.Option("--tp", help="Only for so many GPUs per replica. Default: every size that was measured.")]
Triton = Annotated[
    str | None, typer.Option("--triton", help="Only results of this version of Triton: the engine's. Default: the newest there is.")
]
Device = Annotated[str | None, typer.Option("--device", help="Only results of this device, by CUDA's name. Default: the newest result's.")]
Partial = Annotated[
    bool, typer.Option("--partial", help="Write also tables whose entries lie far apart. The engine fills gaps with far ones.")
]
Force = Annotated[bool, typer.Option("--force", help="Replace tables that klab did not write, or that have more entries.")]

RIGHT = ("entries", "tokens", "vs no table")
COLUMNS = ("table", "entries", "tokens", "vs no table", "Triton", "evidence")


def command(app: typer.Typer) -> None:
    """Register the verb."""

    @app.command()
    def export(
        engine: Engine,
        model: _options.Model,
        out_folder: Folder,
        chip: _options.Chip = "auto",
        tp: Tp = None,
        objective: Objective = "latency",
        usd_per_hour: UsdPerHour = None,
        usd_per_kwh: UsdPerKwh = None,
        triton: Triton = None,
        device: Device = None,
        further: _options.With = None,
        results: Where = None,
        kernels: _options.KernelDirs = None,
        current_only: Current = False,
        partial: Partial = False,
        force: Force = False,
        as_json: _options.AsJson = False,
    ) -> None:
        """Write the tuned tables that vLLM or SGLang load: verified and measured configurations alone, with their evidence beside them."""
        from klab.harness.catalog import find_chip, find_model
        from klab.harness.store.paths import folders_to_read
        from klab.harness.tune import objective as goals
        from klab.kernels.discover import discover
        from klab.kernels.errors import UsageError

        goal = goals.Objective.parse(objective, usd_per_hour, usd_per_kwh)
        found_model, found_chip = find_model(model), find_chip(chip)
        folders = [folder for folder in folders_to_read(results) if folder.exists()]
        if out_folder.exists() and not out_folder.is_dir():
            raise UsageError(f"--out {out_folder} is a file; tables need a folder")
        if engine.strip().lower() == "json":
            if triton or device or partial:
                raise UsageError("--triton, --device and --partial are for the tables of engines, not for --engine json")
            _profile(found_model, found_chip, goal, folders, discover(kernels or ()), out_folder, tp=tp, further=further,
                     current_only=current_only, force=force, as_json=as_json)  # fmt: skip
            return
        from klab.harness.choose.decide import defaults_of
        from klab.harness.choose.engines import find_dialect
        from klab.harness.choose.engines.advice import products_of
        from klab.harness.choose.engines.shapes import experts_of, shapes_of
        from klab.harness.choose.engines.tables import Asked, engine_sources, tables_of
        from klab.harness.choose.profile import profile_path, read_profile
        from klab.harness.store.read import ReadReport, iter_results

        dialect = find_dialect(engine)
        if found_chip.kind != "cuda":
            raise UsageError(
                f"{dialect.title} loads tables for GPUs, and {found_chip.title} is none; --engine json writes a profile for it"
            )
        if further:
            raise UsageError(
                "--with describes a plan, for --engine json; tables are written for every format and sharding that was measured"
            )
        shapes = list(shapes_of(found_model, tp))
        if tp is not None and not shapes and experts_of(found_model):
            raise UsageError(f"--tp {tp} divides neither the experts of {found_model.name} nor their features")
        catalogue = discover(kernels or ())
        asked = Asked(goal, read_profile(profile_path(found_chip.name, found_model.name, goal.name)), device, triton,
                      engine_sources(catalogue.kernels.values()), defaults_of(catalogue, found_chip), current_only)  # fmt: skip
        report = ReadReport()
        made = tables_of(iter_results(folders, report), dialect, found_chip, shapes, products_of(found_model, found_chip, tp), asked)
        for line in (*report.lines(), *made.notes, *made.open):
            talk.print(line, style="yellow", markup=False, soft_wrap=True)
        _write(made, dialect, found_model, found_chip, catalogue, out_folder, goal, partial=partial, force=force, as_json=as_json)


def _write(made: Tables, dialect: Dialect, model: Model, chip: Chip, catalogue: Catalogue, folder: Path, goal: Goal, *, partial: bool,
           force: bool, as_json: bool) -> None:  # fmt: skip
    from klab.harness.choose.engines.advice import dense, gaps, how_to_use, missing
    from klab.harness.choose.engines.writing import targets, write
    from klab.kernels.errors import CannotMeasure

    short = [one for one in made.tables if one.far and not partial]
    whole = [one for one in made.tables if one not in short]
    planned = targets(whole, dialect, folder)
    write(planned, dialect, {"model": model.name, "chip": chip.name, "device": made.device, "objective": str(goal)}, force=force)
    for one in planned:
        if as_json:
            emit({"type": "table", **_facts(one, dialect)})
    if planned and not as_json:
        table(f"{dialect.title}'s tables for {model.name} on {made.device}", COLUMNS, [_cells(one) for one in planned], RIGHT)
        for line in how_to_use(dialect, folder, whole, model):
            out.print(line, markup=False, soft_wrap=True)
    for one in planned:
        for tokens, why in one.table.skipped.items():
            talk.print(f"{one.path.name}: {tokens} tokens left out: {why}", style="yellow", markup=False, soft_wrap=True)
    for one_short in short:
        talk.print(gaps(one_short, dialect, model, chip), style="yellow", markup=False, soft_wrap=True)
    if not planned:
        raise CannotMeasure(f"nothing was written: {missing(made, dialect, model, chip, catalogue.kernels.values())}")
    talk.print(f"tables of dense products: {dense(catalogue.kernels.values())}", markup=False, soft_wrap=True)


def _facts(one: Written, dialect: Dialect) -> dict[str, Any]:
    from klab.harness.choose.engines.reading import sidecar_of

    return {
        "file": str(one.path),
        "evidence": str(sidecar_of(one.path)),
        "engine": dialect.engine,
        "triton": one.table.triton,
        "tokens": [entry.tokens for entry in one.table.entries],
        "over_no_table": dict(zip(("ratio", "low", "high"), one.table.speed_up or (None,) * 3, strict=True)),
        "far": one.table.far,
        "skipped": dict(one.table.skipped),
    }


def _cells(one: Written) -> tuple[object, ...]:
    entries = one.table.entries
    doubt = max((e.choice.evidence.interval_us[1] - e.choice.evidence.interval_us[0]) / 2 / e.choice.evidence.median_us for e in entries)
    speed_up = one.table.speed_up
    known = sum(entry.untuned is not None for entry in entries)
    some = f" at {known}" if known < len(entries) else ""
    faster = "not measured" if speed_up is None else f"{speed_up[0]:.3f}x ({speed_up[1]:.3f}..{speed_up[2]:.3f}){some}"
    tokens = f"{entries[0].tokens}..{entries[-1].tokens}"
    return one.path.name, len(entries), tokens, faster, one.table.triton, f"95% within {doubt:.1%} or less"


def _profile(model: Model, chip: Chip, goal: Goal, folders: list[Path], catalogue: Catalogue, folder: Path, *, tp: int | None,
             further: list[str] | None, current_only: bool, force: bool, as_json: bool) -> None:  # fmt: skip
    """--engine json."""
    from klab.harness.choose.decide import decide
    from klab.harness.choose.engines.reading import sidecar_of
    from klab.harness.choose.engines.sidecar import sidecar_text
    from klab.harness.choose.engines.writing import foreign
    from klab.harness.choose.profile import profile_path, read_profile, write_text
    from klab.harness.plan import plan, scenario_for
    from klab.harness.store.read import ReadReport, iter_results
    from klab.kernels.errors import CannotMeasure, UsageError

    planned = plan(model, chip, scenario_for(model, chip, tp=tp, **_options.scenario_fields(further)))
    previous = read_profile(profile_path(chip.name, model.name, goal.name))
    report = ReadReport()
    profile = decide(iter_results(folders, report), planned, chip.name, goal, catalogue=catalogue, previous=previous,
                     current_only=current_only, limits=chip)  # fmt: skip
    for line in (*report.lines(), *profile.notes):
        talk.print(line, style="yellow", markup=False, soft_wrap=True)
    if not profile.choices:
        raise CannotMeasure(f"nothing was written: none of the plan's problems has a verified result on {chip.name}; `klab run` makes some")
    path = folder / f"{model.name}.{chip.name}.json"
    if not force and (lost := foreign(path)):
        raise UsageError(f"{path} is there and {lost}: --force replaces it, another --out leaves it")
    text = profile.to_text()
    facts = {"engine": "json", "model": model.name, "chip": chip.name, "device": profile.device, "objective": str(goal),
             "choices": len(profile.choices), "open": len(profile.open)}  # fmt: skip
    write_text(sidecar_of(path), sidecar_text(text, facts))
    write_text(path, text)
    if as_json:
        emit({"type": "profile", "file": str(path), "evidence": str(sidecar_of(path)), **facts})
        return
    out.print(f"{path}: {len(profile.choices)} problems with a kernel, {len(profile.open)} without", markup=False, soft_wrap=True)
    out.print(f'to use: from klab.kernels import apply; pack = apply("{path}")', markup=False, soft_wrap=True)
