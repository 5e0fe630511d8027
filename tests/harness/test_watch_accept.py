"""Acceptance of machines that are not there: a good one passes, and each planted fault is found, named and graded."""

import dataclasses
import json

import pytest
from fake_node import Board, FakeNvml, FakeRunner, node_of

from klab.harness.catalog.chips import find_chip
from klab.harness.measure.anchor import work
from klab.harness.measure.calibration import Calibration
from klab.harness.measure.calibration import Figure as Known
from klab.harness.watch.accept import Node, accept, find_node, judge_host
from klab.harness.watch.grade import Grade, Outcome
from klab.harness.watch.node_runner import Said
from klab.harness.watch.reference_nodes import FEW, find_reference, record
from klab.kernels.errors import CannotMeasure

H200 = find_chip("h200")
PUBLISHED = find_reference("h200")


@pytest.fixture(autouse=True)
def a_good_host(monkeypatch):
    monkeypatch.setattr("klab.harness.watch.accept.host", lambda folder: {"governor": "performance", "quota": None, "cpus": 192})
    monkeypatch.setattr("klab.harness.measure.environment.checkout", lambda: {"commit": "0123456789abcdef", "dirty": False})


def run(boards, *, reference=PUBLISHED, seconds=400.0, library=None, **more):
    library = library or FakeNvml(boards)
    return accept(
        H200, reference, minutes=10, node=node_of(boards, library), runner=FakeRunner(boards, seconds=seconds), **more
    )  # fmt: skip


def grades(found, name):
    return {check.device: check.grade for check in found.checks if check.name == name}


def the(found, name, device=0):
    (check,) = [check for check in found.checks if check.name == name and check.device == device]
    return check


def test_a_good_machine_is_accepted_and_everything_is_known():
    found = run([Board(i) for i in range(8)], expected_gpus=8)
    assert found.outcome is Outcome.ACCEPTED
    assert {check.grade for check in found.checks} == {"pass"}
    assert len({check.name for check in found.checks if check.device == 0}) >= 35
    for check in found.checks:
        assert check.value, check.name
        assert check.expected or check.unit, check.name


def test_what_was_run_is_said_and_the_load_is_on_all_devices_at_the_same_time():
    boards = [Board(i) for i in range(3)]
    runner = FakeRunner(boards)
    found = accept(H200, PUBLISHED, minutes=10, node=node_of(boards), runner=runner)
    works = [job.work for job in runner.jobs]
    assert works == ["links"] + ["first"] * 3 + ["probe"] * 12 + ["sustain"] * 3
    assert runner.jobs[0].visible.count(",") == 2
    assert runner.jobs[-1].seconds > 500
    assert len(found.ran) == 4


