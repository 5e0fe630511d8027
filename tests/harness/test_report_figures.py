"""The figures' data, apart from drawing; and that Plotly accepts what is drawn."""

from __future__ import annotations

import dataclasses

import pytest
from made_results import contest, failed, made

from klab.harness.choose.choose import choose, wanted_from
from klab.harness.choose.profile import Profile, Use
from klab.harness.report.figures import roofline, sweep, where_time_goes
from klab.harness.report.figures.style import PALETTE, Figure, colours, plain
from klab.harness.report.limits import Limits, bound, limits_of, share_of_bound
from klab.harness.store.result import Result, Status
from klab.kernels.contract import Chip
from klab.kernels.decode_attention.problem import DecodeAttention
from klab.kernels.matmul.problem import Matmul
from klab.kernels.prefill_attention.problem import PrefillAttention

H200 = limits_of("h200", "NVIDIA H200")


def accepted(figure: Figure) -> None:
    """Plotly's own checker refuses a property or a value that it does not know."""
    graph_objects = pytest.importorskip("plotly.graph_objects", reason="plotly is not installed: figures are drawn nowhere")
    colour = {"var(--ink)": "#000000", "var(--faint)": "#cccccc"}

    def concrete(value: object) -> object:
        if isinstance(value, dict):
            return {name: concrete(item) for name, item in value.items()}
        if isinstance(value, list):
            return [concrete(item) for item in value]
        return colour.get(value, value) if isinstance(value, str) else value

    graph_objects.Figure(concrete({"data": figure.traces, "layout": figure.layout}))


def test_a_roofline_point_is_work_over_time() -> None:
    problem = Matmul(4096, 4096, 4096)
    row = made(problem, samples=[200.0] * 20)
    found = roofline.data([row], H200)
    (point,) = found.points
    assert point.intensity == pytest.approx(4096 / 3) and point.tflops == pytest.approx(2 * 4096**3 / 200e-6 / 1e12)
    assert point.share == pytest.approx(2 * 4096**3 / 989.4e12 / 200e-6)
    (ceiling,) = found.ceilings
    (x0, y0), (ridge, peak), (x1, y1) = ceiling.corners
    assert peak == y1 == 989.4 and ridge == pytest.approx(989.4e3 / 4800) and y0 == pytest.approx(x0 * 4.8)
    assert x0 < point.intensity < x1


def test_no_point_lies_above_its_ceiling_unless_it_beats_the_limit() -> None:
    rows = [r for r in contest() if r.median_us]
    for point in roofline.data(rows, H200).points:
        assert point.share is not None and 0 < point.share < 1
        assert point.tflops <= min(989.4, point.intensity * 4.8)


def test_the_bound_is_memory_or_compute() -> None:
    small, large = made(Matmul(1, 4096, 4096)), made(Matmul(8192, 8192, 8192))
    assert (found := bound(small, H200)) is not None and found.by == "memory"
    assert found.us == pytest.approx(small.bytes_moved / 4800e9 * 1e6)
    assert (found := bound(large, H200)) is not None and found.by == "compute"
    assert share_of_bound(failed(Matmul(1, 2, 3), "triton_a", Status.TIMEOUT, ""), H200) is None


def test_a_dtype_without_a_peak_is_bounded_by_float32() -> None:
    chip = Chip("toy", "Toy", "cpu", 2, 2000.0, 2000.0, {"float32": 0.1}, 1 << 30, 20.0, 1 << 20)
    found = bound(made(Matmul(512, 512, 512)), Limits(chip))
    assert found is not None and found.peak_dtype == "float32" and found.us == pytest.approx(2 * 512**3 / 0.1e12 * 1e6)
    (ceiling,) = roofline.data([made(Matmul(512, 512, 512))], Limits(chip)).ceilings
    assert "also bounds bf16" in ceiling.name


def test_unknown_limits_are_said_to_be_unknown() -> None:
    away = limits_of("cpu", "A CPU that no machine has")
    assert away.chip is None and "another CPU" in away.reason and limits_of("cpu", "").chip is not None
    assert limits_of("mi300x", "").chip is None and "not in the catalog" in limits_of("mi300x", "").reason
    found = roofline.data([made(Matmul(8, 8, 8))], away)
    assert found.points[0].share is None and not found.ceilings
    figure = roofline.draw(found, "r", {})
    assert "No limits are known" in figure.caption
    accepted(figure)


