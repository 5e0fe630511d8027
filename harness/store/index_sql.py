"""The SQL by which `Index` is filled: which columns there are, what is made of them, and what makes a line a row."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from klab.harness.store.read import LONGEST_LINE_BYTES
from klab.harness.store.result import SCHEMA, Result, Status
from klab.harness.store.schema import COLUMNS, JSON_COLUMNS, REQUIRED
from klab.kernels.contract import Json

# What is large and tells nothing of a row that is not looked at closely.
HEAVY = ("samples_us", "clocks_mhz", "temperatures_c", "throttle_reasons", "marked", "power_trace", "build")
LIGHT = tuple(name for name in COLUMNS if name not in HEAVY and name != "schema")
READ = (*LIGHT, "samples_us", "marked", "build", "schema")

# The values of fields that are left out of a row (see `Result.to_json`).
DEFAULTS: dict[str, Json] = {name: getattr(Result, name) for name in LIGHT if isinstance(getattr(Result, name, None), str | int | float)}
# Least rounds of an interval, and the share of marked rounds from which a row is throttled: those of measure/stats.py.
FLOOR_ROUNDS, THROTTLED_SHARE = 5, 0.9

_MADE = {
    "mark": "UBIGINT",
    "file": "VARCHAR",
    "valid": "BOOLEAN",
    "at_us": "BIGINT",
    "tie": "VARCHAR",
    "config_hash": "UBIGINT",
    "rounds": "INTEGER",
    "counted_rounds": "INTEGER",
    "sum_us": "DOUBLE",
    "middle_us": "DOUBLE",
    "throttled": "BOOLEAN",
    "anchored": "BOOLEAN",
}


def create() -> str:
    """The table that rows and lines that are none are read into."""
    types = {name: COLUMNS[name] for name in LIGHT} | _MADE
    return f"CREATE TABLE raw ({', '.join(f'{name} {kind}' for name, kind in types.items())})"


def json_source(files: str) -> str:
    """JSON lines as a table of READ and `filename`, a line of nulls for each that is none. files: a list in SQL."""
    # Explicit columns: guessing them exhausts memory.
    columns = ", ".join(f"'{name}': '{'JSON' if name in JSON_COLUMNS else COLUMNS[name]}'" for name in READ)
    return (
        f"read_json({files}, format = 'newline_delimited', ignore_errors = true, maximum_object_size = {LONGEST_LINE_BYTES}, "
        f"filename = true, columns = {{{columns}}})"
    )


def parquet_source(path: Path) -> str:
    """A compacted file as a table."""
    return f"read_parquet('{literal(path)}', filename = true)"


def insert(source: str, there: Collection[str] = READ) -> str:
    """Fill `raw` from a source that has these columns; the others count as left out of every row."""
    given = {name: name if name in there else f"NULL::{COLUMNS[name]}" for name in READ}
    given |= {name: f"try_cast({given[name]} AS JSON)" for name in JSON_COLUMNS}
    inner = ", ".join(f"{text} AS {name}" for name, text in given.items())
    values = {name: f"s.{name}" if name not in DEFAULTS else f"coalesce(s.{name}, {_value(DEFAULTS[name])})" for name in LIGHT}
    values |= {name: f"s.{name}::VARCHAR" for name in JSON_COLUMNS if name in LIGHT}
    marked = "coalesce(list_sum(s.marked), 0)"
    # Rounds whose marks are not all there count, as in tune/objective.py; but a row is throttled by the marks that there are.
    rounds, marks = "coalesce(len(s.samples_us), 0)", "coalesce(len(s.marked), 0)"
    made = {
        "mark": f"hash(s.key, {values['kind']}, s.status, s.run_id, s.recorded_at, {values['device_uuid']}, {values['reason']}, "
        "s.samples_us, s.median_us, s.energy_j)",
        "file": "s.filename",
        "valid": _valid(),
        "at_us": "coalesce(epoch_us(try_cast(s.recorded_at AS TIMESTAMPTZ)), 0)",
        "tie": f"concat(s.status, ' ', coalesce(s.median_us::VARCHAR, 'None'), ' ', {values['reason']})",
        "config_hash": config_hash("s.config"),
        "rounds": rounds,
        "counted_rounds": f"CASE WHEN {marks} = {rounds} THEN {rounds} - {marked} ELSE {rounds} END",
        "sum_us": "list_sum(s.samples_us)",
        "middle_us": "coalesce(s.median_us, list_median(s.samples_us))",
        "throttled": f"{marked} > 0 AND ({marks} - {marked} < {FLOOR_ROUNDS} OR {marked} >= {THROTTLED_SHARE} * {marks})",
        "anchored": "json_exists(s.build, '$.anchors')",
    }
    chosen = ", ".join(f"{text} AS {name}" for name, text in (values | made).items())
    return f"INSERT INTO raw BY NAME SELECT {chosen} FROM (SELECT {inner}, filename FROM {source}) s"


def config_hash(config: str) -> str:
    """A number for a configuration: the same for the same fields in any order. config: an expression of type JSON."""
    return f"hash(list_sort(map_entries({config}::MAP(VARCHAR, JSON))))"


def _valid() -> str:
    """What `schema.parse` asks of a row, as far as the columns that are read tell."""
    statuses = ", ".join(f"'{status.value}'" for status in Status)
    there = [f"s.{name} IS NOT NULL" for name in REQUIRED if name in READ]
    objects = [f"json_type(s.{name}) = 'OBJECT'" for name in JSON_COLUMNS if name in REQUIRED]
    times = ["coalesce(list_min(s.samples_us), 1) > 0"]
    times += [f"coalesce(s.{name}, 1) > 0" for name in ("median_us", "q1_us", "q3_us", "ci_low_us", "ci_high_us")]
    order = [
        f"coalesce({low} <= {high} * (1 + 1e-9), true)"
        for low, middle, high in (("s.q1_us", "s.median_us", "s.q3_us"), ("s.ci_low_us", "s.median_us", "s.ci_high_us"))
        for low, high in ((low, middle), (middle, high), (low, high))
    ]
    # Parquet holds what JSON cannot spell: to DuckDB a NaN is above all numbers, and equal to itself.
    numbers = [f"s.{name}" for name in LIGHT if COLUMNS[name] == "DOUBLE"]
    finite = [f"isfinite(coalesce({number}, 0))" for number in [*numbers, "list_max(s.samples_us)"]]
    joules = ("energy_j", "energy_ci_low_j", "energy_ci_high_j")
    sense = [
        f"s.schema BETWEEN 1 AND {SCHEMA}",
        f"s.status IN ({statuses})",
        "length(s.kernel) - length(replace(s.kernel, '/', '')) = 1",
        *(f"coalesce(s.{name}, 0) >= 0" for name in ("flops", "bytes_moved", *joules)),
        "coalesce(s.energy_ci_low_j <= s.energy_ci_high_j, true)",
    ]
    return f"coalesce({' AND '.join([*there, *objects, *times, *order, *finite, *sense])}, false)"


def _value(value: Json) -> str:
    return f"'{value}'" if isinstance(value, str) else str(value)


def literal(path: Path | str) -> str:
    """Text within single quotes in SQL."""
    return str(path).replace("'", "''")
