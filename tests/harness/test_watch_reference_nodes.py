"""What is expected of a chip: published files, recorded devices, and limits that a good device rarely meets."""

import random
from pathlib import Path

import pytest

from klab.harness.catalog.chips import find_chip
from klab.harness.catalog.models import PROFILES
from klab.harness.watch.grade import Figure, Grade, judge
from klab.harness.watch.reference_nodes import (
    FEW,
    MEASURES,
    RecordedDevice,
    distributions,
    find_reference,
    kind_of,
    read_published,
    record,
)
from klab.kernels.errors import UsageError


def device(name, at="2026-11-20T00:00:00+00:00", chip="h200", **figures):
    return RecordedDevice(chip, name, at, figures)


@pytest.mark.parametrize("chip", ["h100", "h200", "b200"])
def test_published_files_agree_with_the_chips_limits(chip):
    name, expected = read_published(PROFILES / "acceptance" / f"{chip}.toml")
    limits = find_chip(chip)
    assert name == chip
    assert {"matmul_tflops", "copy_gb_per_s", "nvlinks_active", "pcie_width"} <= set(expected) <= set(MEASURES)
    assert expected["matmul_tflops"].high < limits.peak_tflops["bfloat16"]
    assert expected["copy_gb_per_s"].high < limits.memory_gb_per_s
    assert expected["peer_gb_per_s"].high < limits.link_gb_per_s
    assert expected["load_clock_mhz"].high == limits.max_clock_mhz
    for one in expected.values():
        assert one.source
        steps = [v for v in (one.fail_below, one.warn_below, one.low, one.high, one.warn_above, one.fail_above) if v is not None]
        assert steps == sorted(steps), one.name


def test_a_chip_that_nobody_knows_is_expected_of_nothing():
    found = find_reference("nonesuch")
    assert found.expected == {}
    assert "nothing" in found.said


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("chip = 3", "a reference has chip"),
        ('chip = "h200"\n[expected.speed]\nlow = 1\nsource = "x"', "no measure"),
        ('chip = "h200"\n[expected.copy_gb_per_s]\nlow = 1', "needs a source"),
        ('chip = "h200"\n[expected.copy_gb_per_s]\nlow = "fast"\nsource = "x"', "must be a number"),
        ('chip = "h200"\n[expected.copy_gb_per_s]\nlow = true\nsource = "x"', "must be a number"),
        ('chip = "h200"\n[expected.copy_gb_per_s]\nleast = 1\nsource = "x"', "has least"),
        ('chip = "h200"\nowner = "me"\n[expected]', "not owner"),
        ('chip = "h200"\n[expected.copy_gb_per_s]\nlow = 1\nsource = "x"', "could only pass"),
        ('chip = "h200"\n[expected.copy_gb_per_s]\nwarn_above = 1\nsource = "x"', "needs warn_below or fail_below"),
        ("chip = ", "is not TOML"),
    ],
)
def test_a_file_that_cannot_be_used_says_why(tmp_path, text, said):
    (tmp_path / "own.toml").write_text(text)
    with pytest.raises(UsageError, match=said):
        find_reference(str(tmp_path / "own.toml"))


def test_a_missing_file_is_one_clear_line():
    with pytest.raises(UsageError, match="no such file"):
        find_reference("elsewhere/own.toml")


def test_recorded_devices_replace_published_figures_when_there_are_enough(tmp_path):
    for i in range(FEW - 1):
        record(tmp_path, device(f"gpu-{i}", matmul_tflops=760.0 + i))
    few = find_reference("h200", [tmp_path])
    assert few.devices == FEW - 1
    assert few.expected["matmul_tflops"].label == "reference"
    record(tmp_path, device("gpu-9", matmul_tflops=765.0))
    enough = find_reference("h200", [tmp_path]).expected
    assert (enough["matmul_tflops"].label, enough["matmul_tflops"].devices) == ("recorded", FEW)
    assert enough["copy_gb_per_s"].label == "reference", "of which nothing was recorded"


def test_a_device_that_is_recorded_again_counts_once_and_the_newest_counts(tmp_path):
    for i in range(FEW):
        record(tmp_path, device(f"gpu-{i}", matmul_tflops=760.0))
    older, newer = tmp_path / "older", tmp_path / "newer"
    record(older, device("gpu-0", at="2026-01-01T00:00:00+00:00", matmul_tflops=1.0))
    record(newer, device("gpu-0", at="2026-12-01T00:00:00+00:00", matmul_tflops=770.0))
    found = find_reference("h200", [tmp_path, older, newer])
    assert found.devices == FEW
    assert found.expected["matmul_tflops"].high == 770.0


