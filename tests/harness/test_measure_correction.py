"""Devices of one kind compared: whose row it is, how much slower that device is, and what is left when nobody knows."""

import dataclasses
import random
import statistics

import pytest
from made_results import made

from klab.harness.choose.candidates import candidates
from klab.harness.choose.choose import choose
from klab.harness.choose.compare import ratio
from klab.harness.choose.profile import Profile
from klab.harness.measure.calibration import Calibration, Figure, write_calibration
from klab.harness.measure.correction import Correction, corrected, measured_us
from klab.harness.store.journal import Journal
from klab.harness.store.result import Result
from klab.kernels.matmul.problem import Matmul

FAST, SLOW, THIRD = "GPU-fast-000", "GPU-slow-000", "GPU-third-00"
COMPUTE, MEMORY = Matmul(8192, 8192, 8192), Matmul(1, 8192, 8192)


def row(device, kernel="torch", problem=COMPUTE, *, level_us=100.0, anchors=None, **changes):
    found = made(problem, kernel, level_us=level_us, noise=0.002, **changes)
    build = dict(found.build) | ({"anchors": anchors} if anchors else {})
    return dataclasses.replace(found, device_uuid=device, epoch=changes.get("epoch", "e1"), build=build)


def anchors(matmul_us=700.0, copy_us=260.0, rounds=20):
    noise = [1 + 0.001 * (i % 5 - 2) for i in range(rounds)]
    return {name: {"us": [us * n for n in noise], "mhz": [1500.0] * rounds} for name, us in (("matmul", matmul_us), ("copy", copy_us))}


def calibration(device, matmul_us, copy_us=260.0, epoch="e1"):
    figures = {"matmul": Figure(matmul_us, matmul_us * 0.998, matmul_us * 1.002), "copy": Figure(copy_us, copy_us * 0.999, copy_us * 1.001)}
    return Calibration(device, "NVIDIA H200", "h200", "2026-11-20T10:00:00Z", epoch, anchors=figures)


def calibrations(*found):
    return {one.device_uuid: one for one in found}


BOTH = calibrations(calibration(FAST, 686.0), calibration(SLOW, 714.0))


def test_two_devices_that_differ_are_brought_together_and_say_so():
    rows = [row(FAST, level_us=98.0), row(SLOW, level_us=102.0, kernel="triton_tiled")]
    (fast, slow), notes = corrected(rows, BOTH)
    assert fast.median_us / slow.median_us == pytest.approx(1.0, rel=0.003)
    assert fast.median_us > rows[0].median_us, "the faster device's time is made a typical one's"
    said = slow.build["corrected"]
    assert (said["device"], said["anchor"], said["source"]) == (SLOW, "matmul", "calibration of 2026-11-20")
    assert said["value"] == pytest.approx(714 / 700)
    assert measured_us(slow) == said["measured_us"] == rows[1].median_us
    assert slow.samples_us == rows[1].samples_us, "what was measured stays"
    assert slow.q1_us == pytest.approx(rows[1].q1_us / said["value"])
    assert "GPU-fast-000 x0.980, GPU-slow-000 x1.020" in notes[0]
    assert Result.from_json(slow.to_json()).build["corrected"] == said


def test_the_interval_is_wider_by_the_anchors_own():
    before = row(SLOW)
    after, _ = corrected([before, row(FAST)], BOTH)
    wider = after[0]
    assert (wider.ci_high_us - wider.ci_low_us) / wider.median_us > (before.ci_high_us - before.ci_low_us) / before.median_us + 0.003
    assert wider.ci_low_us <= wider.median_us <= wider.ci_high_us


def test_the_bound_says_which_anchor():
    known = calibrations(calibration(FAST, 686.0, 250.0), calibration(SLOW, 714.0, 250.0))
    correction = Correction([row(FAST), row(SLOW)], known)
    assert correction.factor(row(SLOW)).value == pytest.approx(714 / 700)
    assert correction.factor(row(SLOW, problem=MEMORY)).anchor == "copy"
    assert correction.factor(row(SLOW, problem=MEMORY)).value == 1.0


