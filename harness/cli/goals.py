"""`klab goals`: how fast the kernels are meant to be, and what was measured."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from klab.harness.cli import _options
from klab.harness.cli._console import emit, table, talk

Where = Annotated[list[Path] | None, typer.Option("--results", help="Folder of results. Repeatable. Default: all there are.")]
Details = Annotated[bool, typer.Option("--details", help="Every problem of every goal.")]


def command(app: typer.Typer) -> None:
    """Register the verb."""

    @app.command()
    def goals(
        chip: Annotated[str, typer.Option("--chip", "-c", help="The chip whose results are judged.")] = "h200",
        results: Where = None,
        details: Details = False,
        as_json: _options.AsJson = False,
    ) -> None:
        """Judge the speed goals by recorded results: met, missed, cannot tell, or not measured. Exit 1 where one is missed."""
        from klab.harness.catalog import find_chip
        from klab.harness.choose.goals import engine_default, judge
        from klab.harness.store.paths import folders_to_read
        from klab.harness.store.read import ReadReport, iter_results
        from klab.kernels.discover import discover

        found = find_chip(chip)
        folders = [folder for folder in folders_to_read(results) if folder.exists()]
        verdicts = judge(iter_results(folders, ReadReport()), found.name, engine_default=engine_default(discover()))
        for one in verdicts if as_json else ():
            goal = {"goal": one.goal.name, "least": one.goal.least, "operator": one.goal.operator, "against": one.goal.against}
            said = {name: getattr(one, name) for name in ("verdict", "figure", "low", "high", "reason")}
            emit({**goal, **said, "problems": [vars(p) for p in one.problems]})
        if not as_json:
            columns = ("goal", "at least", "figure", "95%", "problems", "verdict")
            cells = [
                (v.goal.name, f"{v.goal.least:.2f}", "" if v.figure is None else f"{v.figure:.3f}",
                 "" if v.low is None or v.high is None else f"{v.low:.3f}..{v.high:.3f}", len(v.problems) or "", v.verdict)
                for v in verdicts
            ]  # fmt: skip
            table(f"Goals on {found.title}", columns, cells, ("at least", "figure", "problems"))
            if details:
                rows = [
                    (p.problem, p.kernel, p.baseline, f"{p.figure:.3f}", f"{p.low:.3f}..{p.high:.3f}") for v in verdicts for p in v.problems
                ]
                table("Problem by problem", ("problem", "kernel", "against", "figure", "95%"), rows, ("figure",))
            for reason in dict.fromkeys(f"{v.verdict}: {v.reason}" for v in verdicts if v.reason):
                talk.print(reason, markup=False, soft_wrap=True)
        if any(one.verdict == "missed" for one in verdicts):
            raise typer.Exit(1)
