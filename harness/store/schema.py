"""The form of a stored row: its columns, the upgrade from older schemas, and the check that a line of a file is a Result."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections.abc import Callable, Mapping

from klab.harness.store.result import SCHEMA, Result
from klab.kernels.contract import Json

Row = dict[str, Json]
Step = Callable[[Row], Row]

# Schema n -> n + 1. Files are never rewritten, so a step stays here for ever.
STEPS: dict[int, Step] = {}

SQL_TYPES = {
    "str": "VARCHAR",
    "Status": "VARCHAR",
    "bool": "BOOLEAN",
    "int": "BIGINT",
    "float": "DOUBLE",
    "float | None": "DOUBLE",
    "Mapping[str, Json]": "VARCHAR",  # as JSON text: operators and kernels come and go, the columns stay
    "tuple[int, ...]": "BIGINT[]",
    "tuple[int | None, ...]": "BIGINT[]",
    "tuple[float, ...]": "DOUBLE[]",
    "tuple[float | None, ...]": "DOUBLE[]",
    "tuple[tuple[float, float], ...]": "DOUBLE[][]",
}
"""How DuckDB holds each type of field that a Result has."""

FIELD_TYPES: dict[str, str] = {f.name: str(f.type) for f in dataclasses.fields(Result)}
COLUMNS: dict[str, str] = {name: SQL_TYPES[kind] for name, kind in FIELD_TYPES.items()}
JSON_COLUMNS = tuple(name for name, kind in FIELD_TYPES.items() if kind.startswith("Mapping"))

REQUIRED = tuple(
    f.name for f in dataclasses.fields(Result) if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
)


# A whole number of fewer digits fits a float.
DIGITS_OF_FLOATS = 308


def upgrade(row: Row, steps: Mapping[int, Step] = STEPS, current: int = SCHEMA) -> Row:
    """The row in the current schema, step by step. ValueError for a row without a schema number, or from a newer klab."""
    schema = row.get("schema")
    if not isinstance(schema, int) or isinstance(schema, bool):
        raise ValueError("no schema number: not a row that klab wrote")
    if schema > current:
        raise ValueError(f"written by a newer klab (schema {schema}, this one reads up to {current}): update klab to read it")
    while schema < current:
        if schema not in steps:
            raise ValueError(f"schema {schema} is unknown")
        row = steps[schema](dict(row))
        schema += 1
        row["schema"] = schema
    return row


def parse(row: Json, steps: Mapping[int, Step] = STEPS, current: int = SCHEMA) -> Result:
    """A Result of a decoded line, upgraded and with every field of its declared type; ValueError says in a few words why not."""
    if not isinstance(row, dict):
        raise ValueError("not a JSON object")
    row = upgrade(row, steps, current)
    missing = [name for name in REQUIRED if name not in row]
    if missing:
        raise ValueError(f"lacks {', '.join(missing)}: not a row that klab wrote")
    values = {name: _typed(name, FIELD_TYPES[name], value) for name, value in row.items() if name in FIELD_TYPES}
    result = Result.from_json(values)
    _check_sense(result)
    return result


def identity(result: Result) -> int:
    """A hash of what makes a row this row and no other, so that a copy of it (compacted, or in a copied file) counts once.

    It holds only within this process.
    """
    r = result
    return hash((r.key, r.kind, r.status, r.run_id, r.recorded_at, r.device_uuid, r.reason, r.samples_us, r.median_us, r.energy_j))


def _check_sense(r: Result) -> None:
    """ValueError where the values are of the right type and cannot be: what reads the store divides by times and splits kernels' names."""
    if r.kernel.count("/") != 1:
        raise ValueError("kernel is not operator/name")
    times = {
        "samples_us": r.samples_us,
        **{name: (getattr(r, name),) for name in ("median_us", "q1_us", "q3_us", "ci_low_us", "ci_high_us")},
    }
    for name, values in times.items():
        if any(us is not None and us <= 0 for us in values):
            raise ValueError(f"{name} is not above 0")
    for name in ("flops", "bytes_moved", "energy_j", "energy_ci_low_j", "energy_ci_high_j"):
        if (getattr(r, name) or 0.0) < 0:
            raise ValueError(f"{name} is below 0")
    if r.energy_ci_low_j is not None and r.energy_ci_high_j is not None and r.energy_ci_low_j > r.energy_ci_high_j:
        raise ValueError("energy_ci_low_j and energy_ci_high_j are out of order")
    for low, middle, high in (("q1_us", "median_us", "q3_us"), ("ci_low_us", "median_us", "ci_high_us")):
        found = [value for value in (getattr(r, low), getattr(r, middle), getattr(r, high)) if value is not None]
        # A median by interpolation and one by averaging the middle two differ in the last bit.
        if any(a > b * (1 + 1e-9) for a, b in itertools.pairwise(found)):
            raise ValueError(f"{low}, {middle} and {high} are out of order")


def _typed(name: str, kind: str, value: Json) -> Json:
    """The value as the field's type has it (whole numbers become floats where a float is due)."""
    if kind.startswith("tuple["):
        return _list(name, kind, value)
    if kind.endswith(" | None"):
        if value is None:
            return None
        kind = kind.removesuffix(" | None")
    if kind == "float":
        return _number(name, value)
    if kind == "int":
        if isinstance(value, bool) or not isinstance(value, int) or not -(2**63) <= value < 2**63:
            raise ValueError(f"{name} is not a whole number")
        return value
    expected: type = {"str": str, "Status": str, "bool": bool, "Mapping[str, Json]": dict}[kind]
    if not isinstance(value, expected):
        raise ValueError(f"{name} is not {'a JSON object' if expected is dict else 'text' if expected is str else 'true or false'}")
    # Half of a surrogate pair: JSON can spell it, and no terminal, page or database takes it.
    text = value if isinstance(value, str) else _text(name, value)
    if not text.isascii() and any("\ud800" <= letter <= "\udfff" for letter in text):
        raise ValueError(f"{name} is not text")
    return value


def _text(name: str, value: Json) -> str:
    """A mapping as JSON, of numbers that a float holds: JSON can spell 1e400, which Python takes for infinity, and 10**400."""
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    except ValueError:
        raise ValueError(f"{name} holds a number that is not finite") from None
    if len(text) > DIGITS_OF_FLOATS and _too_large(value):
        raise ValueError(f"{name} holds a number that is too large")
    return text


def _too_large(value: Json) -> bool:
    if isinstance(value, dict | list):
        return any(map(_too_large, value.values() if isinstance(value, dict) else value))
    return isinstance(value, int) and abs(value) >= 2**1023


def _list(name: str, kind: str, value: Json) -> list[Json]:
    if not isinstance(value, list):
        raise ValueError(f"{name} is not a list")
    item = kind.removeprefix("tuple[").removesuffix(", ...]")
    # Samples and traces are nine tenths of all values that are read: of one type and finite, they are seen to be so at once.
    if item.startswith("float") and {*map(type, value)} == {float} and math.isfinite(sum(value)):
        return value
    if item == "tuple[float, float]":
        if any(not isinstance(pair, list) or len(pair) != 2 for pair in value):
            raise ValueError(f"{name} is not a list of pairs")
        return [[_number(name, number) for number in pair] for pair in value]
    return [_typed(name, item, number) for number in value]


def _number(name: str, value: Json) -> float:
    if type(value) is float and math.isfinite(value):
        return value
    if isinstance(value, bool) or not isinstance(value, int) or abs(value) >= 2**1023:
        raise ValueError(f"{name} is not a finite number")
    return float(value)
