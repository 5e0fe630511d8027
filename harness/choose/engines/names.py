"""What the tables of tuned configurations that serving engines load are called, and what such a name says."""

from __future__ import annotations

import dataclasses
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cache

from klab.harness.catalog.chips import chip_of_device
from klab.harness.catalog.models import PROFILES
from klab.kernels.contract import Chip, Kernel

MOE, DENSE = "moe", "dense"

# The numbers of tokens at which vLLM's tuner (benchmark_moe.py) fills a table.
USUAL_TOKENS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 256, 512, 1024, 1536, 2048, 3072, 4096)
# An entry that is used at more than so many times its own number of tokens, or at less than that part of it, is a guess. Measured: a table
# without entries for prefills was 2.35% slower than none (vllm pull request 52192).
FAR = 4.0

FIELDS = ("BLOCK_SIZE_M", "BLOCK_SIZE_N", "BLOCK_SIZE_K", "GROUP_SIZE_M", "num_warps", "num_stages")
"""What an entry of a table has in every dialect."""


@dataclass(frozen=True)
class TableName:
    """What a table is for. `device` is as it stands in the name.

    kind "moe": E `experts` on this GPU with N `n` intermediate features each; "dense": a matmul of N `n` by K `k`. `dtype` is the engine's
    word for the format (empty: 16 bits), `block` the block of weights that shares a scale. `down`: of the second product alone.
    """

    kind: str
    device: str
    n: int
    experts: int = 0
    k: int = 0
    dtype: str = ""
    block: tuple[int, int] | None = None
    per_channel: bool = False
    down: bool = False


@dataclass(frozen=True)
class Dialect:
    """How one engine names, places and reads its tables.

    variable: the environment variable that names a folder of MoE tables. block_separator: between the two numbers of a block. dtypes: per
    kind the words that its loader asks for. extras: per kind, fields beyond FIELDS that its kernel takes. version_key: kinds whose
    loader takes a `triton_version` beside the numbers of tokens. package: where the tables of a kind lie inside the engine.
    """

    engine: str
    title: str
    variable: str
    block_separator: str
    dtypes: Mapping[str, tuple[str, ...]] = field(hash=False)
    extras: Mapping[str, tuple[str, ...]] = field(hash=False)
    package: Mapping[str, str] = field(hash=False)
    version_key: tuple[str, ...] = ()
    features: tuple[str, ...] = ()

    def device(self, name: str, kind: str) -> str:
        """A device's name, as CUDA gives it, as this engine writes it in the name of a file."""
        raise NotImplementedError

    def folder(self, kind: str, triton: str) -> str:
        """Where a table goes, relative to the folder that `variable` names (a dense table: to the root of the engine's package)."""
        raise NotImplementedError

    def where(self, kind: str, parts: tuple[str, ...]) -> str:
        """Why a file of this kind in this folder (relative to what `variable` names) is never looked up; empty where it is."""
        raise NotImplementedError

    def file_name(self, table: TableName) -> str:
        """The name under which the engine looks for a table."""
        head = f"E={table.experts},N={table.n}" if table.kind == MOE else f"N={table.n},K={table.k}"
        block = f",block_shape=[{table.block[0]}{self.separator(table)}{table.block[1]}]" if table.block else ""
        dtype = f",dtype={table.dtype}" if table.dtype else ""
        channel = ",per_channel_quant=True" if table.per_channel else ""
        return f"{head},device_name={self.device(table.device, table.kind)}{dtype}{block}{channel}{'_down' if table.down else ''}.json"

    def separator(self, table: TableName) -> str:
        """Between the two numbers of a block."""
        return self.block_separator

    def never(self, table: TableName) -> str:
        """Why the engine never asks for such a table, whatever the spelling of its name; empty where it may."""
        if table.dtype not in self.dtypes[table.kind]:
            asked = ", ".join(word or "no dtype (16 bits)" for word in self.dtypes[table.kind])
            return f"{self.title} asks for {asked}, never for dtype={table.dtype or '(none)'}"
        if table.block and table.dtype not in ("fp8_w8a8", "int8_w8a8"):
            return f"{self.title} asks for a block_shape with 8-bit weights and activations alone, not with dtype={table.dtype or '(none)'}"
        if table.kind == DENSE and not table.block:
            return f"{self.title} has tables of dense products for block scales alone: the name lacks block_shape"
        for feature, has in (("per_channel_quant", table.per_channel), ("_down", table.down)):
            if has and feature not in self.features:
                return f"{self.title} never asks for {feature}"
        return ""


