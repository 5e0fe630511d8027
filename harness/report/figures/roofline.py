"""The roofline: each kernel's best result per problem under the ceilings of the chip."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from klab.harness.measure.calibration import is_measured
from klab.harness.report.figures.style import INK, Figure, axis, colours, layout, mark, plain
from klab.harness.report.limits import Limits, bound, dtype_of, share_of_bound
from klab.harness.report.subject import Story
from klab.harness.report.units import number, percent, time
from klab.harness.store.frame import config_label
from klab.harness.store.result import Result
from klab.kernels.dtypes import SHORT

if TYPE_CHECKING:
    import pandas as pd

# More lines of measured peaks would hide the marks; the table of limits has them all.
MEASURED_SHOWN = 2


@dataclass(frozen=True)
class Point:
    """One result: FLOP per byte, TFLOP/s, and its share of the bound (None where the chip's limits are not known)."""

    kernel: str
    backend: str
    problem: str
    config: str
    intensity: float
    tflops: float
    median_us: float
    share: float | None


@dataclass(frozen=True)
class Ceiling:
    """min(bandwidth x intensity, peak) of one dtype, as corners of a line in (FLOP per byte, TFLOP/s). Specified, or measured."""

    name: str
    corners: tuple[tuple[float, float], ...]
    measured: bool = False


@dataclass(frozen=True)
class Roofline:
    """The figure's data."""

    points: tuple[Point, ...]
    ceilings: tuple[Ceiling, ...]


def data(rows: Sequence[Result], limits: Limits) -> Roofline:
    """Points of the rows that have a time, flops and bytes; ceilings of the dtypes that occur, from the chip's specified limits."""
    measured = [r for r in rows if r.median_us and r.flops and r.bytes_moved]
    points = tuple(
        Point(
            r.kernel, r.backend, r.problem_label, config_label(r), r.flops / r.bytes_moved, r.flops / (r.median_us or 1) / 1e6,
            r.median_us or 0.0, share_of_bound(r, limits),
        )
        for r in measured
    )  # fmt: skip
    chip = limits.chip
    if chip is None or not points:
        return Roofline(points, ())
    low, high = min(p.intensity for p in points) / 2, max(p.intensity for p in points) * 2
    ceilings = []
    used = {found.peak_dtype for r in measured if (found := bound(r, limits))}
    for dtype in sorted(used):
        peak = chip.peak_tflops.get(dtype)
        if not peak:
            continue
        ridge = peak * 1e3 / chip.memory_gb_per_s
        start, end = min(low, ridge / 4), max(high, ridge * 4)
        name = f"{SHORT.get(dtype, dtype)}: {number(peak)} TFLOP/s, {number(chip.memory_gb_per_s)} GB/s"
        without = sorted({dtype_of(r) for r in measured} - set(chip.peak_tflops))
        if dtype == "float32" and without:
            name += f" (also bounds {', '.join(SHORT.get(d, d) for d in without)})"
        ceilings.append(Ceiling(name, ((start, start * chip.memory_gb_per_s / 1e3), (ridge, peak), (end, peak))))
        for device, own in sorted(limits.measured.items())[:MEASURED_SHOWN]:
            if is_measured(own) and is_measured(own, dtype):
                peak, stream = own.peak_tflops[dtype], own.memory_gb_per_s
                name = f"measured on {device[:12]}, {SHORT.get(dtype, dtype)}: {number(peak)} TFLOP/s, {number(stream)} GB/s"
                ceilings.append(Ceiling(name, ((start, start * stream / 1e3), (peak * 1e3 / stream, peak), (end, peak)), measured=True))
    return Roofline(points, tuple(ceilings))


def draw(found: Roofline, identity: str, hues: dict[str, str]) -> Figure:
    """Log-log; one trace per kernel, so that the legend switches them."""
    title = "Roofline"
    caption = (
        "Each mark is one kernel's best configuration on one problem: achieved speed over arithmetic intensity (least flops over least "
        "bytes). The dashed lines are the chip's specified limits; a mark on the line could not be faster. Dotted lines, where there are "
        "any, are what klab calibrate measured on a device."
    )
    if not found.points:
        return Figure(identity, title, caption, empty="No result has a time yet.")
    traces: list[dict[str, Any]] = [
        {
            "type": "scatter",
            "mode": "lines",
            "name": plain(ceiling.name),
            "x": [x for x, _ in ceiling.corners],
            "y": [y for _, y in ceiling.corners],
            "line": {"color": INK, "width": 1.5, "dash": "dot" if ceiling.measured else "dash"},
            "hoverinfo": "name",
        }
        for ceiling in found.ceilings
    ]
    by_kernel: dict[str, list[Point]] = defaultdict(list)
    for point in found.points:
        by_kernel[point.kernel].append(point)
    for kernel, points in sorted(by_kernel.items()):
        traces.append(
            {
                "type": "scatter",
                "mode": "markers",
                "name": plain(kernel),
                "x": [p.intensity for p in points],
                "y": [p.tflops for p in points],
                "text": [_hover(p) for p in points],
                "hovertemplate": "%{text}<extra></extra>",
                "marker": {"color": hues.get(kernel, INK), "symbol": mark(points[0].backend), "size": 8, "opacity": 0.85},
            }
        )
    decades = {"type": "log", "dtick": 1, "tickformat": ".4~g"}
    shape = layout(xaxis=axis("FLOP per byte", **decades), yaxis=axis("TFLOP/s", **decades))
    return Figure(identity, title, caption if found.ceilings else f"{caption} (No limits are known for this device.)", traces, shape)


def _hover(p: Point) -> str:
    share = "" if p.share is None else f", {percent(p.share)} of the bound"
    return f"<b>{plain(p.kernel)}</b><br>{plain(p.problem)}<br>{plain(p.config)}<br>{number(p.tflops)} TFLOP/s, {time(p.median_us)}{share}"


def figures(story: Story, _: pd.DataFrame) -> list[Figure]:
    """One roofline per chip."""
    best = {subject.chip: subject.best_per_kernel() for subject in story.subjects}
    hues = colours(row.kernel for rows in best.values() for row in rows)
    return [draw(data(best[s.chip], s.limits), f"roofline-{n}", hues) for n, s in enumerate(story.subjects)]