def test_decode_runs_along_the_batch() -> None:
    shapes = [DecodeAttention((1024,) * batch, 16, 8, 128) for batch in (8, 1, 64)]
    rows = [made(shape, "torch", level_us=10.0 * shape.batch) for shape in shapes]
    rows.append(made(DecodeAttention((2048,), 16, 8, 128)))  # alone in its context: no line
    rows.append(made(DecodeAttention((5, 9), 16, 8, 128)))  # mixed lengths have no place on the axis
    (panel,) = sweep.data(rows, sweep.AXES[0])
    (line,) = panel.lines
    assert [stop.x for stop in line.stops] == [1, 8, 64] and "context=1024" in panel.name
    assert all(stop.low_us <= stop.median_us <= stop.high_us for stop in line.stops)
    assert sweep.data([made(Matmul(1, 2, 3))], sweep.AXES[0]) == []


def test_prefill_runs_along_the_length_and_matmul_along_the_rows() -> None:
    prefill = [made(PrefillAttention((n,), heads=8, kv_heads=8, head_dim=64)) for n in (128, 512)]
    full = [made(PrefillAttention((n,), heads=8, kv_heads=8, head_dim=64, causal=False)) for n in (128, 512)]
    assert len(sweep.data(prefill + full, sweep.AXES[1])) == 2, "causal and full are two panels"
    rows = [made(Matmul(m, n, 64)) for m in (1, 2, 4) for n in (64, 128)] + [made(Matmul(8, 128, 64))]
    panels = sweep.data(rows, sweep.AXES[2])
    assert [len(panel.lines[0].stops) for panel in panels] == [4, 3], "the panel with most to see comes first"


def test_time_shares_add_up_to_one_per_step() -> None:
    rows = contest()
    uses = (Use("decode", 8, "qkv", 28), Use("prefill", 1, "qkv", 28))
    wanted = [dataclasses.replace(one, uses=uses) for one in wanted_from(rows)]
    profile = choose(rows, wanted)
    parts = where_time_goes.data(profile)
    for phase in ("decode", "prefill"):
        assert sum(part.share for part in parts if part.phase == phase) == pytest.approx(1.0)
    assert {part.operator for part in parts} == {"matmul", "prefill_attention", "decode_attention"}
    (step, _) = profile.steps
    assert step.us == pytest.approx(sum(28 * c.evidence.median_us for c in profile.choices))
    assert step.library_us is not None and step.library_us >= step.us
    accepted(where_time_goes.draw(parts, profile, "t"))


def test_a_step_with_an_open_problem_says_so() -> None:
    rows = [made(Matmul(1, 64, 64)), failed(Matmul(2, 64, 64), "torch", Status.TIMEOUT, "hung")]
    wanted = [dataclasses.replace(one, uses=(Use("decode", 1, "o", 2),)) for one in wanted_from(rows)]
    profile = choose(rows, wanted)
    (step,) = profile.steps
    assert step.open == 1 and step.library_us is None and "decode batch 1: 1" in where_time_goes.draw([], profile, "t").caption


def test_every_figure_is_one_that_plotly_knows() -> None:
    rows = [r for r in contest() if r.median_us]
    hues = colours(r.kernel for r in rows)
    accepted(roofline.draw(roofline.data(rows, H200), "r", hues))
    for along in sweep.AXES:
        figure = sweep.draw(sweep.data(rows, along), along, along.identity, hues)
        assert figure.traces
        accepted(figure)


def test_empty_figures_say_why() -> None:
    nothing: list[Result] = []
    assert roofline.draw(roofline.data(nothing, H200), "r", {}).empty
    assert sweep.draw([], sweep.AXES[0], "s", {}).empty
    assert where_time_goes.draw(where_time_goes.data(Profile("cpu", "latency")), Profile("cpu", "latency"), "t").empty


def test_colours_stay_and_text_is_text() -> None:
    names = [f"k{n}" for n in range(25)]
    assert colours(names) == colours(reversed(names)) and set(colours(names).values()) == set(PALETTE)
    assert plain("<a href='x'>&") == "&lt;a href='x'&gt;&amp;"
