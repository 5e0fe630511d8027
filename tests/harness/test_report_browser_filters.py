"""The page in a real browser: what filters do to figures, tables and articles, and that a link gives the view back."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browser import Browser, missing
from made_figures import CHIPS, heat, made_page, points, rows, variants

from klab.harness.report.figures.style import Figure
from klab.harness.report.html import Markup

FRAME = rows()


@pytest.fixture(scope="module")
def loaded(page: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    if missing():
        pytest.skip(missing())
    with Browser(tmp_path_factory.mktemp("profile")) as browser:
        yield browser


@pytest.fixture
def browser(loaded: Browser, page: Path) -> Browser:
    """The browser, at the page as it is without a state; opened again where a test has left it."""
    if loaded.run("return location.pathname") != str(page):
        loaded.open(page)
    go(loaded, "")
    return loaded


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "page.html"
    slider = Markup('<label>scale <input type="range" min="1" max="9" value="1" data-state="scale"></label>')
    derived = dataclasses.replace(points(FRAME, "derived", title="Derived"), derive="made", controls=slider)
    path.write_text(made_page(FRAME, [points(FRAME), heat(FRAME), *variants(FRAME), derived]), encoding="utf-8")
    return path


def go(browser: Browser, at: str) -> None:
    """To another state of the page that is open."""
    browser.run(
        f"klab.state.link(); location.hash = {at!r}; scrollTo(0, 0);"
        "return new Promise(done => setTimeout(done, 60)).then(() => klab.plots.settled()).then(() => klab.plots.all())"
    )


def settle(browser: Browser, script: str = "") -> Any:
    """Run a script, and wait until what it changed is drawn."""
    return browser.run(
        f"const given = (() => {{ {script} }})(); return klab.plots.settled().then(() => {{ klab.plots.all(); return given; }})"
    )


def marks_of(browser: Browser, identity: str = "points") -> list[Any]:
    """(y, colours, upper bars) of every trace that is seen, as Plotly has them."""
    found = browser.run(
        f"return document.getElementById('{identity}').data.filter(t => t.visible !== false && t.meta)"
        ".map(t => [t.y, t.marker.color, t.error_y.array, t.text])"
    )
    return list(found)


def times(**wanted: str) -> list[float]:
    """The time_us of the rows of FRAME with these cells, in order; the one that was not measured is left out."""
    kept = FRAME
    for name, value in wanted.items():
        kept = kept[[value in cell if isinstance(cell, tuple) else value == cell for cell in kept[name]]]
    return sorted(kept["time_us"].dropna())


def drawn(browser: Browser, identity: str = "points") -> list[float]:
    return sorted(y for trace in marks_of(browser, identity) for y in trace[0] if y is not None)


def test_a_box_filters_every_figure_and_table(browser: Browser) -> None:
    assert drawn(browser) == times()
    assert browser.run("return [...document.querySelectorAll('.filter')].map(f => f.dataset.dim)") == [
        "chip",
        "model",
        "operator",
        "kernel",
    ]
    settle(browser, "document.querySelector('.filter[data-dim=operator] input').click()")  # matmul
    assert drawn(browser) == times(operator="matmul")
    for y, colours, bars, texts in marks_of(browser):
        assert len(y) == len(colours) == len(bars) == len(texts) == 4, "all that belongs to a point goes with it"
    assert browser.run("return document.getElementById('heat').data[0].y") == ["problem 0", "problem 2"]
    seen = browser.run("return [...document.querySelectorAll('#winners tbody tr:not([hidden])')].map(r => r.id)")
    assert seen == [f"row-{n}" for n, operator in enumerate(FRAME["operator"]) if operator == "matmul"]
    figure = browser.run("return document.getElementById('points-figure').textContent")
    assert "12 of 24 rows shown; the words above are of all of them." in figure
    assert "12 of 24 results, operator matmul." in browser.run("return document.querySelector('#filters [role=status]').textContent")
    settle(browser, "document.querySelector('#filters .clear').click()")
    assert drawn(browser) == times() and len(browser.run("return document.getElementById('heat').data[0].y")) == 4
    assert browser.console() == []


def test_a_cell_of_several_texts_needs_one_of_them(browser: Browser) -> None:
    go(browser, "?model=large&chip=h200")
    assert drawn(browser) == sorted(set(times(model="large")) & set(times(chip="h200")))
    counts = browser.run("return [...document.querySelectorAll('.filter[data-dim=model] label')].map(l => l.textContent)")
    assert counts == ["large6", "tiny12"], "counts are of what the other filters leave"


def test_a_table_without_the_column_says_so(browser: Browser) -> None:
    go(browser, "?model=large")
    table = browser.run("return document.querySelector('#winners').closest('.wide').previousElementSibling.parentElement.textContent")
    assert "Not filtered by model: this table has no such column." in table
    assert browser.run("return document.querySelectorAll('#winners tbody tr[hidden]').length") == 0


def test_a_filter_that_leaves_nothing_says_so_and_gives_all_back(browser: Browser) -> None:
    go(browser, "?chip=h200")
    assert browser.run("return document.getElementById('heat').offsetParent === null"), "the map is of the other chip"
    assert "The filter leaves nothing of this figure" in browser.run("return document.getElementById('heat-figure').innerText")
    settle(browser, "klab.filters.clear()")
    assert (
        browser.run("return document.getElementById('heat').offsetParent !== null && document.getElementById('heat').data[0].z.length") == 4
    )


def test_articles_and_variants_follow_the_chip(browser: Browser) -> None:
    seen = "return [...document.querySelectorAll('.variants > figure')].map(f => f.hidden)"
    assert browser.run(seen) == [False, True]
    settle(browser, "klab.state.set('chip', 'h200')")
    assert browser.run(seen) == [True, False], "the first of which something is left"
    assert browser.run("return [...document.querySelectorAll('article')].map(a => a.hidden)") == [True, False]
    assert "the filter leaves nothing" in browser.run("return document.querySelector('.variant option').textContent")
    settle(browser, "klab.state.set('show.by-chip', 'b200')")
    assert browser.run(seen) == [False, True], "what a reader chose is shown, be it empty"


def test_an_empty_variant_goes_with_its_chip(browser: Browser, tmp_path: Path) -> None:
    first, _ = variants(FRAME)
    empty = Figure("none", first.title, "Nothing is known.", empty="Nothing was measured.", variant="h200")
    path = tmp_path / "page.html"
    path.write_text(made_page(FRAME, [first, empty]), encoding="utf-8")
    seen = "return [...document.querySelectorAll('.variants > figure')].map(f => f.hidden)"
    options = "return [...document.querySelectorAll('.variant option')].map(o => o.textContent)"
    browser.open(path)
    assert browser.run(seen) == [False, True] and browser.run(options) == ["b200", "h200"]
    settle(browser, "klab.state.set('chip', 'h200')")
    assert browser.run(seen) == [True, False] and browser.run(options) == ["b200 (the filter leaves nothing)", "h200"]
    settle(browser, "klab.state.set('chip', 'b200')")
    assert browser.run(seen) == [False, True] and browser.run(options) == ["b200", "h200 (the filter leaves nothing)"]
    settle(browser, "klab.filters.clear()")
    assert browser.run(seen) == [False, True] and browser.run(options) == ["b200", "h200"] and browser.console() == []


def test_a_link_gives_the_view_back(browser: Browser, page: Path) -> None:
    settle(
        browser,
        "klab.state.set('chip', 'h200'); klab.state.set('kernel', ['alpha', 'gamma']); klab.state.set('show.by-chip', 'h200');"
        "const head = document.querySelector('#winners th:nth-child(3) button'); head.click(); head.click();"
        "document.querySelector('nav a[href=\"#figures\"]').click()",
    )
    link = browser.run("return klab.state.link()").split("#", 1)[1]
    assert link.startswith("figures?") and browser.run("return scrollY") > 500

    def view() -> list[Any]:
        rows = browser.run("return [...document.querySelectorAll('#winners tbody tr:not([hidden])')].map(r => r.id)")
        sort = browser.run("return document.querySelector('#winners th:nth-child(3)').getAttribute('aria-sort')")
        return [rows, sort, drawn(browser), browser.run("return [...document.querySelectorAll('.variants > figure')].map(f => f.hidden)")]

    before = view()
    assert before[0][0] == "row-21" and before[1] == "descending" and len(before[2]) == 7
    browser.open(page, at=link)
    assert view() == before and browser.run("return scrollY") > 500
    assert browser.run("return document.querySelectorAll('.filter[data-dim=kernel] input:checked').length") == 2


def test_back_undoes_a_filter_and_other_links_keep_it(browser: Browser) -> None:
    browser.run("klab.state.set('chip', 'h200'); klab.state.link()")
    browser.run("document.querySelector('nav a').click(); return 0")
    assert browser.run("return location.hash") == "#tables?chip=h200"
    back = """return new Promise(done => {
      addEventListener('popstate', () => setTimeout(() => done([location.hash, half()]), 200), {once: true});
      history.back();
    })"""
    there = "const half = () => document.getElementById('points-figure').textContent.includes('12 of 24');"
    assert browser.run(f"{there} {back}") == ["#?chip=h200", True]
    assert browser.run(f"{there} {back}") == ["", False]
    moved = "return new Promise(done => { location.hash = '#?chip=b200'; setTimeout(() => done(half()), 200) })"
    assert browser.run(f"{there} {moved}") is True, "an address typed into an open page counts"


def test_what_a_link_asks_in_vain_is_said(browser: Browser, page: Path) -> None:
    browser.open(page, at="nowhere?chip=tpu&chip=h200&colour=red&sort.winners=Nothing%3Aup&%E0%A4%A")
    said = browser.run("return document.querySelector('.said').textContent")
    assert "chip=tpu" in said and "colour" in said and "h200" not in said and "sort" not in said
    assert drawn(browser) == times(chip="h200") and browser.console() == []
    browser.open(page, at="?open=e999&show.by-chip=tpu&" + "&".join(f"chip=c{n}" for n in range(3000)))
    said = browser.run("return document.querySelector('.said').textContent")
    assert "c7 and 2,994 more." in said and len(said) < 300, "few of many"
    browser.open(page, at="?open=e999&show.by-chip=tpu")
    assert "show.by-chip=tpu, open=e999." in browser.run("return document.querySelector('.said').textContent")
    browser.open(page, at="?open=e3&show.by-chip=h200")
    assert browser.run("return document.querySelector('.said') === null") and browser.console() == []
    go(browser, "%E0%A4%A")
    assert drawn(browser) == times() and browser.console() == []


def test_a_derive_function_gets_what_is_left_and_gives_the_words(browser: Browser) -> None:
    define = """klab.derive.made = (figure, shown) => {
      const at = figure.table.columns.indexOf('time_us');
      const scale = Number(klab.state.get('scale') || 1);
      const sum = shown.reduce((total, n) => total + (figure.table.rows[n][at] || 0), 0);
      for (const trace of figure.data) if (trace.meta) trace.y = trace.y.map((y) => y * scale);
      figure.layout.annotations = [{ text: 'x', x: 0, y: 0 }];
      return `Sum ${sum * scale}.`;
    };"""
    words = "return document.querySelector('#derived-figure figcaption').textContent"
    assert browser.run(words) == "The words of the whole."
    settle(browser, f"{define} klab.state.set('chip', 'b200')")
    assert browser.run(words) == f"Sum {sum(times(chip='b200')):.0f}."
    assert "12 of 24 rows shown." in browser.run("return document.getElementById('derived-figure').textContent")
    slide = "const s = document.querySelector('[data-state=scale]'); s.value = 2; s.dispatchEvent(new Event('input', {bubbles: true}))"
    settle(browser, slide)
    assert browser.run(words) == f"Sum {2 * sum(times(chip='b200')):.0f}." and drawn(browser, "derived") == [
        2 * t for t in times(chip="b200")
    ]
    settle(browser, slide)
    assert drawn(browser, "derived") == [2 * t for t in times(chip="b200")], "from the data of the page each time"
    assert "scale=2" in browser.run("return klab.state.link()")
    settle(browser, "klab.state.change({chip: null, scale: null})")
    assert browser.run(words) == "The words of the whole." and drawn(browser, "derived") == times()
    assert browser.run("return document.querySelector('[data-state=scale]').value") == "1" and browser.console() == []


def test_only_what_is_near_is_drawn_and_drawn_again(browser: Browser, page: Path) -> None:
    browser.open(page, height=600, everything=False)
    assert browser.run("return document.querySelectorAll('.plot[data-drawn]').length") == 0
    browser.run("klab.state.go('points-figure')")
    assert browser.until("return klab.plots.settled().then(() => document.getElementById('points').dataset.drawn)") == "1"
    assert browser.run("return document.getElementById('derived').dataset.drawn || ''") == ""
    assert browser.run("klab.state.set('chip', 'h200'); return klab.plots.settled().then(() => klab.plots.get('derived').dirty)") is True
    assert browser.until("return klab.lastFilterMs > 0") and browser.run("return klab.plots.get('points').dirty") is False


def test_the_keyboard_reaches_the_filters(browser: Browser, page: Path) -> None:
    browser.open(page)
    reached = []
    for _ in range(9):
        for kind in ("keyDown", "keyUp"):
            browser.cdp("Input.dispatchKeyEvent", type=kind, key="Tab", code="Tab", windowsVirtualKeyCode=9)
        reached.append(browser.run("const e = document.activeElement; return e.closest('.filter')?.dataset.dim || e.textContent"))
    assert reached[:7] == ["Tables", "Figures", "chip", "model", "operator", "kernel", "copy link"]
    outline = browser.run("return getComputedStyle(document.activeElement).outlineStyle")
    assert outline == "solid", "the focus is seen"
    browser.run("const f = document.querySelector('.filter[data-dim=kernel]'); f.open = true; f.querySelector('input').focus()")
    for kind in ("keyDown", "keyUp"):
        browser.cdp("Input.dispatchKeyEvent", type=kind, key="Escape", code="Escape", windowsVirtualKeyCode=27)
    assert browser.run("return [document.querySelector('.filter[open]') === null, document.activeElement.tagName]") == [True, "SUMMARY"]
    browser.run(
        "document.querySelector('.filter[data-dim=kernel]').open = true; document.querySelector('.filter[data-dim=kernel] button').focus()"
    )
    for kind in ("keyDown", "keyUp"):
        browser.cdp("Input.dispatchKeyEvent", type=kind, key="Tab", code="Tab", windowsVirtualKeyCode=9)
    assert browser.run("return document.querySelector('.filter[open]') === null"), "a menu that the keyboard leaves covers nothing"
    settle(browser, "klab.state.set('chip', 'h200'); document.querySelector('#filters .clear').focus()")
    settle(browser, "document.activeElement.click()")
    assert browser.run("return document.activeElement.closest('.filter').dataset.dim") == "chip", "the focus is not lost with the button"
    labels = browser.run("return [...document.querySelectorAll('.plot[role=img]')].map(p => p.ariaLabel)")
    assert labels[:2] == ["Time of every row. The words of the whole.", "Map. All of it."] and len(labels) == 5


def test_fifty_chips_with_long_names(browser: Browser, tmp_path: Path) -> None:
    frame = rows(chips=50, problems=1, kernels=2)
    frame["kernel"] = frame["kernel"].map(lambda name: f"<b>{name}</b>" + "very_long_" * 30)
    path = tmp_path / "page.html"
    path.write_text(made_page(frame), encoding="utf-8")
    for width in (1280, 400):
        browser.open(path, width=width)
        browser.run("document.getElementById('filters').open = true; document.querySelectorAll('.filter').forEach(f => { f.open = true; })")
        assert browser.run("return document.documentElement.scrollWidth") <= width
        for dim in ("chip", "kernel"):
            fields = f"const f = document.querySelector('.filter[data-dim={dim}]'); f.open = true;"
            left, right = browser.run(f"{fields} const b = f.querySelector('fieldset').getBoundingClientRect(); return [b.left, b.right]")
            assert left >= 0 and right <= width
    field = "const f = document.querySelector('.filter[data-dim=chip] input[type=search]');"
    find = f"{field} f.value = 'CHIP1'; f.dispatchEvent(new Event('input'));"
    assert browser.run(f"{find} return [...f.closest('fieldset').querySelectorAll('label')].filter(l => !l.hidden).length") == 11
    settle(browser, "document.querySelectorAll('.filter[data-dim=kernel] input[type=checkbox]')[0].click()")
    assert browser.run("return document.querySelectorAll('#winners tbody tr[hidden]').length") == 50
    assert browser.run("return document.querySelector('#filters b + b, #filters label b')") is None and browser.console() == []
    assert set(CHIPS) <= set(browser.run("return klab.filters.values('chip')"))
