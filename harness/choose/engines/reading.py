"""Reading a table as its engine would, with everything that is wrong about its text."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from klab.harness.choose.engines.names import TableName, read_name
from klab.harness.choose.engines.sglang import version_of
from klab.kernels.contract import Json

VERSION = "triton_version"
# The largest table that engines ship is 10 KB. A file beyond this is none, and is not held in memory.
LARGEST_BYTES = 4 << 20
EVIDENCE = ".evidence.json"


@dataclass(frozen=True)
class Table:
    """A file as it was read. `entries` are by number of tokens, in the order of the file; `triton` is what the file or its folder says.

    `name` is None where the file's name is that of no table. `breaks`: why the loader raises; `odd`: what it takes without a word, and
    nobody meant.
    """

    path: Path
    name: TableName | None
    entries: Mapping[int, Mapping[str, Json]] = field(hash=False, default_factory=dict)
    triton: str = ""
    has_version_key: bool = False
    sha256: str = ""
    breaks: tuple[str, ...] = ()
    odd: tuple[str, ...] = ()

    @property
    def tokens(self) -> tuple[int, ...]:
        """The numbers of tokens that have an entry, in the order of the file."""
        return tuple(self.entries)


def printable(text: str, most: int = 600) -> str:
    """Text of somebody else's file or name as a terminal takes it: what is no character to print is spelled out, what is long is cut."""
    safe = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text[: most + 1])
    return safe if len(safe) <= most else f"{safe[:most]} ..."


class _Repeated(dict[str, Json]):
    """A JSON object that remembers which of its keys were there more than once."""

    def __init__(self, pairs: list[tuple[str, Json]]) -> None:
        super().__init__(pairs)
        names = [name for name, _ in pairs]
        self.repeated = sorted({name for name in names if names.count(name) > 1}) if len(self) < len(names) else []


def sidecar_of(path: Path) -> Path:
    """The file beside a table that holds its evidence; no engine asks for such a name."""
    return path.with_name(path.name.removesuffix(".json") + EVIDENCE)


def read_table(path: Path, parts: tuple[str, ...] = ()) -> Table:
    """Read one file; `parts` is its folder relative to the root of the tables. What is wrong is in the result, and nothing is raised."""
    name, triton = read_name(path.name), version_of(parts or path.parent.parts[-1:])
    try:
        if path.stat().st_size > LARGEST_BYTES:
            return Table(path, name, triton=triton, breaks=(f"is larger than {LARGEST_BYTES >> 20} MiB: no table",))
        raw = path.read_bytes()
        data = json.loads(raw.decode("utf-8"), object_pairs_hook=_Repeated)
    except OSError as error:
        return Table(path, name, triton=triton, breaks=(f"cannot be read: {error.strerror or error}",))
    except (ValueError, RecursionError) as error:
        where = f": line {error.lineno}, {error.msg}" if isinstance(error, json.JSONDecodeError) else ""
        return Table(path, name, triton=triton, breaks=(f"is not JSON{where}",))
    digest = hashlib.sha256(raw).hexdigest()
    if not isinstance(data, _Repeated):
        return Table(path, name, triton=triton, sha256=digest, breaks=("holds no JSON object",))
    entries: dict[int, Mapping[str, Json]] = {}
    breaks: list[str] = []
    odd = [f"key {json.dumps(key)} is there more than once: the last one counts" for key in data.repeated]
    for key, value in data.items():
        if key == VERSION:
            continue
        try:
            tokens = int(key)
        except ValueError:
            breaks.append(f"key {json.dumps(key)} is no number: the loader makes one of every key and raises")
            continue
        if tokens in entries:
            odd.append(f"two keys mean {tokens} tokens: the last one counts")
        if str(tokens) != key:
            odd.append(f"key {json.dumps(key)} is read as {tokens}")
        if not isinstance(value, Mapping):
            breaks.append(f"the entry of {tokens} tokens is no JSON object")
            continue
        if isinstance(value, _Repeated) and value.repeated:
            odd.append(f"the entry of {tokens} tokens has {', '.join(value.repeated)} more than once: the last one counts")
        entries[tokens] = dict(value)
    if not entries and not breaks:
        breaks.append("has no entries: the engine takes it for missing and runs its defaults")
    stated = data.get(VERSION)
    return Table(
        path,
        name,
        entries,
        triton=triton or (str(stated) if isinstance(stated, str) else ""),
        has_version_key=VERSION in data,
        sha256=digest,
        breaks=tuple(breaks),
        odd=tuple(odd),
    )


def dangling(path: Path) -> bool:
    """Whether it is a link to what is not there."""
    return path.is_symlink() and not path.exists()


def files_of(root: Path) -> list[Path]:
    """Every file under a folder that may be meant as a table, by name: sidecars and hidden files are left out."""
    if root.is_file():
        return [root]
    found = (path for path in root.rglob("*") if ".json" in path.name.lower() and (path.is_file() or dangling(path)))
    return sorted(path for path in found if not path.name.startswith(".") and not path.name.endswith(EVIDENCE))