# (what is wrong with the board, the check that finds it, its grade, a part of its reason)
FAULTS = [
    ({"tflops": 580.0}, "sustained matmul", "fail", "below 610"),
    ({"tflops": 670.0}, "sustained matmul", "warn", "below 680"),
    ({"copy_gb_per_s": 3700.0}, "copy bandwidth", "fail", "below 3,850"),
    ({"host_gb_per_s": 24.0}, "host to GPU", "fail", "below 28"),
    ({"drop": 0.15}, "steadiness", "fail", "slows down as it warms"),
    ({"drop": 0.06}, "steadiness", "warn", "slows down as it warms"),
    ({"lines": {"tflops": 480.0}}, "slowest half minute", "fail", "did not hold"),
    ({"lines": {"tflops": 685.0}}, "slowest half minute", "warn", "did not hold"),
    ({"lines": {"pcie_width": 8}}, "PCIe width", "fail", "below 16"),
    ({"lines": {"pcie_generation": 1}}, "PCIe generation", "warn", "fell to 1"),
    ({"noise": 0.05}, "noise of the matmul", "warn", "differ by so much"),
    ({"noise": 0.12}, "noise of the copy", "fail", "differ by so much"),
    ({"clock_mhz": 1100.0}, "clock under load", "warn", "below 1,200"),
    ({"power_w": 420.0, "reasons": 0}, "power under load", "warn", "something else holds it back"),
    ({"margin_c": 2.0}, "margin to slowdown", "warn", "below 5"),
    ({"margin_c": -3.0}, "margin to slowdown", "fail", "below 0"),
    ({"memory_temperature_c": 97.0}, "memory temperature", "warn", "above 95"),
    ({"memory_temperature_c": 97.0, "facts": {"thresholds": {2: 95}}}, "memory temperature", "fail", "above 95"),
    ({"reasons": 0x44}, "thermal throttling", "fail", "held back"),
    ({"reasons": 0x80}, "power brake", "fail", "held back"),
    ({"reasons": 0x2}, "clock setting", "warn", "held back"),
    ({"wrong": 1}, "right results", "fail", "silent corruption"),
    ({"wrong_at_first": "the product is wrong by 0.5 of its norm"}, "right results", "fail", "wrong by 0.5"),
    ({"words_wrong": 3}, "whole memory", "fail", "not read back"),
    ({"facts": {"memory_tested": 60_000_000_000}}, "whole memory", "warn", "in use"),
    ({"error": "killed by SIGABRT: CUDA error"}, "processes", "fail", "died, hung"),
    ({"xids": (79,)}, "Xid", "fail", "errors during the run"),
    ({"xids": (43, 63)}, "Xid", "warn", "errors during the run"),
    ({"facts": {"memory": 80 << 30}}, "memory", "fail", "missing"),
    ({"facts": {"mig": 1}}, "MIG", "fail", "slice"),
    ({"facts": {"recovery": 2}}, "recovery action", "fail", "asks for it"),
    ({"facts": {"inforom": False}}, "InfoROM", "fail", "checksum"),
    ({"facts": {"fabric": (2, 0)}}, "NVSwitch fabric", "fail", "not registered"),
    ({"facts": {"persistence": 0}}, "persistence", "warn", "loads the driver anew"),
    ({"facts": {"power_limit": 650}}, "power limit", "warn", "7% less power"),
    ({"facts": {"power_limit": 500}}, "power limit", "fail", "29% less power"),
    ({"facts": {"application_clock": 1500}}, "maximum clock", "warn", "application clocks"),
    ({"facts": {"processes": 2}}, "other processes", "warn", "compute on it"),
    ({"facts": {"ecc": 0}}, "ECC", "fail", "neither corrected nor seen"),
    ({"facts": {"ecc_uncorrected_ever": 4}}, "uncorrected errors", "warn", "in the past"),
    ({"grows": {"ecc_uncorrected": 1, "ecc_uncorrected_ever": 1}}, "uncorrected errors", "fail", "during this run"),
    ({"grows": {"ecc_corrected": 9}}, "corrected errors", "warn", "errs under load"),
    ({"facts": {"sram": 1}}, "SRAM errors", "fail", "threshold"),
    ({"facts": {"rows": (0, 0, 0, 1)}}, "remapped rows", "fail", "a remapping failed"),
    ({"facts": {"rows": (0, 1, 1, 0)}}, "remapped rows", "fail", "pending"),
    ({"facts": {"rows": (3, 1, 0, 0)}}, "remapped rows", "warn", "in the past"),
    ({"grows": {"rows_uncorrected": 1}}, "remapped rows", "fail", "during this run"),
    ({"facts": {"reserve": {"max": 2302, "low": 2}}}, "rows in reserve", "warn", "few left"),
    ({"facts": {"reserve": {"max": 2303, "none": 1}}}, "rows in reserve", "fail", "none left"),
    ({"facts": {"pcie_width": 8}}, "PCIe width", "fail", "below 16"),
    ({"facts": {"pcie_generation": 4}}, "PCIe generation", "warn", "below 5"),
    ({"facts": {"pcie_generation": 3}}, "PCIe generation", "fail", "below 4"),
    ({"grows": {"pcie_replays": 60}}, "PCIe replays", "warn", "repeats itself"),
    ({"links_down": 2}, "NVLinks active", "fail", "below 18"),
    ({"grows": {"nvlink_errors": 500}}, "NVLink errors", "fail", "CRC"),
]


@pytest.mark.parametrize(("fault", "name", "grade", "reason"), FAULTS, ids=[f"{name}-{grade}" for _, name, grade, _ in FAULTS])
def test_a_fault_is_found_on_its_device_and_on_no_other(fault, name, grade, reason):
    found = run([Board(0), Board(1, **fault)], seconds=200.0)
    check = the(found, name, 1)
    assert (check.grade, reason in check.reason) == (grade, True), check
    assert the(found, name, 0).grade == "pass"
    assert found.outcome is (Outcome.REFUSED if grade == "fail" else Outcome.WARNINGS)


