"""Grades by hand-made figures: limits, intervals, and what is said of a machine as a whole."""

import pytest

from klab.harness.watch.grade import Check, Checks, Expectation, Figure, Grade, Outcome, findings, judge, number, outcome, worst

RATE = Expectation("matmul_tflops", low=700, high=800, warn_below=680, fail_below=610, source="a datasheet")


@pytest.mark.parametrize(
    ("figure", "grade", "reason"),
    [
        (Figure(760), Grade.PASS, ""),
        (Figure(690, 670, 700), Grade.PASS, ""),
        (Figure(670), Grade.WARN, "below 680"),
        (Figure(600, 595, 605), Grade.FAIL, "below 610"),
        (Figure(605, 590, 620), Grade.WARN, "its interval reaches beyond"),
        (Figure(600), Grade.FAIL, "below 610"),
    ],
)
def test_a_device_fails_only_where_its_interval_lies_beyond_the_limit(figure, grade, reason):
    found = judge(figure, RATE)
    assert found[0] is grade
    assert reason in found[1]


def test_limits_above_work_as_those_below():
    hot = Expectation("load_temperature_c", warn_above=80, fail_above=90)
    assert judge(Figure(70), hot)[0] is Grade.PASS
    assert judge(Figure(85), hot) == (Grade.WARN, "above 80")
    assert judge(Figure(91, 89, 93), hot)[0] is Grade.WARN
    assert judge(Figure(95, 94, 96), hot) == (Grade.FAIL, "above 90")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_no_number_is_no_pass(value):
    assert judge(Figure(value), RATE)[0] is Grade.UNKNOWN


def test_an_expectation_without_a_limit_can_pass_nothing():
    assert judge(Figure(1), Expectation("matmul_tflops", low=700, high=800))[0] is Grade.UNKNOWN


def test_nobody_knows_what_to_expect_is_not_a_pass():
    assert judge(Figure(760), None)[0] is Grade.UNKNOWN


def test_what_is_said_of_a_machine():
    fine, warned, failed = (Check("t", "n", g.value) for g in (Grade.PASS, Grade.WARN, Grade.FAIL))
    unknown, needed = Check("t", "n", Grade.UNKNOWN.value), Check("t", "n", Grade.UNKNOWN.value, needed=True)
    assert outcome([fine]) is Outcome.ACCEPTED
    assert outcome([fine, unknown]) is Outcome.ACCEPTED
    assert outcome([fine, warned, unknown]) is Outcome.WARNINGS
    assert outcome([fine, warned, needed]) is Outcome.UNDECIDED
    assert outcome([needed, failed]) is Outcome.REFUSED
    assert outcome([]) is Outcome.UNDECIDED


def test_exit_codes():
    assert [o.exit_code() for o in (Outcome.ACCEPTED, Outcome.WARNINGS, Outcome.UNDECIDED, Outcome.REFUSED)] == [0, 0, 3, 1]
    assert [o.exit_code(strict=True) for o in (Outcome.ACCEPTED, Outcome.WARNINGS, Outcome.UNDECIDED, Outcome.REFUSED)] == [0, 3, 3, 1]


def test_a_pass_carries_neither_reason_nor_remedy():
    add = Checks(2).on("settings")
    add.holds("persistence", True, "on", "on", reason="off is bad", remedy="set it")
    add.holds("MIG", False, "on", "off", reason="a slice", remedy="switch it off")
    add.measured("copy", "GB/s", Figure(4300), Expectation("copy_gb_per_s", fail_below=4000), remedy="another board")
    assert [(c.grade, c.reason, c.remedy, c.device) for c in add.found] == [
        ("pass", "", "", 2), ("fail", "a slice", "switch it off", 2), ("pass", "", "", 2)
    ]  # fmt: skip


def test_findings_join_devices_and_unknown_checks():
    checks = [Check("links", "PCIe width", Grade.FAIL.value, str(8), reason="below 16", device=d) for d in (0, 1, 2, 5)]
    checks += [Check("t", name, Grade.UNKNOWN.value, reason="it hung", device=7) for name in ("copy", "matmul")]
    checks += [Check("t", "clock", Grade.PASS.value, device=1), Check("t", "spread", Grade.WARN.value, "6%", reason="x")]
    found = findings(checks)
    assert [(f.grade, f.devices, f.names) for f in found] == [
        ("fail", "0-2, 5", "PCIe width"), ("warn", "machine", "spread"), ("not known", "7", "copy, matmul")
    ]  # fmt: skip
    assert worst(checks)[-1].name == "clock"


def test_numbers_are_short():
    assert [number(v) for v in (4308.4, 788.2, 0.0312, 18, 4.21)] == ["4,308", "788", "0.0312", "18", "4.21"]
