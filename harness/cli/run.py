"""`klab run`: the main job. Plan, screen, check, measure, store, choose, report."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from klab.harness.cli import _options
from klab.harness.cli._console import emit, talk
from klab.harness.cli.choose import Objective, UsdPerHour, UsdPerKwh, show_profile, tell_profile
from klab.harness.cli.measure import Again, DryRun, Energy, Phase, measure_setups, show_trials

if TYPE_CHECKING:
    from klab.harness.cli._setup import Setup
    from klab.harness.tune.job import Job
    from klab.harness.tune.objective import Objective as Goal

Page = Annotated[Path | None, typer.Option("--report", help="The page. Default: report.html in the results folder.")]
Pack = Annotated[Path | None, typer.Option("--out", help="Where the profile goes. Default: profiles/tuned/CHIP/MODEL.json.")]

# Choosing and drawing after the measuring, on two cores.
WRAP_UP_S = 2.0


def command(app: typer.Typer) -> None:
    """Register the verb."""

    @app.command()
    def run(
        model: _options.Model,
        chip: _options.Chips = "auto",
        kernel: _options.Only = None,
        candidates: _options.Candidates = "default",
        kernels: _options.KernelDirs = None,
        isl: _options.Isl = None,
        osl: _options.Osl = None,
        batch: _options.Batch = None,
        tp: _options.Tp = 1,
        dtype: _options.Dtype = None,
        further: _options.With = None,
        phase: Phase = None,
        max_error: _options.MaxError = None,
        objective: Objective = "latency",
        usd_per_hour: UsdPerHour = None,
        usd_per_kwh: UsdPerKwh = None,
        budget: _options.Budget = None,
        fleet: _options.FleetKind = "local",
        address: _options.Address = None,
        results: _options.Results = None,
        again: Again = False,
        energy: Energy = True,
        out: Pack = None,
        report: Page = None,
        dry_run: DryRun = False,
        as_json: _options.AsJson = False,
    ) -> None:
        """From a model to measured kernels, a chosen pack and a report. Known results are used, not measured twice; Ctrl-C keeps all."""
        from klab.harness.cli._setup import deadline_of, look_up_all
        from klab.harness.fleet.open import Engine
        from klab.harness.tune import objective as goals
        from klab.kernels.errors import UsageError

        goal = goals.Objective.parse(objective, usd_per_hour, usd_per_kwh)
        deadline = deadline_of(_options.seconds(budget), reserve_s=WRAP_UP_S)
        engine = Engine(fleet, address)
        setups = look_up_all(
            model,
            chip,
            engine,
            isl=isl,
            osl=osl,
            batch=batch,
            tp=tp,
            dtype=dtype,
            further=further,
            kernel_dirs=kernels,
            only=kernel,
            candidates=candidates,
            phase=phase,
            narrower=_options.checked_error(max_error) is not None,
        )
        if out is not None and len(setups) > 1:
            raise UsageError("--out names one profile, and every chip has its own: leave it out")
        for level, text in dict.fromkeys((note.level, note.text) for setup in setups for note in setup.plan.notes):
            talk.print(f"{level}: {text}", style="yellow" if level == "warning" else None, markup=False, soft_wrap=True)
        if dry_run:
            for setup in setups:
                show_trials(setup, as_json=as_json)
            return
        job = measure_setups(setups, deadline, engine=engine, results=results, again=again, energy=energy, as_json=as_json)
        for setup in setups:
            _choose(setup, job, goal, out, max_error, as_json=as_json)
        _report(setups, job, report or job.folder / "report.html", as_json=as_json)


def _choose(setup: Setup, job: Job, goal: Goal, out: Path | None, max_error: float | None, *, as_json: bool) -> None:
    from klab.harness.choose.decide import decide, same_choice
    from klab.harness.choose.profile import profile_path, read_profile, write_text

    path = out or profile_path(setup.chip.name, setup.plan.model.name, goal.name)
    previous = read_profile(path)
    profile = decide(
        job.stored(),
        setup.plan,
        setup.chip.name,
        goal,
        catalogue=setup.catalogue,
        previous=previous,
        limits=setup.chip,
        max_error=max_error,
    )
    if profile.choices:
        write_text(path, profile.to_text())
    show_profile(profile, as_json=as_json)
    tell_profile(profile, path, same_choice(previous, profile) if previous else None)


def _report(setups: Sequence[Setup], job: Job, page: Path, *, as_json: bool) -> None:
    from klab.harness.report.evidence_beside import kept, write_beside
    from klab.harness.report.write import write_report
    from klab.harness.store.remote import shown

    plans = {setup.chip.name: setup.plan for setup in setups}
    recorded = kept(job.folder, list(plans)) if all(setup.chip.kind == "cpu" for setup in setups) else []
    if recorded:
        write_beside(job.sources(), page, plans, setups[0].catalogue, recorded)
    else:
        write_report(job.sources(), page, chips=list(plans), plans=plans, catalogue=setups[0].catalogue)
    where = shown(page.resolve())
    if as_json:
        emit({"type": "report", "page": where})
    if recorded:
        talk.print(f"beside it, recorded evidence of {', '.join(one.chip.title for one in recorded)}", markup=False, soft_wrap=True)
    talk.print(f"report: {where}", markup=False, soft_wrap=True)
