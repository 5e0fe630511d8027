"""The roofline: marks, ceilings, and what the caption says of both, against a computation of its own."""

from __future__ import annotations

import dataclasses
import statistics

import pytest
from made_results import contest, failed, made
from test_report_figures import H200, accepted, filterable, frame_of, told

from klab.harness.report.figures import roofline
from klab.harness.report.limits import Limits
from klab.harness.store.result import Status
from klab.kernels.contract import Chip
from klab.kernels.matmul.problem import Matmul

pytest.importorskip("pandas", reason="pandas is not installed: no figure has data")
TOY = Chip("h200", "Toy", "cpu", 2, 2000.0, 2000.0, {"float32": 0.1}, 1 << 30, 20.0, 1 << 20)


def test_a_mark_is_work_over_time() -> None:
    row = made(Matmul(4096, 4096, 4096), samples=[200.0] * 20)
    found = roofline.data(frame_of([row]))
    (mark,) = found.itertuples()
    assert mark.intensity_flop_per_byte == pytest.approx(4096 / 3) and mark.tflops == pytest.approx(2 * 4096**3 / 200e-6 / 1e12)
    assert mark.of_roofline_percent == pytest.approx(100 * 2 * 4096**3 / 989.4e12 / 200e-6)
    specified, clock = roofline.ceilings(found, H200)
    (x0, y0), (ridge, peak), (x1, y1) = specified.corners
    assert peak == y1 == 989.4 and ridge == pytest.approx(989.4e3 / 4800) and y0 == pytest.approx(x0 * 4.8)
    assert x0 < mark.intensity_flop_per_byte < x1 and specified.kind == roofline.SPECIFIED
    assert H200.chip is not None and clock.kind == roofline.AT_CLOCK
    assert clock.corners[-1][1] == pytest.approx(989.4 * 1755 / H200.chip.spec_clock_mhz)


def test_the_measured_clock_has_a_ceiling_only_where_it_differs() -> None:
    assert H200.chip is not None
    same = made(Matmul(4096, 4096, 4096), sm_clock_mhz=H200.chip.spec_clock_mhz * 1.005)
    assert [one.kind for one in roofline.ceilings(roofline.data(frame_of([same])), H200)] == [roofline.SPECIFIED]
    memory = made(Matmul(1, 4096, 4096), sm_clock_mhz=900.0)
    assert [one.kind for one in roofline.ceilings(roofline.data(frame_of([memory])), H200)] == [roofline.SPECIFIED]


def test_calibrated_peaks_have_a_line_of_their_own() -> None:
    assert H200.chip is not None
    told_by = dict.fromkeys(("memory_gb_per_s", "peak_tflops.bfloat16"), "measured by klab calibrate")
    own = dataclasses.replace(H200.chip, memory_gb_per_s=4100.0, peak_tflops={"bfloat16": 700.0}, provenance=told_by)
    limits = dataclasses.replace(H200, measured={"GPU-0": own})
    found = roofline.data(frame_of([made(Matmul(4096, 4096, 4096))], limits))
    (calibrated,) = [one for one in roofline.ceilings(found, limits) if one.kind == roofline.CALIBRATED]
    assert calibrated.corners[1] == pytest.approx((700e3 / 4100, 700.0)) and "GPU-0" in calibrated.name
    figure = roofline.draw(found, limits, "r", "H200")
    assert {trace["line"]["dash"] for trace in figure.traces if trace["mode"] == "lines"} == {"dash", "dot", "dashdot"}
    assert "Dotted: what klab calibrate measured" in figure.caption


def test_a_dtype_without_a_peak_is_bounded_by_float32() -> None:
    found = roofline.data(frame_of([made(Matmul(512, 512, 512))], Limits(TOY)))
    assert "also bounds bf16" in roofline.ceilings(found, Limits(TOY))[0].name


def test_the_caption_counts_what_the_rows_say() -> None:
    rows = contest()
    story = told(rows)
    (figure,) = roofline.figures(story, frame_of(rows))
    assert H200.chip is not None
    best: dict[str, tuple[float, float]] = {}
    for row in rows:
        if row.median_us:
            us = max(row.flops / 989.4e6, row.bytes_moved / 4800e3)
            best[row.problem_label] = min(best.get(row.problem_label, (9e9, 0.0)), (row.median_us, us))
    shares = [bound / us for us, bound in best.values()]
    near = sum(share >= 0.8 for share in shares)
    assert f"80% of the roofline on {near} of {len(best)} problems" in figure.caption
    assert f"the median share is {statistics.median(shares):.0%}" in figure.caption
    worst = max(best, key=lambda name: best[name][0] - best[name][1])
    assert worst in figure.caption and f"{100 * best[worst][1] / best[worst][0]:.1f}% (" in figure.caption
    assert figure.variant == "h200"
    accepted(figure)
    filterable(figure)


