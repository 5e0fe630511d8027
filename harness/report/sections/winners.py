"""The winners: per problem and chip the chosen kernel with its evidence, in one table; then the problems that have none."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property

from klab.harness.choose.profile import Choice, Rival
from klab.harness.report.frames import share_at_clock
from klab.harness.report.gain import chosen_rows
from klab.harness.report.html import Cell, Line, Markup, el, table
from klab.harness.report.limits import bound, dtype_of, share_of_measured
from klab.harness.report.subject import Story, Subject
from klab.harness.report.units import bandwidth, energy, energy_interval, interval, number, percent, plain_ratio, rate, time, times
from klab.harness.store.frame import gb_per_s, tflops
from klab.harness.store.result import Result
from klab.harness.watch.wording import line, plural
from klab.kernels.contract import Json, digest

# Below this many flops per byte memory bounds a problem on any chip of the catalog.
STREAMS = 50.0
MOST_PLACES, MOST_OPEN, LONGEST = 2, 100, 160
WORDS = (
    "Chosen by the lowest median time. Brackets are 95% intervals. Against: the other's time over the choice's, above 1 the choice is "
    "faster. Candidates that cannot be told apart form a tie, settled by lower energy, then by last time's choice, then by the simpler "
    "configuration. The share of the roofline is the least time that the chip's specified limits allow over the median; at a clock: with "
    "the arithmetic peak at that SM clock, which was measured. Speed is sorted by TFLOP/s, energy by joules."
)


@dataclass(frozen=True)
class Winner:
    """A choice with the row it rests on and its chip. `identity` is the name of its evidence in the page."""

    subject: Subject
    choice: Choice
    row: Result | None

    @cached_property
    def identity(self) -> str:
        """The same on every night's page."""
        return f"w{digest([self.subject.chip, self.choice.wanted.problem_key])[:10]}"


@dataclass(frozen=True)
class Column:
    """A column: its head, its cell for a winner (None: nothing is known, and `why` says why), and whether it holds numbers. `needed`
    ones are shown even where no winner has anything there.
    """

    head: str
    cell: Callable[[Winner], Cell | None]
    numbers: bool = True
    needed: bool = False
    why: Callable[[Winner], str] = lambda one: "not measured"


def winners(story: Story) -> list[Winner]:
    """Every choice of the page, chip by chip in the profile's order."""
    found = []
    for subject in story.subjects:
        rows = chosen_rows(subject)
        found += [Winner(subject, choice, rows.get(choice.wanted.problem_key)) for choice in subject.profile.choices]
    return found


def section(story: Story) -> Markup:
    """The table of choices of all chips, and what is open. Columns of which nothing is known are left out, and that is said."""
    found = winners(story)
    several = len(story.subjects) > 1
    columns = [column for column in _columns(story) if column.head != "Chip" or several]
    cells = {column.head: [column.cell(one) for one in found] for column in columns}
    kept = [column for column in columns if column.needed or any(cell is not None for cell in cells[column.head])]
    heads = [column.head for column in kept]
    if not found:
        none = el("p", "No problem has a result that may be chosen: see the failures below.")
        return el("section", el("h3", "Winners"), none, _open(story))
    lines = []
    for n, one in enumerate(found):
        shown = [cells[column.head][n] or Cell(_small(line(column.why(one), LONGEST)), "") for column in kept]
        lines.append(Line(shown, dims(story, one), identity=one.identity, evidence=one.identity))
    made = table(heads, lines, [column.head for column in kept if column.numbers], identity="winners")
    lacking = " ".join(_left_out([column.head for column in columns], heads, found))
    words = [el("p", WORDS, class_="note"), el("p", lacking, class_="note") if lacking else None]
    return el("section", el("h3", "Winners"), words, made, _open(story), class_="winners")


def dims(story: Story, one: Winner) -> dict[str, str | tuple[str, ...]]:
    """What the page's filters ask of a winner."""
    choice, row = one.choice, one.row
    places = story.occurs.get(choice.wanted.problem_key, ())
    uses = choice.wanted.uses
    models = [place.model for place in places if place.model] + ([story.model] if uses and story.model else [])
    return {
        "chip": one.subject.chip,
        "model": tuple(dict.fromkeys(models)),
        "phase": tuple(dict.fromkeys([*(use.phase for use in uses), *(place.phase for place in places)])),
        "operator": choice.wanted.operator,
        "dtype": dtype_of(row) if row else str(choice.wanted.problem.get("dtype", "bfloat16")),
        "kernel": choice.kernel.partition("/")[2],
        "status": "ok",
    }


def label(config: Mapping[str, Json]) -> str:
    """`block_m=64 warps=4`."""
    return " ".join(f"{name}={value}" for name, value in config.items())


