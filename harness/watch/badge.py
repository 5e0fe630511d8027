"""A night as a badge: the JSON that shields.io's endpoint badge reads (https://shields.io/badges/endpoint-badge)."""

from __future__ import annotations

import json

from klab.harness.watch.series import Call, Night
from klab.harness.watch.wording import counts, failing, line, ordered, plural


def badge(night: Night, *, strict: bool = False) -> str:
    """One JSON object. Red: the night fails; yellow: suspects or waivers; green: judged and fine; grey: nothing could be judged."""
    message, colour = _told(night, strict)
    said = {"schemaVersion": 1, "label": f"klab {line(night.chip, 40)}", "message": message, "color": colour}
    if colour == "red":
        said["isError"] = True
    return json.dumps(said) + "\n"


def _told(night: Night, strict: bool) -> tuple[str, str]:
    total, found = len(night.verdicts), counts(night)
    judged = total - found[Call.UNKNOWN]
    bad = failing(night, strict)
    expired = [plural(len(night.lapsed), "expired waiver")] if night.lapsed else []
    if bad:
        calls = list(dict.fromkeys(one.call for one in ordered(bad)))
        told = ", ".join(f"{sum(one.call == call for one in bad)} {call}" for call in calls) + f" of {total}"
        return ", ".join([told, *expired]), "red"
    if expired:
        return expired[0], "red"
    if night.incomplete:
        return f"ended early, {judged} of {total} judged", "yellow"
    if not judged:
        return f"0 of {total} judged" if total else "nothing watched", "lightgrey"
    doubtful = [f"{found[name]} {name}" for name in (Call.SUSPECT.value, "waived") if found[name]]
    text = f"{judged} of {total} judged" if judged < total else f"{total} series"
    return (f"{', '.join(doubtful)} of {total}", "yellow") if doubtful else (f"{text} ok", "brightgreen")
