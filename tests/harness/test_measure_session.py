"""What a worker does, without its pipes: every way in which a contestant can fail is a status."""

import dataclasses
import math
from pathlib import Path

import pytest
import torch
from fake_cuda import FakeCuda, Meter

from klab.harness.measure.cuda_timer import CudaTimer
from klab.harness.measure.power import Frame, NullMeter, Reading, ReplayMeter
from klab.harness.measure.session import Session
from klab.harness.measure.timer import CpuTimer
from klab.harness.plan.trial import Policy
from klab.kernels.contract import Chip
from klab.kernels.discover import discover
from klab.kernels.errors import UsageError
from klab.kernels.matmul.problem import Matmul

CONTESTANTS = Path(__file__).with_name("contestants")
CHIP = Chip("cpu", "CPU", "cpu", 1, 2000, 2000, {"float32": 0.05}, 8 << 30, 10.0, 1 << 20)
PROBLEM = Matmul(8, 48, 64, "float32")
POLICY = Policy(warmup_ms=1.0, round_ms=0.2, min_rounds=5, max_rounds=8, threads=1)


@pytest.fixture(scope="module")
def catalogue():
    return discover([CONTESTANTS])


@pytest.fixture
def session(catalogue):
    session = Session(CHIP, catalogue, CpuTimer(CHIP, NullMeter()), NullMeter("no sensor"))
    opened = session.open("matmul", PROBLEM.to_json(), POLICY.to_json())
    assert opened["status"] == "ok"
    return session


def prepare(session, name, slot=0, policy=POLICY):
    kernel = session.catalogue.kernels[f"matmul/{name}"]
    return session.prepare(slot, kernel.id, kernel.source_digest, {}, policy.to_json())


def test_open_says_how_the_data_lies(session):
    opened = session.open("matmul", PROBLEM.to_json(), POLICY.to_json())
    # 5 x 1 MiB of cache over 16 kB of inputs and outputs.
    assert opened["l2_state"] == "cold"
    assert opened["sets"] == math.ceil(5 * 2**20 / opened["set_bytes"]) + 1
    assert opened["l2_bytes"] == 2**20
    assert opened["threads"] == torch.get_num_threads() == 1
    assert opened["reference_device"] == "cpu"


def test_a_problem_opens_with_exact_sums_whoever_ran_before(session):
    torch.set_float32_matmul_precision("medium")
    torch.backends.cudnn.allow_tf32 = True
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = True
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = True
    session.open("matmul", PROBLEM.to_json(), POLICY.to_json())
    assert torch.get_float32_matmul_precision() == "highest" and not torch.backends.cudnn.allow_tf32
    assert not torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction
    assert not torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction


def test_a_good_kernel_is_checked_timed_and_checked_again(session):
    found = prepare(session, "good")
    assert found["status"] == "ok"
    assert 0.0 <= found["error"] <= found["tolerance"] == PROBLEM.tolerance()
    assert (found["checks"], found["launch_mode"], found["l2_state"]) == (3, "loop", "cold")
    assert found["launches"] >= 1
    for _ in range(3):
        sample = session.sample(0)
        assert sample["us"] > 0
        assert sample["sm_clock_mhz"] is None, "not known is null, not zero"
    assert session.finish(0)["checks"] == 4


def test_two_contestants_share_the_data(session):
    before = [t["x"].data_ptr() for t in session.rotation.inputs]
    assert prepare(session, "good", 0)["status"] == prepare(session, "half_speed", 1)["status"] == "ok"
    assert [t["x"].data_ptr() for t in session.rotation.inputs] == before
    assert session.sample(1)["us"] > 0


