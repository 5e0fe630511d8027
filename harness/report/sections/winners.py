"""The winners: per problem the chosen kernel with its evidence, then the problems that have none."""

from __future__ import annotations

from klab.harness.choose.profile import Choice, Rival, Use
from klab.harness.report.html import Markup, el, table
from klab.harness.report.limits import bound, share_of_measured
from klab.harness.report.subject import Subject
from klab.harness.report.units import bandwidth, energy, interval, number, percent, plain_ratio, rate, time, times
from klab.harness.store.frame import gb_per_s, tflops
from klab.harness.store.result import Result
from klab.kernels.contract import Json

COLUMNS = (
    "Problem",
    "Kernel and configuration",
    "Median",
    "Speed",
    "Of roofline",
    "Against best library",
    "Nearest rival",
    "Error",
    "Energy",
)
NUMBERS = ("Median", "Speed", "Of roofline")


def section(subject: Subject) -> Markup:
    """The table of choices, and a list of what is open."""
    profile = subject.profile
    # One reason for all is told once, under Method; where they differ, each is told beside its row.
    reasons = {choice.evidence.energy_reason for choice in profile.choices if choice.evidence.energy_j is None}
    rows = [_row(subject, choice, len(reasons) > 1) for choice in profile.choices]
    shown = table(COLUMNS, rows, NUMBERS) if rows else el("p", "No problem has a result that may be chosen: see the failures below.")
    unsolved = [el("li", el("b", one.wanted.label), " ", one.reason) for one in profile.open]
    missing = el("details", el("summary", f"{len(unsolved)} problems without a choice"), el("ul", unsolved)) if unsolved else None
    words = el(
        "p",
        "Chosen by the lowest median time. Brackets are 95% intervals. Candidates that cannot be told apart form a tie, settled by lower "
        "energy, then by last time's choice, then by the simpler configuration. The share of the roofline is the least time that the "
        "chip's specified limits allow over the median; further figures are at the clock that was measured, and by the peaks that "
        "klab calibrate measured on the same device, where it did.",
        class_="note",
    )
    return el("section", el("h3", "Winners"), words, shown, missing)


def _row(subject: Subject, choice: Choice, why: bool) -> list[object]:
    row = subject.row_of(choice.wanted.problem_key, choice.kernel, choice.config)
    evidence = choice.evidence
    uses = [el("small", _use(use)) for use in choice.wanted.uses]
    kernel = choice.kernel.partition("/")[2]
    return [
        [choice.wanted.label, uses],
        [el("b", kernel), el("i", " library") if choice.library else None, el("i", " stale code") if choice.stale else None,
         _small(_label(choice.config))],
        [time(evidence.median_us), _small(interval(*evidence.interval_us)), _corrected(evidence.measured_us)],
        _speed(row),
        _of_roofline(subject, row),
        _library(choice),
        _nearest(choice),
        _error(choice),
        _energy(choice, why),
    ]  # fmt: skip


def _use(use: Use) -> str:
    share = f", {percent(use.share)} of the step" if use.share else ""
    return f"{use.role}, {use.phase} batch {use.batch}: {use.count} launches{share}"


def _small(text: object) -> Markup | None:
    return el("small", text) if text else None


def _corrected(measured_us: float | None) -> Markup | None:
    return None if measured_us is None else _small(f" corrected for its device; measured {time(measured_us)}")


def _label(config: object) -> str:
    return " ".join(f"{k}={v}" for k, v in config.items()) if isinstance(config, dict) and config else ""


def _speed(row: Result | None) -> object:
    """What limits the problem comes first: bandwidth below 50 FLOP per byte on any chip of the catalog, else arithmetic."""
    if row is None:
        return ""
    flops, stream = tflops(row), gb_per_s(row)
    both = [rate(flops) if flops else "", bandwidth(stream) if stream else ""]
    if row.bytes_moved and row.flops / row.bytes_moved < 50:
        both.reverse()
    return [both[0], _small(both[1])]


def _of_roofline(subject: Subject, row: Result | None) -> object:
    found = bound(row, subject.limits) if row is not None else None
    if found is None or row is None or not row.median_us:
        return "not known"
    by = f"{time(found.us)} by {found.by}"
    chip = subject.limits.chip
    if chip is not None and found.by == "compute" and row.sm_clock_mhz and chip.kind == "cuda":
        at_clock = found.us * chip.spec_clock_mhz / row.sm_clock_mhz / row.median_us
        by += f"; {percent(at_clock)} at {row.sm_clock_mhz:.0f} MHz"
    own = share_of_measured(row, subject.limits)
    if own is not None:
        by += f"; {percent(own)} of what this device was measured to reach"
    return [percent(found.us / row.median_us), _small(by)]


def _library(choice: Choice) -> object:
    rival = choice.evidence.library
    if rival is None:
        return _small(choice.evidence.library_reason)
    return [times(rival.ratio), _small([f"[{_ends(rival)}] ", _name(rival, choice), f", {time(rival.median_us)}"])]


def _nearest(choice: Choice) -> object:
    evidence = choice.evidence
    if evidence.tied_count:
        others = [item for rival in evidence.tied[:3] for item in (_name(rival, choice), ", ")][:-1]
        more = f" and {evidence.tied_count - 3} more" if evidence.tied_count > 3 else ""
        return [f"tie of {evidence.tied_count + 1}", _small(["with ", *others, f"{more}; settled by {evidence.settled_by}"])]
    if evidence.runner_up is None:
        return _small("no other candidate")
    rival = evidence.runner_up
    return [times(rival.ratio), _small([f"[{_ends(rival)}] ", _name(rival, choice), f", {rival.how}"])]


def _ends(rival: Rival) -> str:
    return f"{plain_ratio(rival.ratio_interval[0])}, {plain_ratio(rival.ratio_interval[1])}"


def _name(rival: Rival, choice: Choice) -> Markup:
    """A rival's kernel; of the chosen kernel's own, what its configuration has different. The whole is shown on pointing."""
    config: dict[str, Json] = dict(rival.config)
    name = rival.kernel.partition("/")[2]
    if rival.kernel == choice.kernel:
        name = _label({key: value for key, value in config.items() if choice.config.get(key) != value}) or name
    return el("span", name, title=_label(config) or None)


def _error(choice: Choice) -> object:
    evidence = choice.evidence
    if evidence.error is None or evidence.tolerance is None:
        return "not checked"
    return [f"{evidence.error:.1e}", _small(f"of {evidence.tolerance:.1e} allowed")]


def _energy(choice: Choice, why: bool) -> object:
    evidence = choice.evidence
    if evidence.energy_j is None:
        return ["not measured", _small(evidence.energy_reason) if why else None]
    power = f"{number(evidence.power_w)} W" if evidence.power_w else ""
    ends = evidence.energy_interval_j
    return [el("span", energy(evidence.energy_j), title=f"{energy(ends[0])} to {energy(ends[1])}" if ends else None), _small(power)]
