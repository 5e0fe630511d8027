"""How the final of one problem ended, as it is told, chosen by, and kept beside the search's journal for the next run of that search."""

from __future__ import annotations

import json
import os
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from klab.harness.plan.trial import Trial
from klab.harness.store.result import Status
from klab.harness.tune.finals_told import Final
from klab.kernels.contract import Json, canonical_json

SUFFIX = ".final"
# A verdict that time cut short is found anew by a final that has so many times as much.
WORTH_REPEATING = 2.0


@dataclass(frozen=True)
class Ending:
    """`word` for a table ("won 0.93x", "tie: default", "not confirmed", "no final"), `reason` for people.

    kernel, config: who won, "" where it was not decided (too little time, or nobody came through). medians_us: by "kernel config", over the
    blocks of the final. took_s: seconds of the final. known: it is an earlier run's.
    """

    word: str
    reason: str
    kernel: str = ""
    config: Mapping[str, Json] = field(default_factory=dict)
    ties: int = 0
    medians_us: Mapping[str, float] = field(default_factory=dict)
    took_s: float = 0.0
    known: bool = False

    @property
    def decided(self) -> bool:
        """True when its winner is to be chosen."""
        return bool(self.kernel)

    def median_us(self, kernel: str, config: Mapping[str, Json]) -> float | None:
        """The median over the final of one that took part."""
        return self.medians_us.get(f"{kernel} {canonical_json(dict(config))}")


def ending(final: Final, default: Trial | None, took_s: float) -> Ending:
    """What a Final comes to."""
    times: dict[str, list[float]] = defaultdict(list)
    for row in final.results:
        if row.status is Status.OK and row.median_us is not None:
            times[f"{row.kernel} {canonical_json(row.config)}"].append(row.median_us)
    medians = {name: statistics.median(values) for name, values in times.items()}
    winner = final.winner
    if winner is None:
        return Ending("nobody", final.reason, medians_us=medians, took_s=took_s)
    if not final.confirmed:
        return Ending("not confirmed", final.reason, medians_us=medians, took_s=took_s)
    if default is not None and named(winner) == named(default):
        word = "tie: default" if len(final.ties) > 1 else "default"
    else:
        word = "won"
        ratio = next((s.to_default.ratio for trial, s in final.standings if trial is winner and s.to_default), None)
        if final.objective.needs_energy and default is not None:
            own, usual = (next((final.values[s.name] for t, s in final.standings if t is who and s.name in final.values), None)
                          for who in (winner, default))  # fmt: skip
            ratio = own.median / usual.median if own and usual and usual.median > 0 else None
        word += f" {ratio:.3f}x" if ratio else ""
    config = winner.config.to_json_full()
    return Ending(word, final.reason, winner.kernel, config, len(final.ties), medians, took_s)


def named(trial: Trial) -> str:
    """Who it is, whatever it is measured under."""
    return f"{trial.kernel} {canonical_json(trial.config.to_json_full())}"


def keep(path: Path, made: Ending, field: Iterable[Trial], objective: str) -> None:
    """Write a decided one beside the journal. A disk that takes no more loses the verdict alone: the rows are stored."""
    if not made.decided:
        return
    whole = {"objective": objective, "contenders": sorted(map(named, field)), "ending": asdict(made)}
    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        part.write_text(json.dumps(whole))
        part.replace(path)
    except OSError:
        part.unlink(missing_ok=True)


def kept(path: Path, field: Sequence[Trial], objective: str, seconds: float) -> Ending | None:
    """The verdict of an earlier run between these very trials; None where there is none, or where this run has more time for a better."""
    try:
        whole = json.loads(path.read_text())
        if whole["objective"] != objective or whole["contenders"] != sorted(map(named, field)):
            return None
        found = Ending(**{**whole["ending"], "known": True})
    except (OSError, ValueError, KeyError, TypeError):
        return None
    cut = "time was up" in found.reason
    return None if cut and seconds >= WORTH_REPEATING * found.took_s else found
