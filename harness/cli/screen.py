"""`klab screen`: compile candidates for a chip that need not be here, and say what each needs and which are worth measuring."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from klab.harness.cli import _options
from klab.harness.cli._console import emit, out, table, talk
from klab.harness.cli.measure import Phase
from klab.harness.cli.tune import Problem

if TYPE_CHECKING:
    from klab.harness.cli._setup import Setup
    from klab.harness.plan.trial import Trial
    from klab.harness.tune.screen import Screened

Jobs = Annotated[int | None, typer.Option("--jobs", min=1, help="Compiling processes. Default: one per core, as far as memory goes.")]
Timeout = Annotated[str | None, typer.Option("--timeout", help="Time to compile one candidate: 30s, 5m. Default: 120 s.")]
Hopeless = Annotated[
    float | None,
    typer.Option("--hopeless", help="Drop what the analytic model expects to take more than so many times the best's time. Default: off."),
]


def command(app: typer.Typer) -> None:
    """Register the verb."""

    @app.command()
    def screen(
        model: _options.Model,
        chip: _options.Chip = "h200",
        problem: Problem = None,
        kernel: _options.Only = None,
        candidates: _options.Candidates = "default",
        kernels: _options.KernelDirs = None,
        phase: Phase = None,
        isl: _options.Isl = None,
        osl: _options.Osl = None,
        batch: _options.Batch = None,
        tp: _options.Tp = 1,
        dtype: _options.Dtype = None,
        further: _options.With = None,
        jobs: Jobs = None,
        timeout: Timeout = None,
        hopeless: Hopeless = None,
        as_json: _options.AsJson = False,
    ) -> None:
        """Compile a model's candidates for CHIP with no GPU: registers, spills, shared memory, instructions, duplicates, modelled time.

        With --json there is a row of type "candidate" as soon as each is judged by itself. Which are duplicates, and which are hopeless
        beside the best, is known at the end: then come rows of type "duplicate" (key, twin, reason) and "hopeless" (key, expected_us,
        reason), which overrule the candidate's own row, and last the "tally".
        """
        from klab.harness.cli import _screening
        from klab.harness.cli._progress import Bars
        from klab.harness.cli._setup import look_up, matching
        from klab.harness.tune.screen import Limits, tally
        from klab.harness.tune.screen import screen as run_screen
        from klab.harness.tune.screen_rules import DUPLICATE, HOPELESS, drop_hopeless
        from klab.kernels.errors import CannotMeasure, UsageError

        if hopeless is not None and not hopeless > 1:
            raise UsageError(f"--hopeless {hopeless:g}: how many times the best's expected time is too much, for instance 4; more than 1")
        timeout_s = _options.seconds(timeout, "--timeout")
        limits = Limits(hopeless=hopeless) if timeout_s is None else Limits(hopeless=hopeless, timeout_s=timeout_s)
        given: list[Path] | None = kernels
        setup = look_up(
            model, chip, isl=isl, osl=osl, batch=batch, tp=tp, dtype=dtype,
            further=further, kernel_dirs=given, only=kernel, candidates=candidates,
            phase=phase,
        )  # fmt: skip
        wanted = matching({t.problem.key: t.problem for t in setup.trials}, problem)
        compiled = [t for t in setup.trials if t.problem.key in wanted and _needs_compiler(setup, t)]
        if not compiled:
            raise UsageError(f"no kernel for {setup.chip.name} is compiled ahead; name a GPU with --chip, for instance h200 or b200")
        reached: list[Screened] = []
        began = time.monotonic()
        with Bars() as bars:
            bars.phase("screening", len(compiled))

            def done(item: Screened) -> None:
                reached.append(item)
                bars.screened(item)
                if as_json:
                    (ranked,) = drop_hopeless([item], setup.catalogue.kernels, setup.chip, None)
                    emit({"type": "candidate", **ranked.to_json()})

            try:
                found = run_screen(
                    compiled,
                    setup.chip,
                    kernel_dirs=setup.kernel_dirs,
                    jobs=jobs,
                    limits=limits,
                    on_done=done,
                    kernels=setup.catalogue.kernels,
                )
            except KeyboardInterrupt:
                bars.stop()
                talk.print(f"interrupted: {len(reached)} of {len(compiled)} candidates are known and kept; the same command continues")
                raise
        seconds = time.monotonic() - began
        counts = tally(found)
        if as_json:
            for item in found:
                row = item.to_json()
                if item.rule == DUPLICATE:
                    emit({"type": item.rule} | {name: row[name] for name in ("key", "twin", "reason")})
                elif item.rule == HOPELESS:
                    emit({"type": item.rule} | {name: row[name] for name in ("key", "expected_us", "reason")})
            emit({"type": "tally", "chip": setup.chip.name, **counts, **_effort(found, seconds)})
        else:
            table(f"Compiled for {setup.chip.title}", _screening.COLUMNS, _screening.rows(found, setup), right=_screening.RIGHT)
            out.print(_screening.legend(found), markup=False)
            table(
                f"{len(found)} candidates by rule",
                ("rule", "candidates", "share"),
                [(rule, n, f"{n / len(found):.0%}") for rule, n in sorted(counts.items(), key=lambda pair: -pair[1])],
                right=("candidates", "share"),
            )
            out.print(_told(_effort(found, seconds)), soft_wrap=True)
        if not counts.get("kept"):
            first = next(item for item in found if item.rule)
            raise CannotMeasure(
                f"none of the {len(found)} candidates can be measured on {setup.chip.name}; the first, {first.trial.kernel} "
                f"{first.trial.config.label()}: {first.rule}: {first.reason}"
            )


def _needs_compiler(setup: Setup, trial: Trial) -> bool:
    return setup.catalogue.kernels[trial.kernel].backend in ("triton", "cuda")


def _effort(found: list[Screened], seconds: float) -> dict[str, float]:
    """What it took: candidates compiled now and known before, seconds of wall time, candidates compiled per minute."""
    cached = sum(item.cached for item in found)
    compiled = len(found) - cached
    return {
        "compiled": compiled,
        "cached": cached,
        "seconds": round(seconds, 2),
        "compiled_per_minute": round(60 * compiled / seconds, 1) if compiled else 0.0,
    }


def _told(effort: dict[str, float]) -> str:
    rate = f" ({effort['compiled_per_minute']:.0f} per minute)" if effort["compiled"] else ""
    return (
        f"{effort['compiled']:.0f} compiled{rate}, {effort['cached']:.0f} known from before, in {effort['seconds']:.1f} s. "
        "Expected times are modelled, not measured."
    )
