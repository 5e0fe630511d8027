"""The strip at the top: three sentences, then what was measured, where, when, with what, and how it ended."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping

from klab.harness.report.html import Markup, el, pairs
from klab.harness.report.sections.sentences import sentences
from klab.harness.report.subject import Story, Subject
from klab.harness.store.result import Result
from klab.harness.watch.wording import counts as calls
from klab.harness.watch.wording import line, plural

MOST_NAMES, MOST_CHIPS, MOST_WARNINGS = 4, 6, 30
LONGEST = 120
# The figure that a sentence is about: a ratio, a share, a time.
_FIGURE = re.compile(r"(?<![\w.])[\d.,]+(×|% (?=\()| (ns|µs|ms|s) (?=of kernel time))")
TOOLS = ("driver", "cuda", "torch", "triton", "cupy")
"""What of an environment is a driver or a toolchain."""


def section(story: Story) -> Markup:
    """The strip, with a list of what a reader must know before believing the rest."""
    rows = [row for subject in story.subjects for row in (*subject.rows, *subject.light)]
    published = sum(len(subject.reference) for subject in story.subjects)
    facts: list[tuple[str, object]] = [
        ("Chip and device", _lines([_chip(subject) for subject in story.subjects[:MOST_CHIPS]], len(story.subjects), "chips") or "none"),
        ("Model", _model(story)),
        ("Measured", _when(rows)),
        ("Commit", _commits(rows)),
        ("Driver and toolchain", _lines(_tools(rows), 0, "") or "not recorded"),
        ("Results", _statuses(story.statuses) + (f"; beside them {published} published" if published else "")),
        ("Verdicts of the newest night", _lines(_nights(story), 0, "") or None),
        ("Problems with a choice", _lines([_choices(subject) for subject in story.subjects[:MOST_CHIPS]], len(story.subjects), "chips")),
        ("Of a step's roofline time", _lines(_covered(story), 0, "") or None),
    ]
    told = [el("div", el("dt", one.topic), el("dd", [el("p", _marked(said)) for said in one.lines])) for one in sentences(story)]
    shown = pairs((name, value) for name, value in facts if value is not None)
    return el("header", el("h1", "klab report"), el("dl", told, class_="sentences"), shown, _warnings(story), class_="strip")


def _marked(said: str) -> list[object]:
    """A sentence with its first figure in bold, and commands (between backticks) as such."""
    parts: list[object] = []
    figure = _FIGURE.search(said)
    texts = [said[: figure.start()], said[figure.start() : figure.end()], said[figure.end() :]] if figure else [said]
    for n, text in enumerate(texts):
        if n == 1:
            parts.append(el("b", text))
        else:
            parts += [el("code", part) if at % 2 else part for at, part in enumerate(text.split("`"))]
    return parts


def _lines(told: list[str], total: int, what: str) -> Markup | None:
    """Each in a line of its own, and how many are left out."""
    rest = [f"and {total - len(told)} more {what}"] if total > len(told) else []
    return el("span", [el("span", one, class_="line") for one in [*told, *rest]]) if told else None


def _chip(subject: Subject) -> str:
    device = subject.profile.device or "no valid result yet"
    return f"{line(subject.chip, LONGEST)}: {line(device, LONGEST)}"


def _model(story: Story) -> str:
    if not story.model:
        found = Counter(place.model for places in story.occurs.values() for place in {p.model: p for p in places if p.model}.values())
        named = [name for name, _ in found.most_common()]
        return f"every problem in the store{f'; they occur in {_some(named)}' if named else ''}"
    scenario = ", ".join(f"{name} {_value(value)}" for name, value in story.scenario.items())
    return f"{line(story.model, LONGEST)} ({line(scenario)})" if scenario else line(story.model, LONGEST)


def _value(value: object) -> str:
    return "/".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _when(rows: list[Result]) -> str:
    days = sorted({row.recorded_at[:10] for row in rows})
    return "nothing yet" if not days else days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}"


def _commits(rows: list[Result]) -> str:
    """The commits that the rows were measured from, newest first; a row says whether its checkout had been changed."""
    found: dict[str, None] = {}
    for row in sorted(rows, key=lambda r: r.recorded_at, reverse=True):
        commit = row.environment.get("commit")
        if commit:
            found.setdefault(line(commit, 40)[:12] + (" with changes" if row.environment.get("dirty") else ""))
    return _some(list(found), 3) or "not recorded"


def _tools(rows: list[Result]) -> list[str]:
    """By name the versions that rows record, the one of most rows first."""
    told = []
    for name in TOOLS:
        found = Counter(line(value, 40) for row in rows if (value := row.environment.get(name)))
        if found:
            told.append(f"{name} {_some([version for version, _ in found.most_common()], 3)}")
    return told


def _statuses(counts: Counter[str]) -> str:
    total = sum(counts.values())
    return f"{total}: {_counted(counts)}" if total else "none"


def _counted(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in sorted(counts.items(), key=lambda item: (-item[1], item[0])) if count)


def _nights(story: Story) -> list[str]:
    newest = [(chip, nights[-1]) for chip, nights in story.nights.items() if nights]
    return [
        f"{line(chip, LONGEST)}, {line(night.at, 40)[:10]}: {_counted(calls(night)) or 'no series was watched'}"
        for chip, night in newest[:MOST_CHIPS]
    ]


def _choices(subject: Subject) -> str:
    """How many problems have a choice, and for how many it is a kernel of klab's own (which may be in a tie)."""
    choices = subject.profile.choices
    total = len(choices) + len(subject.profile.open)
    chip = line(subject.chip, LONGEST)
    if not choices:
        return f"{chip}: none of {total} problems has a valid result"
    own = sum(not choice.library for choice in choices)
    return f"{chip}: {len(choices)} of {plural(total, 'problem')}; own kernels for {own}, libraries for {len(choices) - own}"


def _covered(story: Story) -> list[str]:
    """For each plan and phase, the share of the roofline's time that problems with a choice stand for, by its largest step."""
    told = []
    for subject in story.subjects:
        plan = story.plans.get(subject.chip)
        if plan is None:
            continue
        chosen = {choice.wanted.problem_key for choice in subject.profile.choices}
        for phase in dict.fromkeys(phase for phase, _ in plan.steps):
            batch = max(batch for one, batch in plan.steps if one == phase)
            rows = plan.step(phase, batch)
            whole = sum(row.count * row.bound_us for row in rows)
            having = sum(row.count * row.bound_us for row in rows if row.problem is not None and row.problem.key in chosen)
            if whole:
                told.append(f"{line(subject.chip, LONGEST)}, {phase} batch {batch}: {100 * having / whole:.0f}% has a choice (modelled)")
    return told


def _some(names: list[str], most: int = MOST_NAMES) -> str:
    rest = len(names) - most
    return ", ".join(names[:most]) + (f" and {rest} more" if rest > 0 else "")


def _warnings(story: Story) -> Markup | None:
    lines: list[object] = [f"{subject.chip}: {note}" for subject in story.subjects for note in subject.profile.notes]
    lines += [f"{subject.chip}: {subject.limits.reason}" for subject in story.subjects if subject.limits.reason]
    lines += [*story.notes, *story.reading]
    if not lines:
        return None
    first, rest = _items(lines[:MOST_WARNINGS]), lines[MOST_WARNINGS:]
    more = el("details", el("summary", f"{len(rest)} more"), el("ul", _items(rest))) if rest else None
    return el("aside", el("h2", "Know before reading"), el("ul", first), more, class_="warnings")


def _items(lines: Iterable[object]) -> list[Markup]:
    return [el("li", one) for one in lines]
