"""`klab compare A B`: is B as fast as A?"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from klab.harness.cli import _options
from klab.harness.cli._console import emit, table, talk
from klab.harness.cli.measure import Phase

if TYPE_CHECKING:
    from klab.harness.watch.comparison import Comparison
    from klab.harness.watch.sides import Given

SideA = Annotated[
    str, typer.Argument(metavar="A", help="A commit, a checkout ('.': as it is now), a venv or its python, or results (file, folder, URL).")
]
SideB = Annotated[str, typer.Argument(metavar="B", help="The other side, of the same kind or another that runs.")]
OptionalModel = Annotated[str | None, typer.Option("--model", "-m", help="A model whose shapes are measured. Needed where the sides run.")]
Problem = Annotated[list[str] | None, typer.Option("--problem", help="Only problems whose label or key has this in it. Repeatable.")]
Chosen = Annotated[bool, typer.Option("--chosen", help="Per problem what each side's own profile chose, not every kernel.")]
Changed = Annotated[bool, typer.Option("--changed", help="Only kernels whose source or configuration differs between the sides.")]
Margin = Annotated[float, typer.Option("--margin", help="Within this the sides are the same: 0.01 is 1%.")]
Processes = Annotated[int, typer.Option("--processes", help="Pairs of fresh processes at the most, 5 or more.")]
DeviceId = Annotated[
    str | None, typer.Option("--device", help="The GPU to measure on, by UUID or CUDA index. Default: the first that is free.")
]
Repo = Annotated[Path | None, typer.Option("--repo", help="The git repository of the commits. Default: the one here.")]
Out = Annotated[Path | None, typer.Option("--out", help="A folder for compare.json, summary.md and the raw rows.")]
Strict = Annotated[bool, typer.Option("--strict", help="Exit 3 where anything cannot be told.")]
Metric = Annotated[str, typer.Option("--metric", help="time or energy; energy of stored results alone.")]


def command(app: typer.Typer) -> None:
    """Register the verb."""

    @app.command()
    def compare(
        a: SideA,
        b: SideB,
        model: OptionalModel = None,
        chip: _options.Chip = "auto",
        kernel: _options.Only = None,
        problem: Problem = None,
        kernels: _options.KernelDirs = None,
        isl: _options.Isl = None,
        osl: _options.Osl = None,
        batch: _options.Batch = None,
        tp: _options.Tp = 1,
        dtype: _options.Dtype = None,
        further: _options.With = None,
        phase: Phase = None,
        chosen: Chosen = False,
        changed: Changed = False,
        metric: Metric = "time",
        margin: Margin = 0.01,
        processes: Processes = 20,
        budget: _options.Budget = None,
        device: DeviceId = None,
        repo: Repo = None,
        out: Out = None,
        strict: Strict = False,
        as_json: _options.AsJson = False,
    ) -> None:
        """Same, faster, slower or cannot tell, with the interval: two commits, checkouts or environments in turns on one device, or two
        sets of results. Exit 0 same or faster, 1 slower or broken, 3 cannot tell (--strict), 4 nothing could be compared.
        """
        from klab.harness.cli._setup import deadline_of
        from klab.harness.watch.compare_run import Request, compare_live, understood

        deadline = deadline_of(_options.seconds(budget), reserve_s=2.0)
        request = Request(
            model=model,
            chip=chip,
            words=options_of_measure(isl, osl, batch, tp, dtype, further, phase),
            kernels=tuple(kernel or ()),
            problems=tuple(problem or ()),
            kernel_dirs=tuple(kernels or ()),
            chosen=chosen,
            changed=changed,
            margin=margin,
            processes=processes,
            deadline=deadline,
            device=device,
            repo=repo,
            metric=metric,
        )
        given = understood(a, b, request)
        if given[0].kind.live:
            found = compare_live(given, request, out, said=lambda text: talk.print(text, markup=False, soft_wrap=True))
        else:
            from klab.harness.watch.compare_results import compare_results

            found = compare_results(given[0].text, given[1].text, request)
        _show(found, given, out, as_json=as_json)
        raise typer.Exit(130 if found.stopped == "interrupted" else found.exit_code(strict))


def options_of_measure(
    isl: int | None, osl: int | None, batch: str | None, tp: int, dtype: str | None, further: list[str] | None, phase: str | None
) -> tuple[str, ...]:
    """The options that a side's own `klab measure` gets; checked here too, so that a slip costs nothing."""
    _options.scenario_of(isl, osl, batch, tp, dtype, further)
    named = {"--isl": isl, "--osl": osl, "--batch": batch, "--tp": tp if tp != 1 else None, "--dtype": dtype, "--phase": phase}
    words = [word for name, value in named.items() if value is not None for word in (name, str(value))]
    return (*words, *(word for text in further or () for word in ("--with", text)))


def _show(found: Comparison, given: tuple[Given, Given], out: Path | None, *, as_json: bool) -> None:
    from klab.harness.watch.comparison import figures

    for row in found.to_json() if as_json else ():
        emit(row)
    if not as_json:
        cells = [
            (one.name, *figures(one.found), one.found.replicates or "", one.differs, one.found.answer.value, one.found.reason)
            for one in found.lines
        ]
        columns = ("problem and kernel", f"{found.metric} B/A", "interval", "in cycles", "runs", "differs in", "answer", "why")
        table(f"A: {given[0].said}   B: {given[1].said}", columns, cells, (f"{found.metric} B/A", "in cycles", "runs"))
    for note in (*found.notes, *(f"{name}: {why}" for name, why in found.alone)):
        talk.print(note, style="yellow", markup=False, soft_wrap=True)
    if found.stopped:
        talk.print(f"stopped early: {found.stopped}", style="yellow", markup=False)
    talk.print(found.headline(), style="red" if found.answer.fails else None, markup=False, soft_wrap=True)
    if out is not None:
        from klab.harness.store.remote import shown
        from klab.harness.watch.compare_run import write_out

        write_out(out, found, given)
        talk.print(f"written to {shown(out)}", markup=False, soft_wrap=True)
