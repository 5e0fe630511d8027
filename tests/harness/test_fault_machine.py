"""Faults of processes, devices and clocks, injected into real runs. Those of a cluster's nodes are in test_fleet_ray.py."""

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import faulty_worker
import pytest
from fault_table import fault
from night_fleet import NightFleet, write_policy
from night_lab import START, Lab, slow, verdict
from tiny_model import CONFIG

from klab.harness.fleet import local
from klab.harness.fleet.devices import Device
from klab.harness.measure.contest import Contest
from klab.harness.measure.lock import exclusive
from klab.harness.measure.mishaps import DeviceLost
from klab.harness.plan.trial import Policy, Trial
from klab.harness.store.read import ReadReport, iter_results
from klab.harness.store.result import Result, Status
from klab.harness.watch.history import History
from klab.harness.watch.night import exit_code
from klab.kernels.contract import Chip
from klab.kernels.discover import discover
from klab.kernels.errors import CannotMeasure
from klab.kernels.matmul.problem import Matmul

CONTESTANTS = Path(__file__).with_name("contestants")
CHIP = Chip("cpu", "CPU", "cpu", 1, 2000, 2000, {"float32": 0.05}, 8 << 30, 10.0, 1 << 18)
POLICY = Policy(warmup_ms=1.0, round_ms=0.3, min_rounds=6, max_rounds=10, limit_s=5.0, threads=1)
YEARS_S = 10 * 365 * 86400.0


@pytest.fixture(autouse=True)
def _own_locks(tmp_path, monkeypatch):
    monkeypatch.setenv("KLAB_LOCK_DIR", str(tmp_path))
    for name in ("GITHUB_ACTIONS", "GITHUB_STEP_SUMMARY", "KLAB_RESULTS"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="module")
def catalogue():
    return discover([CONTESTANTS])


@pytest.fixture(scope="module")
def small_catalogue():
    return discover(only=("norm", "activation", "embedding"))


def trials(catalogue, names, shapes, policy=POLICY):
    kernels = [catalogue.kernels[f"matmul/{name}"] for name in names]
    problems = [Matmul(m, 48, 64, "float32") for m in shapes]
    return [Trial.of(kernel, p, kernel.default(p, CHIP), "cpu", policy) for p in problems for kernel in kernels]


