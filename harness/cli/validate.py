"""`klab validate`: what klab predicts of deployments beside what others measured on them, and whole layers beside their parts."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from klab.harness.cli import _options
from klab.harness.cli._console import emit, table, talk
from klab.kernels.errors import UsageError

if TYPE_CHECKING:
    from klab.harness.cost.published import Published
    from klab.harness.cost.validation import Checked

Data = Annotated[
    Path | None,
    typer.Option(
        "--data", help="Published measurements and tables: a folder as aiconfigurator-core has it. Default: the installed package's."
    ),
]
Points = Annotated[Path | None, typer.Option("--points", help="A table of serving measurements of your own, with the same columns.")]
Layers = Annotated[
    list[Path] | None,
    typer.Option(
        "--layer", help="What klab layer --json wrote, held against the sum of its parts. Where no tables are: that alone. Repeatable."
    ),
]
Modelled = Annotated[bool, typer.Option("--modelled", help="Predict from the roofline alone, without tables.")]
Out = Annotated[Path | None, typer.Option("--out", "-o", help="Write the page: .html, or .md (between its two marks, if it is there).")]
OnlyModel = Annotated[str | None, typer.Option("--model", "-m", help="Only points of this model.")]
OnlyChip = Annotated[str | None, typer.Option("--chip", "-c", help="Only points of this chip.")]
OnlyEngine = Annotated[str | None, typer.Option("--engine", help="Only points of this engine: vllm, sglang, trtllm.")]


def command(app: typer.Typer) -> None:
    """Register the verb."""

    @app.command()
    def validate(
        data: Data = None,
        points: Points = None,
        layer: Layers = None,
        model: OnlyModel = None,
        chip: OnlyChip = None,
        engine: OnlyEngine = None,
        modelled: Modelled = False,
        out: Out = None,
        as_json: _options.AsJson = False,
    ) -> None:
        """Hold predictions against published serving measurements and whole layers: errors, ranges, and what was left out."""
        from klab.harness.cost.layer_check import read_layers
        from klab.harness.cost.plausible import plausible
        from klab.harness.cost.published import FILE, read_published
        from klab.harness.cost.validation import Estimators, Validation, validate
        from klab.harness.cost.validation_page import goals, sections, writable, write
        from klab.harness.store.reference.tables import available, require

        if out is not None:
            writable(out)
        layers = read_layers(layer or [])
        found = Validation((), (), {}, {})
        notes: list[str] = []
        folder = available(data) if layer or points else require(data)
        where = points or (folder / FILE if folder else None)
        if where is not None:
            kept, skipped = read_published(where)
            kept, strange = plausible(kept)
            chosen = [one for one in kept if _wanted(one, model, chip, engine)]
            if not chosen:
                raise UsageError(_nothing(kept, where.name, model, chip, engine))
            estimators = Estimators(None if modelled else folder)
            found = validate(chosen, estimators, {**skipped, **strange}, tell=lambda line: talk.print(line, markup=False))
            notes = estimators.notes
        judged = goals(found) if found.checked else []
        made = sections(found, layers)
        if out is not None:
            write(out, made, [*notes, *judged])
            talk.print(f"wrote {out}", markup=False)
        if as_json:
            for one in (*found.checked, *found.held_out):
                emit(_json(one, "held out" if one.with_overheads else "plain"))
            for layer_check in layers:
                emit({"type": "layer", **vars(layer_check)})
            return
        for section in made:
            table(section.title, section.columns, section.rows, section.numbers)
            if section.words:
                talk.print(section.words, markup=False, soft_wrap=True)
        for line in (*notes, *judged):
            talk.print(line, markup=False, soft_wrap=True)


def _wanted(one: Published, model: str | None, chip: str | None, engine: str | None) -> bool:
    return model in (None, one.model) and chip in (None, one.chip) and engine in (None, one.backend)


def _nothing(kept: list[Published], where: object, model: str | None, chip: str | None, engine: str | None) -> str:
    asked = ", ".join(f"--{name} {value}" for name, value in (("model", model), ("chip", chip), ("engine", engine)) if value)
    there = sorted({f"{one.model} on {one.chip} under {one.backend}" for one in kept})
    return f"{where} has no comparable point of {asked or 'any deployment that klab plans'}; there are: {'; '.join(there) or 'none'}"


def _json(one: Checked, kind: str) -> dict[str, object]:
    p = one.point
    where = {name: getattr(p, name) for name in (
        "id", "model", "chip", "backend", "version", "campaign", "tp", "expert_parallel", "quantization", "kv_dtype", "isl", "osl",
        "concurrency",
    )}  # fmt: skip
    row: dict[str, object] = {"type": "point", "kind": kind, **where, "measured_ttft_s": p.ttft_s, "measured_tpot_s": p.tpot_s}
    if one.why_not:
        return {**row, "why_not": one.why_not}
    again = one.replayed
    return {
        **row, "tpot_s": one.tpot_s.to_json(), "ttft_s": one.ttft_s.to_json(), "label": one.label, "covered": one.covered,
        "replayed_tpot_s": again and again.tpot_s, "replayed_ttft_s": again and again.ttft_s,
    }  # fmt: skip
