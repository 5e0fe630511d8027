import json
import subprocess
import sys
from types import SimpleNamespace

import pytest

from klab.harness.measure import probes
from klab.harness.measure.environment import EPOCH_CPU, EPOCH_CUDA, checkout, epoch, host, software
from klab.harness.measure.health import Finding, judge_gpu, judge_host, judge_software, usable

MODERN = {
    "python": "3.12.3",
    "torch": "2.13.0",
    "torch_cuda": "13.0",
    "torch_error": "",
    "triton": "3.7.1",
    "cupy": "14.2.0",
    "cupy_for": "13",
    "cupy_error": "",
    "numpy": "2.4.6",
    "nvidia-ml-py": "13.0",
    "nvrtc": "/lib/libnvrtc.so.13",
    "kernels": None,
}
BOARD = {
    "name": "NVIDIA H200",
    "driver": "580.1",
    "driver_cuda": "13.0",
    "energy": 1.0,
    "power": 75.0,
    "clock": 345.0,
    "temperature": 30.0,
    "reasons": 1,
    "max_sm_clock_mhz": 1980,
    "application_sm_clock_mhz": 1980,
    "power_limit_w": 700.0,
    "power_limit_default_w": 700.0,
    "processes": [],
    "persistence": True,
    "ecc": True,
}
HOST = {
    "cpu_model": "CPU",
    "cores": 8,
    "cpus": 8,
    "memory_bytes": 1 << 34,
    "load": 0.1,
    "quota": None,
    "governor": None,
    "results": "results/local",
    "disk_free_bytes": 1 << 36,
    "disk_writable": True,
}


def levels(findings):
    return {f.topic: f.level for f in sorted(findings, key=lambda f: ("ok", "warn", "fail").index(f.level))}


def test_a_good_gpu_machine_has_nothing_to_mend():
    findings = [*judge_software(MODERN, True), *judge_gpu(BOARD), *judge_host(HOST, gpu=True)]
    assert {f.level for f in findings} == {"ok"}
    assert usable(findings)


@pytest.mark.parametrize(
    ("change", "gpu", "topic", "level", "says"),
    [
        ({"torch": None}, False, "torch", "fail", "not installed"),
        ({"torch_error": "ImportError: libcudart"}, False, "torch", "fail", "libcudart"),
        ({"torch_cuda": None}, True, "torch", "fail", "without CUDA"),
        ({"torch_cuda": None}, False, "torch", "ok", "CPU only"),
        ({"torch": "2.6.0"}, True, "torch", "warn", "older than 2.11"),
        ({"python": "3.10.2"}, False, "python", "fail", "3.10.2"),
        ({"triton": "3.6.0", "numpy": "2.5.2"}, True, "triton", "warn", "interpreter breaks on NumPy 2.4"),
        ({"triton": "3.6.0", "numpy": "2.3.0"}, True, "triton", "ok", "3.6.0"),
        ({"triton": None}, True, "triton", "warn", "not installed"),
        ({"triton": None}, False, "triton", "ok", "no GPU here needs it"),
        ({"cupy": None}, True, "cupy", "warn", "not installed"),
        ({"cupy_error": "ImportError: libcublas"}, True, "cupy", "warn", "libcublas"),
        ({"cupy_for": "12"}, True, "cupy", "warn", "two runtimes"),
        ({"nvrtc": None}, True, "nvrtc", "warn", "compiler"),
        ({"nvidia-ml-py": None}, True, "nvidia-ml-py", "warn", "no clocks, no power"),
        ({"kernels": "0.9"}, True, "kernels", "ok", "harmless"),
    ],
)
def test_software_traps(change, gpu, topic, level, says):
    (found,) = [f for f in judge_software(MODERN | change, gpu) if f.topic == topic]
    assert (found.level, says in found.finding) == (level, True), found
    assert bool(found.remedy) is (level != "ok"), "what is wrong has a remedy"


@pytest.mark.parametrize(
    ("change", "topic", "says"),
    [
        ({"energy": None, "power": None}, "sensors", "energy counter, power"),
        ({"application_sm_clock_mhz": 1500}, "clocks", "limited by a setting to 1500 MHz"),
        ({"reasons": 0x48}, "clocks", "throttling now"),
        ({"power_limit_w": 500.0}, "power limit", "below its default of 700 W"),
        ({"processes": [{"pid": 7, "memory_mb": 512}]}, "processes", "7 (512 MB)"),
        ({"processes": None}, "processes", "cannot be seen"),
        ({"persistence": False}, "persistence", "off"),
        ({"ecc": False}, "ecc", "off"),
    ],
)
def test_gpu_findings(change, topic, says):
    findings = list(judge_gpu(BOARD | change))
    (found,) = [f for f in findings if f.level != "ok"]
    assert (found.topic, found.level) == (topic, "warn")
    assert says in found.finding
    assert found.remedy
    assert usable(findings), "a warning does not make a machine unusable"


@pytest.mark.parametrize(
    ("change", "topic", "level"),
    [
        ({"load": 5.0}, "load", "warn"),
        ({"quota": 1.5}, "quota", "warn"),
        ({"governor": "powersave"}, "governor", "warn"),
        ({"disk_free_bytes": 1 << 20}, "disk", "fail"),
        ({"disk_writable": False}, "disk", "fail"),
    ],
)
def test_host_findings(change, topic, level):
    found = [f for f in judge_host(HOST | change, gpu=False) if f.level != "ok"]
    assert [(f.topic, f.level, bool(f.remedy)) for f in found] == [(topic, level, True)]


def test_a_board_that_tells_nothing_is_still_described():
    silent = dict.fromkeys(BOARD) | {"name": "GPU"}
    assert levels(judge_gpu(silent))["sensors"] == "warn"