def gone(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def children(pid):
    with suppress(OSError):
        return [int(child) for task in Path(f"/proc/{pid}/task").iterdir() for child in (task / "children").read_text().split()]
    return []


def test_kill_9_of_the_main_process_loses_no_row_and_the_same_command_continues(tmp_path, klab, monkeypatch):
    declared = fault("main-killed")
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    monkeypatch.chdir(tmp_path)
    words = ("measure", "--model", "config.json", "--chip", "cpu", "--isl", "32", "--osl", "8", "--batch", "2", "--phase", "decode",
             "-k", "norm/torch_norm", "-k", "norm/cpu_blocked", "-k", "activation/torch_activation",
             "--results", "rows", "--json")  # fmt: skip
    command = [sys.executable, "-m", "klab.harness.cli", *words]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    told = json.loads(process.stdout.readline())
    workers = children(process.pid)
    process.kill()
    rest = [json.loads(line) for line in process.communicate(timeout=120)[0].splitlines() if line.endswith("}")]
    acknowledged = {row["key"] for row in [told, *rest] if "status" in row}
    kept = {row.key for row in iter_results("rows")}
    assert acknowledged and acknowledged <= kept
    until = time.monotonic() + 120
    while not all(map(gone, workers)) and time.monotonic() < until:
        time.sleep(0.1)
    assert all(map(gone, workers)), "the worker ends with its parent"
    code, out, err = klab(*words)
    outcome = json.loads(out.splitlines()[-1])
    assert (code, outcome["known"]) == (declared.exit_code, len(kept)), err
    report = ReadReport()
    rows = list(iter_results("rows", report))
    assert len({row.key for row in rows}) == len(rows) > len(kept) and report.lines() == []


def _night_that_is_killed(place):
    os.chdir(place)

    def outcome(trial, process):
        if process == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return 100.0

    from klab.harness.cli.main import main
    from klab.harness.fleet import open as opening

    opening.open_fleet = lambda *_, **__: NightFleet(outcome)
    sys.argv = ["klab", "nightly", "--policy", "policy.toml", "--chip", "cpu", "--out", "out", "--history", "nights"]
    main()


def test_kill_9_of_a_night_keeps_the_rows_and_leaves_no_half_a_night(tmp_path):
    declared = fault("night-killed")
    write_policy(tmp_path, operators=("norm",))
    code = "import sys; sys.path[:0] = [sys.argv[1]]; import test_fault_machine; test_fault_machine._night_that_is_killed(sys.argv[2])"
    command = [sys.executable, "-c", code, str(Path(__file__).parent), str(tmp_path)]
    process = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert process.returncode == -signal.SIGKILL and "history" in declared.kept, process.stderr
    assert len(list(iter_results(tmp_path / "out"))) == 2, "one per contestant of the first pass"
    history = History(tmp_path / "nights")
    assert history.nights("cpu") == [] and history.problems == [] and not list((tmp_path / "nights").rglob("*.json"))


def test_two_runs_on_one_device(tmp_path, klab, monkeypatch):
    declared = fault("two-runs")
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    write_policy(tmp_path, operators=("norm",))
    monkeypatch.chdir(tmp_path)
    verbs = {
        "measure": ("--model", "config.json", "--isl", "32", "--osl", "8", "--batch", "2", "-k", "norm/torch_norm", "--results", "rows"),
        "nightly": ("--policy", "policy.toml", "--out", "out", "--history", "nights"),
    }
    with exclusive("cpu"):
        for verb, words in verbs.items():
            code, _, err = klab(verb, "--chip", "cpu", *words)
            assert code == declared.exit_code and declared.says in err and "Traceback" not in err
    assert not list(iter_results([path for path in (tmp_path / "rows", tmp_path / "out") if path.exists()]))


@pytest.fixture
def lossy(tmp_path, monkeypatch):
    """Two CPUs; the kernel `loses_its_device` ends the one on which it runs, as often as `times` has bytes."""
    both = [Device("cpu", "CPU", "cpu"), Device("cpu-2", "CPU", "cpu")]
    monkeypatch.setattr(local, "devices", lambda chip, only: both)
    times, count = tmp_path / "times", iter(range(9))

    def client(chip, *, cuda_device, kernel_dirs):
        return faulty_worker.faulty_client(chip, kernel_dirs, {"LOST": tmp_path / f"lost-{next(count)}", "TIMES": times})

    monkeypatch.setattr(local, "WorkerClient", client)
    return times


def test_a_gpu_that_falls_off_the_bus_blames_nobody_and_loses_nothing(lossy, catalogue, small_catalogue, tmp_path):
    one_of_two, the_last = fault("one-of-two-off-the-bus"), fault("off-the-bus")
    told = []
    wanted = trials(catalogue, ["loses_its_device", "good"], [4, 8])
    with local.Fleet(CHIP, "r", kernel_dirs=[CONTESTANTS]) as fleet:
        lossy.write_bytes(b".")
        summary = fleet.run(wanted, told.append)
        assert sorted(row.key for row in told) == sorted(trial.key for trial in wanted), "each once"
        assert {row.status for row in told} == {one_of_two.row} and fleet.size == 2
        assert any(the_last.says in note and "unspecified launch failure" in note for note in summary.notes), summary.notes
        assert any("measured again" in note for note in summary.notes)
        lossy.write_bytes(b".")
        further = trials(catalogue, ["good"], [16]) + trials(catalogue, ["loses_its_device"], [20])
        with pytest.raises(CannotMeasure, match=f"{the_last.says}: .*matmul/loses_its_device on .* ran.*No CUDA GPUs") as caught:
            fleet.run(further, told.append)
    assert [row.key for row in told[len(wanted) :]] == [further[0].key], "what was measured before stands, and who ran has no row"
    lab = Lab(tmp_path, small_catalogue, operators=("norm", "activation"))
    lab.nights(8)

    def lost(trial, process):
        if trial.problem.operator == "activation":
            raise caught.value
        return 100.0

    night = lab.night(NightFleet(lost))
    found = verdict(night, "activation chosen")
    assert (found.call, exit_code(night)) == (the_last.verdict, the_last.exit_code) and the_last.says in found.reason
    assert not any(v.fails for v in night.verdicts)


def test_a_kernel_that_takes_one_device_after_another_is_given_up(catalogue, monkeypatch):
    declared = fault("takes-devices-along")
    many = [Device(f"cpu-{n}", "CPU", "cpu") for n in range(4)]
    monkeypatch.setattr(local, "devices", lambda chip, only: many)

    class MadeUp:
        def __init__(self, group):
            self.group = group

        def run(self, **_):
            for trial in self.group:
                if trial.kernel == "matmul/loses_its_device":
                    raise DeviceLost("unspecified launch failure")
                yield Result.of(trial, Status.OK, backend="cpu", library=True, run_id="r")

    monkeypatch.setattr(local.Fleet, "contest", lambda self, client, group, wish: MadeUp(group))
    told = []
    wanted = trials(catalogue, ["good", "loses_its_device"], [4]) + trials(catalogue, ["good"], [8, 16])
    with local.Fleet(CHIP, "r", kernel_dirs=[CONTESTANTS]) as fleet:
        summary = fleet.run(wanted, told.append)
    assert sorted(row.key for row in told) == sorted(trial.key for trial in wanted) and not summary.unfinished
    (row,) = [row for row in told if row.kernel == "matmul/loses_its_device"]
    assert row.status == declared.row and declared.says in row.reason and row.backend == "cpu"


def test_a_run_whose_devices_are_all_lost_is_no_quiet_night(small_catalogue, tmp_path):
    class Ended(NightFleet):
        notes = ("10.0.0.1 was lost (its node died)",)

        def run(self, trials, on_result, **how):
            if not self.process:
                return super().run(trials, on_result, **how)
            return SimpleNamespace(unfinished=list(trials), stopped="no device left", notes=self.notes)

    night = Lab(tmp_path, small_catalogue, operators=("norm",)).night(Ended())
    assert exit_code(night) == 4 and "no device left" in night.incomplete and "10.0.0.1" in night.incomplete


@pytest.fixture
def contest_with(catalogue):
    """Run a contest of `good` and `half_speed` on a worker with these faults."""
    clients = []

    def run(faults, **policy):
        clients.append(faulty_worker.faulty_client(CHIP, [CONTESTANTS], faults))
        wanted = trials(catalogue, ["good", "half_speed"], [8], dataclasses.replace(POLICY, **policy))
        return list(Contest(clients[-1], wanted, run_id="r").run(deadline=time.monotonic() + 120))

    yield run
    for client in clients:
        client.kill()


def test_an_nvml_that_disappears_costs_clocks_and_energy_and_no_time(contest_with):
    declared = fault("nvml-disappears")
    rows = contest_with({"READINGS": 30}, energy=True, energy_s=1.0)
    assert [row.status for row in rows] == [declared.row] * 2, [row.reason for row in rows]
    for row in rows:
        assert row.median_us and row.checks == 4 and row.energy_j is None and declared.says in row.energy_reason, row.energy_reason
        assert row.clocks_mhz[0] == 1755 and row.clocks_mhz[-1] is None and row.sm_clock_mhz == 1755


@pytest.mark.parametrize(("name", "seconds"), [("clock-back", -YEARS_S), ("clock-forward", YEARS_S)])
def test_nothing_but_labels_depends_on_the_clock(small_catalogue, tmp_path, name, seconds):
    declared = fault(name)
    lab = Lab(tmp_path, small_catalogue, operators=("norm",))
    lab.nights(8)
    found = []
    for turn in range(2):
        now = START + timedelta(days=8 + turn, seconds=seconds)
        fleet = NightFleet(slow(1.2), seed=turn)
        night = lab.night(fleet) if not found else _at(lab, fleet, now)
        found.append(verdict(night, "norm chosen"))
    assert {v.call for v in found} == {declared.verdict} and exit_code(night) == declared.exit_code
    assert night.at[:4] != str(START.year) and len(lab.history.nights("cpu")) == 10, "nothing is lost from the history"


def _at(lab, fleet, now):
    from klab.harness.watch.night import run_night
    from klab.harness.watch.tracked import watched

    found = watched(lab.policy, lab.chip, lab.catalogue)
    night = run_night(lab.policy, lab.chip, fleet=fleet, history=lab.history, found=found, now=now, clock=fleet.clock)
    lab.history.add(night)
    return night


def test_a_jumping_clock_changes_no_measurement(contest_with, monkeypatch):
    monkeypatch.setattr(time, "time", time.time)
    monkeypatch.setattr(time, "time_ns", time.time_ns)
    faulty_worker.jumping(-YEARS_S)
    rows = contest_with({"CLOCK": YEARS_S})
    assert {row.status for row in rows} == {Status(fault("clock-back").row)} == {Status(fault("clock-forward").row)}
    assert all(POLICY.min_rounds <= len(row.samples_us) <= POLICY.max_rounds and 0 < row.median_us < 1e6 for row in rows)


# Where harness/ and kernels/ may ask what time it is: labels, ages of files, and how long a device was idle are no measurements.
CLOCKS = {
    "harness/measure/contest.py": "the name of a contest",
    "harness/tune/finals.py": "a seed that differs from run to run",
    "harness/store/mirror.py": "whether a file was written to just now; a wrong answer uploads it later",
    "harness/store/compact.py": "the same; what is deleted under its writer is written again (store/journal.py)",
}


def test_no_module_reads_the_wall_clock_unnoticed():
    root = Path(__file__).parents[2]
    files = [path for room in ("harness", "kernels") for path in (root / room).rglob("*.py")]
    asks = re.compile(r"\btime\.time(_ns)?\(")
    assert {path.relative_to(root).as_posix() for path in files if asks.search(path.read_text())} == set(CLOCKS)
