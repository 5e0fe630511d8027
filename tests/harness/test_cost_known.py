"""Known facts and the sizes between them: against a chip whose every time is known."""

import dataclasses
import math
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from klab.harness.catalog import find_chip
from klab.harness.cost.estimate import Estimate, Estimator, Origin, label_of
from klab.harness.cost.family import family_of
from klab.harness.cost.known import Interpolated, Known, Members
from klab.harness.cost.modelled import Modelled
from klab.harness.cost.ranges import Range
from klab.harness.plan.communication import Collective
from klab.kernels.decode_attention.problem import DecodeAttention
from klab.kernels.discover import operators
from klab.kernels.fused_moe.problem import FusedMoe
from klab.kernels.matmul.problem import Matmul
from klab.kernels.norm.problem import Norm
from klab.kernels.prefill_attention.problem import PrefillAttention
from klab.kernels.scaled_matmul.problem import ScaledMatmul

H200 = find_chip("h200")
LIMITS = Modelled(H200)


def true_us(problem):
    """A start, and a share of the roofline that grows from a half to three quarters with the work."""
    bound, _ = LIMITS.bound(problem)
    return 5 + bound / (0.75 - 0.25 / (1 + bound / 30))


def fact(problem, us=None, watts=None, origin=Origin.MEASURED, doubt=0.01, kernel="op/k"):
    us = true_us(problem) if us is None else us
    time = Range(us * (1 - doubt), us, us * (1 + doubt))
    return Known(problem, time, origin, time * (watts * 1e-6) if watts else None, kernel, {"block": 64}, "measured")


GRID = [Matmul(m, n, k) for m in (1, 4, 16, 64, 256, 1024, 4096) for n in (1024, 4096, 16384) for k in (1024, 4096, 16384)]


@pytest.fixture(scope="module")
def grid():
    return Interpolated([fact(problem, watts=400 + 30 * math.log2(problem.m)) for problem in GRID], H200)


def test_what_is_known_is_given_as_it_was_measured(grid):
    known = fact(GRID[20], watts=400 + 30 * math.log2(GRID[20].m))
    found = grid.launch(GRID[20])
    assert (found.us, found.joules, found.origin, found.energy_origin) == (known.us, known.joules, Origin.MEASURED, Origin.MEASURED)
    assert (found.kernel, found.config) == ("op/k", {"block": 64}) and "at this shape" in found.how


def test_between_known_sizes_the_error_is_small_and_the_interval_tells_it(grid):
    rng, errors, held = random.Random(1), [], []
    for _ in range(60):
        problem = Matmul(*(round(2 ** rng.uniform(*ends)) for ends in ((0, 12), (10, 14), (10, 14))))
        found = grid.launch(problem)
        errors.append(abs(found.us.mid / true_us(problem) - 1))
        held.append(found.us.low <= true_us(problem) <= found.us.high)
        watts = 400 + 30 * math.log2(problem.m)
        assert found.joules.mid == pytest.approx(found.us.mid * watts * 1e-6, rel=0.1)
        assert found.energy_origin is Origin.MEASURED and found.joules.low < found.joules.mid < found.joules.high
    assert sorted(errors)[30] < 0.03 and sorted(errors)[54] < 0.10
    assert sum(held) >= 51


def test_the_interval_is_no_narrower_than_what_its_neighbours_were_measured_to():
    sure, unsure = (Interpolated([fact(p, doubt=d) for p in GRID], H200).launch(Matmul(100, 4096, 4096)) for d in (0.01, 0.3))
    assert unsure.us.doubt > 0.25 > 0.12 > sure.us.doubt >= 0.099
    assert sure.us.mid == unsure.us.mid


@given(m=st.integers(1, 3000), n=st.sampled_from([1024, 3000, 16384]), factor=st.floats(1.05, 3))
@settings(max_examples=25, deadline=None)
def test_a_slower_chip_is_slower_everywhere(m, n, factor):
    one, other = (Interpolated([fact(p, f * true_us(p)) for p in GRID], H200).launch(Matmul(m, n, 3000)) for f in (1.0, factor))
    assert other.us.mid == pytest.approx(factor * one.us.mid, rel=1e-6)


