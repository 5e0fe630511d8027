"""How a final ended, for people and programs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from klab.harness.measure.stats import FLOOR_ROUNDS
from klab.harness.plan.trial import Trial
from klab.harness.store.result import Result, Status
from klab.harness.tune.finals_energy import LEAST_WINDOWS, ByValue
from klab.harness.tune.finals_evidence import Compared
from klab.harness.tune.finals_rule import Standing, Verdict
from klab.harness.tune.objective import LATENCY, Interval, Objective
from klab.kernels.contract import Json, canonical_json

NO_CLOCK = "not confirmed in cycles: no clock"


@dataclass(frozen=True)
class Final:
    """`winner` is one of the trials given (None: nobody came through, or nobody has a value by the objective); `reason` says why in a line.

    ties: all that cannot be told from the best, the winner first where it is among them. confirmed: False where the search's ranking
    stands because the time was up before the first block. cycles: "confirmed", "no clock", "not needed". fastest: the winner by time,
    whatever the objective. left_out: contenders for whom there was no room. `values` are by the objective, where that needs energy.
    """

    winner: Trial | None
    ties: tuple[Trial, ...]
    reason: str
    objective: Objective = LATENCY
    confirmed: bool = True
    cycles: str = "not needed"
    fastest: Trial | None = None
    standings: tuple[tuple[Trial, Standing], ...] = ()
    values: Mapping[str, Interval] = field(default_factory=dict)
    results: tuple[Result, ...] = ()
    left_out: tuple[Trial, ...] = ()

    @property
    def rounds(self) -> int:
        """Rounds measured, over all contenders."""
        return sum(standing.rounds for _, standing in self.standings)

    @property
    def ratios(self) -> dict[str, tuple[float, float, float]]:
        """Trial key -> (ratio, low, high) of its time over the leader's; the leader has 1."""
        found: dict[str, tuple[float, float, float]] = {}
        for trial, standing in self.standings:
            ratio = standing.to_leader
            if ratio is not None:
                found[trial.key] = ratio.ratio, ratio.low, ratio.high
            elif standing.state in ("winner", "tie"):
                found[trial.key] = 1.0, 1.0, 1.0
        return found

    def to_json(self) -> list[dict[str, Json]]:
        """One object for the final and one per contender, for JSON lines."""
        head: dict[str, Json] = {
            "type": "final",
            "winner": _named(self.winner),
            "ties": [_named(trial) for trial in self.ties],
            "fastest": _named(self.fastest),
            "objective": str(self.objective),
            "reason": self.reason,
            "confirmed": self.confirmed,
            "cycles": self.cycles,
            "rounds": self.rounds,
            "left_out": len(self.left_out),
        }
        return [head, *(self._row(trial, standing) for trial, standing in self.standings)]

    def _row(self, trial: Trial, standing: Standing) -> dict[str, Json]:
        value = self.values.get(standing.name)
        return {
            "type": "contender",
            **(_named(trial) or {}),
            "state": standing.state,
            "rounds": standing.rounds,
            "to_leader": _ratio(standing.to_leader),
            "to_default": _ratio(standing.to_default),
            "value": value and [value.median, value.low, value.high],
            "reason": standing.reason,
        }


def _named(trial: Trial | None) -> dict[str, Json] | None:
    return None if trial is None else {"kernel": trial.kernel, "config": trial.config.to_json_full()}


def _finite(value: float) -> float | None:
    return value if 0.0 < value < float("inf") else None


def _ratio(found: Compared | None) -> dict[str, Json] | None:
    if found is None:
        return None
    return {"ratio": found.ratio, "low": _finite(found.low), "high": _finite(found.high), "cycles": found.cycles}


def label(trial: Trial) -> str:
    """`name` of the kernel and its configuration."""
    return f"{trial.kernel.partition('/')[2]} {trial.config.label()}".removesuffix(" -")


def untold(field: Sequence[Trial], first: Trial, told: Sequence[Result], left_out: Sequence[Trial]) -> Final:
    """There was nothing to compare (no time, or nobody to compare with): the search's first stands, and is called what it is."""
    if len(field) == 1:
        reason = "nobody else came to the final"
    elif told:
        reason = f"{_nothing(told, len(field))}: the ranking of the search stands, not confirmed"
    else:
        reason = "no time for a final: the ranking of the search stands, not confirmed"
    return Final(
        first,
        (first,),
        reason,
        confirmed=False,
        fastest=first,
        standings=tuple((trial, Standing(label(trial), "not compared", 0)) for trial in field),
        results=tuple(told),
        left_out=tuple(left_out),
    )


def _nothing(told: Sequence[Result], field: int) -> str:
    """What happened in a final without one block that counts."""
    bad = [row for row in told if row.status is not Status.OK]
    if not bad:
        came = len({(row.kernel, canonical_json(row.config)) for row in told})
        return (
            f"the final ended without a block that counts: {came} of {field} contenders were timed, none in {FLOOR_ROUNDS} unmarked rounds"
        )
    counted = Counter(row.status.value for row in bad)
    said = ", ".join(f"{count} x {status}" for status, count in counted.most_common())
    why = next((row.reason for row in bad if row.reason), "")
    return f"no block of the final came through ({said} of {len(told)} results{f': {why}' if why else ''})"


