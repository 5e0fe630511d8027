"""Who answers for what: waivers on failing verdicts, and new levels that were accepted."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from datetime import date
from fnmatch import fnmatchcase
from pathlib import Path

from klab.harness.choose.profile import write_text
from klab.harness.watch.policy import Accepted, Waiver, read_policy
from klab.harness.watch.series import Call, Lapsed, Night, Series, Verdict
from klab.kernels.errors import UsageError

# So many days before a waiver ends, its owner reads of it in every night.
WARN_DAYS = 7


def covers(glob: str, series: Series) -> bool:
    """Does a glob over names (`*` any text, `?` one character; brackets stand for themselves) or an identity name this series?"""
    pattern = re.sub(r"\[", "[[]", glob)
    return fnmatchcase(series.name, pattern) or glob in (series.name, series.identity)


def waive(verdicts: Iterable[Verdict], waivers: Sequence[Waiver], today: date) -> list[Verdict]:
    """The verdicts with those waivers noted that cover a failing one; one that has expired covers nothing, and the reason says so."""
    return [_waived(verdict, waivers, today) if Call(verdict.call).fails else verdict for verdict in verdicts]


def _waived(verdict: Verdict, waivers: Sequence[Waiver], today: date) -> Verdict:
    own = [waiver for waiver in waivers if covers(waiver.series, verdict.series)]
    standing = [waiver for waiver in own if not waiver.expired(today)]
    if standing:
        return dataclasses.replace(verdict, waiver=max(standing, key=lambda w: w.expires).label)
    if own:
        last = max(own, key=lambda w: w.expires)
        return dataclasses.replace(verdict, reason=f"{verdict.reason}; the waiver of {last.owner} expired on {last.expires}")
    return verdict


def lapsed(waivers: Sequence[Waiver], today: date) -> tuple[Lapsed, ...]:
    """The waivers that are past their last day, of whatever chip: every night of the policy fails until they are renewed or removed."""
    return tuple(dict.fromkeys(Lapsed(w.series, w.owner, str(w.expires), w.reason) for w in waivers if w.expired(today)))


def waiver_notes(verdicts: Sequence[Verdict], waivers: Sequence[Waiver], today: date) -> list[str]:
    """A line for each standing waiver that ends soon, covers nothing that is watched, or is not needed tonight."""
    notes = []
    for waiver in waivers:
        if waiver.expired(today):
            continue
        found = [v for v in verdicts if covers(waiver.series, v.series)]
        days = (waiver.expires - today).days
        who = f"waiver of {waiver.owner} for {waiver.series!r}"
        if not found:
            notes.append(f"{who} covers nothing that is watched here: mend its series or remove it")
        elif not any(Call(v.call).fails for v in found):
            notes.append(f"{who} was not needed tonight; it ends on {waiver.expires}")
        elif days <= WARN_DAYS:
            notes.append(f"{who} ends on {waiver.expires}, in {days} days; after that it fails every night until it is renewed or removed")
    return notes


def since_accepted(nights: Sequence[Night], accepted: Sequence[Accepted]) -> dict[str, int]:
    """For each series with an accepted new level: how many of its points in these nights (oldest first) are older than it."""
    found: dict[str, int] = {}
    for night in nights if accepted else ():
        for verdict in night.verdicts:
            moments = [one.since for one in accepted if covers(one.series, verdict.series)]
            if moments and verdict.point is not None:
                identity = verdict.series.identity
                found[identity] = found.get(identity, 0) + (night.at < max(moments))
    return found


def accept(policy: Path, series: str, owner: str, reason: str, nights: Mapping[str, Sequence[Night]], now: str) -> tuple[Accepted, int]:
    """Append an [[accept]] to the policy file; returns it and how many series it covers. UsageError where it covers none.

    It holds since the first of the nights in a row, up to the last, in which a covered series was slower; since `now` where none was.
    """
    if not owner.strip():
        raise UsageError("--accept needs --owner NAME: a new level has somebody who answers for it")
    read_policy(policy)
    covered: set[str] = set()
    starts: list[str] = []
    for own in nights.values():
        first = _first_slower(own, series)
        covered |= {v.series.identity for night in own for v in night.verdicts if covers(series, v.series)}
        starts += [first] if first else []
    if not covered:
        raise UsageError(f"--accept {series}: no series of the history has this name; `klab nightly --dry-run` shows the names")
    made = Accepted(series, owner.strip(), min(starts, default=now), reason.strip())
    lines = [
        f"series = {_quoted(made.series)}",
        f"owner = {_quoted(made.owner)}",
        f"since = {made.since}",
        f"reason = {_quoted(made.reason)}",
    ]
    before = policy.read_text(encoding="utf-8-sig")
    write_text(policy, before.rstrip("\n") + "\n\n" + "\n".join(["[[accept]]", *lines]) + "\n")
    try:
        read_policy(policy)
    except UsageError:
        write_text(policy, before)
        raise
    return made, len(covered)


def _first_slower(nights: Sequence[Night], glob: str) -> str:
    """When the first night of the unbroken row was, up to the last, in which some covered series was slower; "" without one."""
    start = ""
    for night in reversed(nights):
        own = [v for v in night.verdicts if covers(glob, v.series)]
        if own and not any(v.call == Call.SLOWER for v in own):
            break
        start = night.at if own else start
    return start


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
