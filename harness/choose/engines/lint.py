"""Finding tables that an engine would never load, that stop it, or that make it slower than no table."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from klab.harness.choose.engines.entries import entry_troubles
from klab.harness.choose.engines.names import (
    DENSE,
    MOE,
    Dialect,
    TableName,
    chip_named,
    far_off,
    known_devices,
    nearest,
    other_table,
    plain,
)
from klab.harness.choose.engines.reading import EVIDENCE, Table, dangling, files_of, printable, read_table, sidecar_of
from klab.harness.choose.engines.sglang import SGLANG, VERSION_FOLDER
from klab.harness.choose.engines.sidecar import checked, read_sidecar
from klab.harness.choose.engines.vllm import VLLM
from klab.kernels.contract import Chip

NEVER, BREAKS, SLOW, NOTE = "never", "breaks", "slow", "note"
LEVELS = {
    NEVER: "the engine never loads it",
    BREAKS: "the engine raises, or runs into an error at some batch size",
    SLOW: "it is loaded, and some batch sizes may run slower than without it",
    NOTE: "good to know",
}


@dataclass(frozen=True)
class Finding:
    """One thing about one file (relative to the root). `rule` names it for machines."""

    file: str
    level: str
    rule: str
    text: str


@dataclass(frozen=True)
class Expected:
    """What the reader will run: each None where nobody said. `names`: the tables that a model asks for."""

    device: str | None = None
    chip: Chip | None = None
    triton: str | None = None
    names: tuple[TableName, ...] = ()


def root_of(folder: Path, dialect: Dialect) -> Path:
    """The folder that the engine's variable must name for these tables, when one of its subfolders was given instead."""
    folder = _whole(folder)
    if dialect.engine != "sglang":
        return folder
    if VERSION_FOLDER.fullmatch(folder.name) and folder.parent.name == "configs":
        return folder.parent.parent
    return folder.parent if folder.name == "configs" else folder


def _whole(folder: Path) -> Path:
    """With the names of the folders above it, links as they are: "." says nothing of where it is."""
    return Path(os.path.abspath(folder))


def guess(folder: Path) -> str:
    """The engine whose tables a folder seems to hold: one inside an engine is its; SGLang's others are in folders by version of Triton, or
    have spaces in their names.
    """
    files = files_of(_whole(folder))
    for dialect in (SGLANG, VLLM):
        if any(f"/{home}/" in f"{path.parent.as_posix()}/" for path in files for home in dialect.package.values()):
            return dialect.engine
    return "sglang" if any(", " in path.name or re.match(r"triton_\d", path.parent.name) for path in files) else "vllm"


def lint(folder: Path, dialect: Dialect, expected: Expected | None = None) -> list[Finding]:
    """Everything wrong with the tables under a folder (or with one file), file by file, the worst first."""
    expected, folder = expected or Expected(), _whole(folder)
    root = root_of(folder.parent if folder.is_file() else folder, dialect)
    tables = [read_table(path, path.parent.relative_to(root).parts) for path in files_of(folder)]
    found = [finding for table in tables for finding in _file(table, root, dialect, expected)]
    found += _together(tables, root, dialect, expected)
    found += _orphans(folder, root)
    order = list(LEVELS)
    found = [dataclasses.replace(one, file=printable(one.file), text=printable(one.text)) for one in found]
    return sorted(found, key=lambda f: (f.file, order.index(f.level), f.rule, f.text))