def test_peers_are_judged_by_the_slowest_pair():
    found = run([Board(0), Board(1, peer_gb_per_s=180.0)])
    assert grades(found, "GPU to GPU (slowest)") == {0: "fail", 1: "fail"}


def test_the_slowest_device_of_a_machine_is_named():
    found = run([Board(0), Board(1), Board(2, tflops=690.0, temperature_c=83.0), Board(3)])
    spread = the(found, "spread of the matmul", -1)
    assert (spread.grade, "device 2 is the slowest" in spread.value) == ("warn", True)
    assert the(found, "spread of the temperature", -1).grade == "warn"
    assert found.outcome is Outcome.WARNINGS


def test_devices_that_are_not_set_up_alike():
    found = run([Board(0), Board(1, facts={"vbios": "97.00"})])
    assert the(found, "same VBIOS", -1).grade == "warn"


def test_fewer_gpus_than_were_ordered():
    found = run([Board(i) for i in range(7)], expected_gpus=8)
    assert found.outcome is Outcome.REFUSED
    assert "Xid 79" in the(found, "devices", -1).remedy


def test_another_chip_than_was_ordered():
    found = run([Board(0), Board(1)], reference=find_reference("b200"))
    assert the(found, "chip").grade == "fail"
    assert found.outcome is Outcome.REFUSED


def test_one_gpu_of_a_larger_machine_needs_no_links():
    found = run([Board(0, links_down=18)])
    assert found.outcome is Outcome.ACCEPTED
    assert "NVLinks active" not in {check.name for check in found.checks}


def test_too_short_a_run_says_nothing_of_the_heat():
    found = run([Board(0, drop=0.05)], seconds=30.0)
    steadiness = the(found, "steadiness")
    assert steadiness.grade == "not known"
    assert "--minutes" in steadiness.reason
    assert found.outcome is Outcome.ACCEPTED


def test_a_device_that_fails_is_left_alone_and_the_others_go_on():
    boards = [Board(0), Board(1, error="hung: it said nothing for 60 s and was ended")]
    runner = FakeRunner(boards)
    found = accept(H200, PUBLISHED, minutes=10, node=node_of(boards), runner=runner)
    assert [job.visible for job in runner.jobs if job.work == "sustain"] == [boards[0].uuid]
    assert the(found, "sustained matmul", 0).grade == "pass"
    assert the(found, "sustained matmul", 1).reason == "hung: it said nothing for 60 s and was ended"


def test_a_gpu_on_which_nothing_runs_is_refused():
    found = run([Board(0, error="AcceleratorError: CUDA error: unknown error")])
    assert found.outcome is Outcome.REFUSED
    assert the(found, "processes").value == "AcceleratorError: CUDA error: unknown error"


def test_a_cpu_on_which_nothing_runs_cannot_be_judged():
    cpu = find_chip("cpu")
    broken = FakeRunner([Board(0, error="torch does not import")])
    broken.say = lambda job: Said([], "torch does not import")
    with pytest.raises(CannotMeasure, match="torch does not import"):
        accept(cpu, find_reference("nonesuch"), minutes=1, runner=broken)


def test_without_the_driver_s_library_it_is_not_accepted():
    boards = [Board(0), Board(1)]
    node = Node(node_of(boards).places, trouble="nvidia-ml-py is not installed")
    runner = FakeRunner(boards)
    found = accept(H200, PUBLISHED, minutes=10, node=node, runner=runner)
    assert found.outcome is Outcome.UNDECIDED
    assert the(found, "memory health").reason == "nvidia-ml-py is not installed"
    assert any("nvidia-ml-py" in note for note in found.notes)


def test_a_container_that_hides_the_memory_s_errors_leaves_it_undecided():
    found = run([Board(0, facts={"rows": None})])
    assert found.outcome is Outcome.UNDECIDED
    assert "Not Supported" in the(found, "remapped rows").reason


def test_sensors_that_vanish_under_load_say_so():
    class Blind(FakeRunner):
        def say(self, job):
            said = super().say(job)
            for line in said.lines:
                if "tflops" in line:
                    keep = {"at": line["at"], "tflops": line["tflops"]}
                    line.clear()
                    line |= keep | {"why": {"sensors": "NVML: Unknown Error"}}
            return said

    boards = [Board(0)]
    found = accept(H200, PUBLISHED, minutes=10, node=node_of(boards), runner=Blind(boards))
    for name in ("temperature", "thermal throttling", "clock under load", "power under load"):
        assert (the(found, name).grade, the(found, name).reason) == ("not known", "NVML: Unknown Error")


