"""From candidates, as whatever file or store has them, to a RecordedSpace."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from klab.harness.store.result import Status
from klab.harness.tune.replay.decimal_text import without
from klab.harness.tune.replay.ragged import Ragged
from klab.harness.tune.replay.recorded import RecordedSpace
from klab.harness.tune.space import Space
from klab.kernels.contract import Json
from klab.kernels.errors import UsageError


@dataclass(slots=True)
class Candidate:
    """One entry of a recording. None and empty mean that it was not recorded. `point` lacks the parameters that do not apply."""

    point: dict[str, Json]
    status: Status
    time_us: float | None = None
    compile_s: float | None = None
    benchmark_s: float | None = None
    verification_s: float | None = None
    samples_us: Sequence[float] = ()
    clocks_mhz: Sequence[float] = ()
    sm_clock_mhz: float | None = None
    power_w: float | None = None
    energy_j: float | None = None
    reason: str = ""
    recorded_at: str = ""
    metrics: dict[str, float] = field(default_factory=dict)


def assemble(
    candidates: Iterable[Candidate],
    *,
    name: str,
    where: str = "",
    device: str,
    kernel: str,
    kind: str,
    problem_size: Json = None,
    about: Mapping[str, Json] | None = None,
    notes: Iterable[str] = (),
) -> RecordedSpace:
    """The last of equal candidates counts. UsageError, which begins with `where` (or `name`), when none is there or none is valid.

    A time that is no positive number is a failure. Notes say what was set aside and what was not recorded.
    """
    told = list(notes)
    where = where or name
    latest: dict[str, Candidate] = {}
    count = 0
    for c in candidates:
        count += 1
        latest[repr(sorted(c.point.items()))] = _sound(c)
    if len(latest) < count:
        told.append(f"{count - len(latest)} entries are of a candidate that has a later one; the last counts")
    found = list(latest.values())
    if not found:
        raise UsageError("; ".join([f"{where} has no candidate", *told]))
    if any(isinstance(value, dict) for c in found for value in c.point.values()):
        raise UsageError(f"{where} has a parameter whose values are objects; numbers, texts and lists can be parameters")
    nonsense = sum(c.reason == NOT_A_TIME for c in found)
    if nonsense:
        told.append(f"{nonsense} candidates have no failure and no positive time either; they count as {Status.CRASHED.value}")
    free = sum(c.compile_s is None and c.benchmark_s is None for c in found)
    if free:
        told.append(f"{free} candidates have no record of what they cost; they are replayed as if they took no time")
    recorded = RecordedSpace(
        name=name,
        device=device,
        kernel=kernel,
        space=Space.of(c.point for c in found),
        time_us=np.array([c.time_us if c.time_us is not None else math.inf for c in found]),
        status=[c.status for c in found],
        compile_s=np.array([c.compile_s or 0.0 for c in found]),
        benchmark_s=np.array([c.benchmark_s or 0.0 for c in found]),
        samples_us=Ragged.of(c.samples_us for c in found),
        # Files have no word for "not verified" but 0.
        verification_s=np.array([c.verification_s or 0.0 for c in found]) if any(c.verification_s for c in found) else None,
        sm_clock_mhz=_column(found, lambda c: c.sm_clock_mhz),
        power_w=_column(found, lambda c: c.power_w),
        energy_j=_column(found, lambda c: c.energy_j),
        clocks_mhz=Ragged.of(c.clocks_mhz for c in found) if any(len(c.clocks_mhz) for c in found) else None,
        metrics=_metrics(found),
        reasons=[c.reason for c in found] if any(c.reason for c in found) else (),
        recorded_at=[c.recorded_at for c in found] if any(c.recorded_at for c in found) else (),
        problem_size=problem_size,
        kind=kind,
        about=about or {},
        notes=tuple(told),
    )
    if Status.OK not in recorded.status:
        ways = ", ".join(f"{n} {status}" for status, n in recorded.by_status.items())
        raise UsageError("; ".join([f"{where} has no valid candidate: {ways}", *told]))
    return recorded


NOT_A_TIME = "no positive time was recorded"


def _sound(c: Candidate) -> Candidate:
    """The candidate with a failure's time taken away, and what cannot be true of its times and costs too."""
    if c.status is not Status.OK:
        c.time_us = None
    elif c.time_us is None or not 0 < c.time_us < math.inf:
        c.status, c.time_us, c.reason = Status.CRASHED, None, NOT_A_TIME
    if len(c.samples_us) and not (min(c.samples_us) > 0 and math.isfinite(sum(c.samples_us))):
        c.samples_us = c.clocks_mhz = ()
    if len(c.clocks_mhz) != len(c.samples_us):
        c.clocks_mhz = ()
    elif len(c.clocks_mhz):
        c.clocks_mhz = [mhz if math.isfinite(mhz) else math.nan for mhz in c.clocks_mhz]
    for name in ("compile_s", "benchmark_s", "verification_s"):
        spent = getattr(c, name)
        if spent is not None and not 0 <= spent < math.inf:
            setattr(c, name, None)
    if c.verification_s is not None and (c.benchmark_s is None or c.verification_s > c.benchmark_s):
        c.verification_s = None
    if c.verification_s and c.benchmark_s is not None:
        # Files have them apart: what cannot be said as a sum of two floats moves by its last bit.
        c.benchmark_s = without(c.benchmark_s, c.verification_s) + c.verification_s
    for name in ("sm_clock_mhz", "power_w", "energy_j"):
        value = getattr(c, name)
        if value is not None and not math.isfinite(value):
            setattr(c, name, None)
    if not all(map(math.isfinite, c.metrics.values())):
        c.metrics = {name: value for name, value in c.metrics.items() if math.isfinite(value)}
    return c


def _column(found: Sequence[Candidate], get: Callable[[Candidate], float | None]) -> NDArray[np.float64] | None:
    values = [get(c) for c in found]
    return None if all(v is None for v in values) else np.array([math.nan if v is None else v for v in values])


def _metrics(found: Sequence[Candidate]) -> dict[str, NDArray[np.float64]]:
    names = dict.fromkeys(name for c in found for name in c.metrics)
    return {name: np.array([c.metrics.get(name, math.nan) for c in found]) for name in names}
