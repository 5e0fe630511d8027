"""The roofline: each kernel's best result per problem under the ceilings of the chip, and how far the best of each problem is from them."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from klab.harness.measure.calibration import is_measured
from klab.harness.report.figures.front import TIME, over
from klab.harness.report.figures.style import INK, PALETTE, Figure, digits, even_legend, hollow, layout, log_axis, mark, marks, short
from klab.harness.report.frames import DIMS, best
from klab.harness.report.limits import Limits
from klab.harness.report.subject import Story
from klab.harness.report.units import number, percent, time
from klab.harness.watch.wording import line
from klab.kernels.contract import Chip
from klab.kernels.dtypes import SHORT

if TYPE_CHECKING:
    import pandas as pd

TITLE = "Roofline"
# Near enough to the limits that tuning has little left to win.
NEAR = 0.8
# More lines of calibrated peaks would hide the marks; the table of limits has them all.
CALIBRATED_SHOWN = 2
# A measured clock that is nearer to the specification's than this has the same ceiling.
CLOCK_DIFFERS = 0.01
# Marks of a page, all chips together, and the fewest of one chip.
MARKS, FEWEST = 1600, 60
COLUMNS = (
    *DIMS, "origin", "rank", "chosen", "library", "backend", "problem", "problem_key", "config", "intensity_flop_per_byte", "tflops",
    "median_us", "low_us", "high_us", "bound_us", "bound_by", "of_roofline_percent", "at_measured_clock_percent", "sm_clock_mhz",
)  # fmt: skip
SPECIFIED, CALIBRATED, AT_CLOCK = "specified", "calibrated", "at the measured clock"
DASH = {SPECIFIED: "dash", CALIBRATED: "dot", AT_CLOCK: "dashdot"}


@dataclass(frozen=True)
class Ceiling:
    """min(bandwidth x intensity, peak) of one dtype, as corners of a line in (FLOP per byte, TFLOP/s). kind: SPECIFIED, CALIBRATED (by
    klab calibrate, on a device), or AT_CLOCK (the specified peak at the SM clock that was measured).
    """

    name: str
    kind: str
    corners: tuple[tuple[float, float], ...]


def data(frame: pd.DataFrame) -> pd.DataFrame:
    """COLUMNS: the best row of each kernel on each problem (`frames.best`) that has a speed and an intensity, in the order in which they
    are drawn. rank: 0 the chosen one, 1 the fastest library of the problem, 2 the fastest other kernel, 3 the rest; longest first.
    """
    rows = best(frame)
    rows = rows[rows["tflops"].notna() & rows["intensity_flop_per_byte"].notna()].sort_values("median_us", kind="stable")
    first = ~rows.duplicated(["chip", "origin", "problem_key", "library"])
    rank = (~rows["library"]).map({False: 1, True: 2}).where(first, 3).where(~rows["chosen"], 0)
    shares = {"of_roofline_percent": 100 * rows["share"], "at_measured_clock_percent": 100 * rows["share_at_clock"]}
    rows = rows.assign(rank=rank, **shares)
    return rows.sort_values(["rank", "median_us"], ascending=[True, False], kind="stable")[list(COLUMNS)].reset_index(drop=True)


def ceilings(found: pd.DataFrame, limits: Limits) -> list[Ceiling]:
    """Of the dtypes of one chip's marks (rows of `data`), from the limits of the chip; none where these are not known."""
    chip = limits.chip
    if chip is None or not len(found):
        return []
    low, high = found["intensity_flop_per_byte"].min() / 2, found["intensity_flop_per_byte"].max() * 2
    # A chip without instructions for a dtype multiplies it in float32.
    peaks = found["dtype"].map(lambda dtype: dtype if chip.peak_flops(dtype) else "float32")
    drawn = []
    for dtype in sorted(set(peaks)):
        peak = chip.peak_tflops.get(dtype)
        if not peak:
            continue
        start, end = min(low, peak * 1e3 / chip.memory_gb_per_s / 4), max(high, peak * 1e3 / chip.memory_gb_per_s * 4)
        name = SHORT.get(dtype, dtype)
        by_others = sorted(SHORT.get(one, one) for one in set(found["dtype"][peaks == dtype]) - {dtype})
        also = f" (also bounds {', '.join(by_others)})" if by_others else ""
        limit = f"{number(peak)} TFLOP/s, {number(chip.memory_gb_per_s)} GB/s"
        drawn.append(Ceiling(f"{name}: {limit}{also}", SPECIFIED, _corners(start, end, peak, chip.memory_gb_per_s)))
        for device, own in sorted(limits.measured.items())[:CALIBRATED_SHOWN]:
            if is_measured(own) and is_measured(own, dtype):
                reached, stream = own.peak_tflops[dtype], own.memory_gb_per_s
                told = f"{name} calibrated on {line(device, 12)}: {number(reached)} TFLOP/s, {number(stream)} GB/s"
                drawn.append(Ceiling(told, CALIBRATED, _corners(start, end, reached, stream)))
        clock = _clock(found[peaks == dtype], chip)
        if clock is not None:
            reached = peak * clock / chip.spec_clock_mhz
            # Below the ridge it is the line of the specified bandwidth.
            told = f"{name} at the measured {number(clock)} MHz: {number(reached)} TFLOP/s"
            drawn.append(Ceiling(told, AT_CLOCK, _corners(start, end, reached, chip.memory_gb_per_s)[1:]))
    return drawn


