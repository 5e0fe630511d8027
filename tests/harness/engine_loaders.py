"""The engines' loaders by their rules, as strict oracles: what is looked for on a device, what stops them, which entry is taken.

Rules of vLLM 0.33 and SGLang 0.5.23, written from their description: names, folders, `int()` of every key, the nearest entry.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

KERNEL_ARGUMENTS = {"BLOCK_SIZE_M", "BLOCK_SIZE_N", "BLOCK_SIZE_K", "GROUP_SIZE_M", "num_warps", "num_stages"}


def vllm_moe_name(device: str, experts: int, n: int, dtype: str | None = None, block: list[int] | None = None) -> str:
    written = re.sub(r"[\s/]+", "_", device)
    if "H200" in written.split("_"):
        written = "NVIDIA_H200"
    what = f",dtype={dtype}" if dtype else ""
    shape = f",block_shape=[{block[0]},{block[1]}]" if block else ""
    return f"E={experts},N={n},device_name={written}{what}{shape}.json"


def vllm_moe(folder: Path, name: str) -> dict[int, dict[str, Any]] | None:
    """What VLLM_TUNED_CONFIG_FOLDER=folder gives."""
    path = folder / name
    if not path.exists():
        return None
    table = json.loads(path.read_text())
    table.pop("triton_version", None)
    return {int(key): value for key, value in table.items()}


def sglang_moe_name(
    device: str, experts: int, n: int, dtype: str | None = None, block: list[int] | None = None, *, down: bool = False
) -> str:
    what = f",dtype={dtype}" if dtype else ""
    shape = f",block_shape={block}" if block else ""
    return f"E={experts},N={n},device_name={device.replace(' ', '_')}{what}{shape}{'_down' if down else ''}.json"


def sglang_moe(root: Path, triton: str, name: str) -> dict[int, dict[str, Any]] | None:
    """What SGLANG_MOE_CONFIG_DIR=root gives under this Triton: its own folder first, then the newest that has the file."""
    configs = root / "configs"
    versions = [d.name.removeprefix("triton_").replace("_", ".") for d in configs.iterdir() if d.name.startswith("triton_")]
    for version in [triton, *sorted(versions, key=lambda v: tuple(int(part) for part in v.split(".")), reverse=True)]:
        path = configs / f"triton_{version.replace('.', '_')}" / name
        if path.exists():
            return {int(key): value for key, value in json.loads(path.read_text()).items()}
    return None


def taken(table: dict[int, dict[str, Any]], tokens: int) -> dict[str, Any]:
    """The entry for so many tokens, as it goes to the kernel; raises where the launch would."""
    entry = table[min(table, key=lambda key: abs(key - tokens))]
    for name in ("BLOCK_SIZE_M", "BLOCK_SIZE_N", "BLOCK_SIZE_K", "GROUP_SIZE_M"):
        entry[name]
    if unknown := set(entry) - KERNEL_ARGUMENTS:
        raise TypeError(f"the kernel has no argument {unknown}")
    for name, value in entry.items():
        if type(value) is not int or value < 1 or (name != "num_stages" and name != "GROUP_SIZE_M" and value & (value - 1)):
            raise ValueError(f"{name} = {value!r}")
    return entry
