"""Tables to a folder: each with its evidence beside it, and nothing that somebody else wrote replaced unasked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from klab.harness.choose.engines.lint import BREAKS, NEVER, lint
from klab.harness.choose.engines.names import Dialect, read_name
from klab.harness.choose.engines.reading import read_table, sidecar_of
from klab.harness.choose.engines.sidecar import checked, read_sidecar, sidecar_text
from klab.harness.choose.engines.tables import EngineTable
from klab.harness.choose.profile import write_text
from klab.kernels.contract import Json
from klab.kernels.errors import UsageError


@dataclass(frozen=True)
class Written:
    """A file that was written, and its table."""

    path: Path
    table: EngineTable


def targets(tables: Sequence[EngineTable], dialect: Dialect, out: Path) -> list[Written]:
    """Where each table goes."""
    found = []
    for table in tables:
        folder, name = dialect.folder(table.name.kind, table.triton), dialect.file_name(table.name)
        if not table.triton and "triton" in dialect.folder(table.name.kind, "0"):
            raise UsageError(f"{dialect.title} keeps tables by version of Triton, and these results do not say theirs: measure again")
        if why := dialect.where(table.name.kind, PurePosixPath(folder).parts):
            raise UsageError(f"no folder can be for results of Triton {table.triton!r}: {why}; --triton V takes those of another")
        if "/" in name or read_name(name) is None:
            raise UsageError(f"{name} is no name of a file: the device {table.name.device!r} can have no table of {dialect.title}'s")
        found.append(Written(out / folder / name, table))
    return found


def write(planned: Sequence[Written], dialect: Dialect, facts: Mapping[str, Json], *, force: bool = False) -> None:
    """Write tables and evidence; UsageError, with nothing written, where a file would be lost that is not klab's or has more entries."""
    for one in planned if not force else ():
        lost = _lost(one)
        if lost:
            raise UsageError(f"{one.path} is there and {lost}: --force replaces it, another --out leaves it")
    for one in planned:
        text = one.table.text(dialect)
        # Evidence first: a table is never there without it, and a kill in between leaves a sidecar that fits no table, which lint tells.
        write_text(sidecar_of(one.path), sidecar_text(text, evidence(one.table, dialect) | dict(facts)))
        write_text(one.path, text)
        bad = [f for f in lint(one.path, dialect) if f.level in (NEVER, BREAKS) and f.rule not in ("folder", "down")]
        if bad:
            raise AssertionError(f"klab wrote a table that {dialect.title} does not load: {bad[0].text}")


def evidence(table: EngineTable, dialect: Dialect) -> dict[str, Json]:
    """What the sidecar says of a table."""
    return {
        "table": dialect.file_name(table.name),
        "engine": dialect.engine,
        "triton": table.triton,
        "problem": dict(table.problem),
        "entries": {
            str(entry.tokens): {
                "kernel": entry.choice.kernel,
                "source_digest": entry.choice.source_digest,
                "stale": entry.choice.stale,
                "problem_key": entry.choice.wanted.problem_key,
                "config": dict(entry.choice.config),
                "without_table": entry.untuned,
                "evidence": entry.choice.evidence,
            }
            for entry in table.entries
        },
        "not_measured": {str(tokens): why for tokens, why in table.skipped.items()},
        "far": {str(tokens): key for tokens, key in table.far.items()},
        "engine_default": {str(tokens): dict(config) for tokens, config in table.filled.items()},
        "notes": list(table.notes),
    }


def foreign(path: Path) -> str:
    """Why a file is not klab's to replace; empty where there is none, or it is as klab wrote it."""
    return "klab did not write it, or it was edited since" if path.exists() and checked(read_table(path)) else ""


def _lost(one: Written) -> str:
    """What writing this file would lose."""
    if (why := foreign(one.path)) or not one.path.exists():
        return why
    filled = set((read_sidecar(one.path) or {}).get("engine_default") or {})
    measured = {tokens for tokens in read_table(one.path).tokens if str(tokens) not in filled}
    gone = sorted(measured - {entry.tokens for entry in one.table.entries})
    return f"has entries that the new one lacks ({', '.join(map(str, gone))} tokens)" if gone else ""
