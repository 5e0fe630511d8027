"""The judge itself: what passes, and what must never pass."""

import pytest
import torch

from klab.harness.measure.check import attempt, check, compare, fingerprint, guarded_outputs, poison
from klab.kernels.matmul.problem import Matmul

PROBLEM = Matmul(64, 96, 128, "bfloat16")


def right(inputs, outputs):
    outputs["out"].copy_(inputs["x"].float() @ inputs["w"].float().T)


def judged(spoil=lambda out: None, problem=PROBLEM):
    inputs = problem.inputs(seed=1)
    reference = problem.reference(inputs)
    out = reference["out"].to(inputs["x"].dtype)
    spoil(out)
    return compare(problem, {"out": out}, reference)


def test_one_rounding_passes():
    found = judged()
    assert found.passed
    assert 0 < found.error < found.tolerance


def test_errors_of_many_sizes_are_told_as_they_are():
    # Frobenius error by definition, against a plain computation in float64.
    for seed in range(10):
        inputs = PROBLEM.inputs(seed=seed)
        reference = PROBLEM.reference(inputs)
        out = (reference["out"] * (1 + 0.01 * torch.randn(64, 96))).to(torch.bfloat16)
        want = reference["out"]
        expected = float((out.double() - want).norm() / want.norm())
        assert compare(PROBLEM, {"out": out}, reference).error == pytest.approx(expected, rel=1e-9)


def nan_at(index):
    def spoil(out):
        out.view(-1)[index] = float("nan")

    return spoil


@pytest.mark.parametrize("index", [0, 17, -1])
def test_a_single_nan_never_passes(index):
    found = judged(nan_at(index))
    assert found.error == float("inf")
    assert found.reason.startswith("1 of 6144 elements of out are not finite")


def test_a_wrong_place_is_told_with_the_worst_element():
    """Whoever mends a kernel of another machine has nothing else."""

    def tile(out):
        out[16:32, 8:24] += 50.0
        out[20, 9] = -4096.0

    found = judged(tile).reason
    assert "256 in [16:32, 8:24] of [64, 96], the worst at [20, 9]: -4096, not " in found
    assert "; 1 in [0:1, 5:6] of [64, 96], the worst at [0, 5]: nan, not " in judged(lambda out: out[0, 5].fill_(float("nan"))).reason


def test_infinity_never_passes():
    assert "not finite" in judged(lambda out: out[3, 3].fill_(float("inf"))).reason


def test_one_wild_element_in_many_does_not_hide_in_the_norm():
    big = Matmul(1024, 1024, 64, "bfloat16")

    def spoil(out):
        out[5, 7] += 0.5

    found = judged(spoil, big)
    assert found.error < found.tolerance, "the norm alone would let it pass"
    assert found.reason.startswith("1 elements of out are off by more than 16 tolerances")


def test_rows_that_are_zero_in_the_reference_may_be_zero():
    reference = {"out": torch.zeros(4, 8)}
    assert compare(PROBLEM, {"out": torch.zeros(4, 8)}, reference).passed
    assert not compare(PROBLEM, {"out": torch.full((4, 8), 1e-1)}, reference).passed


def test_references_in_float32_and_integers_are_judged_too():
    want = torch.randn(32, 8)
    assert compare(PROBLEM, {"out": want.to(torch.bfloat16)}, {"out": want}).passed
    assert compare(PROBLEM, {"out": torch.arange(9)}, {"out": torch.arange(9)}).passed
    assert not compare(PROBLEM, {"out": torch.arange(9) + 1}, {"out": torch.arange(9)}).passed


def test_the_wrong_shape_is_said():
    found = compare(PROBLEM, {"out": torch.zeros(3, 3)}, {"out": torch.zeros(3, 4)})
    assert "shape (3, 3), not (3, 4)" in found.reason


def test_unwritten_outputs_are_found():
    assert "not finite" in check(PROBLEM, lambda inputs, outputs: None, seed=0).reason


@pytest.mark.parametrize("where", [-1, 64 * 96])
def test_writing_beside_the_output_is_found_on_both_sides(where):
    def launch(inputs, outputs):
        right(inputs, outputs)
        out = outputs["out"]
        torch.as_strided(out, (1,), (1,), out.storage_offset() + where).fill_(1.0)

    assert check(PROBLEM, launch, seed=0).reason == "wrote outside out"


@pytest.mark.parametrize("row_padding", [0, 8])
def test_changing_an_input_is_found(row_padding):
    def launch(inputs, outputs):
        right(inputs, outputs)
        inputs["w"][0, 0] += 1.0

    assert check(PROBLEM, launch, seed=0, row_padding=row_padding).reason == "changed its input w"


def test_a_right_launch_passes_with_padded_rows():
    assert check(PROBLEM, right, seed=0, row_padding=8).passed


def test_fingerprints_see_every_bit():
    for numel, dtype in [(1, torch.int8), (7, torch.int8), (9, torch.bfloat16), (8, torch.float32), (3, torch.int64), (0, torch.int32)]:
        tensor = torch.zeros(numel, dtype=dtype)
        before = fingerprint({"t": tensor})
        for i in range(numel):
            tensor[i] = 1
            assert fingerprint({"t": tensor}) != before
            tensor[i] = 0
        assert fingerprint({"t": tensor}) == before
    part = torch.zeros(33, dtype=torch.int8)[1:]
    assert fingerprint({"t": part}) == {"t": 0}, "an address that no word starts at"


def test_poison_and_guards_are_in_place_before_a_launch():
    outputs, trespass = guarded_outputs(PROBLEM, "cpu")
    poison(outputs)
    assert outputs["out"].isnan().all()
    assert trespass() == ""
    written, wrong = attempt(PROBLEM, right, PROBLEM.inputs(seed=3), device="cpu")
    assert wrong == ""
    assert written["out"].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.int32])
def test_finite_poison_is_large_finite_and_the_same_everywhere(dtype):
    outputs = {"out": torch.zeros(8, dtype=dtype)}
    poison(outputs, finite=True)
    values = outputs["out"].double()
    assert values.isfinite().all()
    assert (values == values[0]).all()
    assert values[0] >= 448.0


def test_finite_poison_cannot_be_learned():
    def drawn():
        outputs = {"out": torch.zeros(1)}
        poison(outputs, finite=True)
        return float(outputs["out"])

    assert len({drawn() for _ in range(4)}) > 1


def test_an_element_left_at_finite_poison_does_not_pass():
    def leaves_one(inputs, outputs):
        kept = outputs["out"][0, 0].clone()
        right(inputs, outputs)
        outputs["out"][0, 0] = kept

    inputs = PROBLEM.inputs(seed=4)
    outputs, wrong = attempt(PROBLEM, leaves_one, inputs, device="cpu", finite=True)
    assert wrong == ""
    assert not compare(PROBLEM, outputs, PROBLEM.reference(inputs)).passed
