"""`klab screen`: compile candidates for a chip that need not be here, and say what each needs and which are worth measuring."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from klab.harness.cli import _options
from klab.harness.cli._console import emit, out, table, talk

if TYPE_CHECKING:
    from klab.harness.tune.screen import Screened

Jobs = Annotated[int | None, typer.Option("--jobs", min=1, help="Compiling processes. Default: one per core, as far as memory goes.")]
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
        kernel: _options.Only = None,
        candidates: _options.Candidates = "default",
        kernels: _options.KernelDirs = None,
        isl: _options.Isl = None,
        osl: _options.Osl = None,
        batch: _options.Batch = None,
        tp: _options.Tp = 1,
        dtype: _options.Dtype = None,
        jobs: Jobs = None,
        hopeless: Hopeless = None,
        as_json: _options.AsJson = False,
    ) -> None:
        """Compile a model's candidates for CHIP with no GPU: registers, spills, shared memory, instructions, duplicates, modelled time."""
        from klab.harness.cli._progress import Bars
        from klab.harness.cli._setup import look_up
        from klab.harness.tune.screen import Limits, tally
        from klab.harness.tune.screen import screen as run_screen
        from klab.kernels.errors import CannotMeasure, UsageError

        if hopeless is not None and not hopeless > 1:
            raise UsageError(f"--hopeless {hopeless:g}: how many times the best's expected time is too much, for instance 4; more than 1")
        given: list[Path] | None = kernels
        setup = look_up(
            model, chip, isl=isl, osl=osl, batch=batch, tp=tp, dtype=dtype, kernel_dirs=given, only=kernel, candidates=candidates
        )
        compiled = [t for t in setup.trials if setup.catalogue.kernels[t.kernel].backend in ("triton", "cuda")]
        if not compiled:
            raise UsageError(f"no kernel for {setup.chip.name} is compiled ahead; name a GPU with --chip, for instance h200 or b200")
        reached: list[Screened] = []
        began = time.monotonic()
        with Bars() as bars:
            bars.phase("screening", len(compiled))

            def done(item: Screened) -> None:
                reached.append(item)
                bars.screened(item)

            try:
                found = run_screen(
                    compiled,
                    setup.chip,
                    kernel_dirs=setup.kernel_dirs,
                    jobs=jobs,
                    limits=Limits(hopeless=hopeless),
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
                emit({"type": "candidate", **item.to_json()})
            emit({"type": "tally", "chip": setup.chip.name, **counts, **_effort(found, seconds)})
        else:
            table(f"Compiled for {setup.chip.title}", _COLUMNS, [_cells(item) for item in found], right=_RIGHT)
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


_COLUMNS = (
    "kernel",
    "problem",
    "config",
    "verdict",
    "registers",
    "stack B",
    "smem KB",
    "threads",
    "unit",
    "TMA",
    "warp spec.",
    "expected us",
    "why",
)
_RIGHT = ("registers", "stack B", "smem KB", "threads", "expected us")


def _cells(item: Screened) -> tuple[object, ...]:
    """The function with the most registers stands for the launch; a merge kernel beside it is small."""
    trial = item.trial
    main = max(item.functions, key=lambda f: f["registers"] * f["threads"], default=None)
    shown: tuple[object, ...] = ("",) * 7
    if main is not None:
        shown = (
            main["registers"],
            max(f["stack_bytes"] for f in item.functions),
            f"{main['smem_bytes'] / 1024:.0f}",
            main["threads"],
            main["matrix_unit"],
            "yes" if main["tma"] else "",
            "yes" if main["warp_specialised"] else "",
        )
    verdict = item.rule or "kept"
    expected = "" if item.expected_us is None else f"{item.expected_us:.1f}"
    return (trial.kernel, trial.problem.label(), trial.config.label(), verdict, *shown, expected, item.reason)
