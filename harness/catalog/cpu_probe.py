"""What the operating system says of this machine's processor. Nothing here fails: what is not known comes back as None or empty."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import re
import subprocess
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

# The copy that measures bandwidth: the least and the most bytes of each of its two buffers, and for how long it is repeated.
COPY_BYTES = (32 << 20, 256 << 20)
COPY_SECONDS = 0.3
# So many copies, in as many processes, settle the bandwidth: one quiet moment among them is enough.
PROBES = 8


@dataclass(frozen=True)
class CpuFacts:
    """Cores that this process may use, instruction-set flags (lower-case), clock, last-level cache in bytes, memory in bytes."""

    model: str
    vendor: str
    family: int | None
    machine: str
    cores: int
    cores_source: str
    flags: frozenset[str]
    clock_mhz: float | None
    clock_source: str
    cache_bytes: int | None
    memory_bytes: int | None


def probe(root: Path = Path("/")) -> CpuFacts:
    """Read /proc and /sys under `root`; macOS answers through sysctl."""
    info = _cpuinfo(root)
    allowed = _allowed_cpus()
    cores, cores_source = _cores(root, allowed)
    clock, clock_source = _clock(root, info)
    flags = info.get("flags") or info.get("Features") or _sysctl("machdep.cpu.features") + " " + _sysctl("machdep.cpu.leaf7_features")
    family = info.get("cpu family", "")
    return CpuFacts(
        model=info.get("model name") or _sysctl("machdep.cpu.brand_string") or platform.processor() or platform.machine() or "unknown CPU",
        vendor=info.get("vendor_id", ""),
        family=int(family) if family.isdigit() else None,
        machine=platform.machine().lower(),
        cores=cores,
        cores_source=cores_source,
        flags=frozenset(flags.lower().split()),
        clock_mhz=clock,
        clock_source=clock_source,
        cache_bytes=_last_level_cache(root, allowed),
        memory_bytes=_memory(root),
    )


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""


def _sysctl(name: str) -> str:
    """A value of macOS's sysctl, or an empty string."""
    if platform.system() != "Darwin":
        return ""
    try:
        return subprocess.run(["sysctl", "-n", name], capture_output=True, text=True, timeout=5, check=False).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def _cpuinfo(root: Path) -> dict[str, str]:
    """The fields of the first processor in /proc/cpuinfo."""
    first = _text(root / "proc/cpuinfo").split("\n\n")[0]
    pairs = (line.split(":", 1) for line in first.splitlines() if ":" in line)
    return {name.strip(): value.strip() for name, value in pairs}


def _allowed_cpus() -> list[int]:
    """The processors that this process may run on (a container or taskset may forbid some)."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def _cores(root: Path, allowed: list[int]) -> tuple[int, str]:
    """Physical cores among the allowed processors, no more than the container's quota rounds up to."""
    seen = set()
    for cpu in allowed:
        topology = root / f"sys/devices/system/cpu/cpu{cpu}/topology"
        core = _text(topology / "core_id")
        seen.add((_text(topology / "physical_package_id"), core) if core else ("", f"cpu{cpu}"))
    cores, source = max(len(seen), 1), "physical cores this process may use (sched affinity, /sys topology)"
    quota = _cpu_quota(root)
    if quota is not None and quota < cores:
        return max(1, round(quota + 0.49)), f"the container's CPU quota of {quota:g}"
    return cores, source


def _cpu_quota(root: Path) -> float | None:
    """Processors that the cgroup grants, or None without a limit. Version 2 first, then version 1."""
    both = _text(root / "sys/fs/cgroup/cpu.max").split()
    if len(both) != 2:
        both = [_text(root / "sys/fs/cgroup/cpu/cpu.cfs_quota_us"), _text(root / "sys/fs/cgroup/cpu/cpu.cfs_period_us")]
    if all(re.fullmatch(r"\d+", part) for part in both) and int(both[1]):
        return int(both[0]) / int(both[1])
    return None


def _clock(root: Path, info: dict[str, str]) -> tuple[float | None, str]:
    highest = _text(root / "sys/devices/system/cpu/cpu0/cpufreq/cpuinfo_max_freq")
    if highest.isdigit():
        return int(highest) / 1000, "cpuinfo_max_freq"
    now = info.get("cpu MHz", "")
    if re.fullmatch(r"\d+(\.\d+)?", now):
        return float(now), "/proc/cpuinfo (the present clock; the highest is not shown here)"
    hertz = _sysctl("hw.cpufrequency_max")
    return (int(hertz) / 1e6, "sysctl hw.cpufrequency_max") if hertz.isdigit() else (None, "")


