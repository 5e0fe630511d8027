"""The page in a real browser: tables that sort, open and travel as CSV; and how it looks without a script, in the dark, on paper."""

from __future__ import annotations

import base64
import csv
import io
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from browser import PATIENCE_S, Browser, missing
from made_figures import heat, made_page, points, rows, winners

from klab.harness.report.html import Cell, el, table
from klab.harness.report.shell import document

FRAME = rows()


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    odd = pd.DataFrame(
        {
            "kernel": ["=1+1", "-2", "@x", 'a "quoted", one', "two\nlines", "+49", "-x", None],
            "model": [("a", "b"), (), ("c",), (), (), (), (), ()],
            "time_us": [1.5, -2.0, float("nan"), 3e-7, 5.0, 6.0, 7.0, 8.0],
        }
    )
    many = pd.DataFrame({"kernel": [f"k{n}" for n in range(700)], "time_us": [float(n * 37 % 700) for n in range(700)]})
    figures = [
        points(FRAME),
        heat(FRAME),
        points(odd.assign(problem=""), "odd", title="Odd"),
        points(many.assign(problem=""), "many", title="Many"),
    ]
    figures[2].traces.clear()
    figures[2].traces.append({"type": "bar", "x": ["a"], "y": [1]})
    figures[3].traces[1:] = []
    path = tmp_path_factory.mktemp("page") / "page.html"
    path.write_text(made_page(FRAME, figures), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def loaded(page: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    if missing():
        pytest.skip(missing())
    with Browser(tmp_path_factory.mktemp("profile")) as browser:
        browser.open(page)
        yield browser


@pytest.fixture
def browser(loaded: Browser, page: Path) -> Browser:
    """The browser, at the page as it is without a state; opened again where a test has left it."""
    if loaded.run("return location.pathname") != str(page):
        loaded.open(page)
    loaded.run(
        "klab.state.link(); location.hash = ''; scrollTo(0, 0);"
        "document.querySelectorAll('details.behind').forEach(d => { d.open = false; });"
        "return new Promise(done => setTimeout(done, 60)).then(() => klab.plots.settled()).then(() => klab.plots.all())"
    )
    return loaded


def column(browser: Browser, n: int, table: str = "#winners") -> list[str]:
    found: list[str] = browser.run(
        f"return [...document.querySelectorAll('{table} tbody tr:not([hidden])')].map(r => r.cells[{n}].textContent)"
    )
    return found


def press(browser: Browser, n: int, table: str = "#winners") -> str:
    """Press a head; what aria-sort then says of it."""
    script = f"const b = document.querySelector('{table} th:nth-child({n + 1}) button'); b.click(); "
    return str(browser.run(f"{script} return document.querySelector('{table} th:nth-child({n + 1})').getAttribute('aria-sort')"))


def test_heads_sort_up_down_and_back(browser: Browser) -> None:
    times = [f"{n + 1} µs" for n in range(23)]
    assert column(browser, 2) == [*times, "not measured"]
    assert press(browser, 2) == "ascending" and column(browser, 2) == [*times, "not measured"], "as numbers: 9 before 10"
    assert press(browser, 2) == "descending" and column(browser, 2) == [*times[::-1], "not measured"], "what is not there is last"
    assert press(browser, 2) == "None" and column(browser, 2) == [*times, "not measured"]
    press(browser, 1)
    assert column(browser, 2)[:8] == [f"{n + 1} µs" for n in range(0, 24, 3)], "equal ones stay in their order"
    assert "sort.winners=Kernel%3Aup" in browser.run("return klab.state.link()")
    assert not browser.run("return document.querySelector('main > section > .wide:last-child th button')"), (
        "a table without an identity is left alone"
    )


def test_words_among_numbers_come_last_either_way(loaded: Browser, tmp_path: Path) -> None:
    """They say why there is no number, so that no order begins with them."""
    lines = [("a", Cell("1,200 W", 1200.0)), ("b", "not measured"), ("c", Cell("90 W", 90.0)), ("d", "not asked for")]
    path = tmp_path / "page.html"
    path.write_text(document("t", el("main", table(("Name", "Power"), lines, numbers=("Power",), identity="winners"))), encoding="utf-8")
    loaded.open(path)
    assert press(loaded, 1) == "ascending" and column(loaded, 0) == ["c", "a", "b", "d"]
    assert press(loaded, 1) == "descending" and column(loaded, 0) == ["a", "c", "b", "d"]
    assert press(loaded, 0) == "ascending" and press(loaded, 0) == "descending" and column(loaded, 0) == ["d", "c", "b", "a"]


def test_a_search_field_finds_rows(browser: Browser) -> None:
    find = "const f = document.querySelector('.find input'); f.value = 'GAMMA'; f.dispatchEvent(new Event('input', {bubbles: true}));"
    browser.run(find)
    assert set(column(browser, 1)) == {"gamma"} and len(column(browser, 1)) == 8
    browser.run("klab.state.set('chip', 'h200')")
    assert len(column(browser, 1)) == 4 and "find.winners=GAMMA" in browser.run("return klab.state.link()")
    assert "4 of 24 rows shown." in browser.run("return document.getElementById('tables').textContent")


def test_a_row_opens_its_evidence(browser: Browser) -> None:
    browser.run("klab.seen = klab.evidence; klab.evidence = (id, element) => { element.textContent = `about ${id}`; }")
    browser.run("document.querySelector('#row-3 button.evidence').click()")
    state = "const m = document.querySelectorAll('tr.more'); return [m.length, m[0]?.textContent, m[0]?.previousElementSibling.id]"
    assert browser.run(state) == [1, "about e3", "row-3"]
    assert browser.run("return document.querySelector('#row-3 button.evidence').getAttribute('aria-expanded')") == "true"
    press(browser, 2), press(browser, 2)
    assert browser.run(state) == [1, "about e3", "row-3"], "it moves with its row"
    browser.run("document.querySelector('#row-6 button.evidence').click()")
    assert browser.run(state) == [1, "about e6", "row-6"], "one at a time"
    browser.run("klab.state.set('chip', 'h200')")
    assert browser.run("return document.querySelector('tr.more').hidden"), "it goes with its row"
    link = browser.run("return klab.state.link()").split("#", 1)[1]
    assert "open=e6" in link
    browser.run("document.querySelector('#row-6 button.evidence').click(); klab.evidence = klab.seen")
    assert browser.run(state)[0] == 0
    assert browser.run("return document.querySelectorAll('button.evidence').length") == 8


def parsed(browser: Browser, identity: str) -> list[list[str]]:
    text = browser.run(f"return klab.tables.csv('{identity}')")
    assert text.endswith("\r\n")
    return list(csv.reader(io.StringIO(text, newline="")))


def test_csv_is_the_filtered_table(browser: Browser) -> None:
    whole = parsed(browser, "points")
    assert whole[0] == list(FRAME.columns) and len(whole) == 25
    assert whole[4] == ["b200", "tiny, large", "decode", "rope", "bf16", "alpha", "ok", "problem 1", "4"] and whole[24][-1] == ""
    browser.run("klab.state.change({chip: 'h200', kernel: 'beta'})")
    kept = FRAME[(FRAME["chip"] == "h200") & (FRAME["kernel"] == "beta")]
    assert [float(row[-1]) for row in parsed(browser, "points")[1:]] == list(kept["time_us"])


def test_csv_does_nothing_in_a_spreadsheet(browser: Browser) -> None:
    found = parsed(browser, "odd")
    assert [row[0] for row in found[1:]] == ["'=1+1", "-2", "'@x", 'a "quoted", one', "two\nlines", "+49", "'-x", ""]
    assert [row[2] for row in found[1:]] == ["1.5", "-2", "", "3e-7", "5", "6", "7", "8"], "a number is a number, be it below zero"


def arrived(folder: Path, name: str) -> bytes:
    """A file that the browser has saved, whole: it bears another name until it is."""
    until = time.monotonic() + PATIENCE_S
    while time.monotonic() < until:
        if (folder / name).exists() and not list(folder.glob("*.crdownload")):
            return (folder / name).read_bytes()
        time.sleep(0.1)
    raise AssertionError(f"{name} did not arrive; there are {[path.name for path in folder.iterdir()]}")


def test_buttons_give_files(browser: Browser, tmp_path: Path) -> None:
    browser.cdp("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(tmp_path))
    browser.run("klab.state.set('chip', 'h200'); document.querySelectorAll('#points-figure .actions button').forEach(b => b.click())")
    assert len(list(csv.reader(io.StringIO(arrived(tmp_path, "points.csv").decode(), newline="")))) == 13, "what the filter leaves"
    image = arrived(tmp_path, "points.png")
    assert image.startswith(b"\x89PNG") and len(image) > 10_000
    titled = """const real = Plotly.toImage;
      Plotly.toImage = async ({ layout }) => layout.title.text;
      return klab.png('points').finally(() => { Plotly.toImage = real; });"""
    assert browser.run(titled) == "Time of every row<br><sub>Only chip h200</sub>", "an image that leaves the page says what it shows"
    browser.run("klab.state.set('chip', null)")
    assert browser.run(titled) == "Time of every row"
    refused = """const real = klab.png, button = document.querySelector('#odd-figure .actions button');
      klab.png = () => Promise.reject(new Error('no WebGL'));
      button.click();
      klab.png = real;
      return new Promise(done => setTimeout(() => done(button.textContent), 50));"""
    said = browser.run(refused)
    assert said == "no PNG here"
    assert browser.console() == [] and [u for u in browser.requests() if not u.startswith(("data:", "blob:", "file:"))] == []


def test_the_table_behind_a_figure(browser: Browser) -> None:
    there = "const d = document.querySelector('#many-figure details.behind'); d.open = true;"
    text = browser.run(f"{there} return new Promise(done => setTimeout(() => done(d.innerText), 60))")
    assert "Table behind it (700 rows)" in text and "The first 500 of 700 rows; the CSV has them all." in text
    table = "#many-figure details.behind"
    assert column(browser, 1, table)[:3] == ["0", "37", "74"] and len(column(browser, 1, table)) == 500
    press(browser, 1, table)
    assert column(browser, 1, table)[:3] == ["0", "1", "2"], "sorted among all of them"
    assert browser.run("return document.activeElement === document.body || document.activeElement.textContent.startsWith('time_us')")
    assert "sort.many=time_us%3Aup" in browser.run("return klab.state.link()")
    browser.run("klab.state.set('kernel', 'k5'); return klab.plots.settled()")
    assert column(browser, 0, table) == ["k5"] and "Table behind it (1 of 700 rows)" in browser.run(
        "return document.querySelector('#many-figure').innerText"
    )


def test_a_long_table_shows_its_first_rows(loaded: Browser, tmp_path: Path) -> None:
    path = tmp_path / "long.html"
    path.write_text(document("long", el("main", winners(rows(problems=50)))), encoding="utf-8")
    loaded.open(path)
    assert len(column(loaded, 0)) == 100 and "Show all 300 rows" in loaded.run("return document.querySelector('.rest').textContent")
    press(loaded, 2), press(loaded, 2)
    assert column(loaded, 2)[0] == "299 µs", "sorted among all of them"
    loaded.run("document.querySelector('.rest').click()")
    assert len(column(loaded, 0)) == 300 and loaded.run("return document.querySelector('.rest').hidden") and loaded.console() == []


def test_on_paper_everything_is_open_and_in_ink(browser: Browser, page: Path) -> None:
    browser.open(page, theme="dark", everything=False)
    ink = "return document.querySelector('#points .xtitle')?.style.fill"
    assert browser.run(ink) != "rgb(0, 0, 0)"
    browser.run("dispatchEvent(new Event('beforeprint'))")
    assert browser.run("return [...document.querySelectorAll('main details')].every(d => d.open)")
    assert browser.run(ink) == "rgb(0, 0, 0)" and browser.run("return document.querySelectorAll('.plot[data-drawn]').length") == 4
    width = "return Number(document.querySelector('#points .main-svg').getAttribute('width'))"
    assert browser.run(width) == 680, "paper is narrower than the screen, which a script cannot ask"
    assert column(browser, 0, "#many-figure details.behind") == [f"k{n}" for n in range(60)], "paper has no room for all"
    browser.run("dispatchEvent(new Event('afterprint'))")
    assert not browser.run("return [...document.querySelectorAll('main details')].some(d => d.open)")
    assert browser.run(ink) != "rgb(0, 0, 0)"
    assert browser.until(width + " > 1000"), "the width of the page again"
    pdf = base64.b64decode(browser.cdp("Page.printToPDF")["data"])
    assert pdf.startswith(b"%PDF") and len(pdf) > 50_000 and browser.console() == []


def test_what_is_drawn_beside_figures_follows_the_theme(browser: Browser, page: Path) -> None:
    """Panels of evidence: told after the colours have changed, not before."""
    browser.open(page)
    browser.run("klab.told = []; klab.plots.painted(() => klab.told.push(klab.plots.themed('var(--ink)')))")
    browser.cdp("Emulation.setEmulatedMedia", media="", features=[{"name": "prefers-color-scheme", "value": "dark"}])
    assert browser.until("return klab.told.at(-1)") == "#e6e9ef"
    assert browser.run("return getComputedStyle(document.documentElement).getPropertyValue('--ink')").strip() == "#e6e9ef"
    browser.run("dispatchEvent(new Event('beforeprint'))")
    assert browser.run("return klab.told.at(-1)") == "#000"
    browser.run("dispatchEvent(new Event('afterprint'))")
    assert browser.run("return klab.told.at(-1)") == "#e6e9ef"


def test_the_policy_lets_webgl_be_drawn(loaded: Browser, tmp_path: Path) -> None:
    """By the page itself: what a driver's script calls is free of the policy."""
    figure = points(FRAME, "lines", title="Lines")
    figure.traces[:] = [{"type": "parcoords", "dimensions": [{"label": "a", "values": [1, 2]}, {"label": "b", "values": [2, 1]}]}]
    path = tmp_path / "page.html"
    path.write_text(made_page(FRAME, [figure]), encoding="utf-8")
    loaded.open(path, height=4000, everything=False)
    assert loaded.until("return document.getElementById('lines').dataset.drawn === '1'")
    assert "WebGL is not supported" not in loaded.run("return document.getElementById('lines').textContent")
    assert loaded.run("return document.querySelectorAll('#lines canvas').length") and loaded.console() == []


def test_a_hidden_variant_holds_no_webgl(loaded: Browser, tmp_path: Path) -> None:
    lines = []
    for name in ("one", "two"):
        figure = points(FRAME, name, title="Lines", variant=name)
        figure.traces[:] = [{"type": "parcoords", "dimensions": [{"label": "a", "values": [1, 2]}], "meta": {"rows": [0, 1]}}]
        lines.append(figure)
    path = tmp_path / "page.html"
    path.write_text(made_page(FRAME, lines), encoding="utf-8")
    loaded.open(path)
    canvases = "return ['one', 'two'].map(name => document.querySelectorAll(`#${name} canvas`).length > 0)"
    assert loaded.run(canvases) == [True, False]
    loaded.run("klab.state.set('show.lines', 'two'); return klab.plots.settled().then(() => klab.plots.all())")
    assert loaded.run(canvases) == [False, True]
    loaded.run("klab.state.set('show.lines', 'one'); return klab.plots.settled().then(() => klab.plots.all())")
    assert loaded.run(canvases) == [True, False] and loaded.console() == []
    assert loaded.run("return getComputedStyle(document.querySelector('.printed')).display") == "none"
    loaded.cdp("Emulation.setEmulatedMedia", media="print", features=[])
    assert "Shown: one (one of 2;" in loaded.run("return document.querySelector('.variant').innerText"), "paper says which it shows"


def lacking(browser: Browser, script: str) -> str:
    """Let a script run before those of every page to come; its name, to take it back by."""
    return str(browser.cdp("Page.addScriptToEvaluateOnNewDocument", source=script)["identifier"])


@pytest.mark.parametrize("what", ["DecompressionStream", "WebGL", "broken"])
def test_a_browser_that_cannot_is_told_and_has_the_tables(loaded: Browser, page: Path, tmp_path: Path, what: str) -> None:
    path = page
    hide = {"DecompressionStream": "delete window.DecompressionStream", "WebGL": "HTMLCanvasElement.prototype.getContext = () => null"}
    if what != "DecompressionStream":
        path = tmp_path / "page.html"
        three = points(FRAME, "three", title="Lines")
        three.traces[:] = [{"type": "parcoords", "dimensions": [{"label": "a", "values": [1, 2]}], "meta": {"rows": [0, 1]}}]
        text = made_page(FRAME, [three])
        if what == "broken":
            text = re.sub(r'(id="klab-payload">H4sI)[A-Za-z0-9+/]{40}', r"\1" + "A" * 40, text)
        path.write_text(text, encoding="utf-8")
    taken = lacking(loaded, hide.get(what, ""))
    try:
        loaded.open(path)
        said = loaded.run("return document.querySelector('main').innerText")
        expected = {"DecompressionStream": "no DecompressionStream", "WebGL": "draws no WebGL", "broken": "figures cannot be shown"}[what]
        assert expected in said
        assert press(loaded, 2) == "ascending" and press(loaded, 2) == "descending" and column(loaded, 2)[0] == "23 µs"
        if what == "WebGL":
            assert loaded.run("return document.querySelector('details.behind').open")
        if what != "WebGL":
            loaded.run("document.querySelector('.filter[data-dim=chip] input').click()")
            assert len(column(loaded, 2)) == 12, "filters act on the tables"
    finally:
        loaded.cdp("Page.removeScriptToEvaluateOnNewDocument", identifier=taken)
        loaded.console()


@pytest.mark.skipif(bool(missing()), reason=missing())
def test_without_a_script_every_table_reads(page: Path, tmp_path: Path) -> None:
    with Browser(tmp_path / "profile", javascript=False) as browser:
        browser.open(page, width=400)
        nodes: list[dict[str, Any]] = browser.cdp("Accessibility.getFullAXTree")["nodes"]
        names = " ".join(str(node.get("name", {}).get("value", "")) for node in nodes)
        for words in ("This figure needs a script", "not measured", "The words of the whole.", "Table behind it (24 rows)"):
            assert words in names, words
        browser.cdp("DOM.getDocument")
        assert len(browser.screenshot(tmp_path / "shot.png")) > 10_000
