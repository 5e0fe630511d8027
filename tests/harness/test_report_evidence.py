"""What stands behind each winner: the rounds as they were stored, thinned by a rule, within a bound; and its panel in a real browser."""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
from browser import Browser
from made_results import CONFIGS, contest, made
from test_report_strip import NASTY, A, B, row, story

from klab.harness.catalog import find_chip, find_model
from klab.harness.choose.choose import choose
from klab.harness.choose.profile import Wanted
from klab.harness.cli._options import scenario_of
from klab.harness.plan import Plan, Scenario, plan
from klab.harness.plan.scenario import scenario_for
from klab.harness.report import places
from klab.harness.report.html import el
from klab.harness.report.limits import limits_of
from klab.harness.report.payload import compact
from klab.harness.report.sections import evidence, winners
from klab.harness.report.sections.evidence import MOST_BYTES, payload, thinned
from klab.harness.report.sections.facts import again
from klab.harness.report.shell import document, plotly_js
from klab.harness.report.subject import Occurrence, Story, tell
from klab.harness.store.result import Result
from klab.kernels.decode_attention.problem import DecodeAttention
from klab.kernels.matmul.problem import Matmul


def records(told: Story) -> list[dict[str, Any]]:
    """In the order of the table."""
    found: Any = json.loads(compact(payload(told)))
    for record in found["records"].values():
        record["facts"] = [found["facts"][place] for place in record["facts"]]
    return [found["records"][one.identity] for one in winners.winners(told)]


def test_rounds_clocks_and_power_are_those_that_were_stored() -> None:
    clocks = [1755.0 - n for n in range(20)]
    trace = tuple((0.1 * n, 600.0 + n) for n in range(300))
    winner = made(
        A, "triton_a", level_us=10.0, clocks_mhz=tuple(clocks), marked=(0, 1, *[0] * 18), power_trace=trace,
        environment={"torch": "2.13.0", "commit": "0123456789abcdef", "dirty": True},
    )  # fmt: skip
    library, rival = made(A, "torch", level_us=20.0), made(A, "triton_b", level_us=15.0)
    told = story([winner, library, rival])
    one = records(told)[0]
    assert [series["role"] for series in one["series"]] == ["winner", "nearest rival", "best library"]
    first = one["series"][0]
    assert first["us"] == pytest.approx(winner.samples_us, rel=1e-4) and first["every"] == 1 and first["rounds"] == 20
    assert first["clock"] == clocks and first["heat"] == 52.0, "what never changed is one number"
    assert first["marked"] == [0, 1, *[0] * 18] and "marked" not in one["series"][1]
    assert one["series"][1]["how"] == "same rounds" and one["series"][2]["median"] == pytest.approx(library.median_us, rel=1e-4)
    assert len(one["power"]["s"]) == 100 and one["power"]["w"][1] == 603.0, "every third of 300"
    assert payload(told)["environments"] == [{"commit": "0123456789abcdef", "dirty": "True", "torch": "2.13.0"}]
    facts = dict(one["facts"])
    assert facts["Commit"] == "0123456789ab with changes" and "in the worst of 3 checks" in facts["Checks"]
    assert (
        facts["Timed"].startswith("20 rounds of 40 launches, 1 of them marked for throttling")
        and "SM clock 1736 to 1755 MHz" in facts["Clocks and heat"]
    )
    assert facts["Energy"].startswith("not measured: ") and facts["Runs"] == "run-1" and one["config"] == {}


def test_the_library_that_is_the_nearest_rival_is_drawn_once() -> None:
    one = records(story([row(A, "triton_a", 10.0), row(A, "torch", 20.0)]))[0]
    assert [series["role"] for series in one["series"]] == ["winner", "nearest rival and best library"]
    alone = records(story([row(A, "triton_a", 10.0)]))[0]
    assert [series["role"] for series in alone["series"]] == ["winner"] and alone["power"] is None


@pytest.mark.parametrize(
    ("count", "most", "kept"), [(0, 60, []), (1, 60, [0]), (5, 2, [0, 3]), (60, 60, list(range(60))), (61, 60, list(range(0, 61, 2)))]
)
def test_every_kth_round_is_kept(count: int, most: int, kept: list[int]) -> None:
    assert thinned(count, most) == kept and len(thinned(count, most)) <= most


