"""Options that several verbs share, and how their values are read."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer

from klab.kernels.errors import UsageError

Model = Annotated[str, typer.Option("--model", "-m", help="A model's name (klab models), or a path to a Hugging Face config.json.")]
Chip = Annotated[str, typer.Option("--chip", "-c", help="A chip's name (klab chips), or auto: the one of this machine.")]
Results = Annotated[
    Path | None, typer.Option("--results", help="Folder of the store. Default: $KLAB_RESULTS, or results/local in the checkout.")
]
KernelDirs = Annotated[
    list[Path] | None,
    typer.Option("--kernels", help="A folder of kernel files of your own that compete too. Its files are run. Repeatable."),
]
Only = Annotated[list[str] | None, typer.Option("--kernel", "-k", help="Only this kernel (operator/name or name). Repeatable.")]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON object per line on stdout; talk goes to stderr.")]
Isl = Annotated[int | None, typer.Option("--isl", help="Input length in tokens.")]
Osl = Annotated[int | None, typer.Option("--osl", help="Output length in tokens.")]
Batch = Annotated[str | None, typer.Option("--batch", help="Decode batch sizes, comma-separated: 1,8,32.")]
Tp = Annotated[int, typer.Option("--tp", help="Tensor-parallel size.")]
Dtype = Annotated[str | None, typer.Option("--dtype", help="bf16, fp16 or fp32. Default: the model's, where the chip can.")]
Candidates = Annotated[str, typer.Option("--candidates", help="default, sample:N or all configurations of each kernel.")]
Budget = Annotated[str | None, typer.Option("--budget", help="Time for everything: 90s, 8m, 1.5h. Default: until done.")]

_UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0, "": 1.0}


def seconds(text: str | None, option: str = "--budget") -> float | None:
    """`8m` -> 480.0; None stays None. UsageError for anything that is not a positive time."""
    if text is None:
        return None
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(s|m|h|)\s*", text)
    if found is None:
        raise UsageError(f"{option} {text!r} is not a time; write 90s, 8m or 1.5h")
    value = float(found.group(1)) * _UNITS[found.group(2)]
    if value <= 0:
        raise UsageError(f"{option} {text}: nothing can be measured in no time; give at least a few seconds")
    return value


def integers(text: str | None, option: str) -> tuple[int, ...] | None:
    """`1,8,32` -> (1, 8, 32); None stays None. UsageError for anything else."""
    if text is None:
        return None
    try:
        values = tuple(int(part) for part in text.split(","))
    except ValueError:
        values = ()
    if not values or min(values) < 1:
        raise UsageError(f"{option} {text!r} is not a list of positive integers; write 1,8,32")
    return values
