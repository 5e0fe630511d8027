"""What the tuner took to find a kernel, beside trying every candidate: seconds of the device, and how much it missed by."""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from klab.harness.choose.candidates import Candidate, candidates, why_not
from klab.harness.choose.compare import Ratio, best, ratio
from klab.harness.report.evidence_space import held_out, recorded_rows
from klab.harness.report.figures.search_journals import Recorded, read
from klab.harness.store.query import age
from klab.harness.store.result import Result
from klab.harness.tune.course import FOLDER, SUFFIX
from klab.harness.tune.ending import SUFFIX as FINAL
from klab.harness.tune.objective import LATENCY, counting_rounds, latency
from klab.harness.tune.prior import prior_for
from klab.harness.tune.rank import expected_us
from klab.harness.tune.replay.export import Recordings, export, policy_key
from klab.harness.tune.replay.recorded import RecordedSpace
from klab.harness.tune.replay.simulate import Run, Step, run_of, simulate
from klab.harness.tune.search import Budget
from klab.harness.tune.space import KERNEL
from klab.harness.tune.strategy import DEFAULT, Evaluation, Prior
from klab.kernels.contract import Chip, Json, Kernel, Problem, canonical_json
from klab.kernels.errors import KlabError

EXHAUSTIVE = "exhaustive"
WITHIN = (1.05, 1.01)
REPLAYS = 5
# Of a replay where no search of the device says how many.
REPLAYED_EVALUATIONS = 100


@dataclass(frozen=True)
class Pace:
    """One search. seconds: of the device, for what the search evaluated; defaults and libraries, measured before every search, and the
    final (final_s, None where there was none) are apart. within: the seconds until its choice was, and stayed, within a factor of the
    best that was recorded; infinite where it never was. regret: what it ended with over that best; held_out: the same without the luck
    of the best (`evidence_space.held_out`), None where that cannot be told.
    """

    evaluations: float
    seconds: float
    regret: Ratio | None
    within: Mapping[float, float]
    final_s: float | None = None
    choice: str = ""
    held_out: float | None = None


@dataclass(frozen=True)
class ToBest:
    """A problem whose space is recorded. recorded: candidates with an outcome; space: how many there are, None where no journal tells."""

    problem: str
    recorded: int
    space: int | None
    best: str = ""
    best_us: float | None = None
    exhaustive_s: float | None = None
    tuner: Pace | None = None
    replayed: Pace | None = None
    notes: tuple[str, ...] = ()

    @property
    def complete(self) -> bool:
        """True when every candidate has an outcome."""
        return self.space is not None and self.recorded >= self.space


@dataclass(frozen=True)
class Found:
    """A journal below a folder of results, and what its final came to ({} where there is none)."""

    journal: Recorded
    final: Mapping[str, Json]

    @property
    def spent_s(self) -> float:
        """Seconds of the device."""
        return math.fsum(e.spent_s for e in self.journal.evaluations)

    @property
    def distinct(self) -> int:
        """Candidates with an outcome."""
        return len({e.candidate for e in self.journal.evaluations})

    @property
    def epoch(self) -> str:
        """Of driver and toolchain."""
        return str(self.journal.header.get("epoch", ""))


def searches(folder: Path) -> Iterator[Found]:
    """The searches of a folder, by name of file; files that are none are passed over."""
    for path in sorted((folder / FOLDER).glob(f"*{SUFFIX}")):
        journal = read(path)
        if journal is not None:
            yield Found(journal, _final(path.with_suffix(FINAL)))


def finals(folder: Path) -> dict[str, tuple[str, Mapping[str, Json], str]]:
    """Problem key -> (kernel, configuration, why): who won the finals that were decided, the longest of a problem."""
    decided = sorted((one for one in searches(folder) if one.final.get("kernel")), key=lambda one: float(one.final.get("took_s") or 0.0))
    return {
        str(one.journal.header["problem"]): (str(one.final["kernel"]), dict(one.final["config"]), str(one.final.get("reason", "")))
        for one in decided
    }


