"""The page of a night: verdicts, the history of every series with its changes, epochs and waivers. One file that fetches nothing."""

from __future__ import annotations

from collections.abc import Sequence

from klab.harness.report.curve import Curve, Historian, curves
from klab.harness.report.figures import history
from klab.harness.report.figures.style import Figure
from klab.harness.report.html import el
from klab.harness.report.sections import night as night_section
from klab.harness.report.sections import night_changes, night_verdicts
from klab.harness.report.shell import document, framed_all, plotly_js
from klab.harness.watch.changes import change_points
from klab.harness.watch.series import Call, Night
from klab.harness.watch.wording import headline, line, ordered

# Series with a figure of their own: what fails or is doubtful, and what changed its level lately. The others share one per operator.
OWN_FIGURES = 16
# Nights back within which a change of level is news.
LATELY = 14
# Nights that are drawn: a season, or as many as keep the page of very many series near ten megabytes, but a month.
NIGHTS, POINTS, LEAST_NIGHTS = 120, 40_000, 30


def night_page(night: Night, earlier: Sequence[Night], changes: Historian = change_points, *, strict: bool = False) -> str:
    """The page as text. earlier: the nights of the same chip before this one, oldest first.

    changes: the historian of change points (default: `watch.changes.change_points`). Without plotly installed the tables are there and
    each figure says what is missing.
    """
    most = max(LEAST_NIGHTS, min(NIGHTS, POINTS // max(len(night.verdicts), 1)))
    before = [one for one in earlier if one.identity != night.identity][-(most - 1) :]
    nights = [*before, night]
    found = curves(nights, changes)
    drawing = plotly_js() if night.verdicts else ""
    drawn = _figures(night, nights, found)
    waived = night_changes.waivers(night)
    links = [("verdicts", "verdicts"), ("changes", "changes of level"), ("history", "history"), ("epochs", "epochs"), ("words", "words")]
    content = [
        night_section.strip(night, earlier, strict),
        el("nav", [el("a", name, href=f"#{target}") for target, name in links]),
        el(
            "main",
            night_verdicts.section(night, found, len(nights)),
            waived,
            night_changes.changes(found),
            el("section", el("h2", "History"), el("p", history.READING, class_="note"), framed_all(drawn, bool(drawing)), id="history"),
            night_changes.epochs(nights, found),
            night_section.words(),
        ),
        el("footer", el("p", "Made by klab nightly. Everything is in this file; it loads nothing.", class_="note")),
    ]
    title = f"klab nightly {line(night.chip, 60)}: {headline(night)}"
    return document(title, content, figures=drawn, drawing=drawing, styles=("page.css", "night.css"))


def _figures(night: Night, nights: Sequence[Night], found: dict[str, Curve]) -> list[Figure]:
    if not found:
        return []
    in_order = [found[one.series.identity] for one in ordered(night.verdicts)]
    loud = {one.series.identity for one in night.verdicts if one.call not in (Call.OK, Call.UNKNOWN)}
    news = [c for c in in_order if c.series.identity in loud or any(s.index >= len(c.places) - LATELY for s in c.steps)]
    own = [curve for curve in news if curve.measured][:OWN_FIGURES]
    drawn = [history.draw(curve, f"history-{n}") for n, curve in enumerate(own)]
    drawn.append(history.draw_map(in_order, [one.at for one in nights], "history-map"))
    rest = {curve.series.identity: curve for curve in in_order if curve not in own}
    for n, (operator, group) in enumerate(history.by_operator(rest).items()):
        title = f"{line(operator, 60)}: {'the other series' if own else 'all series'}"
        drawn.append(history.draw_menu(group, f"history-operator-{n}", title))
    return drawn
