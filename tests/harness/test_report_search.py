"""The figures of a search: which configurations count, how they are drawn, and how fast the best was found."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browser import Browser, missing
from made_results import failed, made

from klab.harness.choose.decide import decide
from klab.harness.choose.profile import Profile
from klab.harness.plan.trial import Policy
from klab.harness.report.figures import search, search_progress
from klab.harness.report.figures.search_journals import journals
from klab.harness.report.figures.search_spaces import Space, parameters, spaces
from klab.harness.report.figures.style import Figure
from klab.harness.report.frames import standing
from klab.harness.report.limits import Limits
from klab.harness.report.page import render
from klab.harness.report.subject import Story, tell
from klab.harness.store.result import Result, Status
from klab.harness.tune.search_journal import SearchJournal
from klab.harness.tune.strategy import Evaluation
from klab.kernels.contract import canonical_json
from klab.kernels.matmul.problem import Matmul

PROBLEM = Matmul(64, 2048, 1024)
NASTY = '<script>alert("x")</script>&amp;' + "n" * 300
Settings = dict[str, Any]


def told(rows: Sequence[Result], **changes: Any) -> Story:
    """A story whose choice is not made: the figures of a search need none."""
    story = tell(rows, lambda chip, found: Profile(chip, "latency"), lambda chip, device: Limits(None, "not known"))
    return dataclasses.replace(story, **changes)


def grid(**values: Sequence[Any]) -> list[Settings]:
    return [dict(zip(values, point, strict=True)) for point in itertools.product(*values.values())]


def rows_of(points: Sequence[Settings], us: Callable[[Settings], float | Status], kernel: str = "triton_a") -> list[Result]:
    """A row per point, a second apart; a Status instead of a time is a failure."""
    found = []
    for n, point in enumerate(points):
        at = {"config": point, "recorded_at": f"2026-11-20T{n // 3600:02d}:{n // 60 % 60:02d}:{n % 60:02d}Z"}
        time = us(point)
        if isinstance(time, Status):
            found.append(failed(PROBLEM, kernel, time, f"because {time.value}", **at))
        else:
            found.append(made(PROBLEM, kernel, samples=[time] * 5, ci_low_us=0.99 * time, ci_high_us=1.01 * time, **at))
    return found


def one_space(rows: Sequence[Result], **changes: Any) -> Space:
    story = told(rows, **changes)
    (found,) = spaces(standing(story), story)
    return found


def drawn(rows: Sequence[Result], **changes: Any) -> list[Figure]:
    story = told(rows, **changes)
    return search.figures(story, standing(story))


# Which configurations count.


def test_a_space_is_every_configuration_once() -> None:
    points = grid(block=(64, 32, 128), warps=(4, 8), stages=(3,))
    rows = rows_of(points, lambda p: 10.0 * p["block"] / p["warps"] if p["block"] > 32 else Status.COMPILE_ERROR)
    again = dataclasses.replace(rows[0], key="again", run_id="run-2", recorded_at="2026-11-21T10:00:00Z", median_us=70.0, chip="h200")
    later = failed(PROBLEM, "triton_a", Status.TIMEOUT, "slow", config=points[4], key="later", recorded_at="2026-11-22T10:00:00Z")
    wrong = failed(PROBLEM, "triton_a", Status.INCORRECT, "off", config=points[5], key="wrong", recorded_at="2026-11-19T10:00:00Z")
    library = made(PROBLEM, "torch")
    published = [made(PROBLEM, "triton_a", config={"block": n, "warps": 1}, kind="reference") for n in range(9)]
    found = one_space([*rows, again, later, wrong, library, *published])
    by_config = {row["config_key"]: row for row in found.tried.to_dict("records")}
    assert len(by_config) == len(found.tried) == 6
    assert by_config[canonical_json(points[0])]["median_us"] == 70.0, "the newest time"
    assert by_config[canonical_json(points[4])]["status"] == "ok", "a time-out takes no time back"
    assert by_config[canonical_json(points[5])]["status"] == "incorrect", "a wrong answer does"
    assert [(p.name, p.values) for p in found.parameters] == [("block", (32, 64, 128)), ("warps", (4, 8))]
    assert found.constant == {"stages": 3}
    assert found.fine.sum() == 3 and np.isnan(found.times_us[~found.fine]).all()
    assert found.best is not None and found.best["config_key"] == canonical_json(points[0]), "70 against 640 / 8"


def test_other_conditions_are_left_out_and_told() -> None:
    points = grid(block=(1, 2, 3, 4, 5), warps=(1, 2))
    warm = Policy(l2="warm").to_json()
    rows = [*rows_of(points, lambda p: 100.0 + p["block"]), *(
        dataclasses.replace(row, policy=warm, key=f"warm {n}") for n, row in enumerate(rows_of(points[:3], lambda p: 1.0)))]  # fmt: skip
    found = one_space(rows)
    assert found.left_out == 3 and found.times_us.min() == 101.0
    assert "3 rows were taken under other conditions" in drawn(rows)[0].caption
    finals = [dataclasses.replace(row, policy=Policy(seed=7, energy=True).to_json(), key=f"f {n}") for n, row in enumerate(rows[:10])]
    assert one_space([*rows[:10], *finals]).left_out == 0, "a seed is no other condition"


def test_missing_parameters_and_mixed_values_have_places() -> None:
    points: list[Settings] = [{"a": 1, "mode": "x"}, {"a": 2}, {"a": 1, "mode": True}, {"a": 2, "mode": [1, 2]}, {"a": 1, "mode": 1}]
    found = one_space(rows_of(points, lambda p: 10.0 * p["a"]))
    a, mode = found.parameters
    assert a.ordered and not mode.ordered
    assert sorted(mode.words) == ["1", "[1,2]", "none", "x", "yes"] and mode.words[0] == "none"
    assert [mode.words[code] for code in mode.codes] == [
        {"x": "x", "true": "yes", "[1,2]": "[1,2]", "1": "1", "null": "none"}[canonical_json(json.loads(key).get("mode")).strip('"')]
        for key in found.tried["config_key"]
    ]


def test_values_that_no_axis_holds_are_texts() -> None:
    for strange in (10**400, math.inf, -math.inf, 2**80):
        values: list[Any] = [1, strange, 3, 4]
        (found,), constant = parameters([{"a": value} for value in values])
        assert constant == {} and found.ordered == (strange == 2**80)
        assert [found.values[code] for code in found.codes] == values
        assert all(isinstance(text, str) for text in found.words)


def test_the_richest_spaces_are_drawn() -> None:
    rows = [
        row
        for n in range(15)
        for row in rows_of(grid(a=range(4 + n), b=(1, 2)), lambda p: 10.0 + p["a"], f"triton_{n}")
    ]  # fmt: skip
    story = told([*rows, *rows_of([{"a": 1}], lambda p: 1.0, "triton_one")])
    found = spaces(standing(story), story)
    assert [space.first("kernel") for space in found] == [f"triton_{n}" for n in range(14, 2, -1)]
    assert found[0].others == 14 and found[-1].others == 3
    assert "No landscape for 3 smaller spaces." in search.caption(found[-1], 14, [], False)
    assert len({space.name for space in found}) == 12, "each has a name of its own in the menu"


def test_times_and_ends_of_zero_are_no_times() -> None:
    points = grid(a=(1, 2, 3), b=(1, 2))
    rows = rows_of(points, lambda p: 10.0 * p["a"])
    rows[0] = dataclasses.replace(rows[0], ci_low_us=0.0)
    rows[-1] = dataclasses.replace(rows[-1], median_us=0.0)
    assert len(one_space(rows).tried) == 5
    library = rows_of([{}], lambda p: 20.0, "torch")
    figures = drawn([*rows, *library])
    assert any("as fast as the best library" in one.caption and "to ∞×)" in one.caption for one in figures)


# The landscape.


def test_lines_of_a_large_space_are_the_fastest_and_an_even_choice() -> None:
    rng = np.random.default_rng(1)
    us = rng.permutation(np.arange(1.0, 901.0))
    us[rng.permutation(900)[:90]] = np.nan
    at = search.thinned(us, 200)
    assert len(at) == 200 and (np.diff(at) > 0).all()
    assert np.isnan(us[at]).sum() == 20, "as large a part of the failures"
    order = np.argsort(us)[:810]
    assert set(order[:45]) <= set(at) and order[809] in at, "a quarter for the fastest; the slowest is there"
    ranks = sorted(list(order).index(n) for n in at if not np.isnan(us[n]))
    assert max(b - a for a, b in itertools.pairwise(ranks)) <= math.ceil(810 / 135) + 1
    assert (search.thinned(us, 900) == np.arange(900)).all()


def test_the_landscape_holds_the_data_and_its_finding() -> None:
    points = grid(block=(16, 32, 64, 128), warps=(2, 4, 8), fast=(True, False))

    def us(p: Settings) -> float | Status:
        return Status.CRASHED if p["block"] == 128 and p["warps"] == 8 else 10.0 * 128 / p["block"] * (1.0 if p["fast"] else 2.5)

    space = one_space(rows_of(points, us))
    table = search.data(space)
    figure = search.draw(space, table, "l", ["block"])
    (trace,) = figure.traces
    assert figure.table is not None and len(figure.table) == 24 and trace["meta"]["rows"] == list(range(24))
    assert [d["label"] for d in trace["dimensions"]][-2:] == ["block", "time"], "what matters most is next to the time"
    blocks = next(d for d in trace["dimensions"] if d["label"] == "block")
    assert blocks["ticktext"] == ["16", "32", "64", "128"]
    assert [blocks["ticktext"][round(value)] for value in blocks["values"]] == [str(b) for b in figure.table["parameter block"]]
    place = np.array(trace["dimensions"][-1]["values"])
    ok = figure.table["status"] == "ok"
    assert (place[~ok] > 1).all() and sorted(set(figure.table.loc[~ok, "status"])) == ["crashed"]
    logs = np.log(figure.table.loc[ok, "median_us"])
    assert place[ok] == pytest.approx(((logs - logs.min()) / (logs.max() - logs.min())).to_numpy(), abs=1e-3), "20 times: a logarithm"
    times = [us(p) for p in points]
    valid = [t for t in times if not isinstance(t, Status)]
    ratio = statistics.median(valid) / min(valid)
    assert "The best of 24 configurations takes 10.0 µs (9.900 to 10.10 µs)" in figure.caption
    assert f"{ratio:.3f}× as long" in figure.caption and "2 of 22 with a time are within 5% of it; 2 failed" in figure.caption
    colour = trace["line"]["color"]
    assert all((c <= -1) == bad for c, bad in zip(colour, ~ok, strict=True)) and max(colour) == 0.0


def test_the_default_is_held_against_the_best() -> None:
    points = grid(block=(16, 32, 64, 128), warps=(2, 4))
    rows = rows_of(points, lambda p: 10.0 + p["block"] / p["warps"])
    story = told(rows)
    profile = decide(rows, None, "h200")
    (choice,) = profile.choices
    assert dict(choice.config) == {"block": 16, "warps": 4}
    rival = next(r for r in (choice.evidence.runner_up, *choice.evidence.tied) if r is not None)
    usual = dataclasses.replace(rival, config=points[6])
    choice = dataclasses.replace(choice, evidence=dataclasses.replace(choice.evidence, default=usual))
    subject = dataclasses.replace(story.subjects[0], profile=dataclasses.replace(profile, choices=(choice,)))
    story = dataclasses.replace(story, subjects=(subject,))
    frame = standing(story)
    (space,) = spaces(frame, story)
    assert space.default is not None and space.default["median_us"] == pytest.approx(10 + 64.0)
    landscape, *_, progress = search.figures(story, frame)
    assert f"the default {74 / 14:.3f}× ({74 * 0.99 / (14 * 1.01):.3f}× to {74 * 1.01 / (14 * 0.99):.3f}×) as long" in landscape.caption
    assert any("default configuration" in trace["name"] for trace in progress.traces)
    assert f"{74 / 14:.3f}× ({74 * 0.99 / (14 * 1.01):.3f}×" in progress.caption


# How fast the best was found.


def test_a_run_is_a_line_of_its_rows() -> None:
    points = grid(a=(1, 2, 3), b=(1, 2))
    times: Mapping[str, float | Status] = dict(
        zip(map(canonical_json, points), (50.0, 80.0, Status.CRASHED, 30.0, 29.0, 60.0), strict=True)
    )
    rows = [dataclasses.replace(row, compile_s=2.0) for row in rows_of(points, lambda p: times[canonical_json(p)])]
    frame = standing(told([*rows, made(PROBLEM, "torch", level_us=1.0)]))
    table = search_progress.data(frame, [])
    assert table["best_us"].tolist() == [50.0, 30.0, 29.0, 29.0] and table["step"].tolist() == ["begins", "better", "better", "ends"]
    seconds = np.cumsum([50, 80, 0, 30, 29, 60]) * 5 * 40 / 1e6
    assert table["seconds"].tolist() == pytest.approx([seconds[0], seconds[3], seconds[4], seconds[5]])
    assert table["configurations"].tolist() == [1, 4, 5, 6] and table["failed"].tolist() == [0, 1, 1, 1]
    assert table["compile_s"].iloc[-1] == 12.0 and set(table["source"]) == {"rows"}
    assert search_progress.within(table, 29.0) == pytest.approx(seconds[3]), "30 is within 5% of 29"
    assert search_progress.within(table, 27.0) == math.inf and search_progress.within(table, 50.0) == pytest.approx(seconds[0])


def journal(folder: Path, evaluations: Sequence[Evaluation], seed: int = 0) -> Path:
    header = {"kind": "search", "problem": PROBLEM.key, "chip": "h200", "strategy": "gaussian", "seed": seed}
    kept = SearchJournal(folder / "tune" / f"{seed}.search", header)
    for one in evaluations:
        kept.append(one)
    return kept.path


def test_a_journal_is_a_line_of_all_device_time(tmp_path: Path) -> None:
    found = [
        Evaluation(0, 90.0, spent_s=2.0),
        Evaluation(3, 40.0, rounds=5, spent_s=0.5),
        Evaluation(4, math.inf, Status.CRASHED, spent_s=3.0),
        Evaluation(5, 70.0, spent_s=1.0),
        Evaluation(3, 60.0, spent_s=1.5),
        Evaluation(6, 59.0, spent_s=1.0),
    ]
    path = journal(tmp_path, found)
    with path.open("a") as file:
        file.write('{"candidate": 9, "val')
    before = path.read_bytes()
    (tmp_path / "tune" / "foreign.search").write_text("what is this\n{}\n")
    (tmp_path / "tune" / "empty.search").write_text("")
    journal(tmp_path, [], seed=2)
    (one,) = journals([tmp_path, tmp_path / "tune", tmp_path / "absent"])
    assert one.evaluations == tuple(found) and path.read_bytes() == before, "read, and left as it was"
    frame = standing(told(rows_of([{"a": 1}], lambda p: 58.0)))
    table = search_progress.data(frame, [one])
    assert table["best_us"].tolist() == [90.0, 70.0, 60.0, 59.0, 59.0], "a short run is not held against a full measurement"
    assert table["seconds"].tolist() == [2.0, 6.5, 8.0, 9.0, 9.0] and table["configurations"].tolist() == [1, 4, 4, 5, 5]
    assert set(table["line"]) == {"search by gaussian, seed 0"} and search_progress.within(table, 59.0) == 8.0


def test_journals_and_runs_are_told_apart(tmp_path: Path) -> None:
    journal(tmp_path, [Evaluation(n, 100.0 - n, spent_s=1.0) for n in range(8)])
    journal(tmp_path, [Evaluation(n, 90.0 - n, spent_s=1.0) for n in range(8)], seed=1)
    rows = rows_of(grid(a=(1, 2, 3), b=(1, 2, 3)), lambda p: 80.0 + p["a"] + p["b"])
    progress = drawn([*rows, made(PROBLEM, "torch", level_us=75.0)], sources=(str(tmp_path),))[-1]
    assert progress.title == search_progress.TITLE and progress.table is not None
    names = [trace["name"] for trace in progress.traces if "meta" in trace]
    assert names == ["search by gaussian, seed 0: all device time", "search by gaussian, seed 1: all device time",
                     "run run-1: timed rounds alone"]  # fmt: skip
    assert (
        "in 8.00 s, best 93.0 µs" in progress.caption
        and "by its journal" in progress.caption
        and "so they are the least" in progress.caption
    )
    assert "as fast as the best library, torch" in progress.caption
    for trace in progress.traces:
        if "meta" in trace:
            assert progress.table["best_us"].iloc[trace["meta"]["rows"]].tolist() == trace["y"]


# Odd data.


def test_nothing_to_search() -> None:
    assert drawn([]) == [] and drawn([made(PROBLEM)]) == []
    assert drawn(rows_of([{"a": n} for n in range(3)], lambda p: 1.0)) == [], "three configurations are no landscape"
    published = [dataclasses.replace(row, kind="reference") for row in rows_of(grid(a=(1, 2, 3), b=(1, 2)), lambda p: 2.0)]
    assert drawn(published) == []
    checked = [dataclasses.replace(row, median_us=None, samples_us=()) for row in rows_of(grid(a=(1, 2, 3), b=(1, 2)), lambda p: 2.0)]
    assert drawn(checked) == [], "checked and never timed"


def test_names_are_text() -> None:
    points = [{NASTY: n, "b": NASTY if n % 2 else "x", "chip": n % 3} for n in range(20)]
    figures = drawn(rows_of(points, lambda p: Status.CRASHED if p["b"] == "x" and p[NASTY] > 9 else 5.0 + p[NASTY], NASTY))
    assert len(figures) == 4
    for figure in figures:
        shown = json.dumps([figure.traces, figure.layout], default=str)
        assert "<script" not in shown and "<img" not in shown and len(figure.caption) < 2500
        assert figure.table is not None and set(figure.table["chip"]) == {"h200"}, "a parameter called chip is no chip to filter by"


# In a browser.


@pytest.mark.skipif(bool(missing()), reason=missing())
def test_filters_act_on_lines_and_bars(tmp_path: Path) -> None:
    points = grid(block=(16, 32, 64, 128), warps=(2, 4, 8), stages=(1, 2))
    rows = rows_of(points, lambda p: Status.CRASHED if p["block"] == 128 and p["stages"] == 2 else 10.0 + 128 / p["block"])
    other = rows_of(points[:12], lambda p: 20.0 + p["warps"], "cuda_b")
    page = tmp_path / "page.html"
    page.write_text(render(told([*rows, *other])), encoding="utf-8")
    lines = (
        "const plot = document.getElementById('landscape-0');"
        "return plot.data && plot.data.length ? plot.data[0].dimensions.map((d) => d.values.length) : [0]"
    )

    def count(browser: Browser, script: str) -> list[int]:
        browser.run(f"document.getElementById('landscape-0-figure').scrollIntoView(); {script}; return klab.plots.settled()")
        found: list[int] = browser.run(lines)
        return found

    with Browser(tmp_path / "profile") as browser:
        browser.open(page)
        if not browser.run("return Boolean(document.createElement('canvas').getContext('webgl'))"):
            pytest.skip("this browser draws no WebGL")
        assert count(browser, "klab.state.set('status', [])") == [24] * 4
        assert count(browser, "klab.state.set('status', 'ok')") == [21] * 4
        assert count(browser, "klab.state.set('status', 'crashed')") == [3] * 4
        count(browser, "klab.state.set('status', []); klab.state.set('kernel', 'cuda_b')")
        assert browser.run("return document.getElementById('landscape-0').hidden"), "nothing of another kernel's space is left"
        assert browser.console() == []
