"""`klab choose --bucket`: the configurations that serve several shapes, printed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from klab.harness.cli._console import emit, table, talk

if TYPE_CHECKING:
    from klab.harness.choose.buckets import Filled
    from klab.harness.plan.rows import Plan
    from klab.harness.tune.objective import Objective
    from klab.kernels.contract import Chip
    from klab.kernels.discover import Catalogue

_COLUMNS = ("shape", "size", "value", "own best", "regret", "its own best configuration")
_RIGHT = ("size", "value", "own best", "regret")


@dataclass(frozen=True)
class Asked:
    """What the options said."""

    objective: Objective
    how: str
    count: int
    axis: str | None
    current_only: bool
    as_json: bool


def show_buckets(folders: Sequence[Path], plan: Plan | None, chip: Chip, catalogue: Catalogue, asked: Asked) -> None:
    """Print every bucket; exit code 4 when no bucket has a configuration."""
    from klab.harness.choose.buckets import fill
    from klab.harness.choose.decide import defaults_of, sources_of, this_device, wanted_of
    from klab.harness.store.read import ReadReport, iter_results
    from klab.kernels.errors import CannotMeasure

    report = ReadReport()
    rows = [row for row in iter_results([folder for folder in folders if folder.exists()], report) if row.chip == chip.name]
    found, notes = fill(
        rows,
        wanted_of(plan) if plan else None,
        asked.objective,
        how=asked.how,
        count=asked.count,
        axis=asked.axis,
        chip=chip.name,
        device=this_device(chip.name, rows),
        sources=sources_of(catalogue),
        defaults=defaults_of(catalogue, chip),
        current_only=asked.current_only,
    )
    for one in found:
        if asked.as_json:
            emit(one.to_json(asked.objective, asked.how))
        else:
            _show(one, asked)
    for line in [*notes, *report.lines()]:
        talk.print(line, style="yellow", markup=False, soft_wrap=True)
    if not any(one.bucket.best for one in found):
        raise typer.Exit(CannotMeasure.exit_code)


def _show(one: Filled, asked: Asked) -> None:
    sizes = f"{one.sizes[0]:g}..{one.sizes[-1]:g}" if len(one.sizes) > 1 else f"{one.sizes[0]:g}"
    title = f"{one.line.operator}, {one.line.axis} {sizes}"
    if one.best is None:
        talk.print(f"{title}: {one.reason}", style="yellow", markup=False, soft_wrap=True)
        return
    told = one.to_json(asked.objective, asked.how)
    served = f"{told['kernel'].partition('/')[2]} {_config(told['config'])}".strip()
    rows = [
        (
            shape["problem"],
            f"{shape['size']:g}",
            f"{shape['value']:.5g}",
            f"{shape['own_best']['value']:.5g}",
            f"{shape['regret']:.1%}",
            "the same"
            if shape["regret"] == 0
            else f"{shape['own_best']['kernel'].partition('/')[2]} {_config(shape['own_best']['config'])}",
        )
        for shape in told["shapes"]
    ]
    how = {"geomean": "geometric mean of the regrets", "worst": "worst regret"}[asked.how]
    table(f"{title}: {served} ({how} {told['regret']:.2%}; {asked.objective}, {asked.objective.unit})", _COLUMNS, rows, _RIGHT)


def _config(config: dict[str, object]) -> str:
    return " ".join(f"{name}={value}" for name, value in config.items())
