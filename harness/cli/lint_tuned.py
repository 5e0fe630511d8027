"""`klab lint-tuned`: tables of tuned configurations that an engine would never load, that stop it, or that slow it down."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from klab.harness.cli import _options
from klab.harness.cli._console import emit, table, talk

if TYPE_CHECKING:
    from klab.harness.choose.engines.lint import Expected
    from klab.harness.choose.engines.names import Dialect

Folder = Annotated[Path, typer.Argument(help="The folder that the engine's variable names, one of the engine's own, or a file.")]
Engine = Annotated[str, typer.Option("--engine", "-e", help="vllm or sglang. Default: by the look of the files.")]
Device = Annotated[str | None, typer.Option("--device", help='The device that is to load them, by CUDA\'s name: "NVIDIA H200".')]
Chip = Annotated[str | None, typer.Option("--chip", "-c", help="The same by a chip's name (klab chips).")]
Triton = Annotated[str | None, typer.Option("--triton", help="The engine's version of Triton, 3.6.0 say.")]
Model = Annotated[
    str | None, typer.Option("--model", "-m", help="Also: whether this model's experts have their tables. Wants --chip or --device.")
]
Tp = Annotated[int, typer.Option("--tp", help="With --model: GPUs of one replica.")]
Ep = Annotated[bool, typer.Option("--expert-parallel", help="With --model: whole experts per GPU instead of slices.")]
Notes = Annotated[bool, typer.Option("--notes", help="List also what is merely good to know, file by file.")]
Fp8 = Annotated[bool, typer.Option("--block-fp8", help="With --model: a checkpoint with fp8 weights in blocks of 128x128.")]


def command(app: typer.Typer) -> None:
    """Register the verb."""

    @app.command("lint-tuned")
    def lint_tuned(
        folder: Folder,
        engine: Engine = "auto",
        device: Device = None,
        chip: Chip = None,
        triton: Triton = None,
        model: Model = None,
        tp: Tp = 1,
        expert_parallel: Ep = False,
        block_fp8: Fp8 = False,
        notes: Notes = False,
        as_json: _options.AsJson = False,
    ) -> None:
        """Check tables before an engine ignores them. Exit 1 where one is never loaded or stops the engine."""
        from klab.harness.choose.engines import find_dialect
        from klab.harness.choose.engines.lint import BREAKS, LEVELS, NEVER, NOTE, guess, lint, root_of
        from klab.harness.choose.engines.lint import as_json as line_of
        from klab.harness.choose.engines.reading import files_of
        from klab.kernels.errors import UsageError

        if not folder.exists():
            raise UsageError(f"{folder} does not exist; name the folder with the tables, or one of them")
        files = files_of(folder)
        if not files:
            raise UsageError(f"{folder} holds no .json file: no tables")
        dialect = find_dialect(guess(folder) if engine == "auto" else engine)
        expected = _expected(dialect, device, chip, triton, model, tp, expert_parallel=expert_parallel, block_fp8=block_fp8)
        found = lint(folder, dialect, expected)
        root = root_of(folder.parent if folder.is_file() else folder, dialect)
        for one in found if as_json else ():
            emit({"type": "finding", **line_of(one)})
        bad = {one.file for one in found if one.level in (NEVER, BREAKS)}
        counts = {level: len({one.file for one in found if one.level == level}) for level in LEVELS}
        if as_json:
            emit({"type": "summary", "engine": dialect.engine, "root": str(root), "files": len(files), "bad": len(bad), **counts})
        else:
            shown = [one for one in found if notes or one.level != NOTE]
            if shown:
                table(f"Tables for {dialect.title}, looked up as {dialect.variable}={root}", ("file", "", "what", "why"),
                      [(one.file, one.level, one.rule, one.text) for one in shown])  # fmt: skip
            for level in dict.fromkeys(one.level for one in shown):
                talk.print(f"{level}: {LEVELS[level]}", markup=False)
            for text, count in () if notes else Counter(one.text for one in found if one.level == NOTE).items():
                talk.print(f"{count} x note: {text}", markup=False, soft_wrap=True)
        talk.print(f"{len(files)} files, {len(bad)} of them (or wanted and absent) are of no use to {dialect.title}", markup=False)
        if bad:
            raise typer.Exit(1)


def _expected(dialect: Dialect, device: str | None, chip: str | None, triton: str | None, model: str | None, tp: int, *,
              expert_parallel: bool, block_fp8: bool) -> Expected:  # fmt: skip
    from klab.harness.catalog import find_chip, find_model
    from klab.harness.catalog.chips import chip_of_device
    from klab.harness.choose.engines.lint import Expected
    from klab.harness.choose.engines.names import known_devices
    from klab.harness.choose.engines.shapes import experts_of, shapes_of
    from klab.kernels.errors import UsageError

    limits = find_chip(chip) if chip else chip_of_device(device) if device else None
    if limits is not None and limits.kind != "cuda":
        raise UsageError(f"{limits.title} is no GPU, and {dialect.title} loads tables for GPUs")
    if limits is not None and device is None:
        device = next((one for one in known_devices() if (known := chip_of_device(one)) and known.name == limits.name), None)
        if device is None:
            raise UsageError(
                f"the catalog does not say by which name CUDA knows {limits.name}: add devices = [...] to it, or give --device"
            )
    if model is None:
        if tp != 1 or expert_parallel or block_fp8:
            raise UsageError("--tp, --expert-parallel and --block-fp8 say which tables a model asks for: give --model too")
        return Expected(device, limits, triton)
    found = find_model(model)
    if device is None:
        raise UsageError("--model asks for the tables of a device: give --chip or --device too")
    if not experts_of(found):
        raise UsageError(f"{found.name} has no routed experts: no engine looks for a table of theirs")
    names = tuple(s.name(device, block_fp8=block_fp8) for s in shapes_of(found, tp, expert_parallel=expert_parallel))
    if not names:
        raise UsageError(f"--tp {tp} does not divide {found.name}'s experts" + ("" if expert_parallel else " into slices"))
    return Expected(device, limits, triton, names)
