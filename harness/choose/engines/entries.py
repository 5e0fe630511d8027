"""What can be wrong with one entry of a table: fields that stop the launch, tiles that no kernel or chip can run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from klab.harness.choose.engines.names import DENSE, FIELDS, Dialect, TableName
from klab.kernels.contract import Chip, Json
from klab.kernels.triton_support import KIB

REQUIRED, TILES = FIELDS[:4], FIELDS[:3]
AMD = ("waves_per_eu", "matrix_instr_nonkdim", "kpack")
# Bytes of an element of (activations, weights) by the engines' word for a format.
SIZES = {"": (2.0, 2.0), "float32": (4.0, 4.0), "fp8_w8a8": (1.0, 1.0), "int8_w8a8": (1.0, 1.0), "fp8_w8a16": (2.0, 1.0),
         "int8_w8a16": (2.0, 1.0), "int4_w4a16": (2.0, 0.5)}  # fmt: skip
# Beyond so many float32 sums a thread has no registers left (255 is all there are); tensor memory of Blackwell holds some of them.
MOST_SUMS_PER_THREAD = 256
# A tensor core's tile has 16 rows; Triton pads smaller ones or refuses them, by version.
LEAST_TILE = 16

Trouble = tuple[bool, str]
"""(whether it stops the engine, what it is)."""


def entry_troubles(tokens: int, entry: Mapping[str, Json], name: TableName, dialect: Dialect, chip: Chip | None) -> Iterator[Trouble]:
    """What is wrong with the entry of so many tokens; sizes are judged on `chip` where it is known."""
    if tokens < 1:
        yield False, "no step has so few tokens"
    missing = [field for field in REQUIRED if field not in entry]
    if missing:
        yield True, f"lacks {', '.join(missing)}, without which there is no launch"
    absent = [field for field in FIELDS[4:] if field not in entry]
    if absent:
        yield False, f"lacks {', '.join(absent)}: Triton's own values are taken"
    yield from _unknown(entry, name, dialect)
    wrong = [field for field in FIELDS if field in entry and (type(entry[field]) is not int or entry[field] < 1)]
    if wrong:
        yield True, ", ".join(f"{field} is {entry[field]!r}, not a positive whole number" for field in wrong)
    odd = [field for field in (*TILES, "num_warps") if field in entry and field not in wrong and entry[field] & (entry[field] - 1)]
    if odd:
        yield True, ", ".join(f"{field} is {entry[field]}, no power of two" for field in odd)
    if missing or wrong or odd:
        return
    yield from _tile(entry, name, chip)


def _unknown(entry: Mapping[str, Json], name: TableName, dialect: Dialect) -> Iterator[Trouble]:
    amd_device = name.device.upper().startswith("AMD")
    known = {*FIELDS, *dialect.extras[name.kind], *(AMD if amd_device else ())}
    unknown = sorted(set(entry) - known)
    # Triton takes SPLIT_K = 1 for an argument like any other; whether the kernel has it depends on the engine's version.
    harmless = [field for field in unknown if field == "SPLIT_K" and entry[field] == 1]
    if harmless:
        yield False, f"SPLIT_K is no field of {dialect.title}'s tables of this kind"
    if stop := [field for field in unknown if field not in harmless]:
        yield True, f"{', '.join(stop)} goes to the kernel as an argument, and it has none of that name"


def _tile(entry: Mapping[str, Json], name: TableName, chip: Chip | None) -> Iterator[Trouble]:
    m, n, k, warps = (int(entry[field]) for field in (*TILES, "num_warps")) if "num_warps" in entry else (*_sizes(entry), 4)
    stages = int(entry.get("num_stages", 3))
    if min(m, n, k) < LEAST_TILE:
        yield False, f"a tile of {m}x{n}x{k}: below {LEAST_TILE}, Triton pads or refuses it"
    if warps > 32:
        yield True, f"num_warps is {warps}, and a block has at most 32"
    if name.block and k > name.block[1]:
        if name.kind == DENSE:
            yield True, f"BLOCK_SIZE_K {k} goes over several scales of {name.block[1]}: the products would be wrong"
        k = name.block[1]
    if m * n // (32 * min(warps, 32)) > MOST_SUMS_PER_THREAD:
        yield False, f"{m * n // (32 * warps)} sums per thread spill registers"
    if chip is None or chip.kind != "cuda" or not chip.smem_per_block_bytes:
        return
    x, w = SIZES.get(name.dtype, SIZES[""])
    step = m * k * x + k * n * w
    most = chip.smem_per_block_bytes
    have = f"and a block of {chip.name} has {most / KIB:.0f}"
    shown = f"{stages} stages of {m}x{n}x{k} need {stages * step / KIB:.0f} KiB of shared memory, {have}"
    if (stages - 1) * step > most:
        yield True, shown
    elif stages * step > most:
        yield False, f"{shown}; it runs only if Triton keeps one stage less"


def _sizes(entry: Mapping[str, Json]) -> tuple[int, int, int]:
    return int(entry[TILES[0]]), int(entry[TILES[1]]), int(entry[TILES[2]])
