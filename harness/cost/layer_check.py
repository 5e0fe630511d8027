"""Whole layers that `klab layer --json` measured, beside the sum of their parts: every step that klab composes is such a sum."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from klab.kernels.errors import UsageError


@dataclass(frozen=True)
class LayerCheck:
    """One layer in one graph beside its parts alone. `ratio` is sum of the parts / whole, by the medians lap by lap, `low` and `high` its
    95% interval; `bare` leaves out what joins the parts in the measurement and an engine does not have.
    """

    title: str
    chip: str
    parts: int
    sum_us: float
    whole_us: float
    ratio: float
    low: float
    high: float
    bare: float
    laps: int


def read_layers(paths: Sequence[Path]) -> list[LayerCheck]:
    """All layers in files of lines; UsageError for a file that `klab layer --json` did not write."""
    found: list[LayerCheck] = []
    for path in paths:
        try:
            lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        except OSError as error:
            raise UsageError(f"cannot read {path}: {error.strerror}") from None
        except (ValueError, RecursionError):
            raise UsageError(f"{path} is not what klab layer --json writes") from None
        found += _layers(path, lines)
    return found


def _layers(path: Path, lines: Sequence[object]) -> list[LayerCheck]:
    found: list[LayerCheck] = []
    total = 0.0
    try:
        for line in lines:
            if not isinstance(line, dict):
                raise TypeError
            if line["type"] == "part":
                total += float(line["median_us"])
            elif line["type"] == "layer":
                middle, low, high = (float(value) for value in line["ratio"])
                ends = (1 / middle, 1 / high, 1 / low)
                where = (str(line["title"]), str(line["chip"]), int(line["parts"]))
                found.append(
                    LayerCheck(*where, total, float(line["median_us"]), *ends, 1 / float(line["bare_ratio"][0]), int(line["laps"]))
                )
                total = 0.0
    except (KeyError, TypeError, ValueError, IndexError, ZeroDivisionError):
        raise UsageError(f"{path} is not what klab layer --json writes") from None
    if not found:
        raise UsageError(f"{path} holds no layer that klab layer --json measured")
    return found
