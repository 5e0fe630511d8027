"""Two candidates compared, and those that cannot be told apart from the best."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass

from klab.harness.choose.candidates import Candidate, value
from klab.harness.measure.stats import FLOOR_ROUNDS, paired_ratio
from klab.harness.store.query import age
from klab.harness.store.result import Result
from klab.harness.tune.objective import LATENCY, Objective
from klab.kernels.contract import canonical_json

# Candidates whose intervals lie apart by this much are not compared round by round: no common drift turns 10% around, and a
# tuned space has hundreds of them.
PLAINLY_APART = 1.1
# More than the last digits of a float.
SLOWER = 1 + 1e-9


@dataclass(frozen=True)
class Ratio:
    """One candidate's value over another's, with its 95% interval.

    `how`: "same rounds" (the median of the ratios of rounds taken in the same laps), "same baseline" (two groups of one contest, each
    compared with the same library kernel in its own laps), "separate" (the two intervals at their worst) or "separate, corrected" (the
    same, of times that were corrected for the device they were taken on: measure/correction.py).
    """

    ratio: float
    low: float
    high: float
    how: str

    @property
    def tied(self) -> bool:
        """True when the interval holds 1: the two cannot be told apart."""
        return self.low <= 1.0 <= self.high


def ratio(a: Candidate, b: Candidate, objective: Objective = LATENCY) -> Ratio:
    """a over b, in the best way that the newest rows which allow it do."""
    if not objective.needs_energy:
        found = _same_rounds(a, b) or _same_baseline(a, b)
        if found is not None:
            return found
    top, bottom = value(a.row, objective), value(b.row, objective)
    how = "separate, corrected" if "corrected" in a.row.build or "corrected" in b.row.build else "separate"
    return Ratio(top.median / bottom.median, top.low / bottom.high, top.high / bottom.low, how)


def _laps(row: Result) -> Hashable:
    """Rows of equal laps were sampled in turns: they name the same contest, or (with no contest recorded) one run took as many rounds."""
    contest = _contest(row).get("id")
    return contest if isinstance(contest, str) and contest else (row.run_id, row.device_uuid, len(row.samples_us))


def _contest(row: Result) -> dict[str, object]:
    contest = row.build.get("contest")
    return contest if isinstance(contest, dict) else {}


def _same_rounds(a: Candidate, b: Candidate) -> Ratio | None:
    """From the rounds that the two have in common."""
    pairs = _common_rounds(a, b)
    return Ratio(*paired_ratio([x for x, _ in pairs], [y for _, y in pairs]), "same rounds") if pairs else None


def _common_rounds(a: Candidate, b: Candidate) -> list[tuple[float, float]]:
    """Of the newest rows of the two that share their laps, and with them of the other blocks of the same final.

    One may have ended earlier: the rounds up to there are common.
    """
    there = {_laps(row): row for row in b.rows}
    pairs: list[tuple[float, float]] = []
    series: Hashable = None
    for row in reversed(a.rows):
        other = there.get(_laps(row))
        if other is None or (pairs and _series(row) != series):
            continue
        rounds = zip(row.samples_us, other.samples_us, _marks(row), _marks(other), strict=False)
        found = [(x, y) for x, y, mark_x, mark_y in rounds if not (mark_x or mark_y)]
        if len(found) >= FLOOR_ROUNDS:
            pairs += found
            series = _series(row)
    return pairs


def _series(row: Result) -> Hashable:
    """A final measures block after block, each with other data: one run, and one policy but for the seed of the data."""
    return row.run_id, row.device_uuid, canonical_json({name: value for name, value in row.policy.items() if name != "seed"})


def _marks(row: Result) -> tuple[int, ...]:
    return row.marked if len(row.marked) == len(row.samples_us) else (0,) * len(row.samples_us)


def _same_baseline(a: Candidate, b: Candidate) -> Ratio | None:
    """From rows of one run that were each compared with the same baseline in their own laps: drift between the groups cancels."""
    there = {where: anchored for row in b.rows if (anchored := _anchored(row)) is not None for where in [anchored[0]]}
    for row in reversed(a.rows):
        here = _anchored(row)
        other = there.get(here[0]) if here is not None else None
        if here is not None and other is not None:
            (top, top_low, top_high), (bottom, bottom_low, bottom_high) = here[1], other[1]
            return Ratio(top / bottom, top_low / bottom_high, top_high / bottom_low, "same baseline")
    return None


def _anchored(row: Result) -> tuple[Hashable, tuple[float, float, float]] | None:
    """((run, device, baseline), the row's ratio to it with its interval), or None where no baseline ran beside it."""
    contest = _contest(row)
    numbers = tuple(contest.get(name) for name in ("ratio", "ratio_low", "ratio_high"))
    if not contest.get("baseline") or not all(isinstance(number, float) and number > 0 for number in numbers):
        return None
    baseline = canonical_json([contest["baseline"], contest.get("baseline_config")])
    return (row.run_id, row.device_uuid, baseline), numbers  # type: ignore[return-value]


def best(found: list[Candidate], objective: Objective) -> Candidate:
    """The lowest median, unless another candidate beats it round by round; then that one, and so on."""
    current = min(found, key=lambda c: (value(c.row, objective).median, c.name))
    seen = {current.name}
    while True:
        beaters = [
            (r.ratio, c.name, c) for c in found if c.name not in seen and (r := _close_ratio(c, current, objective)) and r.high < 1.0
        ]
        if not beaters:
            return current
        current = min(beaters, key=lambda beater: beater[:2])[2]
        seen.add(current.name)


def tie_set(found: list[Candidate], winner: Candidate, objective: Objective) -> list[Candidate]:
    """The winner and every candidate that cannot be told apart from it, the lowest median first."""
    ties = [c for c in found if c.name == winner.name or ((r := _close_ratio(c, winner, objective)) is not None and r.tied)]
    return sorted(ties, key=lambda c: (value(c.row, objective).median, age(c.row), c.name))


def _close_ratio(a: Candidate, b: Candidate, objective: Objective) -> Ratio | None:
    """`ratio`, or None where a is plainly the slower: the stored intervals lie well apart, or a was slower in every common round (then no
    resample of these rounds has a median at or below 1).
    """
    top, bottom = value(a.row, objective), value(b.row, objective)
    if not top.overlaps(bottom) and top.median / bottom.median > PLAINLY_APART:
        return None
    pairs = [] if objective.needs_energy else _common_rounds(a, b)
    return None if pairs and all(x > y * SLOWER for x, y in pairs) else ratio(a, b, objective)
