"""The choice as a whole: a plan's problems, the kernels as they are now, last time's profile."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

from klab.harness.catalog.cpu_probe import probe
from klab.harness.choose.choose import Finals, choose
from klab.harness.choose.profile import Profile, Use, Wanted
from klab.harness.choose.settle import Defaults
from klab.harness.plan.rows import Plan
from klab.harness.store.result import Result
from klab.harness.tune.objective import LATENCY, Objective
from klab.kernels.contract import Chip, Json, canonical_json
from klab.kernels.discover import Catalogue


def decide(
    results: Iterable[Result],
    plan: Plan | None,
    chip: str,
    objective: Objective | str = LATENCY,
    *,
    catalogue: Catalogue | None = None,
    previous: Profile | None = None,
    current_only: bool = False,
    limits: Chip | None = None,
    finals: Finals | None = None,
    max_error: float | None = None,
) -> Profile:
    """The profile of a plan (None: of every problem that has a result on the chip), not yet written.

    catalogue: the kernels as they are now; with it stale choices are marked and default configurations known. limits: the chip, for the
    defaults (default: the plan's). finals: who won the finals of this run; where such a winner may be chosen, it is the choice.
    max_error: as of `choose`.
    """
    rows = [row for row in results if row.chip == chip]
    limits = limits or (plan.chip if plan else None)
    found = choose(
        rows,
        wanted_of(plan) if plan else None,
        objective,
        previous,
        chip=chip,
        device=this_device(chip, rows),
        sources=sources_of(catalogue) if catalogue else None,
        defaults=defaults_of(catalogue, limits) if catalogue and limits else None,
        current_only=current_only,
        finals=finals,
        max_error=max_error,
    )
    if limits:
        found = dataclasses.replace(found, limits=limits_of(limits))
    return for_plan(found, plan) if plan else found


def limits_of(chip: Chip) -> dict[str, Json]:
    """The fields of a chip that a kernel may ask for: all but where they come from. What was probed on a CPU differs by some percent from
    hour to hour: its first digit is kept, so that the same choice gives the same text.
    """
    found = {f.name: value for f in dataclasses.fields(chip) if f.name != "provenance" and (value := getattr(chip, f.name)) != f.default}
    if chip.kind == "cpu":
        found["memory_gb_per_s"] = float(f"{chip.memory_gb_per_s:.1g}")
        found["peak_tflops"] = {dtype: float(f"{peak:.1g}") for dtype, peak in chip.peak_tflops.items()}
    return found


def wanted_of(plan: Plan) -> list[Wanted]:
    """A plan's problems with where each occurs."""
    return [
        Wanted(
            problem.key,
            problem.operator,
            problem.label(),
            problem.to_json(),
            tuple(Use(row.phase, row.batch, row.role, row.count) for row in plan.occurrences(problem)),
        )
        for problem in plan.problems()
    ]


def for_plan(profile: Profile, plan: Plan) -> Profile:
    """The profile with the model, the scenario and what the plan says of each step's coverage."""
    covered = {(total.phase, total.batch): total.covered_time_share for total in plan.totals}
    steps = tuple(dataclasses.replace(step, modelled_share=covered.get((step.phase, step.batch))) for step in profile.steps)
    scenario = {field.name: getattr(plan.scenario, field.name) for field in dataclasses.fields(plan.scenario)} | {"dtype": plan.dtype}
    return dataclasses.replace(profile, model=plan.model.name, scenario=scenario, steps=steps)


def sources_of(catalogue: Catalogue) -> dict[str, str]:
    """The digest of each kernel's code as it is now."""
    return {kernel.id: kernel.source_digest for kernel in catalogue.kernels.values()}


def defaults_of(catalogue: Catalogue, chip: Chip) -> Defaults:
    """The default configuration of a row's kernel for the row's problem; None where the kernel cannot be imported here."""
    known: dict[tuple[str, str], dict[str, object] | None] = {}

    def default(row: Result) -> dict[str, object] | None:
        name = (row.kernel, row.problem_key)
        if name not in known:
            kernel = catalogue.kernels.get(row.kernel)
            known[name] = None
            try:
                if kernel is not None:
                    known[name] = kernel.default(kernel.problem_type.from_json(row.problem), chip).to_json_full()
            except Exception:  # noqa: BLE001  a problem of an older klab, a kernel that is not for this chip, or a user's code that fails
                pass
        return known[name]

    return default


def this_device(chip: str, rows: Iterable[Result]) -> str | None:
    """Any CPU goes by the name "cpu": where this machine's has results, they are meant. None: let the newest result say."""
    if chip != "cpu":
        return None
    model = probe().model
    return model if any(row.device == model for row in rows) else None


def same_choice(a: Profile, b: Profile) -> list[str]:
    """Labels of the problems for which two profiles name different kernels or configurations (or only one names any)."""
    names = {c.wanted.problem_key: c.wanted.label for profile in (a, b) for c in profile.choices}
    return sorted(label for key, label in names.items() if canonical_json(a.chosen(key)) != canonical_json(b.chosen(key)))
