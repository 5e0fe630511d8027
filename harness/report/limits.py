"""What a chip could do at best, and how near a measurement comes: the roofline of one device."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from klab.harness.measure.calibration import Calibration, device_of, is_measured, measured_chip
from klab.harness.plan.roofline import Roofline
from klab.harness.store.result import Result
from klab.kernels.contract import Chip
from klab.kernels.errors import KlabError


@dataclass(frozen=True)
class Limits:
    """The chip whose limits apply, or None with the reason why no limit is known for this device. `measured`: by device, the chip with the
    peaks that `klab calibrate` measured on it.
    """

    chip: Chip | None
    reason: str = ""
    measured: Mapping[str, Chip] = field(default_factory=dict)


@dataclass(frozen=True)
class Bound:
    """The least time that a problem can take on a chip and what sets it ("compute" or "memory"): work over specified limits."""

    us: float
    by: str
    peak_dtype: str


def limits_of(chip: str, device: str) -> Limits:
    """The limits of a chip by name. A CPU's are known only on the machine that it is in (they are detected, not listed)."""
    from klab.harness.catalog.chips import find_chip

    try:
        found = find_chip(chip)
    except KlabError:
        return Limits(None, f"{chip} is not in the catalog, so its peaks are not known")
    if found.kind == "cpu" and device and device not in found.title:
        return Limits(None, f"measured on another CPU ({device}); the peaks of a CPU are known only on its own machine")
    return Limits(found)


def with_measured(limits: Limits, calibrations: Mapping[str, Calibration]) -> Limits:
    """The limits with those of the chip's devices that are calibrated."""
    chip = limits.chip
    if chip is None:
        return limits
    return replace(limits, measured={uuid: measured_chip(chip, one) for uuid, one in calibrations.items() if one.chip == chip.name})


def dtype_of(result: Result) -> str:
    """The dtype whose peak bounds the problem: that of its multiplications, else its field, or that field's default."""
    named = result.problem.get("dtype", "bfloat16")
    return result.math_dtype or (named if isinstance(named, str) else "unknown")


def bound(result: Result, limits: Limits) -> Bound | None:
    """The roofline's bound for a result's problem, or None where the chip's limits are not known."""
    chip = limits.chip
    if chip is None or not result.bytes_moved or chip.peak_flops("float32") is None:
        return None
    dtype = dtype_of(result)
    us, by = Roofline(chip, dtype).bound(result.flops, result.bytes_moved)
    return Bound(us, by, dtype if chip.peak_flops(dtype) else "float32")


def share_of_measured(result: Result, limits: Limits) -> float | None:
    """The bound by the peaks that were measured on the result's own device, over the measured median; 1 is the roofline itself.

    None where that device, or the peak that bounds, was not measured.
    """
    own = limits.measured.get(device_of(result))
    found = bound(result, replace(limits, chip=own)) if own is not None else None
    if own is None or found is None or not result.median_us or not is_measured(own, found.peak_dtype if found.by == "compute" else ""):
        return None
    return found.us / result.median_us