def test_anchors_in_the_same_laps_stand_before_calibrations():
    rows = [row(FAST, anchors=anchors(690.0)), row(SLOW, anchors=anchors(750.0)), row(SLOW, problem=MEMORY)]
    correction = Correction(rows, BOTH)
    found = correction.factor(rows[1])
    assert (found.source, found.value) == ("in the same laps", pytest.approx(750 / 720))
    assert found.low < found.value < found.high
    # A row without anchors of its own goes by those of its device's other rows.
    assert correction.factor(row(SLOW)).source == "anchors beside 1 of its results"


def test_where_only_some_devices_ran_with_anchors_the_calibrations_decide_for_all():
    rows = [row(FAST, anchors=anchors(400.0)), row(SLOW)]
    assert Correction(rows, BOTH).factor(rows[0]).source == "calibration of 2026-11-20"


@pytest.mark.parametrize(
    ("rows", "known"),
    [
        ([row(FAST), row(FAST, "triton_tiled")], BOTH),  # one device: nothing to compare
        ([row(FAST), row(SLOW)], {}),
        ([row(FAST), row(SLOW)], calibrations(calibration(FAST, 686.0))),
        ([row(FAST), row(SLOW)], calibrations(calibration(FAST, 686.0), calibration(SLOW, 714.0, epoch="another driver"))),
        ([row(FAST), row(SLOW)], calibrations(calibration(FAST, 100.0), calibration(SLOW, 714.0))),  # not two boards in one state
        ([row(FAST), row(SLOW)], calibrations(calibration(FAST, 570.0), calibration(SLOW, 830.0))),  # 46% apart, 19% off their middle
        ([row("", "torch"), row("", "triton_tiled")], BOTH),  # rows that name no device
    ],
)
def test_what_is_not_known_corrects_nothing(rows, known):
    after, _ = corrected(rows, known)
    assert after == rows


def test_a_device_without_anchors_is_named():
    rows = [row(FAST), row(SLOW), row(THIRD)]
    after, notes = corrected(rows, BOTH)
    assert after[2] == rows[2]
    assert all(f"no {anchor} anchor, or one far off: {THIRD}" in line for line, anchor in zip(notes, ("matmul", "copy"), strict=True))
    assert "compared without a correction" in corrected(rows)[1][0]


def test_a_board_that_is_far_off_is_left_out_and_the_others_are_compared():
    known = BOTH | calibrations(calibration(THIRD, 1400.0))
    rows = [row(FAST), row(SLOW), row(THIRD)]
    after, notes = corrected(rows, known)
    assert after[2] == rows[2]
    assert after[0].build["corrected"]["value"] == pytest.approx(686 / 700)
    assert sum("GPU-third-00 x" in line for line in notes) == 1, "its copy is like the others'"
    assert any("no matmul anchor, or one far off: GPU-third-00" in line for line in notes)


def test_correcting_twice_changes_nothing():
    rows, _ = corrected([row(FAST), row(SLOW)], BOTH)
    again, _ = corrected(rows, BOTH)
    assert again == rows


def test_machines_with_the_same_cpu_are_devices_too():
    def on(host, level):
        place = {"kind": "cpu", "host": host}
        return dataclasses.replace(row("", level_us=level, chip="cpu"), environment=place, device="Example CPU")

    rows = [on("aaaa", 100.0), on("bbbb", 104.0)]
    known = calibrations(calibration("cpu-aaaa", 1000.0, 500.0), calibration("cpu-bbbb", 1040.0, 520.0))
    after, _ = corrected(rows, known)
    assert after[0].median_us / after[1].median_us == pytest.approx(1.0, rel=0.003)


