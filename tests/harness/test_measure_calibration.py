"""Calibrations: made through a worker, stored, read back, and used by the energy guard and the rooflines."""

import dataclasses
import json
import os
from collections import deque

import pytest
from fake_sensor import FakeBoard

from klab.harness.catalog.chips import find_chip
from klab.harness.fleet.calibrating import completed
from klab.harness.measure import anchor, calibrate_steps, calibration
from klab.harness.measure.calibrate import Calibrator, rate_of, time_of
from klab.harness.measure.calibration import (
    Calibration,
    Figure,
    calibration_path,
    device_id,
    guard_of,
    is_measured,
    look_in,
    measured_any,
    measured_chip,
    newest_of,
    read_calibration,
    read_calibrations,
    write_calibration,
)
from klab.harness.measure.client import WorkerDied, WorkerHung
from klab.harness.measure.energy import MIN_UPDATES, RAMP_S, Window, guard_for, judge
from klab.harness.measure.power import NullMeter
from klab.harness.measure.sensor import pulse_lengths, record
from klab.harness.measure.timer import CpuTimer
from klab.harness.plan.roofline import Roofline
from klab.kernels.contract import Chip
from klab.kernels.errors import CannotMeasure, UsageError

GPU = "GPU-1f2e3d4c-0000-1111-2222-333344445555"
CPU = Chip("cpu", "CPU", "cpu", 1, 2000, 2000, {"float32": 0.05}, 8 << 30, 10.0, 1 << 18)


def made(**changes):
    usual = {
        "device_uuid": GPU, "device": "NVIDIA H200", "chip": "h200", "at": "2026-11-20T10:00:00Z", "epoch": "e1",
        "sensor_period_ms": Figure(100.0, 99.9, 100.1), "sensor_window_ms": Figure(25.0, 24.0, 26.0),
        "copy_gb_per_s": Figure(4100.0, 4090.0, 4110.0, note="copy of 512 MiB"),
        "matmul_tflops": {"bfloat16": Figure(760.0, 755.0, 765.0, note="8192x8192x8192, 1,500 MHz"), "float8_e4m3fn": Figure.missing("no")},
        "anchors": {"matmul": Figure(720.0, 718.0, 722.0), "copy": Figure(262.0, 261.0, 263.0)},
    }  # fmt: skip
    return Calibration(**(usual | changes))


def test_it_goes_to_json_and_back():
    one = made(notes=("a note",), environment={"driver": "580.1"})
    data = json.loads(json.dumps(one.to_json(), allow_nan=False))
    assert Calibration.from_json(data) == one
    assert "graph_overhead_us" not in data
    assert data["matmul_tflops"]["float8_e4m3fn"] == {"reason": "no"}
    assert Calibration.from_json(data | {"of_a_newer_klab": 1}) == one


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"schema": 0}, "not a calibration"), ({"at": "yesterday"}, "Invalid isoformat"), ({"device": 7}, "device is not a text"),
        ({"sensor_period_ms": 100}, "sensor_period_ms is no figure"), ({"copy_gb_per_s": {"value": -1}}, "copy_gb_per_s.value"),
        ({"copy_gb_per_s": {"value": "fast"}}, "copy_gb_per_s.value"), ({"anchors": [1]}, "not a calibration"),
        ({"matmul_tflops": {"bfloat16": {"value": True}}}, "matmul_tflops.bfloat16.value"),
        ({"copy_gb_per_s": {"value": 10**400}}, "too large"), ({"schema": float("inf")}, "infinity"),
        ({"copy_gb_per_s": {"value": 5.0, "low": 6.0, "high": 7.0}}, "copy_gb_per_s lies outside its interval"),
    ],
)  # fmt: skip
def test_what_is_no_calibration_is_refused_by_name(change, named):
    with pytest.raises(UsageError, match=named):
        Calibration.from_json(made().to_json() | change)


