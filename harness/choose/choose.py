"""Results -> Profile: per problem the best kernel and configuration by an objective, with the evidence, or the reason for none."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

from klab.harness.choose.candidates import Candidate, value
from klab.harness.choose.compare import best, ratio, tie_set
from klab.harness.choose.profile import Choice, Evidence, Open, Profile, Rival, Wanted
from klab.harness.choose.select import Selection
from klab.harness.choose.settle import Defaults, settle
from klab.harness.choose.steps import steps_of, with_shares
from klab.harness.measure.correction import measured_us
from klab.harness.store.result import Result
from klab.harness.tune.objective import LATENCY, Objective, as_objective, energy, latency
from klab.kernels.contract import Json, canonical_json

# A tuned space may leave a hundred configurations tied: the file names the nearest few and counts the rest.
TIED_LISTED = 5

Finals = Mapping[str, tuple[str, Mapping[str, Json], str]]
"""problem_key -> the kernel and the configuration (all fields) that won a final of the problem, and what the final said."""

VERSIONS = ("torch", "triton", "cupy", "cuda", "driver", "python", "klab", "commit")


def choose(
    results: Iterable[Result],
    problems: Sequence[Wanted] | None,
    objective: Objective | str = LATENCY,
    previous: Profile | None = None,
    *,
    chip: str | None = None,
    device: str | None = None,
    sources: Mapping[str, str] | None = None,
    defaults: Defaults | None = None,
    current_only: bool = False,
    finals: Finals | None = None,
    max_error: float | None = None,
) -> Profile:
    """Choose for each of `problems` (None: each that has a result) among the results of one chip. The order of results does not matter.

    objective: what is minimised, or its name. previous: last time's profile, which settles ties.
    chip: needed when the results are of several. device: results of another device of that chip are set aside (default: the device of
    the newest valid result). sources: digest of each kernel's code now; a choice of older code is marked stale, or with `current_only`
    not made. defaults: a kernel's default configuration for a row. finals: who won a final, which is the choice where it may be
    chosen. max_error: kernels in narrower formats compete for a problem too, those whose output is no further than this from the
    unquantised one (||out - wide|| / ||wide||); a tie goes to the unquantised. Where a wrong result stands, `wrong.distrust` says what
    it refuses.
    UsageError for an unknown objective, or when the chip is not given and not plain.
    """
    goal = as_objective(objective)
    selected = Selection(
        results, goal, chip=chip, device=device, sources=sources, defaults=defaults, current_only=current_only, max_error=max_error
    )
    notes = selected.notes
    if goal.name == "cost":
        notes.append(f"by {goal}")
    if max_error is not None:
        notes.append(f"narrower formats may be chosen up to an error of {max_error:g} against the unquantised problem")
    wanted = list(problems) if problems is not None else wanted_from(selected.rows)
    choices: list[Choice] = []
    unsolved: list[Open] = []
    for one in sorted(wanted, key=place):
        found = selected.candidates(one.problem_key)
        final = finals.get(one.problem_key) if finals else None
        if final and not _winner(found, final):
            notes.append(f"{one.label}: the winner of its final, {final[0]}, may not be chosen, so the results in the store decide")
        if found:
            choices.append(_choose_one(one, found, goal, previous, sources, defaults, final))
        else:
            unsolved.append(Open(one, selected.why_open(one.problem_key)))
    stale = sum(choice.stale for choice in choices)
    if stale:
        notes.append(f"{_choices(stale, 'rests', 'rest')} on code that has changed since it was measured (stale): measure again")
    unknown = sum(choice.kernel not in sources for choice in choices) if sources else 0
    if unknown:
        whose = _choices(unknown, "is", "are")
        notes.append(f"{whose} of kernels that are not here or cannot be imported: whether their code changed is not known")
    if moved := sum(choice.evidence.measured_us is not None for choice in choices):
        whose = _choices(moved, "rests", "rest")
        notes.append(f"{whose} on times that are corrected for the device they were taken on (its anchors over its peers')")
    if len(epochs := {choice.evidence.epoch for choice in choices}) > 1:
        notes.append(f"the choices rest on {len(epochs)} epochs (driver or toolchain changed in between)")
    return Profile(
        selected.chip,
        goal.name,
        device=selected.device,
        steps=steps_of(choices, unsolved),
        choices=with_shares(choices),
        open=tuple(unsolved),
        notes=tuple(notes),
    )


def _choices(count: int, one: str, many: str) -> str:
    return f"{count} choice {one}" if count == 1 else f"{count} choices {many}"


def wanted_from(results: Iterable[Result]) -> list[Wanted]:
    """Every problem that has a result, with no word on where it occurs."""
    found = {row.problem_key: Wanted(row.problem_key, row.operator, row.problem_label, dict(row.problem)) for row in results}
    return sorted(found.values(), key=place)


def place(wanted: Wanted) -> tuple[str, list[tuple[int, str]], str]:
    """What problems are ordered by: operators by name, labels with their numbers as numbers (8x1024 before 128x1024)."""
    parts = re.findall(r"\d+|\D+", wanted.label)
    return wanted.operator, [(int(part), "") if part.isdigit() else (-1, part) for part in parts], wanted.problem_key


def _choose_one(
    wanted: Wanted,
    found: list[Candidate],
    objective: Objective,
    previous: Profile | None,
    sources: Mapping[str, str] | None,
    defaults: Defaults | None,
    final: tuple[str, Mapping[str, Json], str] | None,
) -> Choice:
    fastest = best(found, objective)
    tied = _unquantised(tie_set(found, fastest, objective), wanted.problem_key)
    winner = _winner(found, final) if final else None
    if winner is not None:
        chosen, settled_by = winner, "final"
    else:
        chosen, settled_by = settle(tied, objective, previous.chosen(wanted.problem_key) if previous else None, defaults)
    row = chosen.row

    def order(c: Candidate) -> tuple[float, tuple[str, str, str, str]]:
        return value(c.row, objective).median, c.name

    others = sorted((c for c in found if c is not chosen), key=order)
    libraries = sorted((c for c in found if c.row.library), key=order)
    rivals = [c for c in tied if c is not chosen]
    library = None if row.library or not libraries else _rival(libraries[0], chosen, objective)
    default, default_reason = _default(found, chosen, defaults)
    time, metered = latency(row), chosen.metered_row
    joules = energy(metered)
    assert time is not None
    evidence = Evidence(
        median_us=time.median,
        interval_us=(time.low, time.high),
        samples=len(row.samples_us),
        l2_state=row.l2_state,
        launch_mode=row.launch_mode,
        error=row.error,
        tolerance=row.tolerance,
        candidates=len(found),
        settled_by=settled_by,
        runner_up=_rival(others[0], chosen, objective) if others else None,
        tied_count=len(rivals),
        tied=tuple(_rival(c, chosen, objective) for c in rivals[:TIED_LISTED]),
        library=library,
        library_reason="" if library else "the choice is a library's" if row.library else "no library has a valid result",
        energy_j=metered.energy_j,
        energy_interval_j=(joules.low, joules.high) if joules else None,
        energy_reason=metered.energy_reason,
        power_w=metered.power_w,
        sm_clock_mhz=row.sm_clock_mhz,
        device=row.device,
        epoch=row.epoch,
        run_ids=tuple(sorted({c.row.run_id for c in (chosen, *rivals, *others[:1], *libraries[:1])})),
        recorded_at=row.recorded_at,
        versions={name: row.environment[name] for name in VERSIONS if row.environment.get(name)},
        final_reason=final[2] if final and winner is not None else "",
        wide_error=row.wide_error,
        measured_us=measured_us(row) if "corrected" in row.build else None,
        default=_rival(default, chosen, objective) if default else None,
        default_reason=default_reason,
    )
    narrower = row.problem_key != wanted.problem_key
    stale = (sources or {}).get(row.kernel, row.source_digest) != row.source_digest
    return Choice(
        wanted,
        row.kernel,
        row.backend,
        row.library,
        dict(row.config),
        row.source_digest,
        stale,
        evidence,
        instead=row.problem_label if narrower else "",
        instead_problem=dict(row.problem) if narrower else {},
    )


def _default(found: Sequence[Candidate], chosen: Candidate, defaults: Defaults | None) -> tuple[Candidate | None, str]:
    """The chosen kernel in its default configuration, or why it is not compared with."""
    config = defaults(chosen.row) if defaults else None
    if config is None:
        return None, "the kernel's default configuration is not known here"
    name = canonical_json(config)
    if chosen.config == name:
        return None, "the choice is the default configuration"
    same = (c for c in found if (c.kernel, c.config, c.problem_key) == (chosen.kernel, name, chosen.problem_key))
    default = next(same, None)
    return default, "" if default else "the default configuration has no valid result"


def _unquantised(tied: list[Candidate], problem_key: str) -> list[Candidate]:
    """Those of a tie that solve the problem itself, where there are any: what is no slower is not given up for nothing."""
    return [c for c in tied if c.row.problem_key == problem_key] or tied


def _winner(found: Sequence[Candidate], final: tuple[str, Mapping[str, Json], str]) -> Candidate | None:
    """The winner of a final among those that may be chosen."""
    name = (final[0], canonical_json(final[1]))
    return next((c for c in found if (c.kernel, c.config) == name), None)


def _rival(other: Candidate, chosen: Candidate, objective: Objective) -> Rival:
    found = ratio(other, chosen, objective)
    time = latency(other.row)
    assert time is not None
    return Rival(
        other.kernel, dict(other.row.config), time.median, found.ratio, (found.low, found.high), found.how, other.metered_row.energy_j
    )
