"""What records of other chips and shapes say of a space: an expected relative time per candidate, measured there or near there."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from klab.harness.tune.space import ABSENT, KERNEL, Space, identity
from klab.kernels.contract import Json
from klab.kernels.errors import UsageError

Float = NDArray[np.float64]
Rows = NDArray[np.int16]

# A candidate that failed in a source counts as what its neighbours that ran suggest, slower by this share of the source's spread (between
# its tenths): behind most, not out of the question, because another chip may have more shared memory. It says nothing of its neighbours:
# the best tiles lie at the edge of what fits.
FAILED_SPREAD = 0.5
# Near points that a candidate unknown to a source is judged by, and how much such a judgement counts beside a measurement of that very
# point elsewhere, at best.
NEAR = 6
GUESSED = 0.5


def transfer(target: Space, sources: Sequence[tuple[Space, Float]], weights: Sequence[float] | None = None) -> Float:
    """Expected relative time of every candidate of `target`, shape (candidates,); 1.0 is the best of the first source, nan: nothing known.

    A source is a space and its times, infinite for what failed, nan for what was not tried; any unit. Its times are taken relative to
    its best, so chips and shapes of any speed combine. A point that a source has keeps its time there; any other is judged by the
    nearest points of the same kernel, over the parameters that both spaces have, and counts half at best. `weights` says how similar a
    source is (default: all alike); sources are combined as a weighted mean of logarithms, after shifting each so that it agrees in the
    median with those before it on the candidates they share. UsageError when arrays and spaces do not match.
    """
    if weights is not None and len(weights) != len(sources):
        raise UsageError(f"{len(weights)} weights for {len(sources)} sources")
    total, mass = np.zeros(len(target)), np.zeros(len(target))
    for (space, time), weight in zip(sources, weights or [1.0] * len(sources), strict=True):
        if len(time) != len(space):
            raise UsageError(f"a source has {len(space)} candidates and {len(time)} times")
        expected, trust = from_one(target, space, time)
        accumulate(total, mass, expected, weight * trust)
    return np.exp(mean(total, mass))


def accumulate(total: Float, mass: Float, expected: Float, weight: Float) -> None:
    """Add logarithms `expected` (nan where unknown) at `weight` to a running weighted sum, shifted to agree in the median with it."""
    known = np.isfinite(expected) & (weight > 0)
    both = known & (mass > 0)
    shift = np.median(total[both] / mass[both] - expected[both]) if both.any() else 0.0
    total[known] += weight[known] * (expected[known] + shift)
    mass[known] += weight[known]


def mean(total: Float, mass: Float) -> Float:
    """The weighted mean of what was accumulated; nan where nothing was."""
    found: Float = np.divide(total, mass, out=np.full(len(total), np.nan), where=mass > 0)
    return found


def from_one(target: Space, source: Space, time: Float) -> tuple[Float, Float]:
    """The logarithm of the expected time relative to the source's best, and how far to trust it (1 measured, at most GUESSED else)."""
    expected, trust = np.full(len(target), np.nan), np.zeros(len(target))
    ok = np.isfinite(time) & (time > 0)
    if not ok.any():
        return expected, trust
    known = ok | np.isposinf(time)
    log = np.log(np.where(ok, time, 1.0) / time[ok].min())
    tenth, nine_tenths = np.quantile(log[ok], (0.1, 0.9))
    for wanted, given in _by_kernel(target, source, known):
        points, rows, whole = _common(target, source, wanted, given)
        if not points.names:
            continue
        level, ran = log[given], ok[given]
        if ran.any():
            expected[wanted], trust[wanted] = _judge(points, ran, level, rows)
        failed = np.zeros(len(points), dtype=bool)
        failed[np.setdiff1d(points.lookup(points.rows[~ran]), points.lookup(points.rows[ran]))] = True
        found = points.lookup(rows)
        fell = wanted[(found >= 0) & failed[found]]
        expected[fell] = np.where(np.isfinite(expected[fell]), expected[fell], nine_tenths) + FAILED_SPREAD * (nine_tenths - tenth)
        trust[fell] = 1.0
        if not whole:
            trust[wanted] = np.minimum(trust[wanted], GUESSED)
    return expected, trust


