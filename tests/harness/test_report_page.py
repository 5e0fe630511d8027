"""The page: truthful when there is nothing, escaped, small, and (in a real browser) silent on the console and the network."""

from __future__ import annotations

import dataclasses
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from browser import Browser, missing
from made_results import contest, failed, made

from klab.harness.catalog import find_chip, find_model
from klab.harness.choose.decide import decide
from klab.harness.plan import plan as make_plan
from klab.harness.report.html import el, table
from klab.harness.report.limits import Limits, limits_of
from klab.harness.report.page import render
from klab.harness.report.subject import Story, tell
from klab.harness.report.write import write_report
from klab.harness.store.journal import Journal
from klab.harness.store.result import Result, Status
from klab.kernels.errors import CannotMeasure
from klab.kernels.matmul.problem import Matmul

NASTY = '<script>alert("x")</script><img src=x onerror=alert(1)>&amp;"\''


def story(rows: list[Result], **changes: object) -> Story:
    def limits(chip: str, device: str) -> Limits:
        return limits_of(chip, device) if chip == "h200" else Limits(None, "the peaks of this CPU are not known")

    told = tell(rows, lambda chip, found: decide(found, None, chip), limits)
    return dataclasses.replace(told, **changes)  # type: ignore[arg-type]


class Reader(HTMLParser):
    """The page as a reader without scripts has it: its text, and whether its elements are closed in order."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.words: list[str] = []
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(page)
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "br", "hr", "col"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] not in ("script", "style"):
            self.words.append(data)


@pytest.fixture(scope="module")
def page() -> str:
    return render(story([*contest(), *contest("cpu", seed=1)], sources=("results",)))


def test_what_the_page_tells(page: str) -> None:
    reader = Reader(page)
    assert not reader.open and page.count("<!doctype html>") == 1
    for words in ("NVIDIA H200", "Example CPU", "0123456789ab", "2026-11-20", "128 ok", "2 crashed", "Winners", "Roofline", "Failures"):
        assert words in reader.text, words
    for words in ("illegal memory access", "splits=4", "TFLOP/s", "not measured", "no power meter on this machine", "measured", "modelled"):
        assert words in reader.text, words
    assert "rotate through copies of the inputs" in reader.text, "the state of the cache, in words"
    assert "20 rounds per result" in reader.text and "energy counter" in reader.text


def test_everything_is_inside(page: str) -> None:
    """No element fetches anything, and the page's policy forbids it to whatever might try."""
    outside = [(tag, attrs) for tag, attrs in Reader(page).tags if tag in ("link", "img", "iframe", "object", "base") or "src" in attrs]
    assert not outside
    policy = next(attrs["content"] for tag, attrs in Reader(page).tags if attrs.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None and policy.startswith("default-src 'none'")
    assert all((attrs.get("href") or "#").startswith("#") for _, attrs in Reader(page).tags)
    assert page.count('id="klab-plotly"') == page.count('id="klab-payload"') == 1, "the drawing library and the data are there once"


def test_names_cannot_break_out() -> None:
    rows = [
        made(Matmul(m, 64, 64), NASTY, config={NASTY: NASTY}, device=NASTY, epoch=NASTY, environment={NASTY: NASTY}, problem_label=NASTY)
        for m in (1, 2)
    ]
    rows += [failed(Matmul(3, 64, 64), NASTY, Status.CRASHED, NASTY, device=NASTY)]
    page = render(story(rows, model=NASTY, notes=(NASTY,), reading=(NASTY,), sources=(NASTY,), scenario={NASTY: NASTY}))
    own = re.sub(r"<script>.*?</script>", "", page, flags=re.DOTALL)  # the page's own two scripts
    assert "<script>alert" not in own and "<img" not in own and "onerror=alert(1)>" not in own
    assert NASTY in Reader(page).text


def test_nothing_to_show_is_said() -> None:
    reader = Reader(render(Story(())))
    assert "There are no results to show yet" in reader.text and "nothing yet" in reader.text


def test_a_chip_without_results_is_said(tmp_path: Path) -> None:
    plan = make_plan(find_model("qwen3-0.6b"), find_chip("h200"))
    write_report([tmp_path], tmp_path / "page.html", chips=["h200"], plans={"h200": plan})
    text = Reader((tmp_path / "page.html").read_text()).text
    assert "No problem has a result that may be chosen" in text and "problems without a choice" in text
    assert "never measured on this device" in text and "qwen3-0.6b (input 8192" in text


def test_only_failures_make_a_truthful_page() -> None:
    rows = [failed(Matmul(m, 64, 64), "triton_a", Status.TIMEOUT, "no answer in 30 s") for m in range(1, 5)]
    text = Reader(render(story(rows))).text
    assert "none of 4 problems has a valid result" in text and "4 timeout" in text and "no answer in 30 s" in text
    assert "nothing has won" in text and "no method to describe" in text


def test_rows_that_screening_dropped_are_shown_without_a_device() -> None:
    dropped = failed(Matmul(1, 64, 64), "triton_a", Status.UNSUPPORTED, "spills: 2 KB", kind="screened", device="")
    text = Reader(render(story([made(Matmul(1, 64, 64)), dropped]))).text
    assert "spills: 2 KB" in text and "1 unsupported" in text


def test_a_checked_row_without_a_time_is_no_winner() -> None:
    check = made(Matmul(1, 64, 64), samples_us=(), median_us=None, ci_low_us=None, ci_high_us=None, marked=())
    assert "no interval of its time" in Reader(render(story([check]))).text


def test_a_thousand_failures_are_grouped() -> None:
    rows = [failed(Matmul(1, 64, 64), "triton_a", Status.COMPILE_ERROR, f"reason {n % 400}", config={"n": n}) for n in range(2000)]
    rows = [dataclasses.replace(row, key=f"{n}") for n, row in enumerate(rows)]
    page = render(story(rows))
    assert "2000 compile_error" in Reader(page).text and "1250 more rows are left out" in Reader(page).text


def test_five_thousand_results_fit(tmp_path: Path) -> None:
    rows = [
        made(Matmul(m, 64 * n, 64), f"triton_{k}", config={"block": b}, key=f"{m} {n} {k} {b}", level_us=100.0 * (1 + 0.2 * k + 0.03 * b))
        for m in range(1, 26)
        for n in range(1, 11)
        for k in range(4)
        for b in range(5)
    ]
    page = tmp_path / "page.html"
    page.write_text(render(story(rows)), encoding="utf-8")
    assert len(rows) == 5000 and page.stat().st_size < 8e6


def test_with_a_model_the_steps_are_told(tmp_path: Path) -> None:
    plan = make_plan(find_model("qwen3-0.6b"), find_chip("h200"))
    with Journal(tmp_path / "results", "run") as journal:
        for problem in plan.problems():
            journal.append(made(problem, "torch", level_us=50.0))
            journal.append(made(problem, "triton_a", level_us=40.0))
        journal.append(made(Matmul(7, 7, 7)))
    (tmp_path / "results" / "foreign.jsonl").write_text("what is this\n")
    out = tmp_path / "deep" / "page.html"
    told = write_report([tmp_path / "results"], out, chips=["h200"], plans={"h200": plan})
    text = Reader(out.read_text()).text
    assert "decode, batch 32" in text and "Share of the step (modelled)" in text and "1.25" in text
    assert "matmul 7x7x7" not in text, "not a problem of this model"
    assert "foreign.jsonl: 1 skipped" in text and told.statuses["ok"] == 2 * len(plan.problems())


def test_a_page_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CannotMeasure, match="cannot write"):
        write_report([tmp_path], tmp_path / "file" / "page.html")


