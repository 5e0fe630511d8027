"""A space against the plain list of points that it was made of."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from klab.harness.tune import space as module
from klab.harness.tune.space import ABSENT, KERNEL, Space, config_of, identity, kernel_points
from klab.kernels.contract import Chip, canonical_json
from klab.kernels.discover import discover
from klab.kernels.errors import UsageError
from klab.kernels.matmul.problem import Matmul

# Values that Python confuses (1, True, 1.0; 0, False, "0"), lists and None among them.
VALUES = st.one_of(
    st.sampled_from([0, 1, 2, 64, -3, True, False, None, 0.5, 1.0, "0", "a", "b"]),
    st.sampled_from([[1, 2], [True, 2], [1.0, 2], [], [[1], 2]]),
)
POINTS = st.lists(st.dictionaries(st.sampled_from("abcd"), VALUES, max_size=4), min_size=1, max_size=40)


def told_apart(point: dict[str, Any]) -> str:
    return canonical_json(point)


@settings(max_examples=150, deadline=None)
@given(POINTS)
def test_a_space_is_the_list_of_its_distinct_points(points: list[dict[str, Any]]) -> None:
    space = Space.of(iter(points))
    distinct = list({told_apart(p): p for p in reversed(points)}.values())[::-1]
    order = list(dict.fromkeys(told_apart(p) for p in points))
    assert [told_apart(space.point(c)) for c in range(len(space))] == order
    for point in distinct:
        found = space.find(point)
        assert found is not None
        assert told_apart(space.point(found)) == told_apart(point)
    assert space.find({"a": "nowhere"}) is None
    assert space.find({"no such": 1}) is None


@settings(max_examples=60, deadline=None)
@given(POINTS, POINTS)
def test_points_of_another_space_are_found_where_they_are_and_nowhere_else(
    points: list[dict[str, Any]], others: list[dict[str, Any]]
) -> None:
    space = Space.of(points)
    known = {told_apart(p) for p in points}
    for other in others:
        found = space.find(other)
        assert (found is not None) == (told_apart(other) in known)


def brute_neighbours(space: Space, candidate: int, adjacent: bool) -> set[int]:
    here = space.rows[candidate]
    found = set()
    for other in range(len(space)):
        differs = np.flatnonzero(space.rows[other] != here)
        if len(differs) == 1 and here[differs[0]] != ABSENT and space.rows[other][differs[0]] != ABSENT:
            step = abs(int(space.rows[other][differs[0]]) - int(here[differs[0]]))
            if step == 1 or not adjacent:
                found.add(other)
    return found


@settings(max_examples=60, deadline=None)
@given(POINTS, st.booleans())
def test_neighbours_differ_in_one_parameter(points: list[dict[str, Any]], adjacent: bool) -> None:
    space = Space.of(points)
    for candidate in range(len(space)):
        found = space.neighbours(candidate, adjacent=adjacent)
        assert len(set(found)) == len(found)
        assert set(found.tolist()) == brute_neighbours(space, candidate, adjacent)


def test_rows_that_are_no_candidates_are_not_found() -> None:
    space = Space.of({"x": x, "y": y} for x in (1, 2, 3) for y in (1, 2) if (x, y) != (3, 2))
    rows = np.array([[0, 0], [2, 1], [0, 2], [3, 0], [-1, 0], [-2, 0], [1, 5], [2, 0]])
    # (0, 2) and (3, 0) would have the codes of other rows: positions beyond the values of their parameter.
    assert space.lookup(rows).tolist() == [0, -1, -1, -1, -1, -1, -1, 4]
    assert space.lookup(np.empty((0, 2), dtype=np.int64)).tolist() == []


def test_numbers_ascend_and_other_values_keep_their_order() -> None:
    space = Space.of([{"n": 8, "s": "z", "f": 0.5}, {"n": 2, "s": "a", "f": 4}, {"n": 4, "s": "m", "f": 1}])
    assert space.values == ((2, 4, 8), ("z", "a", "m"), (0.5, 1, 4))
    assert [space.point(c)["n"] for c in range(3)] == [8, 2, 4]


def test_values_that_python_confuses_are_three() -> None:
    space = Space.of([{"p": 1}, {"p": True}, {"p": 1.0}, {"p": 1}])
    assert len(space) == 3
    assert [type(space.point(c)["p"]) for c in range(3)] == [int, bool, float]
    assert space.find({"p": True}) == 1
    assert identity([1]) != identity([True])


def test_a_parameter_that_appears_late_is_absent_before() -> None:
    points = [{"a": i} for i in range(10_000)] + [{"a": i, "b": i % 3} for i in range(10_000)]
    space = Space.of(points)
    assert len(space) == 20_000
    assert space.point(9_999) == {"a": 9_999}
    assert space.point(10_001) == {"a": 1, "b": 1}
    assert space.find({"a": 5}) == 5
    assert set(space.neighbours(10_000).tolist()) == set(range(10_001, 20_000)) & {
        c for c in range(20_000) if points[c].get("b") == 0 or points[c].get("a") == 0
    }


def test_a_generator_may_yield_one_dict_again_and_again() -> None:
    def points() -> Iterator[dict[str, int]]:
        point = {}
        for i in range(100):
            point["i"] = i
            yield point

    assert [p["i"] for p in map(Space.of(points()).point, range(100))] == list(range(100))


def test_edges() -> None:
    one = Space.of([{"a": 1}])
    assert (len(one), one.find({"a": 1}), one.neighbours(0).tolist()) == (1, 0, [])
    bare = Space.of([{}, {}])
    assert (len(bare), bare.point(0), bare.find({}), bare.neighbours(0).tolist()) == (1, {}, 0, [])
    with pytest.raises(UsageError, match="no valid candidate"):
        Space.of([])


def test_a_parameter_with_more_values_than_a_row_holds_is_refused_by_name() -> None:
    assert len(Space.of({"id": i} for i in range(module.MOST_VALUES))) == module.MOST_VALUES
    assert Space.of({"id": i} for i in range(module.MOST_VALUES)).find({"id": module.MOST_VALUES - 1}) == module.MOST_VALUES - 1
    with pytest.raises(UsageError, match="parameter id has more than 32,767 values"):
        Space.of({"id": i} for i in range(module.MOST_VALUES + 1))


def test_an_endless_space_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def endless() -> Iterator[dict[str, int]]:
        while True:
            yield {"a": 1}

    monkeypatch.setattr(module, "MOST_CANDIDATES", 20_000)
    with pytest.raises(UsageError, match="more than 20,000 candidates"):
        Space.of(endless())


def test_parameters_beyond_64_bits_are_still_found() -> None:
    rng = np.random.default_rng(0)
    points = [{f"p{i}": int(v) for i, v in enumerate(row)} for row in rng.integers(0, 300, (500, 12))]  # 301^12 > 2^64
    space = Space.of(points)
    assert [space.find(p) for p in points] == list(range(500))
    assert space.find({**points[0], "p3": points[0]["p3"] + 1000}) is None


def h200() -> Chip:
    return Chip(
        name="h200", title="H200", kind="cuda", sm_count=132, max_clock_mhz=1980.0, spec_clock_mhz=1830.0, peak_tflops={"bfloat16": 989.0},
        memory_bytes=141 * 10**9, memory_gb_per_s=4800.0, l2_bytes=50 * 2**20, compute_capability=(9, 0), smem_per_block_bytes=232_448,
        smem_per_sm_bytes=233_472,
    )  # fmt: skip


def test_kernels_give_points_that_become_their_configurations_again() -> None:
    kernels = {k.id: k for k in discover().kernels.values() if k.problem_type is Matmul}
    problem, chip = Matmul(64, 512, 256), h200()
    points = list(kernel_points(kernels.values(), problem, chip))
    space = Space.of(points)
    assert len(space) == len(points) > 100
    seen = set()
    for candidate in range(len(space)):
        kernel, config = config_of(space.point(candidate), kernels)
        assert {KERNEL: kernel.id, **config.to_json_full()} == points[candidate]
        if kernel.id not in seen:  # each kernel's default comes first
            assert config == kernel.default(problem, chip)
            seen.add(kernel.id)
    assert {points[c][KERNEL] for c in range(len(points))} == seen