def _last_level_cache(root: Path, allowed: list[int]) -> int | None:
    """Bytes of all last-level caches that the allowed processors share, or None."""
    found: dict[tuple[int, str], int] = {}
    for cpu in allowed:
        for index in sorted((root / f"sys/devices/system/cpu/cpu{cpu}/cache").glob("index*")):
            size = re.fullmatch(r"(\d+)([KMG]?)", _text(index / "size"))
            level = _text(index / "level")
            if size and level.isdigit() and _text(index / "type") != "Instruction":
                shared = _text(index / "shared_cpu_list") or str(cpu)
                found[int(level), shared] = int(size[1]) << {"": 0, "K": 10, "M": 20, "G": 30}[size[2]]
    if found:
        last = max(level for level, _ in found)
        return sum(size for (level, _), size in found.items() if level == last)
    for name in ("hw.l3cachesize", "hw.perflevel0.l2cachesize", "hw.l2cachesize"):
        answer = _sysctl(name)
        if answer.isdigit() and int(answer):
            return int(answer)
    return None


def _memory(root: Path) -> int | None:
    """Bytes of memory, or of the container's share of it."""
    total = re.search(r"^MemTotal:\s+(\d+) kB", _text(root / "proc/meminfo"), re.MULTILINE)
    size = int(total[1]) * 1024 if total else None
    if size is None and hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        size = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for limit in ("sys/fs/cgroup/memory.max", "sys/fs/cgroup/memory/memory.limit_in_bytes"):
        text = _text(root / limit)
        if text.isdigit() and (size is None or int(text) < size):
            size = int(text)
    return size


def copy_gb_per_s(threads: int, cache_bytes: int, seconds: float = COPY_SECONDS) -> float:
    """Memory bandwidth of a large copy by `threads` threads, in GB/s, reads and writes both counted; the best of the rounds.

    The two buffers together hold four times the last-level cache where COPY_BYTES allow. Takes about `seconds`.
    """
    elements = min(max(2 * cache_bytes, COPY_BYTES[0]), COPY_BYTES[1]) // 8
    # Both are written once first: pages appear at the first touch, which is far slower than a copy.
    source, target = np.ones(elements), np.ones(elements)
    parts = list(zip(np.array_split(source, threads), np.array_split(target, threads), strict=True))
    best = float("inf")
    deadline = time.perf_counter() + seconds
    with ThreadPoolExecutor(threads) as pool:
        while True:
            start = time.perf_counter()
            # NumPy lets go of the interpreter while it copies, so the threads really run side by side.
            list(pool.map(lambda part: np.copyto(part[1], part[0]), parts))
            stop = time.perf_counter()
            best = min(best, stop - start)
            if stop >= deadline:
                return 2 * source.nbytes / best / 1e9


def best_copy(facts: CpuFacts, cache_bytes: int, copy: Callable[[int, int], float] = copy_gb_per_s) -> tuple[float, int]:
    """(GB/s, copies): the best of the copies made so far on a processor of this model and these cores, remembered between processes.

    A busy machine copies at half its bandwidth, so one probe says little, and a limit that changes from call to call makes shares of it
    incomparable: after PROBES copies the best of them stays. Where nothing can be remembered, the copy of this process stands alone.
    """
    path = _memory_of(facts)
    best, probes = _remembered(path)
    if probes >= PROBES:
        return best, probes
    best, probes = max(best, copy(facts.cores, cache_bytes)), probes + 1
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(json.dumps({"model": facts.model, "cores": facts.cores, "gb_per_s": best, "probes": probes}))
        part.replace(path)
    return best, probes


def _memory_of(facts: CpuFacts) -> Path:
    home = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(home) / "klab" / f"cpu-{hashlib.sha256(f'{facts.model} {facts.cores}'.encode()).hexdigest()[:16]}.json"


def _remembered(path: Path) -> tuple[float, int]:
    """(GB/s, copies), or (0, 0) where nothing is remembered or it makes no sense."""
    try:
        found = json.loads(path.read_text())
        best, probes = float(found["gb_per_s"]), int(found["probes"])
    except (OSError, ValueError, KeyError, TypeError):
        return 0.0, 0
    return (best, probes) if 0 < best < 1e6 and probes > 0 else (0.0, 0)
