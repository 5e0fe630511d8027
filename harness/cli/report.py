"""`klab report`: one self-contained HTML page from the store."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from klab.harness.cli import _options
from klab.harness.cli._console import emit, talk
from klab.harness.cli._options import AsJson, KernelDirs

Model = Annotated[str | None, typer.Option("--model", "-m", help="A model's name or config.json: show its problems and where time goes.")]
Chips = Annotated[
    list[str] | None,
    typer.Option("--chip", "-c", help="Only this chip; repeatable. Default: all with results (with --model: this machine's)."),
]
Where = Annotated[
    list[Path] | None,
    typer.Option("--results", help="Folder or file to read. Repeatable. Default: $KLAB_RESULTS, or results/ of the checkout."),
]
Out = Annotated[Path, typer.Option("--out", help="The page.")]
Open = Annotated[bool, typer.Option("--open", help="Show it in the browser.")]


def command(app: typer.Typer) -> None:
    """Register the verb."""

    @app.command()
    def report(
        model: Model = None,
        chip: Chips = None,
        isl: _options.Isl = None,
        osl: _options.Osl = None,
        batch: _options.Batch = None,
        tp: _options.Tp = 1,
        dtype: _options.Dtype = None,
        further: _options.With = None,
        results: Where = None,
        kernels: KernelDirs = None,
        out: Out = Path("report.html"),
        show: Open = False,
        as_json: AsJson = False,
    ) -> None:
        """Write the page: winners with their evidence, roofline, latency curves, failures, method. It loads nothing from anywhere."""
        from klab.harness.catalog import find_chip, find_model
        from klab.harness.plan import plan as make_plan
        from klab.harness.plan import scenario_for
        from klab.harness.report.write import write_report
        from klab.harness.store.paths import folders_to_read
        from klab.harness.store.remote import shown
        from klab.kernels.discover import discover
        from klab.kernels.errors import UsageError

        if model is None and (isl or osl or batch or dtype or tp != 1 or further):
            raise UsageError("--isl, --osl, --batch, --tp, --dtype and --with describe a model's plan: give --model too")
        folders = folders_to_read(results)
        found = [find_chip(name) for name in chip or (["auto"] if model else [])]
        plans = {}
        if model is not None:
            found_model = find_model(model)
            given = _options.scenario_of(isl, osl, batch, tp, dtype, further)
            for one in found:
                scenario = scenario_for(found_model, one, **given)
                plans[one.name] = make_plan(found_model, one, scenario)
        story = write_report(folders, out, chips=[one.name for one in found], plans=plans, catalogue=discover(kernels or ()))
        counts = dict(story.statuses)
        if as_json:
            emit({"page": str(out.resolve()), "chips": [s.chip for s in story.subjects], "results": counts})
        for line in story.reading:
            talk.print(line, style="yellow", markup=False, soft_wrap=True)
        if not counts:
            talk.print(
                f"no results in {', '.join(map(str, folders))} for this: the page says so", style="yellow", markup=False, soft_wrap=True
            )
        talk.print(f"wrote {shown(out.resolve())}", markup=False, soft_wrap=True)
        if show:
            import webbrowser

            webbrowser.open(out.resolve().as_uri())