def test_recorded_machines_judge_the_next(tmp_path):
    for i in range(FEW):
        (one,) = run([Board(0, 10 + i, tflops=780.0 + i)]).records()
        record(tmp_path, one)
    expected = find_reference("h200", [tmp_path])
    assert expected.devices == FEW
    check = the(run([Board(0, tflops=700.0)], reference=expected), "sustained matmul")
    assert (check.grade, check.label) == ("fail", "recorded")
    assert f"{FEW} recorded devices" in check.source


def test_a_machine_that_was_refused_is_no_example():
    assert run([Board(0), Board(1, wrong=1)]).records() == []
    assert run([Board(0)]).records()[0].figures["matmul_tflops"] == pytest.approx(735.0, rel=0.01)


def test_a_device_beside_its_own_calibration():
    boards = [Board(0), Board(1)]
    us = work("matmul", "cuda").flops / 750e6
    known = Calibration(boards[0].uuid, "NVIDIA H200", "h200", "2026-10-01T00:00:00Z", "e0", anchors={"matmul": Known(us)})
    found = run(boards, calibrations={boards[0].uuid: known})
    assert the(found, "matmul since its calibration").grade == "pass"
    slower = run([Board(0, tflops=690.0), Board(1)], calibrations={boards[0].uuid: known})
    assert the(slower, "matmul since its calibration").grade == "warn"
    other = Calibration(boards[0].uuid, "NVIDIA H200", "h200", "2026-10-01T00:00:00Z", "e9", anchors={"matmul": Known(us)})
    assert "another driver" in the(run(boards, calibrations={boards[0].uuid: other}), "since its calibration").reason


def test_the_json_is_whole_and_names_no_uuid():
    boards = [Board(0), Board(1)]
    text = json.dumps(run(boards).to_json(), allow_nan=False)
    assert not any(board.uuid in text for board in boards)
    read = json.loads(text)
    assert (read["schema"], read["outcome"]) == ("klab-acceptance-1", "accepted")
    assert len(read["devices"][0]["trace"]) == 400
    assert all("grade" in check for check in read["checks"])


def test_a_device_that_another_run_holds_is_not_touched():
    from klab.harness.measure.lock import exclusive

    boards = [Board(0)]
    runner = FakeRunner(boards)
    with exclusive(boards[0].uuid), pytest.raises(CannotMeasure, match="is being measured by"):
        accept(H200, PUBLISHED, minutes=10, node=node_of(boards), runner=runner)
    assert runner.jobs == []


def test_the_host_s_processors():
    facts = {"governor": "powersave", "quota": 1.5, "cpus": 4}
    assert [(c.name, c.grade) for c in judge_host(facts)] == [("frequency governor", "warn"), ("quota", "warn")]
    facts = {"governor": None, "quota": None, "cpus": 4}
    assert [(c.name, Grade(c.grade)) for c in judge_host(facts)] == [("frequency governor", Grade.UNKNOWN), ("quota", Grade.PASS)]


def test_a_lost_gpu_does_not_hide_the_other_seven(monkeypatch):
    boards = [Board(i) for i in range(8)]
    boards[3].error = "AcceleratorError: CUDA error"
    library = FakeNvml(boards)

    def lost(uuid):
        if uuid == boards[3].uuid:
            raise library.error("GPU is lost", library.NVML_ERROR_GPU_IS_LOST)
        return next(board for board in boards if board.uuid == uuid)

    library.nvmlDeviceGetHandleByUUID = lost
    monkeypatch.setattr("klab.harness.watch.accept.nvml.load", lambda: library)
    monkeypatch.setattr("klab.harness.watch.accept.find_devices", lambda chip, only: node_of(boards).places)
    found = accept(H200, PUBLISHED, minutes=10, node=find_node(H200), runner=FakeRunner(boards), expected_gpus=8)
    bad = {check.device for check in found.checks if check.grade in ("fail", "not known")}
    assert (found.outcome, bad) == (Outcome.REFUSED, {3})
    assert the(found, "memory health", 3).reason == "NVMLError: GPU is lost"