def _by_kernel(target: Space, source: Space, known: NDArray[np.bool_]) -> list[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Candidates of the target and known points of the source, kernel by kernel: one kernel's time says nothing of another's."""
    given = np.flatnonzero(known)
    if KERNEL not in target.names or KERNEL not in source.names:
        return [(np.arange(len(target)), given)]
    ours, theirs = target.rows[:, target.names.index(KERNEL)], source.rows[given, source.names.index(KERNEL)]
    positions = {identity(v): i for i, v in enumerate(source.values[source.names.index(KERNEL)])}
    pairs = []
    for at, kernel in enumerate(target.values[target.names.index(KERNEL)]):
        if identity(kernel) in positions:
            pairs.append((np.flatnonzero(ours == at), given[theirs == positions[identity(kernel)]]))
    return [(wanted, points) for wanted, points in pairs if len(wanted) and len(points)]


def _common(target: Space, source: Space, wanted: NDArray[np.int64], given: NDArray[np.int64]) -> tuple[Space, NDArray[np.int64], bool]:
    """The given points as a space of the parameters that both have, the wanted candidates as rows of it, and whether one has more.

    Points may repeat in it: the source may have a parameter that the target lacks.
    """
    names: list[str] = []
    values: list[list[Json]] = []
    here: list[NDArray[np.int64]] = []
    there: list[NDArray[np.int64]] = []
    whole = True
    for name in dict.fromkeys([*target.names, *source.names]):
        pair = [
            space.rows[chosen, space.names.index(name)] if name in space.names else np.array([ABSENT])
            for space, chosen in ((target, wanted), (source, given))
        ]
        used = [bool((column != ABSENT).any()) for column in pair]
        if not all(used):
            whole = whole and not any(used)
            continue
        ours, theirs = target.values[target.names.index(name)], source.values[source.names.index(name)]
        union = list({identity(v): v for v in (*ours, *theirs)}.values())
        union = sorted(union) if _numeric(union) else union
        position = {identity(v): at for at, v in enumerate(union)}
        names.append(name)
        values.append(union)
        for rows, column, found in ((here, pair[0], ours), (there, pair[1], theirs)):
            # The last entry serves index ABSENT, -1.
            rows.append(np.array([*(position[identity(v)] for v in found), ABSENT])[column])
    columns = [np.stack(c, axis=1) if c else np.empty((0, 0), dtype=np.int64) for c in (there, here)]
    return Space(names, values, columns[0].astype(np.int16)), columns[1], whole


def _judge(points: Space, use: NDArray[np.bool_], log: Float, wanted: NDArray[np.integer]) -> tuple[Float, Float]:
    """Expected logarithm and trust of the wanted rows, from those points to `use`, whose times are `log`."""
    same = points.lookup(points.rows)
    count = np.bincount(same[use], minlength=len(points))
    level = np.bincount(same[use], log[use], minlength=len(points)) / np.maximum(count, 1)
    found = points.lookup(wanted)
    known = (found >= 0) & (count[found] > 0)
    expected, trust = level[found], np.where(known, 1.0, 0.0)
    if not known.all():
        unknown = Space(points.names, points.values, wanted[~known].astype(np.int16))
        distinct, back = np.unique(unknown.lookup(unknown.rows), return_inverse=True)
        there, here = points.rows[count > 0], unknown.rows[distinct]
        guess, distance = _guess(points.values, there, level[count > 0], here)
        expected[~known], trust[~known] = guess[back], (GUESSED / (1.0 + distance))[back]
    return expected, trust


def _guess(values: Sequence[Sequence[Json]], there: Rows, log: Float, here: Rows) -> tuple[Float, Float]:
    """Logarithms for rows `here` from those of rows `there`, and the distance to the nearest: effects of single values, then near points.

    The effects carry what a whole row or column of the space has in common; what they leave is taken from the NEAR nearest points.
    """
    from scipy.spatial import cKDTree  # 40 ms for 11,130 x 11,130; all distances by blocks of a matrix product take 2 s

    base, effects = _effects(values, there, log)
    left = log - _sum(base, effects, there)
    scale = np.array([np.sqrt(np.mean(effect[there[:, c].astype(np.int64)] ** 2)) for c, effect in enumerate(effects)])
    # A twentieth at least: a parameter may matter only together with another, or have a single value in the source.
    scale = np.maximum(scale / max(scale.max(initial=0.0), 1e-12), 0.05)
    near = list(range(1, min(NEAR, len(there)) + 1))
    distance, chosen = cKDTree(_features(values, there, scale)).query(_features(values, here, scale), k=near)
    weight = 1.0 / (distance**2 + 1e-3)
    return _sum(base, effects, here) + (weight * left[chosen]).sum(axis=1) / weight.sum(axis=1), distance[:, 0]


def _effects(values: Sequence[Sequence[Json]], rows: Rows, log: Float) -> tuple[float, list[Float]]:
    """The mean, and per parameter what each of its values adds to it (the last entry: its absence), fitted in turns.

    A number that was not seen gets the effect of the nearest that was; a name or flag none.
    """
    base = float(log.mean())
    effects = [np.zeros(len(found) + 1) for found in values]
    for _ in range(3):
        for column, found in enumerate(values):
            at = np.where(rows[:, column] == ABSENT, len(found), rows[:, column]).astype(np.int64)
            left = log - _sum(base, effects, rows) + effects[column][at]
            count = np.bincount(at, minlength=len(found) + 1)
            # Drawn towards none by two observations' worth: a value seen once tells its own noise.
            effect = np.bincount(at, left, minlength=len(found) + 1) / (count + 2.0)
            seen = np.flatnonzero(count[:-1])
            if _numeric(found) and len(seen):
                effect[:-1] = effect[seen[np.abs(np.arange(len(found))[:, None] - seen).argmin(axis=1)]]
            effects[column] = effect
    return base, effects


def _sum(base: float, effects: Sequence[Float], rows: Rows) -> Float:
    # The last entry of an effect serves index ABSENT, -1.
    total = np.full(len(rows), base)
    for column, effect in enumerate(effects):
        total += effect[rows[:, column]]
    return total


def _numeric(values: Sequence[Json]) -> bool:
    return all(isinstance(v, int | float) and not isinstance(v, bool) for v in values)


def _features(values: Sequence[Sequence[Json]], rows: Rows, scale: Float) -> NDArray[np.float32]:
    """Coordinates: numbers by their rank among the values, from 0 to 1; anything else, and absence, as distance 1 from all others."""
    columns = []
    for column, found in enumerate(values):
        at = rows[:, column].astype(np.int64)
        if _numeric(found):
            columns += [scale[column] * np.maximum(at, 0) / max(len(found) - 1, 1), scale[column] * (at == ABSENT)]
        else:
            columns += [scale[column] * 0.5**0.5 * (at == value) for value in range(ABSENT, len(found))]
    return np.stack(columns, axis=1).astype(np.float32)
