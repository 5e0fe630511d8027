"""`klab choose`: the best kernel and configuration for each problem of a model, written as a profile with its evidence."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from klab.harness.cli import _options
from klab.harness.cli._console import emit, table, talk
from klab.harness.cli._options import AsJson, KernelDirs

if TYPE_CHECKING:
    from klab.harness.choose.profile import Choice, Profile

Model = Annotated[
    str | None,
    typer.Option("--model", "-m", help="A model's name or config.json: choose for its plan. Default: for every problem with a result."),
]
Where = Annotated[
    list[Path] | None,
    typer.Option("--results", help="Folder or file to read. Repeatable. Default: $KLAB_RESULTS, or results/ of the checkout."),
]
Objective = Annotated[
    str, typer.Option("--objective", help="latency (median time), energy (joules per launch), energy-delay (their product) or cost.")
]
UsdPerHour = Annotated[float | None, typer.Option("--usd-per-hour", help="For --objective cost: what an hour of the device costs.")]
UsdPerKwh = Annotated[float | None, typer.Option("--usd-per-kwh", help="For --objective cost: what a kWh costs.")]
Out = Annotated[Path | None, typer.Option("--out", help="Where the profile goes. Default: profiles/tuned/CHIP/MODEL.json.")]
ForBucket = Annotated[
    str | None,
    typer.Option(
        "--bucket", help="One configuration for all shapes that differ in one size: by geomean or worst regret. Writes no profile."
    ),
]
HowMany = Annotated[int, typer.Option("--buckets", help="With --bucket: so many configurations at most, each for neighbouring shapes.")]
Along = Annotated[
    str | None, typer.Option("--bucket-by", help="With --bucket: the size that differs, such as m or kv_lens. Default: the first.")
]
Current = Annotated[bool, typer.Option("--current-only", help="Leave out results of kernels whose code has changed since.")]

OPEN_SHOWN = 8
_COLUMNS = ("problem", "kernel", "config", "median us", "interval us", "vs library", "tie", "settled by", "uJ", "uses")
_RIGHT = ("median us", "interval us", "vs library", "uJ")


def command(app: typer.Typer) -> None:
    """Register the verb."""

    @app.command()
    def choose(
        model: Model = None,
        chip: _options.Chip = "auto",
        objective: Objective = "latency",
        usd_per_hour: UsdPerHour = None,
        usd_per_kwh: UsdPerKwh = None,
        isl: _options.Isl = None,
        osl: _options.Osl = None,
        batch: _options.Batch = None,
        tp: _options.Tp = 1,
        dtype: _options.Dtype = None,
        further: _options.With = None,
        results: Where = None,
        kernels: KernelDirs = None,
        out: Out = None,
        current_only: Current = False,
        max_error: _options.MaxError = None,
        bucket: ForBucket = None,
        buckets: HowMany = 1,
        bucket_by: Along = None,
        as_json: AsJson = False,
    ) -> None:
        """Choose per problem, with intervals; what cannot be told apart is a tie, settled by energy, last time's choice, simplicity."""
        from klab.harness.catalog import find_chip, find_model
        from klab.harness.choose.decide import decide, same_choice
        from klab.harness.choose.profile import profile_path, read_profile, write_text
        from klab.harness.measure.calibration import read_calibrations
        from klab.harness.measure.correction import corrected
        from klab.harness.plan import plan as make_plan
        from klab.harness.plan import scenario_for
        from klab.harness.store.paths import folders_to_read
        from klab.harness.store.read import ReadReport, iter_results
        from klab.harness.tune import objective as goals
        from klab.kernels.discover import discover
        from klab.kernels.errors import CannotMeasure, UsageError

        goal = goals.Objective.parse(objective, usd_per_hour, usd_per_kwh)
        folders = folders_to_read(results)
        found_chip = find_chip(chip)
        plan = None
        if model is None and (isl or osl or batch or dtype or tp != 1 or further):
            raise UsageError("--isl, --osl, --batch, --tp, --dtype and --with describe a model's plan: give --model too")
        if model is not None:
            found_model = find_model(model)
            given = _options.scenario_of(isl, osl, batch, tp, dtype, further)
            scenario = scenario_for(found_model, found_chip, **given)
            plan = make_plan(found_model, found_chip, scenario)
        if bucket is None and (buckets != 1 or bucket_by is not None):
            raise UsageError("--buckets and --bucket-by go with --bucket geomean or --bucket worst")
        if bucket is not None:
            if out is not None:
                raise UsageError("--bucket prints and writes no profile: leave out --out, and redirect --json")
            from klab.harness.cli._buckets import Asked, show_buckets

            asked = Asked(goal, bucket, buckets, bucket_by, current_only=current_only, as_json=as_json)
            show_buckets(folders, plan, found_chip, discover(kernels or ()), asked)
            return
        path = out or (profile_path(found_chip.name, plan.model.name, goal.name) if plan else None)
        previous = read_profile(path) if path else None
        report = ReadReport()
        there = [folder for folder in folders if folder.exists()]
        troubles: list[str] = []
        rows, said = corrected(iter_results(there, report), read_calibrations(there, troubles))
        for line in (*troubles, *said):
            talk.print(line, style="yellow", markup=False, soft_wrap=True)
        profile = decide(
            rows,
            plan,
            found_chip.name,
            goal,
            catalogue=discover(kernels or ()),
            previous=previous,
            current_only=current_only,
            limits=found_chip,
            max_error=_options.checked_error(max_error),
        )
        # A profile without choices would replace one that has some.
        written = path if profile.choices else None
        if written:
            write_text(written, profile.to_text())
        show_profile(profile, as_json=as_json)
        for line in report.lines():
            talk.print(line, style="yellow", markup=False, soft_wrap=True)
        tell_profile(profile, written, same_choice(previous, profile) if previous and profile.choices else None)
        if not profile.choices:
            raise typer.Exit(CannotMeasure.exit_code)


