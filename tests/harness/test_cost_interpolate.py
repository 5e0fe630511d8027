"""Interpolation: exact in the plain cases, honest about its error, and spread where a table has many sizes on one axis."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from klab.harness.cost.interpolate import ALONE, NEIGHBOURS, Sizes, between, logs_of, spread


def answer(points, values, at):
    return between(np.array(points, dtype=float), np.array(values, dtype=float), np.array(at, dtype=float))


def test_between_two_points_it_is_the_straight_line():
    found = [answer([[0.0], [4.0]], [1.0, 3.0], [x]).value for x in (0, 1, 2, 3, 4)]
    assert found == pytest.approx([1.0, 1.5, 2.0, 2.5, 3.0], abs=0.02)


@given(
    points=st.lists(st.tuples(st.integers(0, 8), st.integers(0, 8)), min_size=2, max_size=12, unique=True),
    at=st.tuples(st.floats(0, 8), st.floats(0, 8)),
    level=st.floats(-5, 5),
)
@settings(max_examples=60, deadline=None)
def test_what_is_the_same_everywhere_is_the_same_between(points, at, level):
    found = answer(points, [level] * len(points), at)
    assert found.value == pytest.approx(level, abs=1e-9) and found.error == pytest.approx(0, abs=1e-9)


@given(st.permutations(range(9)), st.floats(-3, 3), st.floats(0.1, 4))
@settings(max_examples=40, deadline=None)
def test_order_shift_and_scale_of_the_values_change_nothing_else(order, shift, scale):
    points = np.array([[x, y] for x in (0, 1, 3) for y in (0, 2, 3)], dtype=float)
    values = np.sin(points[:, 0]) + 0.3 * points[:, 1] ** 1.5
    plain, other = answer(points, values, [1.4, 1.1]), answer(points[order], shift + scale * values[order], [1.4, 1.1])
    assert other.value == pytest.approx(shift + scale * plain.value, abs=1e-9)
    assert other.error == pytest.approx(scale * plain.error, abs=1e-9)


def test_leave_one_out_in_closed_form_is_leaving_one_out():
    rng = np.random.default_rng(3)
    points, values = rng.uniform(0, 6, (10, 3)), rng.normal(size=10)
    # Far away every point's distance to its neighbour matters alike, so the error is that of the worst of them (nine tenths of ten).
    gaps = np.linalg.norm(points[:, None] - points[None], axis=2) + np.diag([np.inf] * 10)
    rates = [
        abs(values[out] - answer(np.delete(points, out, 0), np.delete(values, out), points[out]).value) / (gaps[out].min() + 0.3)
        for out in range(10)
    ]
    far = answer(points, values, [60.0, 60.0, 60.0])
    distance = np.linalg.norm(points - 60.0, axis=1).min() + 0.3
    assert far.error == pytest.approx(max(rates) * distance, rel=1e-6)


def test_the_error_grows_with_the_scatter_and_with_the_distance():
    x = np.arange(10.0)[:, None]
    wild = np.array([(-1) ** n for n in range(10)], dtype=float)
    assert answer(x, 0.01 * wild, [4.5]).error < 0.1 * answer(x, wild, [4.5]).error
    assert answer(x, wild, [4.0]).error < answer(x, wild, [4.5]).error < answer(x, wild, [12.0]).error


def test_one_point_says_its_value_and_that_it_is_alone():
    assert answer([[3.0, 1.0]], [2.0], [3.5, 1.0]) == type(answer([[0.0]], [0.0], [0.0]))(2.0, ALONE)


def test_an_axis_on_which_nothing_varies_does_no_harm():
    points = [[x, 5.0, 7.0] for x in range(6)]
    assert answer(points, range(6), [2.5, 5.0, 7.0]).value == pytest.approx(2.5, abs=0.05)


def test_sizes_know_their_edges():
    sizes = Sizes(np.array([[1, 64], [16, 64], [16, 1024]], dtype=float))
    assert sizes.outside(logs_of(np.array([4.0, 100.0]))) == 0
    assert sizes.outside(logs_of(np.array([64.0, 100.0]))) == pytest.approx(2)
    assert sizes.outside(logs_of(np.array([16.0, 8.0]))) == pytest.approx(3)
    assert sizes.inward(logs_of(np.array([64.0, 8.0]))).tolist() == [4.0, 6.0]
    rows, distances = sizes.nearest(logs_of(np.array([16.0, 64.0])))
    assert rows.tolist() == [1, 0, 2] and distances.tolist() == [0, 4, 4]
    # Nothing is its own neighbour's size: no keys at all is half of one.
    assert logs_of(np.array([0.0])) == -1


def test_neighbours_are_around_the_place_and_not_on_one_side():
    # 60 numbers of tokens for each of four weights: the nearest 16 are all of one weight.
    tokens, widths = np.unique(np.geomspace(1, 4096, 60).round()), (1024, 4096, 16384, 65536)
    table = np.array([(m, n) for n in widths for m in tokens], dtype=float)
    sizes, place = Sizes(table), logs_of(np.array([256.0, 5000.0]))
    rows, distances = sizes.nearest(place)
    all_of_them = np.linalg.norm(sizes.logs - place, axis=1)
    assert distances == pytest.approx(np.sort(all_of_them)[: len(rows)]) and all_of_them[rows] == pytest.approx(distances)
    chosen = spread(sizes.logs[rows], distances)
    assert len(chosen) <= NEIGHBOURS and chosen[0] == 0 and chosen == sorted(set(chosen))
    assert set(table[rows[:NEIGHBOURS], 1]) == {4096} and {4096, 16384} <= set(table[rows[chosen], 1])
    odd = spread(sizes.logs[rows], distances, lambda at: at % 2 == 1)
    assert odd and all(at % 2 == 1 for at in odd)


def test_a_series_differs_on_as_few_axes_as_can_be_and_encloses_the_place():
    table = np.array([(m, n, k) for m in (1, 4, 16, 64) for n, k in ((1024, 512), (4096, 512), (4096, 2048))], dtype=float)
    sizes = Sizes(table)

    def rows(*size):
        found = sizes.series(logs_of(np.array(size, dtype=float)))
        return None if found is None else table[found].tolist()

    assert rows(8, 4096, 512) == [[m, 4096, 512] for m in (1, 4, 16, 64)]
    # At a size that is there the other axis decides: nothing is off but m, or n.
    assert rows(16, 4096, 512) == [[m, 4096, 512] for m in (1, 4, 16, 64)]
    # Off in m and n: both are enclosed by the rows of k 512.
    assert rows(8, 2000, 512) == [[m, n, 512] for m in (1, 4, 16, 64) for n in (1024, 4096)]
    # Nothing of k 2048 has a smaller n; beyond the last batch, nothing encloses.
    assert rows(8, 2000, 2048) is None and rows(128, 4096, 512) is None
    assert sizes.nearest(logs_of(np.array([8.0, 4096, 512])), np.array([1, 2, 4]))[0].tolist() == [4, 1, 2]
