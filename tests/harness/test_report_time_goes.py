"""Where a model's time goes: the figure's data against sums made here, and what is said where little or nothing was measured."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import pytest
from made_results import made

from klab.harness.catalog import find_chip, find_model
from klab.harness.choose.decide import decide
from klab.harness.plan import Plan
from klab.harness.plan import plan as make_plan
from klab.harness.plan.scenario import scenario_for
from klab.harness.report import estimates
from klab.harness.report.estimates import estimator_of
from klab.harness.report.figures import where_time_goes
from klab.harness.report.figures.style import Figure
from klab.harness.report.frames import standing
from klab.harness.report.limits import limits_of
from klab.harness.report.subject import Occurrence, Story, tell
from klab.harness.store.result import Result
from klab.kernels.contract import Problem
from klab.kernels.errors import UsageError

pytest.importorskip("pandas", reason="pandas is not installed: no figure is made anywhere")
MODEL = "qwen3-0.6b"


@pytest.fixture(autouse=True)
def no_published_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are installed on some machines."""
    monkeypatch.setattr(estimates, "sources_for", lambda *_: [])


@pytest.fixture(scope="module")
def plan() -> Plan:
    model, chip = find_model(MODEL), find_chip("h200")
    return make_plan(model, chip, scenario_for(model, chip, batches=(1, 32)))


def timed(problems: Sequence[Problem], chip: str = "h200") -> list[Result]:
    """Two kernels per problem; the second is the faster one."""
    rows = []
    for n, problem in enumerate(problems):
        rows += [made(problem, "torch", level_us=30.0 + n, rounds=6), made(problem, "triton_a", level_us=20.0 + n, rounds=6)]
    return [dataclasses.replace(row, chip=chip) for row in rows]


def story_of(rows: Sequence[Result], *plans: Plan, chips: Sequence[str] = ()) -> Story:
    by_chip = {one.chip.name: one for one in plans}

    def choice(chip: str, held: Sequence[Result]):  # type: ignore[no-untyped-def]
        return decide(held, by_chip.get(chip), chip, limits=limits_of(chip, "").chip)

    return dataclasses.replace(tell(rows, choice, limits_of, chips=list(by_chip) or list(chips)), plans=by_chip)


def drawn(story: Story) -> list[Figure]:
    return where_time_goes.figures(story, standing(story) if story.occurs else standing(Story(())))


def test_measured_parts_are_launches_times_medians_and_the_rest_is_modelled(plan: Plan) -> None:
    rows = timed([p for p in plan.problems() if p.operator != "decode_attention"])
    (figure, times) = drawn(story_of(rows, plan))
    table = figure.table
    assert table is not None
    median = {row.problem_key: row.median_us for row in rows if row.kernel.endswith("triton_a")}
    for phase, batch in plan.steps:
        part = table[(table["phase"] == phase) & (table["batch"] == batch)]
        wanted = sum(r.count * median[r.problem.key] for r in plan.step(phase, batch) if r.problem and r.problem.key in median)
        measured = part[part["rests_on"] == "measured"]
        assert measured["time_us"].sum() == pytest.approx(wanted)
        assert part["share"].sum() == pytest.approx(1) and part["step_us"].nunique() == 1
        assert part["measured_share"].iloc[0] == pytest.approx(wanted / part["time_us"].sum())
        assert set(part.loc[part["rests_on"] == "not measured", "operator"]) == ({"decode_attention"} if phase == "decode" else set())
        assert part["launches"].sum() == sum(row.count for row in plan.step(phase, batch))
    modelled = estimator_of(None, plan.chip, published=False)
    (row,) = [r for r in plan.step("decode", 32) if r.operator == "decode_attention"]
    assert row.problem is not None
    cell = table[(table["operator"] == "decode_attention") & (table["batch"] == 32)].iloc[0]
    assert cell["time_us"] == pytest.approx(row.count * modelled.launch(row.problem).us.mid), "nothing of this operator was measured"
    assert cell["kernel"] == () and "modelled" in cell["how"]
    assert set(table.loc[table["rests_on"] == "measured", "kernel"]) == {("triton_a",)}
    assert figure.variant == f"{MODEL}: shares" and times.variant == f"{MODEL}: times" and figure.title == times.title


def test_the_caption_tells_the_two_largest_and_the_measured_share(plan: Plan) -> None:
    rows = timed([p for p in plan.problems() if p.operator != "decode_attention"])
    figure = drawn(story_of(rows, plan))[0]
    assert figure.table is not None
    step = figure.table[(figure.table["phase"] == "decode") & (figure.table["batch"] == 32)]
    first, second = step.sort_values("share", ascending=False).head(2).to_dict("records")
    assert figure.caption.startswith(f"{MODEL}, decode, batch 32: on h200 {100 * first['share']:.0f}% in {first['operator']}, ")
    s = plan.scenario
    assert figure.caption.endswith(f"As planned: one GPU, bf16, {s.isl:,} prompt and {s.osl:,} generated tokens.")
    assert f"{second['operator']} of " in figure.caption and f"measured share {100 * first['measured_share']:.0f}%" in figure.caption