def time_to_best(
    recording: Recordings,
    problem: Problem,
    chip: Chip,
    kernels: Mapping[str, Kernel],
    exhaustive: Iterable[Found],
    tuned: Iterable[Found],
    tuner_rows: Sequence[Result],
) -> ToBest:
    """recording: all rows of the problem, of which those of klab's own kernels are the space. tuner_rows: those of the tuner's searches."""
    space, every, told = rests_on(recording, exhaustive)
    own = dataclasses.replace(space, rows=tuple(row for row in space.rows if not row.library))
    try:
        recorded = export(own)
    except KlabError as error:
        return ToBest(recording.label, 0, _candidates(every), notes=(*told, str(error)))
    reached = every.distinct if every else len(recorded.space)
    made = ToBest(recording.label, reached, _candidates(every), exhaustive_s=every.spent_s if every else None)
    field = {_point(c.kernel, c.config): c for c in candidates(_shown(own.rows, recorded))}
    if not field or not math.isfinite(recorded.optimum_us):
        return dataclasses.replace(made, notes=(*told, "no candidate of it has a valid time"))
    first = best(list(field.values()), LATENCY)
    epoch = every.epoch if every else ""
    search = max(
        (one for one in tuned if one.journal.header.get("strategy") != EXHAUSTIVE),
        key=lambda one: (one.epoch == epoch, len(one.journal.evaluations), one.epoch),
        default=None,
    )
    pace, notes = _pace(search, recorded, field, first, tuner_rows) if search else (None, ())
    if search and search.epoch != epoch:
        notes = (*notes, "the tuner searched it under another driver or toolchain than the recorded space is of")
    evaluations = int(pace.evaluations) if pace else min(REPLAYED_EVALUATIONS, len(recorded.space))
    return dataclasses.replace(
        made,
        best=f"{first.kernel} {first.config}",
        best_us=first.row.median_us,
        tuner=pace,
        replayed=_replayed(recorded, problem, chip, kernels, max(evaluations, 1)),
        notes=(*told, *notes),
    )


def rests_on(recording: Recordings, exhaustive: Iterable[Found]) -> tuple[Recordings, Found | None, tuple[str, ...]]:
    """The rows of a problem that its recorded space rests on, the search which tried every candidate (or most), and what is to be said."""
    newest: dict[str, tuple[Any, ...]] = {}
    for row in recording.rows:
        newest[row.epoch] = max(newest.get(row.epoch, ()), age(row))

    def worth(one: Found) -> tuple[Any, ...]:
        complete = one.distinct >= (_candidates(one) or math.inf)
        return complete, 0 if complete else one.distinct, newest.get(one.epoch, ()), one.epoch

    every = max((one for one in exhaustive if one.journal.header.get("strategy") == EXHAUSTIVE), key=worth, default=None)
    rows, notes = recorded_rows(recording.rows, every.epoch if every else "")
    return dataclasses.replace(recording, rows=tuple(rows)), every, notes


def _candidates(found: Found | None) -> int | None:
    count = found.journal.header.get("candidates") if found else None
    return count if isinstance(count, int) else None


def _final(path: Path) -> Mapping[str, Json]:
    """{} for what is none."""
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))["ending"]
        took = found.get("took_s")
        return found | {"config": dict(found.get("config") or {}), "took_s": None if took is None else float(took)}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def _point(kernel: str, config: str) -> str:
    return f"{kernel} {config}"


def _shown(rows: Iterable[Result], recorded: RecordedSpace) -> list[Result]:
    """The rows with a valid time that the recorded space rests on."""
    epoch, policy = recorded.about["epoch"], recorded.about["policy_key"]
    sources = recorded.about["sources"]
    return [
        row
        for row in rows
        if row.epoch == epoch and policy_key(row) == policy and sources.get(row.kernel) == row.source_digest and why_not(row) is None
    ]