def _corners(start: float, end: float, peak: float, gb_per_s: float) -> tuple[tuple[float, float], ...]:
    return (start, start * gb_per_s / 1e3), (peak * 1e3 / gb_per_s, peak), (end, peak)


def _clock(found: pd.DataFrame, chip: Chip) -> float | None:
    """The median SM clock of the measured rows that arithmetic bounds, in MHz, where it differs from the specification's."""
    bound = found[(found["origin"] == "measured") & (found["bound_by"] == "compute")]["sm_clock_mhz"].dropna()
    if not len(bound) or not chip.spec_clock_mhz:
        return None
    clock = float(statistics.median(bound))
    return clock if abs(clock / chip.spec_clock_mhz - 1) >= CLOCK_DIFFERS else None


def finding(found: pd.DataFrame, title: str) -> str:
    """Of one chip: how many of its problems are near the limits, the median share, and where most time is lost. Measured rows alone."""
    own = found[(found["origin"] == "measured") & found["of_roofline_percent"].notna()]
    if not len(own):
        measured = (found["origin"] == "measured").any()
        return f"No limits of {title} are known, so that no share can be told." if measured else f"All of {title} is published by others."
    fastest = own.sort_values("median_us", kind="stable").drop_duplicates("problem_key")
    share = fastest["of_roofline_percent"] / 100
    ends = [TIME.ends(row) for row in fastest.itertuples()]
    least, most = (sum(over(bound, end[n]) >= NEAR for bound, end in zip(fastest["bound_us"], ends, strict=True)) for n in (1, 0))
    near, count = int((share >= NEAR).sum()), len(fastest)
    sure = "" if least == most else f" ({least} to {most} within the 95% intervals)"
    middle = f"the median share is {percent(statistics.median(share))}" if count > 1 else f"its share is {percent(share.iloc[0])}"
    problems = f"{count} problem{'' if count == 1 else 's'}"
    text = f"On {title} the fastest kernel reaches {percent(NEAR)} of the roofline on {near} of {problems}{sure}; {middle}."
    above = int((share > 1).sum())
    if above:
        lies = f"{above} lie{'s' if above == 1 else ''} above it"
        text += f" {lies}: a cache served what the bound counts as memory traffic, or the limits are too low."
    lost = (fastest["median_us"] - fastest["bound_us"]).sort_values(ascending=False)
    if lost.iloc[0] <= 0:
        return text
    worst = fastest.loc[lost.index[0]]
    lowest, highest = (over(worst["bound_us"], end) for end in reversed(TIME.ends(worst)))
    return (
        f"{text} Most time per launch above it: {line(worst['problem'], 80)}, {time(lost.iloc[0])} of {time(worst['median_us'])} with "
        f"{line(worst['kernel'], 60)} at {worst['of_roofline_percent']:.1f}% ({_exact(lowest)} to {_exact(highest)}) of it."
    )


def _exact(share: float) -> str:
    return f"{100 * share:.1f}%" if share < 10 else percent(share)


