"""What every page of klab is made in: one HTML file with everything in it, from which no request leaves."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path

from klab.harness.report.figures.style import Figure
from klab.harness.report.html import Markup, data_script, el

# Nothing may be fetched: not by a mistake here, and not by a name of a kernel that smuggles markup in.
POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:; base-uri 'none'; form-action 'none'"
)


def document(title: str, content: object, *, drawing: str = "", styles: Sequence[str] = ("page.css",)) -> str:
    """A page as text. drawing: plotly.js, where the page has figures to draw."""
    head = el(
        "head",
        el("meta", charset="utf-8"),
        el("meta", http_equiv="Content-Security-Policy", content=POLICY),
        el("meta", name="viewport", content="width=device-width, initial-scale=1"),
        el("meta", name="generator", content="klab"),
        el("title", title),
        el("style", Markup("".join(map(asset, styles)))),
    )
    scripts = [el("script", Markup(drawing)), el("script", Markup(asset("page.js")))] if drawing else []
    return f"<!doctype html>\n{el('html', head, el('body', content, scripts), lang='en')}\n"


def framed(figure: Figure, drawing: bool) -> Markup:
    """A figure with its title, its words, and what the page's script draws; or what it lacks."""
    heading = [el("h3", figure.title), el("figcaption", figure.caption)]
    if figure.empty or not drawing:
        return el("figure", heading, el("p", figure.empty or "Figures need plotly: pip install 'kernel-lab[analysis]'.", class_="empty"))
    without = el("noscript", el("p", "This figure needs a script; the tables do not."))
    value = {"data": figure.traces, "layout": figure.layout}
    return el("figure", heading, el("div", class_="plot", id=figure.identity), without, data_script(f"{figure.identity}-data", value))


@cache
def asset(name: str) -> str:
    """A file that lies beside this one."""
    return (Path(__file__).parent / name).read_text(encoding="utf-8")


@cache
def plotly_js() -> str:
    """plotly.js as the plotly package ships it (4.8 MB), or "" where that is not installed."""
    try:
        from plotly.offline import get_plotlyjs
    except ModuleNotFoundError:
        return ""
    script: str = get_plotlyjs()
    return script.replace("</script", "<\\/script")