def test_texts_of_a_foreign_file_give_a_terminal_no_orders():
    figure = {"value": 1.0, "note": "\x1b]0;title\x07"}
    found = Calibration.from_json(made().to_json() | {"device": "\x1b[31mred", "notes": ["a\nb"], "matmul_tflops": {"\x1b[2J": figure}})
    assert (found.device, found.notes, list(found.matmul_tflops)) == ("?[31mred", ("a?b",), ["?[2J"])
    assert found.matmul_tflops["?[2J"].note == "?]0;title?"


def test_the_newest_is_read_and_the_earlier_ones_stay(tmp_path):
    first, second = made(), made(at="2026-11-21T10:00:00Z", notes=("second",))
    path = write_calibration(first, tmp_path)
    assert path == calibration_path(tmp_path, GPU)
    for _ in range(2):
        write_calibration(second, tmp_path)
    assert read_calibration(GPU, tmp_path) == second
    assert len(list((path.parent / "earlier").iterdir())) == 2
    assert [p.name for p in path.parent.iterdir() if p.is_file()] == [f"{GPU}.json"], "no part file is left"
    # Of two folders the newer counts, wherever it is.
    write_calibration(first, tmp_path / "other")
    assert read_calibrations([tmp_path, tmp_path / "other"])[GPU] == second
    assert read_calibration("GPU-else", tmp_path) is None
    assert read_calibration(GPU, tmp_path / "absent") is None


def test_a_foreign_file_is_told_and_passed_over(tmp_path):
    write_calibration(made(), tmp_path)
    folder = calibration_path(tmp_path, GPU).parent
    (folder / "torn.json").write_text('{"schema": 1, "device')
    (folder / "deep.json").write_text("[" * 100_000)
    (folder / "long.json").write_text(" " * (2 << 20))
    (folder / "list.json").write_text("[1]")
    troubles = []
    assert list(read_calibrations([tmp_path], troubles)) == [GPU]
    assert sorted(os.path.basename(line.split(": ")[0]) for line in troubles) == ["deep.json", "list.json", "long.json", "torn.json"]


def test_a_device_whose_name_is_a_path_stays_in_its_folder(tmp_path):
    path = write_calibration(made(device_uuid="../../etc/passwd"), tmp_path)
    assert path.parent == tmp_path / "calibration"
    assert "/" not in path.name


def test_a_folder_that_takes_no_files_is_said(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CannotMeasure, match="file"):
        write_calibration(made(), tmp_path / "file")


def test_a_cpu_goes_by_its_machine():
    assert device_id({"uuid": "", "host": "5bce98f7"}) == "cpu-5bce98f7"
    assert device_id({"uuid": GPU, "host": "5bce98f7"}) == GPU


# the energy guard


@pytest.mark.parametrize(
    ("window_s", "period_s", "seen_s", "ramp_s", "updates"),
    [
        (None, None, None, RAMP_S, MIN_UPDATES),
        (0.025, 0.1, 0.025, 2.0, 50),  # the counter of an H100, as it is taken to be without a calibration
        (0.025, 0.1, 0.1, 2.0, 20),  # one that sees all of its period
        (1.0, 0.1, 0.1, 2.1, 20),  # power is read from the one-second average: its rise is waited for
        (1.5, 0.1, 0.01, 3.1, 125),
        (0.02, 0.02, 0.02, 2.0, 63),
        (1e305, 0.1, 1e-309, 10.0, 1250),  # what no sensor does, in a file that somebody wrote
    ],
)
def test_the_guard_follows_the_sensor(window_s, period_s, seen_s, ramp_s, updates):
    guard = guard_for(window_s, period_s, seen_s, "calibration")
    assert (guard.ramp_s, guard.updates) == (pytest.approx(ramp_s), updates)