def test_beyond_what_is_known_the_doubt_grows_and_then_nothing_is_said(grid):
    inside, edge = grid.launch(Matmul(3000, 12000, 12000)), grid.launch(Matmul(8192, 16384, 16384))
    assert edge.us.doubt > inside.us.doubt + 0.05 and "2.0 times off" in edge.how
    assert edge.us.mid == pytest.approx(true_us(Matmul(8192, 16384, 16384)), rel=0.1)
    far = Matmul(64, 16384, 1 << 18)
    assert grid.launch(far) is None and "16 times" in grid.why_not(far)


def test_another_form_is_not_this_one(grid):
    assert grid.launch(Matmul(64, 4096, 4096, "float32")) is None and "of this form" in grid.why_not(Matmul(64, 4096, 4096, "float32"))
    assert grid.launch(ScaledMatmul(64, 4096, 4096)) is None and "no scaled_matmul" in grid.why_not(ScaledMatmul(64, 4096, 4096))
    # float16 runs at the peak of bfloat16 on everything here.
    assert grid.launch(Matmul(64, 4096, 4096, "float16")).us.mid == pytest.approx(true_us(Matmul(64, 4096, 4096)), rel=0.01)
    assert grid.collective(Collective("all_reduce", 8, 4096)) is None


def test_a_relative_in_minor_matters_stands_in_with_more_doubt_and_says_so():
    known = Interpolated([fact(DecodeAttention((n,) * b, 32, 8, 128)) for n in (1024, 4096, 16384) for b in (1, 8, 64)], H200)
    plain, paged = (known.launch(DecodeAttention((3000,) * 16, 32, 8, 128, page_size=page)) for page in (16, 64))
    assert paged.us.mid == pytest.approx(plain.us.mid) and paged.us.doubt > plain.us.doubt + 0.05
    assert "page_size 16" in paged.how and "page_size" not in plain.how
    verified = known.launch(DecodeAttention((3000,) * 16, 32, 8, 128, q_len=4))
    assert "q_len 1" in verified.how and verified.us.mid >= plain.us.mid
    assert known.launch(DecodeAttention((3000,) * 16, 32, 8, 64)) is None
    assert known.launch(DecodeAttention((3000,) * 16, 32, 8, 128, window=512)) is None
    # A window that reaches back to the first key is none.
    assert known.launch(DecodeAttention((3000,) * 16, 32, 8, 128, window=4096)).us.mid == pytest.approx(plain.us.mid)


def test_ragged_batches_are_asked_by_their_mean_and_bounded_by_their_own_work():
    known = Interpolated([fact(DecodeAttention((n,) * b, 32, 8, 128)) for n in (1024, 4096, 16384) for b in (1, 8, 64)], H200)
    even, ragged = DecodeAttention((4096,) * 8, 32, 8, 128), DecodeAttention((1024, 7168) * 4, 32, 8, 128)
    assert known.launch(ragged).us.mid == pytest.approx(known.launch(even).us.mid, rel=0.05)
    chunk = Interpolated([fact(PrefillAttention((n,), 32, 8, 128)) for n in (512, 2048, 8192)], H200)
    first, later = PrefillAttention((2048,), 32, 8, 128), PrefillAttention((2048,), 32, 8, 128, prefix_lens=(6144,))
    # Seven times the visible pairs of a causal square.
    assert 5 < chunk.launch(later).us.mid / chunk.launch(first).us.mid < 9


def test_a_few_own_measurements_of_one_weight_serve_its_other_batches():
    known = Interpolated([fact(Matmul(m, 4096, 4096)) for m in (1, 8, 32, 128)], H200)
    for m in (2, 16, 20, 64, 100):
        assert known.launch(Matmul(m, 4096, 4096)).us.mid == pytest.approx(true_us(Matmul(m, 4096, 4096)), rel=0.03)


def test_one_measurement_says_little_and_wild_ones_nothing():
    alone = Interpolated([fact(Norm(64, 4096))], H200)
    assert alone.launch(Norm(128, 4096)).us.doubt >= 0.2 and alone.launch(Norm(8192, 4096)) is None
    assert alone.launch(Norm(65, 4096)).origin is Origin.MEASURED
    # So it is not called measured there, and does not stand before published measurements.
    further = alone.launch(Norm(100, 4096))
    assert further.origin is Origin.MODELLED and "the one size that is known" in further.how and "1.6 times off" in further.how
    published = Says(12, 0.2, Origin.REFERENCE)
    assert Estimator(H200, [alone, published]).launch(Norm(80, 4096)).origin is Origin.REFERENCE
    assert Estimator(H200, [alone]).launch(Norm(80, 4096)).us == alone.launch(Norm(80, 4096)).us
    assert Estimator(H200, [alone, published]).launch(Norm(65, 4096)).origin is Origin.MEASURED
    wild = Interpolated([fact(Matmul(m, 4096, 4096), us=10 * 5 ** (at % 2)) for at, m in enumerate((1, 2, 4, 8, 16, 32))], H200)
    assert wild.launch(Matmul(6, 4096, 4096)) is None and "within a factor of 2" in wild.why_not(Matmul(6, 4096, 4096))


