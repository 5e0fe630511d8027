"""Options that several verbs share, and how their values are read."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Annotated

import typer

from klab.kernels.errors import UsageError

Model = Annotated[str, typer.Option("--model", "-m", help="A model's name (klab models), or a path to a Hugging Face config.json.")]
Chip = Annotated[str, typer.Option("--chip", "-c", help="A chip's name (klab chips), or auto: the one of this machine.")]
Chips = Annotated[
    str,
    typer.Option("--chip", "-c", help="A chip's name (klab chips), or auto: the one of this machine. With --fleet ray several: h200,b200."),
]
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
With = Annotated[
    list[str] | None,
    typer.Option(
        "--with",
        help="More of the scenario, as NAME=VALUE: prefix_len, q_len, page_size, prefill_batch, kv_dtype, shared_prefix, expert_parallel, "
        "quantization. Repeatable.",
    ),
]
Candidates = Annotated[str, typer.Option("--candidates", help="default, sample:N or all configurations of each kernel.")]
FleetKind = Annotated[
    str, typer.Option("--fleet", help="Who runs the trials: local (the devices of this machine) or ray (a cluster; kernel-lab[ray]).")
]
Address = Annotated[str | None, typer.Option("--address", help="With --fleet ray: the cluster's address, as ray.init takes it.")]
Budget = Annotated[str | None, typer.Option("--budget", help="Time for everything: 90s, 8m, 1.5h. Default: until done.")]

MaxError = Annotated[
    float | None,
    typer.Option(
        "--max-error",
        help="Let kernels in narrower formats (fp8, int8, fp4, int4) compete for each problem, up to this distance from the unquantised "
        "output, ||out - wide|| / ||wide||: 0.03 say.",
    ),
]

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


def checked_error(value: float | None) -> float | None:
    """--max-error as it was given; UsageError unless it is a positive share."""
    if value is not None and not 0 < value < 1:
        raise UsageError(f"--max-error {value:g}: a relative error lies between 0 and 1; fp8 costs about 0.03, fp4 about 0.15")
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


def scenario_of(
    isl: int | None, osl: int | None, batch: str | None, tp: int, dtype: str | None, further: list[str] | None
) -> dict[str, object]:
    """The fields of a Scenario from the options that every verb with a plan has; UsageError for a value that is none."""
    given: dict[str, object] = {"isl": isl, "osl": osl, "batches": integers(batch, "--batch"), "tp": tp, "dtype": dtype}
    return given | scenario_fields(further)


def scenario_fields(texts: list[str] | None) -> dict[str, object]:
    """`["q_len=4", "kv-dtype=fp8"]` -> {"q_len": 4, "kv_dtype": "fp8"}; UsageError names what is no field or no value of one."""
    from klab.harness.plan.scenario import Scenario

    known = {field.name: str(field.type) for field in dataclasses.fields(Scenario)}
    found: dict[str, object] = {}
    for text in texts or ():
        name, equals, value = text.partition("=")
        name = name.strip().replace("-", "_")
        kind = known.get(name)
        if not equals or kind not in ("int", "str", "bool"):
            raise UsageError(
                f"--with {text!r}: write NAME=VALUE with one of {', '.join(n for n, k in known.items() if k != 'tuple[int, ...]')}"
            )
        found[name] = _value(text, kind, value.strip())
    return found


def _value(text: str, kind: str, value: str) -> object:
    if kind == "str":
        return value
    if kind == "bool" and value.lower() in ("true", "yes", "1", "false", "no", "0"):
        return value.lower() in ("true", "yes", "1")
    if kind == "int" and value.isdecimal():
        return int(value)
    raise UsageError(f"--with {text!r}: the value is {'true or false' if kind == 'bool' else 'a whole number'}")
