"""The page: one HTML file with everything in it, from which no request leaves."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from klab.harness.report.figures import cost_and_error, roofline, sweep, where_time_goes
from klab.harness.report.figures.style import Figure, colours
from klab.harness.report.html import Markup, data_script, el
from klab.harness.report.sections import failures, glossary, method, steps, strip, winners
from klab.harness.report.subject import Story, Subject

# Nothing may be fetched: not by a mistake here, and not by a name of a kernel that smuggles markup in.
POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:; base-uri 'none'; form-action 'none'"
)


def figures(subject: Subject) -> list[Figure]:
    """The figures of one chip, in order. Each module has `data` (pure, tested alone) and `draw`."""
    rows = subject.best_per_kernel()
    hues = colours(row.kernel for row in rows)
    found = [roofline.draw(roofline.data(rows, subject.limits), f"{_slug(subject)}-roofline", hues)]
    for along in sweep.AXES:
        panels = sweep.data(rows, along)
        if panels:
            found.append(sweep.draw(panels, along, f"{_slug(subject)}-{along.identity}", hues))
    formats = cost_and_error.data(rows)
    if formats:
        found.append(cost_and_error.draw(formats, f"{_slug(subject)}-error"))
    parts = where_time_goes.data(subject.profile)
    if parts:
        found.append(where_time_goes.draw(parts, subject.profile, f"{_slug(subject)}-time"))
    return found


def render(story: Story) -> str:
    """The whole page as text. Without plotly installed the tables are there and each figure says what is missing."""
    drawing = plotly_js()
    parts = [_chip(subject, bool(drawing)) for subject in story.subjects]
    if not parts:
        parts = [el("p", "There are no results to show yet. `klab run --model qwen3-0.6b --chip auto` makes some.")]
    links = [(f"#{_slug(s)}", s.chip) for s in story.subjects] + [("#method", "method and environment"), ("#words", "words")]
    title = " ".join(["klab:", story.model or "results", *(f"on {s.chip}" for s in story.subjects[:1])])
    head = el(
        "head",
        el("meta", charset="utf-8"),
        el("meta", http_equiv="Content-Security-Policy", content=POLICY),
        el("meta", name="viewport", content="width=device-width, initial-scale=1"),
        el("meta", name="generator", content="klab"),
        el("title", title),
        el("style", Markup(_file("page.css"))),
    )
    scripts = [el("script", Markup(drawing)), el("script", Markup(_file("page.js")))] if drawing and story.subjects else []
    body = el(
        "body",
        strip.section(story),
        el("nav", [el("a", name, href=target) for target, name in links]),
        el("main", parts, method.section(story), glossary.section()),
        el("footer", el("p", _footer(story), class_="note")),
        scripts,
    )
    return f"<!doctype html>\n{el('html', head, body, lang='en')}\n"


def _chip(subject: Subject, drawing: bool) -> Markup:
    shown = [_figure(figure, drawing) for figure in figures(subject)]
    parts = [steps.section(subject), winners.section(subject), shown, method.limits(subject), failures.section(subject)]
    return el("article", el("h2", subject.title), parts, id=_slug(subject))


def _figure(figure: Figure, drawing: bool) -> Markup:
    heading = [el("h3", figure.title), el("figcaption", figure.caption)]
    if figure.empty or not drawing:
        return el("figure", heading, el("p", figure.empty or "Figures need plotly: pip install 'kernel-lab[analysis]'.", class_="empty"))
    without = el("noscript", el("p", "This figure needs a script; the tables do not."))
    value = {"data": figure.traces, "layout": figure.layout}
    return el("figure", heading, el("div", class_="plot", id=figure.identity), without, data_script(f"{figure.identity}-data", value))


def _footer(story: Story) -> str:
    places = ", ".join(story.sources)
    return f"Made by klab{f' from {places}' if places else ''}. Everything is in this file; it loads nothing."


def _slug(subject: Subject) -> str:
    return "chip-" + "".join(c if c.isalnum() else "-" for c in subject.chip.lower())


@cache
def _file(name: str) -> str:
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