def told_by_time(
    verdict: Verdict, names: Mapping[str, Trial], default: str, told: Sequence[Result], left_out: Sequence[Trial], unsure: str
) -> Final:
    """A final by latency. `unsure`: why the intervals are wider than was wanted, or ""."""
    reason = _why(verdict, names, default)
    if unsure and verdict.winner is not None and len(verdict.ties) > 1:
        reason += f"; {unsure}"
    apart = [label(names[s.name]) for s in verdict.standings if s.state == "not compared"]
    if apart and verdict.winner is not None:
        reason += f"; not compared, as no block has both it and the best: {', '.join(apart)}"
    winner = names[verdict.winner] if verdict.winner else None
    return Final(
        winner,
        tuple(names[name] for name in verdict.ties),
        reason,
        cycles=verdict.cycles,
        fastest=winner,
        standings=tuple((names[s.name], s) for s in verdict.standings),
        results=tuple(told),
        left_out=tuple(left_out),
    )


def _why(verdict: Verdict, names: Mapping[str, Trial], default: str) -> str:
    standing = {s.name: s for s in verdict.standings}
    if verdict.winner is None or verdict.leader is None:
        failures = "; ".join(f"{label(names[s.name])}: {s.reason}" for s in verdict.standings if s.reason)
        return f"nobody came through the final: {failures or 'nothing was measured'}"
    others = len(verdict.ties) - 1
    tied = f", in a tie with {others} other{'s' if others > 1 else ''}" if others else ""
    to_default = standing[verdict.winner].to_default
    if verdict.why == "no default":
        why = standing[default].reason or "it shared no laps"
        return f"the default is out ({why}); {label(names[verdict.winner])} is the best of the others{tied}"
    if verdict.why == "faster" and to_default is not None:
        clock = NO_CLOCK if to_default.cycles is None else f"{to_default.cycles:.4f} in cycles"
        return f"{label(names[verdict.winner])} takes {_said(to_default)} of the default's time ({clock}){tied}"
    if verdict.leader == default:
        return f"the default: nothing is faster{tied}"
    best = standing[verdict.leader].to_default
    assert best is not None
    if verdict.why == "not in cycles":
        return f"the default: {label(names[verdict.leader])} takes {_said(best)} of its time, but {best.cycles or 0.0:.4f} in cycles: a tie"
    return f"the default: nothing is clearly faster (the best, {label(names[verdict.leader])}, takes {_said(best)} of its time){tied}"


def _said(found: Compared) -> str:
    high = f"{found.high:.4f}" if found.high < float("inf") else "?"
    return f"{found.ratio:.4f} [{found.low:.4f}, {high}]" if found.low > 0 else f"{found.ratio:.4f} [?, ?]"


def told_by_value(
    choice: ByValue,
    verdict: Verdict,
    names: Mapping[str, Trial],
    default: str,
    objective: Objective,
    told: Sequence[Result],
    left_out: Sequence[Trial],
    reasons: Sequence[str],
    short: str,
) -> Final:
    """A final by another objective. `reasons`: of rows without an energy; `short`: why there were fewer windows than wanted, or ""."""
    fastest = names[verdict.winner] if verdict.winner else None
    unit, values, winner = objective.unit, choice.values, choice.winner
    if winner is None and short:
        # That it can be measured at all was not seen, and nothing was shown to be better than the default.
        winner = default if default not in {s.name for s in verdict.standings if s.state == "out"} else None
    if winner is None:
        why = next((reason for reason in reasons if reason), short or "it was not measured")
        reason = f"nobody has a value by {objective.name}: {why}"
        if fastest is not None:
            reason += f"; by time {label(fastest)} wins"
    elif choice.why in ("nobody", "not confirmed"):
        why = short or next((reason for reason in reasons if reason), "the others' was not measured")
        windows = f"{choice.windows} window{'' if choice.windows == 1 else 's'}"
        reason = f"the default: tie, energy not confirmed: {windows} of {LEAST_WINDOWS} at least ({why})"
    else:
        own = values.get(winner)
        reason = label(names[winner]) + (f": {own.median:.4g} {unit}" if own else "")
        if choice.why == "faster":
            found = choice.to_default[winner]
            over = f"{found.ratio:.4f} [{found.low:.4f}, {found.high:.4f}] of the default's"
            reason += f", {over} {values[default].median:.4g} {unit} ({choice.windows} windows)"
        elif choice.why == "tie":
            reason = f"the default: nothing is clearly lower ({choice.windows} windows); " + reason
        else:
            reason = "the default is out; " + reason
    return Final(
        names[winner] if winner else None,
        tuple(names[name] for name in choice.ties),
        reason,
        objective,
        cycles=verdict.cycles,
        fastest=fastest,
        standings=tuple((names[s.name], s) for s in verdict.standings),
        values=values,
        results=tuple(told),
        left_out=tuple(left_out),
    )
