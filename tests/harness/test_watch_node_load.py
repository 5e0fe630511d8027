"""The processes that load a device: on this machine's CPU with small work, and processes that die, hang or babble."""

import contextlib
import json
import sys
from types import SimpleNamespace

import pytest
import torch
from fake_cuda import FakeCuda

from klab.harness.catalog.chips import find_chip
from klab.harness.measure import anchor, calibrate_steps
from klab.harness.measure.cuda_timer import CudaTimer
from klab.harness.measure.power import NullMeter
from klab.harness.measure.rotation import Rotation
from klab.harness.plan.trial import Policy
from klab.harness.watch import node_load, node_runner
from klab.harness.watch.accept import accept
from klab.harness.watch.node_load import Bench, Compared, cpu_state, sustain
from klab.harness.watch.node_runner import Job, ProcessRunner, Said
from klab.harness.watch.reference_nodes import find_reference, kind_of
from klab.kernels.dtypes import random_normal

CPU = find_chip("cpu")


@pytest.fixture
def small(monkeypatch):
    """Work of microseconds, and samples of hundredths of a second."""
    monkeypatch.setitem(anchor.MATMUL, "cpu", (64, 64, 64, "float32"))
    monkeypatch.setitem(anchor.COPY, "cpu", (1 << 16, 2))
    monkeypatch.setattr(calibrate_steps, "ROUNDS", 6)
    monkeypatch.setattr("klab.harness.measure.environment.checkout", dict)
    monkeypatch.setattr(node_load, "SAMPLE_S", 0.03)
    monkeypatch.setitem(node_load.ROUND_MS, "cpu", 2.0)
    monkeypatch.setitem(node_load.PROBE_WARMUP_S, "cpu", 0.0)


def test_a_probe_takes_rounds_of_all_work_and_says_where_it_was(small):
    lines = []
    node_load.work("probe", CPU, 1.0, lines.append)
    assert lines[0]["describe"]["kind"] == "cpu"
    assert lines[0]["describe"]["epoch"]
    works = {line["work"]: line for line in lines if "work" in line}
    assert set(works) == {"matmul", "copy", "events"}
    assert all(len(line["us"]) == 6 for line in works.values())
    assert works["matmul"]["flops"] == 2 * 64**3
    json.dumps(lines, allow_nan=False)


def test_a_sustained_run_samples_and_compares_every_second(small):
    lines = []
    sustain(Bench(CPU), 0.2, lines.append)
    rates = [line for line in lines if "tflops" in line]
    assert rates
    assert all(line["tflops"] > 0 for line in rates)
    assert [line["at"] for line in rates] == sorted(line["at"] for line in rates)
    assert lines[0] == {"wrong_at_first": ""}
    assert lines[-1] == {"checked": len(rates), "wrong": 0}
    json.dumps(lines, allow_nan=False)


@pytest.mark.parametrize("planted", [False, True])
def test_on_a_gpu_products_are_compared_to_the_bit(small, monkeypatch, planted):
    cuda, lines = FakeCuda(), []
    x, w = (random_normal((64, 64), "float32", seed=seed, device="cpu") for seed in (1, 2))
    out = torch.empty(64, 64)

    def multiply():
        torch.matmul(x, w.T, out=out)
        if planted and lines:  # once the first product has been taken for right
            out[5, 5] = torch.nextafter(out[5, 5], torch.tensor(2.0))

    rotation = Rotation([{"x": x, "w": w}], [{"out": out}], (), "cold")
    monkeypatch.setattr(anchor, "launch_of", lambda name, device: (lambda i, o: cuda.enqueue(700.0, multiply), rotation))
    monkeypatch.setitem(anchor.MATMUL, "cuda", (64, 64, 64, "float32"))
    timer = CudaTimer(find_chip("h200"), NullMeter(), cuda=cuda)
    bench = SimpleNamespace(torch=torch, kind="cuda", timer=timer, policy=Policy(warmup_ms=1.0), state=lambda: {"reasons": 4})
    sustain(bench, 0.2, lines.append)
    assert lines[0] == {"wrong_at_first": ""}
    assert {line["reasons"] for line in lines if "tflops" in line} == {4}
    assert (lines[-1]["wrong"] > 0) is planted


def made(out=None):
    inputs = {
        "x": random_normal((32, 16), "float32", seed=1, device="cpu"),
        "w": random_normal((24, 16), "float32", seed=2, device="cpu"),
    }
    right = inputs["x"] @ inputs["w"].T
    out = right.clone() if out is None else out
    return Compared(Bench(CPU), inputs, out), out, right