def test_a_gpu_that_only_the_driver_s_list_still_has_is_a_failure(monkeypatch):
    boards = [Board(i) for i in range(3)]
    library = FakeNvml(boards)

    def lost(index):
        if index == 2:
            raise library.error("GPU is lost", library.NVML_ERROR_GPU_IS_LOST)
        return boards[index]

    library.nvmlDeviceGetHandleByIndex = lost
    monkeypatch.setattr("klab.harness.watch.accept.nvml.load", lambda: library)
    monkeypatch.setattr("klab.harness.watch.accept.find_devices", lambda chip, only: node_of(boards[:2]).places)
    found = accept(H200, PUBLISHED, minutes=10, node=find_node(H200), runner=FakeRunner(boards[:2]))
    assert (the(found, "devices", -1).grade, "GPU 2" in the(found, "devices", -1).value) == ("fail", True)
    assert the(run(boards[:2]), "devices", -1).grade == "not known", "nobody said how many were ordered"


def test_a_gpu_that_is_lost_in_the_middle():
    class Dies(FakeRunner):
        def say(self, job):
            said = super().say(job)
            return (
                Said(said.lines[:100], "hung: it said nothing for 60 s")
                if job.work == "sustain" and job.visible == boards[1].uuid
                else said
            )

    class Gone(FakeNvml):
        def nvmlEventSetWait(self, events, timeout):
            raise self.error("GPU is lost", self.NVML_ERROR_GPU_IS_LOST)

    boards = [Board(0), Board(1)]
    found = accept(H200, PUBLISHED, minutes=10, node=node_of(boards, Gone(boards)), runner=Dies(boards))
    assert found.outcome is Outcome.REFUSED
    assert grades(found, "right results") == {0: "pass", 1: "not known"}, "it never said how many were right"
    assert grades(found, "Xid") == {0: "not known", 1: "not known"}, "the driver could not be asked for events"
    boards[1].lines = {"differ": 2}
    found = accept(H200, PUBLISHED, minutes=10, node=node_of(boards), runner=Dies(boards, seconds=60))
    assert "2 of 60" in the(found, "right results", 1).value, "what it had said until then counts"


def test_what_the_driver_hides_is_not_known_and_never_left_out():
    class Mute(FakeRunner):
        def links(self):
            return Said([], "CUDA error: no device")

    boards = [Board(0, facts={"sram": None, "fabric": None}), Board(1)]
    library = FakeNvml(boards)

    def unsupported(*given):
        raise library.NVMLError("Not Supported")

    hidden = ("nvmlDeviceGetRowRemapperHistogram", "nvmlDeviceGetPcieReplayCounter", "nvmlDeviceValidateInforom")
    for name in (*hidden, "nvmlDeviceGetNvLinkErrorCounter"):
        setattr(library, name, unsupported)
    found = accept(H200, PUBLISHED, minutes=10, node=node_of(boards, library), runner=Mute(boards))
    expected = (
        "SRAM errors",
        "NVSwitch fabric",
        "rows in reserve",
        "PCIe replays",
        "InfoROM",
        "NVLink errors",
        "host to GPU",
        "GPU to host",
    )
    for name in (*expected, "GPU to GPU (slowest)"):
        assert (the(found, name).grade, bool(the(found, name).reason)) == ("not known", True), name
    everything = {check.name for check in run([Board(0), Board(1)]).checks}
    assert everything <= {check.name for check in found.checks}


def test_what_could_not_be_decided_is_no_example_unless_its_kind_is_new():
    hidden = run([Board(0, facts={"rows": None})])
    assert (hidden.outcome, hidden.records()) == (Outcome.UNDECIDED, [])
    new = run([Board(0)], reference=dataclasses.replace(PUBLISHED, expected={}))
    assert (new.outcome, len(new.records())) == (Outcome.UNDECIDED, 1)


def test_a_mute_process_is_not_a_good_one():
    class Mute(FakeRunner):
        def say(self, job):
            said = super().say(job)
            return Said(said.lines[:1]) if job.work == "sustain" else said

    boards = [Board(0)]
    found = accept(H200, PUBLISHED, minutes=10, node=node_of(boards), runner=Mute(boards))
    assert the(found, "sustained matmul").grade == "not known"
    assert found.outcome is Outcome.UNDECIDED
