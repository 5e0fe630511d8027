"""Calibrates the devices of this machine that are a chip, one after another, each under its lock, and stores what was found."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from klab.harness.fleet.devices import devices
from klab.harness.measure.calibrate import PARTS, SENSOR_S, Calibrator
from klab.harness.measure.calibration import NOT_MEASURED, Calibration, Figure, read_calibrations, write_calibration
from klab.harness.measure.client import WorkerClient
from klab.harness.measure.lock import exclusive
from klab.kernels.contract import Chip


def calibrate_devices(
    chip: Chip,
    folder: Path,
    *,
    only_devices: Sequence[str] | None = None,
    parts: Sequence[str] = PARTS,
    sensor_s: float = SENSOR_S,
    say: Callable[[str], None] = lambda text: None,
) -> Iterator[tuple[Calibration, Path]]:
    """Yield each device's calibration and its file. One that measures something is written; parts that were not asked for are kept.

    CannotMeasure where the chip is not here, its device is locked, or the folder takes no files.
    """
    for device in devices(chip, only_devices):
        with exclusive(device.id):
            client = WorkerClient(chip, cuda_device=device.cuda_visible)
            try:
                name = f"{device.name} {device.id}" if device.kind == "cuda" else device.name
                found = Calibrator(client, chip, sensor_s=sensor_s, say=lambda text, name=name: say(f"{name}: {text}")).run(parts)  # type: ignore[misc]
            finally:
                client.kill()
            found = completed(found, read_calibrations([folder]).get(found.device_uuid))
            yield found, write_calibration(found, folder)


def completed(new: Calibration, before: Calibration | None) -> Calibration:
    """`new` with the figures that it did not look for, from the one before of the same epoch, with a note that says so."""
    if before is None or before.epoch != new.epoch:
        return new
    kept = {
        f.name: old
        for f in dataclasses.fields(new)
        if isinstance(old := getattr(before, f.name), Figure) and getattr(new, f.name) == NOT_MEASURED and old != NOT_MEASURED
    }
    tables = {
        name: dict(getattr(before, name)) for name in ("matmul_tflops", "anchors") if not getattr(new, name) and getattr(before, name)
    }
    if not kept and not tables:
        return new
    return new.with_figures(**kept, **tables, notes=(*new.notes, f"{', '.join([*kept, *tables])}: kept from {before.at}"))