def test_without_plotly_the_tables_are_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("klab.harness.report.page.plotly_js", lambda: "")
    page = render(story(contest()))
    assert "Figures need plotly" in Reader(page).text and "triton_split_kv" in Reader(page).text and len(page) < 400_000


def test_small_html() -> None:
    assert el("p", "a<b", None, 3, ["x", el("b", "&")], class_="c", title='"') == '<p class="c" title="&quot;">a&lt;b3x<b>&amp;</b></p>'
    assert 'data-label="N"' in table(("N",), [("1",)], ("N",))


@pytest.mark.parametrize(("theme", "width"), [("light", 1280), ("dark", 1280), ("light", 400)])
def test_in_a_browser(browser: Browser, page: str, tmp_path: Path, theme: str, width: int) -> None:
    path = tmp_path / "page.html"
    path.write_text(page, encoding="utf-8")
    browser.open(path, width=width, theme=theme)
    plots = browser.run("return [...document.querySelectorAll('.plot')].filter(p => p.offsetParent).length")
    assert plots >= 8 and browser.run("return document.documentElement.dataset.drawn") == str(plots), (
        "all but the variants that are not chosen"
    )
    assert browser.run("return [...document.querySelectorAll('.plot')].every(p => p.querySelector('svg.main-svg') || !p.offsetParent)")
    assert browser.run("return document.documentElement.scrollWidth") <= width, "the page itself does not scroll sideways"
    ink, paper = (browser.run(f"return getComputedStyle(document.body).{name}") for name in ("color", "backgroundColor"))
    bright = [sum(map(int, re.findall(r"\d+", colour)[:3])) for colour in (ink, paper)]
    assert (bright[0] < bright[1]) == (theme == "light")
    assert browser.run("return getComputedStyle(document.querySelector('.plot text.xtitle')).fill") == ink, "figures follow the theme"
    assert not browser.run("return [...document.querySelectorAll('.modebar-btn')].some(b => /cloud|plotly/i.test(b.dataset.title || ''))")
    assert len(browser.screenshot(tmp_path / "shot.png")) > 50_000
    assert browser.console() == []
    asked = [url for url in browser.requests() if not url.startswith(("data:", "blob:"))]
    assert asked == [path.resolve().as_uri()]


@pytest.mark.skipif(bool(missing()), reason=missing())
def test_without_scripts_the_tables_read(page: str, tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    path.write_text(page, encoding="utf-8")
    with Browser(tmp_path / "profile", javascript=False) as browser:
        browser.open(path, width=400)
        seen = browser.cdp("Accessibility.getFullAXTree")["nodes"]
        names = " ".join(str(node.get("name", {}).get("value", "")) for node in seen)
        assert "cuda_split_kv" in names and "This figure needs a script" in names