def show_profile(profile: Profile, *, as_json: bool) -> None:
    """The choices on stdout: a table, or JSON lines (the profile, then its steps, choices and open problems; `type` tells them apart)."""
    if as_json:
        _emit(profile)
    else:
        _table(profile)


def tell_profile(profile: Profile, path: Path | None, changed: list[str] | None) -> None:
    """What a person must know besides, on stderr. `path`: the file written (None: none); `changed`: what differs from last time."""
    from klab.harness.store.remote import shown

    for line in profile.notes:
        talk.print(line, style="yellow", markup=False, soft_wrap=True)
    for one in profile.open[:OPEN_SHOWN]:
        talk.print(f"open: {one.wanted.label}: {one.reason}", style="yellow", markup=False, soft_wrap=True)
    if len(profile.open) > OPEN_SHOWN:
        talk.print(f"open: {len(profile.open) - OPEN_SHOWN} more problems (--json lists all)", style="yellow", markup=False)
    if not profile.choices:
        hint = "measure first (`klab run`, `klab measure`), or name another folder with --results"
        talk.print(f"nothing on {profile.chip} may be chosen, so nothing was written: {hint}", style="yellow", markup=False, soft_wrap=True)
    if changed is not None:
        names = f": {', '.join(changed[:5])}{' ...' if len(changed) > 5 else ''}" if changed else ""
        talk.print(f"{len(changed)} choices differ from last time's{names}", markup=False, soft_wrap=True)
    if path is not None and profile.choices:
        talk.print(f"profile: {shown(path)}", markup=False, soft_wrap=True)
    elif profile.choices:
        talk.print("not written: --model M names a profile, --out FILE any other file", markup=False)


def _emit(profile: Profile) -> None:
    import json

    data = json.loads(profile.to_text())
    lists = {name: data.pop(name) for name in ("steps", "choices", "open")}
    emit({"type": "profile", **data})
    for kind, rows in zip(("step", "choice", "open"), lists.values(), strict=True):
        for row in rows:
            emit({"type": kind, **row})


def _table(profile: Profile) -> None:
    if not profile.choices:
        return
    from klab.harness.report.units import speed_up, sum_time, time

    title = f"{profile.model or 'All problems'} on {profile.device or profile.chip}, by {profile.objective}"
    table(title, _COLUMNS, [_cells(choice) for choice in profile.choices], _RIGHT)
    steps = [
        (
            f"{step.phase}, batch {step.batch}",
            sum_time(step.us, step.open),
            time(step.library_us) if step.library_us else "",
            speed_up(step.library_us, step.us, step.open),
            step.open or "",
            "" if step.modelled_share is None else f"{step.modelled_share:.0%}",
        )
        for step in profile.steps
    ]
    columns = ("step", "kernels", "libraries", "speed-up", "problems open", "of modelled time")
    if steps:
        table("Sum of the chosen kernels per step", columns, steps, columns[1:])


def _cells(choice: Choice) -> tuple[object, ...]:
    evidence = choice.evidence
    library = evidence.library
    config = " ".join(f"{name}={value}" for name, value in choice.config.items()) or "-"
    return (
        choice.wanted.label,
        (choice.kernel if choice.instead else choice.kernel.partition("/")[2])
        + (f" as {choice.instead} (error {evidence.wide_error:.2g})" if choice.instead and evidence.wide_error is not None else "")
        + (" (stale)" if choice.stale else ""),
        config,
        f"{evidence.median_us:.5g}",
        f"{evidence.interval_us[0]:.5g}..{evidence.interval_us[1]:.5g}",
        f"{library.ratio:.3f}x" if library else "library" if choice.library else "",
        f"of {evidence.tied_count + 1}" if evidence.tied_count else "",
        evidence.settled_by,
        "" if evidence.energy_j is None else f"{evidence.energy_j * 1e6:.4g}",
        ", ".join(f"{use.phase} {use.batch} x{use.count}" for use in choice.wanted.uses),
    )
