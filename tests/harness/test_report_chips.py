"""Chip against chip: the ratios, their means in Python and in the page's script, and what is said where nothing can be compared."""

from __future__ import annotations

import dataclasses
import json
import math
import random
import statistics
from pathlib import Path
from typing import Any

import pytest
from browser import Browser
from made_results import CHIPS, contest, failed, made

from klab.harness.choose.decide import decide
from klab.harness.report.figures import chips
from klab.harness.report.figures.chips_draw import BRACKETS, MOST_FAMILIES, Sides, draw, grid, not_drawn, placed
from klab.harness.report.figures.chips_mean import RESAMPLES, SEED, finding, mean_of, means, widening
from klab.harness.report.frames import standing
from klab.harness.report.html import el
from klab.harness.report.limits import Limits, limits_of
from klab.harness.report.page import render
from klab.harness.report.shell import document, framed_all, plotly_js
from klab.harness.report.subject import Story, tell
from klab.harness.store.result import Result, Status
from klab.kernels.decode_attention.problem import DecodeAttention
from klab.kernels.matmul.problem import Matmul
from klab.kernels.prefill_attention.problem import PrefillAttention

NASTY = '<script>alert("x")</script>&amp;"\''


def story(rows: list[Result]) -> Story:
    def limits(chip: str, device: str) -> Limits:
        return limits_of(chip, device) if chip in ("h200", "b200") else Limits(None, "not known")

    return tell(rows, lambda chip, found: decide(found, None, chip), limits)


def other(row: Result, chip: str, factor: float = 1.0, **changes: object) -> Result:
    """The row as another chip would have it, so many times slower."""
    scaled: dict[str, Any] = {
        name: value * factor
        for name in ("median_us", "q1_us", "q3_us", "ci_low_us", "ci_high_us")
        if (value := getattr(row, name)) is not None
    }
    scaled |= {"samples_us": tuple(us * factor for us in row.samples_us), "chip": chip, "key": f"{chip} {row.key}"}
    where = {"device": CHIPS.get(chip, (0, 0, 0, f"NVIDIA {chip.upper()}"))[3], "device_uuid": f"uuid of {chip}"}
    return dataclasses.replace(row, **scaled | where | changes)


def published(row: Result, chip: str, us: float) -> Result:
    """The problem as somebody else measured it on a chip."""
    nothing: dict[str, Any] = {
        "samples_us": (),
        "marked": (),
        "ci_low_us": None,
        "ci_high_us": None,
        "q1_us": None,
        "q3_us": None,
        "checks": 0,
    }
    return dataclasses.replace(
        row, **nothing, chip=chip, kind="reference", kernel=f"{row.operator}/trtllm.k", key=f"published {chip} {row.problem_key} {us}",
        median_us=us, run_id="published", recorded_at="", device=f"NVIDIA {chip.upper()}", environment={},
    )  # fmt: skip


@pytest.fixture(scope="module")
def two() -> Story:
    rows = contest()
    return story([*rows, *(other(row, "b200", 0.5 if row.operator == "matmul" else 0.8) for row in rows)])


def test_ratios_are_those_of_the_chosen_kernels(two: Story) -> None:
    rows = chips.known(standing(two))
    (pair,) = chips.pairs(rows, "time")
    assert (pair.origin, pair.a, pair.b, pair.shared) == ("measured", "h200", "b200", 14)
    table = chips.data(rows, pair)
    wanted = {}
    for subject in two.subjects:
        for choice in subject.profile.choices:
            wanted[subject.chip, choice.wanted.problem_key] = choice.evidence.median_us
    assert len(table) == 14 and list(table["a"]) == sorted(table["a"], reverse=True)
    for row in table.to_dict("records"):
        a, b = wanted["h200", row["problem_key"]], wanted["b200", row["problem_key"]]
        assert (row["a"], row["b"]) == (a, b) and row["ratio"] == pytest.approx(b / a)
        assert row["low"] < row["ratio"] < row["high"] and row["chip"] == ("h200", "b200")
        assert row["ratio"] == pytest.approx(0.5 if row["operator"] == "matmul" else 0.8, rel=0.2)


def test_the_caption_begins_with_what_was_found(two: Story) -> None:
    time, energy = chips.figures(two, standing(two))
    table = chips.data(chips.known(standing(two)), chips.pairs(chips.known(standing(two)), "time")[0])
    middle = math.exp(statistics.fmean(math.log(ratio) for ratio in table["ratio"]))
    assert time.caption.startswith(f"B200 takes {middle:.3f}× [") and "over 14 problems that klab measured on both" in time.caption
    assert "Lowest in matmul (0.500×" in time.caption and "B200 takes more on 0 of 14" in time.caption
    assert "klab's own measurements" in time.caption and "5%" in time.caption
    assert energy.variant == "B200 over H200: energy, measured" and "energy per launch" in energy.caption
    ratios = energy.table["ratio"] if energy.table is not None else []
    assert list(ratios) == pytest.approx([1.0] * len(ratios)), "the energies were left as they are"


