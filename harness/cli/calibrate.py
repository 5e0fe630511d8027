"""`klab calibrate`: what this device's power sensor does, what a launch costs, and the peaks that it really reaches."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from klab.harness.cli import _options
from klab.harness.cli._console import emit, out, table, talk

if TYPE_CHECKING:
    from klab.harness.measure.calibration import Calibration
    from klab.kernels.contract import Chip

Devices = Annotated[list[str] | None, typer.Option("--device", help="Only this GPU, by UUID or CUDA index. Repeatable. Default: all.")]
Parts = Annotated[
    list[str] | None, typer.Option("--only", help="Only this part: anchors, launch, matmul or sensor. Repeatable. The rest is kept.")
]
Seconds = Annotated[float, typer.Option("--seconds", min=5.0, max=600.0, help="How long the power sensor is watched under pulses of load.")]
Show = Annotated[bool, typer.Option("--show", help="Measure nothing: show the calibrations that are stored.")]

_COLUMNS = ("figure", "value", "95%", "of the specification", "how")
_SENSORS = {
    "sensor_period_ms": "power reading: updated every, ms",
    "sensor_window_ms": "power reading: averages over, ms",
    "average_period_ms": "driver's average: updated every, ms",
    "average_window_ms": "driver's average: averages over, ms",
    "counter_period_ms": "energy counter: updated every, ms",
    "counter_window_ms": "energy counter: sees, ms of that",
}
_LAUNCHES = {
    "launch_overhead_us": "launch, us",
    "graph_overhead_us": "launch from a graph, us",
}


def command(app: typer.Typer) -> None:
    """Register the verb."""

    @app.command()
    def calibrate(
        chip: _options.Chip = "auto",
        device: Devices = None,
        only: Parts = None,
        seconds: Seconds = 40.0,
        results: _options.Results = None,
        show: Show = False,
        as_json: _options.AsJson = False,
    ) -> None:
        """Find out what this device does: its power sensor's period and window, launch overhead, copy bandwidth, matmul peaks, anchors.

        About a minute per GPU, seconds for a CPU. Stored below the results; energy, rooflines and comparisons of devices use it.
        Exit code 4: nothing could be measured.
        """
        from klab.harness.catalog.chips import find_real_chip
        from klab.harness.fleet.calibrating import calibrate_devices
        from klab.harness.measure.calibrate import PARTS, checked_parts
        from klab.harness.measure.calibration import measured_any
        from klab.harness.store.paths import folder_to_write
        from klab.harness.store.remote import shown
        from klab.kernels.errors import CannotMeasure

        if show:
            _stored(results, as_json=as_json)
            return
        parts = checked_parts(only or PARTS)
        found_chip, folder = find_real_chip(chip), folder_to_write(results)
        nothing = True
        for found, path in calibrate_devices(
            found_chip,
            folder,
            only_devices=device,
            parts=parts,
            sensor_s=seconds,
            say=lambda text: talk.print(text, markup=False, soft_wrap=True),
        ):
            nothing = nothing and not measured_any(found)
            if as_json:
                emit(found.to_json())
            else:
                _tell(found, found_chip)
            talk.print(f"stored in {shown(path)}", markup=False, soft_wrap=True)
        if nothing:
            raise CannotMeasure("nothing could be measured: see the reasons above")


def _stored(results: object, *, as_json: bool) -> None:
    from klab.harness.catalog.chips import find_chip
    from klab.harness.measure.calibration import read_calibrations
    from klab.harness.store.paths import folder_to_read
    from klab.kernels.errors import UsageError

    troubles: list[str] = []
    folder = folder_to_read(results)  # type: ignore[arg-type]
    for _, found in sorted(read_calibrations([folder], troubles).items()):
        if as_json:
            emit(found.to_json())
            continue
        try:
            chip = find_chip(found.chip)
        except UsageError:
            chip = None
        _tell(found, chip)
    for line in troubles:
        talk.print(line, style="yellow", markup=False, soft_wrap=True)
    if not read_calibrations([folder]):
        talk.print("no device is calibrated here yet: klab calibrate does it", markup=False, soft_wrap=True)


def _tell(found: Calibration, chip: Chip | None) -> None:
    from klab.harness.measure.calibration import Figure

    def row(name: str, figure: Figure, specified: float | None = None) -> tuple[object, ...]:
        ends = ["" if x is None else _number(x) for x in (figure.low, figure.high)]
        interval = "..".join(ends) if any(ends) else ""
        if figure.value is None:
            return name, "", interval, "", figure.reason
        share = f"{figure.value / specified:.0%} of {specified:,.4g}" if specified else ""
        return name, _number(figure.value), interval, share, figure.note

    sensors = {getattr(found, name) for name in _SENSORS}
    if len(sensors) == 1:
        rows = [row("power sensors", sensors.pop())]
    else:
        rows = [row(title, getattr(found, name)) for name, title in _SENSORS.items()]
    rows += [row(title, getattr(found, name)) for name, title in _LAUNCHES.items()]
    rows.append(row("copy, GB/s", found.copy_gb_per_s, chip.memory_gb_per_s if chip else None))
    for dtype, figure in found.matmul_tflops.items():
        rows.append(row(f"matmul {dtype}, TFLOP/s", figure, chip.peak_tflops.get(dtype) if chip else None))
    rows += [row(f"anchor {name}, us", figure) for name, figure in found.anchors.items()]
    table(f"{found.device} {found.device_uuid}, {found.at}", _COLUMNS, rows, ("value", "95%"))
    for note in found.notes:
        out.print(note, markup=False, soft_wrap=True)


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 1e4 else f"{value:,.4g}"
