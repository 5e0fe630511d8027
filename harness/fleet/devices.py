"""The devices of this machine, and which of them are a given chip."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from klab.harness.catalog.chips import chip_of_device
from klab.harness.measure.nvml import torch_address
from klab.kernels.contract import Chip
from klab.kernels.errors import CannotMeasure


@dataclass(frozen=True)
class Device:
    """One place to measure. `id` is a GPU's UUID (its index where CUDA tells none) or "cpu"; `index` is CUDA's number, -1 for the CPU."""

    id: str
    name: str
    kind: str
    index: int = -1

    @property
    def cuda_visible(self) -> str:
        """What CUDA_VISIBLE_DEVICES must be for a worker to see this device and no other."""
        return self.id if self.kind == "cuda" else ""


CPU = Device("cpu", "CPU", "cpu")


def devices(chip: Chip, only: Sequence[str] | None = None) -> list[Device]:
    """The devices here that are this chip; with `only`, those of them named by UUID or CUDA index.

    CannotMeasure, saying what is here, when there is none.
    """
    if chip.kind == "cpu":
        return [CPU]
    found = _cuda()
    names = ", ".join(device.name for device, _ in found) or "no CUDA device"
    matching = [device for device, properties in found if matches(chip, properties)]
    if not matching:
        raise CannotMeasure(f"{chip.title} is not in this machine (here: {names} and the CPU); use --chip auto or --chip cpu")
    if only is None:
        return matching
    chosen = [device for device in matching if device.id in only or str(device.index) in only]
    if not chosen:
        known = ", ".join(f"{device.index} ({device.id})" for device in matching)
        raise CannotMeasure(f"no {chip.title} is called {' or '.join(only)}; here are {known}")
    return chosen


def matches(chip: Chip, properties: Any) -> bool:
    """Is a device (as torch describes it) this chip? A slice of one (MIG) is not.

    By the catalog's list of names; a device that is not in the catalog counts when its name contains the chip's ("NVIDIA H200 NVL"
    is an h200, "GH200" is none) or its multiprocessors are as many, and its compute capability is the same.
    """
    words = re.findall(r"[a-z0-9]+", properties.name.lower())
    if chip.kind != "cuda" or "mig" in words:
        return False
    known = chip_of_device(properties.name)
    if known is not None:
        return known.name == chip.name
    joined = {"".join(words[a:b]) for a, b in combinations(range(len(words) + 1), 2)}
    named = re.sub(r"[^a-z0-9]", "", chip.name.lower()) in joined
    return (named or properties.multi_processor_count == chip.sm_count) and (properties.major, properties.minor) == chip.compute_capability


def _cuda() -> list[tuple[Device, Any]]:
    """CUDA's devices as CUDA_VISIBLE_DEVICES allows, with torch's properties. CannotMeasure without torch."""
    try:
        import torch
    except ImportError:
        raise CannotMeasure("PyTorch is not installed: pip install torch") from None
    found = []
    for index in range(torch.cuda.device_count()):
        try:
            properties = torch.cuda.get_device_properties(index)
        except RuntimeError as error:  # one GPU that has fallen off the bus keeps CUDA from starting at all
            told = str(error).partition("\n")[0]
            raise CannotMeasure(
                f"CUDA does not start: {told}. Where one GPU is at fault (klab doctor), CUDA_VISIBLE_DEVICES can name the others"
            ) from None
        found.append((Device(torch_address(properties).get("uuid") or str(index), properties.name, "cuda", index), properties))
    return found
