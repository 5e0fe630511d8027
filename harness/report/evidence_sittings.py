"""When, where and under what a chip's evidence was recorded: one line per run, from its rows and the note of its sitting."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from klab.harness.store.query import age
from klab.harness.store.result import Result

# What of an environment a reader wants to know, in this order.
VERSIONS = ("driver", "cuda", "torch", "triton", "cupy", "python")


@dataclass(frozen=True)
class Seat:
    """A run. clocks_mhz: the lowest and highest SM clock of its rounds, None where none was read. budget_s: None where none was set.
    parts: (name, seconds) in order.
    """

    run_id: str
    at: str
    device: str
    uuids: tuple[str, ...]
    versions: Mapping[str, str]
    commit: str
    clocks_mhz: tuple[float, float] | None
    budget_s: float | None
    parts: tuple[tuple[str, float], ...]
    rows: int

    @property
    def seconds(self) -> float:
        """Of its parts."""
        return sum(seconds for _, seconds in self.parts)


def sound(sittings: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The sittings with those of their parts that can be read: the file is text, which somebody may have edited."""
    return [
        {**one, "budget_s": _number(one.get("budget_s")), "parts": [part for part in _list(one.get("parts")) if _is_part(part)]}
        for one in sittings
    ]


def _is_part(part: Any) -> bool:
    if not isinstance(part, Mapping) or not isinstance(part.get("statuses", {}), Mapping) or not isinstance(part.get("notes", []), list):
        return False
    numbers = (*(part.get(name) or 0 for name in ("seconds", "left", "known")), *part.get("statuses", {}).values())
    return all(_number(number) is not None for number in numbers)


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def seats(sittings: Iterable[Mapping[str, Any]], rows: Iterable[Result]) -> list[Seat]:
    """The sittings that were noted, and the runs whose note is lost, oldest first."""
    by_run: dict[str, list[Result]] = defaultdict(list)
    for row in rows:
        by_run[row.run_id].append(row)
    notes = {str(one.get("run_id")): one for one in sittings}
    found = [_seat(run, notes.get(run, {}), by_run.get(run, [])) for run in {**notes, **by_run}]
    return sorted(found, key=lambda one: (one.at, one.run_id))


def _seat(run: str, note: Mapping[str, Any], rows: Sequence[Result]) -> Seat:
    measured = sorted((row for row in rows if row.kind == "measured" and row.environment), key=age)
    here: Mapping[str, Any] = (measured[-1].environment if measured else None) or note.get("environment") or {}
    clocks = [mhz for row in rows for mhz in row.clocks_mhz if mhz is not None]
    commit = str(here.get("commit") or "")[:12]
    parts = tuple((str(one.get("part")), float(one.get("seconds") or 0.0)) for one in note.get("parts") or ())
    return Seat(
        run,
        str(note.get("at") or (min(rows, key=age).recorded_at if rows else "")),
        str(here.get("device") or next((row.device for row in rows if row.device), "")),
        tuple(sorted({row.device_uuid for row in rows if row.device_uuid})),
        {name: str(here[name]) for name in VERSIONS if here.get(name)},
        commit + (" and uncommitted changes" if commit and here.get("dirty") else ""),
        (min(clocks), max(clocks)) if clocks else None,
        float(note["budget_s"]) if note.get("budget_s") else None,
        parts,
        len(rows),
    )
