"""`klab kernels`: what competes, where it fits, and whether its numerics were verified on a device."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from klab.harness.cli import _options
from klab.harness.cli._console import emit, out, table
from klab.harness.cli._options import AsJson

if TYPE_CHECKING:
    from klab.harness.store.query import Numerics
    from klab.kernels.contract import Chip, Kernel, Problem
    from klab.kernels.discover import Catalogue

OneChip = Annotated[str | None, typer.Option("--chip", "-c", help="Only this chip, with the reason where a kernel does not fit.")]
Results = Annotated[Path | None, typer.Option("--results", help="Where to look for recorded results. Default: the store's own folder.")]

# The model whose plan gives each operator its typical problems: the most time-consuming one of every step.
TYPICAL_MODEL = "llama-3.1-8b"
# A space is counted no further than this.
COUNT_LIMIT = 10_000


def command(app: typer.Typer) -> None:
    """Register the verb."""

    @app.command()
    def kernels(chip: OneChip = None, kernel_dirs: _options.KernelDirs = None, results: Results = None, as_json: AsJson = False) -> None:
        """List the kernels that compete: on which chips they fit a typical problem, and where a recorded result shows them to be right."""
        from klab.harness.catalog.chips import find_chip, load_chips
        from klab.kernels.discover import discover

        chips = [find_chip(chip)] if chip else [*load_chips(), find_chip("cpu")]
        found = discover(kernel_dirs or ())
        shown = _numerics(results)
        typical = {c.name: _typical_problems(found, c) for c in chips}
        rows = [
            _row(kernel, {c.name: _on_chip(kernel, c, typical[c.name], shown) for c in chips})
            for operator in found.operators
            for kernel in found.of(operator)
        ]
        missing = [{"path": str(u.path), "reason": u.reason, "install": u.install, "kernel": u.kernel} for u in found.unavailable]
        if as_json:
            for row in rows:
                emit({"type": "kernel", **row})
            for file in missing:
                emit({"type": "unavailable", **file})
            return
        _show(rows, missing, [c.name for c in chips])


def _numerics(results: Path | None) -> Numerics:
    """What is recorded of the kernels' correctness; empty where nothing is recorded yet."""
    from klab.harness.store.paths import folder_to_read
    from klab.harness.store.query import Numerics, numerics

    folder = folder_to_read(results)
    return numerics(folder) if folder.exists() else Numerics()


def _typical_problems(found: Catalogue, chip: Chip) -> dict[str, list[Problem]]:
    """Per operator the problem that takes most time in each step of the typical model on this chip; else its largest example.

    More than one, because a kernel may be for prefill or for decode alone.
    """
    from klab.harness.catalog.models import find_model
    from klab.harness.plan import plan

    problems: dict[str, list[Problem]] = {}
    made = plan(find_model(TYPICAL_MODEL), chip)
    for step in made.steps:
        first: dict[str, Problem] = {}
        for row in sorted(made.step(*step), key=lambda row: -row.count * row.bound_us):
            if row.problem is not None:
                first.setdefault(row.problem.operator, row.problem)
        for operator, problem in first.items():
            problems.setdefault(operator, []).append(problem)
    for operator, problem_type in found.operators.items():
        if operator not in problems:
            problems[operator] = [max(problem_type.examples(), key=lambda problem: problem.flops())]
    return problems


def _on_chip(kernel: Kernel, chip: Chip, typical: dict[str, list[Problem]], shown: Numerics) -> dict[str, Any]:
    from klab.harness.plan.trials import safe_unfit

    problems = typical[kernel.problem_type.operator]
    problem = problems[0]
    try:
        problem = next((p for p in problems if safe_unfit(kernel, p, chip) is None), problem)
        why = safe_unfit(kernel, problem, chip)
        counted = 0 if why else sum(1 for _ in itertools.islice(kernel.space(problem, chip), COUNT_LIMIT + 1))
    except Exception as error:  # noqa: BLE001  a user's file may raise anything, and must not hide the other kernels
        why, counted = f"its space raised {type(error).__name__}: {error}", 0
    code = (kernel.id, kernel.source_digest, chip.name)
    return {
        "fits": why is None,
        "why": why,
        "typical_problem": problem.label(),
        "candidates": min(counted, COUNT_LIMIT),
        "more_candidates": counted > COUNT_LIMIT,
        "verified": code in shown.verified,
        "wrong_trials": shown.wrong.get(code, 0),
    }


def _row(kernel: Kernel, on_chips: dict[str, dict[str, Any]]) -> dict[str, Any]:
    return {
        "kernel": kernel.id,
        "operator": kernel.problem_type.operator,
        "name": kernel.name,
        "backend": kernel.backend,
        "library": kernel.library,
        "summary": kernel.summary,
        "path": str(kernel.path),
        "source_digest": kernel.source_digest,
        "chips": on_chips,
    }


def _show(rows: list[dict[str, Any]], missing: list[dict[str, Any]], chips: list[str]) -> None:
    columns = ("operator", "kernel", "backend", "candidates", *chips, "summary")
    cells = [
        (
            row["operator"],
            row["name"] + (" (library)" if row["library"] else ""),
            row["backend"],
            _candidates(row["chips"].values()),
            *(_cell(row["chips"][name], alone=len(chips) == 1) for name in chips),
            row["summary"],
        )
        for row in rows
    ]
    table("Kernels", columns, cells, right=("candidates",))
    unit = "its numerics were verified on that chip by a recorded result of this very source"
    out.print(
        f"verified: {unit}. wrong on N trials: recorded results of this source failed the check there. "
        "not yet: it fits, but no such result is here. -: it does not fit (klab kernels --chip C says why).",
        soft_wrap=True,
    )
    for line in _absent_packages(missing):
        out.print(line, markup=False, soft_wrap=True)
    for file in missing:
        if not file["kernel"]:
            remedy = f"; {file['install']}" if file["install"] else ""
            out.print(f"not available: {file['path']}: {file['reason']}{remedy}", style="yellow", markup=False, soft_wrap=True)


def _absent_packages(missing: list[dict[str, Any]]) -> list[str]:
    """One line per package that outside contestants need and that is not here: how to install it, and who needs it."""
    waiting: dict[str, list[str]] = {}
    for file in missing:
        if file["kernel"]:
            waiting.setdefault(file["install"], []).append(file["kernel"])
    if not waiting:
        return []
    return [
        "outside contestants that are not installed:",
        *(f"  {install}: {', '.join(sorted(kernels))}" for install, kernels in sorted(waiting.items())),
    ]


def _cell(on_chip: dict[str, Any], *, alone: bool) -> str:
    if on_chip["fits"]:
        wrong = on_chip["wrong_trials"]
        return f"wrong on {wrong} trial{'' if wrong == 1 else 's'}" if wrong else "verified" if on_chip["verified"] else "not yet"
    return f"does not fit: {on_chip['why']}" if alone else "-"


def _candidates(on_chips: Any) -> str:
    """The largest space over the chips shown."""
    most = max((c["candidates"] for c in on_chips), default=0)
    return (f"{most}+" if any(c["more_candidates"] for c in on_chips) else str(most)) if most else ""