def test_files_of_others_are_notes_and_never_fatal(tmp_path):
    folder = tmp_path / "h200"
    folder.mkdir()
    (folder / "torn.json").write_text('{"chip": "h200", "dev')
    (folder / "list.json").write_text("[1, 2]")
    (folder / "other.json").write_text('{"chip": "b200", "device": "gpu-1", "at": "x"}')
    (folder / "strange.json").write_text('{"chip": "h200", "device": "gpu-2", "at": "x", "figures": {"matmul_tflops": "fast"}}')
    found = find_reference("h200", [tmp_path])
    assert found.devices == 0
    assert len(found.notes) == 4
    assert found.expected["matmul_tflops"].label == "reference"


def test_limits_pass_good_devices_and_refuse_bad_ones():
    """200 pools of devices that differ by 1.5%: of good further devices few are warned of and fewer refused; 8% slower ones are seen."""
    chance = random.Random(7)
    warned = refused = seen = 0
    for _ in range(200):
        pool = [device(f"gpu-{i}", matmul_tflops=760 * chance.gauss(1, 0.015)) for i in range(12)]
        expected = distributions(pool)["matmul_tflops"]
        good = judge(Figure(760 * chance.gauss(1, 0.015)), expected)[0]
        warned += good is not Grade.PASS
        refused += good is Grade.FAIL
        seen += judge(Figure(0.92 * 760 * chance.gauss(1, 0.005)), expected)[0] is not Grade.PASS
    assert warned <= 0.08 * 200
    assert refused <= 0.01 * 200
    assert seen >= 0.95 * 200


def test_limits_of_few_devices_are_as_the_documentation_says():
    """Of good devices that differ by 3%, with 5 to 8 in the record, about 6% are warned of and 0.7% refused at worst."""
    chance = random.Random(11)
    for count in (5, 8):
        found = []
        for _ in range(1500):
            pool = [device(f"gpu-{i}", matmul_tflops=760 * chance.gauss(1, 0.03)) for i in range(count)]
            found.append(judge(Figure(760 * chance.gauss(1, 0.03)), distributions(pool)["matmul_tflops"])[0])
        assert found.count(Grade.PASS) >= 0.925 * 1500
        assert found.count(Grade.FAIL) <= 0.012 * 1500


def test_one_bad_device_in_the_record_does_not_hide_the_next(tmp_path):
    pool = [device(f"gpu-{i}", matmul_tflops=760.0 + i % 3) for i in range(7)] + [device("gpu-bad", matmul_tflops=500.0)]
    assert judge(Figure(690.0), distributions(pool)["matmul_tflops"])[0] is Grade.FAIL


def test_alike_devices_in_the_record_do_not_make_the_limits_absurdly_narrow():
    expected = distributions([device(f"gpu-{i}", matmul_tflops=760.0) for i in range(20)])["matmul_tflops"]
    rates = {0.99: Grade.PASS, 0.97: Grade.WARN, 0.955: Grade.WARN, 0.94: Grade.FAIL}
    assert {share: judge(Figure(760.0 * share), expected)[0] for share in rates} == rates


def test_less_is_better_of_an_overhead():
    pool = [device(f"gpu-{i}", launch_overhead_us=4.0 + 0.05 * i) for i in range(6)]
    expected = distributions(pool)["launch_overhead_us"]
    assert expected.warn_below is None
    assert judge(Figure(3.0), expected)[0] is Grade.PASS
    assert judge(Figure(9.0), expected)[0] is Grade.FAIL


def test_few_devices_give_no_distribution():
    assert distributions([device("a", matmul_tflops=1.0), device("b", matmul_tflops=2.0)]) == {}


def test_the_example_of_the_documentation_is_a_reference(tmp_path):
    text = (Path(__file__).parents[2] / "docs/acceptance.md").read_text(encoding="utf-8")
    (tmp_path / "own.toml").write_text(text.split("```toml\n")[1].split("```")[0])
    found = find_reference(str(tmp_path / "own.toml"))
    assert (found.name, found.expected["matmul_tflops"].fail_below) == ("h200", 700)


def test_cpus_are_compared_with_their_own_kind():
    assert kind_of(find_chip("h200")) == "h200"
    assert kind_of(find_chip("cpu")) not in ("cpu", "")
