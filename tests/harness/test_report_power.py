"""Power, clock and temperature over time: what is drawn of which results, and what the words say of it."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from made_results import contest, failed, made

from klab.harness.choose.decide import decide
from klab.harness.report.figures import power
from klab.harness.report.figures.power_words import caption, power_limit, reasons
from klab.harness.report.figures.style import Figure
from klab.harness.report.frames import DIMS, standing
from klab.harness.report.limits import Limits
from klab.harness.report.subject import Story, tell
from klab.harness.store.result import Result, Status
from klab.kernels.matmul.problem import Matmul

PROBLEM = Matmul(512, 2048, 1024)
ONE = dict.fromkeys(DIMS, "x")
DARK: dict[str, Any] = {"clocks_mhz": (), "temperatures_c": (), "throttle_reasons": ()}


def told(rows: Sequence[Result]) -> Story:
    return tell(rows, lambda chip, found: decide(found, None, chip), lambda chip, device: Limits(None, "not known"))


def drawn(rows: Sequence[Result]) -> list[Figure]:
    story = told(rows)
    return power.figures(story, standing(story))


def warm(kernel: str = "triton_a", rounds: int = 60, hot_from: int = 45, **changes: Any) -> Result:
    """It warms up, and from one round on the hardware halves the clock."""
    hot = [n >= hot_from for n in range(rounds)]
    found: dict[str, Any] = {
        "clocks_mhz": tuple(900.0 if h else 1800.0 - n for n, h in enumerate(hot)),
        "temperatures_c": tuple(40.0 + n // 10 for n in range(rounds)),
        "throttle_reasons": tuple(0x4 | 0x40 if h else 0x4 if n > 9 else 0 for n, h in enumerate(hot)),
        "marked": tuple(map(int, hot)),
        "power_trace": tuple((0.025 * n, 500.0 + n % 7) for n in range(150)),
        "power_w": 600.0,
        "idle_power_w": 80.0,
        "environment": {"power_limit_w": 750.0},
    }
    return made(PROBLEM, kernel, config={"block": 1}, rounds=rounds, **found | changes)


def test_seconds_are_those_of_its_own_launches() -> None:
    row = warm(samples=[10.0, 20.0, 30.0, 40.0, 50.0], rounds=5, hot_from=4, clocks_mhz=(1.0, 2.0, None, 4.0, 5.0))
    table = power.data(row, ONE)
    clock = table[table["panel"] == "SM clock"]
    assert clock["seconds"].tolist() == pytest.approx([40 * us / 1e6 for us in (10, 30, 100, 150)]), "40 launches a round, added up"
    assert clock["value"].tolist() == [1.0, 2.0, 4.0, 5.0] and clock["round"].tolist() == [0, 1, 3, 4], "what was not read is not there"
    assert (
        clock["marked"].tolist() == [False, False, False, True]
        and clock["reasons"].iloc[-1] == "software power cap, hardware thermal slowdown"
    )
    watts = table[table["panel"] == "power"]
    assert list(zip(watts["seconds"], watts["value"], strict=True)) == list(row.power_trace)
    assert set(DIMS) <= set(table.columns)


def test_a_line_is_thinned_and_its_extremes_stay() -> None:
    rng = np.random.default_rng(0)
    values = rng.normal(size=5000).tolist()
    values[1234], values[3456] = 99.0, -99.0
    at = power.thinned(values, [0] * 5000, 200)
    assert len(at) <= 200 and at == sorted(set(at)) and {0, 4999, 1234, 3456} <= set(at)
    envelope = [values[n] for n in at]
    assert max(envelope) == 99.0 and min(envelope) == -99.0
    level = [5.0] * 50 + [6.0] * 50
    assert power.thinned(level, [0] * 100, 200) == [0, 49, 50, 99], "the line is the same with the ends of each level"
    assert power.thinned(level, [0] * 70 + [1] * 30, 200) == [0, 49, 50, 69, 70, 99], "a mark is a change too"
    assert power.thinned([], [], 200) == [] and power.thinned([1.0], [0], 200) == [0] and power.thinned([1.0, 1.0], [0, 0], 2) == [0, 1]


def test_the_caption_has_the_findings() -> None:
    row = warm()
    words = caption(row)
    assert "600 W on average under load, 80% of its limit of 750 W, of which 80 W are drawn idle" in words
    kept = [1800.0 - n for n in range(45)]
    first, last = float(np.median(kept[:9])), float(np.median(kept[-9:]))
    assert f"The SM clock fell by {100 * (1 - last / first):.1f}%, from {first:.0f} to {last:.0f} MHz" in words
    assert "900 to 1800 MHz in all" in words and "40 to 45 °C" in words
    assert "25% of the rounds were slowed down by the hardware" in words
    assert "Software power cap in 50 of 60 rounds, hardware thermal slowdown in 15 of 60 rounds." in words
    assert "When each round ran is not recorded" in words


def test_the_caption_says_less_when_less_is_known() -> None:
    words = caption(made(PROBLEM))
    assert "Power was not sampled (not asked for)." in words and "stood at 1755 MHz in all 20 rounds" in words
    assert "No reason for a lower clock was reported." in words and "52 °C throughout" in words and "sustained" not in words
    only_power = caption(warm(**DARK, marked=()))
    assert "MHz" not in only_power and "°C" not in only_power and "rounds that" not in only_power and "600 W" in only_power
    unread = (None,) * 20
    assert "reason" not in caption(made(PROBLEM, clocks_mhz=(1700.0,) * 20, temperatures_c=unread, throttle_reasons=unread))
    assert "limit" not in caption(warm(environment={}))


def test_the_limit_that_was_set_comes_first() -> None:
    assert power_limit(warm()) == 750.0 and power_limit(warm(environment={"power_limit_w": None})) is None
    assert power_limit(warm(policy={"power_limit_w": 400.0})) == 400.0


def test_reasons_are_words() -> None:
    assert reasons(0) == reasons(None) == reasons(0x1) == "", "idle, or not read"
    assert reasons(0x8) == "hardware slowdown" and reasons(0x80 | 0x20) == "software thermal slowdown, power brake"


def test_panels_and_marks() -> None:
    row = warm()
    (figure,) = drawn([row])
    assert figure.table is not None and [trace["name"] for trace in figure.traces] == ["SM clock", "temperature", "power"]
    for trace in figure.traces:
        part = figure.table.iloc[trace["meta"]["rows"]]
        assert part["value"].tolist() == trace["y"] and set(part["panel"]) == {trace["name"]}
        assert [symbol == "circle-open" for symbol in trace["marker"]["symbol"]] == part["marked"].tolist()
    layout = figure.layout
    assert layout["xaxis2"]["matches"] == "x" and "matches" not in layout["xaxis3"], "power has a time of its own"
    tops = [layout[f"yaxis{n}"]["domain"] for n in ("", "2", "3")]
    assert tops[0][1] == 1.0 and tops[2][0] == 0.0 and tops[0][0] > tops[1][1] > tops[1][0] > tops[2][1]
    assert [one["text"] for one in layout["annotations"]] == ["hardware thermal slowdown", "idle 80 W", "limit 750 W"]
    shade = layout["shapes"][0]
    ends = np.cumsum(row.samples_us) * 40 / 1e6
    assert (shade["x0"], shade["x1"]) == pytest.approx((ends[44], ends[59]))
    assert layout["yaxis3"]["range"][0] == 0.0 and layout["yaxis3"]["range"][1] > 750


def test_panels_without_a_reading_are_left_out() -> None:
    (figure,) = drawn([warm(**DARK, marked=())])
    assert [trace["name"] for trace in figure.traces] == ["power"] and figure.layout["yaxis"]["domain"] == [0.0, 1.0]
    (figure,) = drawn([made(PROBLEM, "triton_a")])
    assert [trace["name"] for trace in figure.traces] == ["SM clock", "temperature"] and not figure.layout["annotations"]


def test_who_is_drawn() -> None:
    """The throttled first, then the longest traces of winners and libraries; nobody else."""
    slow = made(PROBLEM, "triton_slow", level_us=500.0)
    winner = warm("triton_a", hot_from=99, level_us=50.0)
    library = made(PROBLEM, "torch", level_us=80.0, power_trace=tuple((0.1 * n, 300.0) for n in range(40)))
    throttled = warm("triton_hot", hot_from=2, status=Status.THROTTLED, level_us=90.0)
    wrong = failed(PROBLEM, "triton_b", Status.CRASHED, "illegal memory access")
    story = told([slow, winner, library, throttled, wrong])
    assert [row.kernel for row in power.chosen(story)] == ["matmul/triton_hot", "matmul/triton_a", "matmul/torch"]
    figures = power.figures(story, standing(story))
    assert [figure.variant for figure in figures] == [f"{PROBLEM.label()}, {name}, h200" for name in ("triton_hot", "triton_a", "torch")]
    assert (
        figures[0].table is not None
        and set(figures[0].table["status"]) == {"throttled"}
        and set(figures[0].table["kernel"]) == {"triton_hot"}
    )


def test_no_more_than_forty_and_the_rest_is_told() -> None:
    figures = drawn([warm(f"triton_{n}", level_us=50.0 + n) for n in range(45)])
    assert len(figures) == 40 and len({figure.variant for figure in figures}) == 40
    assert "5 more have readings" in figures[0].caption
    assert "more have readings" not in drawn([warm()])[0].caption


def test_a_page_without_sensors_says_so() -> None:
    (figure,) = drawn(contest("cpu"))
    assert figure.empty == "No result has a reading of power, clock or temperature: no power meter on this machine." and not figure.traces
    assert drawn([]) == [] and drawn([failed(PROBLEM, "triton_b", Status.CRASHED, "x")]) == []
    assert drawn([warm(kind="reference")]) == [], "published rows are no measurement"


def test_names_are_text() -> None:
    nasty = '<script>alert("x")</script>' + "n" * 300
    for figure in drawn([warm(nasty, problem_label=nasty, device=nasty)]):
        assert "<script" not in json.dumps([figure.traces, figure.layout], default=str)


def test_broken_lengths_are_survived() -> None:
    """Rows of other tools may have fewer clocks than rounds, or more."""
    for count in (0, 3, 40):
        row = dataclasses.replace(made(PROBLEM, "triton_a"), clocks_mhz=(1700.0,) * count, marked=(), temperatures_c=(math.pi,) * 7)
        for figure in drawn([row]):
            assert figure.table is not None and figure.table["seconds"].notna().all()


def test_the_share_that_was_slowed_down_is_of_all_rounds() -> None:
    row = made(
        Matmul(1, 64, 64), samples=[10.0] * 8, marked=(1, 1, 0, 0, 0, 0, 0, 0), throttle_reasons=(8, 8, 0, 0, None, None, None, None)
    )
    assert "25% of the rounds were slowed down by the hardware" in caption(row) and "in 2 of 4 rounds" in caption(row)
    assert "stood at 1755 MHz in all 8 rounds" in caption(row)


def test_no_number_runs_over_the_page() -> None:
    wild = {"power_w": 1e300, "idle_power_w": 1e300, "clocks_mhz": (1e300, 1.0) * 10, "temperatures_c": (1e300,) * 20, "energy_j": 1.0}
    row = made(Matmul(1, 64, 64), **wild, energy_ci_low_j=1e-300, energy_ci_high_j=1e300)
    assert max(map(len, caption(row).split())) < 40
