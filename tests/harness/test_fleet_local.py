import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from klab.harness.fleet import devices as here
from klab.harness.fleet.devices import Device, devices, matches
from klab.harness.fleet.estimate import estimate_s, trial_estimate_s
from klab.harness.fleet.local import Fleet, contests, run_trials
from klab.harness.measure.limits import Limits
from klab.harness.measure.lock import exclusive
from klab.harness.plan.trial import Policy, Trial
from klab.harness.store.result import Status
from klab.kernels.contract import Chip
from klab.kernels.discover import discover
from klab.kernels.errors import CannotMeasure
from klab.kernels.matmul.problem import Matmul

CONTESTANTS = Path(__file__).with_name("contestants")
CHIP = Chip("cpu", "CPU", "cpu", 1, 2000, 2000, {"float32": 0.05}, 8 << 30, 10.0, 1 << 18)
H200 = Chip("h200", "NVIDIA H200", "cuda", 132, 1980, 1830, {"bfloat16": 989.0}, 141 << 30, 4800.0, 50 << 20, (9, 0))
POLICY = Policy(warmup_ms=1.0, round_ms=0.3, min_rounds=6, max_rounds=10, limit_s=5.0, threads=1)
ENDLESS = Policy(**{**POLICY.to_json(), "max_rounds": 10**6, "target_ci": 1e-9, "limit_s": 1e6})


@pytest.fixture(autouse=True)
def _own_locks(tmp_path, monkeypatch):
    monkeypatch.setenv("KLAB_LOCK_DIR", str(tmp_path))


@pytest.fixture(scope="module")
def catalogue():
    return discover([CONTESTANTS])


def trials(catalogue, names, shapes, policy=POLICY):
    found = []
    for m in shapes:
        problem = Matmul(m, 48, 64, "float32")
        for name in names:
            kernel = catalogue.kernels[f"matmul/{name}"]
            found.append(Trial.of(kernel, problem, kernel.default(problem, CHIP), "cpu", policy))
    return found


def test_every_trial_of_every_problem_gets_a_result(catalogue):
    told = []
    wanted = trials(catalogue, ["good", "half_speed", "wrong"], [4, 8, 16])
    summary = run_trials(wanted, chip=CHIP, run_id="r", on_result=told.append, kernel_dirs=[CONTESTANTS])
    assert sorted(row.key for row in told) == sorted(trial.key for trial in wanted)
    assert summary.by_status == {Status.OK: 6, Status.INCORRECT: 3}
    assert (summary.unfinished, summary.stopped, summary.notes) == ([], "", [])
    assert [row.problem["m"] for row in told] == sorted(row.problem["m"] for row in told), "problems in the order given"


def test_the_deadline_is_obeyed_and_what_stood_is_kept(catalogue):
    told = []
    wanted = trials(catalogue, ["good", "half_speed"], range(1, 200), ENDLESS)
    with Fleet(CHIP, "r", kernel_dirs=[CONTESTANTS]) as fleet:
        fleet.environment()  # a worker takes seconds to start
        began = time.monotonic()
        summary = fleet.run(wanted, told.append, deadline=began + 10.0)
        spent = time.monotonic() - began
    # The first contest would go on for ever.
    assert 8.0 < spent < 60.0
    assert summary.stopped == "deadline"
    assert {row.status for row in told} == {Status.OK}
    assert len(told) + len(summary.unfinished) == len(wanted)


def test_a_deadline_that_has_passed_measures_nothing(catalogue):
    wanted = trials(catalogue, ["good"], [4])
    summary = run_trials(wanted, chip=CHIP, run_id="r", on_result=pytest.fail, kernel_dirs=[CONTESTANTS], deadline=time.monotonic())
    assert summary.unfinished == wanted
    assert summary.stopped == "deadline"


def test_a_kernel_that_hung_is_skipped_on_the_other_problems(catalogue):
    told = []
    wanted = trials(catalogue, ["good", "hangs"], [4, 8, 16])
    limits = Limits(prepare_s=5.0)
    summary = run_trials(wanted, chip=CHIP, run_id="r", on_result=told.append, kernel_dirs=[CONTESTANTS], limits=limits)
    assert summary.by_status == {Status.OK: 3, Status.TIMEOUT: 3}
    hung = [row for row in told if row.status is Status.TIMEOUT]
    assert hung[0].reason == "no answer to prepare within 5 s"
    assert {row.reason for row in hung[1:]} == {f"skipped: it hung on {hung[0].problem_label} in this run"}
    assert len({row.epoch for row in told}) == 1
    assert summary.unfinished == []