_NAME = re.compile(
    r"""(?: E\s*=\s*(?P<e>\d+)\s*,\s*N\s*=\s*(?P<n>\d+) | N\s*=\s*(?P<dn>\d+)\s*,\s*K\s*=\s*(?P<dk>\d+) )
        \s*,\s* device_name\s*=\s* (?P<device>[^,]+?)
        (?: \s*,\s* dtype\s*=\s* (?P<dtype>[^,\[\]]+?) )?
        (?: \s*,\s* block_shape\s*=\s* \[ \s*(?P<bn>\d+)\s*,\s*(?P<bk>\d+)\s* \] )?
        (?: \s*,\s* per_channel_quant\s*=\s* (?P<channel>True|False) )?
        (?P<down>_down)? \s* \.json""",
    re.VERBOSE | re.IGNORECASE,
)
_OTHERS = re.compile(r"headdim=.*\.json|.*_SHRINK\.json|.*_EXPAND_(?:TRUE|FALSE)\.json|moe_sum_reduce_.*\.json", re.IGNORECASE)


def read_name(name: str) -> TableName | None:
    """What a file's name means, however it is spaced and spelled; None where it is no name of a table."""
    found = _NAME.fullmatch(name)
    if found is None:
        return None
    block = (int(found["bn"]), int(found["bk"])) if found["bn"] else None
    common = {
        "device": found["device"],
        "dtype": found["dtype"] or "",
        "block": block,
        "per_channel": (found["channel"] or "").lower() == "true",
        "down": bool(found["down"]),
    }
    if found["e"]:
        return TableName(MOE, experts=int(found["e"]), n=int(found["n"]), **common)  # type: ignore[arg-type]
    return TableName(DENSE, n=int(found["dn"]), k=int(found["dk"]), **common)  # type: ignore[arg-type]


def other_table(name: str) -> bool:
    """Whether a name is that of another kind of table (Mamba, LoRA, sums), of which klab knows nothing."""
    return _OTHERS.fullmatch(name) is not None


@cache
def known_devices() -> tuple[str, ...]:
    """CUDA's names of the devices that the catalog's chips have."""
    files = sorted((PROFILES / "chips").glob("*.toml"))
    return tuple(str(name) for path in files for name in tomllib.loads(path.read_text()).get("devices", ()))


def chip_named(table: TableName, dialect: Dialect) -> Chip | None:
    """The catalog's chip that a table is for, or None."""
    wanted = dialect.device(table.device, table.kind)
    return next((_chip_of(device) for device in known_devices() if dialect.device(device, table.kind) == wanted), None)


@cache
def _chip_of(device: str) -> Chip | None:
    return chip_of_device(device)


def nearest(tokens: int, keys: tuple[int, ...]) -> int:
    """The entry that an engine takes for so many tokens: the one at the least distance, of two the first in the table."""
    return min(keys, key=lambda key: abs(key - tokens))


def far_off(keys: tuple[int, ...], wanted: tuple[int, ...] = USUAL_TOKENS) -> dict[int, int]:
    """Numbers of tokens -> the entry that is taken for them, where that is more than FAR times larger or smaller."""
    found = {tokens: nearest(tokens, keys) for tokens in wanted}
    return {tokens: key for tokens, key in found.items() if max(tokens / key, key / tokens) > FAR}


def plain(table: TableName) -> TableName:
    """The table of both products that one of the second product alone belongs to."""
    return replace(table, down=False)


def knobs(kernel: Kernel) -> set[str]:
    """The names of a kernel's configuration's fields."""
    return {one.name for one in dataclasses.fields(kernel.config_type)}  # type: ignore[arg-type]
