"""Accuracy: how far narrower formats were measured to be from the unquantised output."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from klab.harness.plan.quantization import format_of
from klab.harness.store.result import Result, Status
from klab.kernels.contract import Json
from klab.kernels.discover import operators
from klab.kernels.errors import UsageError


@dataclass(frozen=True)
class FormatError:
    """||out - wide|| / ||wide|| of a format's problems, on any chip: the format decides it far more than the chip or the kernel.

    `own`: of the problems that a plan has, where any of these was measured; else of others.
    """

    median: float
    worst: float
    problems: int
    chips: tuple[str, ...]
    operators: tuple[str, ...]
    own: bool

    def to_json(self) -> dict[str, Json]:
        """Every field."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in vars(self).items()}


def format_errors(rows: Iterable[Result], planned: Mapping[str, Iterable[str]] | None = None) -> dict[str, FormatError]:
    """The error of each format that some valid measurement tells. planned: format -> keys of the problems that a plan has in it."""
    found: dict[str, dict[str, Result]] = {}
    for row in rows:
        if row.status is Status.OK and row.kind == "measured" and row.wide_error is not None and (name := _format(row)):
            known = found.setdefault(name, {}).get(row.problem_key)
            if known is None or (known.wide_error or 0.0) < row.wide_error:
                found[name][row.problem_key] = row
    return {name: _of(list(by_key.values()), set((planned or {}).get(name, ()))) for name, by_key in found.items()}


def _of(rows: list[Result], planned: set[str]) -> FormatError:
    own = [row for row in rows if row.problem_key in planned]
    rows = own or rows
    errors = [row.wide_error for row in rows if row.wide_error is not None]
    chips = tuple(sorted({row.chip for row in rows}))
    return FormatError(statistics.median(errors), max(errors), len(rows), chips, tuple(sorted({row.operator for row in rows})), bool(own))


def _format(row: Result) -> str:
    """The format of a row's problem; its default is not in the row."""
    problem_type = operators().get(row.operator)
    if problem_type is None:
        return ""
    try:
        return format_of(problem_type.from_json(row.problem))
    except UsageError:
        return ""
