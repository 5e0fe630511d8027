"""Stores as no one would make them: the page is made, nothing in them breaks out of it, its figures are sound, and it tells the truth."""

from __future__ import annotations

import base64
import gzip
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
from browser import Browser
from made_odd import ATTACKS, LONG, ODD, odd_nights, store
from test_report_page import Reader

from klab.harness.report.notebook import THEMES
from klab.harness.report.page import render
from klab.harness.report.subject import Story
from klab.harness.report.write import story_from

# Those whose rows are also given the nights with holes.
WITH_NIGHTS = ("hostile", "many_runs")


@dataclass(frozen=True)
class Page:
    """A page and what a reader, and the page's own script, have of it."""

    story: Story
    text: str

    @cached_property
    def reader(self) -> Reader:
        return Reader(self.text)

    @cached_property
    def payload(self) -> dict[str, Any]:
        found = re.search(r'<script type="application/gzip" id="klab-payload">([^<]*)</script>', self.text)
        assert found, "the figures are packed in the page"

        def refuse(constant: str) -> None:
            raise ValueError(f"{constant} is not JSON")

        value: dict[str, Any] = json.loads(gzip.decompress(base64.b64decode(found[1])), parse_constant=refuse)
        return value

    @property
    def figures(self) -> dict[str, dict[str, Any]]:
        found: dict[str, dict[str, Any]] = self.payload.get("figures", {})
        return found


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Page]]:
    class Made(dict[str, Page]):
        def __missing__(self, name: str) -> Page:
            folder = store(tmp_path_factory.mktemp(name) / "results", ODD[name](), odd_nights() if name in WITH_NIGHTS else ())
            told = story_from([folder])
            self[name] = Page(told, render(told))
            return self[name]

    yield Made()


@pytest.mark.parametrize("name", ODD)
def test_the_page_is_made_whole(pages: dict[str, Page], name: str) -> None:
    page = pages[name]
    tags = page.reader.tags
    assert not page.reader.open, "every element is closed"
    assert "which is a defect of klab" not in page.text, "no figure failed"
    ids = [attrs["id"] for _, attrs in tags if attrs.get("id")]
    assert len(set(ids)) == len(ids), sorted(one for one in set(ids) if ids.count(one) > 1)[:5]
    assert not [tag for tag, attrs in tags if tag in ("img", "iframe", "object", "base", "link") or "src" in attrs]
    assert not [attrs for _, attrs in tags if any(key.startswith("on") for key in attrs)], "no handler"
    assert all(re.match(r"(#|data:|$)", attrs.get("href") or "") for _, attrs in tags), "no link leads out"
    assert not re.search(r"(?<![\w.])(nan|inf|NaN|Infinity|None|NaT)(?![\w(:])", _own_words(page)), "what is not known is said in words"


def _own_words(page: Page) -> str:
    """The page's text without what rows of the store say of themselves."""
    text = page.reader.text
    for word in ("mode=None", "block=None", "=None", "=inf", "=-inf"):
        text = text.replace(word, "")
    return text


@pytest.mark.parametrize("name", ODD)
def test_its_figures_are_what_plotly_takes_and_their_points_have_rows(pages: dict[str, Page], name: str) -> None:
    graph_objects = pytest.importorskip("plotly.graph_objects", reason="plotly is not installed: figures are drawn nowhere")
    for identity, figure in pages[name].figures.items():
        graph_objects.Figure(_concrete({"data": figure["data"], "layout": figure["layout"]}))
        length = figure["table"]["length"] if figure["table"] else 0
        for trace in figure["data"]:
            rows = trace.get("meta", {}).get("rows")
            if rows is None:
                continue
            flat = [n for row in rows for n in row] if rows and isinstance(rows[0], list) else rows
            assert all(-1 <= n < length for n in flat), identity
            for key in ("x", "y", "text", "customdata", "hovertext"):
                drawn = trace.get(key)
                if trace["type"] != "heatmap" and isinstance(drawn, list):
                    assert len(drawn) == len(rows), (identity, key)