def _file(table: Table, root: Path, dialect: Dialect, expected: Expected) -> Iterator[Finding]:
    name, parts = table.name, table.path.parent.relative_to(root).parts
    shown = str(table.path.relative_to(root))

    def told(level: str, rule: str, text: str) -> Finding:
        return Finding(shown, level, rule, text)

    if dangling(table.path):
        yield told(NEVER, "link", "a link to a file that is not there")
        return
    if name is None:
        if other_table(table.path.name):
            yield told(NOTE, "other", "another kind of table (Mamba, LoRA, sums), which is not checked")
        else:
            yield told(NEVER, "name", f"no name of a table: {dialect.title}'s are like {_example(dialect)}")
        return
    never = dialect.never(name)
    if never:
        yield told(NEVER, "name", never)
    elif dialect.file_name(name) != table.path.name:
        yield told(NEVER, "name", f"the name does not match: {dialect.title} looks for {dialect.file_name(name)}")
    where = dialect.where(name.kind, parts)
    if where and not _at_home(dialect, name, root, parts):
        yield told(NEVER, "folder", where)
    yield from (told(level, rule, text) for level, rule, text in _device(table, name, dialect, expected))
    yield from (told(BREAKS, "content", text) for text in table.breaks)
    yield from (told(SLOW, "content", text) for text in table.odd)
    if table.has_version_key and name.kind not in dialect.version_key:
        yield told(BREAKS, "version_key", f"the key triton_version stops {dialect.title}: its loader makes a number of every key")
    yield from (told(level, "version", text) for level, text in _version(table, name, dialect, expected))
    chip = expected.chip or chip_named(name, dialect)
    for tokens, entry in table.entries.items():
        for severe, text in entry_troubles(tokens, entry, name, dialect, chip):
            yield told(BREAKS if severe else SLOW, "entry", f"{tokens} tokens: {text}")
    if name.block and name.n % name.block[name.kind == MOE]:
        yield told(
            SLOW, "shape", f"N={name.n} is no multiple of the block of {name.block[name.kind == MOE]}: most loaders refuse such weights"
        )
    if min(name.n, name.experts or 1, name.k or 1) < 1:
        yield told(NEVER, "shape", "no weights have a size of 0")
    keys = tuple(key for key in table.tokens if key > 0)
    if far := far_off(keys) if keys else {}:
        wide = ", ".join(f"{tokens} (takes {key})" for tokens, key in far.items())
        yield told(SLOW, "batch_sizes", f"no entry near these numbers of tokens, so that a far one is taken: {wide}")
    edited = checked(table)
    if edited:
        yield told(SLOW if "differs" in edited else NOTE, "evidence", edited)


def _at_home(dialect: Dialect, name: TableName, root: Path, parts: tuple[str, ...]) -> bool:
    """Whether a file lies in the engine's own folder of this kind: somebody looks through a checkout or an installed package."""
    here = (*root.resolve().parts, *parts)
    if name.kind == MOE and dialect.engine == "sglang":
        here = here[:-1] if VERSION_FOLDER.fullmatch(here[-1]) else ()
    home = tuple(dialect.package[name.kind].split("/"))
    return here[-len(home) :] == home


def _example(dialect: Dialect) -> str:
    return dialect.file_name(TableName(MOE, "NVIDIA H200", 768, 128, dtype="fp8_w8a8", block=(128, 128)))


def _device(table: Table, name: TableName, dialect: Dialect, expected: Expected) -> Iterator[tuple[str, str, str]]:
    here = dialect.device(name.device, name.kind)
    if expected.device is not None:
        wanted = dialect.device(expected.device, name.kind)
        if wanted != here:
            yield NEVER, "device", f"is for {here}; on {expected.device} {dialect.title} looks for device_name={wanted}"
        return
    known = {dialect.device(device, name.kind) for device in known_devices()}
    near = sorted(device for device in known if device != here and (device.startswith(f"{here}_") or here.startswith(f"{device}_")))
    if here not in known and near and not _measured_on(table, name, dialect):
        yield (
            SLOW,
            "device",
            f"{here} is not what CUDA calls a device that klab knows; such are {', '.join(near)}. --device NAME settles it",
        )


def _measured_on(table: Table, name: TableName, dialect: Dialect) -> bool:
    """Whether klab itself wrote the table from results of a device of this name."""
    facts = read_sidecar(table.path) or {}
    return not checked(table) and dialect.device(str(facts.get("device")), name.kind) == dialect.device(name.device, name.kind)


def _version(table: Table, name: TableName, dialect: Dialect, expected: Expected) -> Iterator[tuple[str, str]]:
    if name.kind == DENSE:
        return
    if not table.triton:
        yield NOTE, "does not say for which version of Triton it was tuned"
    elif expected.triton and table.triton != expected.triton:
        how = "is loaded with a warning, if at all" if dialect.engine == "sglang" else "is loaded without a word"
        yield SLOW, f"was tuned for Triton {table.triton}; under {expected.triton} it {how}, and what was fastest may not be"