def test_one_wrong_element_is_corruption():
    compared, out, right = made()
    assert compared.first() == ""
    for planted in (0.0, 0.5, 0.0):
        out.copy_(right)
        out[3, 4] += planted
        compared.again()
    assert (compared.checked, compared.wrong) == (3, 1)


def test_an_output_that_nobody_wrote_is_not_right():
    compared, _, _ = made()
    compared.first()
    compared.again()
    compared.again()
    assert compared.wrong == 1, "the second time the poison was still there"


def test_a_product_that_is_wrong_from_the_start_is_told():
    compared, _, _ = made(out=torch.zeros(32, 24))
    assert "is wrong by 1" in compared.first()


def test_memory_that_gives_back_something_else_is_counted(monkeypatch):
    monkeypatch.setattr(node_load, "MEMORY_BLOCK_BYTES", 1024)
    block = torch.empty(100, dtype=torch.int64)
    for pattern in node_load.MEMORY_PATTERNS:
        assert node_load._pattern(block, pattern, True) == 0
        assert node_load._pattern(block, pattern, False) == 0
        block[7] ^= 1 << 40
        assert node_load._pattern(block, pattern, False) == 1
    assert node_load._numbers(torch, block, 500, True) == 0
    assert node_load._numbers(torch, block, 500, False) == 0
    block[20:24] = block[40:44].clone()
    assert node_load._numbers(torch, block, 500, False) == 4, "an address that answers for another"


def test_the_two_patterns_are_complements():
    first, second = node_load.MEMORY_PATTERNS
    assert first ^ second == -1


def test_the_state_of_a_cpu(tmp_path):
    for core, khz in enumerate((2_000_000, 3_000_000)):
        folder = tmp_path / f"cpu{core}"
        (folder / "cpufreq").mkdir(parents=True)
        (folder / "cpufreq/scaling_cur_freq").write_text(f"{khz}\n")
        (folder / "thermal_throttle").mkdir()
        (folder / "thermal_throttle/package_throttle_count").write_text("5\n")
    assert cpu_state(tmp_path) == {"sm_clock_mhz": 2500.0, "throttles": 5}
    assert cpu_state(tmp_path / "nowhere") == {"sm_clock_mhz": None, "throttles": None}


def scripted(monkeypatch, text):
    monkeypatch.setattr(node_runner, "COMMAND", (sys.executable, "-c", text))


def test_a_process_that_dies_keeps_what_it_said(monkeypatch):
    scripted(monkeypatch, "import os; print('{\"at\": 1, \"tflops\": 2.0}', flush=True); print('{torn', flush=True); os.abort()")
    (said,) = ProcessRunner(CPU).run([Job("sustain", 1.0)])
    assert said.lines == [{"at": 1, "tflops": 2.0}]
    assert said.error.startswith("killed by SIGABRT")


def test_a_process_that_ends_without_a_word_is_an_error(monkeypatch):
    scripted(monkeypatch, "import sys; sys.stderr.write('no such device\\n'); sys.exit(3)")
    (said,) = ProcessRunner(CPU).run([Job("probe", 1.0)])
    assert said.error == "ended with exit code 3: no such device"


def test_a_process_that_hangs_is_ended_and_the_others_are_heard(monkeypatch):
    # What is heard ends the wait for the start, which is generous: the silence counts from then on.
    wait = "import sys, json, time; print('{}', flush=True); time.sleep(600 if json.loads(sys.argv[1])['work'] == 'sustain' else 0)"
    scripted(monkeypatch, wait + "; print('{\"done\": true}')")
    hung, fine = ProcessRunner(CPU, silence_s=2.0).run([Job("sustain", 1.0), Job("probe", 1.0)])
    assert hung.error.startswith("hung")
    assert fine.error == ""


def test_an_error_that_a_process_reports_is_its_end(monkeypatch):
    scripted(monkeypatch, 'print(\'{"error": "AcceleratorError: GPU is lost"}\')')
    (said,) = ProcessRunner(CPU).run([Job("sustain", 1.0)])
    assert said.error == "AcceleratorError: GPU is lost"