def test_what_the_intervals_leave_open_is_said() -> None:
    problem = Matmul(4096, 4096, 4096)
    us = 2 * 4096**3 / 989.4e6
    row = made(problem, median_us=us / 0.79, ci_low_us=us / 0.82, ci_high_us=us / 0.76)
    caption = roofline.finding(roofline.data(frame_of([row])), "H200")
    assert "on 0 of 1 problem (0 to 1 within the 95% intervals)" in caption and "at 79.0% (76.0% to 82.0%)" in caption
    fast = made(problem, median_us=us / 1.1, ci_low_us=us / 1.11, ci_high_us=us / 1.09)
    assert "1 lies above it" in (text := roofline.finding(roofline.data(frame_of([fast])), "H200")) and "Most time" not in text


def test_what_others_published_is_hollow_and_not_counted() -> None:
    problem = Matmul(4096, 4096, 4096)
    published = made(problem, "vendor", kind="reference", level_us=150.0, key="other", ci_low_us=None, ci_high_us=None)
    rows = [made(problem, level_us=200.0), published]
    (figure,) = roofline.figures(told(rows), frame_of(rows))
    marks = [trace for trace in figure.traces if trace["mode"] == "markers"]
    assert [trace["name"] for trace in marks] == ["matmul", "matmul (published)"]
    assert all(symbol.endswith("-open") for symbol in marks[1]["marker"]["symbol"])
    assert "of 1 problem" in figure.caption and "with vendor" not in figure.caption and "Hollow" in figure.caption
    (alone,) = roofline.figures(told([published]), frame_of([published]))
    assert "published by others" in alone.caption and "reaches" not in alone.caption
    accepted(figure)


def test_the_rule_of_what_is_drawn() -> None:
    rows = [made(Matmul(m, 64, 64), f"triton_{k}", level_us=10.0 * m + k) for m in range(1, 21) for k in range(5)]
    rows += [made(Matmul(m, 64, 64), "torch", level_us=10.0 * m + 50) for m in range(1, 21)]
    found = roofline.data(frame_of(rows))
    assert len(found) == 120 and list(found["rank"].iloc[:60]) == [0] * 20 + [1] * 20 + [3] * 20, "the chosen one is the fastest other"
    figure = roofline.draw(found, H200, "r", "H200", most=50)
    assert figure.table is not None and len(figure.table) == 50 and "50 of 120 marks are drawn" in figure.caption
    assert found["median_us"].iloc[0] == found["median_us"][found["rank"] == 0].max()


def test_without_limits_or_rows() -> None:
    nothing = [failed(Matmul(1, 64, 64), "triton_a", Status.TIMEOUT, "hung")]
    assert roofline.figures(told(nothing), frame_of(nothing)) == [] and roofline.figures(told([]), frame_of([])) == []
    rows = [made(Matmul(8, 8, 8), "<b>&", chip="cpu", config={"<i>": "<i>"}, problem_label="<script>" * 50)]
    (figure,) = roofline.figures(told(rows), frame_of(rows))
    assert "so that no share can be told" in figure.caption and "this chip is made up" in figure.caption
    assert all("<b>&" not in one for trace in figure.traces for cells in trace.get("customdata", []) for one in cells)
    accepted(figure)
    filterable(figure)


def test_an_interval_that_reaches_zero_bounds_nothing() -> None:
    rows = [made(Matmul(1, 4096, 4096), median_us=20.0, ci_low_us=0.0, ci_high_us=1e300)]
    (figure,) = roofline.figures(told(rows), frame_of(rows))
    bound_us = rows[0].bytes_moved / 4800e9 * 1e6
    assert f"at {100 * bound_us / 20:.1f}% (0.0% to ∞%) of it" in figure.caption
    assert "on 0 of 1 problem (0 to 1 within the 95% intervals)" in figure.caption


def test_both_shares_are_of_their_own_clock() -> None:
    (large,) = roofline.data(frame_of([made(Matmul(8192, 8192, 8192), level_us=1500.0, sm_clock_mhz=1500.0)])).itertuples()
    bound_us = 2 * 8192**3 / 989e12 * 1e6
    assert H200.chip is not None
    assert large.of_roofline_percent == pytest.approx(100 * bound_us / large.median_us, rel=1e-3)
    assert large.at_measured_clock_percent == pytest.approx(large.of_roofline_percent * H200.chip.spec_clock_mhz / 1500.0)