def _concrete(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _concrete(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_concrete(item) for item in value]
    return re.sub(r"var\(--([a-z]+)\)", lambda found: THEMES["light"][found[1]], value) if isinstance(value, str) else value


def test_hostile_names_are_shown_as_they_are(pages: dict[str, Page]) -> None:
    page = pages["hostile"]
    own = re.sub(r"<script[^>]*>.*?</script>", "", page.text, flags=re.DOTALL)
    assert "<script>window" not in own and "<img" not in own and "<svg onload" not in own
    assert sum(text in page.reader.text for text in ("window.__pwned=1", "window.__pwned=2", "window.__pwned=7")) == 3
    assert len(page.story.subjects) == len({f"chip {text}" for text in ATTACKS}) + 1
    for identity, figure in page.figures.items():
        shown = json.dumps([figure["data"], figure["layout"]])
        assert "<img" not in shown and "<script" not in shown and "<a href" not in shown and "<svg" not in shown, identity


def test_long_names_are_there_whole_somewhere(pages: dict[str, Page]) -> None:
    page = pages["long_names"]
    assert f"matmul/torch_{LONG}" in page.text or f"torch_{LONG}" in page.text
    assert len(page.text) < 7e6


def test_numbers_that_are_none_are_passed_over_and_said(pages: dict[str, Page]) -> None:
    page = pages["not_numbers"]
    assert page.story.statuses["ok"] == 12 and re.search(
        r"odd\.jsonl: 15 skipped; first: .* holds a number that is not finite", page.reader.text
    )


def test_absurd_numbers_are_shown_unless_they_cannot_be(pages: dict[str, Page]) -> None:
    text = pages["absurd"].reader.text
    assert pages["absurd"].story.statuses["ok"] == 27 and "2 skipped" in text and "energy_j is below 0" in text


def test_no_success_is_no_winner(pages: dict[str, Page]) -> None:
    text = pages["no_success"].reader.text
    assert "none of 2 problems has a valid result" in text
    for words in ("because of crashed", "because of incorrect", "because of timeout", "because of out_of_memory"):
        assert words in text
    assert "fastest" not in text[: text.index("What won")] or "no " in text, "the strip names no winner"


def test_one_point_is_told_as_one(pages: dict[str, Page]) -> None:
    page = pages["one_point"]
    assert page.story.statuses == {"ok": 1} and "triton_a" in page.reader.text
    assert not re.search(r"\d×", page.reader.text[: page.reader.text.index("Method and environment", 400)]), "nothing to compare with"


def test_too_few_rounds_choose_nothing(pages: dict[str, Page]) -> None:
    assert "no interval of its time" in pages["few_rounds"].reader.text


def test_a_cpu_has_no_energy_and_no_watts(pages: dict[str, Page]) -> None:
    text = pages["cpu_only"].reader.text
    assert "no power meter on this machine" in text and not re.search(r"\d (mJ|µJ|J)\b", text)


def test_reference_alone_is_never_called_measured(pages: dict[str, Page]) -> None:
    page = pages["reference_only"]
    (subject,) = page.story.subjects
    assert subject.rows == () and len(subject.reference) == 14 and not subject.profile.choices and not page.story.statuses
    assert re.search(r"reference|published", page.reader.text)
    for identity, figure in page.figures.items():
        table = figure["table"]
        if table and "origin" in table["columns"]:
            of = table["values"][table["columns"].index("origin")]
            assert "measured" not in (of["of"] if isinstance(of, dict) else of), identity


def test_other_devices_under_one_name_are_set_aside_and_said(pages: dict[str, Page]) -> None:
    page = pages["mixed_devices"]
    (subject,) = page.story.subjects
    assert {row.device for row in subject.rows} == {subject.profile.device}
    assert "NVIDIA H200 NVL" in page.reader.text or subject.profile.device == "NVIDIA H200 NVL"


def test_fifty_chips_are_all_there(pages: dict[str, Page]) -> None:
    page = pages["fifty_chips"]
    assert len(page.story.subjects) == 50 and all(f"chip-{n}" in page.reader.text for n in range(1, 50))
    assert "not in the catalog" in page.reader.text and len(page.text) < 7e6


def test_a_chip_without_limits_has_no_share_of_a_roofline(pages: dict[str, Page]) -> None:
    page = pages["unknown_chip"]
    assert "mi999 is not in the catalog" in page.reader.text
    from klab.harness.report.frames import standing

    assert standing(page.story)["share"].isna().all()


def test_many_problems_of_one_operator_fit(pages: dict[str, Page]) -> None:
    page = pages["many_problems"]
    assert page.story.statuses["ok"] == 100 and len(page.text) < 8e6


def test_no_work_is_no_rate(pages: dict[str, Page]) -> None:
    from klab.harness.report.frames import standing

    frame = standing(pages["no_work"].story)
    nothing = frame[frame["problem"].str.contains("8x")]
    assert nothing["tflops"].isna().all() and nothing["share"].isna().all()


def test_an_unknown_dtype_is_named(pages: dict[str, Page]) -> None:
    assert "posit7" in pages["unknown_dtype"].text


def test_dates_that_cannot_be_stop_nothing(pages: dict[str, Page]) -> None:
    assert "2999-12-31" in pages["odd_dates"].reader.text


def test_an_unknown_environment_is_said_to_be_unknown(pages: dict[str, Page]) -> None:
    text = pages["no_environment"].reader.text
    assert re.search(r"not recorded|unknown|not known", text)


def test_joules_without_watts_are_shown_without_watts(pages: dict[str, Page]) -> None:
    from klab.harness.report.frames import standing

    frame = standing(pages["energy_without_power"].story)
    assert frame["power_w"].isna().any() and frame["energy_j"].isna().any() and frame["energy_low_j"].isna().any()


def test_without_a_library_nothing_is_a_speed_up_over_one(pages: dict[str, Page]) -> None:
    page = pages["no_library"]
    assert all(choice.evidence.library is None for subject in page.story.subjects for choice in subject.profile.choices)
    assert not re.search(r"[\d.]+× (as fast as|over) the (best )?library", page.reader.text)


def test_a_large_space_fits(pages: dict[str, Page]) -> None:
    page = pages["large_space"]
    assert page.story.statuses["ok"] == 181 and len(page.text) < 8e6


def test_the_last_of_many_runs_is_what_changed(pages: dict[str, Page]) -> None:
    page = pages["many_runs"]
    assert page.story.newest_run == {"h200": "run-09"} and page.story.nights["h200"]
    assert "a device was lost" in page.text or len(page.story.nights["h200"]) == 24


# What a reader may do: further variants of the figures, their first points under the pointer, tables behind them, menus, and evidence.
EVERYTHING = """
document.querySelectorAll('.variants').forEach(one => { one.querySelectorAll('figure[hidden]')[0].hidden = false; });
const drawn = klab.plots.all();
for (const plot of document.querySelectorAll('.plot[data-drawn]'))
  for (const [n] of plot.data.entries()) try { Plotly.Fx.hover(plot, [{curveNumber: n, pointNumber: 0}]); } catch { /* no point there */ }
document.querySelectorAll('details').forEach(one => { one.open = true; });
for (const button of [...document.querySelectorAll('button.evidence')].slice(0, 10)) button.click();
return drawn;
"""


@pytest.mark.parametrize(("name", "width"), [("hostile", 400), ("long_names", 400)])
def test_in_a_browser_nothing_runs_and_nothing_overflows(
    browser: Browser, pages: dict[str, Page], tmp_path: Path, name: str, width: int
) -> None:
    path = tmp_path / "page.html"
    path.write_text(pages[name].text, encoding="utf-8")
    browser.open(path, width=width)
    assert browser.run("return document.documentElement.scrollWidth") <= width, "the page itself does not scroll sideways"
    assert browser.run(EVERYTHING) >= len({one["title"] for one in pages[name].figures.values() if one["data"]})
    browser.run("return new Promise(done => setTimeout(done, 300))")
    assert browser.run("return typeof window.__pwned") == "undefined"
    assert browser.run("return document.documentElement.scrollWidth") <= width, "nor when everything is open"
    assert browser.run("return [...document.querySelectorAll('a')].every(a => !/^javascript:/i.test(a.href.baseVal ?? a.href))")
    assert browser.console() == []
    assert [url for url in browser.requests() if not url.startswith(("data:", "blob:"))] == [path.resolve().as_uri()]
