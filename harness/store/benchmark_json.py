"""What `pytest ci/benchmarks --benchmark-json` wrote, read back as rows. A file of somebody else's benchmarks is refused."""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from klab.harness.store.result import Result, Status
from klab.harness.store.schema import identity, parse
from klab.kernels.contract import Json, digest
from klab.kernels.errors import UsageError

ROWS = "klab"
LABEL = "imported"

# A row with its samples is about 20 KB, a suite some hundred rows: a file beyond this is no benchmark's.
LARGEST_BYTES = 512 << 20

_TRIAL = ("kernel", "source_digest", "operator", "problem", "config", "chip", "policy")


@dataclass(frozen=True)
class Benchmarks:
    """Of one file: the rows it stands for, labelled, and why others were left out (by the benchmark's name)."""

    rows: tuple[Result, ...]
    left_out: dict[str, str]


def is_benchmark_json(path: Path) -> bool:
    """Does this file look like pytest-benchmark's? Reads it."""
    if not path.is_file() or path.stat().st_size > LARGEST_BYTES:
        return False
    with path.open("rb") as file:
        # Its first key, as it is written or sorted by name; a table of tuned configurations has neither.
        start = file.read(4096)
        if b'"machine_info"' not in start and b'"benchmarks"' not in start:
            return False
    data = _read(path)
    return isinstance(data, dict) and isinstance(data.get("benchmarks"), list)


def read_benchmarks(path: Path) -> Benchmarks:
    """The rows of a file, each with `build["imported"]` saying where it comes from. UsageError for one that klab's suite did not write.

    A benchmark whose statistics are not those of its row (a file that was edited, or merged) is left out, with the reason.
    """
    data = _read(path)
    if not isinstance(data, dict) or not isinstance(data.get("benchmarks"), list):
        raise UsageError(f"{path} is no pytest-benchmark file: it has no list of benchmarks")
    machine = data.get("machine_info")
    label = {
        "by": f"pytest-benchmark {data.get('version', '')}".strip(),
        "at": str(data.get("datetime", "")),
        "node": str(machine.get("node", "")) if isinstance(machine, dict) else "",
    }
    found: list[Result] = []
    left_out: dict[str, str] = {}
    foreign = 0
    for number, bench in enumerate(data["benchmarks"]):
        name = str(bench.get("fullname") or number)[:200] if isinstance(bench, dict) else str(number)
        own = _own(bench)
        if own is None:
            foreign += 1
            continue
        try:
            rows = [_parsed(row) for row in own]
            _check(bench, rows)
        except (ValueError, TypeError, KeyError, OverflowError, RecursionError) as error:
            left_out[name] = f"its form is another ({type(error).__name__})" if type(error) is not ValueError else str(error)[:200]
            continue
        found += [_labelled(row, label | {"test": name}) for row in rows]
    failed, why = _failed(data)
    found += [_labelled(row, label) for row in failed]
    left_out |= why
    if foreign and not found and not left_out:
        raise UsageError(
            f"{path} holds {foreign} benchmarks that are not klab's: wall times of unknown code are no results. "
            "`pytest ci/benchmarks --benchmark-json` writes what can be imported"
        )
    if foreign:
        left_out[f"{foreign} benchmarks"] = "not klab's"
    return Benchmarks(tuple(found), left_out)


def new_rows(rows: Iterable[Result], known: Iterable[Result]) -> list[Result]:
    """Those rows that the store does not have yet, labelled or not; each once."""
    seen = {identity(row) for row in known}
    return list({identity(row): row for row in rows if identity(row) not in seen}.values())


def _read(path: Path) -> Json:
    try:
        return json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path} is not JSON: {str(error)[:100]}") from None
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from None


def _own(bench: Json) -> list[Json] | None:
    info = bench.get("extra_info") if isinstance(bench, dict) else None
    own = info.get(ROWS) if isinstance(info, dict) else None
    rows = own.get("rows") if isinstance(own, dict) else None
    return rows if isinstance(rows, list) and rows else None


def _failed(data: dict[str, Json]) -> tuple[list[Result], dict[str, str]]:
    """Rows of kernels that were wrong or crashed: they have no times, and pytest-benchmark keeps no benchmark of them."""
    own = data.get(ROWS)
    rows = own.get("failed") if isinstance(own, dict) else None
    found: list[Result] = []
    why: dict[str, str] = {}
    for number, given in enumerate(rows if isinstance(rows, list) else []):
        try:
            row = _parsed(given)
            if row.status is Status.OK and _rounds(row):
                raise ValueError("it did not fail: a row with a time belongs to a benchmark")
            found.append(row)
        except (ValueError, TypeError, RecursionError) as error:
            why[f"failed {number}"] = str(error)[:200]
    return found, why


def _parsed(given: Json) -> Result:
    """A row whose key is that of the trial it tells of: under another's it would keep that from being measured here."""
    row = parse(given)
    trial: dict[str, Json] = {name: getattr(row, name) for name in _TRIAL}
    if row.key != digest(trial):
        raise ValueError("its key is not that of its kernel, problem, configuration and policy")
    return row


def _check(bench: dict[str, Json], rows: list[Result]) -> None:
    """The benchmark's own statistics must be those of its first row, whose counting rounds it played back; the others are of its trial."""
    stats, row = bench["stats"], rows[0]
    rounds = _rounds(row)
    if not rounds or row.median_us is None:
        raise ValueError("its row has no time")
    if stats["rounds"] != len(rounds):
        raise ValueError(f"its {str(stats['rounds'])[:20]} rounds are not the {len(rounds)} of its row")
    mine = {"min": min(rounds), "max": max(rounds), "mean": math.fsum(rounds) / len(rounds), "median": statistics.median(rounds)}
    for name, us in mine.items():
        if not math.isclose(stats[name] * 1e6, us, rel_tol=1e-6):
            raise ValueError(f"its {name} of {stats[name] * 1e6:.6g} us is not that of its row, {us:.6g} us")
    if not math.isclose(row.median_us, mine["median"], rel_tol=1e-6):
        raise ValueError(f"its row's median of {row.median_us:.6g} us is not that of its rounds, {mine['median']:.6g} us")
    if any((r.kernel, r.problem_key, r.config) != (row.kernel, row.problem_key, row.config) for r in rows):
        raise ValueError("its rows are of several kernels or problems")


def _rounds(row: Result) -> list[float]:
    """The rounds that count, in microseconds."""
    marked = row.marked if len(row.marked) == len(row.samples_us) else (0,) * len(row.samples_us)
    return [us for us, mark in zip(row.samples_us, marked, strict=True) if not mark]


def _labelled(row: Result, label: dict[str, str]) -> Result:
    return dataclasses.replace(row, build={**row.build, LABEL: label})