def test_workers_inherit_no_secrets(monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hunter2")
    scripted(monkeypatch, "import os, json; print(json.dumps({'env': sorted(os.environ), 'done': True}))")
    (said,) = ProcessRunner(CPU).run([Job("probe", 1.0)])
    assert "AWS_SECRET_ACCESS_KEY" not in said.get("env")


class InThisProcess:
    """Does the work of the jobs here, one after another."""

    def run(self, jobs):
        found = []
        for job in jobs:
            said = Said()
            node_load.work(job.work, CPU, min(job.seconds, 0.3), said.lines.append)
            found.append(said)
        return found


def judged(found):
    checks = {check.name: check for check in found.checks}
    assert {check.topic for check in found.checks} == {"identity", "performance", "correctness", "heat and power", "errors", "settings"}
    assert {checks[name].grade for name in ("chip", "right results", "processes")} == {"pass"}
    assert {checks[name].grade for name in ("sustained matmul", "copy bandwidth", "steadiness")} == {"not known"}
    assert all(checks[name].figure > 0 for name in ("sustained matmul", "copy bandwidth", "launch overhead"))
    assert found.devices[0].id.startswith("cpu-")


def test_this_machine_s_cpu(small):
    """What is judged of its speed is not this test's business."""
    judged(accept(CPU, find_reference(kind_of(CPU)), minutes=0.01, runner=InThisProcess()))


@pytest.mark.thorough
def test_this_machine_s_cpu_in_processes_of_its_own():
    judged(accept(CPU, find_reference(kind_of(CPU)), minutes=0.01))


def test_one_process_for_real():
    (said,) = ProcessRunner(CPU).run([Job("sustain", 0.2)])
    assert said.error == ""
    assert said.get("describe")["kind"] == "cpu"
    assert said.all("tflops")
    assert said.get("wrong") == 0


class TorchOnCpu:
    """torch, with GPUs that are the CPU and copies that take 5 ms."""

    def __init__(self, gpus=2, free=3 << 20):
        self.cuda = SimpleNamespace(
            device_count=lambda: gpus,
            can_device_access_peer=lambda a, b: True,
            device=lambda index: contextlib.nullcontext(),
            Event=lambda enable_timing: SimpleNamespace(record=lambda: None, synchronize=lambda: None, elapsed_time=lambda end: 5.0),
            mem_get_info=lambda: (free, 4 << 20),
            OutOfMemoryError=torch.cuda.OutOfMemoryError,
            empty_cache=lambda: None,
        )
        self.taken = 0

    def __getattr__(self, name):
        return getattr(torch, name)

    def empty(self, size, dtype, device=None, pin_memory=False):
        self.taken += size
        return torch.empty(size, dtype=dtype)


def test_links_between_all_pairs(monkeypatch):
    monkeypatch.setattr(node_load, "LINK_BYTES", 1 << 20)
    lines = []
    node_load.links(SimpleNamespace(torch=TorchOnCpu(3)), 60.0, lines.append)
    assert [(line["from"], line["to"]) for line in lines if line["link"] == "host"] == [
        (-1, 0),
        (0, -1),
        (-1, 1),
        (1, -1),
        (-1, 2),
        (2, -1),
    ]
    assert {(line["from"], line["to"]) for line in lines if line["link"] == "peer"} == {
        (a, b) for a in range(3) for b in range(3) if a != b
    }
    assert lines[0]["gb_per_s"] == [pytest.approx((1 << 20) / 5e-3 / 1e9)] * node_load.LINK_ROUNDS


def test_links_whose_time_is_up_say_so(monkeypatch):
    monkeypatch.setattr(node_load, "LINK_BYTES", 1 << 10)
    lines = []
    node_load.links(SimpleNamespace(torch=TorchOnCpu(2)), -1.0, lines.append)
    assert [line["reason"] for line in lines if line["link"] == "peer"] == ["the time was up"] * 2


def test_nearly_all_memory_is_tested(monkeypatch):
    monkeypatch.setattr(node_load, "MEMORY_BLOCK_BYTES", 1 << 20)
    lines, fake = [], TorchOnCpu(free=3 << 20)
    node_load.memory(SimpleNamespace(torch=fake), 1.0, lines.append)
    (line,) = lines
    assert line["memory_bytes_tested"] == pytest.approx(0.9 * (3 << 20), rel=1e-3)
    assert line["memory_words_wrong"] == 0


def test_memory_that_somebody_takes_meanwhile_is_left_out(monkeypatch):
    monkeypatch.setattr(node_load, "MEMORY_BLOCK_BYTES", 1 << 20)

    class Full(TorchOnCpu):
        def empty(self, size, **more):
            if self.taken:
                raise torch.cuda.OutOfMemoryError("CUDA out of memory")
            return super().empty(size, **more)

    lines = []
    node_load.memory(SimpleNamespace(torch=Full()), 1.0, lines.append)
    assert lines[0]["memory_bytes_tested"] == 1 << 20
