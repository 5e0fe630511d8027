"""From options to what a job needs: model, chip, plan, kernels and trials."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from klab.harness.cli import _options
from klab.harness.cli._console import emit, talk
from klab.harness.cli.main import START_S

if TYPE_CHECKING:
    from klab.harness.catalog.architecture import Model
    from klab.harness.fleet.open import Engine
    from klab.harness.plan.rows import Plan
    from klab.harness.plan.trial import Trial
    from klab.harness.plan.trials import Skipped
    from klab.harness.tune.job import Outcome
    from klab.kernels.contract import Chip, Problem
    from klab.kernels.discover import Catalogue


@dataclass
class Setup:
    """What was asked for, looked up. `trials` are in the order of the plan."""

    model: Model
    chip: Chip
    plan: Plan
    catalogue: Catalogue
    trials: list[Trial]
    skipped: list[Skipped]
    kernel_dirs: list[Path]


def look_up(
    model: str,
    chip: str,
    *,
    isl: int | None = None,
    osl: int | None = None,
    batch: str | None = None,
    tp: int = 1,
    dtype: str | None = None,
    kernel_dirs: Sequence[Path] | None = None,
    only: Sequence[str] | None = None,
    candidates: str = "default",
    phase: str | None = None,
    further: list[str] | None = None,
    narrower: bool = False,
) -> Setup:
    """Find everything by name; UsageError for what does not exist. Kernel files that could not be used are told on stderr.

    narrower: what approximates the plan's problems in narrower formats is measured too.
    """
    from klab.harness.catalog import find_model
    from klab.harness.catalog.chips import find_real_chip
    from klab.harness.plan import plan as make_plan
    from klab.harness.plan import scenario_for
    from klab.harness.plan.trials import trials as make_trials
    from klab.kernels.discover import approximations_of, discover
    from klab.kernels.errors import UsageError

    found_model, found_chip = find_model(model), find_real_chip(chip)
    scenario = scenario_for(found_model, found_chip, **_options.scenario_of(isl, osl, batch, tp, dtype, further))
    plan = make_plan(found_model, found_chip, scenario)
    if phase is not None and phase not in {name for name, _ in plan.steps}:
        raise UsageError(f"--phase {phase}: this model has {', '.join(dict.fromkeys(name for name, _ in plan.steps))}")
    dirs = list(kernel_dirs or [])
    catalogue = discover(dirs)
    for absent in catalogue.unavailable:
        if any(absent.path.is_relative_to(d.resolve()) for d in dirs):
            talk.print(f"{absent.path}: {absent.reason}", style="yellow", markup=False, soft_wrap=True)
    kernels = catalogue.select(only) if only else sorted(catalogue.kernels.values(), key=lambda k: (not k.library, k.id))
    rows = [row for row in plan.rows if row.problem and (phase is None or row.phase == phase)]
    problems = {row.problem.key: row.problem for row in rows if row.problem}
    if narrower:
        problems |= {p.key: p for wide in list(problems.values()) for p in approximations_of(wide)}
    made = make_trials(problems.values(), kernels, found_chip, candidates=candidates)
    if not made.trials:
        why = "; ".join(dict.fromkeys(f"{s.kernel}: {s.reason}" for s in made.skipped)) or "no kernel for any operator of the plan"
        raise UsageError(f"nothing to measure for {found_model.name} on {found_chip.name}: {why}")
    return Setup(found_model, found_chip, plan, catalogue, made.trials, made.skipped, dirs)


def look_up_all(model: str, chips: str, engine: Engine, **options: Any) -> list[Setup]:
    """`look_up` for each of several chips. UsageError as there, and where one name stands for two chips."""
    from klab.kernels.errors import UsageError

    setups = [look_up(model, name, **options) for name in engine.chips(chips)]
    names = [setup.chip.name for setup in setups]
    if len(set(names)) < len(names):
        raise UsageError(f"--chip {chips}: {', '.join(names)} are not different chips")
    return setups


def matching(problems: Mapping[str, Problem], wanted: Sequence[str] | None) -> dict[str, Problem]:
    """Those of `problems` (by key) whose key or label has one of the texts in it; all without any. UsageError where a text finds none."""
    from klab.kernels.errors import UsageError

    names = {key: f"{key} {p.label()}" for key, p in problems.items()}
    for text in wanted or ():
        if not any(text in name for name in names.values()):
            raise UsageError(f"--problem {text}: none matches; there are {'; '.join(p.label() for p in problems.values())}")
    return {key: p for key, p in problems.items() if not wanted or any(text in names[key] for text in wanted)}


def deadline_of(budget_s: float | None, *, reserve_s: float = 0.0) -> float | None:
    """The second of time.monotonic() at which measuring must end: the budget counts from the start of the command.

    `reserve_s` is left for what follows the measuring, but never more than a fifth of the budget.
    """
    return None if budget_s is None else START_S + budget_s - min(reserve_s, budget_s / 5)


def tell_outcome(outcome: Outcome, folder: Path, *, as_json: bool = False, again: bool = False) -> None:
    """One line for people on stderr, or one object on stdout."""
    from klab.harness.store.remote import shown

    counts = dict(outcome.by_status)
    if as_json:
        emit(
            {
                "type": "outcome",
                "new": counts,
                "known": len(outcome.known),
                "left": len(outcome.left),
                "stopped": outcome.stopped,
                "seconds": round(outcome.seconds, 2),
                "results": shown(folder),
            }
        )
    said = ", ".join(f"{n} {status}" for status, n in sorted(counts.items())) or "nothing new"
    known = f"; {len(outcome.known)} were known already (--again measures them once more)" if outcome.known else ""
    how = "the same command without --again continues" if again else "the same command continues"
    left = f"; {len(outcome.left)} not reached ({outcome.stopped}): {how}" if outcome.left else ""
    talk.print(f"{said} in {outcome.seconds:.0f} s{known}{left}. Results in {shown(folder)}", markup=False, soft_wrap=True)
