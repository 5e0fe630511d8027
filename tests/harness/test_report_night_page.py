"""The page of a night: what it tells, that nothing breaks out of it, and (in a real browser) that it draws and asks nobody for anything."""

from __future__ import annotations

import dataclasses
import math
import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
from browser import Browser
from made_nights import EPOCH, NEW_EPOCH, eventful, history, night, series, verdict
from test_report_figures import accepted
from test_report_page import Reader
from test_watch_outputs import hostile

from klab.harness.report.curve import curves
from klab.harness.report.figures.history import draw, draw_map, draw_menu, spark
from klab.harness.report.night_page import night_page
from klab.harness.report.sections import night as night_section
from klab.harness.report.sections import night_changes
from klab.harness.watch.series import Call, Lapsed, Point


@dataclass(frozen=True)
class Found:
    index: int
    ratio: float
    low: float
    high: float


def historian(values: Sequence[float]) -> list[Found]:
    """Where two medians fit best, if they differ by more than 2%: enough to draw."""

    def misfit(n: int) -> float:
        return sum(abs(v - statistics.median(part)) for part in (values[:n], values[n:]) for v in part)

    n = min(range(3, len(values) - 2), key=misfit, default=0)
    ratio = statistics.median(values[n:]) / statistics.median(values[:n]) if n else 1.0
    return [Found(n, ratio, ratio - 0.005, ratio + 0.005)] if abs(ratio - 1) > 0.02 else []


@pytest.fixture(scope="module")
def page() -> str:
    tonight, earlier = eventful()
    return night_page(tonight, earlier, historian)


def test_what_the_page_tells(page: str) -> None:
    reader = Reader(page)
    assert not reader.open and page.count("<!doctype html>") == 1
    for words in (
        "klab nightly: h200", "1 broken, 2 slower (1 waived), 1 missing", "failed", "NVIDIA H200", "not reached within the budget",
        "6.0% above the median of 20 nights", "9 processes, 3 looks", "+5.2% to +6.7%", "ada, until 2026-12-24", "13 ok", "1 not judged",
        "2 nights of this epoch", "Changes of level", "00000000001c to 00000000001d",
    ):  # fmt: skip
        assert words in reader.text, words
    assert reader.text.index("error 0.3 above the tolerance") < reader.text.index("6.0% above") < reader.text.index("13 ok")
    assert page.count('id="klab-plotly"') == 1 and page.count('class="spark"') == 20