def test_the_mean_and_its_interval_by_another_way() -> None:
    """The generator and the percentiles, written once more without arrays."""
    rng = random.Random(3)
    ratios = [math.exp(rng.gauss(-0.2, 0.3)) for _ in range(23)]
    state = SEED

    def draw_one() -> int:
        nonlocal state
        state = (state + 0x6D2B79F5) & 0xFFFFFFFF
        mixed = (state ^ (state >> 15)) * (state | 1) & 0xFFFFFFFF
        mixed = ((mixed + ((mixed ^ (mixed >> 7)) * (mixed | 61))) ^ mixed) & 0xFFFFFFFF
        return ((mixed ^ (mixed >> 14)) & 0xFFFFFFFF) * len(ratios) >> 32

    logs = [math.log(ratio) for ratio in ratios]
    resampled = sorted(statistics.fmean(logs[draw_one()] for _ in logs) for _ in range(RESAMPLES))
    found = mean_of("all", ratios)
    assert found.ratio == pytest.approx(statistics.geometric_mean(ratios))
    mean, wider = statistics.fmean(logs), 2.0739 / 1.95996 * (23 / 22) ** 0.5
    ends = [math.exp(mean + wider * (resampled[at] - mean)) for at in (25, 974)]
    assert [found.low, found.high] == pytest.approx(ends, rel=1e-4), "Student's t of 22 degrees of freedom is 2.0739"
    reach = 2.0739 * statistics.stdev(logs) / len(logs) ** 0.5
    assert math.log((found.high or 0) / (found.low or 1)) == pytest.approx(2 * reach, rel=0.1), "about as wide as Student's"


def test_an_interval_of_few_problems_holds_the_truth_as_often_as_it_says() -> None:
    for count, student in ((5, 2.7764), (6, 2.5706), (8, 2.3646), (30, 2.0452)):
        assert widening(count) == pytest.approx(student / 1.95996 * (count / (count - 1)) ** 0.5, rel=1e-3)
    rng = random.Random(5)
    found = [mean_of("all", [math.exp(rng.gauss(0.1, 0.4)) for _ in range(5)]) for _ in range(400)]
    held = sum((one.low or 0) <= math.exp(0.1) <= (one.high or 0) for one in found)
    assert 0.91 < held / 400 < 0.98, "a percentile bootstrap alone holds it in 83%"


def test_few_problems_have_a_mean_without_an_interval() -> None:
    (every, one) = means(["matmul"], [0.5])
    assert (every.low, every.high, every.text) == (None, None, "0.500×")
    assert finding([every, one], [0.5], "A", "B", "time", "both have") == "B takes 0.500× of A's time on the one problem that both have."
    four = finding(means(["a", "a", "b", "b"], [0.5, 0.5, 2.0, 2.0]), [0.5, 0.5, 2.0, 2.0], "A", "B", "time", "both have")
    assert "too few for an interval" in four and "B takes more on 2 of 4" in four and "Lowest in a (0.500×, 2 problems)" in four
    even = finding(means(["a", "b"], [0.5, 0.5]), [0.5, 0.5], "A", "B", "time", "both have")
    assert "Lowest" not in even, "no order where the numbers show none"
    level = [0.9, 1.1, 1.0, 0.95, 1.05, 1.02]
    assert "neither is shown to be ahead" in finding(means(["a"] * 6, level), level, "A", "B", "time", "both have")
    assert finding([], [], "A", "B", "time", "both have").startswith("No problem")
    assert means([], []) == []


def test_families_and_sizes() -> None:
    place = placed("matmul", Matmul(64, 2048, 1024).to_json())
    assert place.size == 64 and "n=2048" in place.family and "m=" not in place.family
    place = placed("decode_attention", DecodeAttention(kv_lens=(1024,) * 8, heads=16, kv_heads=8, head_dim=128).to_json())
    assert place.size == 8 and "context=1024" in place.family
    place = placed("prefill_attention", PrefillAttention(q_lens=(512, 512), heads=16, kv_heads=8, head_dim=128).to_json())
    assert place.size == 512 and "sequences=2" in place.family
    assert placed("decode_attention", {"kv_lens": [1, 2, 3]}).size == 3 and placed("x", {}).size == 0
    assert placed("x", {"m": True, "n": "8"}).size == 0, "no number"


