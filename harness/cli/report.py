"""`klab report`: one self-contained HTML page from the store."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from klab.harness.cli import _options
from klab.harness.cli._console import emit, talk
from klab.harness.cli._options import AsJson, KernelDirs

if TYPE_CHECKING:
    from klab.harness.plan.rows import Plan

Model = Annotated[str | None, typer.Option("--model", "-m", help="A model's name or config.json: show its problems and where time goes.")]
Chips = Annotated[
    list[str] | None,
    typer.Option("--chip", "-c", help="Only this chip; repeatable. Default: all with results (with --model: this machine's)."),
]
Runs = Annotated[
    list[str] | None,
    typer.Option("--runs", help="Only rows of these runs: ids, starts of ids, latest, previous; comma-separated or repeated."),
]
Where = Annotated[
    list[Path] | None,
    typer.Option("--results", help="Folder or file to read. Repeatable. Default: $KLAB_RESULTS, or results/ of the checkout."),
]
Nights = Annotated[
    Path | None, typer.Option("--history", help="Folder of the nights of `klab nightly`. Default: nights/ or local/nights/ in the results.")
]
Compare = Annotated[
    tuple[str, str] | None,
    typer.Option(
        "--compare", metavar="A B", help="Two runs, chips, commits or folders of results, one against the other, on a page of its own."
    ),
]
Notebook = Annotated[Path | None, typer.Option("--notebook", help="Write the figures as a Jupyter notebook too (FILE.ipynb).")]
Reference = Annotated[bool, typer.Option("--reference", help="Show published results of these chips too, apart from own ones.")]
Out = Annotated[Path, typer.Option("--out", help="The page.")]
Open = Annotated[bool, typer.Option("--open", help="Show it in the browser.")]


def command(app: typer.Typer) -> None:
    """Register the verb."""

    @app.command()
    def report(
        runs: Runs = None,
        model: Model = None,
        chip: Chips = None,
        isl: _options.Isl = None,
        osl: _options.Osl = None,
        batch: _options.Batch = None,
        tp: _options.Tp = 1,
        dtype: _options.Dtype = None,
        further: _options.With = None,
        results: Where = None,
        history: Nights = None,
        reference: Reference = False,
        compare: Compare = None,
        notebook: Notebook = None,
        kernels: KernelDirs = None,
        out: Out = Path("report.html"),
        show: Open = False,
        as_json: AsJson = False,
    ) -> None:
        """Write the page: what won and by how much, why, what it costs, what changed. It loads nothing from anywhere."""
        from klab.harness.catalog import find_chip
        from klab.harness.report.runs import split
        from klab.harness.store.paths import folders_to_read
        from klab.kernels.errors import UsageError

        if model is None and (isl or osl or batch or dtype or tp != 1 or further):
            raise UsageError("--isl, --osl, --batch, --tp, --dtype and --with describe a model's plan: give --model too")
        if compare and (runs or history or reference or notebook):
            raise UsageError("--compare says what is read: --runs, --history, --reference and --notebook do not go with it")
        if notebook and notebook.suffix != ".ipynb":
            raise UsageError(f"--notebook {notebook}: Jupyter opens files that end in .ipynb")
        named, nights = split(runs) if runs else [], _history(history)
        folders = folders_to_read(results)
        found = [find_chip(name).name for name in chip or (["auto"] if model else [])]
        plans = _plans(model, found, _options.scenario_of(isl, osl, batch, tp, dtype, further)) if model else {}
        if compare:
            _compare(folders, compare, out, [name for name in found if chip], plans, as_json=as_json)
        else:
            given: dict[str, Any] = {"chips": found, "plans": plans, "runs": named, "history": nights, "reference": reference}
            _write(folders, out, notebook, kernels or (), given, as_json=as_json)
        if show:
            _show(out)


def _write(folders: list[Path], out: Path, notebook: Path | None, kernels: Sequence[Path], given: dict[str, Any], *, as_json: bool) -> None:
    from klab.harness.report.write import write_report
    from klab.harness.store.remote import shown
    from klab.kernels.discover import discover

    story = write_report(folders, out, catalogue=discover(kernels), **given)
    counts = dict(story.statuses)
    if as_json:
        emit({"page": str(out.resolve()), "chips": [s.chip for s in story.subjects], "results": counts})
    for line in story.reading:
        _say(line)
    if not counts:
        _say(f"no results in {', '.join(map(str, folders))} for this: the page says so")
    talk.print(f"wrote {shown(out.resolve())}", markup=False, soft_wrap=True)
    if notebook:
        from klab.harness.report.notebook import write_notebook

        write_notebook(story, notebook, asked={name: given[name] for name in ("runs", "history", "reference")})
        talk.print(f"wrote {shown(notebook.resolve())}", markup=False, soft_wrap=True)


def _compare(folders: list[Path], sides: tuple[str, str], out: Path, chips: list[str], plans: dict[str, Plan], *, as_json: bool) -> None:
    from klab.harness.report.compare_page import write_compare
    from klab.harness.store.remote import shown

    compared = write_compare(folders, *sides, out, chips=chips, plans=plans)
    if as_json:
        emit({"page": str(out.resolve()), "a": compared.a, "b": compared.b, "headline": compared.headline})
    for line in compared.reading:
        _say(line)
    talk.print(f"{compared.headline}. wrote {shown(out.resolve())}", markup=False, soft_wrap=True)


def _plans(model: str, chips: list[str], given: dict[str, Any]) -> dict[str, Plan]:
    from klab.harness.catalog import find_chip, find_model
    from klab.harness.plan import plan, scenario_for

    found = find_model(model)
    return {name: plan(found, chip, scenario_for(found, chip, **given)) for name in chips for chip in [find_chip(name)]}


def _history(given: Path | None) -> list[Path] | None:
    """The folder that was named, or None for where the nights are by default; UsageError for one that is not there."""
    from klab.harness.store.remote import local_of
    from klab.kernels.errors import UsageError

    if given is None:
        return None
    folder = local_of(given)
    if not folder.is_dir():
        raise UsageError(f"--history: {given} is no folder; `klab nightly` keeps its nights in results/local/nights unless told otherwise")
    return [folder]


def _show(page: Path) -> None:
    import webbrowser

    try:
        opened = webbrowser.open(page.resolve().as_uri())
    except webbrowser.Error:
        opened = False
    if not opened:
        _say(f"there is no browser here to show it with: open {page.resolve()} yourself")


def _say(line: str) -> None:
    talk.print(line, style="yellow", markup=False, soft_wrap=True)