def test_marks_and_bars_are_the_tables_rows(plan: Plan) -> None:
    other = make_plan(plan.model, find_chip("b200"), plan.scenario)
    shares, times = drawn(story_of(timed(plan.problems()), plan, other))
    for figure, column, scales in ((shares, "share", {0.01}), (times, "time_us", {1.0, 1e3})):
        assert figure.table is not None
        seen = []
        for trace in figure.traces:
            for at, x in zip(trace.get("meta", {}).get("rows", ()), trace["x"], strict=False):
                row = figure.table.iloc[at]
                assert any(x == pytest.approx(row[column] / scale, rel=1e-4) for scale in scales)
                full = "pattern" not in trace["marker"]
                assert full == (row["rests_on"] == "measured") == (row["chip"] == "h200"), "only h200 was measured"
                seen.append(at)
        assert sorted(seen) == list(range(len(figure.table)))
    bars = [label for trace in shares.traces if trace.get("meta") for label in trace["y"]]
    assert len(set(bars)) == 2 * len(plan.steps), "a bar per step and chip"
    assert "on b200" in shares.caption and "none of it measured" in shares.caption
    assert {trace["xaxis"] for trace in times.traces if trace.get("meta")} == {"x", "x2"}, "prefill and decode have scales of their own"


def test_plotly_knows_every_property(plan: Plan) -> None:
    graph_objects = pytest.importorskip("plotly.graph_objects", reason="plotly is not installed: figures are drawn nowhere")
    for figure in drawn(story_of(timed(plan.problems()[:4]), plan)):
        text = {"var(--ink)": "#000000", "var(--faint)": "#cccccc"}

        def concrete(value: object, text: dict[str, str] = text) -> object:
            if isinstance(value, dict):
                return {name: concrete(item) for name, item in value.items()}
            if isinstance(value, list):
                return [concrete(item) for item in value]
            # Of eight digits the last two are transparency, which Plotly draws and its checker does not know.
            return text.get(value, value[:7] if value.startswith("#") else value) if isinstance(value, str) else value

        graph_objects.Figure(concrete({"data": figure.traces, "layout": figure.layout}))


def test_published_rows_are_a_part_of_their_own(plan: Plan) -> None:
    problems = plan.problems()
    published = [dataclasses.replace(made(problems[0], "theirs", level_us=77.0), kind="reference", key="theirs", device="NVIDIA H200")]
    figure = drawn(story_of([*timed(problems[1:2]), *published], plan))[0]
    assert figure.table is not None
    part = figure.table[figure.table["rests_on"] == "reference"]
    median = published[0].median_us
    assert median is not None
    for _, row in part.iterrows():
        count = sum(r.count for r in plan.step(row["phase"], row["batch"]) if r.problem == problems[0])
        assert row["time_us"] == pytest.approx(count * median)
        assert row["time_low_us"] < row["time_us"] < row["time_high_us"], "what others measured is not known better than what klab did"
    assert len(part) and (figure.table["measured_share"] < 1).all()
    assert any(trace["marker"].get("pattern", {}).get("shape") == "/" for trace in figure.traces)


def test_without_a_model_only_steps_that_were_measured_enough() -> None:
    whole = make_plan(find_model(MODEL), find_chip("h200"))
    problems = whole.problems()
    places = {p.key: tuple(Occurrence(MODEL, r.phase, r.batch, r.role, r.count) for r in whole.occurrences(p)) for p in problems}
    full = dataclasses.replace(story_of(timed(problems), chips=["h200"]), occurs=places)
    shares, _ = drawn(full)
    assert shares.table is not None and set(shares.table["rests_on"]) == {"measured"} and "less than 50% is measured" in shares.caption
    prefill = [p for p in problems if all(row.phase == "prefill" for row in whole.occurrences(p))]
    some = drawn(dataclasses.replace(story_of(timed(prefill), chips=["h200"]), occurs=places))
    assert some and all(set(figure.table["phase"]) == {"prefill"} for figure in some if figure.table is not None)
    few = dataclasses.replace(story_of(timed(problems[:2]), chips=["h200"]), occurs=places)
    assert drawn(few) == []


def test_a_cpu_has_its_bars_too_and_no_results_give_none(plan: Plan) -> None:
    chip = dataclasses.replace(find_chip("cpu"), name="cpu")
    small = make_plan(plan.model, chip)
    rows = [dataclasses.replace(row, device="Example CPU") for row in timed(small.problems(), "cpu")]
    story = dataclasses.replace(tell(rows, lambda c, held: decide(held, small, c), limits_of, chips=["cpu"]), plans={"cpu": small})
    shares, _ = drawn(story)
    assert shares.table is not None and set(shares.table["rests_on"]) <= {"measured", "not measured"}
    assert where_time_goes.figures(Story(()), standing(Story(()))) == []
    assert drawn(story_of([], chips=["h200"])) == []


def test_names_of_others_are_text(plan: Plan) -> None:
    chip = dataclasses.replace(plan.chip, name="<b>x</b>" + 300 * "y")
    odd = make_plan(plan.model, chip, plan.scenario)
    rows = timed(odd.problems()[:3], chip.name)
    story = dataclasses.replace(tell(rows, lambda c, held: decide(held, odd, c), limits_of, chips=[chip.name]), plans={chip.name: odd})
    for figure in drawn(story):
        assert all("<b>x" not in label and len(label) < 80 for trace in figure.traces for label in trace["y"] if label)


def test_broken_published_tables_do_not_stop_the_page(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise UsageError("KLAB_REFERENCE: /nowhere holds no tables")

    monkeypatch.setattr(estimates, "sources_for", broken)
    assert drawn(story_of(timed(plan.problems()[:2]), plan))
