"""How long a request may take, whom a deadline blames, and who is skipped for what it did before in the run."""

import dataclasses

import pytest

from klab.harness.measure.limits import Limits
from klab.harness.measure.quarantine import Quarantine
from klab.harness.plan.trial import Policy, Trial
from klab.harness.store.result import Status
from klab.kernels.contract import Config
from klab.kernels.matmul.problem import Matmul

FOREVER = float("inf")


@dataclasses.dataclass(frozen=True)
class Knob(Config):
    knob: int = 0


def trial(m, *, kernel="a", knob=0, source="0" * 16):
    return Trial(f"matmul/{kernel}", source, Matmul(m, 8, 8), Knob(knob), "cpu", Policy())


@pytest.mark.parametrize(
    ("remaining_s", "limit_s"), [(FOREVER, 180.0), (3600.0, 180.0), (600.0, 60.0), (100.0, 20.0), (24.0, 12.0), (8.0, 10.0)]
)
def test_preparing_takes_a_part_of_what_is_left(remaining_s, limit_s):
    assert Limits().preparing_s(remaining_s) == limit_s


def test_a_kernel_that_hangs_leaves_time_for_the_others():
    for remaining_s in (25.0, 60.0, 300.0, 3000.0):
        assert Limits().preparing_s(remaining_s) <= max(20.0, remaining_s / 10)
    assert Limits().preparing_s(24.0) == 12.0
    assert Limits().preparing_s(FOREVER) == 180.0


def test_long_rounds_have_their_time_whatever_is_left():
    assert Limits().sampling_s(5.0, 10.0) >= 100.0
    assert Limits().sampling_s(0.0, FOREVER) == 30.0
    assert Limits().sampling_s(0.0, 10.0) == 10.0


@pytest.mark.parametrize(
    ("waited_s", "expected_s", "budget_s", "blamed"),
    [
        (9.0, 0.0, 600.0, False),
        (11.0, 0.0, 600.0, True),
        (11.0, 5.0, 600.0, False),  # a round of 5 s is slow, and no hang
        (8.0, 0.0, 15.0, True),
        (4.0, 0.0, 5.0, False),
    ],
)
def test_who_waited_long_and_much_longer_than_expected_is_blamed(waited_s, expected_s, budget_s, blamed):
    assert Limits().blames(waited_s, expected_s=expected_s, budget_s=budget_s) is blamed


def test_one_hang_skips_the_kernel_on_other_problems_and_nobody_else():
    known = Quarantine()
    known.failed(trial(4), Status.TIMEOUT)
    assert known.verdict(trial(8)) == (Status.TIMEOUT, f"skipped: it hung on {Matmul(4, 8, 8).label()} in this run")
    assert known.verdict(trial(8, knob=1)) is not None
    assert known.verdict(trial(4, knob=1)) is None, "on the same problem it takes two"
    assert known.verdict(trial(8, kernel="b")) is None
    assert known.verdict(trial(8, source="1" * 16)) is None, "the file has changed"


def test_two_crashes_skip_and_other_failures_never_do():
    known = Quarantine()
    known.failed(trial(4), Status.CRASHED)
    assert known.verdict(trial(16)) is None
    known.failed(trial(8), Status.CRASHED)
    assert known.verdict(trial(16)) == (Status.CRASHED, f"skipped: it crashed on {Matmul(8, 8, 8).label()} in this run")
    for m in (4, 8, 16):
        known.failed(trial(m, kernel="b"), Status.INCORRECT)
    assert known.verdict(trial(32, kernel="b")) is None


def test_of_a_kernel_that_works_only_the_configuration_that_failed_is_skipped():
    known = Quarantine()
    known.worked(trial(4, knob=1))
    known.failed(trial(4, knob=0), Status.TIMEOUT)
    assert known.verdict(trial(8, knob=0)) is not None
    assert known.verdict(trial(8, knob=1)) is None
    known.failed(trial(8, knob=1), Status.TIMEOUT)
    assert known.verdict(trial(16, knob=1)) is None, "it has worked before: one more is forgiven"
    known.failed(trial(16, knob=1), Status.TIMEOUT)
    assert known.verdict(trial(32, knob=1)) is not None
