"""What tokens cost: the figure's numbers against `klab cost`'s, and the page's slider against the drawing made here."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import pytest
from browser import Browser, missing
from made_results import made

from klab.harness.catalog import find_chip, find_model
from klab.harness.catalog.prices import Price, find_price
from klab.harness.choose.decide import decide
from klab.harness.cli.cost import SLO_TPOT, SLO_TTFT, duration
from klab.harness.cost.answer import Question, answer
from klab.harness.cost.estimate import Estimator
from klab.harness.cost.workload import Workload
from klab.harness.plan import plan as make_plan
from klab.harness.report import estimates, shell
from klab.harness.report.figures import money
from klab.harness.report.frames import standing
from klab.harness.report.html import el
from klab.harness.report.limits import limits_of
from klab.harness.report.subject import Story, tell
from klab.harness.store.result import Result

pd = pytest.importorskip("pandas", reason="pandas is not installed: no figure is made anywhere")
MODEL = "qwen3-0.6b"


@pytest.fixture(autouse=True)
def no_published_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are installed on some machines. Few points are enough here."""
    monkeypatch.setattr(estimates, "sources_for", lambda *_: [])
    monkeypatch.setattr(estimates, "IN_FLIGHT", (1, 16))


def story_of(*chips: str, model: str = MODEL, rows: Sequence[Result] = ()) -> Story:
    plans = {chip: make_plan(find_model(model), find_chip(chip)) for chip in chips}
    story = tell(rows, lambda chip, held: decide(held, plans.get(chip), chip), limits_of, chips=chips)
    return dataclasses.replace(story, plans=plans, model=model)


def row(chip: str, gpu_s: float, *, keeps: bool = True, speed: float = 50.0, spread: float = 2.0, **changes: object) -> dict[str, object]:
    """An operating point with ranges of a factor `spread` either way."""
    ends = {"": 1.0, "_low": 1 / spread, "_high": spread}
    return {
        "chip": chip, "model": "m", "format": "bf16", "gpus": 1, "in_flight": 4, "ttft_s": 0.5, "tpot_s": 1 / speed, "keeps_slos": keeps,
        "best": keeps, "measured_share": 0.0, "reference_share": 0.0, "modelled_share": 1.0, "times_are": "modelled",
        "joules_are": "modelled",
        **{f"tokens_per_s_per_user{end}": speed * factor for end, factor in ends.items()},
        **{f"gpu_s_per_mtok{end}": gpu_s * factor for end, factor in ends.items()},
        **{f"joules_per_token{end}": gpu_s * 1e-3 * factor for end, factor in ends.items()},
    } | changes  # fmt: skip


def price(chip: str, mid: float) -> Price:
    return Price(chip, "on_demand", mid / 2, mid, mid * 2, "2026-11", "a list", "secondary", guesses=("mid",))


PRICES: dict[str, Price | None] = {"a": price("a", 3.6), "b": price("b", 7.2)}


def test_the_large_point_is_what_klab_cost_answers() -> None:
    story = story_of("h200")
    rows, left_out = estimates.serving(story)
    assert not left_out
    (best,) = [one for one in money.data(rows, {"h200": find_price("h200", "on_demand")}).to_dict("records") if one["best"]]
    plan = story.plans["h200"]
    workload = Workload(plan.scenario.isl, plan.scenario.osl, slo_ttft_s=2.0, slo_tpot_s=0.025)
    asked = Question(plan.model, plan.chip, workload, price=find_price("h200", "on_demand"))
    told = answer(asked, Estimator(plan.chip)).priced
    assert told is not None and told.money is not None
    assert best["usd_per_mtok"] == pytest.approx(told.money.usd_per_mtok_total.mid)
    assert best["joules_per_token"] == pytest.approx(told.money.joules_per_token.mid)
    assert best["joules_per_token_high"] == pytest.approx(told.money.joules_per_token.high)
    # klab cost widens by the price as well; the page has one price at a time.
    assert best["usd_per_mtok_low"] * asked.price.low / asked.price.mid == pytest.approx(told.money.usd_per_mtok_total.low)  # type: ignore[union-attr]
    assert (best["gpus"], best["in_flight"]) == (told.point.deployment.tp, told.point.concurrency)


