"""The placement map: a cell against `klab place`, and what is said of who wins, where the border lies and how sure that is."""

from __future__ import annotations

import dataclasses
import json

import pytest

from klab.harness.catalog import find_chip, find_model
from klab.harness.catalog.prices import find_price
from klab.harness.choose.decide import decide
from klab.harness.cost.estimate import Estimator
from klab.harness.cost.place import Demand
from klab.harness.cost.placement import Question, place
from klab.harness.cost.ranges import Range
from klab.harness.cost.staffing import Terms
from klab.harness.cost.workload import Workload
from klab.harness.plan import plan as make_plan
from klab.harness.report import estimates
from klab.harness.report.figures import placement_map
from klab.harness.report.frames import standing
from klab.harness.report.limits import limits_of
from klab.harness.report.subject import Story, tell

pytest.importorskip("pandas", reason="pandas is not installed: no figure is made anywhere")
MODEL = "qwen3-0.6b"
EMPTY = standing(Story(()))


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """One workload, and no published tables, which some machines have."""
    monkeypatch.setattr(estimates, "sources_for", lambda *_: [])
    monkeypatch.setattr(estimates, "PROMPTS", (32768,))
    monkeypatch.setattr(estimates, "GENERATED", (128,))
    monkeypatch.setattr(placement_map, "PROMPTS", (512, 2048, 8192))
    monkeypatch.setattr(placement_map, "GENERATED", (128, 1024))


def story_of(*chips: str, model: str = MODEL) -> Story:
    plans = {chip: make_plan(find_model(model), find_chip(chip)) for chip in chips}
    story = tell([], lambda chip, held: decide(held, plans.get(chip), chip), limits_of, chips=chips)
    return dataclasses.replace(story, plans=plans, model=model)


def cell(prompt: int, generated: int, wins: str, *, corners: float = 1.0, more: float | None = 0.1, **changes: object) -> dict[str, object]:
    known = {
        "chip": [part for part in wins.replace(" together", "").split(" → ") if part], "wins": wins, "model": "m", "format": "bf16",
        "prompt_tokens": prompt, "generated_tokens": generated, "replicas": f"{wins} x 1", "usd_per_mtok": 1.0, "usd_per_mtok_low": 0.5,
        "usd_per_mtok_high": 2.0, "runner_up": "other" if more is not None else "", "runner_up_more_share": more,
        "corners_of_times_share": corners, "corners_of_all_share": corners / 2, "times_are": "modelled", "measured_share": 0.0,
        "reference_share": 0.0, "nearest": "",
    }  # fmt: skip
    none = {name: None for name in known if name.startswith(("usd", "corners", "runner")) or name in ("measured_share", "times_are")}
    return (known if wins else {**known, **none, "nearest": "a x 8"}) | changes


CELLS = [
    cell(512, 128, "a together"), cell(2048, 128, "a together"), cell(8192, 128, ""),
    cell(512, 1024, "a together", corners=0.5), cell(2048, 1024, "a → b"), cell(8192, 1024, "a → b", more=None),
]  # fmt: skip


def test_a_cell_is_what_klab_place_says() -> None:
    story = story_of("h200", "b200")
    (found,), left_out = estimates.placements(story)
    assert not left_out
    chips = [find_chip("b200"), find_chip("h200")]
    prices = {chip.name: find_price(chip.name, "on_demand") for chip in chips}
    terms = {name: Terms(Range(one.low, one.mid, one.high), 1.0) for name, one in prices.items()}
    demand = Demand(Workload(32768, 128, slo_ttft_s=2.0, slo_tpot_s=0.025), 1.0, count="fractions")
    answer = place(Question(find_model(MODEL), chips, demand, terms, (1, 4)), {chip.name: Estimator(chip) for chip in chips})
    winner = answer.ranking.winner
    assert winner is not None and winner.usd_per_mtok is not None and answer.sure_of_times is not None
    assert found["replicas"] == winner.name and found["usd_per_mtok"] == pytest.approx(winner.usd_per_mtok.mid)
    rival = next(option for option in answer.ranking.options if option.shape != winner.shape)
    assert found["runner_up_more_share"] == pytest.approx(rival.value / winner.value - 1)
    assert found["corners_of_times_share"] == answer.sure_of_times.share
    assert found["wins"] in (" → ".join(shape[1] for shape in winner.shape), f"{winner.chips[0]} together")


