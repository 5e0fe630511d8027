"""Time along an axis: the panels, their bands, and where one kernel overtakes another."""

from __future__ import annotations

import dataclasses
import math

import pytest
from made_results import contest, failed, made
from test_report_figures import accepted, filterable, frame_of, told

from klab.harness.report.figures import sweep
from klab.harness.store.result import Status
from klab.kernels.decode_attention.problem import DecodeAttention
from klab.kernels.matmul.problem import Matmul
from klab.kernels.prefill_attention.problem import PrefillAttention
from klab.kernels.scaled_matmul.problem import ScaledMatmul

pytest.importorskip("pandas", reason="pandas is not installed: no figure has data")
BATCH, CONTEXT, LENGTH, ROWS = sweep.AXES


def stop(m: int, kernel: str, us: float, spread: float = 0.01, **changes: object) -> object:
    return made(Matmul(m, 64, 64), kernel, median_us=us, ci_low_us=us * (1 - spread), ci_high_us=us * (1 + spread), **changes)


def test_decode_runs_along_the_batch_and_the_context() -> None:
    shapes = [DecodeAttention((1024,) * batch, 16, 8, 128) for batch in (8, 1, 64)]
    rows = [made(shape, "torch", level_us=10.0 * shape.batch) for shape in shapes]
    rows.append(made(DecodeAttention((2048,), 16, 8, 128)))  # alone in its context: no line along the batch
    rows.append(made(DecodeAttention((5, 9), 16, 8, 128)))  # mixed lengths have no place on the axis
    found = sweep.data(frame_of(rows), BATCH)
    assert list(found["at"]) == [1, 8, 64] and found["panel"].nunique() == 1 and "context=1024" in found["held"].iloc[0]
    along = sweep.data(frame_of(rows), CONTEXT)
    assert list(along["at"]) == [1024, 2048] and "batch=1 " in along["held"].iloc[0]
    assert not len(sweep.data(frame_of([made(Matmul(1, 2, 3))]), BATCH))


def test_prefill_runs_along_the_length_and_matmul_along_the_rows() -> None:
    prefill = [made(PrefillAttention((n,), heads=8, kv_heads=8, head_dim=64)) for n in (128, 512)]
    full = [made(PrefillAttention((n,), heads=8, kv_heads=8, head_dim=64, causal=False)) for n in (128, 512)]
    panels = list(sweep.data(frame_of(prefill + full), LENGTH)["panel"].unique())
    assert panels == ["h200: prefill_attention causal=False", "h200: prefill_attention causal=True"], (
        "what differs, defaults too, names them"
    )
    rows = [made(Matmul(m, n, 64)) for m in (1, 2, 4) for n in (64, 128)] + [made(Matmul(8, 128, 64))]
    sizes = sweep.data(frame_of(rows), ROWS).groupby("panel", sort=False).size()
    assert list(sizes) == [4, 3], "the panel with most to see comes first"
    formats = [made(ScaledMatmul(m, 64, 256, format=name)) for m in (1, 2) for name in ("fp8_block", "int8_row")]
    assert {name.split("format=")[1] for name in sweep.data(frame_of(formats), ROWS)["panel"]} == {"fp8_block", "int8_row"}


def test_each_kernel_has_its_best_configuration() -> None:
    rows = [made(Matmul(m, 64, 64), "triton_a", config={"b": b}, level_us=10.0 * m + b) for m in (1, 2) for b in (1, 2)]
    assert list(sweep.data(frame_of(rows), ROWS)["config"]) == ["b=1", "b=1"]


def test_where_one_kernel_overtakes_another() -> None:
    times = {1: (10.0, 20.0), 16: (30.0, 25.0), 64: (100.0, 50.0)}
    rows = [stop(m, kernel, us) for m, pair in times.items() for kernel, us in zip(("triton_a", "cuda_b"), pair, strict=True)]
    panel = sweep.data(frame_of(rows), ROWS)
    (change,) = sweep.changes(panel)
    share = math.log(2) / (math.log(2) + math.log(30 / 25))
    assert (change.before, change.after, change.low, change.high, change.sure) == ("triton_a", "cuda_b", 1, 16, True)
    assert change.at == pytest.approx(16**share)
    text = sweep.finding(panel, ROWS)
    assert "triton_a is the fastest at 1; cuda_b overtakes triton_a between 1 and 16 (near 9)" in text
    assert "from 10.0 µs at 1 to 50.0 µs at 64: 5.000× (4.901× to 5.101×) for 64× the rows m" in text


def test_a_change_within_the_intervals_is_not_sure() -> None:
    rows = [stop(1, "a", 10.0), stop(1, "b", 10.1), stop(2, "a", 30.0), stop(2, "b", 20.0), stop(4, "a", 40.0), stop(4, "c", 20.0)]
    first, second = sweep.changes(sweep.data(frame_of(rows), ROWS).assign())
    assert not first.sure and first.after == "b" and math.isnan(second.at) and second.after == "c"
    same = [stop(1, "a", 10.0), stop(1, "b", 10.05), stop(2, "a", 20.0), stop(2, "b", 30.0)]
    text = sweep.finding(sweep.data(frame_of(same), ROWS), ROWS)
    assert "a is the fastest at both places (at 1 of them the next cannot be told apart)" in text


def test_many_changes_are_counted() -> None:
    rows = [stop(m, kernel, m * (10.0 + ((m + n) % 2))) for m in range(1, 7) for n, kernel in enumerate(("a", "b"))]
    text = sweep.finding(sweep.data(frame_of(rows), ROWS), ROWS)
    assert text.startswith("The fastest changes 5 times along the 6 places: b at 3, a at 3. a overtakes b between 1 and 2 (near 1.4).")