def test_promises_are_those_of_klab_cost() -> None:
    assert (duration(SLO_TTFT, ""), duration(SLO_TPOT, "")) == (estimates.SLO_TTFT_S, estimates.SLO_TPOT_S)


def test_no_point_of_a_curve_is_beaten_by_another() -> None:
    rows, _ = estimates.serving(story_of("h200"))
    points = [one for one in rows if not one["best"]]
    for one in points:
        assert not any(
            other["tokens_per_s_per_user"] > one["tokens_per_s_per_user"] and other["gpu_s_per_mtok"] < one["gpu_s_per_mtok"]
            for other in points
        )


def test_measurements_of_the_page_are_what_it_rests_on() -> None:
    plan = make_plan(find_model(MODEL), find_chip("h200"))
    known = Estimator(plan.chip)
    rows = [made(p, "triton_a", level_us=2 * known.launch(p).us.mid, rounds=6) for p in plan.problems()]
    measured, _ = estimates.serving(story_of("h200", rows=rows))
    modelled, _ = estimates.serving(story_of("h200"))
    assert max(one["measured_share"] for one in measured) > 0.1 and all(one["measured_share"] == 0 for one in modelled)
    dearer, cheaper = (min(one["gpu_s_per_mtok"] for one in held) for held in (measured, modelled))
    assert dearer > 1.1 * cheaper, "every measured launch takes twice as long as the model says"


def test_the_finding_tells_the_cheapest_its_lead_and_where_it_ends() -> None:
    frame = money.data([row("a", 1000.0), row("a", 400.0, keeps=False), row("b", 400.0), row("b", 900.0)], PRICES)
    assert list(frame["usd_per_mtok"]) == pytest.approx([1.0, 0.4, 0.8, 1.8])
    said = money.finding(frame)
    assert "b is the cheapest: $0.800 per million tokens ($0.400 to $1.60" in said and "at $7.20 per GPU-hour" in said
    assert "20% less than a ($1.00, $0.500 to $2.00, at $3.60)" in said and "the order is open" in said
    assert "which would be as cheap at $2.88 per GPU-hour" in said, "1000 s x 2.88 / 3600 = 0.80"
    flipped = money.data([row("a", 1000.0), row("b", 400.0)], {"a": price("a", 2.88), "b": price("b", 7.2)})
    assert flipped["usd_per_mtok"].iloc[0] == pytest.approx(flipped["usd_per_mtok"].iloc[1])
    apart = money.finding(money.data([row("a", 1000.0, spread=1.01), row("b", 400.0, spread=1.01)], PRICES))
    assert "do not overlap" in apart
    assert "Nothing shown keeps" in money.finding(money.data([row("a", 1.0, keeps=False)], PRICES))
    alone = money.finding(money.data([row("a", 1000.0)], PRICES))
    assert "less than" not in alone and "cheapest" not in alone


def test_another_format_is_a_curve_and_no_contestant() -> None:
    frame = money.data([row("a", 1000.0), row("b", 900.0), row("a", 10.0, format="fp8_block")], PRICES)
    assert "a in bf16 is the cheapest: $1.00 " in money.finding(frame)
    assert "a in bf16 takes the least, 0.900 J" not in money.finding_of_energy(
        frame
    ) and "b in bf16 takes the least" in money.finding_of_energy(frame)
    figure = money.draw(frame, PRICES, "", [])
    assert [trace["name"] for trace in figure.traces if trace["meta"]["part"] == "line"] == ["a bf16", "b bf16", "a fp8_block"]
    assert len([trace for trace in figure.traces if trace["meta"]["part"] == "band"]) == 2