def test_what_is_not_drawn_still_counts() -> None:
    rows = [made(Matmul(m, 64 * n, 64), level_us=100.0) for n in range(1, MOST_FAMILIES + 8) for m in (1, 2)]
    rows += [made(Matmul(m, 64, 64), level_us=100.0) for m in range(3, 40)]
    found = story([*rows, *(other(row, "b200", 0.5) for row in rows)])
    frame = standing(found)
    table = chips.data(chips.known(frame), chips.pairs(chips.known(frame), "time")[0])
    places, sizes, cells = grid(table)
    drawn = [position for row in cells for position in row if position >= 0]
    assert len(places) == MOST_FAMILIES and len(set(drawn)) == len(drawn) < len(table)
    (figure,) = chips.figures(found, frame)
    assert f"over {len(table)} problems" in figure.caption and f"{len(table) - len(drawn)} problems of further families" in figure.caption
    heat = figure.traces[0]
    assert [len(row) for row in heat["z"]] == [len(sizes)] * len(places) and heat["meta"]["rows"] == cells
    assert set(heat["text"][0]) == {""}, "so many columns have no room for numbers"


def test_measured_and_published_never_meet() -> None:
    rows = [made(Matmul(m, 2048, 1024), level_us=100.0) for m in (1, 2, 4, 8, 16, 32)]
    theirs = [published(row, chip, us) for row in rows for chip, us in (("h200", 80.0), ("b200", 60.0), ("b200", 48.0))]
    found = story([*rows, *theirs])
    (figure,) = chips.figures(found, standing(found))
    assert figure.variant == "B200 over H200: time, reference" and figure.caption.startswith("B200 takes 0.600× ")
    assert "others published for both" in figure.caption and "times without an interval" in figure.caption
    assert figure.table is not None and figure.table["low"].isna().all(), "published means have no interval"
    json.dumps(figure.traces, allow_nan=False)


def in_state(row: Result, l2: str, factor: float, **policy: float) -> Result:
    """The row as another state of the cache, or another clock, would have it."""
    changed = other(row, row.chip, factor)
    return dataclasses.replace(
        changed, policy={**row.policy, "l2": l2, **policy}, l2_state=l2, key=f"{row.key} {l2} {policy}", device=row.device,
        device_uuid=row.device_uuid,
    )  # fmt: skip


def test_times_with_the_cache_in_another_state_never_meet() -> None:
    cold = [made(Matmul(m, 2048, 1024), level_us=100.0) for m in (1, 2, 4, 8, 16, 32)]
    warm = [in_state(row, "warm", 0.4) for row in cold]
    both = story([*cold, *warm, *(other(row, "b200", 0.5) for row in cold)])
    (figure,) = chips.figures(both, standing(both))
    assert figure.caption.startswith("B200 takes 0.500× "), "cold over cold, though the same configuration is faster when warm"
    assert figure.table is not None and set(figure.table["conditions"]) == {"cold"} and "Left out" not in figure.caption
    mixed = story([*cold, *(other(row, "b200", 0.5) for row in cold[:4]), *(other(row, "b200", 0.5) for row in warm[4:])])
    (figure,) = chips.figures(mixed, standing(mixed))
    assert "over 4 problems" in figure.caption and "Left out are 2 that both have, but with the cache or the clocks" in figure.caption
    apart = story([*cold, *(other(row, "b200", 0.5) for row in warm)])
    (figure,) = chips.figures(apart, standing(apart))
    assert figure.empty and "measured b200: 6, measured h200: 6" in figure.caption and "in the same state" in figure.caption
    slow = story([*cold, *(other(in_state(row, "cold", 1.0, sm_clock_mhz=900), "b200", 0.5) for row in cold)])
    assert chips.figures(slow, standing(slow))[0].empty, "one of them at a clock that was set"
    later = {"recorded_at": "2026-11-21T00:00:00Z", "sm_clock_mhz": 900.0}
    set_too = [dataclasses.replace(in_state(row, "cold", 1.9, sm_clock_mhz=900), **later) for row in cold]
    free = story([*cold, *set_too, *(other(row, "b200", 0.5) for row in cold)])
    (figure,) = chips.figures(free, standing(free))
    assert figure.caption.startswith("B200 takes 0.500× "), "the choice is that of the device as it is"


