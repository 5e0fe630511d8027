"""Error against cost: what each narrower format saves, and what cannot be told."""

from __future__ import annotations

import dataclasses

import pytest
from made_results import contest, made
from test_report_figures import accepted, filterable, frame_of, script_front, table_json, told

from klab.harness.report.figures import quantisation
from klab.harness.store.result import Result
from klab.kernels.contract import Problem
from klab.kernels.matmul.problem import Matmul
from klab.kernels.scaled_matmul.problem import ScaledMatmul
from klab.kernels.weight_only_matmul.problem import WeightOnlyMatmul

pytest.importorskip("pandas", reason="pandas is not installed: no figure has data")
WIDE = Matmul(64, 2048, 1024)
FP8, INT8, INT4 = ScaledMatmul(64, 2048, 1024), ScaledMatmul(64, 2048, 1024, format="int8_row"), WeightOnlyMatmul(64, 2048, 1024)


def timed(problem: Problem, us: float, kernel: str = "torch", spread: float = 0.01, **changes: object) -> Result:
    return made(problem, kernel, median_us=us, ci_low_us=us * (1 - spread), ci_high_us=us * (1 + spread), **changes)


def narrow(problem: Problem, us: float, error: float, kernel: str = "triton_scaled", **changes: object) -> Result:
    return dataclasses.replace(timed(problem, us, kernel, **changes), wide_key=problem.wide().key, wide_error=error)  # type: ignore[union-attr]


ROWS = [timed(WIDE, 100.0), narrow(FP8, 60.0, 0.03), narrow(FP8, 90.0, 0.031, "torch_scaled"), narrow(INT4, 40.0, 0.12)]


def test_a_panel_is_a_problem_with_its_formats() -> None:
    found = quantisation.data(frame_of(ROWS))
    assert list(found["error_percent"]) == pytest.approx([0, 3, 3.1, 12]) and set(found["panel"]) == {f"h200: {WIDE.label()}"}
    assert list(found["format"]) == ["unquantised", "fp8_block", "fp8_block", "int4g128"]
    assert not len(quantisation.data(frame_of(contest()))), "without narrower formats there is nothing to show"


def test_the_front_has_what_nothing_beats() -> None:
    (figure,) = quantisation.figures(told(ROWS), frame_of(ROWS))
    line = figure.traces[0]
    assert line["x"] == [0.0, 3.0, 12.0] and line["y"] == [100.0, 60.0, 40.0]
    sizes = [size for trace in figure.traces[1:] for size in trace["marker"]["size"]]
    assert sorted(sizes) == [6, 11, 11, 11]
    accepted(figure)
    filterable(figure)
    shown = [0, 2, 3]
    (again,) = script_front([{"figure": {"data": figure.traces, "table": table_json(figure.table)}, "shown": shown}])
    assert again["data"][0]["y"] == [100.0, 90.0, 40.0] and "Least error: torch" in again["caption"]


def test_the_caption_says_what_each_format_saves() -> None:
    (figure,) = quantisation.figures(told(ROWS), frame_of(ROWS))
    least, most = 100 * 0.99 / (60 * 1.01), 100 * 1.01 / (60 * 0.99)
    assert f"is {100 / 60:.3f}× as fast ({least:.3f} to {most:.3f}) at 3.0% error" in figure.caption
    assert "Against torch unquantised, 100 µs" in figure.caption and "at 12% error" in figure.caption


def test_what_cannot_be_told_apart_or_loses_is_said() -> None:
    rows = [timed(WIDE, 100.0), narrow(FP8, 99.0, 0.03), narrow(INT8, 130.0, 0.02)]
    (figure,) = quantisation.figures(told(rows), frame_of(rows))
    assert "int8_row is slower, 130 µs, at 2.0% error" in figure.caption
    assert "cannot be told apart in time, at 3.0% error" in figure.caption and "as fast" not in figure.caption


def test_without_the_unquantised_problem_no_saving_is_claimed() -> None:
    rows = ROWS[1:]
    (figure,) = quantisation.figures(told(rows), frame_of(rows))
    assert "The unquantised problem was not measured" in figure.caption and "as fast" not in figure.caption
    assert figure.variant.startswith("h200: what ")


def test_published_times_do_not_compete() -> None:
    rows = [*ROWS, narrow(INT8, 1.0, 0.001, "vendor", kind="reference", key="other")]
    (figure,) = quantisation.figures(told(rows), frame_of(rows))
    assert "int8_row" not in figure.caption and figure.traces[0]["y"] == [100.0, 60.0, 40.0]
    assert any(trace["name"] == "int8_row (published)" for trace in figure.traces)


def test_every_chip_and_problem_has_its_turn() -> None:
    shapes = [Matmul(m, 256, 256) for m in range(1, 31)]
    rows = [timed(shape, 10.0) for shape in shapes] + [narrow(ScaledMatmul(one.m, 256, 256), 6.0, 0.03) for one in shapes]
    rows += [timed(WIDE, 10.0, chip="cpu"), narrow(FP8, 20.0, 0.03, chip="cpu", config={"<b>": "<b>"})]
    figures = quantisation.figures(told(rows), frame_of(rows))
    assert len(figures) == quantisation.PANELS and figures[0].variant.startswith("cpu") and "24 of 31 problems" in figures[0].caption
    assert len({figure.variant for figure in figures}) == len({figure.identity for figure in figures}) == quantisation.PANELS


def test_ends_and_times_that_are_zero_bound_no_saving() -> None:
    rows = [timed(WIDE, 100.0), dataclasses.replace(ROWS[1], ci_low_us=0.0), narrow(INT4, 40.0, 1e300)]
    (figure,) = quantisation.figures(told(rows), frame_of(rows))
    assert f"as fast ({99 / 60.6:.3f} to ∞) at 3.0% error" in figure.caption and len(figure.caption) < 1000
    frame = frame_of(rows)
    frame.loc[frame["median_us"] == 60.0, "median_us"] = 0.0
    assert len(quantisation.data(frame)) == 2, "no launch takes no time"