def test_marks_are_the_tables_rows() -> None:
    rows, _ = estimates.serving(story_of("h200", "b200"))
    prices = {chip: find_price(chip, "on_demand") for chip in ("h200", "b200")}
    figure = money.draw(money.data(rows, prices), prices, "", [])
    assert figure.table is not None and figure.title.endswith(": modelled")
    for trace in figure.traces:
        held = figure.table.iloc[trace["meta"]["rows"]]
        if trace["meta"]["part"] == "line":
            assert trace["y"] == pytest.approx(list(held["usd_per_mtok"]), rel=1e-4) and len(set(held["chip"])) == 1
            assert [o == 1.0 for o in trace["marker"]["opacity"]] == list(held["keeps_slos"])
        else:
            half = len(held) // 2
            assert trace["y"][:half] == pytest.approx(list(held["usd_per_mtok_low"])[:half], rel=1e-4)
            assert trace["x"][half:] == pytest.approx(list(held["tokens_per_s_per_user_low"])[half:], rel=1e-4)


def test_where_there_is_nothing_it_says_why_or_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = tell([], lambda chip, held: decide(held, None, chip), limits_of, chips=["cpu"])
    assert money.figures(cpu, standing(cpu)) == []
    with_plan = dataclasses.replace(cpu, plans={"cpu": make_plan(find_model(MODEL), find_chip("cpu"))})
    assert money.figures(with_plan, standing(cpu)) == []
    (asks,) = money.figures(dataclasses.replace(story_of("h200"), plans={}), standing(cpu))
    assert "needs a model" in asks.empty
    dollars, joules = money.figures(story_of("h200", model="flux.1-dev"), standing(cpu))
    assert "not billed by the token" in dollars.empty and "not billed by the token" in joules.empty
    monkeypatch.setattr(money, "price_of", lambda _: None)
    unpriced, energy = money.figures(story_of("h200"), standing(cpu))
    assert "No price of h200 is known" in unpriced.empty and energy.table is not None and not energy.empty
    assert "usd" not in str(energy.traces)


def test_an_error_of_cost_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    from klab.kernels.errors import UsageError

    def broken(*_: object) -> None:
        raise UsageError("no such <thing>")

    monkeypatch.setattr(estimates, "_serving", broken)
    monkeypatch.setattr(estimates, "_kept", lambda kind, inputs, make: make())
    dollars, _ = money.figures(story_of("h200"), standing(Story(())))
    assert "h200 in bf16: no such <thing>" in dollars.empty


def test_the_second_page_computes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    first = estimates.serving(story_of("h200"))
    monkeypatch.setattr(estimates, "_serving", lambda *_: pytest.fail("it is in the cache"))
    assert estimates.serving(story_of("h200")) == first
    other = story_of("h200", rows=[made(story_of("h200").plans["h200"].problems()[0], "triton_a")])
    with pytest.raises(pytest.fail.Exception):
        estimates.serving(other)


def test_energy_in_electricity() -> None:
    said = money.finding_of_energy(money.data([row("a", 1000.0), row("b", 400.0)], PRICES))
    # 0.4 J x 1e6 tokens = 0.111 kWh, x 0.081 $/kWh x PUE 1.2
    assert "b takes the least, 0.400 J per token (0.200 to 0.800)" in said and "60% less than a" in said
    assert f"${0.4 / 3.6 * 0.081 * 1.2:#.3g} of electricity" in said


def test_plotly_knows_every_property() -> None:
    graph_objects = pytest.importorskip("plotly.graph_objects", reason="plotly is not installed: figures are drawn nowhere")
    frame = money.data([row("<b>a", 1000.0), row("b", 400.0)], {"<b>a": price("<b>a", 1.0), "b": price("b", 2.0)})
    for figure in (money.draw(frame, PRICES | {"<b>a": price("<b>a", 1.0)}, "", []), money.draw_energy(frame, "", [])):
        text = json.dumps({"data": figure.traces, "layout": figure.layout})
        assert "<b>a" not in text, "names are text"
        for colour, concrete in (("var(--ink)", "#000"), ("var(--faint)", "#ccc"), ('22"', '"')):
            text = text.replace(colour, concrete)
        graph_objects.Figure(json.loads(text))
    assert "&lt;b&gt;a" in money.sliders(["<b>a"], {"<b>a": price("<b>a", 1.0)})


