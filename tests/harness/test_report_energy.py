"""Energy against time: the price of the least energy, the front, and the reason where there is none."""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
import time
from pathlib import Path
from typing import Any

import pytest
from browser import PATIENCE_S, Browser, missing
from made_results import contest, failed, made
from test_report_figures import accepted, filterable, frame_of, script_front, table_json, told

from klab.harness.report.figures import energy, energy_price
from klab.harness.report.html import el
from klab.harness.report.shell import document, framed_all, index, plotly_js
from klab.harness.store.result import Result, Status
from klab.kernels.matmul.problem import Matmul

pytest.importorskip("pandas", reason="pandas is not installed: no figure has data")


def metered(m: int, kernel: str, us: float, joules: float, spread: float = 0.01, wide: float = 0.01, **changes: object) -> Result:
    """A row with these medians; spread and wide: half of the intervals of time and energy, relative."""
    time = {"median_us": us, "ci_low_us": us * (1 - spread), "ci_high_us": us * (1 + spread)}
    much = {"energy_j": joules, "energy_ci_low_j": joules * (1 - wide), "energy_ci_high_j": joules * (1 + wide), "power_w": 300.0}
    return made(Matmul(m, 64, 64), kernel, **time | much | changes)


def prices(rows: list[Result]) -> object:
    frame = frame_of(rows)
    return energy_price.data(energy_price.metered(frame), frame)


def test_the_price_is_of_the_thriftiest_against_the_fastest() -> None:
    rows = [metered(1, "fast", 100.0, 2.0), metered(1, "middle", 104.0, 1.9), metered(1, "thrifty", 110.0, 1.6)]
    (one,) = prices(rows).itertuples()
    assert (one.fastest, one.thriftiest, one.clear, one.slower) == ("fast", "thrifty", True, True)
    assert one.extra_percent == pytest.approx(10) and one.saved_percent == pytest.approx(20) and one.saved_j == pytest.approx(0.4)
    assert one.extra_low_percent == pytest.approx(100 * (110 * 0.99 / 101 - 1)) and one.extra_us == pytest.approx(10)
    assert one.saved_low_percent == pytest.approx(100 * (1 - 1.6 * 1.01 / 1.98)) and one.saved_high_j == pytest.approx(2.02 - 1.6 * 0.99)
    assert one.kernel == ("fast", "thrifty"), "a filter for either of the two keeps the mark"


def test_what_the_intervals_cannot_tell_apart_is_said() -> None:
    close = [metered(1, "fast", 100.0, 2.0, wide=0.05), metered(1, "other", 100.5, 1.95, wide=0.05)]
    (one,) = prices(close).itertuples()
    assert not one.clear and not one.slower
    text = energy_price.finding(prices(close), "H200")
    assert "not the thriftiest on 1 of 1 problem by the medians" in text and "no saving can be told apart" in text
    panel = energy_price.metered(frame_of(close))
    assert "Their energies and times cannot be told apart." in energy.finding(panel)


def test_the_finding_counts_what_the_rows_say() -> None:
    savings = {1: (0.88, 1.02), 2: (0.8, 1.11), 3: (0.7, 1.001), 4: (1.2, 1.1)}  # problem 4: the slower one uses more
    rows = [metered(m, "fast", 100.0 * m, 1.0 * m) for m in savings]
    rows += [metered(m, "other", 100.0 * m * slow, 1.0 * m * much, spread=0.002) for m, (much, slow) in savings.items()]
    rows += [metered(9, "alone", 10.0, 1.0)]
    text = energy_price.finding(prices(rows), "H200")
    assert "not the thriftiest on 3 of 4 problems, clearly so (the 95% intervals of energy lie apart) on 3" in text
    assert f"a median of {statistics.median([12, 20, 30]):.0f}% less energy (12% to 30% among them)" in text
    assert "for 2.0% more time (0.1% to 11% among them)" in text and "400 mJ per launch" in text
    free = sum(m * 100 * slow * 0.998 <= 100 * m * 1.01 for m, (much, slow) in savings.items() if much < 1)
    assert f"On {free} of these the times cannot be told apart" in text
    assert "matmul 3x64x64 bf16, where other instead of fast saves 900 mJ" in text


def test_the_fastest_may_be_the_thriftiest() -> None:
    rows = [metered(1, "fast", 100.0, 1.0), metered(1, "slow", 120.0, 1.5)]
    found = prices(rows)
    assert list(found["saved_j"]) == [0.0] and not found["clear"].any()
    assert energy_price.finding(found, "H200") == "On H200 the fastest uses the least energy on the one problem compared."
    assert "The fastest uses the least energy too: fast, 100 µs" in energy.finding(energy_price.metered(frame_of(rows)))


