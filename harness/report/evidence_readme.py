"""The README of a chip's recorded evidence: how it was made, what it covers, what it says. Every number in it is of the rows."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from klab.harness.choose.evidence_repeats import Repeats
from klab.harness.choose.goals import Verdict
from klab.harness.choose.profile import Profile
from klab.harness.measure.calibration import Calibration
from klab.harness.report.evidence_coverage import Covered
from klab.harness.report.evidence_energy import Joules
from klab.harness.report.evidence_failures import Failures
from klab.harness.report.evidence_gaps import LOSES, WINS, Again, Gap, standings
from klab.harness.report.evidence_markdown import count, plain, ratio, table
from klab.harness.report.evidence_readme_device import calibration_text, energy_text, failures_text
from klab.harness.report.evidence_readme_search import repeat_text, search_text
from klab.harness.report.evidence_search import ToBest
from klab.harness.report.evidence_sittings import Seat
from klab.harness.report.units import interval, number, percent, speed_up, sum_time, time
from klab.harness.store.result import Result
from klab.harness.tune.device_tests_kept import Failed
from klab.harness.tune.objective import latency

LISTED, WON = 10, 5
# Below this a launch is mostly the cost of launching, whatever the kernel.
LONG_US = 10.0


@dataclass(frozen=True)
class About:
    """All that the text is made of. where: the folder, as a reader of the repository names it."""

    chip: str
    title: str
    where: str
    rows: int
    reading: Sequence[str]
    seats: Sequence[Seat]
    covered: Sequence[Covered]
    gaps: Sequence[Gap]
    again: Sequence[Again]
    energy: Sequence[Joules]
    failures: Failures
    failed_tests: Sequence[Failed]
    calibrations: Sequence[Calibration]
    packs: Mapping[str, Profile]
    goals: Sequence[Verdict]
    repeats: Repeats
    searches: Sequence[ToBest]
    files: Sequence[str]
    lines: Sequence[str]
    bytes: Mapping[str, int]


def readme(about: About) -> str:
    """Markdown."""
    parts = [
        f"# Recorded evidence: {about.title}",
        f"Written by `klab evidence --finish` from {count(about.rows, 'row')}. Times and joules were measured on this chip unless "
        "they are called modelled (rooflines, from the specification's peaks) or replayed. Intervals are 95%, from the rounds of one "
        "sitting; how far sittings differ is told under Repeatability.",
        _made(about),
        _covers(about),
        calibration_text(about.calibrations),
        _findings(about),
        _models(about),
        _goals(about.goals),
        energy_text(about.energy),
        search_text(about.searches),
        repeat_text(about.repeats, about.again),
        failures_text(about.failures, about.failed_tests),
        _files(about),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _made(about: About) -> str:
    cells = [
        (
            seat.at[:10] or "unknown",
            seat.run_id,
            f"{seat.device or 'unknown'}" + (f" ({', '.join(uuid[:12] for uuid in seat.uuids)})" if seat.uuids else ""),
            ", ".join(f"{name} {version}" for name, version in seat.versions.items()) or "not recorded",
            "not read" if seat.clocks_mhz is None else f"{seat.clocks_mhz[0]:.0f} to {seat.clocks_mhz[1]:.0f} MHz",
            seat.commit or "not recorded",
            "none" if seat.budget_s is None else f"{seat.budget_s:.0f} s",
            ", ".join(f"{part} {seconds:.0f} s" for part, seconds in seat.parts) or "not noted",
            f"{seat.rows:,}",
        )
        for seat in about.seats
    ]
    columns = ("date", "run", "device", "driver and versions", "SM clocks", "commit", "budget", "parts", "rows")
    again = f"`klab evidence --chip {about.chip} --out {about.where} --budget 9m` goes on where the last sitting ended."
    return "## How it was made\n\n" + table(columns, cells) + f"\n\n{again}" + "".join(f"\n\n{plain(line)}" for line in about.reading)


def _covers(about: About) -> str:
    cells = [(one.part, one.state, f"{one.seconds:.0f}", one.holds, one.missing) for one in about.covered]
    return "## What it covers\n\n" + table(("part", "state", "seconds", "in the rows", "missing"), cells)


def _findings(about: About) -> str:
    compared = standings(about.gaps)
    if not about.gaps:
        return "## Findings\n\nNo valid time was recorded, so nothing can be said of any kernel."
    text = ["## Findings"]
    if compared:
        wins, loses, all_of = (sum(getattr(one, name) for one in compared) for name in ("wins", "loses", "compared"))
        text.append(
            f"On {count(all_of, 'problem')} klab's fastest own kernel was measured beside a library: it is faster on {wins}, slower on "
            f"{loses}, and on {all_of - wins - loses} the two cannot be told apart."
        )
        shares = _shares(about.gaps)
        cells = [
            (one.operator, one.compared, one.wins, one.loses, one.ties, ratio(*one.mean), shares.get(one.operator, "")) for one in compared
        ]
        columns = ("operator", "problems", "own faster", "own slower", "tied", "library over own, geometric mean", "of the roofline")
        text.append(table(columns, cells))
        text.append(
            f"The last column is the median share (least to most) of the roofline that the fastest kernel reaches, over the operator's "
            f"problems whose roofline time (modelled) is {number(LONG_US)} µs or more."
        )
    else:
        text.append("No problem has both a kernel of klab's own and a library with a valid time.")
    text += _sides(about.gaps)
    text += _beyond(about.gaps)
    text += _far(about.gaps)
    return "\n\n".join(text)


def _sides(gaps: Sequence[Gap]) -> list[str]:
    """The largest losses and wins against libraries."""
    columns = ("problem", "klab's own", "its time", "library", "its time", "library over own")
    text = []
    for verdict, most, heading, sign in (
        (LOSES, LISTED, "The largest gaps to a library", 1.0),
        (WINS, WON, "The largest leads over a library", -1.0),
    ):
        found = sorted((g for g in gaps if g.verdict == verdict and g.over), key=lambda g: sign * (g.over.ratio if g.over else 0.0))
        cells = [
            (g.problem, _kernel(g.own), _timed(g.own), _kernel(g.library), _timed(g.library), ratio(g.over.ratio, g.over.low, g.over.high))
            for g in found[:most]
            if g.over
        ]
        if cells:
            more = f" ({len(cells)} of {len(found)})" if len(found) > len(cells) else ""
            text += [f"### {heading}{more}", table(columns, cells)]
    return text


def _beyond(gaps: Sequence[Gap]) -> list[str]:
    """What cannot be, and asks for an explanation."""
    found = [one for one in gaps if one.share is not None and one.share[1] > 1.0]
    if not found:
        return []
    shown = "; ".join(f"{plain(one.problem)} {percent(one.share[0])}" for one in found[:LISTED] if one.share)
    more = f"; and {len(found) - LISTED} more" if len(found) > LISTED else ""
    return [
        f"On {count(len(found), 'problem')} the fastest kernel takes less than its roofline: a part of the bytes never left the caches, or "
        f"the specification's peak is not this device's. {shown}{more}"
    ]


def _far(gaps: Sequence[Gap]) -> list[str]:
    known = [(g, g.share, g.bound_us) for g in gaps if g.share is not None and g.bound_us is not None and g.bound_us >= LONG_US]
    if not known:
        return [f"No problem whose roofline time is {number(LONG_US)} µs or more has a valid time and a known limit."]
    cells = [
        (g.problem, _kernel(g.fastest), _timed(g.fastest), time(us), f"{percent(share[0])} ({percent(share[1])} to {percent(share[2])})")
        for g, share, us in sorted(known, key=lambda one: one[1][0])[:LISTED]
    ]
    heading = f"### Farthest from the roofline (fastest kernels, {len(cells)} of {count(len(known), 'problem')})"
    rule = f"Only problems whose roofline time (modelled) is {number(LONG_US)} µs or more."
    return [heading, rule, table(("problem", "fastest", "measured", "roofline", "share"), cells)]


def _shares(gaps: Iterable[Gap]) -> dict[str, str]:
    found: dict[str, list[float]] = defaultdict(list)
    for one in gaps:
        if one.share is not None and (one.bound_us or 0.0) >= LONG_US:
            found[one.operator].append(one.share[0])
    return {
        operator: f"{percent(statistics.median(values))} ({percent(min(values))} to {percent(max(values))})"
        for operator, values in found.items()
    }


def _models(about: About) -> str:
    cells = [
        (
            name,
            f"{step.phase}, batch {step.batch}",
            sum_time(step.us, step.open),
            time(step.library_us) if step.library_us else "not all measured",
            speed_up(step.library_us, step.us, step.open),
        )
        for name, profile in about.packs.items()
        for step in profile.steps
    ]
    if not cells:
        return ""
    note = "Sums of medians over the launches of a step; work that klab has no kernels for is not in them."
    columns = ("pack", "step", "chosen kernels", "best libraries", "library over chosen")
    return "## What the packs come to\n\n" + note + "\n\n" + table(columns, cells)


def _goals(goals: Sequence[Verdict]) -> str:
    cells = [
        (
            one.goal.name,
            f"{one.goal.least:.2f}",
            "" if one.figure is None or one.low is None or one.high is None else f"{one.figure:.3f} ({one.low:.3f} to {one.high:.3f})",
            len(one.problems) or "",
            one.verdict + (f": {one.reason}" if one.reason else ""),
        )
        for one in goals
    ]
    return "## Goals\n\n" + table(("goal", "at least", "figure", "problems", "verdict"), cells)


def _files(about: About) -> str:
    compact = about.bytes.get("results.jsonl.gz")
    size = f" ({compact / max(about.rows, 1):,.0f} bytes a row)" if compact else ""
    listing = "\n".join(f"- `{name}`" for name in about.files)
    notes = "\n".join(f"- {plain(line)}" for line in about.lines)
    commands = f"""```
klab results --results {about.where}
klab goals --chip {about.chip} --results {about.where} --details
klab report --results {about.where} --chip {about.chip} --open
python -c 'from klab.harness.store import load; print(load("{about.where}").groupby("operator").median_us.describe())'
```"""
    text = [
        "## Reading it",
        commands,
        f"`results.jsonl.gz` has every row with its rounds, clocks and power{size}; `report.html` is made anew by `--finish` and is not in "
        "the repository. Files made of the rows:",
        listing or "none",
        notes,
    ]
    return "\n\n".join(part for part in text if part)


def _kernel(row: Result | None) -> str:
    return row.kernel.partition("/")[2] if row else ""


def _timed(row: Result | None) -> str:
    found = latency(row) if row else None
    return f"{time(found.median)} ({interval(found.low, found.high)})" if found else ""
