"""The README's words on the device's own figures, on energy, and on what did not work."""

from __future__ import annotations

from collections.abc import Sequence

from klab.harness.measure.calibration import Calibration, Figure
from klab.harness.report.evidence_energy import Joules
from klab.harness.report.evidence_failures import Failures
from klab.harness.report.evidence_markdown import count, plain, ratio, table
from klab.harness.report.units import number
from klab.harness.store.result import Result
from klab.harness.tune.device_tests_kept import TESTED_FILE, Failed

METERED, FAILED, REASON = 20, 30, 160
FIGURES = (
    ("power sensor's period", "sensor_period_ms", "ms"),
    ("power sensor's window", "sensor_window_ms", "ms"),
    ("energy counter's period", "counter_period_ms", "ms"),
    ("launch, one after another", "launch_overhead_us", "µs"),
    ("launch from a graph", "graph_overhead_us", "µs"),
    ("copy", "copy_gb_per_s", "GB/s"),
)


def calibration_text(found: Sequence[Calibration]) -> str:
    """A column for each device; figures that no device has are left out."""
    if not found:
        return "## The device\n\nNo device is calibrated."
    lines: list[tuple[str, str, list[Figure | None]]] = [
        (what, unit, [getattr(one, name) for one in found]) for what, name, unit in FIGURES
    ]
    for dtype in sorted({dtype for one in found for dtype in one.matmul_tflops}):
        lines.append((f"matmul peak, {dtype}, random data", "TFLOP/s", [one.matmul_tflops.get(dtype) for one in found]))
    rows = [
        (what, *(figure.text(unit) if figure else "not measured" for figure in figures))
        for what, unit, figures in lines
        if any(figure is not None and figure.reason != "not measured" for figure in figures)
    ]
    columns = ("figure", *(plain(f"{one.device_uuid[:12]}, {one.at[:10]}") for one in found))
    return "## The device\n\nAs `klab calibrate` measured it.\n\n" + table(columns, rows)


def energy_text(found: Sequence[Joules]) -> str:
    """Own kernels beside libraries, by joules."""
    if not found:
        return "## Energy\n\nNo problem has the joules of two kernels."
    compared = [one for one in found if one.over is not None]
    less, more = sum(one.over.low > 1.0 for one in compared if one.over), sum(one.over.high < 1.0 for one in compared if one.over)
    other = [one for one in found if one.frugal != one.fastest]
    words = [f"{count(len(found), 'problem')} with the joules of two kernels or more."]
    if compared:
        words.append(
            f"Of {len(compared)} with klab's own and a library, klab's most frugal kernel takes less on {less}, more on {more}, and on "
            f"{len(compared) - less - more} the two cannot be told apart."
        )
    words.append(f"On {len(other)} the most frugal of the metered kernels is not the fastest of them.")
    cells = [
        (
            one.problem,
            *_metered(one.own),
            *_metered(one.library),
            "" if one.over is None else ratio(one.over.ratio, one.over.low, one.over.high),
            one.frugal.partition("/")[2],
            one.fastest.partition("/")[2],
        )
        for one in found[:METERED]
    ]
    columns = ("problem", "klab's own", "energy", "power", "library", "energy", "power", "library over own", "most frugal", "fastest")
    heading = f"The {METERED} that take most:" if len(found) > METERED else ""
    return "\n\n".join(part for part in ("## Energy", " ".join(words), heading, table(columns, cells)) if part)


def _metered(row: Result | None) -> tuple[str, str, str]:
    if row is None or row.energy_j is None:
        return "", "", ""
    power = "" if row.power_w is None else f"{number(row.power_w)} W"
    joule = f"{number(row.energy_j)} J" if row.energy_j >= 1 else f"{number(row.energy_j * 1e3)} mJ"
    return row.kernel.partition("/")[2], joule, power


def failures_text(found: Failures, tests: Sequence[Failed] = ()) -> str:
    """What ended without a verified result, by kernel, and the device tests that failed with the present code."""
    words = f"{count(found.failed, 'trial')} of {found.trials:,} ended without a verified result, by the newest row of each."
    cells = [
        (one.kernel, one.status + (", before the device" if one.screened else ""), one.trials, one.problems,
         one.reason[:REASON] + (" ..." if len(one.reason) > REASON else ""))
        for one in found.kinds[:FAILED]
    ]  # fmt: skip
    more = f"and {len(found.kinds) - FAILED} more kinds" if len(found.kinds) > FAILED else ""
    wavering = f"Found wrong and right by the same code: {', '.join(found.wavering)}." if found.wavering else ""
    shown = table(("kernel", "how", "trials", "problems", "the newest reason"), cells) if cells else ""
    aside = [f"{amount} {plain(reason)}" for reason, amount in found.aside]
    set_aside = f"Timed, and not chosen from: {'; '.join(aside)}." if aside else ""
    return "\n\n".join(part for part in ("## What did not work", words, shown, more, plain(wavering), set_aside, _failed(tests)) if part)


def _failed(tests: Sequence[Failed]) -> str:
    if not tests:
        return ""
    more = f" ({FAILED} of {len(tests)})" if len(tests) > FAILED else ""
    cells = [(one.name, one.outcome, one.words) for one in tests[:FAILED]]
    heading = f"Device tests that failed with the present code{more}; `{TESTED_FILE}` has what they wrote:"
    return heading + "\n\n" + table(("test", "how", "first line"), cells)