def test_nothing_is_faster_than_the_roofline_for_being_uncertain():
    close = [fact(p, (3 + LIMITS.bound(p)[0]) / 0.95, doubt=0.3) for p in GRID]
    problem = Matmul(4000, 12000, 12000)
    found, bound = Interpolated(close, H200).launch(problem).us, LIMITS.bound(problem)[0]
    assert 0.999 * bound <= found.low < found.mid < 1.1 * bound and found.high > 1.25 * found.mid
    # But where neighbours do (in a cache, say), so may this one.
    cached = [fact(p, (3 + LIMITS.bound(p)[0]) / 1.5) for p in GRID]
    assert Interpolated(cached, H200).launch(problem).us.high < 0.75 * bound


def test_of_several_facts_of_a_problem_the_fastest_counts():
    slow, fast = fact(GRID[5], 90.0, kernel="op/slow"), fact(GRID[5], 60.0, kernel="op/fast")
    for order in ([slow, fast], [fast, slow]):
        assert Interpolated(order, H200).launch(GRID[5]).kernel == "op/fast"


def test_without_power_the_model_gives_the_energy_and_one_power_is_not_enough():
    asked = Matmul(100, 4096, 4096)
    some = [fact(p, watts=500 if p == Matmul(64, 4096, 4096) else None) for p in GRID]
    found = Interpolated(some, H200).launch(asked)
    assert found.joules is None and found.energy_origin is Origin.MODELLED
    whole = Estimator(H200, [Interpolated(some, H200)]).launch(asked)
    assert (whole.origin, whole.energy_origin) == (Origin.MEASURED, Origin.MODELLED) and whole.joules.mid > 0


def test_one_reference_among_the_neighbours_makes_the_answer_reference():
    mixed = [fact(p, origin=Origin.REFERENCE if at == 30 else Origin.MEASURED) for at, p in enumerate(GRID)]
    assert Interpolated(mixed, H200).launch(Matmul(GRID[30].m + 1, GRID[30].n, GRID[30].k)).origin is Origin.REFERENCE


class Says:
    def __init__(self, us, doubt, origin):
        self.answer = Estimate(Range(us * (1 - doubt), us, us * (1 + doubt)), origin, "said")
        self.asked = 0

    def launch(self, problem):
        self.asked += 1
        return self.answer

    def collective(self, one):
        return self.answer


def test_the_first_sure_source_answers_and_an_unsure_one_gives_way_to_a_surer_one():
    sure, unsure, published = Says(10, 0.1, Origin.MEASURED), Says(11, 0.5, Origin.MEASURED), Says(12, 0.2, Origin.REFERENCE)
    norm = Norm(64, 4096)
    assert Estimator(H200, [sure, published]).launch(norm).us.mid == 10 and published.asked == 0
    assert Estimator(H200, [unsure, published]).launch(norm).us.mid == 12
    assert Estimator(H200, [unsure, Says(13, 0.6, Origin.REFERENCE)]).launch(norm).us.mid == 11
    once = Says(10, 0.1, Origin.MEASURED)
    whole = Estimator(H200, [once])
    assert whole.launch(norm) is whole.launch(Norm(64, 4096)) and once.asked == 1


def test_the_estimator_falls_to_the_model_and_says_why(grid):
    found = Estimator(H200, [grid]).launch(Matmul(64, 16384, 1 << 18))
    assert found.origin is Origin.MODELLED and "16 times" in found.how and found.us.low < found.us.mid < found.us.high


def test_ninety_percent_make_a_label():
    shares = {Origin.MEASURED: 0.85, Origin.REFERENCE: 0.1, Origin.MODELLED: 0.05}
    assert label_of(shares) is Origin.REFERENCE
    assert label_of({Origin.MEASURED: 0.9}) is Origin.MEASURED
    assert label_of({Origin.MEASURED: 0.5, Origin.REFERENCE: 0.39, Origin.MODELLED: 0.11}) is Origin.MODELLED


