"""The journals of `klab tune` that lie beside the results: what each evaluation found, and what it took of the device."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from klab.harness.store.result import Status
from klab.harness.tune.course import SUFFIX
from klab.harness.tune.strategy import Evaluation
from klab.kernels.contract import Json


@dataclass(frozen=True)
class Recorded:
    """A search: its header (chip, problem, strategy, seed) and its evaluations in order."""

    header: Mapping[str, Json]
    evaluations: tuple[Evaluation, ...]

    @property
    def name(self) -> str:
        """What a legend calls it."""
        return f"search by {self.header.get('strategy', '?')}, seed {self.header.get('seed', '?')}"


def journals(sources: Iterable[str | Path]) -> list[Recorded]:
    """Every journal below these folders, by path. Only read: one that is still written to, torn or foreign gives what is whole in it, or
    nothing.
    """
    paths = {path.resolve(): path for source in sources if Path(source).is_dir() for path in Path(source).rglob(f"*{SUFFIX}")}
    return [found for path in sorted(paths.values()) if (found := read(path)) is not None]


def read(path: Path) -> Recorded | None:
    """One journal up to its first line that is not whole; None where it is not one, or holds no evaluation."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
        header = json.loads(lines[0])
    except (OSError, ValueError):
        return None
    if not isinstance(header, dict) or header.get("kind") != "search":
        return None
    found = tuple(_evaluations(lines[1:-1]))
    return Recorded(header, found) if found else None


def _evaluations(lines: Iterable[str]) -> Iterator[Evaluation]:
    for line in lines:
        try:
            row: dict[str, Any] = json.loads(line)
            value = math.inf if row["value"] is None else float(row["value"])
            spent_s = float(row["spent_s"])
            one = Evaluation(int(row["candidate"]), value, Status(row["status"]), int(row["rounds"]), spent_s)
        except (ValueError, KeyError, TypeError):
            return
        if not (value >= 0 and math.isfinite(spent_s) and spent_s >= 0):
            return
        yield one