def test_a_fastest_without_energy_is_no_base() -> None:
    rows = [metered(1, "a", 100.0, 2.0), metered(1, "b", 110.0, 1.0)]
    assert not len(prices([*rows, made(Matmul(1, 64, 64), "quick", level_us=50.0)])), "whether it is the thriftiest is not known"
    assert len(prices([*rows, made(Matmul(1, 64, 64), "close", level_us=99.9, noise=0.1)])) == 1
    published = made(Matmul(1, 64, 64), "vendor", level_us=5.0, kind="reference", key="other")
    assert len(prices([*rows, published])) == 1, "what others published is no rival"


def test_a_set_clock_is_part_of_the_configuration() -> None:
    row = metered(1, "a", 100.0, 2.0)
    slow = dataclasses.replace(metered(1, "a", 130.0, 1.5), key="slow", policy={**row.policy, "sm_clock_mhz": 1200, "power_limit_w": 400})
    story = told([row, slow])
    assert energy_price.settings_of(story) == {"slow": "at 1200 MHz at 400 W"}
    overview, panel = energy.figures(story, frame_of([row, slow]))
    assert "at 1200 MHz at 400 W" in panel.caption and overview.table is not None and len(overview.table) == 1


def test_no_energy_is_said_once_and_why() -> None:
    rows = [made(Matmul(m, 64, 64), kernel, chip="cpu") for m in (1, 2) for kernel in ("a", "b")]
    (figure,) = energy.figures(told(rows), frame_of(rows))
    assert figure.empty == "No energy was measured: no power meter on this machine. (cpu)" and figure.variant == "cpu" and not figure.traces
    (one,) = energy.figures(told([metered(1, "a", 1.0, 1.0)]), frame_of([metered(1, "a", 1.0, 1.0)]))
    assert "nothing to compare it with" in one.empty
    bare = [made(Matmul(1, 64, 64), energy_reason="")]
    assert energy.figures(told(bare), frame_of(bare))[0].empty == "No energy was measured: no reason was recorded. (h200)"
    for nothing in ([], [failed(Matmul(1, 64, 64), "a", Status.CRASHED, "x")], [made(Matmul(1, 64, 64), kind="reference")]):
        assert energy.figures(told(nothing), frame_of(nothing)) == []


def test_an_energy_without_an_interval_is_a_mark_without_a_bar() -> None:
    rows = [metered(1, "a", 100.0, 2.0, energy_ci_low_j=None, energy_ci_high_j=None), metered(1, "b", 110.0, 1.0)]
    overview, panel = energy.figures(told(rows), frame_of(rows))
    bars = [trace["error_y"]["array"] for trace in panel.traces if "error_y" in trace]
    assert bars == [[0.0], [pytest.approx(0.01)]] and "nan" not in json.dumps([overview.traces, panel.traces]).lower()
    accepted(panel)


def test_numbers_that_are_no_measurement_are_left_out() -> None:
    rows = [
        metered(1, "a", 100.0, 2.0),
        metered(1, "b", 110.0, 1.0, wide=1.0),
        metered(1, "none", 120.0, 0.0),
        metered(1, "less", 9.0, -1.0),
    ]
    found = energy_price.metered(frame_of(rows))
    assert list(found["kernel"]) == ["a", "b"]
    one = energy_price.price(found.iloc[1], found.iloc[0])
    assert one.saved[1] == -math.inf and not one.clear, "an interval that reaches 0 bounds nothing"
    for name, value in (("time", 0.0), ("time", math.inf)):
        assert len(energy_price.metered(frame_of([metered(1, name, value, 1.0)]))) == 0


def test_every_figure_is_one_that_plotly_knows() -> None:
    rows = contest() + contest("cpu", seed=1)
    figures = energy.figures(told(rows), frame_of(rows))
    drawn = [figure for figure in figures if not figure.empty]
    assert len(drawn) == 5 and [figure.variant for figure in figures if figure.empty] == ["cpu"]
    for figure in drawn:
        accepted(figure)
        filterable(figure)


def test_the_page_draws_the_same_front_again() -> None:
    rows = contest()
    figures = [figure for figure in energy.figures(told(rows), frame_of(rows)) if figure.derive == "front"]
    cases = [
        {"figure": {"data": figure.traces, "table": table_json(figure.table)}, "shown": list(range(len(figure.table)))}
        for figure in figures
        if figure.table is not None
    ]
    for figure, again in zip(figures, script_front(cases), strict=True):
        assert again["caption"] is None
        for one, other in zip(figure.traces, again["data"], strict=True):
            assert other["x"] == pytest.approx(one["x"], rel=1e-4) and other["y"] == pytest.approx(one["y"], rel=1e-4)
            assert other.get("marker") == one.get("marker")


