"""The documented way from the store to pandas."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from klab.harness.store.paths import folder_to_read
from klab.harness.store.read import ReadReport, iter_results
from klab.harness.store.result import Result
from klab.harness.store.schema import COLUMNS, JSON_COLUMNS
from klab.kernels.contract import Json
from klab.kernels.errors import UsageError

if TYPE_CHECKING:
    import pandas as pd

_PANDAS_TYPES = {"VARCHAR": "object", "BOOLEAN": "bool", "BIGINT": "int64", "DOUBLE": "float64"}


def tflops(result: Result) -> float | None:
    """The problem's floating-point operations (least possible) per median time, in TFLOP/s; None where no time was measured."""
    return result.flops / result.median_us / 1e6 if result.median_us and result.flops else None


def gb_per_s(result: Result) -> float | None:
    """The problem's bytes (least possible) per median time, in GB/s (1e9); None where no time was measured."""
    return result.bytes_moved / result.median_us / 1e3 if result.median_us and result.bytes_moved else None


def config_label(result: Result) -> str:
    """`block_m=128 block_n=64`, in the order of the stored configuration, or "-"."""
    return " ".join(f"{name}={value}" for name, value in result.config.items()) or "-"


def load(paths: Path | str | Iterable[Path | str] | None = None, report: ReadReport | None = None) -> pd.DataFrame:
    """All results as a pandas DataFrame, one row each; the newest rows do not replace older ones (see `latest`).

    paths: files and folders; default: KLAB_RESULTS, or results/ of the checkout, or ./klab-results.
    Columns: the fields of `Result` (units in their names), where problem, config, policy, build and environment are JSON text and the
    samples are lists; plus dtype, config_label, tflops and gb_per_s. A number that was not measured is NaN.
    Reads JSON lines and compacted Parquet alike. Lines that are no results are noted in `report` (a `ReadReport`).
    UsageError where pandas is not installed or a named folder does not exist.
    """
    results = iter_results(folder_to_read() if paths is None else _existing(paths), report)
    return frame(results)


def frame(results: Iterable[Result]) -> pd.DataFrame:
    """The DataFrame of `load` for Results that are at hand already."""
    try:
        import pandas as pd
    except ModuleNotFoundError:
        raise UsageError("a DataFrame needs pandas: pip install 'kernel-lab[analysis]'") from None

    columns: dict[str, list[Json]] = {name: [] for name in (*COLUMNS, "dtype", "config_label", "tflops", "gb_per_s")}
    for result in results:
        for name in COLUMNS:
            value = getattr(result, name)
            columns[name].append(json.dumps(value, sort_keys=name != "config") if name in JSON_COLUMNS else value)
        columns["status"][-1] = result.status.value
        columns["dtype"].append(result.problem.get("dtype", "bfloat16"))
        columns["config_label"].append(config_label(result))
        columns["tflops"].append(tflops(result))
        columns["gb_per_s"].append(gb_per_s(result))
    types = COLUMNS | {"dtype": "VARCHAR", "config_label": "VARCHAR", "tflops": "DOUBLE", "gb_per_s": "DOUBLE"}
    return pd.DataFrame({name: pd.Series(values, dtype=_PANDAS_TYPES.get(types[name], "object")) for name, values in columns.items()})


def _existing(paths: Path | str | Iterable[Path | str]) -> Iterator[Path]:
    for path in [paths] if isinstance(paths, str | Path) else paths:
        yield folder_to_read(path)
