"""Narrower formats compete for a problem up to a stated error, and no further."""

import dataclasses

import pytest
from made_results import made

from klab.harness.choose.choose import choose
from klab.harness.choose.profile import Profile
from klab.harness.choose.select import too_far
from klab.kernels.discover import approximations_of
from klab.kernels.fused_moe.problem import FusedMoe
from klab.kernels.matmul.problem import Matmul
from klab.kernels.scaled_matmul.problem import ScaledMatmul
from klab.kernels.weight_only_matmul.problem import WeightOnlyMatmul

WIDE = Matmul(64, 2048, 1024)
FP8, INT4 = ScaledMatmul(64, 2048, 1024, format="fp8_block"), WeightOnlyMatmul(64, 2048, 1024)


def narrow(problem, level_us, error, kernel="triton_scaled", **changes):
    row = made(problem, kernel, level_us=level_us, **changes)
    return dataclasses.replace(row, wide_key=problem.wide().key, wide_error=error)


def wanted():
    return choose([made(WIDE, "torch")], None).choices[0].wanted


ROWS = [made(WIDE, "torch", level_us=100.0), narrow(FP8, 60.0, 0.03), narrow(INT4, 40.0, 0.12)]


@pytest.mark.parametrize(("limit", "instead", "kernel"), [
    (None, "", "matmul/torch"),
    (0.01, "", "matmul/torch"),
    (0.05, FP8.label(), "scaled_matmul/triton_scaled"),
    (0.2, INT4.label(), "weight_only_matmul/triton_scaled"),
])  # fmt: skip
def test_the_limit_decides_which_formats_compete(limit, instead, kernel):
    (choice,) = choose(ROWS, [wanted()], max_error=limit).choices
    assert (choice.instead, choice.kernel) == (instead, kernel)
    assert (choice.evidence.wide_error is None) == (not instead)
    assert bool(choice.instead_problem) == bool(instead)


def test_an_error_that_nobody_measured_does_not_pass():
    rows = [made(WIDE, "torch"), narrow(FP8, 10.0, None)]
    (choice,) = choose(rows, [wanted()], max_error=0.5).choices
    assert not choice.instead and "not measured" in too_far(rows[1], 0.5)


def test_a_tie_goes_to_the_unquantised():
    rows = [made(WIDE, "torch", level_us=100.0, noise=0.05), narrow(FP8, 100.1, 0.03, noise=0.05)]
    (choice,) = choose(rows, [wanted()], max_error=0.5).choices
    assert not choice.instead


def test_a_plan_in_a_narrow_format_is_held_to_the_limit_too():
    rows = [narrow(FP8, 60.0, 0.03)]
    asked = dataclasses.replace(wanted(), problem_key=FP8.key, label=FP8.label())
    assert choose(rows, [asked], max_error=0.05).choices
    (left,) = choose(rows, [asked], max_error=0.01).open
    assert "0.03 against the unquantised problem" in left.reason


def test_the_profile_says_what_was_given_up():
    profile = choose(ROWS, [wanted()], max_error=0.05)
    again = Profile.from_text(profile.to_text())
    assert again.to_text() == profile.to_text()
    assert again.choices[0].instead == FP8.label() and again.choices[0].instead_problem == FP8.to_json()
    assert any("0.05" in note for note in profile.notes)


@pytest.mark.parametrize("wide", [WIDE, Matmul(3, 50, 70), FusedMoe(4, 256, 128, 8, 2)], ids=lambda p: p.label())
def test_what_approximates_a_problem_says_so(wide):
    found = approximations_of(wide)
    assert found and len({p.key for p in found}) == len(found)
    assert all(p.wide() == wide for p in found)
    assert not [p for one in found for p in approximations_of(one)]
