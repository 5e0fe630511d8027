"""What failed of a search: the condition that separates it, whether that may be chance, and the words."""

from __future__ import annotations

import math
import random

import pytest
from test_report_search import drawn, grid, one_space, rows_of

from klab.harness.report.figures import search, search_failures, search_progress
from klab.harness.store.result import Status


def test_the_condition_that_separates_is_found() -> None:
    points = grid(block=(16, 32, 64, 128, 256), warps=(2, 4, 8), stages=(1, 2, 3, 4))
    space = one_space(rows_of(points, lambda p: Status.OUT_OF_MEMORY if p["block"] >= 128 and p["stages"] > 1 else 5.0 + p["warps"]))
    found = search_failures.condition(space)
    assert found is not None and found.words == "block at least 128" and found.inside == (18, 24) and found.outside == (0, 36)
    assert found.caught == 1.0 and found.chance < 1e-6
    table = search_failures.data(space)
    counted = {(row.parameter, row.value): (row.failed, row.tried) for row in table.itertuples()}
    assert table["parameter"].iloc[0] == "block" and counted[("block", "128")] == (9, 12) and counted[("stages", "2")] == (6, 15)
    assert ("block", "64") not in counted and set(table["status"]) == {"out_of_memory"}
    figure = search_failures.draw(space, table, "f")
    assert figure is not None and "18 of 60 configurations failed (30%" in figure.caption
    assert "block at least 128: 18 of 24 fail with it" in figure.caption and "because out_of_memory" in figure.caption


def test_a_single_value_is_a_condition_too() -> None:
    points = grid(kind=("a", "b", "c"), n=tuple(range(12)))
    space = one_space(rows_of(points, lambda p: Status.INCORRECT if p["kind"] == "b" else 1.0))
    found = search_failures.condition(space)
    assert found is not None and found.words == "kind = b" and found.inside == (12, 12) and found.outside == (0, 24)


def test_the_chance_counts_all_that_was_looked_at() -> None:
    points = grid(a=range(6), b=("x", "y"), c=range(3))
    space = one_space(rows_of(points, lambda p: Status.TIMEOUT if p["a"] == 5 else 1.0))
    found = search_failures.condition(space)
    looked_at = (6 + 4 + 4) + 2 + (3 + 1 + 1)
    assert found is not None and found.chance == pytest.approx(looked_at * search_failures.at_least(6, 6, 6, 36), rel=1e-9)


def test_failures_by_chance_have_no_condition() -> None:
    rng = random.Random(2)
    points = grid(a=range(6), b=range(6), c=range(3))
    space = one_space(rows_of(points, lambda p: Status.TIMEOUT if rng.random() < 0.1 else 2.0))
    assert search_failures.condition(space) is None
    figure = search_failures.draw(space, search_failures.data(space), "f")
    assert figure is not None and "more than chance would" in figure.caption


def test_the_chance_of_a_condition_is_fishers() -> None:
    for held, size, bad, total in ((18, 24, 18, 60), (3, 10, 9, 40), (0, 5, 4, 30), (1, 1, 2, 9)):
        ways = [math.comb(bad, k) * math.comb(total - bad, size - k) for k in range(held, min(size, bad) + 1)]
        assert search_failures.at_least(held, size, bad, total) == pytest.approx(sum(ways) / math.comb(total, size), rel=1e-9)


def test_intervals_of_shares() -> None:
    """Against Newcombe's worked example of Wilson's interval: 81 of 263, and 0 of 20."""
    assert search_failures.proportion(81, 263) == pytest.approx((0.2553, 0.3662), abs=2e-4)
    assert search_failures.proportion(0, 20) == pytest.approx((0.0, 0.1611), abs=2e-4)


def test_all_failed_or_none() -> None:
    points = grid(a=(1, 2, 3), b=(1, 2))
    landscape, broken, *rest = drawn(rows_of(points, lambda p: Status.COMPILE_ERROR))
    assert not rest, "no time: no parameter matters, and there is no best so far"
    assert "6 configurations were tried and 6 failed. None gave a checked time." in landscape.caption
    assert "6 of 6 configurations failed" in broken.caption and "separated" not in broken.caption
    fine = drawn(rows_of(points, lambda p: 3.0))
    assert [figure.title for figure in fine] == [search.TITLE, search_progress.TITLE]
    assert "none failed" in fine[0].caption