def test_the_finding_counts_and_tells_the_border() -> None:
    said = placement_map.finding(placement_map.data(CELLS))
    assert said.startswith("Of 6 workloads a together wins 3, a → b wins 2, in 1 none is in time.")
    assert "With 1,024 generated tokens: a together at 512, a → b from 2,048 to 8,192 prompt tokens." in said
    assert "In 1 of these 5 the doubt of the times may change who wins." in said and "All times are modelled." in said
    sure = placement_map.finding(placement_map.data([cell(512, 128, "a together", measured_share=0.4)]))
    assert "changes none of them" in sure and "40% to 40% is measured or published" in sure
    assert "no arrangement of these chips" in placement_map.finding(placement_map.data([cell(512, 128, "")]))


def test_cells_are_the_tables_rows_and_doubt_is_pale() -> None:
    figure = placement_map.draw(placement_map.data(CELLS), ["a 1.00 $/GPU-h"], [])
    assert figure.table is not None and figure.title.endswith(": modelled")
    assert list(figure.table["chip"]) == [("a",), ("a",), (), ("a",), ("a", "b"), ("a", "b")]
    maps = [trace for trace in figure.traces if trace["type"] == "heatmap"]
    seen = {}
    for trace in maps:
        for line, (rows, zs) in enumerate(zip(trace["meta"]["rows"], trace["z"], strict=True)):
            for column, (at, z) in enumerate(zip(rows, zs, strict=True)):
                assert (at < 0) == (z is None)
                if at >= 0:
                    seen[at] = trace["opacity"]
                    row = figure.table.iloc[at]
                    assert trace["x"][column] == f"{row['prompt_tokens']:,}" and trace["y"][line] == f"{row['generated_tokens']:,}"
    assert [seen[n] < 1 for n in range(6)] == [False, False, False, True, False, False], "that nothing is in time is no doubt"
    texts = [text for trace in maps for line in trace["text"] for text in line if text]
    assert sorted(texts) == sorted([*["a together<br>+10.0%"] * 3, "a → b<br>+10.0%", "a → b<br>alone in time", "none in time"])
    full = placement_map.draw(placement_map.data([cell(512, 128, "", nearest="")]), [], []).traces[0]
    assert full["text"] == [["does not fit"]] and "memory" in full["customdata"][0][0], "not every cell without a winner is late"


def test_plotly_knows_every_property() -> None:
    graph_objects = pytest.importorskip("plotly.graph_objects", reason="plotly is not installed: figures are drawn nowhere")
    for cells in (CELLS, CELLS[:1], [cell(512, 128, "")], [cell(512, 128, "<b>x</b> together")]):
        figure = placement_map.draw(placement_map.data(cells), [], [])
        text = json.dumps({"data": figure.traces, "layout": figure.layout}, allow_nan=False)
        assert "<b>x" not in text
        for colour, concrete in (("var(--ink)", "#000"), ("var(--faint)", "#ccc")):
            text = text.replace(colour, concrete)
        graph_objects.Figure(json.loads(text))


def test_where_there_is_nothing_to_compare(monkeypatch: pytest.MonkeyPatch) -> None:
    assert placement_map.figures(story_of("cpu"), EMPTY) == []
    assert placement_map.figures(dataclasses.replace(story_of("h200", "b200"), plans={}), EMPTY) == []
    (alone,) = placement_map.figures(story_of("h200"), EMPTY)
    assert "two kinds of GPU" in alone.empty
    (other,) = placement_map.figures(story_of("h200", "b200", model="flux.1-dev"), EMPTY)
    assert "not billed by the token" in other.empty
    monkeypatch.setattr(estimates, "price_of", lambda chip: None if chip == "b200" else find_price(chip, "on_demand"))
    (unpriced,) = placement_map.figures(story_of("h200", "b200"), EMPTY)
    assert "No price of b200 is known" in unpriced.empty


def test_a_model_that_fits_nowhere_is_a_sentence() -> None:
    (figure,) = placement_map.figures(story_of("h200", "h100", model="kimi-k2"), EMPTY)
    assert "h100: 8 GPUs do not hold the model." in figure.empty