def test_a_comparison_of_two_devices_is_labelled_and_one_in_the_same_laps_is_left_alone():
    rows, _ = corrected([row(FAST, "torch", level_us=98.0), row(SLOW, "triton_tiled", level_us=102.0)], BOTH)
    a, b = candidates(rows)
    found = ratio(a, b)
    assert found.how == "separate, corrected"
    assert found.low < found.ratio < found.high
    assert found.tied
    # Two kernels in one contest on one device: the ratio of their rounds needs no correction, and gets none.
    contest = {"contest": {"id": "c1", "contestants": 2}}
    same = [dataclasses.replace(row(SLOW, k, level_us=us), build=contest) for k, us in (("torch", 100.0), ("triton_tiled", 90.0))]
    moved, _ = corrected([*same, row(FAST)], BOTH)
    raw, after = ratio(*candidates(same)), ratio(*candidates(moved[:2]))
    assert (raw.how, raw.ratio, raw.low, raw.high) == (after.how, after.ratio, after.low, after.high)


def test_the_choice_is_not_who_had_the_faster_board():
    """A kernel that is 2% faster, measured on a board that is 4% slower, is chosen."""
    rows = [row(FAST, "torch", level_us=98.0), row(SLOW, "triton_tiled", level_us=102.0 * 0.98)]
    assert choose(rows, None).choices[0].kernel == "matmul/torch"
    after, _ = corrected(rows, BOTH)
    profile = choose(after, None)
    chosen = profile.choices[0]
    assert chosen.kernel == "matmul/triton_tiled"
    assert chosen.evidence.measured_us == rows[1].median_us
    assert chosen.evidence.median_us < chosen.evidence.measured_us
    assert any("corrected for the device" in note for note in profile.notes)
    assert Profile.from_text(profile.to_text()).to_text() == profile.to_text()


def test_over_many_pairs_of_boards_the_corrected_interval_holds_the_truth():
    """Boards that differ by up to 5%, an anchor that feels the board as the kernel does: the corrected ratio of one kernel is 1."""
    draw = random.Random(5)
    covered, raw_covered, ratios = 0, 0, []
    for i in range(40):
        boards = [1 + draw.uniform(-0.025, 0.025) for _ in range(2)]
        rows = [
            row(d, level_us=100 * b, seed=i * 2 + j, anchors=anchors(700 * b))
            for j, (d, b) in enumerate(zip((FAST, SLOW), boards, strict=True))
        ]
        (a, b), _ = corrected(rows)
        covered += a.ci_low_us <= b.ci_high_us and b.ci_low_us <= a.ci_high_us
        raw_covered += rows[0].ci_low_us <= rows[1].ci_high_us and rows[1].ci_low_us <= rows[0].ci_high_us
        ratios.append(a.median_us / b.median_us)
    assert covered >= 38
    assert raw_covered < 15
    assert statistics.pstdev(ratios) < 0.003


def test_the_table_of_results_names_the_device_and_the_corrected_time(klab, tmp_path):
    journal = Journal(tmp_path, "run-1")
    for one in (row(FAST, level_us=98.0), row(SLOW, "triton_tiled", level_us=102.0)):
        journal.append(one)
    code, out, _ = klab("results", "--results", tmp_path)
    assert code == 0
    assert "corrected us" in out, "there are two devices: each row says whose it is"
    assert "GPU-fast-000"[:12] in out
    for one in BOTH.values():
        write_calibration(one, tmp_path)
    _, out, said = klab("results", "--results", tmp_path)
    assert "x0.980" in said
    cells = [line.split("│")[-2].strip() for line in out.splitlines() if "GPU-" in line]
    assert len(cells) == 2
    assert all(cell.split()[0].startswith(("99", "100")) for cell in cells), cells


def test_one_device_has_no_such_columns(klab, tmp_path):
    Journal(tmp_path, "run-1").append(row(FAST))
    _, out, _ = klab("results", "--results", tmp_path)
    assert "corrected us" not in out
