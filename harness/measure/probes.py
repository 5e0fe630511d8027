"""Gathers the facts that health.py judges. Nothing here raises: what cannot be known is None, with the error beside it where it tells."""

from __future__ import annotations

import ctypes.util
import importlib
import importlib.metadata
import os
import shutil
import site
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from klab.harness.catalog.cpu_probe import probe
from klab.harness.measure import environment, nvml
from klab.harness.measure.faults import one_line
from klab.harness.measure.health import Finding, fail, judge_gpu, judge_host, judge_software, ok, warn


def software() -> dict[str, Any]:
    """Versions, what torch and CuPy are built for, their import errors, and where NVRTC is."""
    found: dict[str, Any] = environment.software()
    found |= {"kernels": environment.version("kernels"), "nvrtc": find_nvrtc()}
    torch, found["torch_error"] = _import("torch", found["torch"])
    found["torch_cuda"] = torch.version.cuda if torch is not None else None
    _, found["cupy_error"] = _import("cupy", found["cupy"])
    found["cupy_for"] = next((name[-3:-1] for name in environment.CUPY[:2] if environment.version(name)), None)
    return found


def _import(name: str, installed: Any) -> tuple[Any, str]:
    if installed is None:
        return None, ""
    try:
        return importlib.import_module(name), ""
    except Exception as error:  # noqa: BLE001  a broken installation raises anything
        return None, one_line(error)


def find_nvrtc() -> str | None:
    """The NVRTC library: NVIDIA's wheels, the toolkit named by CUDA_HOME or CUDA_PATH, or the system's loader."""
    folders = [Path(p) / "nvidia" for p in {*sys.path, *site.getsitepackages()} if p]
    patterns = ["*/lib/libnvrtc.so*", "*/lib64/libnvrtc.so*"]
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if os.environ.get(variable):
            folders.append(Path(os.environ[variable]))
            patterns += ["lib64/libnvrtc.so*", "lib/libnvrtc.so*"]
    folders.append(Path("/usr/local/cuda"))
    for folder in folders:
        for pattern in (*patterns, "lib64/libnvrtc.so*"):
            for path in sorted(folder.glob(pattern)) if folder.is_dir() else ():
                if "builtins" not in path.name:
                    return str(path)
    return ctypes.util.find_library("nvrtc")


def has_nvidia_device(root: Path = Path("/")) -> bool:
    """Is there an NVIDIA device or driver, whatever Python can do with it?"""
    return (root / "proc/driver/nvidia/version").exists() or (root / "dev/nvidia0").exists() or (root / "dev/dxg").exists()


def gpus(library: Any = None) -> tuple[list[dict[str, Any]], str]:
    """(facts of each GPU that NVML lists, why there are none)."""
    try:
        library = library or nvml.load()
        count = library.nvmlDeviceGetCount()
    except ImportError:
        return [], "nvidia-ml-py is not installed"
    except Exception as error:  # noqa: BLE001  NVMLError without a driver
        return [], one_line(error)
    return [_gpu(library, library.nvmlDeviceGetHandleByIndex(index)) for index in range(count)], ""


def _gpu(library: Any, handle: Any) -> dict[str, Any]:
    meter = nvml.NvmlMeter(library, handle)
    reading = meter.read()
    try:
        name = str(library.nvmlDeviceGetName(handle))
    except library.NVMLError:
        name = "GPU"
    return environment.nvml_facts(library, handle) | {
        "name": name,
        "energy": meter.energy_j(),
        "power": reading.power_w,
        "clock": reading.sm_clock_mhz,
        "temperature": reading.temperature_c,
        "reasons": reading.throttle_reasons,
    }


def host(results: Path) -> dict[str, Any]:
    """CPU, load, quota, governor, and the disk under `results` (which need not exist yet)."""
    facts = probe(Path("/"))
    existing = next((p for p in (results, *results.absolute().parents) if p.exists()), Path("/"))
    governor = Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")
    return {
        "cpu_model": facts.model,
        "cores": facts.cores,
        "cpus": os.cpu_count() or 1,
        "memory_bytes": facts.memory_bytes or 0,
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "quota": _quota(Path("/sys/fs/cgroup/cpu.max")),
        "governor": governor.read_text().strip() if governor.is_file() else None,
        "results": str(results),
        "disk_free_bytes": shutil.disk_usage(existing).free,
        "disk_writable": os.access(existing, os.W_OK),
    }


def _quota(path: Path) -> float | None:
    """CPUs' worth of time that the container may use (cgroup v2), or None."""
    try:
        quota, period = path.read_text().split()
        return None if quota == "max" else int(quota) / int(period)
    except (OSError, ValueError):
        return None


def examine(results: Path) -> list[Finding]:
    """Everything that `klab doctor` says."""
    return list(_examine(results))


def _examine(results: Path) -> Iterator[Finding]:
    device = has_nvidia_device()
    found, why_none = gpus()
    versions = software()
    yield from judge_software(versions, device)
    if found:
        for facts in found:
            yield from judge_gpu(facts)
        yield from _judge_cuda_works(versions)
    elif device:
        yield fail(
            "gpu",
            f"an NVIDIA device is here, but NVML does not answer: {why_none}",
            "install the driver's userland (nvidia-smi must work), and nvidia-ml-py",
        )
    else:
        yield ok("gpu", "no NVIDIA device: the CPU is the chip (--chip cpu), and power is not measured")
    yield from judge_host(host(results), gpu=bool(found))


def _judge_cuda_works(versions: dict[str, Any]) -> Iterator[Finding]:
    """Can torch reach the GPU that NVML sees?"""
    if versions["torch_cuda"] is None:
        return
    import torch

    if torch.cuda.is_available():
        yield ok("cuda", f"PyTorch sees {torch.cuda.device_count()} CUDA device(s)")
    elif os.environ.get("CUDA_VISIBLE_DEVICES") == "":
        yield warn("cuda", "CUDA_VISIBLE_DEVICES is empty: every GPU is hidden", "unset it to measure on the GPU")
    else:
        yield fail(
            "cuda",
            "PyTorch cannot reach the GPU",
            "is the driver new enough for this PyTorch? `python -c 'import torch; torch.cuda.init()'` says why",
        )