def test_of_a_choice_measured_twice_the_newest_counts() -> None:
    old = [made(Matmul(m, 2048, 1024), level_us=50.0, seed=1) for m in (1, 2)]
    new = [dataclasses.replace(made(Matmul(m, 2048, 1024), level_us=100.0, seed=2), key=f"again {m}") for m in (1, 2)]
    assert old[0].recorded_at < new[0].recorded_at
    found = story([*old, *new, *(other(row, "b200", 0.5) for row in new)])
    (figure,) = chips.figures(found, standing(found))
    assert figure.caption.startswith("B200 takes 0.500× "), "the older, faster rows are no choice's"


def test_an_interval_that_reaches_0_makes_none_of_a_ratio() -> None:
    rows = [dataclasses.replace(made(Matmul(m, 64, 64)), ci_low_us=-1.0) for m in (1, 2)]
    frame = standing(story([*rows, *(other(row, "b200") for row in rows)])).assign(chosen=True)
    known = chips.known(frame)
    table = chips.data(known, chips.pairs(known, "time")[0])
    assert len(table) == 2 and table["low"].isna().all() and table["high"].isna().all()


def test_a_measured_chip_and_a_published_one_have_no_ratio() -> None:
    row = made(Matmul(1, 2048, 1024))
    found = story([row, published(row, "b200", 50.0)])
    (figure,) = chips.figures(found, standing(found))
    assert figure.empty and not figure.traces and "measured h200: 1, reference b200: 1" in figure.caption
    assert "a measured time is never held against a published one" in figure.caption
    assert figure.caption.split(",")[0] in render(found).replace("&#x27;", "'")


def test_one_chip_has_no_figure_and_failures_no_ratio() -> None:
    one = story(contest())
    assert chips.figures(one, standing(one)) == []
    bad = story([failed(Matmul(1, 64, 64), "triton_a", Status.TIMEOUT, "late", chip=chip, device="x") for chip in ("h200", "cpu")])
    (figure,) = chips.figures(bad, standing(bad))
    assert "Problems with a time: none" in figure.caption
    assert chips.figures(story([]), standing(story([]))) == []


def test_a_cpu_is_named_by_its_device_and_comes_last() -> None:
    rows = contest()
    found = story([*rows, *(other(row, "b200", 0.5) for row in rows), *contest("cpu", 1)])
    names = [figure.variant for figure in chips.figures(found, standing(found))]
    slower = story([*(other(row, "a100", 9.0) for row in rows), *contest("cpu", 1)])
    assert [figure.variant for figure in chips.figures(slower, standing(slower))] == [
        "cpu (Example CPU @ 2.50GHz) over A100: time, measured"
    ]
    assert names[0] == "B200 over H200: time, measured" and "cpu (Example CPU @ 2.50GHz) over B200: time, measured" in names[1:]


def test_fifty_chips_show_the_pairs_that_share_most() -> None:
    rows = [made(Matmul(m, 2048, 1024), level_us=50.0) for m in range(1, 21)]
    names = [f"chip{n:02d}" for n in range(50)]
    several = [other(row, name, 1 + n / 50) for n, name in enumerate(names) for row in rows[: 5 if n not in (31, 44) else 20]]
    found = story(several)
    figures = chips.figures(found, standing(found))
    assert figures[0].variant == "CHIP44 over CHIP31: time, measured" and len(figures) == chips.MOST_PAIRS
    assert all("Of 50 chips at most 3 pairs are shown" in figure.caption for figure in figures)
    assert "over 20 problems" in figures[0].caption and f"{(1 + 44 / 50) / (1 + 31 / 50):.3f}×" in figures[0].caption


def test_names_stay_text() -> None:
    rows = [made(Matmul(m, 64, 64), NASTY, problem_label=NASTY) for m in range(1, 7)]
    long = [other(row, "x" * 300, 2.0, device=NASTY, device_uuid="other") for row in rows]
    found = story([*rows, *long])
    (figure,) = chips.figures(found, standing(found))
    page = document("t", framed_all([figure], True), figures=[figure])
    assert "<script>alert" not in page
    assert not any("<script" in cell for row in figure.traces[0]["customdata"] for cell in row)
    assert "x" * 41 in figure.caption and "x" * 44 not in figure.caption + figure.variant
    like = [other(row, "x" * 299 + end, 2.0) for row in rows for end in "abc"]
    several = story([*rows, *like])
    names = [figure.variant for figure in chips.figures(several, standing(several))]
    assert len(set(names)) == len(names) == 3, "a menu tells apart what begins alike"


