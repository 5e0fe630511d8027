"""Where a measurement was made: versions, driver, device, host. And the epoch: what must be equal for results to be comparable."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
import socket
import subprocess
from pathlib import Path
from typing import Any

import klab.kernels
from klab.harness.catalog.cpu_probe import probe
from klab.harness.measure import nvml as sensors
from klab.kernels.contract import Json, digest

PACKAGES = ("torch", "triton", "numpy", "scipy", "nvidia-ml-py")
CUPY = ("cupy-cuda13x", "cupy-cuda12x", "cupy")
# Named where installed. Rows of two versions do not mix in any case: the version is part of an outside kernel's source_digest.
OUTSIDE = (
    "flashinfer-python", "flash-attn", "flash-attn-3", "flash-attn-4", "vllm", "sglang-kernel", "sgl-kernel", "deep-gemm", "xformers",
    "nvidia-cudnn-frontend", "quack-kernels", "nvidia-cutlass-dsl", "tilelang", "cuda-tile",
)  # fmt: skip
EPOCH_CUDA = ("kind", "device", "driver", "torch", "triton", "cupy", "cuda", "power_limit_w")
EPOCH_CPU = ("kind", "cpu_model", "torch", "threads")


def version(*names: str) -> str | None:
    """Version of the first of these distributions that is installed, or None."""
    for name in names:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def cpu_model() -> str:
    """As the system names it: "AMD EPYC 9654 96-Core Processor"."""
    return probe().model


def software() -> dict[str, Json]:
    """Versions of what takes part in a measurement; None for what is absent, and no entry for an absent outside package."""
    found: dict[str, Json] = {"python": platform.python_version(), "system": f"{platform.system()} {platform.release()}"}
    found |= {name: version(name) for name in PACKAGES}
    found |= {name: installed for name in OUTSIDE if (installed := version(name)) is not None}
    return found | {"cupy": version(*CUPY)}


def host() -> dict[str, Json]:
    """The machine, without its name: a short hash tells two machines apart and betrays neither."""
    name = hashlib.sha256(socket.gethostname().encode()).hexdigest()[:8]
    return {"host": name, "cpu_model": cpu_model(), "cpus": os.cpu_count()}


def checkout() -> dict[str, Json]:
    """{"commit", "dirty"} of the checkout that klab runs from; None where it is not one or git is absent.

    `dirty` looks at kernels/ and harness/ alone: a changed report does not change a measurement.
    """
    root = Path(klab.kernels.__file__).resolve().parents[1]
    if not (root / ".git").exists():
        return {"commit": None, "dirty": None}
    commit = _git(root, "rev-parse", "HEAD")
    changed = _git(root, "status", "--porcelain", "--", "kernels", "harness")
    return {"commit": commit or None, "dirty": None if changed is None else bool(changed)}


def _git(root: Path, *words: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def cuda_device(properties: Any, runtime: str | None) -> dict[str, Json]:
    """Facts about a torch CUDA device from NVML; None for what NVML does not tell. No serial number is read.

    Call before this process makes a CUDA context: then every compute process that NVML lists is somebody else's.
    """
    found: dict[str, Json] = {"kind": "cuda", "device": properties.name, "cuda": runtime}
    found |= dict.fromkeys(("driver", "driver_cuda", "power_limit_w", "power_limit_default_w", "ecc", "persistence", "processes"))
    found["uuid"] = sensors.torch_address(properties).get("uuid", "")
    try:
        nvml = sensors.load()
        handle = sensors.handle_of(nvml, **sensors.torch_address(properties))
    except Exception as error:  # noqa: BLE001  ImportError, NVMLError, or a broken driver library: recorded, never fatal
        return found | {"nvml": f"{type(error).__name__}: {error}"}
    return found | nvml_facts(nvml, handle)


def nvml_facts(nvml: Any, handle: Any) -> dict[str, Json]:
    """Driver, limits, modes and foreign processes; each None where this board or this user may not know it."""

    def ask(question: Any) -> Any:
        try:
            return question()
        except (nvml.NVMLError, AttributeError):
            return None

    def watts(milliwatts: Any) -> float | None:
        return None if milliwatts is None else milliwatts / 1e3

    driver_cuda = ask(lambda: nvml.nvmlSystemGetCudaDriverVersion())
    ecc = ask(lambda: nvml.nvmlDeviceGetEccMode(handle))
    own = (os.getpid(), os.getppid())
    return {
        "driver": ask(lambda: str(nvml.nvmlSystemGetDriverVersion())),
        "driver_cuda": None if driver_cuda is None else f"{driver_cuda // 1000}.{driver_cuda % 1000 // 10}",
        "power_limit_w": watts(ask(lambda: nvml.nvmlDeviceGetEnforcedPowerLimit(handle))),
        "power_limit_default_w": watts(ask(lambda: nvml.nvmlDeviceGetPowerManagementDefaultLimit(handle))),
        "max_sm_clock_mhz": ask(lambda: nvml.nvmlDeviceGetMaxClockInfo(handle, sensors.CLOCK_SM)),
        "application_sm_clock_mhz": ask(lambda: nvml.nvmlDeviceGetApplicationsClock(handle, sensors.CLOCK_SM)),
        "ecc": None if ecc is None else bool(ecc[0]),
        "persistence": ask(lambda: bool(nvml.nvmlDeviceGetPersistenceMode(handle))),
        "processes": ask(lambda: sensors.processes(nvml, handle, own)),
    }


def epoch(environment: dict[str, Json]) -> str:
    """Identity of the conditions: results of two epochs are reported side by side and not judged against each other."""
    names = EPOCH_CUDA if environment.get("kind") == "cuda" else EPOCH_CPU
    return digest({name: environment.get(name) for name in names})
