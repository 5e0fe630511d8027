"""Chips by name, by file, or as this machine has them."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any

from klab.harness.catalog.cpu import detect_cpu
from klab.harness.catalog.models import PROFILES
from klab.harness.catalog.names import plain_name
from klab.harness.catalog.toml_file import read_toml
from klab.kernels.contract import Chip
from klab.kernels.errors import CannotMeasure, UsageError

_NUMBERS = ("sm_count", "max_clock_mhz", "spec_clock_mhz", "memory_bytes", "memory_gb_per_s", "l2_bytes")
_OPTIONAL = ("smem_per_block_bytes", "smem_per_sm_bytes", "tdp_w", "link_gb_per_s", "network_gb_per_s")
# What a chip that nobody can run on must state; the rest is about kernels.
_DATASHEET = ("memory_bytes", "memory_gb_per_s", "tdp_w")
_PHASES = ("prefill", "decode")
_FIELDS = {"name", "title", "kind", "compute_capability", "devices", "peak_tflops", "phases", "sources", *_NUMBERS, *_OPTIONAL}
_INTEGERS = ("sm_count", "memory_bytes", "l2_bytes", "smem_per_block_bytes", "smem_per_sm_bytes")
# Peaks may be of these; the last two are not dtypes of tensors but ways to multiply.
_PEAK_DTYPES = ("bfloat16", "float16", "float32", "float64", "float8_e4m3fn", "int8", "tensorfloat32", "float4_e2m1")


@cache
def load_chips() -> tuple[Chip, ...]:
    """The chips under profiles/chips, by name (the CPU of this machine is not among them: see `find_chip("cpu")`)."""
    return tuple(chip_from_toml(path) for path in sorted((PROFILES / "chips").glob("*.toml")))


def find_chip(name: str) -> Chip:
    """A chip by name, by the path of a TOML file, "cpu" (this machine's, detected) or "auto" (its GPU if it has one, else its CPU).

    UsageError for an unknown name; CannotMeasure when "auto" meets a GPU that the catalog does not have.
    """
    wanted = name.strip().lower()
    if wanted == "cpu":
        return detect_cpu()
    if wanted == "auto":
        return _this_machine()
    for chip in load_chips():
        if wanted == chip.name:
            return chip
    # Not Path's own methods, which raise for a name that is too long for a file or of no user: results may name chips so.
    path = os.path.expanduser(name)
    if wanted.endswith(".toml") or os.path.isfile(path):
        return chip_from_toml(Path(path))
    names = [*(chip.name for chip in load_chips()), "cpu", "auto"]
    near = get_close_matches(wanted, names, n=1)
    hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(names)}."
    raise UsageError(f"unknown chip {name!r}; {hint} The path of a chip's TOML file works too (profiles/chips has examples)")


def find_real_chip(name: str) -> Chip:
    """`find_chip` for what measures and tunes: UsageError for a chip that is a datasheet alone."""
    chip = find_chip(name)
    if chip.kind == "datasheet":
        raise UsageError(f"{chip.name} is known from a datasheet alone, nothing runs on it: klab plan, klab cost and klab place take it")
    return chip


def chip_of_device(device: str) -> Chip | None:
    """The chip of the catalog that CUDA calls `device` ("NVIDIA H200"), or None."""
    for path in sorted((PROFILES / "chips").glob("*.toml")):
        if device.strip().lower() in (str(known).lower() for known in read_toml(path).get("devices", ())):
            return chip_from_toml(path)
    return None


def _this_machine() -> Chip:
    device = _cuda_device()
    if device is None:
        return detect_cpu()
    chip = chip_of_device(device)
    if chip is None:
        known = ", ".join(chip.name for chip in load_chips())
        raise CannotMeasure(
            f"this machine's GPU, {device!r}, is not in the catalog ({known}): copy profiles/chips/h200.toml, fill in its numbers, add "
            f"devices = [{device!r}], and pass it with --chip FILE.toml; or use --chip cpu"
        )
    return chip


def _cuda_device() -> str | None:
    """CUDA's name of device 0, or None without torch, driver or device."""
    try:
        import torch
    except ImportError:
        return None
    try:
        return torch.cuda.get_device_name(0) if torch.cuda.is_available() else None
    except RuntimeError as error:  # a GPU that has fallen off the bus
        told = str(error).partition("\n")[0]
        raise CannotMeasure(f"CUDA does not start: {told}; klab doctor says more, --chip cpu needs none") from None


def chip_from_toml(path: Path) -> Chip:
    """Read a chip file. UsageError names a missing, malformed or unknown field."""
    data = read_toml(path)
    numbered = _DATASHEET if data.get("kind") == "datasheet" else _NUMBERS
    missing = [field for field in ("name", "kind", "peak_tflops", *numbered) if field not in data]
    if missing:
        raise UsageError(f"{path}: the chip lacks {', '.join(missing)}; profiles/chips/h200.toml shows every field")
    unknown = sorted(set(data) - _FIELDS)
    if unknown:
        raise UsageError(f"{path}: unknown field {', '.join(unknown)}; a chip has {', '.join(sorted(_FIELDS))}")
    if data["kind"] not in ("cuda", "cpu", "datasheet"):
        raise UsageError(f"{path}: kind is cuda or cpu (or datasheet, for a chip that nobody can run on), not {data['kind']!r}")
    numbers: dict[str, Any] = {field: _number(path, field, data[field]) for field in (*_NUMBERS, *_OPTIONAL) if field in data}
    peaks = data["peak_tflops"]
    if not isinstance(peaks, Mapping) or not peaks:
        raise UsageError(f"{path}: peak_tflops is a table of dense TFLOP/s by dtype, such as bfloat16 = 989.4")
    strange = sorted(set(peaks) - set(_PEAK_DTYPES))
    if strange:
        raise UsageError(f"{path}: peak_tflops has {', '.join(strange)}; it knows {', '.join(_PEAK_DTYPES)}")
    sources = data.get("sources", {})
    provenance = {field: str(sources.get(field, f"{path.name}, no source stated")) for field in numbers}
    provenance |= {f"peak_tflops.{dtype}": str(sources.get(f"peak_tflops.{dtype}", f"{path.name}, no source stated")) for dtype in peaks}
    capability = data.get("compute_capability", (0, 0))
    if "compute_capability" in sources:
        provenance["compute_capability"] = str(sources["compute_capability"])
    if not isinstance(capability, list | tuple) or len(capability) != 2 or not all(isinstance(part, int) for part in capability):
        raise UsageError(f"{path}: compute_capability is two whole numbers, such as [9, 0], not {capability!r}")
    if data["kind"] == "cuda" and "compute_capability" not in data:
        raise UsageError(f"{path}: a cuda chip needs compute_capability, such as [9, 0]")
    return Chip(
        name=plain_name(str(data["name"]).lower(), str(path)),
        title=str(data.get("title", data["name"])),
        kind=data["kind"],
        peak_tflops={dtype: _number(path, f"peak_tflops.{dtype}", peak) for dtype, peak in peaks.items()},
        compute_capability=(capability[0], capability[1]),
        provenance=provenance,
        phases=_phases(path, data.get("phases", list(_PHASES))),
        **dict.fromkeys(_NUMBERS, 0) | {field: int(value) if field in _INTEGERS else value for field, value in numbers.items()},
    )


def _phases(path: Path, given: Any) -> tuple[str, ...]:
    if not isinstance(given, list) or not given or not set(map(str, given)) <= set(_PHASES):
        raise UsageError(f"{path}: phases are those that the chip is made for, of {', '.join(_PHASES)}; not {given!r}")
    return tuple(phase for phase in _PHASES if phase in given)


def _number(path: Path, field: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise UsageError(f"{path}: {field} is {value!r}; it must be a positive number")
    return float(value)