def test_energy_is_judged_by_the_guard_of_the_device():
    edges = tuple((0.1 * i, 1000 * i, 50.0 * i) for i in range(31))
    windows = [Window(edges, tuple((0.1 * i, 500.0) for i in range(31)))]
    refused = judge(windows, seconds=2.0)
    assert "50 steps" in refused.reason
    found = judge(windows, seconds=2.0, guard=guard_for(0.025, 0.1, 0.1, "calibration of 2026-11-20"))
    assert found.energy_j == pytest.approx(0.05)
    assert "20 steps are enough by the calibration of 2026-11-20" in found.reason


def test_the_guard_of_a_device_is_found_where_results_are(tmp_path, monkeypatch):
    monkeypatch.setattr(calibration, "_FURTHER", [])
    calibration._guard.cache_clear()
    monkeypatch.setenv("KLAB_RESULTS", str(tmp_path / "none"))
    counter = {"counter_period_ms": Figure(100.0, 99.0, 101.0), "counter_window_ms": Figure(100.0, 95.0, 105.0)}
    write_calibration(made(**counter), tmp_path / "here")
    assert guard_of({"uuid": GPU}) is None, "a store that is not there is no error"
    look_in(tmp_path / "here")
    guard = guard_of({"uuid": GPU})
    assert (guard.updates, guard.source) == (20, "calibration of 2026-11-20")
    assert guard_of({"uuid": "GPU-else"}) is None
    assert guard_of({"uuid": "", "host": "x"}) is None, "a CPU has no sensor to guard"


# peaks


def test_a_chip_with_measured_peaks_says_which_are_measured():
    chip = find_chip("h200")
    own = measured_chip(chip, made())
    assert (own.peak_tflops["bfloat16"], own.memory_gb_per_s) == (760.0, 4100.0)
    assert own.peak_tflops["float8_e4m3fn"] == chip.peak_tflops["float8_e4m3fn"]
    assert is_measured(own, "bfloat16")
    assert is_measured(own)
    assert not is_measured(own, "float8_e4m3fn")
    assert not is_measured(chip)
    assert GPU in own.provenance["peak_tflops.bfloat16"]
    us, by = Roofline(own, "bfloat16").bound(7.6e14, 1.0)
    assert (us, by) == (pytest.approx(1e6), "compute")


def test_the_newest_device_of_a_chip(tmp_path):
    write_calibration(made(), tmp_path)
    write_calibration(made(device_uuid="GPU-2", at="2026-11-22T10:00:00Z"), tmp_path)
    assert newest_of("h200", [tmp_path]).device_uuid == "GPU-2"
    with pytest.raises(UsageError, match="no device of b200 is calibrated"):
        newest_of("b200", [tmp_path])


# through a worker


class ScriptedWorker:
    """Answers to `calibrate` by step, or raises."""

    def __init__(self, environment, answers):
        self.environment, self.answers, self.alive, self.starts, self.asked = environment, answers, False, 0, []

    def start(self):
        self.starts += not self.alive
        self.alive = True

    def ask(self, operation, *, limit_s, step, **how):
        assert operation == "calibrate"
        self.asked.append((step, how))
        answer = self.answers.get(step, {})
        answer = answer(how) if callable(answer) else answer
        if isinstance(answer, Exception):
            self.alive = False
            raise answer
        return {"status": "ok"} | answer


def rounds(us, mhz=1500.0, count=10, marked=0):
    return {"us": [us] * count, "mhz": [mhz] * count, "marked": [1] * marked + [0] * (count - marked)}


def recorded():
    board = FakeBoard(period_s=0.1, window_s=0.025, counter_window_s=0.1)
    sensors = {"sensor": board.power_w, "counter": board.energy_j}
    return record(sensors, board, pulse_lengths(15.0), clock=board.clock, sleep=board.sleep).to_json()


GPU_FACTS = {"kind": "cuda", "uuid": GPU, "device": "NVIDIA H200", "driver": "580.1", "torch": "2.13", "host": "abc", "processes": []}