def _columns(story: Story) -> list[Column]:
    return [
        Column("Problem", lambda one: _problem(story, one), numbers=False, needed=True),
        Column("Chip", lambda one: Cell(line(one.subject.chip, LONGEST), one.subject.chip), numbers=False, needed=True),
        Column("Kernel and configuration", _kernel, numbers=False, needed=True),
        Column("Time", _time, needed=True),
        Column("Against library", _library, why=lambda one: one.choice.evidence.library_reason),
        Column("Of roofline", _of_roofline, why=lambda one: "limits not known"),
        Column("Speed", _speed),
        Column("Against default", _default, why=lambda one: one.choice.evidence.default_reason or "not known"),
        Column("Nearest rival", _nearest, why=lambda one: "no rival"),
        Column("Energy per call", _energy, why=lambda one: one.choice.evidence.energy_reason or "not asked for"),
        Column("Error", _error, needed=True),
    ]


def _left_out(columns: list[str], heads: list[str], found: list[Winner]) -> list[str]:
    """Why a column is not there: one sentence for each reason."""
    gone = [head for head in columns if head not in heads]
    said = []
    if "Of roofline" in gone:
        reasons = dict.fromkeys(one.subject.limits.reason for one in found if one.subject.limits.reason)
        said.append(f"No share of the roofline: {'; '.join(map(line, reasons)) or 'the limits of no chip here are known'}.")
    elif not any(_at_clock(one) for one in found):
        said.append("No SM clock was read.")
    if "Energy per call" in gone:
        counted = Counter(one.choice.evidence.energy_reason or "not asked for" for one in found)
        said.append(f"No energy: {'; '.join(line(reason) for reason, _ in counted.most_common(3))}.")
    if "Against library" in gone:
        said.append("No library has a valid time to compare with, or each choice is a library's.")
    if "Against default" in gone:
        counted = Counter(reason for one in found if (reason := one.choice.evidence.default_reason))
        said += [f"Not compared with the default: {line(reason)} ({plural(n, 'choice')})." for reason, n in counted.most_common(2)]
    if "Nearest rival" in gone:
        said.append("No choice has a rival.")
    return said


def _problem(story: Story, one: Winner) -> Cell:
    wanted = one.choice.wanted
    uses = [
        f"{use.role}, {use.phase} batch {use.batch}: {plural(use.count, 'launch').replace('launchs', 'launches')}"
        + (f", {percent(use.share)} of the step" if use.share else "")
        for use in wanted.uses
    ]
    if not uses:
        places = [place for place in story.occurs.get(wanted.problem_key, ()) if place.model]
        models = list(dict.fromkeys(f"{place.model} ({place.phase})" for place in places))
        uses = [", ".join(models[:MOST_PLACES]) + (f" and {len(models) - MOST_PLACES} more" if len(models) > MOST_PLACES else "")]
        title = "; ".join(f"{p.model}: {p.role}, {p.phase} batch {p.batch}, {p.count} per step" for p in places[:12])
        return Cell([_long(wanted.label), _small(uses[0], title)], wanted.label)
    return Cell([_long(wanted.label), *[_small(use) for use in uses]], wanted.label)


def _kernel(one: Winner) -> Cell:
    choice = one.choice
    name = choice.kernel.partition("/")[2]
    marks = [("library", choice.library, "a library's kernel"), ("stale", choice.stale, "its code has changed since it was measured")]
    shown = [el("i", text, title=why, class_=f"mark {text}") for text, told, why in marks if told]
    if choice.instead:
        off = f", {choice.evidence.wide_error:.1e} from the unquantised output" if choice.evidence.wide_error is not None else ""
        shown.append(el("i", "narrower format", title=f"{choice.instead}{off}", class_="mark narrower"))
    config = label(choice.config)
    return Cell([el("b", _long(name)), *shown, el("small", _long(config), class_="config", data_copy=one.identity)], name)


def _time(one: Winner) -> Cell:
    evidence = one.choice.evidence
    moved = evidence.measured_us
    corrected = None if moved is None else _small(f"corrected for its device; measured {time(moved)}")
    return Cell([time(evidence.median_us), _small(f"[{interval(*evidence.interval_us)}]", kind="ends"), corrected], evidence.median_us)


def _speed(one: Winner) -> Cell | None:
    """What bounds the problem comes first; all are sorted by TFLOP/s."""
    row = one.row
    flops, stream = (tflops(row), gb_per_s(row)) if row else (None, None)
    if row is None or not (flops or stream):
        return None
    both = [rate(flops) if flops else "", bandwidth(stream) if stream else ""]
    least = bound(row, one.subject.limits)
    by_memory = least.by == "memory" if least else bool(row.bytes_moved) and row.flops / row.bytes_moved < STREAMS
    if by_memory or not flops:
        both.reverse()
    return Cell([both[0], _small(both[1])], flops or 0.0)


