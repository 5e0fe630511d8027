"""What is good and what is missing on this machine for good measurements, each with the remedy. The gathering is in probes.py."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from klab.kernels.contract import Json

LEAST_DISK_BYTES = 100 << 20
# The share of a core that other work may take before the timing of a CPU suffers.
BUSY_LOAD_PER_CORE = 0.3


@dataclass(frozen=True)
class Finding:
    """`level` is "ok", "warn" (measurements suffer) or "fail" (cannot measure what this machine is for)."""

    topic: str
    level: str
    finding: str
    remedy: str = ""

    def to_json(self) -> dict[str, Json]:
        """For `klab doctor --json`."""
        return {"topic": self.topic, "level": self.level, "finding": self.finding, "remedy": self.remedy}


def ok(topic: str, finding: str) -> Finding:
    """Nothing to do."""
    return Finding(topic, "ok", finding)


def warn(topic: str, finding: str, remedy: str) -> Finding:
    """Measurements suffer."""
    return Finding(topic, "warn", finding, remedy)


def fail(topic: str, finding: str, remedy: str) -> Finding:
    """Cannot measure."""
    return Finding(topic, "fail", finding, remedy)


def usable(findings: list[Finding]) -> bool:
    """Can this machine measure what it is for?"""
    return not any(finding.level == "fail" for finding in findings)


def lacking(topic: str, what: str, remedy: str, *, gpu: bool) -> Finding:
    """A toolkit that only kernels for GPUs need: its absence matters where there is one."""
    return warn(topic, f"{what}: its kernels do not compete", remedy) if gpu else ok(topic, f"{what}; no GPU here needs it")


def _release(text: str | None) -> tuple[int, ...]:
    """(3, 6) of "3.6.0": enough to compare."""
    parts = []
    for part in (text or "").split(".")[:2]:
        digits = "".join(c for c in part if c.isdigit())
        parts.append(int(digits) if digits else 0)
    return tuple(parts)


def judge_software(versions: dict[str, Any], gpu: bool) -> Iterator[Finding]:
    """Python, torch, Triton, CuPy, NumPy, nvidia-ml-py and the known traps. `versions` is probes.software()."""
    python = _release(versions["python"])
    if python < (3, 11):
        yield fail("python", f"Python {versions['python']}", "use Python 3.11 or newer")
    else:
        yield ok("python", f"Python {versions['python']}")
    torch, built_for = versions["torch"], versions["torch_cuda"]
    if torch is None:
        yield fail("torch", "PyTorch is not installed", "pip install 'torch>=2.11'")
    elif versions["torch_error"]:
        yield fail("torch", f"PyTorch {torch} does not import: {versions['torch_error']}", "reinstall torch")
    elif _release(torch) < (2, 11):
        yield warn("torch", f"PyTorch {torch} is older than 2.11, the oldest that is tested", "pip install -U torch")
    elif gpu and built_for is None:
        yield fail(
            "torch",
            f"PyTorch {torch} is built without CUDA, though an NVIDIA device is here",
            "pip install --force-reinstall torch (PyPI's Linux wheel has CUDA), or run with --chip cpu",
        )
    else:
        yield ok("torch", f"PyTorch {torch}" + (f" for CUDA {built_for}" if built_for else ", CPU only"))
    triton, numpy = versions["triton"], versions["numpy"]
    if triton is None:
        yield lacking("triton", "Triton is not installed", "pip install triton", gpu=gpu)
    elif _release(triton) < (3, 6):
        yield warn("triton", f"Triton {triton} is older than 3.6, the oldest that is tested", "install the Triton that your torch asks for")
    elif _release(triton) < (3, 7) and _release(numpy) >= (2, 4):
        yield warn(
            "triton",
            f"Triton {triton} with NumPy {numpy}: its interpreter breaks on NumPy 2.4 and newer; kernels on a GPU are not affected",
            "for the interpreter tests alone: pip install 'numpy<2.4', or Triton 3.7",
        )
    else:
        yield ok("triton", f"Triton {triton}")
    yield from _judge_cuda_source(versions, gpu)
    yield ok("numpy", f"NumPy {numpy}")
    if versions["nvidia-ml-py"] is not None:
        yield ok("nvidia-ml-py", f"nvidia-ml-py {versions['nvidia-ml-py']}")
    elif gpu:
        yield warn("nvidia-ml-py", "nvidia-ml-py is not installed: no clocks, no power, no energy", "pip install nvidia-ml-py")
    if versions["kernels"] is not None:
        yield ok(
            "kernels",
            f"Hugging Face's `kernels` {versions['kernels']} is here: harmless, as klab's packages are klab.kernels and klab.harness",
        )


def _judge_cuda_source(versions: dict[str, Any], gpu: bool) -> Iterator[Finding]:
    """CuPy and NVRTC, which the CUDA C++ kernels need."""
    cupy = versions["cupy"]
    if cupy is None:
        yield lacking("cupy", "CuPy is not installed", "pip install cupy-cuda13x", gpu=gpu)
    elif versions["cupy_error"]:
        yield warn("cupy", f"CuPy {cupy} does not import: {versions['cupy_error']}", "install the CuPy of your CUDA: cupy-cuda13x")
    elif gpu and versions["torch_cuda"] and versions["cupy_for"] and not versions["torch_cuda"].startswith(versions["cupy_for"]):
        yield warn(
            "cupy",
            f"CuPy is for CUDA {versions['cupy_for']}, PyTorch for {versions['torch_cuda']}: two runtimes in one process",
            f"pip install cupy-cuda{versions['torch_cuda'].split('.')[0]}x",
        )
    else:
        yield ok("cupy", f"CuPy {cupy}")
    if versions["nvrtc"] is None:
        yield lacking("nvrtc", "NVRTC, the CUDA C++ compiler, is not found", "pip install 'nvidia-cuda-nvrtc>=13.0,<13.1'", gpu=gpu)
    else:
        yield ok("nvrtc", f"NVRTC at {versions['nvrtc']}")


def judge_gpu(facts: dict[str, Any]) -> Iterator[Finding]:
    """One GPU: driver, sensors, clocks, power limit, other processes, modes. `facts` is one of probes.gpus()."""
    name = facts["name"]
    yield ok("gpu", f"{name}, driver {facts['driver']}, CUDA {facts['driver_cuda']} at most")
    sensors = {
        "energy": "energy counter",
        "power": "power",
        "clock": "SM clock",
        "temperature": "temperature",
        "reasons": "throttle reasons",
    }
    missing = [title for key, title in sensors.items() if facts[key] is None]
    if missing:
        yield warn(
            "sensors",
            f"{name}: cannot read {', '.join(missing)}; these are recorded as null",
            "give the container NVML (NVIDIA_DRIVER_CAPABILITIES=utility,compute), or ask the owner; a MIG slice has no power sensor",
        )
    else:
        yield ok(
            "sensors", f"{name}: energy counter, {facts['power']:.0f} W, {facts['clock']:.0f} MHz, {facts['temperature']:.0f} C can be read"
        )
    top, application = facts["max_sm_clock_mhz"], facts["application_sm_clock_mhz"]
    if top is not None:
        limited = (application is not None and application < top) or bool((facts["reasons"] or 0) & 0x2)
        text = f"{name}: SM clock {facts['clock'] or 0:.0f} MHz now, {top:.0f} MHz at most"
        if limited:
            yield warn(
                "clocks",
                f"{text}, limited by a setting to {application or 0:.0f} MHz",
                "intended? otherwise the owner resets it: nvidia-smi -rgc -rac",
            )
        else:
            yield ok(
                "clocks", f"{text}, not limited by application clocks (a lock set with -lgc shows only under load, in the recorded clocks)"
            )
    if facts["reasons"] and facts["reasons"] & (0x8 | 0x20 | 0x40 | 0x80):
        yield warn(
            "clocks", f"{name} is throttling now (reasons {facts['reasons']:#x})", "cool it or check its power supply before measuring"
        )
    limit, usual = facts["power_limit_w"], facts["power_limit_default_w"]
    if limit is not None and usual is not None:
        if limit < usual:
            yield warn(
                "power limit",
                f"{name}: {limit:.0f} W, below its default of {usual:.0f} W",
                f"intended? otherwise: nvidia-smi -pl {usual:.0f}",
            )
        else:
            yield ok("power limit", f"{name}: {limit:.0f} W (default {usual:.0f} W)")
    if facts["processes"]:
        held = ", ".join(f"{p['pid']} ({p['memory_mb'] if p['memory_mb'] is not None else '?'} MB)" for p in facts["processes"])
        yield warn("processes", f"{name}: other processes compute on it: {held}", "end them, or choose another device with --device")
    elif facts["processes"] is None:
        yield warn("processes", f"{name}: other processes cannot be seen", "run outside the container to see who else uses it")
    else:
        yield ok("processes", f"{name}: no other process seen on it")
    if facts["persistence"] is False:
        yield warn(
            "persistence", f"{name}: persistence mode is off: each start loads the driver anew", "the owner sets it: nvidia-smi -pm 1"
        )
    elif facts["persistence"]:
        yield ok("persistence", f"{name}: persistence mode is on")
    if facts["ecc"] is False:
        yield warn("ecc", f"{name}: ECC is off, while serving machines have it on", "compare with care; the owner sets it: nvidia-smi -e 1")
    elif facts["ecc"]:
        yield ok("ecc", f"{name}: ECC is on")


def judge_host(facts: dict[str, Any], *, gpu: bool) -> Iterator[Finding]:
    """CPU, load, governor, quota and disk. `facts` is probes.host()."""
    yield ok("cpu", f"{facts['cpu_model']}, {facts['cores']} cores usable, {facts['memory_bytes'] / 2**30:.0f} GiB of memory")
    load = facts["load"]
    if load is not None and load > BUSY_LOAD_PER_CORE * facts["cores"]:
        yield warn(
            "load", f"load average {load:.1f} on {facts['cores']} cores: others are working here", "end them, or CPU times will scatter"
        )
    elif load is not None:
        yield ok("load", f"load average {load:.1f}")
    if facts["quota"] is not None and facts["quota"] < facts["cpus"]:
        remedy = (
            "CPU times will show pauses: give the container whole CPUs (cpuset)"
            if not gpu
            else "give the container more CPUs: compiling and launching need them"
        )
        yield warn("quota", f"the container may use {facts['quota']:.1f} of {facts['cpus']} CPUs", remedy)
    if facts["governor"] not in (None, "performance"):
        yield warn(
            "governor", f"CPU frequency governor {facts['governor']!r}", "for steady CPU times: cpupower frequency-set -g performance"
        )
    elif facts["governor"]:
        yield ok("governor", "CPU frequency governor performance")
    free = facts["disk_free_bytes"]
    if not facts["disk_writable"]:
        yield fail("disk", f"{facts['results']} cannot be written", "name another folder with --results or KLAB_RESULTS")
    elif free < LEAST_DISK_BYTES:
        yield fail(
            "disk",
            f"{free / 2**20:.0f} MB free at {facts['results']}",
            "free some space, or name another folder with --results or KLAB_RESULTS",
        )
    else:
        yield ok("disk", f"{free / 2**30:.0f} GB free at {facts['results']}")
