"""Which rows a recorded space rests on, and how much too good the best of many medians looks."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

from klab.harness.choose.candidates import Candidate
from klab.harness.measure.stats import FLOOR_ROUNDS
from klab.harness.store.query import age
from klab.harness.store.result import Result
from klab.harness.tune.objective import counting_rounds
from klab.kernels.contract import canonical_json


def recorded_rows(rows: Sequence[Result], epoch: str) -> tuple[list[Result], tuple[str, ...]]:
    """The rows of one problem that are of the search which tried every candidate under this epoch ("": under the newest), and what is to be
    said of the others.

    What was measured since must not hide it: under a newer driver there are first a few defaults, and of a kernel that was changed there
    is first its default. So of each kernel of klab's own the code counts of which most candidates were tried.
    """
    measured = [row for row in rows if row.kind == "measured"]
    if not any(row.epoch == epoch for row in measured):
        epoch = max(measured, key=age).epoch if measured else ""
    kept = [row for row in rows if row.kind != "measured" or row.epoch == epoch]
    notes = []
    if any(row.epoch != epoch for row in measured):
        at = max((row for row in measured if row.epoch == epoch), key=age).recorded_at[:10]
        notes.append(f"there are rows under another driver or toolchain too; the space is the one recorded up to {at}")
    standing: dict[str, str] = {}
    changed = []
    for kernel, codes in sorted(_by_code(kept).items()):
        standing[kernel] = max(codes, key=lambda code: (len({_config(row) for row in codes[code]}), age(codes[code][-1])))
        if standing[kernel] != max(codes, key=lambda code: age(codes[code][-1])):
            changed.append(kernel)
    if changed:
        notes.append(
            f"the code of {', '.join(changed)} has changed since its candidates were recorded, and few were measured with the new one"
        )
    return [row for row in kept if standing.get(row.kernel, row.source_digest) == row.source_digest], tuple(notes)


def _by_code(rows: Iterable[Result]) -> Mapping[str, Mapping[str, list[Result]]]:
    """klab's own kernels -> digest of their code -> rows, oldest first."""
    found: dict[str, dict[str, list[Result]]] = defaultdict(lambda: defaultdict(list))
    for row in sorted((row for row in rows if not row.library), key=age):
        found[row.kernel][row.source_digest].append(row)
    return found


def _config(row: Result) -> str:
    return canonical_json(dict(row.config))


def held_out(field: Iterable[Candidate], chosen: Candidate) -> float | None:
    """What was chosen over the best, where the best is picked by every other round and timed by those between, both ways round (geometric
    mean): the best of many medians is partly luck, and luck does not last into the other rounds. None where rounds are too few.
    """
    halves = [_halves(candidate.row) for candidate in field]
    own = _halves(chosen.row)
    known = [pair for pair in halves if pair is not None]
    if own is None or not known:
        return None
    picked = [min(known, key=lambda pair: pair[pick])[1 - pick] for pick in (0, 1)]
    return math.sqrt(own[1] / picked[0] * own[0] / picked[1])


def _halves(row: Result) -> tuple[float, float] | None:
    """Medians of the even and of the odd rounds, corrected like the row's own."""
    rounds = counting_rounds(row)
    if len(rounds) < 2 * FLOOR_ROUNDS or not row.median_us:
        return None
    whole = row.median_us / statistics.median(rounds)
    return statistics.median(rounds[::2]) * whole, statistics.median(rounds[1::2]) * whole
