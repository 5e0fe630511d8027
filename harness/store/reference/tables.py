"""Tables: where published measurements lie, of which chips, and which one version of each is read."""

from __future__ import annotations

import importlib.util
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from klab.kernels.errors import UsageError

VARIABLE = "KLAB_REFERENCE"
PACKAGE = "aiconfigurator-core"
MODULE = "aiconfigurator_core"
INSTALL = "pip install -e '.[reference]'"
# Engines whose operators were measured.
BACKENDS = ("trtllm", "sglang", "vllm")
# Version number -> what sorts behind it: a release candidate comes before its release, a post-release after.
_STAGES = {"dev": -3, "rc": -2, "post": 1}


@dataclass(frozen=True)
class Table:
    """One file of measurements: of one system (a chip in its machine), one family of operators, one engine and one version."""

    root: Path
    system: str
    folder: str
    backend: str
    version: str
    file: str

    @property
    def path(self) -> Path:
        """Where it lies."""
        return self.root / "data" / self.system / self.folder / self.backend / self.version / f"{self.file}.parquet"

    @property
    def label(self) -> str:
        """`h200_sxm/gemm/trtllm/1.3.0rc20/gemm_perf`: what a row's provenance names."""
        return f"{self.system}/{self.folder}/{self.backend}/{self.version}/{self.file}"


def available(given: Path | str | None = None) -> Path | None:
    """The folder of the tables: `given`, else KLAB_REFERENCE, else that of the installed package; None where none is.

    UsageError when a folder was named and holds no tables.
    """
    named = given or os.environ.get(VARIABLE)
    if named:
        folder = Path(named).expanduser()
        for inside in (folder, folder / "systems", folder / MODULE / "systems"):
            if (inside / "data").is_dir():
                return inside
        source = "" if given else f"{VARIABLE}: "
        raise UsageError(f"{source}{folder} holds no tables (a folder data/ with one folder per system), as {PACKAGE} has them in systems/")
    spec = importlib.util.find_spec(MODULE)
    places = spec.submodule_search_locations if spec else None
    folders = (Path(place) / "systems" for place in places or ())
    return next((folder for folder in folders if (folder / "data").is_dir()), None)


def require(given: Path | str | None = None) -> Path:
    """`available`, or UsageError with how to get the tables."""
    folder = available(given)
    if folder is None:
        raise UsageError(f"no reference tables are here: {INSTALL} installs {PACKAGE}, or name a folder of them ({VARIABLE})")
    return folder


def package_version(root: Path) -> str:
    """`aiconfigurator-core==0.12.0` where the folder is that of the installed package, else the folder's name alone."""
    import importlib.metadata

    if available() == root and VARIABLE not in os.environ:
        try:
            return f"{PACKAGE}=={importlib.metadata.version(PACKAGE)}"
        except importlib.metadata.PackageNotFoundError:
            pass
    return PACKAGE


def systems(root: Path) -> list[str]:
    """The systems that have tables, by name."""
    return sorted(folder.name for folder in (root / "data").iterdir() if folder.is_dir() and next(folder.glob("*/*/*/*.parquet"), None))


def system_of(chip: str, root: Path) -> str:
    """The system of a chip: `h200` means h200_sxm; a system's own name works too. UsageError names those that are here."""
    known = systems(root)
    for name in (chip.lower(), f"{chip.lower()}_sxm"):
        if name in known:
            return name
    raise UsageError(f"no reference tables of {chip}; there are some of {', '.join(name.removesuffix('_sxm') for name in known)}")


def version_key(version: str) -> tuple[tuple[int, int], ...]:
    """Sorts 0.5.6.post2 behind 0.5.6, 1.3.0rc9 before 1.3.0rc20, and that before 1.3.0."""
    parts = re.findall(r"(dev|rc|post)?\.?(\d+)", version.lower().split("+")[0])
    return (*((_STAGES.get(stage, 0), int(number)) for stage, number in parts), (0, -1))


def tables(root: Path, system: str, folder: str, file: str, backends: Sequence[str] | None = None) -> Iterator[Table]:
    """The one version of this file that is read, per engine: the one that the package declares current, else the newest.

    Versions are never mixed: a newer one that holds a few operators of new models does not add to the current one.
    """
    place = root / "data" / system / folder
    for backend in backends or sorted(entry.name for entry in place.glob("*") if entry.is_dir()):
        found = [path.parent.name for path in (place / backend).glob(f"*/{file}.parquet")]
        if found:
            current = _current(root).get((system, backend), _current(root).get(("", backend), ""))
            version = current if current in found else max(found, key=version_key)
            yield Table(root, system, folder, backend, version, file)


