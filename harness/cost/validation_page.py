"""The tables of a validation, and the page that holds them: what is written by hand around them stays."""

from __future__ import annotations

import bisect
import html
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from klab.harness.cost.estimate import ENOUGH
from klab.harness.cost.layer_check import LayerCheck
from klab.harness.cost.published import INFERENCEX
from klab.harness.cost.validation import GOAL_TPOT, GOAL_TTFT, Checked, Errors, Overhead, Summary, Validation, errors, summarise
from klab.kernels.errors import UsageError

BEGIN, END = "<!-- begin: klab validate -->", "<!-- end: klab validate -->"


@dataclass(frozen=True)
class Section:
    """A table with a title and words."""

    title: str
    words: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    @property
    def numbers(self) -> tuple[str, ...]:
        """Columns of numbers, to be aligned."""
        return tuple(name for name in self.columns if name in NUMBERS)


ERROR_COLUMNS = (
    "points", "covered", "TPOT error", "90%", "ratio", "in range", "TPOT replayed", "90% ", "ratio ", "TTFT replayed", "90%  ", "ratio  ",
    "TTFT steady",
)  # fmt: skip
OVERHEAD_COLUMNS = ("engine", "us per step", "quartiles", "ms before a first token", "and us per prompt token")
LAYER_COLUMNS = ("chip", "layer", "parts", "sum us", "whole us", "sum / whole", "95%", "without copies")
# Upper ends of the classes of requests in flight.
REQUESTS = (8, 32, 128)
NUMBERS = frozenset({*ERROR_COLUMNS, *OVERHEAD_COLUMNS[1:], "rows", *LAYER_COLUMNS[2:]})
READING = (
    "Errors are |predicted / measured - 1|: median and 90th percentile; ratio: median of predicted / measured. Aimed at: medians of "
    f"{GOAL_TPOT:.0%} (TPOT) and {GOAL_TTFT:.0%} (TTFT) where kernels are covered. TPOT is the steady state that klab cost gives; "
    "replayed: the benchmark itself, request by request, on the same steps. TTFT is a mean over all requests, those of the start "
    "included, so only the replay can be held to it; the steady state's (last column) is what a user meets later. In range: share of the "
    "measured TPOT between the predicted low and high. Covered: share of the predicted time on measured or reference kernels."
)
FITTED = (
    "Fitted on the covered points of one half of the deployments (by a hash of model, chip, engine, GPUs, format), never on the half that "
    "the next table judges. "
    "What they hold is whatever the kernels lack: the host between steps, and every error of the kernels' times that is alike everywhere."
)
WHOLE_LAYERS = (
    "One layer in one graph, measured on this chip, beside its parts measured alone: what composing steps of launches gets wrong."
)


def sections(found: Validation, layers: Sequence[LayerCheck] = ()) -> list[Section]:
    """The tables, the whole first."""
    made = []
    engine, deployment = ("campaign", "backend"), ("model", "chip", "backend", "quantization", "campaign")
    if found.checked:
        made.append(_errors("All points, no overhead assumed", READING, found.checked, ()))
        made.append(_errors("By engine, no overhead assumed", "", found.checked, engine))
        made.append(_errors("By model, chip and engine, no overhead assumed", "", found.checked, deployment))
        made.append(_errors("By requests in flight, no overhead assumed", "", found.checked, ("requests",)))
    if found.overheads:
        made.append(Section("Overheads of the engines", FITTED, OVERHEAD_COLUMNS, tuple(map(_overhead, sorted(found.overheads.items())))))
    if found.held_out:
        made.append(_errors("The other half of the deployments, with these overheads", "", found.held_out, ()))
        made.append(_errors("The same by engine", "", found.held_out, engine))
        made.append(_errors("The same by model, chip and engine", "", found.held_out, deployment))
    if found.skipped:
        left_out = sorted(found.skipped.items(), key=lambda item: -item[1])
        made.append(Section("Rows left out", "", ("rows", "why"), tuple((str(count), why) for why, count in left_out)))
    if layers:
        made.append(Section("Whole layers", WHOLE_LAYERS, LAYER_COLUMNS, tuple(map(_layer, layers))))
    return made


def _overhead(named: tuple[str, Overhead]) -> tuple[str, ...]:
    name, o = named
    return (
        name, f"{o.host_us.mid:.0f}", f"{o.host_us.low:.0f}..{o.host_us.high:.0f}", f"{o.first_s * 1e3:.0f}", f"{o.token_s * 1e6:.1f}"
    )  # fmt: skip


def _layer(one: LayerCheck) -> tuple[str, ...]:
    times = (f"{one.sum_us:.4g}", f"{one.whole_us:.4g}", f"{one.ratio:.3f}", f"{one.low:.3f}..{one.high:.3f}", f"{one.bare:.3f}")
    return (one.chip, one.title, str(one.parts), *times)


def _errors(title: str, words: str, checked: Sequence[Checked], by: Sequence[str]) -> Section:
    def name(one: Checked) -> tuple[str, ...]:
        return tuple(_requests(one) if field == "requests" else str(getattr(one.point, field)) or "bf16" for field in by)

    rows = tuple((*one.group, *_cells(one)) for one in summarise(checked, name))
    return Section(title, words, (*by, *ERROR_COLUMNS), rows)