def test_the_rule_of_what_has_a_figure_and_names_are_text() -> None:
    rows = [metered(m, kernel, us * m, joules * m) for m in range(1, 31) for kernel, us, joules in (("a", 10, 2), ("<b>" * 100, 11, 1))]
    overview, *panels = energy.figures(told(rows), frame_of(rows))
    assert len(panels) == energy.PANELS and "matmul 30x64x64" in panels[0].variant and "6 have none" in panels[0].caption
    assert overview.table is not None and len(overview.table) == 30 and len(overview.caption) < 1500
    assert all("<b>" not in trace["name"] for figure in panels for trace in figure.traces)
    several = [metered(1, "a", 10.0 + n, 1.0, config={"n": n}, key=f"{n}") for n in range(100)]
    panel = energy.figures(told(several), frame_of(several))[1]
    assert panel.table is not None and len(panel.table) == energy.MARKS and "20 are left out" in panel.caption
    assert not math.isnan(panel.table["median_us"].max())


def drawn(browser: Browser, begins: str) -> Any:
    """[x, y, caption] of the front's line, once the caption begins so; the last that was seen where it never does."""
    script = """const plot = document.getElementById('energy-0');
    if (!plot.data) return [null, null, ''];
    return [plot.data[0].x, plot.data[0].y, plot.closest('figure').querySelector('figcaption').textContent];"""
    until = time.monotonic() + PATIENCE_S
    while not (seen := browser.run(script))[2].startswith(begins) and time.monotonic() < until:
        time.sleep(0.05)
    return seen


@pytest.mark.skipif(bool(missing()), reason=missing())
def test_a_filter_draws_the_front_of_what_it_leaves(tmp_path: Path) -> None:
    rows = [
        metered(1, "quick", 100.0, 2.0),
        metered(1, "middle", 105.0, 1.8),
        metered(1, "worse", 107.0, 1.9),
        metered(1, "thrifty", 110.0, 1.6),
    ]
    frame = frame_of(rows)
    page = tmp_path / "page.html"
    figures = energy.figures(told(rows), frame)
    content = el("main", framed_all(figures, True))
    page.write_text(document("t", content, figures=figures, sections={"index": index(frame)}, drawing=plotly_js()), encoding="utf-8")
    with Browser(tmp_path / "profile") as browser:
        browser.open(page)
        browser.run("return klab.ready.then(() => true)")
        seen = []
        for state, begins in (("#", "thrifty uses"), ("#?kernel=worse&kernel=thrifty&kernel=quick", "Of what the"), ("#", "thrifty uses")):
            browser.run(f"location.hash = {state!r}; document.getElementById('energy-0').scrollIntoView()")
            seen.append(drawn(browser, begins))
        assert browser.console() == []
    assert seen[0] == seen[2] and seen[0][0] == [100, 105, 110] and seen[0][2].startswith("thrifty uses 20%")
    assert seen[1][:2] == [[100, 107, 110], [2, 1.9, 1.6]]
    assert seen[1][2] == (
        "Of what the filter leaves (3 marks) nothing beats 3. Least time: quick, 100 µs and 2 J. Least energy: thrifty, 110 µs and 1.6 J."
    )


def test_the_front_is_drawn_whole_however_many_are_faster() -> None:
    rows = [metered(1, "a", 10.0 + n, 2.0, config={"n": n}, key=f"{n}") for n in range(100)]
    rows += [metered(1, "b", 500.0, 1.0, key="thrifty"), metered(1, "b", 600.0, 1.5, config={"n": 1}, key="slow")]
    (panel,) = energy.figures(told(rows), frame_of(rows))[1:]
    assert panel.caption.startswith("b uses 50%") and "80 drawn are those on the line and the fastest; 22 are left out" in panel.caption
    assert panel.table is not None and panel.table["median_us"].tolist() == [*(10.0 + n for n in range(79)), 500.0]
    assert panel.traces[0]["x"] == [10.0, 500.0] and panel.traces[0]["y"] == [2.0, 1.0]


def test_ends_that_are_zero_bound_no_price() -> None:
    rows = [metered(1, "fast", 100.0, 2.0, ci_low_us=0.0, ci_high_us=0.0, energy_ci_low_j=0.0, energy_ci_high_j=0.0)]
    rows.append(metered(1, "other", 110.0, 1.0))
    overview, panel = energy.figures(told(rows), frame_of(rows))
    accepted(overview)
    accepted(panel)
    assert "nan" not in f"{overview.caption} {panel.caption}".lower()