@dataclass(frozen=True)
class Inventory:
    """What there is of one system: engine -> the version that counts, files, and their rows."""

    system: str
    engines: Mapping[str, str]
    tables: int
    rows: int


def inventory(root: Path) -> list[Inventory]:
    """Every system, all versions and operators counted, also those that klab does not read. UsageError for an unreadable file."""
    found = []
    for system in systems(root):
        files = sorted((root / "data" / system).glob("*/*/*/*.parquet"))
        current = _current(root)
        engines = {name: current.get((system, name), current.get(("", name), "")) for name in BACKENDS}
        there = {path.parts[-3] for path in files}
        found.append(Inventory(system, {name: v or "?" for name, v in engines.items() if name in there}, len(files), _rows_in(files)))
    return found


def _rows_in(files: Sequence[Path]) -> int:
    duckdb = _duckdb()
    try:
        return sum(n for (n,) in _database().execute("select num_rows from parquet_file_metadata(?)", [list(map(str, files))]).fetchall())
    except duckdb.Error as error:
        raise UsageError(f"cannot read {files[0].parents[2]}: {str(error).splitlines()[0]}") from None


@cache
def _current(root: Path) -> Mapping[tuple[str, str], str]:
    """(system, engine) -> the version that the package answers with; of every system under ""."""
    path = root / "query_versions.yaml"
    data = read_yaml(path) if path.is_file() else {}
    slots = {"": data.get("defaults") or {}, **(data.get("overrides") or {})}
    try:
        return {
            (system, backend): str(slot["current"])
            for system, backends in slots.items()
            for backend, slot in backends.items()
            if slot.get("current")
        }
    except (AttributeError, KeyError, TypeError):
        raise UsageError(f"{path} is not a list of versions as {PACKAGE} has it") from None


def read_yaml(path: Path) -> Mapping[str, Any]:
    """A file of the package. UsageError for one that cannot be read; empty where no YAML reader is installed (the package brings one)."""
    try:
        import yaml  # type: ignore[import-untyped]
    except ImportError:
        return {}
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UsageError(f"cannot read {path}: {str(error).splitlines()[0]}") from None
    if not isinstance(data, dict):
        raise UsageError(f"cannot read {path}: it is no table of values")
    return data


def read_rows(table: Table, columns: Sequence[str]) -> list[tuple[Any, ...]]:
    """These columns of a table (null where it has no such column), row by row, in its own order.

    UsageError for a file that is no such table, or where DuckDB is not installed.
    """
    rows: list[tuple[Any, ...]] = _read(table, columns, {}, {}).fetchall()
    return rows


def read_columns(table: Table, columns: Sequence[str], where: Mapping[str, object], default: Mapping[str, object]) -> dict[str, Any]:
    """These columns of the rows with these values, as NumPy arrays; a null is the `default` of its column. UsageError as `read_rows`."""
    arrays: dict[str, Any] = _read(table, columns, where, default).fetchnumpy()
    return arrays


@cache
def usual_version(table: Table) -> str:
    """The version of most rows of a table: that of the others is another; "" where they say none."""
    counts = Counter(version or "" for (version,) in _read(table, ("version",), {}, {}).fetchall())
    return counts.most_common(1)[0][0] if counts else ""


def _read(table: Table, columns: Sequence[str], where: Mapping[str, object], default: Mapping[str, object]) -> Any:
    duckdb = _duckdb()
    path = str(table.path).replace("'", "''")
    try:
        db = _database().cursor()
        there = set(db.execute(f"select * from read_parquet('{path}') limit 0").fetchnumpy())
        values: list[object] = []
        picked = []
        for name in columns:
            column = f'"{name}"' if name in there else "null"
            if name in default:
                column = f"coalesce({column}, ?)"
                values.append(default[name])
            picked.append(f'{column} as "{name}"')
        wanted = {name: value for name, value in where.items() if name in there}
        condition = " and ".join(f'"{name}" = ?' for name in wanted) or "true"
        return db.execute(f"select {', '.join(picked)} from read_parquet('{path}') where {condition}", [*values, *wanted.values()])
    except duckdb.Error as error:
        raise UsageError(f"cannot read {table.path}: {str(error).splitlines()[0]}") from None


def _duckdb() -> Any:
    try:
        import duckdb
    except ImportError:
        raise UsageError("reference tables are read with DuckDB: pip install duckdb") from None
    return duckdb


@cache
def _database() -> Any:
    """One in memory for all reads (opening one takes 20 ms); each read has a cursor of its own."""
    return _duckdb().connect()