def test_ratios_far_from_1_are_no_zero() -> None:
    rows = [made(Matmul(m, 64, 64), level_us=1e6) for m in (1, 2)]
    found = story([*rows, *(other(row, "b200", 2e-4) for row in rows)])
    (figure,) = chips.figures(found, standing(found))
    assert figure.caption.startswith("B200 takes 0.0002× ") and set(figure.traces[0]["text"][0]) == {"0.0002"}
    assert figure.traces[0]["colorbar"]["ticktext"] == ["≤0.125×", "0.5×", "1×", "2×", "≥8×"], "the colours end before the data do"
    axis = figure.layout["xaxis2"]
    assert axis["range"][0] < math.log10(2e-4) and axis["tickvals"] == [0.001, 0.01, 0.1, 1.0]


# The page's script


def test_the_script_computes_the_same_under_a_filter(browser: Browser, tmp_path: Path) -> None:
    base = [row for row in contest() if row.median_us]
    base += [made(Matmul(m, 64 * n, 64), level_us=1.0 + n, problem_label=f"{m} {n}") for n in range(1, 40) for m in (1, 2)]
    rng = random.Random(7)
    ratio = {row.problem_key: math.exp(rng.gauss(-0.3, 0.4)) * (0.01 if row.operator == "prefill_attention" else 1.0) for row in base}
    both = story([*base, *(other(row, "b200", ratio[row.problem_key]) for row in base)])
    rows = chips.known(standing(both))
    table = chips.data(rows, chips.pairs(rows, "time")[0])
    table["dtype"] = ["fp8" if n % 3 else "bf16" for n in range(len(table))]
    sides = Sides("H200", "B200", basis="Basis.", both="both have")
    figure = draw(table, sides, "chips-0", "Chips")
    page = tmp_path / "page.html"
    page.write_text(document("t", el("main", framed_all([figure], True)), figures=[figure], drawing=plotly_js()), encoding="utf-8")
    browser.open(page)
    assert browser.run("return klab.ready.then(() => { klab.plots.dirty(); return klab.plots.all(); })") == 1
    shown = figure.table
    assert shown is not None
    drawn_rows = {row for line in figure.traces[0]["meta"]["rows"] for row in line}
    every = sorted(set(shown["operator"]))
    for operators, dtype in ((["matmul"], "fp8"), (every[:2], "bf16"), (every[1:], "fp8"), (["prefill_attention"], "bf16"), (every, "fp8")):
        query = "&".join([f"dtype={dtype}", *(f"operator={name}" for name in operators)])
        browser.run(f"location.hash = '#x?{query}'; return new Promise((done) => setTimeout(done, 60)).then(() => klab.plots.all())")
        left = shown[shown["operator"].isin(operators) & (shown["dtype"] == dtype)]
        found = means(left["operator"].tolist(), left["ratio"].tolist())
        lost = len(set(left.index) - drawn_rows)
        wanted = [
            finding(found, left["ratio"], "H200", "B200", "time", "both have"),
            BRACKETS if found[0].low else "",
            not_drawn(lost),
            "Basis.",
        ]
        caption = browser.run("return document.querySelector('figcaption').textContent")
        assert caption.startswith(wanted[0]) and caption.endswith(" ".join(filter(None, wanted[1:])))
        assert (BRACKETS in caption, "not drawn" in caption) == (found[0].low is not None, lost > 0)
        x, y, more, less, axis = browser.run(
            "const v = klab.plots.view(klab.plots.get('chips-0')), t = v.data[1];"
            "return [t.x, t.y, t.error_x.array, t.error_x.arrayminus, [v.layout.xaxis2.range, v.layout.xaxis2.tickvals]]"
        )
        order = [*reversed(found[1:]), found[0]]
        assert x == pytest.approx([one.ratio for one in order], rel=1e-9)
        assert y == [*(one.name for one in order[:-1]), "<b>all</b>"]
        assert more == pytest.approx([(one.high or one.ratio) - one.ratio for one in order], abs=1e-9)
        assert less == pytest.approx([one.ratio - (one.low or one.ratio) for one in order], abs=1e-9)
        ends = [end for one in found for end in (one.low or one.ratio, one.high or one.ratio)]
        assert 10 ** axis[0][0] < min(*ends, 1) and 10 ** axis[0][1] > max(*ends, 1), "all marks lie on the axis"
        cut = draw(left.assign(fields=table["fields"]), sides, "x", "x").layout["xaxis2"]
        assert axis[0] == pytest.approx(cut["range"]) and axis[1] == pytest.approx(cut["tickvals"])
        cells = browser.run("return klab.plots.view(klab.plots.get('chips-0')).data[0].z.flat().filter((z) => z !== null).length")
        assert cells == len(left) - lost
    browser.run("location.hash = '#x'; return new Promise((done) => setTimeout(done, 60)).then(() => klab.plots.all())")
    assert browser.run("return document.querySelector('figcaption').textContent") == figure.caption
    assert browser.console() == []