def test_everything_is_inside(page: str) -> None:
    tags = Reader(page).tags
    assert not [(tag, attrs) for tag, attrs in tags if tag in ("link", "img", "iframe", "object", "base", "use", "image") or "src" in attrs]
    policy = next(attrs["content"] for _, attrs in tags if attrs.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None and policy.startswith("default-src 'none'")
    assert all((attrs.get("href") or "#").startswith("#") for _, attrs in tags)
    targets = {attrs.get("id") for _, attrs in tags}
    assert all((attrs.get("href") or "#words")[1:] in targets for _, attrs in tags), "every link arrives"


def test_no_name_breaks_out() -> None:
    tonight = hostile()
    before = [dataclasses.replace(tonight, identity=f"night {n}") for n in range(3)]
    text = night_page(tonight, before, historian)
    text.encode()
    own = re.sub(r"<script>.*?</script>", "", text, flags=re.DOTALL)
    assert "<script>alert" not in own and "<img" not in own and "\x1b" not in own and "\u202e" not in own
    assert "alert(1)" in Reader(text).text


def test_a_page_of_nothing_and_of_a_first_night() -> None:
    empty = night_page(night(notes=("the policy tracks nothing on h200",)), [], historian)
    assert "No series was watched" in Reader(empty).text and "tracks nothing" in Reader(empty).text and len(empty) < 100_000
    unjudged = night([verdict(series(0), Call.UNKNOWN, "its first night", point=Point((20.0,)))])
    assert "Nothing could be judged" in Reader(night_page(unjudged, [], historian)).text
    (first,) = history(3, 1)
    text = Reader(night_page(first, [], historian)).text
    assert "3 series: all ok" in text and "This needs at least two nights" in text and "Nothing failed" in text


def test_the_historian_of_the_watch_finds_the_step() -> None:
    nights = history(3, 40, lambda n, day: 20.0 * (1.08 if n == 1 and day >= 25 else 1.0))
    text = Reader(night_page(nights[-1], nights[:-1])).text
    changes = text[text.index("Found afterwards") : text.index("All series, night by night")]
    assert len(re.findall(r"2026-\d\d-\d\d", changes)) == 1 and "2026-10-26 h200 decode_attention" in changes


def test_a_curve_is_judged_scaled_and_cut_at_epochs() -> None:
    nights = history(1, 40, lambda n, day: 20.0 * (1.10 if day >= 25 else 1.0) * (1.05 if day >= 35 else 1.0), new_epoch_at=25)
    (curve,) = curves(nights, historian).values()
    assert [(s.index, s.new_epoch) for s in curve.steps] == [(25, True), (35, False)]
    border, step = curve.steps
    assert border.ratio == pytest.approx(1.10, abs=0.02) and step.ratio == pytest.approx(1.05, abs=0.01)
    assert any("driver 580.65 to 580.95" in why for why in border.why) and not step.why
    assert step.commits == (nights[34].commit[:12], nights[35].commit[:12])
    spread = statistics.pstdev(p.judged for p in curve.places[:25]) / statistics.pstdev(p.value for p in curve.places[:25])
    assert spread < 0.8, "the anchor took the nights' effect out"
    assert statistics.median(p.judged for p in curve.places[:25]) == pytest.approx(20.0, rel=0.02), "and it is still in microseconds"
    assert [round(level, 0) for *_, level in curve.levels] == [20, 22, 23]


def test_a_change_says_what_else_changed() -> None:
    nights = history(1, 20, lambda n, day: 20.0 * (1.2 if day >= 10 else 1.0))
    for n in range(10, 20):
        (one,) = nights[n].verdicts
        assert one.point is not None
        other = dataclasses.replace(one.point, kernel="matmul/cuda_split", device_uuid="GPU-other")
        nights[n] = dataclasses.replace(nights[n], verdicts=(dataclasses.replace(one, point=other),))
    (curve,) = curves(nights, historian).values()
    assert curve.steps[0].why == ("kernel matmul/triton_split to matmul/cuda_split", "the device")


def test_holes_and_odd_values_are_drawn_as_what_they_are() -> None:
    nights = history(1, 12)
    one = nights[0].verdicts[0].series
    holes = [Point(status="crashed", epoch=EPOCH), None, Point((math.nan, math.inf), epoch=EPOCH), Point((20.0,), (), (), epoch=NEW_EPOCH)]
    for n, hole in zip((3, 5, 7, 9), holes, strict=True):
        nights[n] = dataclasses.replace(nights[n], verdicts=(verdict(one, Call.BROKEN, "odd", point=hole),))
    nights[6] = dataclasses.replace(nights[6], verdicts=())
    (curve,) = curves(nights, historian).values()
    assert len(curve.places) == 11 and len(curve.measured) == 8
    figure = draw(curve, "x")
    assert sum(len(t["x"]) for t in figure.traces[1:]) == 11, "every night it was told of has a mark"
    accepted(figure)
    assert spark(curve, 12) is not None and Reader(night_page(nights[-1], nights[:-1], historian)).text
    absent = curves([night([verdict(series(0), Call.MISSING, "gone")])], historian)[series(0).identity]
    assert draw(absent, "x").empty and spark(absent, 1) is None


def test_figures_are_what_plotly_takes() -> None:
    tonight, earlier = eventful()
    nights = [*earlier, tonight]
    found = list(curves(nights, historian).values())
    accepted(draw(found[0], "x"))
    menu = draw_menu(found, "menu", "all")
    accepted(menu)
    assert len(menu.layout["updatemenus"][0]["buttons"]) == 20
    assert all(len(b["args"][0]["visible"]) == len(menu.traces) for b in menu.layout["updatemenus"][0]["buttons"])
    seen = draw_map(found, [one.at for one in nights], "map")
    accepted(seen)
    rows = seen.traces[0]["z"]
    assert len(rows) == 20 and len(rows[0]) == 31 and rows[0][30] == pytest.approx(6.0, abs=1.5) and rows[1][30] is None
    twice = draw_map(found, [tonight.at] * 31, "map").traces[0]["x"]
    assert len(set(twice)) == 31, "two nights of one minute are two columns"


def test_a_menu_has_an_end_and_says_what_it_leaves_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("klab.harness.report.figures.history.MENU_SERIES", 15)
    tonight, earlier = eventful()
    menu = draw_menu(list(curves([*earlier, tonight], historian).values()), "menu", "all")
    assert len(menu.layout["updatemenus"][0]["buttons"]) == 15 and "5 are left out" in menu.caption


def test_two_hundred_series_fit() -> None:
    nights = history(200, 60)
    text = night_page(nights[-1], nights[:-1], lambda values: [])
    assert len(text) < 10e6 and text.count('class="spark"') == 200


def test_without_plotly_the_tables_are_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("klab.harness.report.night_page.plotly_js", lambda: "")
    tonight, earlier = eventful()
    text = night_page(tonight, earlier, historian)
    assert "Figures need plotly" in Reader(text).text and "triton_split_kv" in Reader(text).text and len(text) < 300_000


@pytest.mark.parametrize(("theme", "width"), [("light", 1280), ("dark", 400)])
def test_in_a_browser(browser: Browser, page: str, tmp_path: Path, theme: str, width: int) -> None:
    path = tmp_path / "page.html"
    path.write_text(page, encoding="utf-8")
    browser.open(path, width=width, theme=theme)
    plots = browser.run("return document.querySelectorAll('.plot').length")
    assert plots >= 8 and browser.run("return document.documentElement.dataset.drawn") == str(plots)
    assert browser.run("return [...document.querySelectorAll('.plot')].every(p => p.querySelector('svg.main-svg'))")
    assert browser.run("return document.documentElement.scrollWidth") <= width, "the page itself does not scroll sideways"
    sparks = browser.run("return [...document.querySelectorAll('svg.spark path')].map(p => p.getAttribute('d').length)")
    assert len(sparks) == 20 and min(sparks) > 100
    assert browser.console() == []
    assert [url for url in browser.requests() if not url.startswith(("data:", "blob:"))] == [path.resolve().as_uri()]


def test_an_expired_waiver_is_on_the_page_first_and_among_the_waivers() -> None:
    fine = dataclasses.replace(history(1, 1)[0], lapsed=(Lapsed("h200 <b> *", "ann", "2026-09-30"),))
    told = "the waiver of ann for &#x27;h200 &lt;b&gt; *&#x27; expired on 2026-09-30: renew it in the policy or remove it"
    for part in (night_section.strip(fine, []), night_changes.waivers(fine)):
        assert part is not None and told in part.replace("&#39;", "&#x27;").replace("'", "&#x27;")
    assert "failed" in night_section.strip(fine, []) and night_changes.waivers(dataclasses.replace(fine, lapsed=())) is None