def test_the_band_is_the_interval_and_follows_a_filter() -> None:
    rows = [stop(m, "triton_a", 10.0 * m, spread=0.1) for m in (1, 2, 4)]
    (figure,) = sweep.figures(told(rows), frame_of(rows))
    band, line = figure.traces
    assert band["fill"] == "toself" and band["x"] == [1, 2, 4, 4, 2, 1] and band["y"] == [9, 18, 36, 44, 22, 11]
    assert band["meta"]["rows"] == [0, 1, 2, 2, 1, 0] and line["meta"]["rows"] == [0, 1, 2]
    assert band["legendgroup"] == line["legendgroup"] and not band["showlegend"]
    bare = [dataclasses.replace(row, ci_low_us=None, ci_high_us=None) for row in rows]
    (figure,) = sweep.figures(told(rows), frame_of(rows).assign(low_us=math.nan, high_us=math.nan))
    assert [trace["mode"] for trace in figure.traces] == ["lines+markers"] and bare


def test_published_lines_stand_apart() -> None:
    published = [stop(m, "vendor", 1.0 * m, kind="reference", key=f"p{m}") for m in (1, 2)]
    rows = [stop(m, "triton_a", 10.0 * m) for m in (1, 2)] + published
    (figure,) = sweep.figures(told(rows), frame_of(rows))
    lines = {trace["name"]: trace for trace in figure.traces if trace["mode"] == "lines+markers"}
    assert lines["vendor (published)"]["marker"]["symbol"].endswith("-open") and lines["triton_a"]["line"]["dash"] == "solid"
    assert "One kernel alone was measured here, triton_a." in figure.caption and "vendor" not in figure.caption
    assert figure.table is not None and set(figure.table["origin"]) == {"measured", "reference"}
    (figure,) = sweep.figures(told(published), frame_of(published))
    assert figure.caption.startswith("All of it is published by others")


def test_the_page_has_the_richest_panels_of_each_chip() -> None:
    rows = [made(Matmul(m, 64 * n, 64), level_us=5.0) for n in range(1, 13) for m in (1, 2)]
    rows += [made(Matmul(m, 64, 64), chip="cpu", level_us=5.0) for m in (1, 2)]
    figures = sweep.figures(told(rows), frame_of(rows))
    assert len(figures) == sweep.PANELS and sum(figure.variant.startswith("cpu") for figure in figures) == 1
    assert "6 of 13 such lines" in figures[0].caption and len({figure.identity for figure in figures}) == sweep.PANELS
    assert len({figure.variant for figure in figures}) == sweep.PANELS


def test_every_panel_is_one_that_plotly_knows() -> None:
    rows = contest() + contest("cpu", seed=1)
    figures = sweep.figures(told(rows), frame_of(rows))
    assert {figure.title for figure in figures} == {along.title for along in sweep.AXES}
    for figure in figures:
        accepted(figure)
        filterable(figure)


def test_nothing_to_see_is_no_figure_and_names_are_text() -> None:
    nothing = [made(Matmul(1, 64, 64)), failed(Matmul(2, 64, 64), "torch", Status.TIMEOUT, "hung")]
    assert sweep.figures(told(nothing), frame_of(nothing)) == [] and sweep.figures(told([]), frame_of([])) == []
    nasty = [stop(m, "<b>" * 100, 1.0 * m, config={"<i>": "<i>"}) for m in (1, 2)]
    (figure,) = sweep.figures(told(nasty), frame_of(nasty))
    assert all("<b>" not in trace["name"] and len(trace["name"]) < 700 for trace in figure.traces) and len(figure.caption) < 900
    accepted(figure)


def test_a_kernel_that_was_not_measured_beside_another_overtakes_nothing() -> None:
    rows = [stop(1, "a", 10.0), stop(2, "a", 20.0), stop(4, "b", 30.0)]
    text = sweep.finding(sweep.data(frame_of(rows), ROWS), ROWS)
    assert "b follows a between 2 and 4, where one of them was not measured on both sides" in text and "overtakes" not in text


def test_ends_that_are_zero_or_not_finite_bound_nothing() -> None:
    rows = [stop(1, "a", 10.0), stop(2, "a", 20.0), stop(2, "b", 0.0)]
    rows[0] = dataclasses.replace(rows[0], ci_low_us=0.0, ci_high_us=math.inf)
    frame = frame_of(rows[:2])
    assert "20.0 µs at 2: 2.000× (1.980× to ∞×) for 2× the rows m" in sweep.finding(sweep.data(frame, ROWS), ROWS)
    timeless = frame_of([*rows[:2], stop(2, "b", 1.0)])
    timeless.loc[timeless["kernel"] == "b", "median_us"] = 0.0
    assert set(sweep.data(timeless, ROWS)["kernel"]) == {"a"}, "no launch takes no time"


def test_a_change_is_sure_only_where_both_sides_are() -> None:
    rows = [stop(1, "a", 10.0), stop(1, "b", 20.0), stop(2, "a", 20.1), stop(2, "b", 20.0), stop(4, "a", 50.0), stop(4, "b", 20.0)]
    (change,) = sweep.changes(sweep.data(frame_of(rows), ROWS))
    assert (change.low, change.high, change.sure) == (1, 2, False), "at 2 the intervals overlap"
    (change,) = sweep.changes(sweep.data(frame_of([*rows[:2], *rows[4:]]), ROWS))
    assert change.sure