@pytest.mark.parametrize("name", sorted(operators()))
def test_every_operator_has_a_family_that_its_size_does_not_change(name):
    for problem in operators()[name].examples() + operators()[name].at_scale():
        family = family_of(type(problem))
        size = family.size_of(problem)
        assert len(size) == len(family.sizes) and all(value >= 0 for value in size) and size == family.size_of(problem)
        hash((family.form_of(problem), family.kin_of(problem)))
        again = Interpolated([fact(problem)], H200).launch(problem)
        assert again.us.mid == pytest.approx(true_us(problem)) and "at this shape" in again.how
        assert LIMITS.us(problem)[0].low > 0


def test_experts_on_this_gpu_are_all_unless_said_otherwise():
    family = family_of(FusedMoe)
    assert family.size_of(FusedMoe(64, 2048, 768, 128, 8)) == family.size_of(FusedMoe(64, 2048, 768, 128, 8, local_experts=128))


def test_the_other_batches_of_the_same_weights_outvote_other_weights():
    # Weights of other models lie nearer than the next batches, and fare worse.
    shares = {(4096, 4096): 0.8, (4608, 4096): 0.3, (4096, 3584): 0.25, (3584, 4608): 0.4}

    def us(m, weight):
        return 4 + LIMITS.bound(Matmul(m, *weight))[0] / shares[weight]

    batches = dict.fromkeys(shares, (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048))
    batches[4096, 4096] = (1, 2, 4, 8, 16, 32, 512, 1024, 2048)
    facts = [fact(Matmul(m, *weight), us(m, weight)) for weight in shares for m in batches[weight]]
    known = Interpolated(facts, H200)
    for m in (64, 128, 200):
        found, true = known.launch(Matmul(m, 4096, 4096)).us, us(m, (4096, 4096))
        assert found.mid == pytest.approx(true, rel=0.12) and found.low <= true <= found.high


def test_of_relatives_of_one_size_the_very_problem_is_told():
    pages = [DecodeAttention((4096,) * 8, 32, 8, 128, page_size=page) for page in (64, 16, 32)]
    facts = [fact(problem, 100.0 + at) for at, problem in enumerate(pages)]
    family = family_of(DecodeAttention)
    members = Members(np.array([family.size_of(p) for p in pages], dtype=float), facts.__getitem__, family, LIMITS)
    assert [members.launch(problem).us.mid for problem in pages] == [100, 101, 102]
    unusable = Members(np.array([family.size_of(p) for p in pages], dtype=float), [facts[0], None, facts[2]].__getitem__, family, LIMITS)
    assert unusable.launch(pages[1]).us.mid != 101 and "page_size" in unusable.launch(pages[1]).how
    assert Members(np.array([[1.0, 2, 3, 4]]), [None].__getitem__, family, LIMITS).launch(pages[0]) is None


def test_far_beyond_all_that_is_known_is_a_model() -> None:
    """Four times the largest known size is answered from its neighbours' share of the roofline, and is not called measured."""
    known = Interpolated([fact(p) for p in GRID], H200)
    largest = max(p.m for p in GRID)
    for times, origin in ((1, Origin.MEASURED), (2, Origin.MEASURED), (4, Origin.MODELLED)):
        found = known.launch(Matmul(times * largest, 4096, 4096))
        assert found is not None and found.origin is origin, times


def test_where_nobody_measured_a_slow_chip_stays_slow() -> None:
    """Every measured matmul took five times what the model says: so do the sizes that are too far from all of them."""
    model, far = Modelled(H200), Matmul(1_000_000, 64, 64)
    slow = [Known(p, 5 * Range.exact(model.us(p)[0].mid), Origin.MEASURED) for p in GRID]
    plain, scaled = Estimator(H200).launch(far), Estimator(H200, [Interpolated(slow, H200)]).launch(far)
    assert scaled.origin is Origin.MODELLED and "times as long as usual" in scaled.how
    assert scaled.us.mid == pytest.approx(5 * plain.us.mid) and scaled.us.low < scaled.us.mid < scaled.us.high
    published = [dataclasses.replace(one, origin=Origin.REFERENCE) for one in slow]
    assert Estimator(H200, [Interpolated(published, H200)]).launch(far).us == plain.us  # the model is fitted to those
    assert Estimator(H200, [Interpolated(slow[:3], H200)]).launch(far).us == plain.us