def draw(found: pd.DataFrame, limits: Limits, identity: str, title: str, variant: str = "", most: int = MARKS) -> Figure:
    """One chip (rows of `data`): a colour per operator, a shape per backend, hollow where others published it."""
    shown = found.iloc[:most].reset_index(drop=True)
    lines = ceilings(shown, limits)
    shapes = ", ".join(f"{_SHAPES[mark(backend)]} {line(backend, 30)}" for backend in sorted(set(shown["backend"])))
    caption = (
        f"{finding(found, title)} A mark is one kernel's best configuration on one problem: its speed over the problem's intensity (least "
        f"flops over least bytes). Large: the chosen one. Shape: {shapes}."
    )
    kinds = {ceiling.kind for ceiling in lines}
    caption += (
        " Dashed: the chip's specified limits; a mark on the line could not be faster."
        if lines
        else f" No limits: {limits.reason}." * bool(limits.reason)
    )
    caption += " Dotted: what klab calibrate measured on a device." if CALIBRATED in kinds else ""
    caption += " Dash-dotted: the specified peak at the clock that was measured." if AT_CLOCK in kinds else ""
    caption += " Hollow: published by others, not measured here." if (shown["origin"] != "measured").any() else ""
    if len(found) > len(shown):
        caption += (
            f" {len(shown)} of {len(found)} marks are drawn: chosen kernels first, then of each problem the fastest library, the fastest "
            "other kernel and the rest, the longest problems first."
        )
    traces: list[dict[str, Any]] = [_line(ceiling) for ceiling in lines]
    hues = {operator: PALETTE[n % len(PALETTE)] for n, operator in enumerate(sorted(set(found["operator"])))}
    for (operator, origin), group in shown.groupby(["operator", "origin"]):
        traces.append(_marks(group, hues[operator], own=origin == "measured"))
    speeds = [*shown["tflops"], *(y for ceiling in lines for _, y in ceiling.corners)]
    places = [*shown["intensity_flop_per_byte"], *(x for ceiling in lines for x, _ in ceiling.corners)]
    shape = layout(xaxis=log_axis("FLOP per byte", places), yaxis=log_axis("TFLOP/s", speeds), height=520, showlegend=True)
    table = shown.drop(columns=["rank", "backend", "library", "problem_key"])
    return Figure(identity, TITLE, caption, traces, even_legend(shape), table=table, variant=variant)


_SHAPES = {"circle": "circle", "square": "square", "diamond": "diamond", "cross": "plus", "triangle-up": "triangle", "x": "x"}


def _line(ceiling: Ceiling) -> dict[str, Any]:
    return {
        "type": "scatter",
        "mode": "lines",
        "name": short(ceiling.name, 80),
        "x": digits(x for x, _ in ceiling.corners),
        "y": digits(y for _, y in ceiling.corners),
        "line": {"color": INK, "width": 1.5, "dash": DASH[ceiling.kind]},
        "hoverinfo": "name",
    }


def _marks(group: pd.DataFrame, hue: str, *, own: bool) -> dict[str, Any]:
    symbols = [mark(backend) for backend in group["backend"]]
    name = short(group["operator"].iloc[0])
    trace = {
        "type": "scatter",
        "mode": "markers",
        "name": name if own else f"{name} (published)",
        "x": digits(group["intensity_flop_per_byte"]),
        "y": digits(group["tflops"]),
        "customdata": [
            [short(row.kernel, 80), short(row.problem, 80), short(row.config, 120), TIME.told(row), _share(row)]
            for row in group.itertuples()
        ],
        "hovertemplate": "<b>%{customdata[0]}</b><br>%{customdata[1]}<br>%{customdata[2]}<br>%{customdata[3]}<br>"
        "%{y} TFLOP/s%{customdata[4]}<extra></extra>",
        "marker": {
            "color": hue,
            "symbol": symbols if own else [hollow(symbol) for symbol in symbols],
            "size": [11 if chosen else 7 for chosen in group["chosen"]],
            "line": {"width": 0 if own else 1},
            "opacity": [0.95 if chosen else 0.55 for chosen in group["chosen"]] if own else 0.8,
        },
    }
    return marks(trace, [int(row) for row in group.index])


def _share(row: Any) -> str:
    """What a mark has of the roofline, in words; nothing where no limits are known."""
    if row.of_roofline_percent != row.of_roofline_percent:
        return ""
    told = f", {percent(row.of_roofline_percent / 100)} of the {row.bound_by} bound"
    clock = row.at_measured_clock_percent
    return told if clock != clock or row.bound_by != "compute" else f"{told}, {percent(clock / 100)} at {number(row.sm_clock_mhz)} MHz"


def figures(story: Story, frame: pd.DataFrame) -> list[Figure]:
    """One per chip that has marks."""
    found = data(frame)
    most = max(MARKS // max(found["chip"].nunique(), 1), FEWEST)
    by_chip = {chip: group.reset_index(drop=True) for chip, group in found.groupby("chip")}
    return [
        draw(by_chip[subject.chip], subject.limits, f"roofline-{n}", subject.title, subject.chip, most)
        for n, subject in enumerate(story.subjects)
        if subject.chip in by_chip
    ]
