"""The strip at the top: what was measured, where, when, from which commit, and how it ended."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from klab.harness.report.html import Markup, el, pairs
from klab.harness.report.subject import Story, Subject
from klab.harness.store.result import Result


def section(story: Story) -> Markup:
    """The strip, with a list of what a reader must know before believing the rest."""
    rows = [row for subject in story.subjects for row in subject.rows]
    facts: list[tuple[str, object]] = [
        ("Chip", ", ".join(subject.chip for subject in story.subjects) or "none"),
        ("Device", ", ".join(dict.fromkeys(s.profile.device for s in story.subjects if s.profile.device)) or "no valid result yet"),
        ("Model", _model(story)),
        ("Measured", _when(rows)),
        ("Commit", _commits(rows)),
        ("Results", _statuses(story.statuses)),
        ("Choices", el("span", [el("span", _choices(subject), class_="line") for subject in story.subjects])),
    ]
    return el("header", el("h1", "klab report"), pairs(facts), _warnings(story))


def _model(story: Story) -> str:
    if not story.model:
        return "every problem in the store"
    scenario = ", ".join(f"{name} {_value(value)}" for name, value in story.scenario.items())
    return f"{story.model} ({scenario})" if scenario else story.model


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
            found.setdefault(str(commit)[:12] + (" with changes" if row.environment.get("dirty") else ""))
    names = list(found)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "") if names else "not recorded"


def _statuses(counts: Counter[str]) -> str:
    total = sum(counts.values())
    if not total:
        return "none"
    return f"{total}: " + ", ".join(f"{count} {status}" for status, count in sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def _choices(subject: Subject) -> str:
    """How many problems have a choice, and how many of them a kernel of klab's own wins."""
    choices = subject.profile.choices
    total = len(choices) + len(subject.profile.open)
    if not choices:
        return f"{subject.chip}: none of {total} problems has a valid result"
    own = sum(not choice.library for choice in choices)
    return f"{subject.chip}: {len(choices)} of {total} problems; own kernels win {own}, libraries {len(choices) - own}"


def _warnings(story: Story) -> Markup | None:
    lines: list[object] = [f"{subject.chip}: {note}" for subject in story.subjects for note in subject.profile.notes]
    lines += [f"{subject.chip}: {subject.limits.reason}" for subject in story.subjects if subject.limits.reason]
    lines += [*story.notes, *story.reading]
    return el("aside", el("h2", "Know before reading"), el("ul", _items(lines)), class_="warnings") if lines else None


def _items(lines: Iterable[object]) -> list[Markup]:
    return [el("li", line) for line in lines]
