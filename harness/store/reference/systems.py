"""The chip of a system of the tables: klab's own profile of it, or what the package states where klab has none."""

from __future__ import annotations

from pathlib import Path

from klab.harness.catalog.chips import find_chip, load_chips
from klab.harness.store.reference.tables import read_yaml, system_of
from klab.kernels.contract import Chip
from klab.kernels.errors import UsageError

# The package's names of peaks, in FLOP/s, and klab's.
PEAKS = {
    "bfloat16_tc_flops": "bfloat16",
    "fp8_tc_flops": "float8_e4m3fn",
    "int8_tc_flops": "int8",
    "fp4_tc_flops": "float4_e2m1",
}


def chip_of(name: str, root: Path) -> Chip:
    """A chip by klab's name, by the path of a profile, or by the name of a system of the tables. UsageError where nobody knows it."""
    try:
        return find_chip(name)
    except UsageError:
        own = name.lower().removesuffix("_sxm")
        if own in {chip.name for chip in load_chips()}:
            return find_chip(own)
    return _stated(system_of(name, root), root)


def _stated(system: str, root: Path) -> Chip:
    """What the package's own file says of the GPU. It states no cache and no clocks: no row counts as one that the cache made fast."""
    path = root / f"{system}.yaml"
    data = read_yaml(path) if path.is_file() else {}
    gpu, node = data.get("gpu"), data.get("node") or {}
    try:
        peaks = {PEAKS[key]: float(value) / 1e12 for key, value in (gpu or {}).items() if key in PEAKS}
        memory, bandwidth = int(gpu["mem_capacity"]), float(gpu["mem_bw"]) / 1e9  # type: ignore[index]
        power, link = float(gpu["power"]), float(node["intra_node_bw"]) / 1e9  # type: ignore[index]
    except (KeyError, TypeError, ValueError, AttributeError):
        raise UsageError(f"klab has no profile of {system}, and {path} does not state its memory, power and links") from None
    said = f"{path.name} of the reference tables"
    return Chip(
        name=system.removesuffix("_sxm"), title=f"{system} (as the reference tables state it)", kind="cuda", sm_count=0, max_clock_mhz=0.0,
        spec_clock_mhz=0.0, peak_tflops=peaks, memory_bytes=memory, memory_gb_per_s=bandwidth, l2_bytes=0, tdp_w=power, link_gb_per_s=link,
        provenance=dict.fromkeys(("peak_tflops", "memory_bytes", "memory_gb_per_s", "tdp_w", "link_gb_per_s"), said),
    )  # fmt: skip