def answers():
    return {
        "anchors": {"rounds": {"matmul": rounds(720.0), "copy": rounds(262.144)}, "what": {"matmul": "mm", "copy": "cp"}},
        "launch": {"rounds": {"events": rounds(5.0), "graph": rounds(1.5)}},
        "matmul": lambda how: {
            "rounds": {"a": rounds(1000.0), "b": rounds(1100.0, 1410.0)},
            "flops": {"a": 7.0e11, "b": 8.0e11 * (1 + (how["dtype"] == "float16"))},
        },
        "sensor": {"recording": recorded()},
    }


def test_all_parts_of_a_gpu():
    worker = ScriptedWorker(GPU_FACTS, answers())
    said = []
    found = Calibrator(worker, find_chip("h200"), sensor_s=15.0, say=said.append).run()
    assert (found.device_uuid, found.chip, found.device) == (GPU, "h200", "NVIDIA H200")
    assert found.environment == {"kind": "cuda", "device": "NVIDIA H200", "driver": "580.1", "torch": "2.13", "host": "abc"}
    assert found.anchors["matmul"].value == 720.0
    assert found.copy_gb_per_s.value == pytest.approx(2 * 512 * 2**20 / 262.144e-6 / 1e9)
    assert (found.launch_overhead_us.value, found.graph_overhead_us.value) == (5.0, 1.5)
    assert found.matmul_tflops["bfloat16"].value == pytest.approx(8.0e11 / 1100.0 / 1e6)
    assert "1,410 MHz" in found.matmul_tflops["bfloat16"].note
    assert found.matmul_tflops["float16"].value == pytest.approx(2 * 8.0e11 / 1100.0 / 1e6)
    assert found.sensor_period_ms.value == pytest.approx(100.0, rel=0.01)
    assert found.sensor_window_ms.value == pytest.approx(25.0, rel=0.1)
    assert found.counter_window_ms.value == pytest.approx(100.0, rel=0.1)
    assert "no such reading" in found.average_period_ms.reason
    assert ("sensor", {"seconds": 15.0}) in worker.asked
    assert any("15 s" in text for text in said)


def test_a_step_that_fails_costs_its_figures_alone():
    script = answers() | {
        "anchors": WorkerDied("killed by SIGSEGV"),
        "launch": {"status": "crashed", "reason": "CUDA error"},
        "matmul": lambda how: WorkerHung("no answer") if how["dtype"] == "float16" else answers()["matmul"](how),
        "sensor": {"trouble": "NVML: Driver Not Loaded"},
    }
    worker = ScriptedWorker(GPU_FACTS, script)
    found = Calibrator(worker, find_chip("h200")).run()
    assert worker.starts == 3, "a fresh worker after each that was lost"
    assert found.anchors["copy"].reason == found.copy_gb_per_s.reason == "killed by SIGSEGV"
    assert found.launch_overhead_us.reason == found.graph_overhead_us.reason == "CUDA error"
    assert found.matmul_tflops["float16"].reason == "no answer"
    assert found.matmul_tflops["bfloat16"].value
    assert found.counter_period_ms.reason == "NVML: Driver Not Loaded"
    assert measured_any(found)
    assert not measured_any(
        made(sensor_period_ms=Figure(reason="no"), sensor_window_ms=Figure(), copy_gb_per_s=Figure(), matmul_tflops={}, anchors={})
    )


def test_a_throttled_device_gives_no_peak():
    assert "throttled in 8 of 10 rounds" in time_of(rounds(5.0, marked=8), "x").reason
    assert rate_of(time_of(rounds(5.0, marked=8), "x"), 1.0).value is None
    kept = time_of(rounds(5.0, marked=3), "x")
    assert (kept.value, kept.note) == (5.0, "x, 7 rounds, 1,500 MHz")


def test_an_unknown_part_is_refused_before_a_worker_starts():
    worker = ScriptedWorker(GPU_FACTS, {})
    with pytest.raises(UsageError, match="no part fan"):
        Calibrator(worker, find_chip("h200")).run(["fan"])
    assert worker.starts == 0


