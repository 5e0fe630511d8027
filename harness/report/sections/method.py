"""How it was measured, in plain words, from what the rows themselves record; and on what."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from statistics import median

from klab.harness.measure.calibration import is_measured
from klab.harness.report.html import Markup, el, pairs, table
from klab.harness.report.subject import Story, Subject
from klab.harness.store.result import Result
from klab.kernels.contract import Json

ENVIRONMENTS = 12

L2_WORDS = {
    "cold": "Cold: launches rotate through copies of the inputs that together exceed the last-level cache, so inputs come from memory.",
    "flush": "Flushed: the last-level cache is overwritten before each launch, so inputs come from memory.",
    "warm": "Warm: every launch works on the same inputs, which may stay in the last-level cache.",
    "unproven": "Unproven: launches rotate through as many copies of the inputs as fit, too few to rule out that some stay in the "
    "last-level cache.",
}
LAUNCH_WORDS = {
    "graph": "as a CUDA graph of many launches (which hides the cost of launching)",
    "events": "launch by launch between CUDA events",
    "loop": "in a loop of launches",
}


def section(story: Story) -> Markup:
    """Per chip the method as it was; then the environments."""
    parts = [el("div", el("h3", subject.title), el("ul", [el("li", line) for line in words(subject)])) for subject in story.subjects]
    rows = [row for subject in story.subjects for row in subject.rows]
    return el("section", el("h2", "Method and environment"), parts, _environments(rows), id="method")


def words(subject: Subject) -> list[str]:
    """What a reader needs to trust, or doubt, the numbers of one chip: one sentence each, nothing that the rows do not say."""
    rows = subject.fine
    if not rows:
        return ["No kernel has a valid time on this chip yet, so there is no method to describe."]
    lines = [
        "Every kernel's output was compared with a reference computed from the problem's definition, on fresh random inputs, with outputs "
        f"poisoned beforehand ({_range(r.checks for r in rows)} checks per result)."
    ]
    lines += [f"{L2_WORDS.get(state, f'Cache state: {state}.')} ({count} results)" for state, count in _counts(r.l2_state for r in rows)]
    modes = _counts(r.launch_mode for r in rows)
    if modes:
        how = "; ".join(f"{LAUNCH_WORDS.get(mode, mode)} ({count})" for mode, count in modes)
        lines.append(f"Timed {how}, launches per round: {_range(r.launches_per_round for r in rows)}.")
    rounds = [len(r.samples_us) for r in rows if r.samples_us]
    if rounds:
        lines.append(
            f"{_range(rounds)} rounds per result (median {median(rounds):g}). Candidates of one problem take turns, so that drift of "
            "clocks and temperature is common to all. Medians, with 95% intervals of order statistics; two candidates that shared their "
            "rounds are compared by the ratio round by round."
        )
    lines += _state(rows)
    lines += _power(subject)
    return lines


def _state(rows: list[Result]) -> list[str]:
    clocks = [r.sm_clock_mhz for r in rows if r.sm_clock_mhz]
    marked = sum(sum(r.marked) for r in rows)
    lines = (
        [f"SM clock {min(clocks):.0f} to {max(clocks):.0f} MHz (medians per result); clocks were recorded, not locked."] if clocks else []
    )
    heat = [t for r in rows for t in r.temperatures_c if t is not None]
    if heat:
        lines.append(f"Temperature {min(heat):.0f} to {max(heat):.0f} °C.")
    if any(mask is not None for r in rows for mask in r.throttle_reasons):
        lines.append(f"{marked} rounds were marked for hardware throttling and do not count.")
    if any(r.policy.get("threads") for r in rows) or any(r.environment.get("threads") for r in rows):
        threads = sorted({str(r.environment.get("threads") or r.policy.get("threads")) for r in rows})
        lines.append(f"CPU threads: {', '.join(threads)}.")
    return lines


def _power(subject: Subject) -> list[str]:
    rows = subject.fine
    metered = [r for r in rows if r.energy_j is not None]
    lines = []
    if metered:
        idle = [r.idle_power_w for r in metered if r.idle_power_w is not None]
        lines.append(
            f"Energy of {len(metered)} results from the board's energy counter while the kernel ran back to back, cross-checked with the "
            f"instantaneous power{f'; idle power {min(idle):.0f} to {max(idle):.0f} W is included' if idle else ''}."
        )
    refused = _counts(r.energy_reason or _unasked(r) for r in rows if r.energy_j is None)
    lines += [f"Energy not measured for {count} results: {reason}." for reason, count in refused[:6]]
    return lines


def _unasked(row: Result) -> str:
    return "no reason recorded" if row.policy.get("energy") else "not asked for"


def _environments(rows: list[Result]) -> Markup:
    """Each distinct environment, by epoch, the one with most rows first."""
    found: dict[str, list[Result]] = defaultdict(list)
    for row in rows:
        found[_text(row.environment)].append(row)
    ordered = sorted(found.values(), key=lambda group: (-len(group), group[0].epoch, group[0].device))
    blocks = [
        el(
            "details",
            el("summary", f"{group[0].device or 'unnamed device'}, epoch {group[0].epoch or 'not recorded'}: {len(group)} results"),
            pairs((name, _value(value)) for name, value in sorted(group[0].environment.items())),
        )
        for group in ordered[:ENVIRONMENTS]
    ]
    more = el("p", f"{len(ordered) - ENVIRONMENTS} more environments are left out.", class_="note") if len(ordered) > ENVIRONMENTS else None
    return el("div", el("h3", "Environments"), blocks or el("p", "No result, no environment."), more)


def limits(subject: Subject) -> Markup | None:
    """The chip's limits that the roofline uses, each with where it comes from."""
    chip = subject.limits.chip
    if chip is None:
        return None
    figures = [("Memory bandwidth", f"{chip.memory_gb_per_s:g} GB/s", chip.provenance.get("memory_gb_per_s", "not stated"))]
    figures += [
        (f"Peak {dtype}", f"{peak:g} TFLOP/s, dense", chip.provenance.get(f"peak_tflops.{dtype}", "not stated"))
        for dtype, peak in chip.peak_tflops.items()
    ]
    for own in subject.limits.measured.values():
        if is_measured(own):
            figures.append(("Memory bandwidth, measured", f"{own.memory_gb_per_s:.4g} GB/s", own.provenance["memory_gb_per_s"]))
        figures += [
            (f"Peak {dtype}, measured", f"{peak:.4g} TFLOP/s", own.provenance[f"peak_tflops.{dtype}"])
            for dtype, peak in own.peak_tflops.items()
            if is_measured(own, dtype)
        ]
    shown = table(("Limit", "Value", "Where it is from"), figures, ("Value",))
    return el("details", el("summary", f"Limits of {chip.title} and their sources"), shown)


def _counts(values: Iterable[str]) -> list[tuple[str, int]]:
    return [(value, count) for value, count in Counter(values).most_common() if value]


def _range(values: Iterable[int]) -> str:
    found = sorted(set(values))
    return "no" if not found else f"{found[0]}" if len(found) == 1 else f"{found[0]} to {found[-1]}"


def _text(environment: Mapping[str, Json]) -> str:
    return "\0".join(f"{name}={value}" for name, value in sorted(environment.items()))


def _value(value: Json) -> str:
    return "not known" if value is None else "yes" if value is True else "no" if value is False else str(value)
