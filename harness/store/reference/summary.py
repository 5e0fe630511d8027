"""What the published tables of one chip hold, operator by operator."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import quantiles

from klab.harness.plan.communication import KINDS
from klab.harness.store.reference.collectives import Link, links
from klab.harness.store.reference.compare import LARGE_US, LEAST_FOR_RANGE, form_of
from klab.harness.store.reference.points import Point, Reading, points
from klab.kernels.contract import Chip


@dataclass(frozen=True)
class Summary:
    """Rows of one operator, format, engine and version: those used, those left out as traps.

    `low`, `middle`, `high`: the share of the roofline that a quarter, half and three quarters of the used rows reach whose bound is at
    least LARGE_US; None where those are too few, and for collectives.
    """

    operator: str
    form: str
    engine: str
    version: str
    used: int
    left_out: int
    low: float | None = None
    middle: float | None = None
    high: float | None = None


def summary(
    chip: Chip,
    operators: Iterable[str] | None = None,
    *,
    backend: str | Sequence[str] | None = None,
    root: Path | None = None,
    reading: Reading | None = None,
) -> list[Summary]:
    """Everything that `points` and `links` give, counted. Arguments as there."""
    wanted = None if operators is None else set(operators)
    kinds: dict[tuple[str, str, str, str], list[Point]] = {}
    for point in points(chip, wanted, backend=backend, root=root, flagged=True, reading=reading):
        kinds.setdefault((point.one.operator, form_of(point), point.table.backend, point.table.version), []).append(point)
    found = [_summed(key, rows) for key, rows in sorted(kinds.items())]
    groups: dict[tuple[str, str, str, str], list[Link]] = {}
    if wanted is None or wanted & set(KINDS):
        for link in links(chip, backend=backend, root=root, flagged=True):
            if reading:
                reading.flag(link.table.label, link.flag)
            if wanted is None or link.one.kind in wanted:
                key = (link.one.kind, f"{link.one.gpus} GPUs", link.table.backend, link.table.version)
                groups.setdefault(key, []).append(link)
    for key, rows in sorted(groups.items()):
        good = sum(1 for link in rows if not link.flag)
        found.append(Summary(*key, good, len(rows) - good))
    return found


def _summed(key: tuple[str, str, str, str], rows: Sequence[Point]) -> Summary:
    good = [point for point in rows if not point.flag]
    shares = [point.bound_us / point.us for point in good if point.bound_us >= LARGE_US]
    if len(shares) < LEAST_FOR_RANGE:
        return Summary(*key, len(good), len(rows) - len(good))
    low, middle, high = quantiles(shares, n=4)
    return Summary(*key, len(good), len(rows) - len(good), low, middle, high)