def test_a_device_that_is_being_measured_is_not_measured_twice(catalogue):
    holder = subprocess.Popen(
        [sys.executable, "-c", "from klab.harness.measure.lock import exclusive\nwith exclusive('cpu'): print(1, flush=True); input()"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    holder.stdout.readline()
    with pytest.raises(CannotMeasure, match=f"process {holder.pid}"):
        run_trials(trials(catalogue, ["good"], [4]), chip=CHIP, run_id="r", on_result=pytest.fail, kernel_dirs=[CONTESTANTS])
    holder.communicate(b"\n")


def test_what_on_result_raises_ends_the_run(catalogue):
    def full(row):
        raise OSError(28, "No space left on device")

    began = time.monotonic()
    wanted = trials(catalogue, ["good"], [4]) + trials(catalogue, ["hangs"], [8])
    with pytest.raises(OSError, match="No space"):
        run_trials(wanted, chip=CHIP, run_id="r", on_result=full, kernel_dirs=[CONTESTANTS])
    assert time.monotonic() - began < Limits().prepare_s, "nobody waited for what hangs"
    with exclusive("cpu"):
        pass  # nobody holds the device any more


INTERRUPTED = """
import sys
from klab.harness.fleet.local import run_trials
from klab.harness.measure.client import WorkerClient
sys.path.insert(0, {tests!r})
import test_fleet_local as t
ask, told, rounds = WorkerClient.ask, [], iter(range(10**6))
def ask_and_tell(self, operation, **how):
    answer = ask(self, operation, **how)
    if told and operation == "sample" and next(rounds) == 20:
        print("in the midst of the second problem", flush=True)
    return answer
WorkerClient.ask = ask_and_tell
catalogue = t.discover([t.CONTESTANTS])
wanted = t.trials(catalogue, ["good"], [4]) + t.trials(catalogue, ["good", "half_speed"], range(5, 100), t.ENDLESS)
def tell(row):
    told.append(row)
    print("told", row.status.value, len(row.samples_us), flush=True)
try:
    run_trials(wanted, chip=t.CHIP, run_id="r", on_result=tell, kernel_dirs=[t.CONTESTANTS])
except KeyboardInterrupt:
    print("interrupted", flush=True)
    sys.exit(130)
"""


def test_ctrl_c_finishes_the_running_trials_and_keeps_them():
    script = INTERRUPTED.format(tests=str(Path(__file__).parent))
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline().startswith("told ok")
    assert process.stdout.readline().startswith("in the midst")
    process.send_signal(signal.SIGINT)
    rest, _ = process.communicate(timeout=120)
    lines = rest.splitlines()
    assert process.returncode == 130
    assert lines[-1] == "interrupted"
    assert len(lines) == 3, "both contestants of the problem that was running, no other"
    assert all(line.startswith("told ok") and int(line.split()[-1]) >= 6 for line in lines[:-1])


def test_trials_of_a_problem_stay_together_and_keep_their_order(catalogue):
    mixed = trials(catalogue, ["good"], [4, 8]) + trials(catalogue, ["half_speed"], [4, 8])
    energetic = [trial.with_policy(energy=True) for trial in trials(catalogue, ["chatty"], [8])]
    warm = [trial.with_policy(l2="warm") for trial in trials(catalogue, ["good"], [4])]
    groups = contests(mixed + energetic + warm)
    assert [[t.kernel.split("/")[1] for t in group] for group in groups] == [
        ["good", "half_speed"],
        ["good", "half_speed", "chatty"],
        ["good"],
    ]


def gpu(name, sms=132, capability=(9, 0), uuid="a-b"):
    return SimpleNamespace(name=name, multi_processor_count=sms, major=capability[0], minor=capability[1], uuid=uuid)


@pytest.mark.parametrize(
    ("device", "is_it"),
    [
        (gpu("NVIDIA H200"), True),
        (gpu("NVIDIA H200 NVL"), True),
        (gpu("NVIDIA GH200 480GB"), False),
        (gpu("NVIDIA H100 80GB HBM3"), False),
        (gpu("NVIDIA H200 MIG 1g.18gb", sms=16), False),
        (gpu("NVIDIA B200", 148, (10, 0)), False),
        (gpu("NVIDIA H200", capability=(8, 0)), True),  # the catalog's list of names decides
    ],
)
def test_a_device_is_the_chip_of_its_name(device, is_it):
    if "GH200" in device.name:
        device.multi_processor_count = 144
    assert matches(H200, device) is is_it


def test_a_chip_that_is_not_here_is_one_line_that_says_what_is(monkeypatch):
    monkeypatch.setattr(here, "_cuda", lambda: [(Device("GPU-1", "NVIDIA L4", "cuda", 0), gpu("NVIDIA L4", 58, (8, 9)))])
    with pytest.raises(CannotMeasure, match=r"NVIDIA H200 is not in this machine \(here: NVIDIA L4 and the CPU\); use --chip"):
        devices(H200)


def test_devices_are_chosen_by_index_or_uuid(monkeypatch):
    found = [(Device(f"GPU-{i}", "NVIDIA H200", "cuda", i), gpu("NVIDIA H200")) for i in range(3)]
    monkeypatch.setattr(here, "_cuda", lambda: found)
    assert [d.id for d in devices(H200)] == ["GPU-0", "GPU-1", "GPU-2"]
    assert [d.id for d in devices(H200, ["1", "GPU-2"])] == ["GPU-1", "GPU-2"]
    assert devices(H200)[1].cuda_visible == "GPU-1"
    with pytest.raises(CannotMeasure, match="no NVIDIA H200 is called 7"):
        devices(H200, ["7"])


def test_cuda_that_does_not_start_cannot_measure_and_is_no_traceback(monkeypatch):
    """One GPU off the bus keeps CUDA from starting: exit code 4, and not the 1 of a slow or refused one."""
    import torch

    from klab.harness.catalog import chips

    def broken(index):
        raise RuntimeError("CUDA unknown error - this may be due to an incorrectly set up environment\nmore")

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", broken)
    monkeypatch.setattr(torch.cuda, "get_device_name", broken)
    for ask in (lambda: devices(H200), lambda: chips.find_chip("auto")):
        with pytest.raises(CannotMeasure, match="CUDA does not start: CUDA unknown error"):
            ask()


def test_the_cpu_is_always_here():
    (cpu,) = devices(CHIP)
    assert (cpu.id, cpu.cuda_visible) == ("cpu", "")


def test_estimates_grow_with_what_is_asked(catalogue):
    one = trials(catalogue, ["good"], [4])
    two = trials(catalogue, ["good", "half_speed"], [4])
    assert estimate_s([], CHIP) == 0.0
    assert 0 < estimate_s(one, CHIP) < estimate_s(two, CHIP)
    assert estimate_s(two, CHIP) < estimate_s(trials(catalogue, ["good"], [4, 8]), CHIP), "each problem costs its data"
    wants = one[0].with_policy(energy=True)
    assert trial_estimate_s(wants, H200) > trial_estimate_s(one[0], H200) + 6.0
    assert trial_estimate_s(wants, CHIP) == trial_estimate_s(one[0], CHIP), "a CPU has no sensor"
    laps_s = estimate_s(two, CHIP, anchors=["matmul", "copy"]) - estimate_s(two, CHIP)
    assert laps_s > 30 * 2 * one[0].policy.round_ms / 1e3, "each anchor has a round in every lap"
    assert laps_s == pytest.approx(estimate_s(one, CHIP, anchors=["matmul", "copy"]) - estimate_s(one, CHIP)), "once per lap, not per trial"
    assert trial_estimate_s(one[0].with_policy(limit_s=0.01), CHIP) < trial_estimate_s(one[0], CHIP)


def test_a_fleet_keeps_its_worker_and_a_problems_data_from_run_to_run(catalogue):
    problem = trials(catalogue, ["good"], [4])[0].problem
    first, second, guest = (trials(catalogue, [name], [4])[0] for name in ("good", "half_speed", "good"))
    other = trials(catalogue, ["good"], [8])
    told = []
    with Fleet(CHIP, "r", kernel_dirs=[CONTESTANTS]) as fleet:
        fleet.run([first], told.append, keep_data=True)
        worker = fleet._seats[0].client.pid
        fleet.run([second], told.append, keep_data=True, guests={problem.key: guest})
        fleet.run([first.with_policy(seed=5)], told.append, keep_data=True)
        fleet.run(other, told.append, keep_data=True)
        fleet.run([second], told.append)
        assert fleet._seats[0].client.pid == worker and fleet.size == 1
        with pytest.raises(CannotMeasure, match="being measured"), exclusive("cpu"):
            pass
        assert fleet.busy_s > 0
    with exclusive("cpu"):
        pass
    assert [row.status for row in told] == [Status.OK] * 5 and [row.key for row in told] == [
        t.key for t in (first, second, first.with_policy(seed=5), *other, second)
    ]
    seeds = [row.build["data_seed"] for row in told]
    assert seeds[0] == seeds[1] and len(set(seeds)) == 4, (
        "the data of the same problem serves again, but for another seed or without asking"
    )
    beside = told[1].build["contest"]
    assert beside["contestants"] == 2 and told[0].build["contest"]["contestants"] == 1, "the guest ran along and has no row"


def test_several_devices_share_the_contests_and_a_locked_one_is_left_out(catalogue, monkeypatch):
    both = [Device("cpu", "CPU", "cpu"), Device("cpu-2", "CPU", "cpu")]
    monkeypatch.setattr("klab.harness.fleet.local.devices", lambda chip, only: both)
    told = []
    wanted = trials(catalogue, ["good"], [4, 8, 16])
    held, release = threading.Event(), threading.Event()

    def hold():
        with exclusive("cpu-2"):
            held.set()
            release.wait()

    thread = threading.Thread(target=hold)
    thread.start()
    assert held.wait(60)
    try:
        summary = run_trials(wanted, chip=CHIP, run_id="r", on_result=told.append, kernel_dirs=[CONTESTANTS])
    finally:
        release.set()
        thread.join()
    assert len(told) == 3
    assert len(summary.notes) == 1
    assert f"cpu-2 is being measured by process {os.getpid()}" in summary.notes[0]
