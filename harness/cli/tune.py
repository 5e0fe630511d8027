"""`klab tune`: search the kernels' configurations for a model's problems, decide in finals, and write the pack."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from klab.harness.cli import _options
from klab.harness.cli._console import emit, out, table, talk
from klab.harness.cli.choose import Objective, UsdPerHour, UsdPerKwh
from klab.harness.cli.measure import DryRun, Phase

if TYPE_CHECKING:
    from klab.harness.choose.profile import Profile
    from klab.harness.cli._setup import Setup
    from klab.harness.tune.job import Job
    from klab.harness.tune.objective import Objective as Goal
    from klab.harness.tune.tuner import Target, Tuned, Tuner
    from klab.kernels.contract import Kernel

Problem = Annotated[list[str] | None, typer.Option("--problem", help="Only problems of this key, or with this in their label. Repeatable.")]
StrategyName = Annotated[str | None, typer.Option("--strategy", help="How to search. Default: the one that proved best (klab simulate).")]
Evaluations = Annotated[int | None, typer.Option("--evaluations", help="Candidates to try, over all problems together.")]
GpuSeconds = Annotated[float | None, typer.Option("--gpu-seconds", help="Seconds of the device to spend on searching and finals.")]
Seed = Annotated[int, typer.Option("--seed", help="Of the strategy's random choices.")]
Pareto = Annotated[bool, typer.Option("--pareto", help="Also the front between time and energy (of what is near the fastest).")]
Pack = Annotated[Path | None, typer.Option("--out", help="Where the profile goes. Default: profiles/tuned/CHIP/MODEL.json.")]
Clocks = Annotated[
    bool,
    typer.Option("--allow-clock-control", help="Also the winners at other SM clocks and power limits; set and put back, if permitted."),
]
Export = Annotated[Path | None, typer.Option("--export", help="Folder for the recorded spaces, one file per problem, for klab simulate.")]

# Choosing and printing after the measuring.
WRAP_UP_S = 2.0
# Of a budget in time, so much is kept for metering the time front.
PARETO_SHARE = 0.25


def command(app: typer.Typer) -> None:
    """Register the verb."""

    @app.command()
    def tune(
        model: _options.Model,
        chip: _options.Chip = "auto",
        problem: Problem = None,
        kernel: _options.Only = None,
        kernels: _options.KernelDirs = None,
        strategy: StrategyName = None,
        budget: _options.Budget = None,
        fleet: _options.FleetKind = "local",
        address: _options.Address = None,
        evaluations: Evaluations = None,
        gpu_seconds: GpuSeconds = None,
        seed: Seed = 0,
        objective: Objective = "latency",
        usd_per_hour: UsdPerHour = None,
        usd_per_kwh: UsdPerKwh = None,
        pareto: Pareto = False,
        allow_clock_control: Clocks = False,
        phase: Phase = None,
        isl: _options.Isl = None,
        osl: _options.Osl = None,
        batch: _options.Batch = None,
        tp: _options.Tp = 1,
        dtype: _options.Dtype = None,
        further: _options.With = None,
        results: _options.Results = None,
        out_file: Pack = None,
        export: Export = None,
        dry_run: DryRun = False,
        as_json: _options.AsJson = False,
    ) -> None:
        """Tune a model's kernels: the budget goes where it saves most. Safe to stop or kill; the same command goes on where it was."""
        from klab.harness.cli import _clocks
        from klab.harness.cli._setup import deadline_of, look_up_all
        from klab.harness.cli._tuning import Narrator
        from klab.harness.cli.measure import tell_notes
        from klab.harness.fleet.open import Engine
        from klab.harness.store.paths import folder_to_read, folder_to_write
        from klab.harness.tune import objective as goals
        from klab.harness.tune.allowance import ENERGY_FINAL_S, FINAL_S, Allowance
        from klab.harness.tune.job import Job
        from klab.harness.tune.tuner import Options, Tuner
        from klab.kernels.errors import CannotMeasure, UsageError

        goal = goals.Objective.parse(objective, usd_per_hour, usd_per_kwh)
        seconds = _options.seconds(budget)
        deadline = deadline_of(seconds, reserve_s=WRAP_UP_S)
        later_s = (seconds or 0.0) * (_clocks.SHARE * allow_clock_control + PARETO_SHARE * pareto)
        final_s = ENERGY_FINAL_S if goal.needs_energy else FINAL_S
        allowance = Allowance(evaluations, gpu_seconds, None if deadline is None else deadline - later_s, final_s_most=final_s)
        options = Options(strategy or "", seed, goal, allowance)
        engine = Engine(fleet, address)
        if allow_clock_control and not engine.is_local:
            raise UsageError("--allow-clock-control sets the clocks of this machine's device: leave out --fleet")
        setup, *others = look_up_all(
            model, chip, engine, isl=isl, osl=osl, batch=batch, tp=tp, dtype=dtype,
            further=further, kernel_dirs=kernels, only=kernel, phase=phase
        )  # fmt: skip
        if others:
            raise UsageError(f"tuning is for one chip at a time: --chip {setup.chip.name} or {', '.join(o.chip.name for o in others)}")
        competing = _competing(setup, kernel)
        targets = _targets(setup, phase, problem)
        if pareto and setup.chip.kind == "cpu":
            raise CannotMeasure("--pareto needs joules, and klab reads no power sensor of a CPU")
        if dry_run:
            _show_targets(setup, targets, competing, as_json=as_json)
            return
        folder = folder_to_write(results)
        narrator = Narrator(as_json=as_json)
        # Recorded runs that ship with klab count too, unless a folder was named.
        shipped = [] if results else [folder_to_read()]
        dirs = setup.kernel_dirs
        job = Job(setup.chip, folder, read_from=shipped, kernel_dirs=dirs, deadline=deadline, listener=narrator, engine=engine)
        if allow_clock_control:
            _clocks.check(job)
        tuner = Tuner(job, competing, targets, options, told=narrator.slice, reweigh=_reweigh(setup, phase))
        try:
            with nullcontext() if engine.is_local else job.session():
                tuned, profile = _run(setup, job, tuner, goal, out_file, export, pareto=pareto, as_json=as_json)
        finally:
            tell_notes(job, as_json=as_json)
        if allow_clock_control:
            _clocks.run(job, _clocks.winners(tuned, profile, setup.catalogue.kernels), goal, deadline, as_json=as_json)