def _pace(
    search: Found, recorded: RecordedSpace, field: Mapping[str, Candidate], first: Candidate, rows: Sequence[Result]
) -> tuple[Pace, tuple[str, ...]]:
    names = _by_value(rows)
    steps, chosen, notes = _steps(search.journal.evaluations, names, recorded)
    final = search.final
    if final.get("kernel"):
        chosen = _point(str(final["kernel"]), canonical_json(dict(final["config"])))
    judged = ratio(field[chosen], first) if chosen in field else None
    if chosen and judged is None:
        notes = (*notes, f"its choice, {chosen}, has no valid time among the recorded candidates, so its regret is not known")
    if chosen == _point(first.kernel, first.config):
        judged = Ratio(1.0, 1.0, 1.0, "itself")
    fair = held_out(field.values(), field[chosen]) if chosen in field else None
    run = Run(0, steps, len({e.candidate for e in search.journal.evaluations}), search.spent_s, ())
    took = final.get("took_s")
    within = {limit: run.seconds_within(limit * recorded.optimum_us) for limit in WITHIN}
    return Pace(run.evaluations, run.seconds, judged, within, float(took) if took is not None else None, chosen, fair), notes


def _by_value(rows: Iterable[Result]) -> dict[tuple[int, str], str]:
    """(rounds, value) of a journal's line -> whose it is. A journal has no names: its values are those of the rows, to the last digit."""
    found: dict[tuple[int, str], str] = {}
    for row in rows:
        name, whole, samples = _point(row.kernel, canonical_json(dict(row.config))), latency(row), counting_rounds(row)
        if whole is not None:
            found[0, f"{whole.median:.12g}"] = name
        if samples:
            found[len(row.samples_us), f"{statistics.median(samples):.12g}"] = name
    return found


def _steps(
    evaluations: Sequence[Evaluation], names: Mapping[tuple[int, str], str], recorded: RecordedSpace
) -> tuple[tuple[Step, ...], str, tuple[str, ...]]:
    """Each change of the search's mind, what it ended with, and what could not be told. A choice counts by its recorded full time."""
    index = {
        _point(str(point.pop(KERNEL)), canonical_json(point)): i
        for i, point in enumerate(map(recorded.space.point, range(len(recorded.space))))
    }
    steps: list[Step] = []
    standing, seconds, seen, chosen, unknown = (True, math.inf), 0.0, set[int](), "", 0
    for e in evaluations:
        seconds += e.spent_s
        seen.add(e.candidate)
        if not e.ok or (e.rounds > 0, e.value) >= standing:
            continue
        standing = (e.rounds > 0, e.value)
        name = names.get((e.rounds, f"{e.value:.12g}"), "")
        at = index.get(name)
        chosen = name or chosen
        unknown += at is None
        if at is not None:
            steps.append(Step(len(seen), seconds, float(recorded.time_us[at])))
    notes = (f"{unknown} of its steps have no row among the recorded candidates and are left out of its seconds",) if unknown else ()
    return tuple(steps), chosen, notes


def _replayed(recorded: RecordedSpace, problem: Problem, chip: Chip, kernels: Mapping[str, Kernel], evaluations: int) -> Pace:
    """The default strategy on the recorded space: the medians over seeds; the regret with the least and the largest."""
    try:
        prior = prior_for(recorded.space, problem, chip, kernels, (), expected_us=expected_us)
    except (KlabError, KeyError, TypeError, ValueError):  # rows of a kernel that is gone, or has other knobs now
        prior = Prior()
    budget = Budget(evaluations=evaluations)
    runs = [run_of(recorded, simulate(recorded, DEFAULT, seed=seed, budget=budget, prior=prior), seed) for seed in range(REPLAYS)]
    regrets = [run.best_us(evaluations) / recorded.optimum_us for run in runs]
    return Pace(
        statistics.median(run.evaluations for run in runs),
        statistics.median(run.seconds for run in runs),
        Ratio(statistics.median(regrets), min(regrets), max(regrets), f"{REPLAYS} seeds"),
        {limit: statistics.median(run.seconds_within(limit * recorded.optimum_us) for run in runs) for limit in WITHIN},
    )
