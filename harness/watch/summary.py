"""A night as GitHub shows it: the Markdown of a job summary, and annotations. Both have limits, and what is cut is said."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from klab.harness.watch.series import Call, Night, Verdict
from klab.harness.watch.wording import (
    change_of,
    commit_of,
    failing,
    fails,
    headline,
    joined,
    lapsed_lines,
    line,
    name_of,
    ordered,
    outcome,
    reason_of,
    value_of,
)

# GitHub refuses a step's summary above 1 MiB whole (docs.github.com, "Job summaries"); a quarter is left for what else the step writes.
LIMIT_BYTES = 768 << 10
# GitHub shows ten annotations of a step (docs.github.com, "Workflow commands"; the rest is dropped without a word).
ANNOTATIONS = 10
# Rows that are shown unfolded; a reader scrolls through the rest on the page.
NOTES = 40
COLUMNS = ("verdict", "series", "tonight", "against usual", "kernel", "why")


def summary(night: Night, earlier: Sequence[Night] = (), *, strict: bool = False, limit_bytes: int = LIMIT_BYTES) -> str:
    """The Markdown text, at most `limit_bytes` of UTF-8. Failing verdicts come first and are cut last.

    earlier: nights of the same chip, oldest first; they tell which failures are new.
    """
    head = _head(night, strict)
    before = _failed_before(earlier) if earlier else None
    loud = [one for one in ordered(night.verdicts) if one.call != Call.OK and one.call != Call.UNKNOWN]
    quiet = [one for one in ordered(night.verdicts) if one.call in (Call.OK, Call.UNKNOWN)]
    room = limit_bytes - len("\n".join(head).encode()) - 1000
    shown, room = _cut([_row(one, before, strict) for one in loud], room)
    lines = head
    if loud:
        lines += ["", _cells(COLUMNS), _cells(["---"] * len(COLUMNS)), *shown]
    if len(shown) < len(loud):
        lines += ["", f"{len(loud) - len(shown)} of these {len(loud)} rows are cut here: {_calls(loud[len(shown) :])}. The report has all."]
    rest, _ = _cut([_row(one, before, strict) for one in quiet], room)
    if quiet:
        lines += ["", f"<details><summary>{_calls(quiet)}</summary>", ""]
        lines += [_cells(COLUMNS), _cells(["---"] * len(COLUMNS)), *rest] if rest else []
        if len(rest) < len(quiet):
            lines += ["", f"{len(quiet) - len(rest)} of these {len(quiet)} rows are cut here; the report has all."]
        lines += ["", "</details>"]
    return "\n".join(lines) + "\n"


def github_annotations(night: Night, *, strict: bool = False, most: int = ANNOTATIONS) -> list[str]:
    """Workflow commands that GitHub shows beside a run, `most` at most: what fails, then suspects; the last says how many are left out."""
    told = [("error", "expired waiver", expired) for expired in lapsed_lines(night)]
    told += [("error", f"{one.call}: {name_of(one.series)}", reason_of(one)) for one in failing(night, strict)]
    doubtful = [one for one in ordered(night.verdicts) if one.call == Call.SUSPECT and not fails(one, strict)]
    told += [("warning", f"{one.call}: {name_of(one.series)}", reason_of(one)) for one in doubtful]
    room = most if len(told) <= most else most - 1
    found = [_command(*one) for one in told[:room]]
    if len(told) > room:
        level = told[0][0]
        found.append(_command(level, f"klab nightly {line(night.chip, 40)}", f"{len(told) - room} more; the job summary has them"))
    return found


def _command(level: str, title: str, text: str) -> str:
    """`::error title=...::...`, with what would end a property or the command written by its number (as @actions/core does it)."""
    plain = text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")
    name = title.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A").replace(":", "%3A").replace(",", "%2C")
    return f"::{level} title={name}::{plain}"


def _head(night: Night, strict: bool) -> list[str]:
    devices = joined(sorted(line(_device(uuid, known), 80) for uuid, known in night.devices.items()))
    facts = [
        f"night {night.identity}",
        f"commit {commit_of(night)}",
        devices,
        f"policy {line(night.policy, 100)}" if night.policy else "",
        f"{night.seconds / 60:.0f} min" if night.seconds >= 60 else f"{night.seconds:.0f} s",
    ]
    lines = [f"### klab nightly on {_safe(line(night.chip, 60))}: {outcome(night, strict)}", "", f"**{_safe(headline(night))}**", ""]
    lines.append(" · ".join(_safe(line(fact, 200)) for fact in facts if fact))
    if night.lapsed:
        expired = [f"- **expired waiver**: {_safe(told)}" for told in lapsed_lines(night)]
        lines += ["", *expired[:NOTES]]
        if len(expired) > NOTES:
            lines.append(f"- {len(expired) - NOTES} more expired waivers; the report has them")
    if night.notes:
        lines += ["", *(f"- {_safe(line(note))}" for note in night.notes[:NOTES])]
        if len(night.notes) > NOTES:
            lines.append(f"- {len(night.notes) - NOTES} more notes; the report has them")
    return lines


def _device(uuid: str, known: object) -> str:
    name = known.get("device") if isinstance(known, dict) else None
    return f"{name} {uuid}" if name else uuid


def _failed_before(earlier: Sequence[Night]) -> dict[str, int]:
    """For how many nights in a row, up to the last, each series has failed."""
    streak: dict[str, int] = {}
    ended: set[str] = set()
    for night in reversed(earlier):
        bad = {one.series.identity for one in night.verdicts if Call(one.call).fails}
        known = {one.series.identity for one in night.verdicts}
        ended |= known - bad
        for identity in bad - ended:
            streak[identity] = streak.get(identity, 0) + 1
    return streak


def _row(one: Verdict, before: dict[str, int] | None, strict: bool) -> str:
    since = before.get(one.series.identity, 0) if before else 0
    standing = f" (night {since + 1} of it)" if since and Call(one.call).fails else " (new)" if before is not None and one.fails else ""
    call = f"**{one.call}**{standing}" if fails(one, strict) else f"{one.call}{standing}"
    kernel = one.point.kernel.partition("/")[2] or one.point.kernel if one.point else ""
    cells = [name_of(one.series), value_of(one), change_of(one), line(kernel, 80), reason_of(one)]
    return _cells([call, *map(_safe, cells)])


def _cells(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _cut(rows: Sequence[str], room: int) -> tuple[list[str], int]:
    """As many rows as fit, and what room is left."""
    kept: list[str] = []
    for row in rows:
        size = len(row.encode()) + 1
        if size > room:
            return kept, 0
        room -= size
        kept.append(row)
    return kept, room


def _calls(verdicts: Sequence[Verdict]) -> str:
    names = [one.call for one in verdicts]
    return ", ".join(f"{names.count(name)} {name}" for name in dict.fromkeys(names))


def _safe(text: str) -> str:
    """Text as Markdown shows it: whatever could be markup is a character reference, so that no name makes a link, an image or a column."""
    return re.sub(r"[&<>|`*_\[\]!\\~#@$^{}]|(?<=:)//|(?<=www)\.", _reference, text)


def _reference(found: re.Match[str]) -> str:
    return "".join(f"&#{ord(c)};" for c in found[0])