@pytest.mark.parametrize(
    ("name", "status", "reason"),
    [
        ("wrong", "incorrect", "off by"),
        ("not_a_number", "incorrect", "not finite"),
        ("leaves_a_gap", "incorrect", "48 of 384 elements of out are not finite"),
        ("out_of_bounds", "incorrect", "wrote outside out"),
        ("changes_inputs", "incorrect", "changed its input x"),
        ("stale", "incorrect", "seed"),
        ("waits_for_nan", "incorrect", "off by"),
        ("keeps_weights_by_address", "incorrect", "off by"),
        ("raises", "crashed", "ValueError: no such tile"),
        ("exits", "crashed", "SystemExit: 3"),
        ("does_not_compile", "compile_error", "CompilationError: at 12:3: unexpected type"),
        ("out_of_memory", "out_of_memory", "memory"),
        ("refuses", "unsupported", "odd shapes"),
    ],
)
def test_a_failing_kernel_is_a_status_and_the_next_is_not_disturbed(session, name, status, reason):
    found = prepare(session, name)
    assert found["status"] == status
    assert reason in found["reason"]
    assert "\n" not in found["reason"]
    assert not found.get("fatal")
    assert 0 not in session.slots
    assert prepare(session, "good", 1)["status"] == "ok"


def test_a_kernel_that_stops_working_in_the_rounds_is_caught_afterwards(session):
    launches = prepare(session, "fades")["launches"]
    for _ in range(2000 // launches + 1):
        assert session.sample(0)["status"] == "ok"
    found = session.finish(0)
    assert found["status"] == "incorrect"
    assert "after the rounds" in found["reason"]


def test_writing_to_the_shared_inputs_ends_the_worker(session):
    found = prepare(session, "spoils_late")
    assert found["status"] == "incorrect"
    assert "changed its inputs" in found["reason"]
    assert found["fatal"], "what is measured on spoiled data afterwards could not be judged"


def test_a_file_that_changed_or_is_missing_is_unsupported(session):
    kernel = session.catalogue.kernels["matmul/good"]
    assert "changed since" in session.prepare(0, kernel.id, "0" * 16, {}, POLICY.to_json())["reason"]
    missing = session.prepare(0, "matmul/nobody", "0" * 16, {}, POLICY.to_json())
    assert missing["status"] == "unsupported"


def test_seeds_are_fresh_for_every_problem_opened(session):
    first = prepare(session, "good")["build"]["data_seed"]
    session.open("matmul", PROBLEM.to_json(), POLICY.to_json())
    assert prepare(session, "good")["build"]["data_seed"] != first


def test_warm_repeats_one_set(session):
    warm = Policy(**{**POLICY.to_json(), "l2": "warm"})
    opened = session.open("matmul", PROBLEM.to_json(), warm.to_json())
    assert (opened["l2_state"], opened["sets"]) == ("warm", 1)
    assert prepare(session, "good", policy=warm)["l2_state"] == "warm"


def test_data_that_does_not_fit_is_a_status(session):
    huge = Matmul(1 << 22, 1 << 22, 1 << 22, "float32")
    opened = session.open("matmul", huge.to_json(), POLICY.to_json())
    assert opened["status"] == "out_of_memory"


def test_no_sensor_means_null_energy_with_the_reason(session):
    prepare(session, "good")
    assert session.energy(0, 6.0) == {"status": "ok", "energy_j": None, "energy_reason": "no sensor"}


def test_a_request_out_of_order_is_refused(session):
    with pytest.raises(UsageError, match="slot 5"):
        session.sample(5)
    session.close()
    with pytest.raises(UsageError, match="no problem"):
        prepare(session, "good")


def test_energy_over_two_passes(catalogue, monkeypatch):
    now = [0.0]
    frames = [Frame(i / 10, Reading(1700.0, 50.0, 0, 200.0), 20.0 * i) for i in range(400)]
    meter = ReplayMeter(frames, clock=lambda: now[0])
    session = Session(CHIP, catalogue, CpuTimer(CHIP, meter), meter)
    session.open("matmul", PROBLEM.to_json(), POLICY.to_json())
    prepare(session, "good")
    batch = session.slots[0].batch
    genuine = batch.advance

    def advance():
        now[0] += 0.01
        return genuine()

    monkeypatch.setattr(batch, "advance", advance)
    monkeypatch.setattr("klab.harness.measure.session.sustain", _on(lambda: now[0]))
    monkeypatch.setattr("klab.harness.measure.session.idle_power", lambda meter: 60.0)
    first = session.energy(0, 6.0)
    assert first["energy_j"] is None
    assert first["energy_reason"].startswith("too short")
    second = session.energy(0, 6.0)
    assert second["energy_j"] == pytest.approx(200.0 * 0.01 / batch.shape.launches, rel=0.01)
    assert second["energy_ci_low_j"] <= second["energy_j"] <= second["energy_ci_high_j"]
    assert (second["idle_power_w"], round(second["power_w"])) == (60.0, 200)


def uncapturable(catalogue, monkeypatch, **how):
    """A session in which matmul/good synchronises, on a simulated device."""
    cuda = FakeCuda(**how)
    timer = CudaTimer(CHIP, Meter(), cuda=cuda)
    timer.device, timer.l2_bytes = "cpu", 1 << 16  # the tensors stay on the CPU
    session = Session(CHIP, catalogue, timer, Meter())
    assert session.open("matmul", PROBLEM.to_json(), POLICY.to_json())["status"] == "ok"

    def build(problem, config, chip):
        def launch(i, o):
            cuda.enqueue(9.0, lambda: torch.matmul(i["x"], i["w"].T, out=o["out"]))
            cuda.synchronize()

        return launch

    kernel = catalogue.kernels["matmul/good"]
    monkeypatch.setitem(session.catalogue.kernels, "matmul/good", dataclasses.replace(kernel, build=build))
    return session


def test_a_failed_capture_that_was_undone_is_a_detail(catalogue, monkeypatch):
    found = prepare(uncapturable(catalogue, monkeypatch), "good")
    assert (found["status"], found["launch_mode"]) == ("ok", "events")
    assert found["build"]["not_captured"] == "operation not permitted when stream is capturing"


def test_a_failed_capture_that_cannot_be_undone_asks_for_a_fresh_worker_and_blames_nobody(catalogue, monkeypatch):
    session = uncapturable(catalogue, monkeypatch, mendable=False)
    found = prepare(session, "good")
    assert found["fatal"]
    assert found["not_captured"] == "operation not permitted when stream is capturing"
    insists = prepare(session, "good", policy=Policy(**{**POLICY.to_json(), "launch": "graph"}))
    assert insists["fatal"]
    assert insists["status"] == "unsupported"
    assert "not_captured" not in insists


def test_a_device_that_cannot_free_memory_is_a_status(session, monkeypatch):
    def breaks(device):
        raise RuntimeError("captures_underway.empty() INTERNAL ASSERT FAILED")

    monkeypatch.setattr("klab.harness.measure.session.release", breaks)
    assert prepare(session, "good")["status"] == "crashed"


def _on(clock):
    from klab.harness.measure.energy import sustain

    return lambda load, meter, **how: sustain(load, meter, clock=clock, **how)


def test_a_launch_that_is_not_captured_is_found_by_the_check_after_the_replay(catalogue):
    cuda = FakeCuda()
    timer = CudaTimer(CHIP, Meter(), cuda=cuda)
    timer.device, timer.l2_bytes = "cpu", 1 << 16  # the tensors stay on the CPU
    session = Session(CHIP, catalogue, timer, Meter())
    assert session.open("matmul", PROBLEM.to_json(), POLICY.to_json())["status"] == "ok"

    def captured(problem, config, chip):
        return lambda i, o: cuda.enqueue(9.0, lambda: torch.matmul(i["x"], i["w"].T, out=o["out"]))

    def behind_the_streams_back(problem, config, chip):
        def launch(i, o):
            torch.matmul(i["x"], i["w"].T, out=o["out"])
            cuda.enqueue(9.0)

        return launch

    answers = [session._make_ready(0, build(PROBLEM, None, CHIP), POLICY) for build in (captured, behind_the_streams_back)]
    assert [a["status"] for a in answers] == ["ok", "incorrect"]
    assert answers[0]["launch_mode"] == "graph"
    assert "when launched as it is timed (graph)" in answers[1]["reason"]
