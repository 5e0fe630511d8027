import itertools

import pytest

from klab.harness.measure.rotation import CACHE_MULTIPLE, Rotation, plan, segments, set_bytes
from klab.kernels.decode_attention.problem import DecodeAttention
from klab.kernels.matmul.problem import Matmul

MB = 1 << 20
LIMITS = {"l2": "cold", "l2_bytes": 60 * MB, "memory_bytes": 70_000 * MB, "max_sets": 1024, "can_flush": True}


@pytest.mark.parametrize("size_mb", [1, 7, 59, 60, 61, 299, 300, 301, 5000])
def test_cold_means_that_five_caches_lie_between_two_uses_of_a_set(size_mb):
    how = plan(stored=size_mb * MB, touched=size_mb * MB, **LIMITS)
    assert how.l2_state == "cold"
    assert (how.count - 1) * size_mb >= CACHE_MULTIPLE * 60
    assert (how.count - 2) * size_mb < CACHE_MULTIPLE * 60, "no more than needed"


def test_what_a_launch_does_not_touch_evicts_nothing():
    # 4096 of 131072 keys are inside the window: the sets must be counted by what is read.
    problem = DecodeAttention((131072,), heads=8, kv_heads=1, head_dim=128, window=4096)
    stored, touched = set_bytes(problem)
    assert stored > 30 * touched
    how = plan(stored=stored, touched=touched, **LIMITS)
    assert (how.count - 1) * touched >= 5 * 60 * MB


def test_warm_is_one_set():
    assert plan(stored=MB, touched=MB, **(LIMITS | {"l2": "warm"})).count == 1


@pytest.mark.parametrize("limit", [{"memory_bytes": 100 * MB}, {"max_sets": 100}])
def test_cold_that_cannot_be_proved_is_flushed_or_called_unproven(limit):
    small = {"stored": MB, "touched": MB} | LIMITS | limit
    assert plan(**small).l2_state == "flush"
    unproven = plan(**small | {"can_flush": False})
    assert unproven.l2_state == "unproven"
    assert unproven.count == 100


def test_a_problem_beyond_the_memory_still_has_one_set():
    assert plan(stored=100 * MB, touched=100 * MB, **LIMITS | {"memory_bytes": MB, "can_flush": False, "l2_bytes": 1 << 40}).count == 1


def test_sets_hold_random_data_at_different_addresses():
    problem = Matmul(4, 8, 16, "float32")
    rotation = Rotation.make(problem, plan(stored=1, touched=1, **LIMITS | {"l2_bytes": 1, "max_sets": 10}), seed=5, device="cpu")
    assert len(rotation) == 6
    assert len({s["x"].data_ptr() for s in rotation.inputs}) == 6
    assert len({s["out"].data_ptr() for s in rotation.outputs}) == 6
    values = [tuple(s["x"].flatten().tolist()) for s in rotation.inputs]
    assert len(set(values)) == 2, "two are drawn, the others are copies"
    assert values[0] != values[-1]
    assert rotation.ends == {0: 0, 5: 1}
    assert all(s["x"].std() > 0.5 for s in rotation.inputs), "never zeros"


@pytest.mark.parametrize(("sets", "launches"), [(1, 10), (3, 10), (10, 10), (11, 10), (19, 10), (100, 10), (1024, 200), (7, 50), (57, 13)])
def test_segments_walk_through_all_sets_for_ever(sets, launches):
    walks = segments(sets, launches)
    once = list(itertools.chain.from_iterable(walks))
    twice = once + once
    assert all(b == (a + 1) % sets for a, b in itertools.pairwise(twice)), "the walk is broken nowhere, nor at its end"
    assert all(len(walk) >= launches for walk in walks)
