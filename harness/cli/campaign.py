"""`klab campaign`: the most that a few minutes of a chip can tell, in one file that can be committed."""

from __future__ import annotations

from collections import Counter, defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from klab.harness.cli import _options
from klab.harness.cli._console import emit, out, table, talk

if TYPE_CHECKING:
    from klab.harness.tune.campaign import Campaign

Out = Annotated[Path, typer.Option("--out", help="Folder for the rows; a later campaign with the same folder continues there.")]
Models = Annotated[
    list[str] | None,
    typer.Option("--model", "-m", help="Model, or model@4 for tensor parallelism over 4. Repeatable."),
]


def command(app: typer.Typer) -> None:
    """Register the verb."""

    @app.command()
    def campaign(
        out_dir: Out,
        budget: Annotated[str, typer.Option("--budget", help="Time for everything: 90s, 9m.")] = "9m",
        chip: _options.Chip = "auto",
        model: Models = None,
        kernels: _options.KernelDirs = None,
        as_json: _options.AsJson = False,
    ) -> None:
        """Correctness of every kernel on the chip, then the models' comparison, then tuning. Safe to stop; continues where it ended."""
        from klab.harness.catalog.chips import find_real_chip
        from klab.harness.cli._progress import Bars
        from klab.harness.cli._setup import deadline_of, tell_outcome
        from klab.harness.tune.campaign import Campaign, pack
        from klab.harness.tune.job import Job
        from klab.kernels.discover import discover

        deadline = deadline_of(_options.seconds(budget))
        found_chip = find_real_chip(chip)
        catalogue = discover(kernels or [])
        with Bars(as_json=as_json) as bars:
            job = Job(found_chip, out_dir, kernel_dirs=kernels or [], deadline=deadline, listener=bars)
            made = Campaign(job, catalogue, model or ())
            interrupted = False
            try:
                for stage, outcome in made.run():
                    talk.print(f"{stage.name}:", end=" ", markup=False)
                    tell_outcome(outcome, out_dir, as_json=as_json)
            except KeyboardInterrupt:
                bars.stop()
                tell_outcome(job.outcome, out_dir, as_json=as_json)
                interrupted = True
            finally:
                job.journal.close()
                packed = pack(out_dir, lambda line: talk.print(line, style="yellow", markup=False, soft_wrap=True))
        outside = sum(absent.outside for absent in catalogue.unavailable)
        for absent in catalogue.unavailable:
            if not absent.outside:
                talk.print(f"not here: {absent.path.stem}: {absent.reason}", markup=False)
        if outside:
            talk.print(f"not here: {outside} kernels of packages that are not installed (klab kernels lists them)", markup=False)
        for line in job.report.lines():
            talk.print(line, style="yellow", markup=False, soft_wrap=True)
        for line in made.notes:
            talk.print(line, markup=False, soft_wrap=True)
        talk.print(f"rows in {packed}" if packed else "no rows", markup=False, soft_wrap=True)
        show(made, as_json=as_json)
        if interrupted:
            raise KeyboardInterrupt


def show(made: Campaign, *, as_json: bool = False) -> None:
    """Which kernels are right on this chip, and who wins where."""
    from klab.harness.store.query import numerics_verified
    from klab.harness.tune.campaign import winners

    rows = made.job.stored()
    verdicts: dict[str, Counter[str]] = defaultdict(Counter)
    for row in rows:
        verdicts[row.kernel]["right" if numerics_verified(row) else row.status.value] += 1
    best = winners(rows, made.shares)
    if as_json:
        for kernel, counts in sorted(verdicts.items()):
            emit({"type": "kernel", "kernel": kernel, **counts})
        for winner in best:
            emit({"type": "winner", **winner})
        return
    columns = ("kernel", "right", "incorrect", "other")
    told = [
        (k, c["right"], c["incorrect"], ", ".join(f"{n} {s}" for s, n in sorted(c.items()) if s not in ("right", "incorrect")))
        for k, c in sorted(verdicts.items())
    ]
    table(f"Kernels on {made.job.chip.title}: trials whose numbers were right", columns, told, right=("right", "incorrect"))
    table(f"Fastest on {made.job.chip.title}", _COLUMNS, [_cells(w) for w in best], right=_RIGHT)
    out.print("median over interleaved rounds; speed-up over the fastest library of the same problem", markup=False, soft_wrap=True)


_COLUMNS = ("where", "problem", "fastest", "median us", "interval us", "TFLOP/s", "GB/s", "J", "library", "library us", "speed-up", "of")
_RIGHT = ("median us", "interval us", "TFLOP/s", "GB/s", "J", "library us", "speed-up", "of")


def _cells(w: dict[str, object]) -> tuple[object, ...]:
    def number(name: str, form: str) -> str:
        value = w[name]
        return format(value, form) if isinstance(value, float) else ""

    own, library = w["median_us"], w["library_us"]
    ratio = f"{library / own:.2f}" if isinstance(own, float) and isinstance(library, float) else ""
    interval = f"{number('ci_low_us', ',.1f')}..{number('ci_high_us', ',.1f')}"
    return (
        w["where"], w["problem"], w["kernel"], number("median_us", ",.1f"), interval, number("tflops", ",.1f"), number("gb_per_s", ",.0f"),
        number("energy_j", ".3g"), w["library"], number("library_us", ",.1f"), ratio, w["candidates"],
    )  # fmt: skip