def _of_roofline(one: Winner) -> Cell | None:
    """By specification, at the measured clock, and by the measured peaks; sorted by the first."""
    row = one.row
    found = bound(row, one.subject.limits) if row else None
    if found is None or row is None or not row.median_us:
        return None
    share, own = found.us / row.median_us, share_of_measured(row, one.subject.limits)
    words = [_small(_at_clock(one)), _small(f"{time(found.us)} by {found.by}")]
    if own is not None:
        words.append(_small(f"{percent(own)} of what klab calibrate measured"))
    return Cell([_percent(share), *words], share)


def _at_clock(one: Winner) -> str:
    row = one.row
    share = share_at_clock(row, one.subject.limits) if row else None
    return f"{_percent(share)} at {row.sm_clock_mhz:.0f} MHz" if row and share is not None and _known(share, row.sm_clock_mhz) else ""


def _percent(share: float) -> str:
    return percent(share) if share >= 0.001 else "< 0.1%"


def _energy(one: Winner) -> Cell | None:
    """Joules with their interval, and watts; sorted by joules."""
    joules, ends, watts = one.choice.evidence.energy_j, one.choice.evidence.energy_interval_j, one.choice.evidence.power_w
    power = _small(f"{number(watts)} W") if watts is not None and _known(watts) else None
    if joules is None or not _known(joules):
        return Cell([_small(one.choice.evidence.energy_reason or "not asked for"), power], "") if power else None
    inside = _small(f"[{energy_interval(*ends)}]", kind="ends") if ends and _known(*ends) else None
    return Cell([energy(joules), inside, power], joules)


def _library(one: Winner) -> Cell | None:
    choice = one.choice
    rival = choice.evidence.library
    if rival is not None:
        return _ratio(rival, choice)
    return Cell(_small("is a library"), 1.0) if choice.library else None


def _default(one: Winner) -> Cell | None:
    rival, reason = one.choice.evidence.default, one.choice.evidence.default_reason
    if rival is not None:
        return _ratio(rival, one.choice)
    return Cell(_small("is the default"), 1.0) if reason == "the choice is the default configuration" else None


def _nearest(one: Winner) -> Cell | None:
    choice, evidence = one.choice, one.choice.evidence
    if evidence.tied_count:
        named = ", ".join(_name(rival, choice) for rival in evidence.tied[:2])
        more = f" and {evidence.tied_count - 2} more" if evidence.tied_count > 2 else ""
        words = _small(f"with {named}{more}; settled by {evidence.settled_by}")
        return Cell([el("b", f"tie of {evidence.tied_count + 1}"), words], 1.0)
    return None if evidence.runner_up is None else _ratio(evidence.runner_up, choice)


def _ratio(rival: Rival, choice: Choice) -> Cell:
    """The rival's time over the choice's, with what the rival is; the whole configuration is shown on pointing."""
    low, high = rival.ratio_interval
    tone = "won" if low > 1 else "lost" if high < 1 else "even"
    ends = _small(f"[{plain_ratio(low)}, {plain_ratio(high)}]", kind="ends")
    return Cell([el("span", times(rival.ratio), class_=tone), ends, _small(_name(rival, choice), label(rival.config))], rival.ratio)


def _name(rival: Rival, choice: Choice) -> str:
    """A rival's kernel; of the chosen kernel's own, what its configuration has different."""
    name = rival.kernel.partition("/")[2]
    if rival.kernel == choice.kernel:
        name = label({key: value for key, value in rival.config.items() if choice.config.get(key) != value}) or name
    return line(name, LONGEST)


def _error(one: Winner) -> Cell:
    evidence = one.choice.evidence
    if evidence.error is None or evidence.tolerance is None or not _known(evidence.error):
        return Cell(_small("not checked"), "")
    sort = evidence.error / evidence.tolerance if evidence.tolerance else math.inf
    return Cell([f"{evidence.error:.1e}", _small(f"of {evidence.tolerance:.1e} allowed")], sort)


def _open(story: Story) -> Markup | None:
    """What has no choice, with the reason."""
    several = len(story.subjects) > 1
    unsolved = [(subject.chip, one) for subject in story.subjects for one in subject.profile.open]
    if not unsolved:
        return None
    items = [
        el("li", f"{line(chip, LONGEST)}: " if several else None, el("b", one.wanted.label), " ", one.reason)
        for chip, one in unsolved[:MOST_OPEN]
    ]
    rest = len(unsolved) - MOST_OPEN
    more = el("p", f"{rest} more are left out here.", class_="note") if rest > 0 else None
    return el("details", el("summary", f"{plural(len(unsolved), 'problem')} without a choice"), el("ul", items), more)


def _known(*values: float | None) -> bool:
    """What is no number was not measured."""
    return all(value is not None and math.isfinite(value) for value in values)


def _small(text: object, title: str = "", kind: str | None = None) -> Markup | None:
    return el("small", text, title=title or None, class_=kind) if text else None


def _long(text: str) -> object:
    """Text that is shortened, with the whole shown on pointing."""
    return text if len(text) <= LONGEST else el("span", f"{text[:LONGEST]}…", title=text)
