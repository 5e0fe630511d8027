"""What an estimate costs, and how far off it is where published tables know better.

pytest ci/overheads/test_cost_estimates.py --benchmark-enable --benchmark-columns=median,max,rounds -s

Aims: 1e5 facts, the first answer within a second and later ones within 5 ms; rows left out of published tables predicted within 10% at the
median. The rest needs those tables (pip install -e '.[reference]', or KLAB_REFERENCE) and prints what docs/interpolation.md shows.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from functools import cache

import numpy as np
import pytest

from klab.harness.catalog import find_chip
from klab.harness.cost.estimate import Origin
from klab.harness.cost.family import family_of
from klab.harness.cost.known import Interpolated, Known, Members
from klab.harness.cost.modelled import Modelled
from klab.harness.cost.ranges import Range
from klab.harness.cost.reference_source import known_of
from klab.harness.store.reference import available, points
from klab.kernels.contract import Problem
from klab.kernels.matmul.problem import Matmul

TRIED = 300
LEAST_TRIED = 100


def thousands() -> list[Known]:
    limits = Modelled(find_chip("h200"))
    sizes = [round(2 ** (n / 4)) for n in range(16, 64)]
    facts = [Matmul(m, n, k) for m in [*range(1, 33), *sizes[4:]] for n in sizes[::2] for k in sizes[::2]]
    facts += [Matmul(m, n, k, "float32") for m in range(1, 109) for n in sizes for k in sizes[::4]]
    return [Known(p, Range.exact(4 + limits.bound(p)[0] / 0.7), Origin.REFERENCE) for p in facts]


def test_the_first_answer(benchmark) -> None:
    facts, chip = thousands(), find_chip("h200")
    assert len(facts) > 1e5
    benchmark.pedantic(lambda: Interpolated(facts, chip).launch(Matmul(100, 3000, 3000)), rounds=3)


@pytest.mark.benchmark(timer=time.process_time)
def test_later_answers(benchmark) -> None:
    known = Interpolated(thousands(), find_chip("h200"))
    sizes = iter(range(33, 10_000))
    benchmark.pedantic(lambda: known.launch(Matmul(next(sizes), 3001, 5003)), rounds=200)


Taken = Callable[[np.ndarray, np.ndarray], np.ndarray]
Sizes = dict[str, tuple[float, float]]

# operator -> (which of its rows, as a like problem; the sizes that serving has; what is left out with a row)
SERVED: dict[str, tuple[Callable[[Problem], bool], Sizes, dict[str, tuple[str, ...]]]] = {
    "matmul": (
        lambda p: p.dtype == "bfloat16",
        {"m": (2, 16384), "n": (1024, 32768), "k": (1024, 20000)},
        {"the row": (), "its weight": ("n", "k"), "its n": ("n",), "its tokens": ("m",)},
    ),
    "scaled_matmul": (
        lambda p: p.format == "fp8_block",
        {"m": (2, 16384), "n": (1024, 32768), "k": (1024, 20000)},
        {"the row": (), "its weight": ("n", "k"), "its tokens": ("m",)},
    ),
    "prefill_attention": (
        lambda p: (p.head_dim, p.dim_v, p.window, p.kv_dtype) == (128, 128, 0, ""),
        {"queries": (256, 16000), "heads": (4, 64)},
        {"the row": (), "its prompt": ("queries",), "its heads": ("heads",)},
    ),
    "decode_attention": (
        lambda p: (p.head_dim, p.window, p.kv_dtype) == (128, 0, ""),
        {"sequences": (2, 512), "keys": (512, 70000), "heads": (4, 64)},
        {"the row": (), "its batch": ("sequences",), "its context": ("keys",), "its heads": ("heads",)},
    ),
    "fused_moe": (
        lambda p: p.format == "fp8_block",
        {"tokens": (2, 8192)},
        {"the row": (), "its tokens": ("tokens",), "its intermediate size": ("intermediate",), "its model": ("hidden",)},
    ),
}  # fmt: skip


@cache
def table_of(chip: str, operator: str) -> tuple[list[Known], np.ndarray]:
    """The facts of one engine, the fastest of each size, and their sizes."""
    wanted = SERVED[operator][0]
    best: dict[tuple[float, ...], Known] = {}
    for point in points(find_chip(chip), [operator], backend="trtllm"):
        if point.one.operator == operator and wanted(point.one) and not getattr(point.one, "skew", 0):
            fact = known_of(point)
            size = family_of(type(fact.problem)).size_of(fact.problem)
            if size not in best or fact.us.mid < best[size].us.mid:
                best[size] = fact
    return list(best.values()), np.array(list(best), dtype=float)


def held_out(chip: str, operator: str, off: tuple[str, ...]) -> Iterator[tuple[float, bool, float]]:
    """(error, whether it is in the interval, half its width) of rows that are predicted without themselves and without all that shares
    one of these sizes with them.
    """
    facts, sizes = table_of(chip, operator)
    family, modelled = family_of(type(facts[0].problem)), Modelled(find_chip(chip))
    inside = np.ones(len(facts), dtype=bool)
    for name, (low, high) in SERVED[operator][1].items():
        column = sizes[:, family.sizes.index(name)]
        inside &= (column >= low) & (column <= high)
    for at in random.Random(0).sample(np.flatnonzero(inside).tolist(), min(TRIED, int(inside.sum()))):
        axes = [family.sizes.index(name) for name in off]
        shared = (sizes[:, axes] == sizes[at, axes]).any(axis=1) if axes else (sizes == sizes[at]).all(axis=1)
        kept = np.flatnonzero(~shared)
        rest = Members(sizes[kept], lambda row, kept=kept: facts[kept[row]], family, modelled)
        found, us = rest.launch(facts[at].problem), facts[at].us.mid
        if found is not None:
            yield found.us.mid / us - 1, found.us.low <= us <= found.us.high, found.us.doubt


@pytest.mark.skipif(available() is None, reason="no published tables: pip install -e '.[reference]'")
@pytest.mark.parametrize("operator", list(SERVED))
@pytest.mark.parametrize("chip", ["h200", "b200"])
def test_rows_left_out_of_published_tables(chip: str, operator: str) -> None:
    for words, off in SERVED[operator][2].items():
        rows = list(held_out(chip, operator, off))
        errors = np.abs([error for error, _, _ in rows])
        inside, width = np.mean([held for _, held, _ in rows]), np.median([doubt for _, _, doubt in rows])
        median, tenth = np.median(errors), np.quantile(errors, 0.9)
        print(f"\n| {chip} | {operator} | {words} | {len(rows)} | {median:.1%} | {tenth:.0%} | {inside:.0%} | {width:.0%} |", end="")
        assert len(rows) >= LEAST_TRIED and median <= 0.10 and inside >= 0.7


@pytest.mark.skipif(available() is None, reason="no published tables: pip install -e '.[reference]'")
@pytest.mark.parametrize("operator", list(SERVED))
@pytest.mark.parametrize("chip", ["h200", "b200"])
def test_the_model_at_published_rows(chip: str, operator: str) -> None:
    facts, _ = table_of(chip, operator)
    modelled = Modelled(find_chip(chip))
    some = random.Random(0).sample(facts, min(10 * TRIED, len(facts)))
    expected = [modelled.us(fact.problem)[0] for fact in some]
    ratios = np.array([fact.us.mid / us.mid for fact, us in zip(some, expected, strict=True)])
    inside = np.mean([us.low <= fact.us.mid <= us.high for fact, us in zip(some, expected, strict=True)])
    tenth, median, last = np.quantile(ratios, (0.1, 0.5, 0.9))
    print(f"\n| {chip} | {operator} | {len(some)} | {median:.2f} | {tenth:.2f}..{last:.2f} | {inside:.0%} |", end="")
    assert 0.5 <= median <= 2.0
