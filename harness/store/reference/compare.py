"""Two chips by published tables: how long one takes of the other's time, operator by operator."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import quantiles

from klab.harness.store.reference.collectives import Link, links
from klab.harness.store.reference.points import Point, points
from klab.harness.store.reference.tables import BACKENDS, require
from klab.kernels.contract import Chip
from klab.kernels.errors import UsageError

# Below this bound (on the first chip) a problem is mostly launch, and tells nothing of a chip's peak or memory.
LARGE_US = 10.0
# One value in twenty lies below the range that is shown, and one above: it takes so many to say so.
LEAST_FOR_RANGE = 20


@dataclass(frozen=True)
class Compared:
    """The time of `chip` over that of `base`: geometric mean, 5% and 95% of the shapes, and both ends, over `shapes` that both measured.

    `form` is the format (or cache, or number of GPUs), `engine` whose kernels ran on both; `regime`: "small" (a bound below LARGE_US on
    `base`), or what bounds the problem there. Of several kernels of one engine the fastest counts. None where there are too few shapes.
    """

    base: str
    chip: str
    operator: str
    form: str
    engine: str
    versions: str
    regime: str
    shapes: int
    ratio: float
    low: float | None
    high: float | None
    least: float
    most: float


def compare(
    chips: Sequence[Chip], operators: Iterable[str] | None = None, *, backend: str | Sequence[str] | None = None, root: Path | None = None
) -> Iterator[Compared]:
    """Every chip against the first, engine by engine (None: all), then the collectives. UsageError without two chips that have tables."""
    if len(chips) < 2:
        raise UsageError("a comparison takes two or more chips")
    root = require(root)
    wanted = None if operators is None else set(operators)
    for engine in BACKENDS if backend is None else [backend] if isinstance(backend, str) else backend:
        base, *others = [_fastest(points(chip, wanted, backend=engine, root=root)) for chip in chips]
        for chip, other in zip(chips[1:], others, strict=True):
            yield from _by_kind(chips[0].name, chip.name, engine, base, other)
    if wanted is None or wanted & {"all_reduce", "all_gather", "reduce_scatter", "all_to_all"}:
        first, *rest = [_fastest_links(links(chip, root=root), wanted) for chip in chips]
        for chip, found in zip(chips[1:], rest, strict=True):
            yield from _collectives(chips[0].name, chip.name, first, found)


Key = tuple[object, ...]


def _fastest(found: Iterable[Point]) -> dict[Key, Point]:
    best: dict[Key, Point] = {}
    for point in found:
        key = (replace(point.table, system="", version=""), type(point.one), point.at)
        other = best.get(key)
        if other is None or point.us < other.us:
            best[key] = point
    return best


def _by_kind(base: str, chip: str, engine: str, first: dict[Key, Point], second: dict[Key, Point]) -> Iterator[Compared]:
    kinds: dict[tuple[str, str, str], list[tuple[Point, Point]]] = {}
    for key, a in first.items():
        b = second.get(key)
        if b is not None:
            regime = "small" if a.bound_us < LARGE_US else a.limit
            kinds.setdefault((a.one.operator, form_of(a), regime), []).append((a, b))
    for (operator, form, regime), pairs in sorted(kinds.items()):
        versions = " and ".join(dict.fromkeys(point.version for point in pairs[0]))
        yield _summed(base, chip, operator, form, engine, versions, regime, [b.us / a.us for a, b in pairs])


def form_of(point: Point) -> str:
    """What tells rows of one operator apart in a table for people: the format, or that of the cache."""
    one = point.one
    return str(getattr(one, "format", "") or ("kv fp8" if getattr(one, "kv_dtype", "") else "")) or one.dtype


def _fastest_links(found: Iterable[Link], wanted: set[str] | None) -> dict[Key, Link]:
    best: dict[Key, Link] = {}
    for link in found:
        key = (link.one.kind, link.one.gpus, link.one.message_bytes)
        if (wanted is None or link.one.kind in wanted) and (key not in best or link.us < best[key].us):
            best[key] = link
    return best


def _collectives(base: str, chip: str, first: dict[Key, Link], second: dict[Key, Link]) -> Iterator[Compared]:
    kinds: dict[tuple[str, int, str], list[float]] = {}
    for key, a in first.items():
        b = second.get(key)
        if b is not None:
            regime = "small" if a.us < 2 * LARGE_US else "link"
            kinds.setdefault((a.one.kind, a.one.gpus, regime), []).append(b.us / a.us)
    for (kind, gpus, regime), ratios in sorted(kinds.items()):
        yield _summed(base, chip, kind, f"{gpus} GPUs", "fastest", "", regime, ratios)


def _summed(base: str, chip: str, operator: str, form: str, engine: str, versions: str, regime: str, ratios: Sequence[float]) -> Compared:
    mean = math.exp(math.fsum(map(math.log, ratios)) / len(ratios))
    ends = quantiles(ratios, n=20) if len(ratios) >= LEAST_FOR_RANGE else (None, None)
    return Compared(
        base, chip, operator, form, engine, versions, regime, len(ratios), mean, ends[0], ends[-1], min(ratios), max(ratios)
    )  # fmt: skip