def test_many_winners_keep_fewer_rounds_and_the_fastest_none(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [made(Matmul(m, 64, 64), kernel, level_us=100.0 + m, rounds=80) for m in range(1, 25) for kernel in ("triton_a", "torch")]
    told = story(rows)
    assert {len(series["us"]) for one in records(told) for series in one["series"]} == {40}, "every second of 80"
    monkeypatch.setattr(evidence, "MOST_BYTES", 18_000)
    small = records(told)
    having = [one for one in small if "series" in one]
    assert having and {len(one["series"][0]["us"]) for one in having} == {14}, "every sixth of 80"
    assert 0 < len(having) < len(small) and all("the store has them" in one["left_out"] for one in small if "series" not in one)
    slowest = min(one["series"][0]["median"] for one in having)
    assert (
        slowest
        > max(one.choice.evidence.median_us for one, raw in zip(winners.winners(told), small, strict=True) if "series" not in raw) * 0.99
    )
    assert len(compact(payload(told))) < 24_000 < MOST_BYTES


def test_the_command_that_measures_again() -> None:
    """Only where a model of the catalog has the problem: of its step at that batch, at the context that the problem has."""
    shape = DecodeAttention(kv_lens=(8704,) * 8, heads=16, kv_heads=8, head_dim=128)
    options = "--isl 8704 --osl 1 --dtype bfloat16"
    told = story([made(shape, "triton_a")], occurs={shape.key: (Occurrence("qwen3-0.6b", "decode", 8, "attention", 28, options),)})
    does, command = again(told, winners.winners(told)[0])
    words = f"--model qwen3-0.6b --chip h200 --kernel decode_attention/triton_a {options} --batch 8 --phase decode --again"
    assert (does, command) == ("Measure again", f"klab measure {words}")
    tuned = story([made(shape, "triton_a", config={"splits": 4})], occurs=told.occurs)
    does, command = again(tuned, winners.winners(tuned)[0])
    assert does == "Tune again" and command.startswith("klab tune ") and command.endswith(f"--phase decode --problem {shape.key}")
    assert again(story([made(shape, "triton_a")]), winners.winners(told)[0])[1] == ""


@pytest.mark.parametrize(
    ("model", "scenario"),
    [
        ("qwen3-0.6b", {"isl": 1024, "osl": 128, "batches": (1, 8)}),
        ("qwen3-8b", {"isl": 512, "osl": 1, "batches": (4,), "tp": 2, "dtype": "float16"}),
        ("qwen3-8b", {"isl": 640, "osl": 9, "batches": (3,), "page_size": 32, "prefill_batch": 2}),
    ],
)
def test_the_command_plans_the_very_problem(model: str, scenario: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of every row of a plan: its command, read as the command line does, has the problem in its phase."""
    monkeypatch.setenv("KLAB_CACHE", str(tmp_path))
    monkeypatch.setattr(places, "load_models", lambda: (find_model(model),))
    chip = find_chip("h200")
    planned = plan(find_model(model), chip, Scenario(**scenario))
    wanted = [Wanted(problem.key, problem.operator, problem.label(), problem.to_json()) for problem in planned.problems()]
    given = {"h200": planned} if "page_size" in scenario else {}
    told = story([made(problem, "triton_a", level_us=9.0) for problem in planned.problems()], occurs=places.places_of(wanted, given))
    plans: dict[str, Plan] = {}
    for one in winners.winners(told):
        _, command = again(told, one)
        words = command.split()
        options = {name: value for name, value in itertools.pairwise(words) if name.startswith("--")}
        with_ = [value for name, value in itertools.pairwise(words) if name == "--with"]
        if command not in plans:
            fields = scenario_of(
                int(options["--isl"]),
                int(options["--osl"]),
                options.get("--batch"),
                int(options.get("--tp", "1")),
                options["--dtype"],
                with_,
            )
            plans[command] = plan(find_model(options["--model"]), chip, scenario_for(find_model(model), chip, **fields))
        rows = plans[command].rows
        assert any(row.problem and row.problem.key == one.choice.wanted.problem_key and row.phase == options["--phase"] for row in rows), (
            command
        )
    assert len(plans) > 1


def test_without_a_script_it_reads() -> None:
    shown = evidence.plain(story([*contest(), made(A, NASTY, level_us=0.1)]))
    assert shown is not None and "<script" not in shown and "best library: torch" in shown and "winner: " in shown
    assert "launch by launch between CUDA events" in shown and evidence.plain(Story(())) is None
    many = story([made(Matmul(m, 64, 64), "triton_a") for m in range(1, 60)])
    assert "19 faster winners have theirs in the panels" in (evidence.plain(many) or "")


def test_a_row_opens_its_evidence_and_its_configuration_is_copied(browser: Browser, tmp_path: Path) -> None:
    fine = made(B, "triton_a", config={"block_m": 64}, level_us=40.0, marked=(1, *[0] * 19), power_trace=((0.0, 600.0), (0.1, 610.0)))
    fine = dataclasses.replace(fine, clocks_mhz=tuple(1700.0 + n for n in range(20)), environment={"torch": NASTY})
    told = story([fine, made(B, "torch", level_us=50.0), made(A, NASTY, config={NASTY: NASTY}, level_us=9.0)])
    page = tmp_path / "page.html"
    content = el("main", winners.section(told))
    sections = {"evidence": payload(told)}
    page.write_text(document("t", content, sections=sections, drawing=plotly_js(), styles=("page.css", "winners.css")), encoding="utf-8")
    browser.open(page)
    assert browser.run("return klab.ready.then(() => true)")
    identity = next(one.identity for one in winners.winners(told) if one.choice.kernel == "matmul/triton_a")
    browser.run(f"document.querySelector('[data-evidence={identity}] button.evidence').click()")
    panel = "document.querySelector('.panel')"
    assert browser.run(f"return {panel}.querySelectorAll('.main-svg').length") >= 3, "rounds, clock, power"
    text = browser.run(f"return {panel}.textContent")
    for words in ("nearest rival and best library", "launch by launch", "SM clock 1700 to 1719 MHz", NASTY):
        assert words in text, words
    hollow = browser.run(
        f"return [...{panel}.querySelectorAll('.scatterlayer .point')].filter(p => getComputedStyle(p).fillOpacity === '0').length"
    )
    hollow = hollow or browser.run(
        f"return {panel}.querySelector('.js-plotly-plot').data[0].marker.symbol.filter(s => s.endsWith('-open')).length"
    )
    assert hollow == 1, "the round that does not count"
    browser.run(
        "navigator.clipboard.writeText = (text) => { window.copied = text; return Promise.resolve(); };"
        f"document.querySelector('#{identity} button.copy').click()"
    )
    assert json.loads(browser.run("return window.copied")) == {"kernel": "matmul/triton_a", "config": {"block_m": 64}}
    browser.run(
        "Object.defineProperty(navigator, 'clipboard', { value: undefined, configurable: true });"
        "document.execCommand = (command) => { window.old = document.activeElement.value; return command === 'copy'; };"
        f"document.querySelector('#{identity} button.copy').click()"
    )
    assert json.loads(browser.run("return window.old"))["kernel"] == "matmul/triton_a", "without a clipboard the old way"
    other = next(one.identity for one in winners.winners(told) if one.identity != identity)
    browser.run(f"document.querySelector('[data-evidence={other}] button.evidence').click()")
    assert browser.run("return document.querySelectorAll('.panel').length") == 1 and NASTY in browser.run(f"return {panel}.textContent")
    assert browser.run("return document.querySelectorAll('.panel img, .panel script').length") == 0
    browser.open(page, at=f"?open={identity}", everything=False)
    assert browser.run(f"return klab.ready.then(() => {panel}.querySelectorAll('.main-svg').length)") >= 3, (
        "a link to an open row draws too"
    )
    assert browser.console() == []


def test_all_columns_fit_a_screen_of_1280_and_what_is_not_known_sorts_last(browser: Browser, tmp_path: Path) -> None:
    def metered(one: Result) -> Result:
        return dataclasses.replace(
            one, chip="b200", energy_j=0.0123, energy_ci_low_j=0.0121, energy_ci_high_j=0.0125, power_w=612.0, energy_reason="counter"
        )

    rows = [one for one in contest() if one.status == "ok"] + [metered(one) for one in contest(seed=1) if one.status == "ok"]
    told = tell(
        rows,
        lambda chip, found: choose(found, None, chip=chip, defaults=lambda one: CONFIGS[one.backend][-1]),
        limits_of,
    )
    page = tmp_path / "page.html"
    content = el("main", winners.section(told))
    page.write_text(document("t", content, drawing="", styles=("page.css", "winners.css")), encoding="utf-8")
    browser.open(page, width=1280)
    table = "document.getElementById('winners')"
    heads = browser.run(f"return [...{table}.tHead.rows[0].cells].map(one => one.textContent)")
    assert heads == [
        "Problem", "Chip", "Kernel and configuration", "Time", "Against library", "Of roofline", "Speed", "Against default",
        "Nearest rival", "Energy per call", "Error",
    ]  # fmt: skip
    assert browser.run(f"const wide = {table}.closest('.wide'); return wide.scrollWidth - wide.clientWidth") <= 0
    assert browser.run("return document.documentElement.scrollWidth") == 1280
    for _ in range(2):
        browser.run(f"{table}.tHead.querySelectorAll('button')[{heads.index('Energy per call')}].click()")
        shown = browser.run(f"return [...{table}.tBodies[0].rows].map(one => one.cells[{heads.index('Energy per call')}].textContent)")
        having = ["mJ" in text or " J" in text or "µJ" in text for text in shown]
        assert having == sorted(having, reverse=True) and 0 < sum(having) < len(having), shown
    browser.run(f"{table}.tHead.querySelectorAll('button')[{heads.index('Time')}].click()")
    medians = [one.choice.evidence.median_us for one in winners.winners(told)]
    shown = browser.run(f"return [...{table}.tBodies[0].rows].map(one => Number(one.cells[{heads.index('Time')}].dataset.sort))")
    assert shown == sorted(medians) and min(medians) < 1000 < max(medians), "microseconds and milliseconds in one order"
