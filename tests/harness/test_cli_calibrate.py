"""`klab calibrate` as a user runs it on this CPU, and the verbs that use what it stored."""

import json

import pytest
from made_results import contest
from test_measure_calibration import GPU, made
from test_report_script import unpacked

from klab.harness.measure.calibration import Figure, read_calibrations, write_calibration
from klab.harness.store.journal import Journal


def test_it_measures_stores_and_shows(klab, tmp_path):
    code, out, said = klab("calibrate", "--chip", "cpu", "--only", "launch", "--results", tmp_path, "--json")
    assert code == 0, said
    (found,) = read_calibrations([tmp_path]).values()
    assert json.loads(out) == found.to_json()
    assert found.device_uuid.startswith("cpu-")
    assert 0 < found.launch_overhead_us.low <= found.launch_overhead_us.value <= found.launch_overhead_us.high
    assert found.graph_overhead_us.reason == "a CPU has no graphs"
    assert "copy_gb_per_s" not in found.to_json(), "it was not asked for"
    assert "stored in" in said
    code, out, _ = klab("calibrate", "--show", "--results", tmp_path)
    assert code == 0
    assert "launch, us" in out
    assert found.device_uuid in out


def test_what_cannot_be_done_is_one_line(klab, tmp_path):
    code, _, said = klab("calibrate", "--chip", "cpu", "--only", "fan", "--results", tmp_path)
    assert (code, len(said.strip().splitlines())) == (2, 1)
    assert "it has anchors, launch, matmul, sensor" in said
    code, _, said = klab("calibrate", "--chip", "h200", "--results", tmp_path)
    assert (code, len(said.strip().splitlines())) == (4, 1)
    assert "not in this machine" in said
    code, _, said = klab("calibrate", "--show", "--results", tmp_path)
    assert code == 0
    assert "no device is calibrated here" in said


def test_a_calibration_that_is_torn_is_told(klab, tmp_path):
    path = write_calibration(made(), tmp_path)
    path.with_name("torn.json").write_text("{")
    code, out, said = klab("calibrate", "--show", "--results", tmp_path)
    assert code == 0
    assert "torn.json" in said
    assert "77% of 989.4" in out, "the measured peak beside the specification's"
    assert "8192x8192x8192, 1,500 MHz" in out


def test_a_board_without_a_sensor_says_so_once(klab, tmp_path):
    none = Figure.missing("NVML: not supported")
    names = [f"{who}_{what}_ms" for who in ("sensor", "average", "counter") for what in ("period", "window")]
    write_calibration(made(**dict.fromkeys(names, none)), tmp_path)
    _, out, _ = klab("calibrate", "--show", "--results", tmp_path)
    assert out.count("NVML: not supported") == 1


def test_a_plan_by_measured_peaks_says_what_is_measured(klab, tmp_path):
    write_calibration(made(), tmp_path)
    how = ("plan", "--model", "qwen3-0.6b", "--chip", "h200", "--isl", 512, "--osl", 16, "--batch", 8, "--json")
    specified = [json.loads(line) for line in klab(*how)[1].splitlines()]
    code, out, said = klab(*how, "--measured", "--results", tmp_path)
    assert code == 0
    own = [json.loads(line) for line in out.splitlines()]
    assert f"{GPU} reached on 2026-11-20 (measured)" in said
    assert "float8_e4m3fn" in said.split("not measured:")[1]
    slower = {"compute": 989.4 / 760.0, "memory": 4800.0 / 4100.0}
    rows = [(a, b) for a, b in zip(specified, own, strict=True) if a["type"] == "row" and a["limit"] == b["limit"]]
    assert rows
    assert all(b["bound_us"] / a["bound_us"] == pytest.approx(slower[a["limit"]]) for a, b in rows)
    code, _, said = klab(*how[:4], "b200", *how[5:], "--measured", "--results", tmp_path)
    assert code == 2
    assert "no device of b200 is calibrated" in said


def test_the_report_shows_the_share_of_the_measured_peak(klab, tmp_path):
    journal = Journal(tmp_path, "run-1")
    for row in contest("h200"):
        journal.append(row)
    write_calibration(made(device_uuid="GPU-0"), tmp_path)
    write_calibration(made(device_uuid="GPU-of-another-chip", chip="b200"), tmp_path)
    assert klab("report", "--chip", "h200", "--results", tmp_path, "--out", tmp_path / "page.html")[0] == 0
    page = (tmp_path / "page.html").read_text()
    drawn = unpacked(page, "klab-payload")
    assert "another-chip" not in page + drawn
    assert "of what klab calibrate measured" in page
    assert "Peak bfloat16, measured" in page
    assert "bf16 calibrated on GPU-0" in drawn
