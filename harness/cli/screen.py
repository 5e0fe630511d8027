"""`klab screen`: compile candidates for a chip that need not be here, and say what each needs and which are worth measuring."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from klab.harness.cli import _options
from klab.harness.cli._console import emit, out, table

if TYPE_CHECKING:
    from klab.harness.tune.screen import Screened

Jobs = Annotated[int | None, typer.Option("--jobs", min=1, help="Compiling processes. Default: one per core.")]


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
        as_json: _options.AsJson = False,
    ) -> None:
        """Compile a model's candidates for CHIP with no GPU: registers, spills, shared memory, instructions, duplicates."""
        from klab.harness.cli._progress import Bars
        from klab.harness.cli._setup import look_up
        from klab.harness.tune.screen import screen as run_screen
        from klab.harness.tune.screen import tally
        from klab.kernels.errors import UsageError

        given: list[Path] | None = kernels
        setup = look_up(
            model, chip, isl=isl, osl=osl, batch=batch, tp=tp, dtype=dtype, kernel_dirs=given, only=kernel, candidates=candidates
        )
        compiled = [t for t in setup.trials if setup.catalogue.kernels[t.kernel].backend in ("triton", "cuda")]
        if not compiled:
            raise UsageError(f"no kernel for {setup.chip.name} is compiled ahead; name a GPU with --chip, for instance h200 or b200")
        with Bars() as bars:
            bars.phase("screening", len(compiled))
            found = run_screen(compiled, setup.chip, kernel_dirs=setup.kernel_dirs, jobs=jobs, on_done=bars.screened)
        counts = tally(found)
        if as_json:
            for item in found:
                emit({"type": "candidate", **item.to_json()})
            emit({"type": "tally", "chip": setup.chip.name, **counts})
            return
        table(f"Compiled for {setup.chip.title}", _COLUMNS, [_cells(item) for item in found], right=_RIGHT)
        out.print(", ".join(f"{n} {rule}" for rule, n in sorted(counts.items(), key=lambda pair: -pair[1])))


_COLUMNS = ("kernel", "problem", "config", "verdict", "registers", "stack B", "smem KB", "threads", "unit", "TMA", "warp spec.", "why")
_RIGHT = ("registers", "stack B", "smem KB", "threads")


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
    return (trial.kernel, trial.problem.label(), trial.config.label(), verdict, *shown, item.reason)
