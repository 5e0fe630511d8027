"""What a night measures: for each problem of the policy's models the chosen kernel and the best library, as trials."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from klab.harness.catalog import find_model
from klab.harness.choose.decide import decide
from klab.harness.choose.profile import Choice, Profile, profile_path, read_profile
from klab.harness.plan import plan as make_plan
from klab.harness.plan import scenario_for
from klab.harness.plan.rows import Plan
from klab.harness.plan.trial import Policy, Trial
from klab.harness.plan.trials import default_policy, safe_unfit
from klab.harness.store.result import Result
from klab.harness.watch.policy import NightPolicy, Track
from klab.harness.watch.series import Metric, Role, Series
from klab.kernels.contract import Chip, Json, Problem
from klab.kernels.discover import Catalogue
from klab.kernels.errors import UsageError


@dataclass(frozen=True)
class Tracked:
    """One role of one problem: who may hold it (several where nothing says who is best: the lowest tonight holds it), and how they were
    found. Without trials there is nobody, and `found` says why.
    """

    problem: Problem
    role: str
    trials: tuple[Trial, ...]
    found: str
    metrics: tuple[str, ...]
    models: tuple[str, ...]
    label: str
    chip: str

    def series(self, metric: str) -> Series:
        """Its curve in one metric."""
        return Series(self.chip, self.problem.operator, self.problem.key, self.label, self.role, metric, self.models)


@dataclass
class Watched:
    """Everything that a night tracks on a chip, and lines for people on how it was found."""

    tracked: list[Tracked]
    notes: list[str]

    def series(self) -> dict[str, Series]:
        """By identity."""
        return {one.series(metric).identity: one.series(metric) for one in self.tracked for metric in one.metrics}


def watched(
    policy: NightPolicy,
    chip: Chip,
    catalogue: Catalogue,
    *,
    profile: Path | None = None,
    results: Callable[[], Iterable[Result]] = tuple,
) -> Watched:
    """The tracked roles of a chip, each once, in the order of the policy.

    Chosen is what the profile says (`profile`, the track's, or profiles/tuned), else what `klab choose` would say of `results`, else the
    default configuration of every kernel of klab's own. The library is the one that this evidence names as best, else every one that
    fits. UsageError for a track that names no model, phase or operator that there is.
    """
    found: dict[tuple[str, str], Tracked] = {}
    notes: list[str] = []
    changes = {name: value for name, value in policy.measure.trial.items() if name != "threads" or chip.kind == "cpu"}
    measured = dataclasses.replace(default_policy(chip), **changes)
    stored = cache(lambda: decide(results(), None, chip.name, catalogue=catalogue, limits=chip))
    for track in policy.tracks_of(chip.name):
        plan = _plan(track, chip)
        problems = _problems(track, plan)
        evidence, said = _evidence(track, plan, chip, profile, stored)
        notes += said
        finder = _Finder(chip, catalogue, measured)
        for problem in problems:
            for role in track.roles:
                old = found.get((problem.key, role))
                if old is not None:
                    models = tuple(dict.fromkeys([*old.models, plan.model.name]))
                    metrics = tuple(dict.fromkeys([*old.metrics, *track.metrics]))
                    found[(problem.key, role)] = dataclasses.replace(old, models=models, metrics=metrics)
                    continue
                trials, how = finder.of(Role(role), problem, evidence)
                made = Tracked(problem, role, trials, how, track.metrics, (plan.model.name,), _label(problem), chip.name)
                if trials or how:
                    found[(problem.key, role)] = made
        notes += finder.notes(plan.model.name)
    tracked = _named_apart(list(found.values()))
    if chip.kind != "cuda" and any(Metric.ENERGY in one.metrics for one in tracked):
        tracked = [dataclasses.replace(one, metrics=tuple(m for m in one.metrics if m != Metric.ENERGY)) for one in tracked]
        notes.append(f"no energy on {chip.name}: klab reads no power sensor of a CPU")
    return Watched(tracked, list(dict.fromkeys(notes)))


class _Finder:
    """Who holds a role, and how that was found."""

    def __init__(self, chip: Chip, catalogue: Catalogue, policy: Policy) -> None:
        self._chip, self._catalogue, self._policy = chip, catalogue, policy
        self._guessed = 0
        self._asked = 0

    def of(self, role: Role, problem: Problem, evidence: Mapping[str, Choice]) -> tuple[tuple[Trial, ...], str]:
        """Its trials and how they were found; neither where the operator has no such kernel at all."""
        self._asked += 1
        choice = evidence.get(problem.key)
        if choice is not None:
            if role is Role.CHOSEN:
                return self._one(choice.kernel, choice.config, problem, "chosen", choice.instead_problem)
            if choice.library and not choice.instead:
                return self._one(choice.kernel, choice.config, problem, "the choice, which is a library")
            if choice.evidence.library is not None and not choice.instead:
                return self._one(
                    choice.evidence.library.kernel, choice.evidence.library.config, problem, "the best library of the evidence"
                )
        fitting = [k for k in self._catalogue.of(problem.operator) if safe_unfit(k, problem, self._chip) is None]
        libraries = [k for k in fitting if k.library]
        own = [k for k in fitting if not k.library] or libraries
        self._guessed += choice is None and role is Role.CHOSEN
        competing = libraries if role is Role.LIBRARY else own
        made = tuple(Trial.of(k, problem, k.default(problem, self._chip), self._chip.name, self._policy) for k in competing)
        how = "the fastest library tonight" if role is Role.LIBRARY else "nothing is chosen: the fastest default tonight"
        return made, how if made else ""

    def notes(self, model: str) -> list[str]:
        """What a reader must know of how they were found."""
        if not self._guessed:
            return []
        return [f"{model}: {self._guessed} problems have no choice; the fastest of the kernels' default configurations is watched"]

    def _one(
        self, name: str, config: Mapping[str, Json], problem: Problem, how: str, instead: Mapping[str, Json] | None = None
    ) -> tuple[tuple[Trial, ...], str]:
        """The trial of a named kernel; none, and why, where it is not here or does not run any more."""
        kernel = self._catalogue.kernels.get(name)
        if kernel is None:
            return (), f"{name} ({how}) is not here: {self._why_absent(name)}"
        try:
            actual = kernel.problem_type.from_json(instead) if instead else problem
            made = kernel.config_type.from_json(config)
            reason = kernel.fits(actual, made, self._chip)
        except Exception as error:  # noqa: BLE001  a kernel's file may have changed in any way since it was chosen
            reason = (str(error).splitlines() or [type(error).__name__])[0]
        if reason is not None:
            return (), f"{name} ({how}) does not run any more: {reason}"
        return (Trial.of(kernel, actual, made, self._chip.name, self._policy),), how

    def _why_absent(self, name: str) -> str:
        for absent in self._catalogue.unavailable:
            if name == absent.kernel or name.partition("/")[2] == absent.path.stem:
                return absent.reason
        return "no kernel of this name"


def _plan(track: Track, chip: Chip) -> Plan:
    given = {name: value for name, value in track.scenario.items() if value is not None}
    model = find_model(track.model)
    return make_plan(model, chip, scenario_for(model, chip, **given))


def _problems(track: Track, plan: Plan) -> list[Problem]:
    phases = list(dict.fromkeys(phase for phase, _ in plan.steps))
    if track.phase and track.phase not in phases:
        raise UsageError(f"[[track]] {track.model} on {track.chip}: phase {track.phase}: this model has {', '.join(phases)}")
    rows = [row for row in plan.rows if row.problem is not None and track.phase in ("", row.phase)]
    there = list(dict.fromkeys(row.operator for row in rows))
    if unknown := sorted(set(track.operators) - set(there)):
        raise UsageError(f"[[track]] {track.model} on {track.chip}: operators {', '.join(unknown)}: it has {', '.join(there)}")
    found = {row.problem.key: row.problem for row in rows if row.problem and (not track.operators or row.operator in track.operators)}
    if not found:
        raise UsageError(f"[[track]] {track.model} on {track.chip}: its plan has no problem that klab measures")
    return list(found.values())


def _evidence(
    track: Track, plan: Plan, chip: Chip, given: Path | None, by_results: Callable[[], Profile]
) -> tuple[dict[str, Choice], list[str]]:
    """The choices that there are for a plan's problems, and where they come from."""
    path = given or (Path(track.profile) if track.profile else profile_path(chip.name, plan.model.name))
    profile = read_profile(path)
    if profile is None and (given or track.profile):
        raise UsageError(f"{path}: no such profile; `klab choose --model {track.model} --out {path}` writes one")
    if profile is not None and profile.chip != chip.name:
        raise UsageError(f"{path} is a profile of {profile.chip}, not of {chip.name}")
    found = {choice.wanted.problem_key: choice for choice in profile.choices} if profile else {}
    wanted = {problem.key for problem in _problems(track, plan)}
    notes = [f"{plan.model.name}: chosen by {path}"] if found.keys() & wanted else []
    if wanted - found.keys():
        stored = {c.wanted.problem_key: c for c in by_results().choices if c.wanted.problem_key in wanted - found.keys()}
        if stored:
            notes.append(f"{plan.model.name}: no profile has {len(stored)} problems; they are chosen by the results in the store")
        found |= stored
    return found, notes


def _label(problem: Problem) -> str:
    """The problem's label without its operator, which a series names anyway."""
    label, operator = problem.label(), problem.operator
    short = label.removeprefix(operator).removeprefix(operator.replace("_", " ")).strip()
    return short or label


def _named_apart(tracked: Sequence[Tracked]) -> list[Tracked]:
    """Two problems that share a label (their lengths differ in the middle, say) get a part of their key with it."""
    keys: dict[tuple[str, str], set[str]] = {}
    for one in tracked:
        keys.setdefault((one.problem.operator, one.label), set()).add(one.problem.key)
    return [
        dataclasses.replace(one, label=f"{one.label} {one.problem.key[:6]}") if len(keys[(one.problem.operator, one.label)]) > 1 else one
        for one in tracked
    ]