def test_a_slider_for_each_chip_says_what_is_known_of_its_price() -> None:
    shown = money.sliders(["h200", "zzz"], {"h200": find_price("h200", "on_demand"), "zzz": None})
    assert shown.count("<input") == 1 and 'data-state="price.h200"' in shown and 'value="4.24"' in shown
    assert "mid guessed" in shown and "2.25..4.24..8.00" in shown and "2026-11" in shown and "reserved" in shown


@pytest.mark.skipif(bool(missing()), reason=missing())
def test_the_page_draws_the_same_and_follows_the_slider(tmp_path: Path) -> None:
    drawing = shell.plotly_js()
    if not drawing:
        pytest.skip("plotly is not installed: figures are drawn nowhere")
    rows = [row("a", 1000.0), row("a", 2000.0, speed=90.0), row("b", 400.0), row("b", 900.0, speed=99.0), row("b", 300.0, keeps=False)]
    rows.append(row("a", 10.0, format="fp8_block"))
    frame = money.data(rows, PRICES)
    figure = money.draw(frame, PRICES, "Read it so.", [])
    page = tmp_path / "page.html"
    main = el("main", el("section", el("h2", "Cost"), shell.framed_all([figure], True), id="cost"))
    page.write_text(shell.document("t", main, figures=[figure], drawing=drawing), encoding="utf-8")
    again = """
      const plot = klab.plots.plots.get("money"), {figure, table} = plot;
      const one = {identity: "money", data: figure.data.map((trace) => ({...trace})), layout: figure.layout,
                   table: {columns: table.columns, rows: table.rows}};
      const caption = klab.derive.money(one, table.rows.map((_, n) => n));
      return {caption, data: one.data.map(({x, y, text}) => ({x, y, text}))};
    """
    with Browser(tmp_path / "profile") as browser:
        browser.open(page)
        browser.run("document.querySelector('#money').scrollIntoView()")
        same = browser.run(again)
        assert same["caption"] == figure.caption
        for mine, theirs in zip(figure.traces, same["data"], strict=True):
            assert theirs["y"] == pytest.approx(mine["y"], rel=1e-4) and theirs["x"] == pytest.approx(mine["x"], rel=1e-4)
            assert theirs.get("text") == mine.get("text")
        browser.run(
            "const s = document.querySelector('[data-state=\"price.a\"]'); s.value = '1.8';"
            "s.dispatchEvent(new Event('input', {bubbles: true}))"
        )
        moved = browser.run(again)
        for mine, theirs, trace in zip(same["data"], moved["data"], figure.traces, strict=True):
            factor = 0.5 if trace["name"].startswith("a ") else 1.0
            assert theirs["y"] == pytest.approx([factor * y for y in mine["y"]])
        cheaper = money.finding(money.data(rows, PRICES | {"a": price("a", 1.8)}))
        assert moved["caption"] == f"{cheaper} {figure.layout['meta']['words']}" and "a in bf16 is the cheapest: $0.500" in cheaper
        shown = "return [document.querySelector('figcaption').textContent, document.querySelector('output').value, location.hash]"
        for _ in range(30):
            caption, number, address = browser.run(shown)
            if caption == moved["caption"] and "price.a=1.8" in address:
                break
        assert caption == moved["caption"] and number == "1.80" and "price.a=1.8" in address
        browser.run("klab.state.set('price.a', 'nonsense')")
        assert browser.run(again)["caption"] == figure.caption, "what is no price does not count"
        assert browser.run("return document.querySelector('output').value") == "3.60"
        browser.run("klab.state.set('price.a', '1000')")
        assert "at $9.00)" in browser.run(again)["caption"], "no price beyond the slider's end"
        assert browser.run("return document.querySelector('output').value") == "9.00"
        browser.run(
            "const s = document.querySelector('[data-state=\"price.a\"]'); s.value = '3.6';"
            "s.dispatchEvent(new Event('input', {bubbles: true}))"
        )
        assert browser.run("return klab.state.get('price.a')") is None, "at its own value it is not in the address"
        assert browser.console() == []