def _run(
    setup: Setup, job: Job, tuner: Tuner, goal: Goal, out_file: Path | None, export: Path | None, *, pareto: bool, as_json: bool
) -> tuple[Tuned, Profile]:
    try:
        tuned = tuner.run()
    except KeyboardInterrupt:
        talk.print(f"stopped; everything measured is in {job.folder}. The same command goes on where it was.", markup=False, soft_wrap=True)
        if tuner.tuned.new or tuner.tuned.known:
            _finish(setup, job, tuner.tuned, goal, out_file, as_json=as_json)
        raise
    finally:
        job.journal.close()
        for line in job.report.lines():
            talk.print(line, style="yellow", markup=False, soft_wrap=True)
    if pareto:
        _pareto(setup, job, tuned, as_json=as_json)
    profile = _finish(setup, job, tuned, goal, out_file, as_json=as_json)
    if export is not None:
        _export(job, tuned, export, as_json=as_json)
    return tuned, profile


def _competing(setup: Setup, only: list[str] | None) -> list[Kernel]:
    """The kernels that are tuned, and always the libraries of their operators: without a baseline a time says little."""
    everybody = sorted(setup.catalogue.kernels.values(), key=lambda k: (not k.library, k.id))
    if not only:
        return everybody
    chosen = setup.catalogue.select(only)
    operators = {k.problem_type.operator for k in chosen}
    names = {k.id for k in chosen}
    return [k for k in everybody if k.id in names or (k.library and k.problem_type.operator in operators)]


def _targets(setup: Setup, phase: str | None, wanted: list[str] | None) -> list[Target]:
    from klab.harness.cli._setup import matching
    from klab.harness.tune.pack import LAUNCH_US, weights
    from klab.harness.tune.tuner import Target

    weight = weights(setup.plan, {}, phase)
    bound = {row.problem.key: row.bound_us for row in setup.plan.rows if row.problem}
    problems = matching({p.key: p for p in setup.plan.problems() if p.key in weight}, wanted)
    least_us = LAUNCH_US[setup.chip.kind]
    return [Target(p, weight[key], max(bound[key], least_us)) for key, p in problems.items()]