def test_gpus_are_read_through_nvml():
    class Error(Exception):
        value = 3

    def refuse(*args):
        raise Error("Insufficient Permissions")

    library = SimpleNamespace(
        NVMLError=Error,
        NVML_ERROR_UNINITIALIZED=1,
        NVML_ERROR_DRIVER_NOT_LOADED=9,
        NVML_ERROR_GPU_IS_LOST=15,
        nvmlDeviceGetCount=lambda: 1,
        nvmlDeviceGetHandleByIndex=lambda i: "h",
        nvmlDeviceGetName=lambda h: "NVIDIA H200",
        nvmlSystemGetDriverVersion=lambda: "580.1",
        nvmlSystemGetCudaDriverVersion=lambda: 13000,
        nvmlDeviceGetEnforcedPowerLimit=lambda h: 700_000,
        nvmlDeviceGetPowerManagementDefaultLimit=lambda h: 700_000,
        nvmlDeviceGetMaxClockInfo=lambda h, k: 1980,
        nvmlDeviceGetApplicationsClock=refuse,
        nvmlDeviceGetEccMode=lambda h: (1, 1),
        nvmlDeviceGetPersistenceMode=lambda h: 1,
        nvmlDeviceGetComputeRunningProcesses=lambda h: [SimpleNamespace(pid=42, usedGpuMemory=3 << 20)],
        nvmlDeviceGetFieldValues=refuse,
        nvmlDeviceGetPowerUsage=refuse,
        nvmlDeviceGetTotalEnergyConsumption=refuse,
        nvmlDeviceGetClockInfo=lambda h, k: 345,
        nvmlDeviceGetTemperature=lambda h, k: 31,
        nvmlDeviceGetCurrentClocksEventReasons=lambda h: 1,
    )
    (facts,), why = probes.gpus(library)
    assert why == ""
    assert (facts["driver_cuda"], facts["power_limit_w"], facts["ecc"], facts["processes"]) == (
        "13.0",
        700.0,
        True,
        [{"pid": 42, "memory_mb": 3}],
    )
    assert (facts["energy"], facts["power"], facts["application_sm_clock_mhz"]) == (None, None, None)
    assert levels(judge_gpu(facts))["sensors"] == "warn"


def test_a_device_without_a_working_driver_makes_the_machine_unusable(monkeypatch, tmp_path):
    monkeypatch.setattr(probes, "has_nvidia_device", lambda: True)
    monkeypatch.setattr(probes, "gpus", lambda: ([], "NVMLError: Driver Not Loaded"))
    findings = probes.examine(tmp_path)
    assert not usable(findings)
    (found,) = [f for f in findings if f.topic == "gpu"]
    assert "Driver Not Loaded" in found.finding


def test_nvidia_devices_are_seen_in_the_file_system(tmp_path):
    assert not probes.has_nvidia_device(tmp_path)
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev/nvidia0").touch()
    assert probes.has_nvidia_device(tmp_path)


def doctor(*words, **environment):
    import os

    return subprocess.run(
        [sys.executable, "-m", "klab.harness.cli", "doctor", *words],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env=os.environ | environment,
    )


def test_the_command_says_the_same_in_json_and_its_exit_code(tmp_path):
    done = doctor("--json", "--results", str(tmp_path))
    found = [Finding(**json.loads(line)) for line in done.stdout.splitlines()]
    assert {"python", "torch", "numpy", "gpu", "cpu", "disk"} <= {f.topic for f in found}
    assert done.returncode == (0 if usable(found) else 4)
    assert all(f.remedy for f in found if f.level != "ok")


def test_the_command_is_not_usable_without_a_place_for_results(tmp_path):
    file = tmp_path / "taken"
    file.write_text("")
    done = doctor("--results", str(file))
    assert done.returncode == 2
    assert "is a file" in done.stderr
    assert "Traceback" not in done.stderr


def test_epochs_change_with_what_changes_measurements_and_with_nothing_else():
    cuda = dict.fromkeys(EPOCH_CUDA, "x") | {"kind": "cuda", "host": "a", "uuid": "GPU-1", "commit": "1"}
    assert epoch(cuda) == epoch(cuda | {"host": "b", "uuid": "GPU-2", "commit": "2"})
    assert all(epoch(cuda | {name: "y"}) != epoch(cuda) for name in EPOCH_CUDA if name != "kind")
    cpu = dict.fromkeys(EPOCH_CPU, "x") | {"kind": "cpu", "triton": "3.6"}
    assert epoch(cpu) == epoch(cpu | {"triton": "3.7"})
    assert epoch(cpu | {"threads": 2}) != epoch(cpu | {"threads": 4})


def test_the_environment_is_json_and_does_not_name_the_host():
    import socket

    text = json.dumps({**software(), **host()})
    assert socket.gethostname() not in text
    assert json.loads(text)["python"]


def test_the_commit_is_known_in_a_checkout_and_null_outside(monkeypatch, tmp_path):
    def git(*words):
        subprocess.run(["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b", *words], check=True, capture_output=True)

    (tmp_path / "kernels").mkdir()
    module = tmp_path / "kernels/__init__.py"
    module.write_text("")
    monkeypatch.setattr("klab.kernels.__file__", str(module))
    assert checkout() == {"commit": None, "dirty": None}
    git("init", "-q")
    git("add", ".")
    git("commit", "-qm", "x")
    clean = checkout()
    assert (len(clean["commit"]), clean["dirty"]) == (40, False)
    module.write_text("changed = 1\n")
    assert checkout() == {"commit": clean["commit"], "dirty": True}
