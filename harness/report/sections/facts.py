"""What is told of a winner beside its rounds: how it was checked and timed, on what, and the command that does it again."""

from __future__ import annotations

import math
from collections.abc import Sequence

from klab.harness.choose.profile import Choice
from klab.harness.report.sections.method import L2_WORDS, LAUNCH_WORDS
from klab.harness.report.sections.winners import Winner, label
from klab.harness.report.subject import Story
from klab.harness.report.units import number
from klab.harness.store.result import Result
from klab.harness.watch.wording import line

LONGEST = 2000


def facts(story: Story, one: Winner) -> list[tuple[str, str]]:
    """Names and values in the order of the panel; what was not recorded is not there."""
    choice, evidence, row = one.choice, one.choice.evidence, one.row
    checked = "not checked"
    if evidence.error is not None and evidence.tolerance is not None and math.isfinite(evidence.error):
        checks = f" in the worst of {row.checks} checks" if row and row.checks else ""
        where = f", reference computed on {row.reference_device}" if row and row.reference_device else ""
        checked = f"error {evidence.error:.2e}{checks}, {evidence.tolerance:.2e} is allowed{where}"
    found: list[tuple[str, object]] = [
        ("Configuration", label(choice.config) or "none to choose"),
        ("Checks", checked),
        ("Timed", _timed(row) if row else "the row of this choice is not among those shown"),
        ("Settled by", f"{evidence.settled_by} among {evidence.candidates} candidates" + _final(choice)),
        ("Clocks and heat", _state(row) if row else ""),
        ("Energy", _energy(choice)),
        ("Device", " ".join(filter(None, (evidence.device, row.device_uuid if row else "")))),
        ("Recorded", evidence.recorded_at),
        ("Runs", ", ".join(evidence.run_ids)),
        ("Epoch", evidence.epoch),
        ("Commit", _commit(row) if row else ""),
        ("Kernel's source", choice.source_digest),
        ("Instead of the wanted problem", choice.instead),
        again(story, one),
    ]
    return [(name, line(value, LONGEST)) for name, value in found if value]


def again(story: Story, one: Winner) -> tuple[str, str]:
    """What a command does (``Measure again``: a default configuration; ``Tune again``: another is found by a search, which begins with what
    is known) and the command; it is empty where no model of the catalog has the problem.
    """
    choice = one.choice
    default = choice.evidence.default_reason == "the choice is the default configuration" or not choice.config
    does, verb = ("Measure again", "measure") if default else ("Tune again", "tune")
    places = [place for place in story.occurs.get(choice.wanted.problem_key, ()) if place.model]
    if not places:
        return does, ""
    place = next((p for p in places if p.model == story.model), places[0])
    words = ["klab", verb, "--model", place.model, "--chip", one.subject.chip, "--kernel", choice.kernel]
    words += [place.options] if place.options else []
    words += ["--batch", str(place.batch)] if place.phase == "decode" else []
    words += ["--phase", place.phase]
    words += ["--again"] if default else ["--problem", choice.wanted.problem_key]
    return does, " ".join(words)


def _timed(row: Result) -> str:
    marked = f", {sum(row.marked)} of them marked for throttling and not counted" if sum(row.marked) else ""
    parts = [
        f"{len(row.samples_us)} rounds of {row.launches_per_round} launches{marked}",
        LAUNCH_WORDS.get(row.launch_mode, row.launch_mode),
        "last-level cache " + L2_WORDS.get(row.l2_state, row.l2_state).partition(":")[0].lower() if row.l2_state else "",
    ]
    return ", ".join(filter(None, parts))


def _final(choice: Choice) -> str:
    return f": {choice.evidence.final_reason}" if choice.evidence.final_reason else ""


def _state(row: Result) -> str:
    clocks = [c for c in row.clocks_mhz if c is not None and math.isfinite(c)]
    heat = [t for t in row.temperatures_c if t is not None and math.isfinite(t)]
    parts = [f"SM clock {_range(clocks)} MHz" if clocks else "", f"{_range(heat)} °C" if heat else ""]
    return ", ".join(filter(None, parts)) or "not read on this device"


def _range(values: Sequence[float]) -> str:
    low, high = min(values), max(values)
    return f"{low:.0f}" if low == high else f"{low:.0f} to {high:.0f}"


def _energy(choice: Choice) -> str:
    evidence = choice.evidence
    if evidence.energy_j is None or not math.isfinite(evidence.energy_j):
        return f"not measured: {evidence.energy_reason or 'not asked for'}"
    ends = evidence.energy_interval_j
    inside = f" ({ends[0]:.4g} to {ends[1]:.4g})" if ends else ""
    watts = f", {number(evidence.power_w)} W" if evidence.power_w else ""
    return f"{evidence.energy_j:.4g} J per call{inside}{watts}; {evidence.energy_reason}"


def _commit(row: Result) -> str:
    commit = row.environment.get("commit")
    return f"{str(commit)[:12]}{' with changes' if row.environment.get('dirty') else ''}" if commit else ""
