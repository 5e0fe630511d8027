"""What records of other spaces say of a space."""

from __future__ import annotations

import itertools
import math
import time
from typing import Any

import numpy as np
import pytest
from modelled_matmul import H200, SMALL
from modelled_matmul import space as modelled
from numpy.typing import NDArray

from klab.harness.tune.space import KERNEL, Space
from klab.harness.tune.transfer import transfer
from klab.kernels.errors import UsageError


def product(**values: Any) -> Space:
    return Space.of(dict(zip(values, point, strict=True)) for point in itertools.product(*values.values()))


def bowl(space: Space, best_tile: int = 64, best_stages: int = 3) -> NDArray[np.float64]:
    """A time that grows with the distance from the best tile and stages."""
    points = [space.point(c) for c in range(len(space))]
    return np.array([10.0 * (1 + abs(math.log2(p["tile"] / best_tile))) * (1 + 0.2 * abs(p["stages"] - best_stages)) for p in points])


def order(expected: NDArray[np.float64]) -> list[int]:
    return np.argsort(expected, kind="stable").tolist()


def rank_correlation(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    return float(np.corrcoef(np.argsort(np.argsort(a)), np.argsort(np.argsort(b)))[0, 1])


TILES, STAGES = (16, 32, 64, 128, 256), (1, 2, 3, 4)


def test_the_same_points_keep_their_ratios_whatever_the_unit() -> None:
    space = product(tile=TILES, stages=STAGES)
    expected = transfer(space, [(space, 1e3 * bowl(space))])
    assert expected == pytest.approx(bowl(space) / bowl(space).min())
    assert expected.min() == 1.0


def test_nothing_known_is_nan() -> None:
    space = product(tile=TILES, stages=STAGES)
    assert np.isnan(transfer(space, [])).all()
    for nothing in (np.nan, np.inf):
        assert np.isnan(transfer(space, [(space, np.full(len(space), nothing))])).all()
    other = product(**{KERNEL: ("matmul/other",), "tile": TILES})
    ours = product(**{KERNEL: ("matmul/ours",), "tile": TILES})
    assert np.isnan(transfer(ours, [(other, np.arange(1.0, 6.0))])).all()


def test_one_kernel_says_nothing_of_another() -> None:
    both = product(**{KERNEL: ("a", "b"), "tile": TILES})
    known = product(**{KERNEL: ("b", "c"), "tile": TILES})
    expected = transfer(both, [(known, np.array([5.0, 4, 3, 2, 1, 9, 9, 9, 9, 9]))])
    assert np.isnan(expected[:5]).all()
    assert expected[5:] == pytest.approx([5.0, 4, 3, 2, 1])


def test_points_that_the_source_lacks_are_judged_by_near_ones() -> None:
    ours, theirs = product(tile=(*TILES, 512), stages=(*STAGES, 5, 6)), product(tile=TILES, stages=STAGES)
    expected = transfer(ours, [(theirs, bowl(theirs))])
    assert np.isfinite(expected).all()
    assert rank_correlation(expected, bowl(ours)) > 0.8
    new = [c for c in range(len(ours)) if theirs.find(ours.point(c)) is None]
    good = ours.find({"tile": 64, "stages": 5})
    assert good is not None
    assert expected[good] == min(expected[new])


def test_a_tenth_of_a_space_says_much_of_the_rest() -> None:
    recorded = modelled(1024, 4096, 4096)
    known = np.random.default_rng(0).random(len(recorded.space)) < 0.1
    expected = transfer(recorded.space, [(recorded.space, np.where(known, recorded.time_us, np.nan))])
    rest = ~known & np.isfinite(recorded.time_us)
    assert rank_correlation(expected[rest], recorded.time_us[rest]) > 0.8


def test_a_failure_raises_the_expectation_and_settles_nothing() -> None:
    space = product(tile=TILES, stages=STAGES)
    times = bowl(space)
    best = int(times.argmin())
    failing, untried = (np.where(np.arange(len(space)) == best, nothing, times) for nothing in (np.inf, np.nan))
    expected = transfer(space, [(space, failing)])
    assert 1.3 * transfer(space, [(space, untried)])[best] < expected[best] < times.max()
    assert int(expected.argmin()) != best
    # Where another chip ran it, and fast, that counts too.
    assert transfer(space, [(space, failing), (space, times)])[best] < expected[best]


def test_a_larger_chip_s_records_speak_of_what_fits_here() -> None:
    small, large = modelled(1024, 4096, 4096, SMALL), modelled(1024, 4096, 4096, H200)
    for target, source in ((small, large), (large, small)):
        fits = [c for c in range(len(target.space)) if np.isfinite(target.time_us[c])]
        ours = Space.of(target.space.point(c) for c in fits)
        times = target.time_us[fits]
        expected = transfer(ours, [(source.space, source.time_us)])
        assert np.isfinite(expected).all()
        assert rank_correlation(expected, times) > 0.5
        assert times[order(expected)[:20]].min() < 1.15 * times.min()
        assert np.median(times) > 2.0 * times.min()


def test_another_version_with_a_new_and_without_an_old_parameter() -> None:
    old = product(tile=TILES, stages=STAGES, legacy=(0, 1))
    new = product(tile=TILES, stages=STAGES, swizzle=("none", "wide"))
    times = bowl(old)
    times[[old.point(c)["legacy"] == 1 for c in range(len(old))]] *= 4.0
    expected = transfer(new, [(old, times)])
    # Candidates that differ in the new parameter alone are alike, and the common part keeps its order.
    assert expected[0::2] == pytest.approx(expected[1::2])
    assert rank_correlation(expected[0::2], bowl(product(tile=TILES, stages=STAGES))) == pytest.approx(1.0)
    nothing_in_common = transfer(new, [(product(other=(1, 2, 3)), np.array([1.0, 2.0, 3.0]))])
    assert np.isfinite(nothing_in_common).all() or np.isnan(nothing_in_common).all()
    assert len(set(nothing_in_common[np.isfinite(nothing_in_common)].tolist())) <= 1


def test_flags_names_lists_and_absent_parameters() -> None:
    points: list[dict[str, Any]] = [
        {"tile": t, "tma": tma, "order": o, "shape": shape, **({"stages": 2} if tma else {})}
        for t in TILES for tma in (False, True) for o in ("row", "column") for shape in ([1, 2], [2, 2], None)
    ]  # fmt: skip
    space = Space.of(points)
    times = np.array([p["tile"] * (1.0 if p["tma"] else 3.0) * (1.0 if p["order"] == "row" else 1.5) for p in points])
    known = np.random.default_rng(1).random(len(points)) < 0.5
    expected = transfer(space, [(space, np.where(known, times, np.nan))])
    assert np.isfinite(expected).all()
    assert rank_correlation(expected[~known], times[~known]) > 0.85


def test_sources_are_weighed_and_brought_to_one_scale() -> None:
    space = product(tile=TILES, stages=STAGES)
    near, far = bowl(space), 100.0 * bowl(space, best_tile=16, best_stages=1)
    for weights, closer in (([9.0, 1.0], near), ([1.0, 9.0], far)):
        expected = transfer(space, [(space, near), (space, far)], weights)
        assert order(expected)[0] == int(closer.argmin())
    # Halves of a space by two records of very different speed: one order over the whole.
    half = np.arange(len(space)) % 2 == 0
    parts = [(space, np.where(half, near, np.nan)), (space, np.where(half, np.nan, 1000.0 * near))]
    assert rank_correlation(transfer(space, parts), near) > 0.8


def test_wrong_input_is_refused() -> None:
    space = product(tile=TILES)
    with pytest.raises(UsageError, match="5 candidates and 4 times"):
        transfer(space, [(space, np.ones(4))])
    with pytest.raises(UsageError, match="2 weights for 1 source"):
        transfer(space, [(space, np.ones(5))], [1.0, 2.0])


def test_eleven_thousand_candidates_none_of_which_the_source_has() -> None:
    values = {"x": range(1, 31), "y": range(1, 8), "tx": (1, 2, 3, 4), "ty": (1, 2, 4, 8), "a": (0, 1), "b": ("u", "v")}
    theirs = product(**values)
    ours = product(**{**values, "x": [x + 0.5 for x in values["x"]]})  # type: ignore[attr-defined]
    assert len(ours) == len(theirs) > 11_130
    times = np.random.default_rng(0).lognormal(size=len(theirs))
    start = time.process_time()
    expected = transfer(ours, [(theirs, times)])
    assert time.process_time() - start < 2.0
    assert np.isfinite(expected).all()