def _together(tables: Sequence[Table], root: Path, dialect: Dialect, expected: Expected) -> Iterator[Finding]:
    """What only several files, or none, can be wrong about."""
    named = {(table.path.parent, table.name): table for table in tables if table.name is not None}
    for (folder, name), table in named.items():
        if name is not None and name.down:
            up = table.path.with_name(dialect.file_name(plain(name)))  # of one file alone, the other is not among the tables
            yield from _down(table, named.get((folder, plain(name))) or (read_table(up) if up.is_file() else None), root)
    if dialect.engine == "sglang":
        configs = root / "configs"
        inside = sorted(configs.iterdir()) if configs.is_dir() else []
        for path in inside:
            if path.name.startswith("triton_") and path.is_dir() and not VERSION_FOLDER.fullmatch(path.name):
                text = f"stops {dialect.title} whenever a table is missing: it makes numbers of the version in every triton_* folder's name"
                yield Finding(str(path.relative_to(root)), BREAKS, "folder", text)
        if expected.triton:
            yield from _shadowed(tables, root, expected.triton)
    have = {dialect.file_name(table.name) for table in tables if table.name is not None}
    for wanted in expected.names:
        if dialect.file_name(wanted) not in have:
            yield Finding(dialect.file_name(wanted), NEVER, "missing", f"there is no such file, and {dialect.title} will look for it")
    if expected.names:
        yield from _other_models(tables, root, dialect, expected.names)


def _other_models(tables: Iterable[Table], root: Path, dialect: Dialect, names: Sequence[TableName]) -> Iterator[Finding]:
    """Tables of experts that the model does not have, or not in this format."""
    sizes = {(name.experts, name.n) for name in names}
    asked = ", ".join(sorted(dialect.file_name(name) for name in names))
    for table in tables:
        name, shown = table.name, str(table.path.relative_to(root))
        if name is None or name.kind != MOE:
            continue
        if (name.experts, name.n) not in sizes:
            yield Finding(shown, NEVER, "shape", f"is not for this model, which asks for {asked}")
        elif not any((name.dtype, name.block) == (one.dtype, one.block) for one in names):
            yield Finding(shown, NOTE, "shape", f"is for this model in another format; as asked, it looks for {asked}")


def _down(table: Table, up: Table | None, root: Path) -> Iterator[Finding]:
    shown = str(table.path.relative_to(root))
    if up is None:
        yield Finding(shown, NEVER, "down", "a table of the second product alone is used beside one of both, and there is none")
        return
    keys, ups = (tuple(key for key in t.tokens if key > 0) for t in (table, up))
    if not keys or not ups:
        return
    for tokens in sorted({*keys, *ups}):
        ours, theirs = (t.entries[nearest(tokens, own)].get("BLOCK_SIZE_M") for t, own in ((table, keys), (up, ups)))
        if ours != theirs:
            text = f"at {tokens} tokens BLOCK_SIZE_M is {ours} here and {theirs} in the other table; both products share one order of rows"
            yield Finding(shown, BREAKS, "down", text)


def _shadowed(tables: Iterable[Table], root: Path, triton: str) -> Iterator[Finding]:
    """Under SGLang the newest folder that has the file wins, after that of the version itself."""
    by_name: dict[TableName, list[Table]] = {}
    for table in tables:
        if table.name is not None and table.triton:
            by_name.setdefault(table.name, []).append(table)
    for group in by_name.values():
        first = max(group, key=lambda t: (t.triton == triton, _numbers(t.triton)))
        for table in group:
            if table is not first:
                text = f"under Triton {triton}, {first.path.relative_to(root)} is taken instead"
                yield Finding(str(table.path.relative_to(root)), NEVER, "version", text)


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".") if part.isdigit())


def _orphans(folder: Path, root: Path) -> Iterator[Finding]:
    if not folder.is_dir():
        return
    for path in sorted(folder.rglob(f"*{EVIDENCE}")):
        if not path.with_name(path.name.removesuffix(EVIDENCE) + ".json").exists():
            yield Finding(str(path.relative_to(root)), NOTE, "evidence", "evidence of a table that is not here")


def worst(findings: Iterable[Finding]) -> Mapping[str, str]:
    """File -> its worst level."""
    order = list(LEVELS)
    found: dict[str, str] = {}
    for finding in findings:
        found[finding.file] = min(found.get(finding.file, NOTE), finding.level, key=order.index)
    return found


def as_json(finding: Finding) -> dict[str, str]:
    """One line of `klab lint-tuned --json`."""
    return dataclasses.asdict(finding)


__all__ = ["BREAKS", "LEVELS", "NEVER", "NOTE", "SLOW", "Expected", "Finding", "as_json", "guess", "lint", "root_of", "sidecar_of", "worst"]