def test_parts_that_were_not_asked_for_are_kept_from_the_same_epoch():
    new = made(
        at="2026-11-22T00:00:00Z", copy_gb_per_s=calibration.NOT_MEASURED, matmul_tflops={}, launch_overhead_us=Figure(5.0, 4.9, 5.1)
    )
    both = completed(new, made())
    assert both.copy_gb_per_s == made().copy_gb_per_s
    assert both.matmul_tflops == made().matmul_tflops
    assert both.launch_overhead_us.value == 5.0
    assert both.notes == ("copy_gb_per_s, matmul_tflops: kept from 2026-11-20T10:00:00Z",)
    assert completed(new, dataclasses.replace(made(), epoch="e2")) == new
    assert completed(new, None) == new


# the steps themselves, on this CPU and small


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(anchor, "MATMUL", {"cpu": (16, 16, 16, "float32")})
    monkeypatch.setattr(anchor, "COPY", {"cpu": (4096, 2)})
    monkeypatch.setattr(calibrate_steps, "MATMUL_SHAPES", {"cpu": ((16, 16, 16), (32, 16, 16))})
    monkeypatch.setattr(calibrate_steps, "MATMUL_ROUND_MS", {"cpu": 0.2})
    monkeypatch.setattr(calibrate_steps, "MATMUL_WARMUP_MS", {"cpu": 0.2})
    monkeypatch.setattr(calibrate_steps, "ROUNDS", 5)
    monkeypatch.setattr(calibrate_steps, "PULSE_SHAPE", (16, 16, 16))
    monkeypatch.setattr(calibrate_steps, "REST_S", 0.0)


def step(name, meter=None, timer=None, **how):
    meter = meter or NullMeter("no sensor")
    return calibrate_steps.run(CPU, timer or CpuTimer(CPU, meter), meter, name, **how)


def test_the_steps_run(small):
    found = step("anchors")
    assert sorted(found["rounds"]) == ["copy", "matmul"]
    assert all(len(r["us"]) == 5 and min(r["us"]) > 0 and r["marked"] == [0] * 5 for r in found["rounds"].values())
    assert step("launch")["rounds"]["events"]["us"]
    for dtype in ("float32", "bfloat16", "float8_e4m3fn"):
        found = step("matmul", dtype=dtype)
        assert found["status"] == "ok", found
        assert found["flops"] == {"16x16x16": 8192.0, "32x16x16": 16384.0}
    assert step("sensor", seconds=1.0) == {"status": "ok", "trouble": "no sensor"}
    failed = step("matmul", dtype="no_such_dtype")
    assert failed["status"] == "crashed"
    assert "no_such_dtype" in failed["reason"]
    with pytest.raises(UsageError, match="unknown step"):
        step("fan")


class BoardTimer(CpuTimer):
    """A device whose queue is the paper board's: what is enqueued keeps it busy for a while of the board's clock."""

    def __init__(self, board):
        super().__init__(CPU, NullMeter())
        self.board, self.queued = board, deque()

    def elapsed_us(self, work):
        work()
        return 1000.0

    def event(self):
        board = self.board
        queued_until = board.spans[-1][1] if board.spans else 0.0
        board.feed()
        ends = board.spans[-1][1] = max(queued_until, board.now) + 0.002  # chunks end one after another
        return type("Event", (), {"query": lambda self: board.now >= ends})()


def test_the_sensor_step_keeps_the_device_busy_in_pulses(small, monkeypatch):
    board = FakeBoard()
    monkeypatch.setattr(calibrate_steps, "record", lambda s, load, lengths: record(s, load, lengths, clock=board.clock, sleep=board.sleep))
    board.trouble = ""
    answer = step("sensor", meter=board, timer=BoardTimer(board), seconds=2.0)
    assert answer["status"] == "ok"
    assert answer["absent"] == ["average"]
    lengths = pulse_lengths(2.0)
    assert [b - a for a, b in answer["recording"]["busy"]] == pytest.approx(lengths[1::2], abs=0.03), "no pulse ran dry"
