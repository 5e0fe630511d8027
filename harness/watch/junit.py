"""A night as JUnit XML: one test case per series, for whatever shows test results.

Kept to what the schemas of Ant (windyroad/JUnit-Schema) and of Jenkins' xUnit plugin both allow, because readers differ in which they
follow: at most one of failure, error and skipped in a case, no output inside a case, no attributes on the root.
"""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime

from klab.harness.watch.series import Call, Lapsed, Night, Verdict
from klab.harness.watch.wording import change_of, commit_of, fails, headline, lapsed_lines, line, name_of, ordered, reason_of, value_of
from klab.kernels.contract import digest


def junit(night: Night, *, strict: bool = False) -> str:
    """The XML text. slower (with `strict`: suspect) is a failure; broken and missing are errors; waived and unknown are skipped.
    An expired waiver is a failing case of its own.
    A night that ended early has a case more, an error: its exit code is no zero either.

    A case's time is 0: how long it took to measure one series is not recorded; the suite's is that of the night in seconds.
    """
    verdicts = ordered(night.verdicts)
    kinds = [_kind(one, strict) for one in verdicts]
    suite = ET.Element(
        "testsuite",
        {
            "id": "0",
            "package": "klab",
            "name": line(f"klab nightly {night.chip}", 300),
            "timestamp": _timestamp(night.at),
            "hostname": "localhost",
            "tests": str(len(verdicts) + bool(night.incomplete) + len(night.lapsed)),
            "failures": str(kinds.count("failure") + len(night.lapsed)),
            "errors": str(kinds.count("error") + bool(night.incomplete)),
            "skipped": str(kinds.count("skipped")),
            "time": f"{max(night.seconds, 0.0):.3f}",
        },
    )
    _properties(suite, night)
    for verdict, name, kind in zip(verdicts, _names(verdicts), kinds, strict=True):
        _case(suite, verdict, name, kind)
    for waiver in night.lapsed:
        _expired(suite, night, waiver)
    if night.incomplete:
        case = ET.SubElement(
            suite, "testcase", {"classname": _group("klab", night.chip, "night"), "name": "measured to its end", "time": "0"}
        )
        ET.SubElement(case, "error", {"message": line(night.incomplete), "type": "incomplete"})
    ET.SubElement(suite, "system-out").text = _output(night, verdicts)
    ET.SubElement(suite, "system-err")
    root = ET.Element("testsuites")
    root.append(suite)
    ET.indent(root)
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + ET.tostring(root, encoding="unicode") + "\n"


def _kind(verdict: Verdict, strict: bool) -> str:
    if verdict.waiver or verdict.call == Call.UNKNOWN:
        return "skipped"
    if not fails(verdict, strict):
        return ""
    return "error" if verdict.call in (Call.BROKEN, Call.MISSING) else "failure"


def _properties(suite: ET.Element, night: Night) -> None:
    found = {
        "chip": night.chip,
        "night": night.identity,
        "commit": commit_of(night),
        "policy": night.policy,
        "verdict": headline(night),
    }
    inside = ET.SubElement(suite, "properties")
    for name, value in found.items():
        if value:
            ET.SubElement(inside, "property", {"name": name, "value": line(value)})


def _names(verdicts: Sequence[Verdict]) -> list[str]:
    """A name per case, the same every night, and no two alike: readers follow a case by its name. What is cut gets a digest instead."""
    whole = [" ".join(line(part, 10_000) for part in (v.series.label, v.series.role, v.series.metric)) for v in verdicts]
    often = Counter((v.series.operator, name) for v, name in zip(verdicts, whole, strict=True))
    return [
        name if len(name) <= 300 and often[v.series.operator, name] == 1 else f"{line(name, 290)} {digest(v.series.identity)[:8]}"
        for v, name in zip(verdicts, whole, strict=True)
    ]


def _group(*parts: str) -> str:
    """Readers group by what stands before the last dot of the class: no other dots in it."""
    return ".".join(line(part, 100).replace(".", "_") for part in parts)


def _case(suite: ET.Element, verdict: Verdict, name: str, kind: str) -> None:
    series = verdict.series
    group = _group("klab", series.chip, series.operator)
    case = ET.SubElement(suite, "testcase", {"classname": group, "name": name, "time": "0"})
    if not kind:
        return
    reason = reason_of(verdict)
    told = ET.SubElement(case, kind, {"message": reason} if kind == "skipped" else {"message": reason, "type": verdict.call})
    told.text = "\n".join(f"{name}: {value}" for name, value in _details(verdict) if value)


def _expired(suite: ET.Element, night: Night, waiver: Lapsed) -> None:
    # Two waivers of one owner may begin alike for 200 characters: the digest keeps their cases apart.
    whole = digest([waiver.series, waiver.owner, waiver.expires, waiver.reason])[:8]
    name = f"waiver of {line(waiver.owner, 60)} for {line(waiver.series, 200)} {whole}"
    case = ET.SubElement(suite, "testcase", {"classname": _group("klab", night.chip, "waivers"), "name": name, "time": "0"})
    ET.SubElement(case, "failure", {"message": line(waiver.told), "type": "expired waiver"}).text = line(waiver.told)


def _details(verdict: Verdict) -> list[tuple[str, str]]:
    point = verdict.point
    return [
        ("verdict", verdict.call),
        ("series", name_of(verdict.series)),
        ("reason", reason_of(verdict)),
        ("tonight", value_of(verdict)),
        ("against the baseline", change_of(verdict)),
        ("nights in the baseline", str(verdict.nights or "")),
        ("kernel", line(point.kernel) if point else ""),
        ("configuration", line(" ".join(f"{k}={v}" for k, v in point.config.items())) if point else ""),
        ("status", line(f"{point.status}: {point.reason}" if point.reason else point.status) if point else ""),
        ("device", line(point.device_uuid) if point else ""),
    ]


def _output(night: Night, verdicts: Sequence[Verdict]) -> str:
    """What no failing case tells: the notes, and every verdict in a line."""
    lines = [headline(night), *lapsed_lines(night), *(f"note: {line(note)}" for note in night.notes)]
    lines += [" | ".join((one.call, name_of(one.series), value_of(one), change_of(one), reason_of(one))) for one in verdicts]
    return "\n".join(lines)


def _timestamp(at: str) -> str:
    """UTC without a zone, as Ant's schema wants it; the start of 1970 for a time that cannot be read."""
    try:
        found = datetime.fromisoformat(at)
    except ValueError:
        found = datetime(1970, 1, 1, tzinfo=UTC)
    return (found if found.tzinfo is None else found.astimezone(UTC)).strftime("%Y-%m-%dT%H:%M:%S")
