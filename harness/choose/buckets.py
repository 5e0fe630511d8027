"""Which results make one bucket: problems of one operator that differ in one size, and what each configuration is worth on each."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from klab.harness.choose.candidates import Candidate, value
from klab.harness.choose.choose import place, wanted_from
from klab.harness.choose.profile import Wanted
from klab.harness.choose.select import Selection
from klab.harness.choose.settle import Defaults
from klab.harness.store.result import Result
from klab.harness.tune.bucket import Bucket, buckets
from klab.harness.tune.objective import Objective
from klab.kernels.contract import Json, canonical_json
from klab.kernels.errors import UsageError

# Of all the configurations that serve a bucket, so many are told.
TOLD = 3
# Of the shapes that a configuration has no value on, so many are named.
NAMED = 3


@dataclass(frozen=True)
class Line:
    """Problems of one operator that differ in `axis` alone, in its order. `sizes` are theirs."""

    operator: str
    axis: str
    problems: tuple[Wanted, ...]
    sizes: tuple[float, ...]


@dataclass(frozen=True)
class Filled:
    """One bucket of a line. `best` is None where no configuration has a value on every shape: `reason` then says what is missing.

    own_best: per shape its own best configuration and value; value_at: per shape that of `best`.
    """

    line: Line
    bucket: Bucket
    problems: tuple[Wanted, ...]
    sizes: tuple[float, ...]
    candidates: Mapping[str, Candidate]
    values: Mapping[str, Mapping[str, float]]
    reason: str = ""

    @property
    def best(self) -> Candidate | None:
        """The one to take."""
        return self.candidates[self.bucket.best.config] if self.bucket.best else None

    def to_json(self, objective: Objective, how: str) -> dict[str, Json]:
        """One object per bucket, for JSON lines."""
        shapes = []
        for n, (problem, size) in enumerate(zip(self.problems, self.sizes, strict=True)):
            row = self.values[problem.problem_key]
            own = min(row, key=lambda name: (row[name], name), default=None)
            shapes.append(
                {
                    "problem": problem.label,
                    "size": size,
                    "value": row.get(self.bucket.best.config) if self.bucket.best else None,
                    "own_best": own and self._named(own) | {"value": row[own]},
                    "regret": self.bucket.best.regrets[n] if self.bucket.best else None,
                }
            )
        return {
            "type": "bucket",
            "operator": self.line.operator,
            "axis": self.line.axis,
            "objective": str(objective),
            "unit": objective.unit,
            "how": how,
            **({"kernel": None, "config": None} if self.bucket.best is None else self._named(self.bucket.best.config)),
            "regret": self.bucket.best.regret if self.bucket.best else None,
            "shapes": shapes,
            "next": [self._named(s.config) | {"regret": s.regret} for s in self.bucket.ranking[1:TOLD]],
            "complete": len(self.bucket.ranking),
            "incomplete": len(self.bucket.fails),
            "reason": self.reason,
        }

    def _named(self, config: str) -> dict[str, Json]:
        found = self.candidates[config]
        return {"kernel": found.kernel, "config": dict(found.row.config)}


def lines(problems: Iterable[Wanted], axis: str | None = None) -> list[Line]:
    """The problems that differ in one size, per operator along its first size in which any do (or along `axis`, where that is given).

    A list of equal lengths counts as two sizes: how many (`kv_lens.count`) and how long (`kv_lens.each`). Problems that no other
    differs from in that size alone are in no line.
    """
    by_operator: dict[str, list[Wanted]] = defaultdict(list)
    for problem in sorted(problems, key=place):
        by_operator[problem.operator].append(problem)
    found: list[Line] = []
    for operator, group in by_operator.items():
        axes = list(dict.fromkeys(name for problem in group for name in _sizes(problem.problem)))
        for name in axes if axis is None else [a for a in axes if axis in (a, a.partition(".")[0])]:
            made = _along(operator, name, group)
            found += made
            if made:
                break
    return found


def _along(operator: str, axis: str, group: Sequence[Wanted]) -> list[Line]:
    together: dict[str, dict[float, Wanted]] = defaultdict(dict)
    for problem in group:
        sizes = _sizes(problem.problem)
        if axis in sizes:
            rest = {name: size for name, size in sizes.items() if name != axis}
            other = {name: v for name, v in problem.problem.items() if name not in {s.partition(".")[0] for s in sizes}}
            together[canonical_json([rest, other])][sizes[axis]] = problem
    return [
        Line(operator, axis, tuple(found[size] for size in sorted(found)), tuple(sorted(found)))
        for found in together.values()
        if len(found) > 1
    ]


def _sizes(problem: Mapping[str, Json]) -> dict[str, float]:
    """The numbers of a problem by name; of a list with equal entries its length and its entry."""
    found: dict[str, float] = {}
    for name, size in problem.items():
        if isinstance(size, int | float) and not isinstance(size, bool):
            found[name] = size
        elif isinstance(size, list | tuple) and size and all(isinstance(x, int) and x == size[0] for x in size):
            found |= {f"{name}.count": len(size), f"{name}.each": size[0]}
    return found


def fill(
    results: Iterable[Result],
    problems: Sequence[Wanted] | None,
    objective: Objective,
    *,
    how: str = "geomean",
    count: int = 1,
    axis: str | None = None,
    chip: str | None = None,
    device: str | None = None,
    sources: Mapping[str, str] | None = None,
    defaults: Defaults | None = None,
    current_only: bool = False,
) -> tuple[list[Filled], list[str]]:
    """The buckets of every line among `problems` (None: all with a result), `count` at most in each, and notes for people.

    A value is the median of a candidate's newest row. UsageError when no two problems differ in one size alone.
    """
    selected = Selection(results, objective, chip=chip, device=device, sources=sources, defaults=defaults, current_only=current_only)
    wanted = list(problems) if problems is not None else wanted_from(selected.rows)
    drawn = lines(wanted, axis)
    if not drawn:
        where = f" in {axis}" if axis else ""
        raise UsageError(f"no two of {len(wanted)} problems differ in one size alone{where}: nothing to share a configuration between")
    found: list[Filled] = []
    for line in drawn:
        candidates: dict[str, Candidate] = {}
        values: dict[str, dict[str, float]] = {}
        for problem in line.problems:
            here = {canonical_json(list(c.name[:3])): c for c in selected.candidates(problem.problem_key)}
            candidates |= here
            values[problem.problem_key] = {name: value(c.row, objective).median for name, c in here.items()}
        by_key = {p.problem_key: (p, size) for p, size in zip(line.problems, line.sizes, strict=True)}
        for bucket in buckets(values, count, how):
            inside = [by_key[key] for key in bucket.shapes]
            reason = "" if bucket.best else _why_none(bucket, [p for p, _ in inside], candidates, selected)
            found.append(Filled(line, bucket, tuple(p for p, _ in inside), tuple(s for _, s in inside), candidates, values, reason))
    return found, selected.notes


def _why_none(bucket: Bucket, problems: Sequence[Wanted], candidates: Mapping[str, Candidate], selected: Selection) -> str:
    """What is missing for one configuration to serve the bucket: the shapes that nothing serves, or those that the nearest one lacks."""
    labels = {p.problem_key: p.label for p in problems}
    for problem in problems:
        if not selected.candidates(problem.problem_key):
            return f"{problem.label}: {selected.why_open(problem.problem_key)}"
    nearest = min(bucket.fails, key=lambda name: (len(bucket.fails[name]), name))
    lacks = [labels[key] for key in bucket.fails[nearest]]
    named = ", ".join(lacks[:NAMED]) + (" ..." if len(lacks) > NAMED else "")
    who = candidates[nearest]
    config = " ".join(f"{name}={v}" for name, v in who.row.config.items())
    return f"no configuration has a result on every shape; the nearest, {who.kernel} {config}, has none on {named}"
