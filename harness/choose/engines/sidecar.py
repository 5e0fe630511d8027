"""The evidence beside a table: what was measured, how, on what, and the checksum of the table it belongs to."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from klab.harness.choose.engines.reading import LARGEST_BYTES, Table, sidecar_of
from klab.kernels.contract import Json

SCHEMA = 1
DIGITS = 6


def sidecar_text(text: str, facts: Mapping[str, Json]) -> str:
    """The sidecar of a table with this text."""
    head = {"schema": SCHEMA, "written_by": "klab export", "sha256": hashlib.sha256(text.encode()).hexdigest()}
    return json.dumps(_plain(head | dict(facts)), indent=1, allow_nan=False) + "\n"


def read_sidecar(table: Path) -> dict[str, Any] | None:
    """What the sidecar of a table says; None where there is none that klab wrote."""
    path = sidecar_of(table)
    try:
        if not path.is_file() or path.stat().st_size > LARGEST_BYTES:  # a pipe or a device would be read for ever
            return None
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return data if isinstance(data, dict) and isinstance(data.get("sha256"), str) and data.get("schema") == SCHEMA else None


def checked(table: Table) -> str:
    """What a table's evidence is worth: empty where its sidecar is whole."""
    facts = read_sidecar(table.path)
    if facts is None:
        unread = sidecar_of(table.path).exists()
        return "its evidence file cannot be read" if unread else "has no evidence beside it: who measured it, and how, is not known"
    if facts["sha256"] != table.sha256:
        return "differs from the table that its evidence belongs to: it was edited since"
    return ""


def _plain(value: Any) -> Json:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return float(f"{value:.{DIGITS}g}") if isinstance(value, float) else value