def _reweigh(setup: Setup, phase: str | None) -> Callable[[Mapping[str, float]], Mapping[str, float]]:
    from klab.harness.tune.pack import weights

    return lambda times: weights(setup.plan, times, phase)


def _finish(setup: Setup, job: Job, tuned: Tuned, goal: Goal, out_file: Path | None, *, as_json: bool) -> Profile:
    """Choose what the finals say, else among everything that stands, write the pack as `klab run` does, and show what came of it."""
    from klab.harness.choose.decide import decide, same_choice
    from klab.harness.choose.profile import profile_path, read_profile, write_text
    from klab.harness.cli._tuning import show
    from klab.harness.cli.choose import tell_profile

    path = out_file or profile_path(setup.chip.name, setup.plan.model.name, goal.name)
    previous = read_profile(path)
    profile = decide(
        job.stored(),
        setup.plan,
        setup.chip.name,
        goal,
        catalogue=setup.catalogue,
        previous=previous,
        limits=setup.chip,
        finals=tuned.decided,
    )
    if profile.choices:
        write_text(path, profile.to_text())
    show(tuned, setup.plan, profile, job.folder, as_json=as_json)
    tell_profile(profile, path, same_choice(previous, profile) if previous else None)
    return profile


def _pareto(setup: Setup, job: Job, tuned: Tuned, *, as_json: bool) -> None:
    """Meter what is near each problem's fastest, and show the front."""
    from klab.harness.tune.pareto import COLUMNS, front_of, points_of, worth_metering

    rows = job.stored()
    for course in tuned.courses:
        own = [row for row in rows if row.problem_key == course.problem.key]
        tried = [*course.defaults, *course.libraries, *course.finalists(64, 2.0)]
        job.run(worth_metering(list({t.key: t for t in tried}.values()), own), setup.catalogue.kernels)
        found = front_of(points_of(row for row in job.stored() if row.problem_key == course.problem.key))
        if as_json:
            for point in found.to_json():
                emit({"problem_key": course.problem.key, **point})
        else:
            table(f"Time and energy: {course.label}", COLUMNS, found.table(), right=("median us", "energy J", "power W"))


def _export(job: Job, tuned: Tuned, folder: Path, *, as_json: bool) -> None:
    from klab.harness.store.remote import shown
    from klab.harness.tune.replay.export import export, recordings
    from klab.harness.tune.replay.files import write_space

    wanted = {course.problem.key for course in tuned.courses if course.evaluations}
    for recording in recordings(job.stored(), job.chip.name):
        if recording.problem_key in wanted:
            path = folder / f"{recording.slug}.json.gz"
            folder.mkdir(parents=True, exist_ok=True)
            write_space(export(recording), path, force=True)
            if as_json:
                emit({"type": "export", "problem_key": recording.problem_key, "file": shown(path)})
            talk.print(f"recorded space: {shown(path)}", markup=False, soft_wrap=True)


def _show_targets(setup: Setup, targets: list[Target], kernels: list[Kernel], *, as_json: bool) -> None:
    """What would be tuned, and how large each space is."""
    from klab.harness.fleet.estimate import estimate_s
    from klab.harness.plan.trials import trials
    from klab.harness.tune.course import make_space
    from klab.kernels.errors import UsageError

    rows = []
    own = [k for k in kernels if not k.library]
    for target in targets:
        try:
            size = len(make_space(target.problem, own, setup.chip))
        except UsageError:
            size = 0  # libraries alone compete here
        rows.append((target, size))
    seconds = estimate_s(trials([t.problem for t in targets], kernels, setup.chip).trials, setup.chip)
    if as_json:
        for target, size in rows:
            emit({"type": "target", "problem_key": target.problem.key, "problem_label": target.problem.label(), "candidates": size})
        emit({"type": "estimate", "candidates": sum(size for _, size in rows), "baseline_seconds": round(seconds, 1)})
        return
    shown = [(t.problem.key, t.problem.label(), f"{size:,}", f"{t.bound_us:,.4g}") for t, size in rows]
    table(f"To tune on {setup.chip.title}", ("key", "problem", "candidates", "bound us"), shown, right=("candidates", "bound us"))
    out.print(f"defaults and libraries alone: about {seconds:.0f} s (modelled, not measured)")