def _requests(one: Checked) -> str:
    """Among how many requests in flight a point is, to be sorted as text."""
    at = bisect.bisect_left(REQUESTS, one.point.concurrency)
    low = REQUESTS[at - 1] + 1 if at else 1
    return f"{low:3d} to {REQUESTS[at]}" if at < len(REQUESTS) else f"{low:3d} and more"


def _cells(one: Summary) -> tuple[str, ...]:
    def three(e: Errors) -> tuple[str, str, str]:
        return (_percent(e.median), _percent(e.p90), _number(e.ratio))

    steady, again, first = three(one.tpot), three(one.tpot_replayed), three(one.ttft_replayed)
    return (str(one.tpot.count), _percent(one.covered), *steady, _percent(one.tpot.inside), *again, *first, _percent(one.ttft.median))


def _percent(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.0%}"


def _number(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.2f}"


def markdown(made: Sequence[Section], notes: Sequence[str]) -> str:
    """The tables as Markdown."""
    lines: list[str] = []
    for note in notes:
        lines.append(f"- {note}")
    for one in made:
        lines += ["", f"## {one.title}", ""]
        if one.words:
            lines += [one.words, ""]
        lines += [_line(one.columns), "|".join(["", *("---" for _ in one.columns), ""]), *map(_line, one.rows)]
    return "\n".join(lines).strip() + "\n"


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def page(made: Sequence[Section], notes: Sequence[str]) -> str:
    """The tables as a page of HTML that fetches nothing."""
    parts = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8"><title>klab: validation</title>',
        f"<style>{_CSS}</style></head><body>",
    ]
    parts += ["<h1>Predicted and measured</h1><ul>", *(f"<li>{html.escape(note)}</li>" for note in notes), "</ul>"]
    for one in made:
        head = "".join(f"<th>{html.escape(cell)}</th>" for cell in one.columns)
        body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in one.rows)
        parts.append(f"<h2>{html.escape(one.title)}</h2><p>{html.escape(one.words)}</p><table><tr>{head}</tr>{body}</table>")
    return "\n".join([*parts, "</body></html>"]) + "\n"


_CSS = (
    "body{font:15px/1.5 sans-serif;margin:2em auto;max-width:90em;padding:0 1em}"
    "table{border-collapse:collapse}td,th{border:1px solid #ccc;padding:.2em .5em;text-align:left}"
)


def writable(path: Path) -> None:
    """UsageError for a page that `write` would refuse: before minutes are spent on it."""
    if path.suffix not in (".md", ".html", ".htm"):
        raise UsageError(f"--out {path}: the page is a .md or an .html file")
    if path.suffix == ".md" and path.exists():
        _between_marks(path, "")


def _between_marks(path: Path, text: str) -> str:
    """The page with `text` between its marks."""
    try:
        before = path.read_text(encoding="utf-8") if path.exists() else f"# Predicted and measured\n\n{BEGIN}\n{END}\n"
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read {path}: {error}") from None
    if before.count(BEGIN) != 1 or before.count(END) != 1 or before.index(END) < before.index(BEGIN):
        raise UsageError(f"{path} has no place for the tables: it needs one line {BEGIN} and after it one line {END}")
    return before[: before.index(BEGIN) + len(BEGIN)] + "\n" + text + before[before.index(END) :]


def write(path: Path, made: Sequence[Section], notes: Sequence[str]) -> None:
    """Write the page; of a Markdown file that holds the two marks only what is between them is replaced. UsageError where it cannot be."""
    writable(path)
    text = _between_marks(path, markdown(made, notes)) if path.suffix == ".md" else page(made, notes)
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror}") from None


def goals(found: Validation) -> list[str]:
    """What was aimed at, met or missed, on the points 90% of whose predicted time is covered before any overhead is added."""
    covered = {one.point.id for one in found.checked if not one.why_not and one.covered >= ENOUGH}
    if not covered:
        return ["no point has 90% of its time on measured or reference kernels; nothing is judged"]
    lines = []
    for name, group in (("no overhead assumed", found.checked), ("overheads fitted on the other half", found.held_out)):
        judged = [one for one in group if one.point.id in covered and not one.why_not]
        public = [one for one in judged if one.point.campaign == INFERENCEX]
        for what, goal, error in (
            ("TPOT", GOAL_TPOT, errors([(one.tpot_s, one.point.tpot_s) for one in judged])),
            ("TTFT", GOAL_TTFT, errors([(one.replayed.ttft_s, one.point.ttft_s) for one in public if one.replayed])),
        ):
            if error.count:
                verdict = "met" if error.median <= goal else "missed"
                whose = "" if what == "TPOT" else " whose benchmark is public, replayed"
                figures = f"{error.median:.1%} median, {error.p90:.0%} at the 90th percentile"
                lines.append(f"{what}, {name}: {figures}, over {error.count} covered points{whose} (aimed at {goal:.0%}: {verdict})")
    return lines
