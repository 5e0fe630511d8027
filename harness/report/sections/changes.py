"""What changed: the choices beside those without the newest run, and what the newest night says."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from klab.harness.choose.profile import Choice, Profile
from klab.harness.report.html import Cell, Line, Markup, el, table
from klab.harness.report.limits import dtype_of
from klab.harness.report.subject import Story, Subject
from klab.harness.report.units import interval, time, times
from klab.harness.store.result import Result, Status
from klab.harness.watch.series import Call, Night, Verdict
from klab.harness.watch.wording import (
    change,
    change_of,
    commit_of,
    headline,
    line,
    name_of,
    ordered,
    outcome,
    plural,
    reason_of,
    value_of,
)
from klab.kernels.contract import canonical_json

COLUMNS = ("What", "Problem", "Before", "Now", "Time now over before", "Why")
NIGHT_COLUMNS = ("Verdict", "Series", "Tonight", "Against usual", "Why")
MOST_ROWS, LONGEST_REASON = 200, 300
# In the order of the table: what is worst first.
KINDS = {
    "fails": "fails newly",
    "lost": "lost its choice",
    "slower": "slower",
    "other": "another winner",
    "faster": "faster",
    "new": "got a choice",
}
QUIET = (Call.OK, Call.UNKNOWN)


@dataclass(frozen=True)
class Change:
    """What is different for a problem (or for a kernel that fails). `ratio` is the time now over that before, with the interval that both
    intervals at their worst allow; None where one of the two is missing, or they are of different devices. `winner`: another kernel or
    configuration is chosen now.
    """

    kind: str
    problem: str
    problem_key: str
    operator: str
    dtype: str
    kernel: str
    before: Choice | None = None
    now: Choice | None = None
    ratio: tuple[float, float, float] | None = None
    winner: bool = False
    status: str = Status.OK.value
    reason: str = ""


def changes_of(story: Story, subject: Subject) -> list[Change] | None:
    """What the newest run of a chip changed, worst first; None where there is nothing to compare with."""
    before = story.before.get(subject.chip)
    if before is None:
        return None
    then = {choice.wanted.problem_key: choice for choice in before.choices}
    now = {choice.wanted.problem_key: choice for choice in subject.profile.choices}
    reasons = {one.wanted.problem_key: one.reason for one in subject.profile.open}
    same = _same_device(before, subject)
    found = [_change(then.get(key), now.get(key), reasons.get(key, ""), same) for key in dict.fromkeys([*then, *now])]
    failing = _failing(story, subject)
    order = list(KINDS)
    told = [one for one in found if one is not None] + failing
    return sorted(told, key=lambda one: (order.index(one.kind), -abs((one.ratio or (1.0,))[0] - 1), one.problem))


def _change(then: Choice | None, now: Choice | None, reason: str, same_device: bool) -> Change | None:
    known = now or then
    assert known is not None
    wanted = known.wanted
    dtype = str(wanted.problem.get("dtype", "bfloat16"))
    kind, ratio, winner = "", None, False
    if not same_device and (then is None or now is None):
        return None
    if now is None:
        kind = "lost"
    elif then is None:
        kind = "new"
    else:
        winner = (then.kernel, canonical_json(then.config), then.instead) != (now.kernel, canonical_json(now.config), now.instead)
        if same_device:
            a, b = now.evidence, then.evidence
            ratio = a.median_us / b.median_us, a.interval_us[0] / b.interval_us[1], a.interval_us[1] / b.interval_us[0]
        kind = "slower" if ratio and ratio[1] > 1 else "faster" if ratio and ratio[2] < 1 else "other" if winner else ""
        if winner:
            reason = f"settled by {now.evidence.settled_by}" if now.evidence.tied_count else "the fastest now"
        if then.evidence.epoch != now.evidence.epoch:
            reason = "; ".join(filter(None, (reason, "driver or toolchain changed in between")))
    if not kind:
        return None
    return Change(kind, wanted.label, wanted.problem_key, wanted.operator, dtype, known.kernel, then, now, ratio, winner, reason=reason)


def _failing(story: Story, subject: Subject) -> list[Change]:
    """A line for each kernel and status that failed so in the newest run and in none before it, and for those that failed where the same
    trial had a valid time before. What cannot run here is no failure.
    """
    newest, known = story.newest_run.get(subject.chip, ""), story.failed_before.get(subject.chip, frozenset())
    fine = {row.key for row in (*subject.rows, *subject.light) if row.status is Status.OK and row.run_id != newest}
    groups: dict[tuple[str, Status], list[Result]] = {}
    for row in subject.failed:
        if not newest or row.run_id != newest or row.status is Status.UNSUPPORTED:
            continue
        if (row.kernel, row.status.value) not in known or (row.key in fine and (row.key, row.status.value) not in known):
            groups.setdefault((row.kernel, row.status), []).append(row)
    found = []
    for (kernel, status), group in groups.items():
        one = group[0]
        more = f" (and {len(group) - 1} more rows)" if len(group) > 1 else ""
        problem = f"{one.problem_label}{more}"
        known_as = (one.problem_key, one.operator, dtype_of(one), kernel)
        found.append(Change("fails", problem, *known_as, status=status.value, reason=one.reason or "no reason recorded"))
    return found


def moved(story: Story, subject: Subject) -> str:
    """That the choices of the newest run are of another device than those before it; "" where they are not."""
    before = story.before.get(subject.chip)
    if before is None or _same_device(before, subject):
        return ""
    return f"the choices are of another device ({line(subject.profile.device)}; before: {line(before.device)}), so times are not compared"


def _same_device(before: Profile, subject: Subject) -> bool:
    return not before.device or not subject.profile.device or before.device == subject.profile.device


def summary(found: Sequence[Change], before: Profile) -> str:
    """`of 14 problems 2 have another winner, 1 became faster, ...`: no full stop, no chip."""
    counts = Counter(one.kind for one in found)
    winners = sum(one.winner for one in found)
    parts = [
        f"{winners} {'has' if winners == 1 else 'have'} another winner" if winners else "",
        f"{counts['faster']} became faster and {counts['slower']} slower beyond both 95% intervals"
        if counts["faster"] or counts["slower"]
        else "",
        f"{counts['new']} got a choice" if counts["new"] else "",
        f"{counts['lost']} lost theirs" if counts["lost"] else "",
    ]
    said = ", ".join(filter(None, parts)) or "none has another winner or a time that moved beyond its 95% interval"
    total = len({choice.wanted.problem_key for choice in before.choices} | {one.problem_key for one in found if one.kind != "fails"})
    fails = f"; {plural(counts['fails'], 'kernel')} {'fails' if counts['fails'] == 1 else 'fail'} newly" if counts["fails"] else ""
    return f"of {plural(total, 'problem')} {said}{fails}" if total else f"no problem had or has a choice{fails}"


def news(story: Story, subject: Subject) -> str:
    """What the newest run changed, in words without a full stop; "" where there is nothing to compare with."""
    found, before = changes_of(story, subject), story.before.get(subject.chip)
    if found is None or before is None:
        return ""
    elsewhere = moved(story, subject)
    return "; ".join(filter(None, (elsewhere, "" if elsewhere and not found else summary(found, before))))


def section(story: Story) -> Markup:
    """For each chip what the newest run changed, and the newest night."""
    parts: list[object] = []
    apart = [subject for subject in story.subjects if story.before.get(subject.chip) is None and not story.nights.get(subject.chip)]
    for subject in story.subjects:
        if subject not in apart:
            parts.append(el("article", el("h3", subject.title), _run(story, subject), _night(story, subject), data_chip=subject.chip))
    if apart:
        chips = ", ".join(subject.chip for subject in apart[:10]) + (f" and {len(apart) - 10} more" if len(apart) > 10 else "")
        words = f"Nothing to compare with yet on {chips}: a second run into the same store, or a night (klab nightly), is needed."
        parts.append(el("p", words))
    return el("div", parts, class_="changes")


def _run(story: Story, subject: Subject) -> list[object]:
    found = changes_of(story, subject)
    if found is None:
        return [el("p", "All results of this chip are of one run, so there are no earlier choices to compare with.")]
    newest = story.newest_run.get(subject.chip, "")
    words = f"Since the newest run{f' ({newest})' if newest else ''}: {news(story, subject)}."
    note = (
        "The choices from all results beside those without the newest run. The intervals are of single runs; how much runs differ from one "
        "another is what the night watch (klab nightly) learns."
    )
    shown = table(
        COLUMNS,
        [_line(story, subject, one) for one in found[:MOST_ROWS]],
        COLUMNS[4:5],
        identity=f"changes-{story.subjects.index(subject)}",
    )
    left = el("p", f"{len(found) - MOST_ROWS} more lines are left out here.", class_="note") if len(found) > MOST_ROWS else None
    return [el("p", words), el("p", note, class_="note") if found else None, shown if found else None, left]


def _line(story: Story, subject: Subject, one: Change) -> Line:
    places = story.occurs.get(one.problem_key, ())
    dims = {
        "chip": subject.chip,
        "model": tuple(dict.fromkeys(place.model for place in places if place.model)),
        "phase": tuple(dict.fromkeys(place.phase for place in places)),
        "operator": one.operator,
        "dtype": one.dtype,
        "kernel": one.kernel.partition("/")[2],
        "status": one.status,
    }
    moved = one.ratio
    ends = f"[{times(moved[1])}, {times(moved[2])}]" if moved else ""
    kind: list[Markup | None] = [el("b", one.status if one.kind == "fails" else KINDS[one.kind], class_=_tone(one.kind))]
    if one.winner and one.kind != "other":
        kind.append(_small("another winner"))
    reason = line(one.reason, LONGEST_REASON)
    cells = [
        Cell(kind, list(KINDS).index(one.kind)),
        one.problem,
        _choice(one.before, one.now),
        el("b", one.kernel.partition("/")[2]) if one.kind == "fails" else _choice(one.now, one.before),
        Cell([times(moved[0]), _small(ends)], moved[0]) if moved else "",
        reason,
    ]
    return Line(cells, dims)


def _choice(choice: Choice | None, other: Choice | None) -> object:
    """Kernel and time; the configuration where the other side has the same kernel with another one."""
    if choice is None:
        return ""
    config = " ".join(f"{name}={value}" for name, value in choice.config.items())
    differs = other is not None and other.kernel == choice.kernel and dict(other.config) != dict(choice.config)
    ends = interval(*choice.evidence.interval_us)
    name = el("b", choice.kernel.partition("/")[2], title=config or None)
    return [name, _small(config) if differs else None, _small(f"{time(choice.evidence.median_us)} [{ends}]")]


def _tone(kind: str) -> str:
    return {"fails": "broken", "lost": "missing"}.get(kind, kind)


def _night(story: Story, subject: Subject) -> list[object]:
    nights = story.nights.get(subject.chip, ())
    if not nights:
        return []
    night = nights[-1]
    loud = [one for one in ordered(night.verdicts) if one.call not in QUIET]
    words = f"The night of {line(night.at, 40)[:10]} (commit {commit_of(night)}) {outcome(night)}: {headline(night)}."
    rows = [_verdict(story, one) for one in loud[:MOST_ROWS]]
    shown = table(NIGHT_COLUMNS, rows, NIGHT_COLUMNS[2:4], identity=f"night-{story.subjects.index(subject)}") if rows else None
    left = el("p", f"{len(loud) - MOST_ROWS} more verdicts are in night.json.", class_="note") if len(loud) > MOST_ROWS else None
    return [el("p", words), shown, left, *_notes(night)]


def _notes(night: Night) -> list[Markup]:
    return [el("p", line(note), class_="note") for note in night.notes]


def _verdict(story: Story, one: Verdict) -> Line:
    point, series = one.point, one.series
    kernel = line(point.kernel.partition("/")[2] or point.kernel, 80) if point else ""
    dims = {
        "chip": series.chip,
        "model": series.models,
        "phase": tuple(dict.fromkeys(place.phase for place in story.occurs.get(series.problem_key, ()))),
        "operator": series.operator,
        "kernel": kernel,
        "status": point.status if point else "",
    }
    cells = [
        el("b", one.call, class_=one.call),
        [name_of(series).removeprefix(f"{line(series.chip)} "), _small(kernel)],
        value_of(one),
        Cell([change(one.ratio), _small(change_of(one).removeprefix(change(one.ratio)).strip())], one.ratio),
        reason_of(one),
    ]
    return Line(cells, {name: value for name, value in dims.items() if value})


def _small(text: object) -> Markup | None:
    return el("small", text) if text else None
