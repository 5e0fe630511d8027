"""`klab measure`: time, power and correctness of kernels on the shapes of a model, into the store."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from klab.harness.cli import _options
from klab.harness.cli._console import emit, out, table, talk

if TYPE_CHECKING:
    from klab.harness.cli._setup import Setup
    from klab.harness.fleet.open import Engine
    from klab.harness.tune.job import Job

Phase = Annotated[str | None, typer.Option("--phase", help="Only prefill, decode or denoise.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Show the trials and the estimated time, and measure nothing.")]
Again = Annotated[bool, typer.Option("--again", help="Measure also what has a result of this driver and toolchain already.")]
Energy = Annotated[bool, typer.Option("--energy/--no-energy", help="On GPUs: joules of each problem's winner, runner-up and best library.")]


def command(app: typer.Typer) -> None:
    """Register the verb."""

    @app.command()
    def measure(
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
        budget: _options.Budget = None,
        fleet: _options.FleetKind = "local",
        address: _options.Address = None,
        results: _options.Results = None,
        again: Again = False,
        energy: Energy = True,
        dry_run: DryRun = False,
        as_json: _options.AsJson = False,
    ) -> None:
        """Measure every kernel on the shapes of a model. What is known already is not measured twice; Ctrl-C keeps what was measured."""
        from klab.harness.cli._setup import deadline_of, look_up_all
        from klab.harness.fleet.open import Engine

        deadline = deadline_of(_options.seconds(budget))
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
        )
        if dry_run:
            for setup in setups:
                show_trials(setup, as_json=as_json)
        else:
            measure_setups(setups, deadline, engine=engine, results=results, again=again, energy=energy, as_json=as_json)


def measure_setups(
    setups: Sequence[Setup],
    deadline: float | None,
    *,
    engine: Engine,
    results: Path | None = None,
    again: bool = False,
    energy: bool = True,
    as_json: bool = False,
) -> Job:
    """Run the trials of all chips as one job, then the energy of those that matter; says how it went. KeyboardInterrupt passes when all is
    stored."""
    from klab.harness.cli._progress import Bars
    from klab.harness.cli._setup import tell_outcome
    from klab.harness.store.paths import folder_to_read, folder_to_write
    from klab.harness.tune.job import Job, Outcome
    from klab.harness.tune.pick import energy_trials

    folder = folder_to_write(results)
    # Recorded runs that ship with klab make a trial known too, unless a folder was named.
    shipped = [] if results else [folder_to_read()]
    first, *others = setups
    kernels = first.catalogue.kernels
    with Bars(as_json=as_json) as bars:
        job = Job(
            first.chip,
            folder,
            read_from=shipped,
            kernel_dirs=first.kernel_dirs,
            deadline=deadline,
            again=again,
            listener=bars,
            others=[setup.chip for setup in others],
            engine=engine,
        )
        outcomes: list[Outcome] = []
        try:
            # A cluster's actors serve both runs; a worker of this machine starts in seconds.
            with nullcontext() if engine.is_local else job.session():
                outcomes.append(job.run([trial for setup in setups for trial in setup.trials], kernels))
                metered = [setup for setup in setups if setup.chip.kind == "cuda"]
                if energy and metered and not outcomes[0].left:
                    rows = job.stored()
                    outcomes.append(job.run([trial for setup in metered for trial in energy_trials(setup.trials, rows)], kernels))
        except KeyboardInterrupt:
            bars.stop()
            tell_notes(job, as_json=as_json)
            tell_outcome(job.outcome, folder, as_json=as_json, again=again)
            raise
    tell_notes(job, as_json=as_json)
    for line in job.report.lines():
        talk.print(line, style="yellow", markup=False, soft_wrap=True)
    for done in outcomes:
        tell_outcome(done, folder, as_json=as_json, again=again)
    return job


def tell_notes(job: Job, *, as_json: bool = False) -> None:
    """Which devices were left out or lost, and in what they differ."""
    for note in job.notes:
        if as_json:
            emit({"type": "note", "text": note})
        talk.print(f"note: {note}", style="yellow", markup=False, soft_wrap=True)


def show_trials(setup: Setup, *, as_json: bool = False) -> None:
    """What would be measured, and about how long it would take."""
    from klab.harness.tune.job import dry_run as estimate

    seconds = estimate(setup.trials, setup.chip)
    if as_json:
        for trial in setup.trials:
            emit({"type": "trial", "key": trial.key, **trial.to_json()})
        emit({"type": "estimate", "trials": len(setup.trials), "seconds": round(seconds, 1)})
        return
    rows = [(t.kernel, t.problem.label(), t.config.label()) for t in setup.trials]
    table(f"{len(rows)} trials on {setup.chip.title}", ("kernel", "problem", "config"), rows)
    for reason, count in Counter(f"{s.kernel}: {s.reason}" for s in setup.skipped).items():
        out.print(f"not on {count} problems: {reason}", markup=False)
    out.print(f"about {seconds / 60:.1f} minutes (modelled, not measured)")
