"""A recorded space: what every candidate took on some chip, so that a search can be replayed without that chip."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from klab.harness.store.result import Status
from klab.harness.tune.replay.ragged import Ragged
from klab.harness.tune.space import Space
from klab.harness.tune.strategy import Ask, Evaluation
from klab.kernels.contract import Json, canonical_json
from klab.kernels.errors import UsageError

Column = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class RecordedSpace:
    """Arrays run over the candidates of `space`. time_us is infinite for a candidate that failed, and `status` says how.

    compile_s and benchmark_s are what the candidate took then (benchmark_s with verification, of which verification_s is the share);
    samples_us its rounds, perhaps none, and clocks_mhz the SM clock beside each. Columns that are None were not recorded; nan is a
    candidate for which it was not. `metrics` are further columns by name, in the unit of whoever recorded them. `kind` is "measured"
    for klab's own, "reference" for others' data; `about` says of what and how (problem, environment, policy). `notes` tell what reading
    met; they are not part of the space, all else is. UsageError where the parts contradict each other.
    """

    name: str
    device: str
    kernel: str
    space: Space
    time_us: Column
    status: Sequence[Status]
    compile_s: Column
    benchmark_s: Column
    samples_us: Ragged | Sequence[Sequence[float]]
    verification_s: Column | None = None
    sm_clock_mhz: Column | None = None
    power_w: Column | None = None
    energy_j: Column | None = None
    clocks_mhz: Ragged | None = None
    metrics: Mapping[str, Column] = field(default_factory=dict)
    reasons: Sequence[str] = ()
    recorded_at: Sequence[str] = ()
    problem_size: Json = None
    kind: str = "measured"
    about: Mapping[str, Json] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.samples_us, Ragged):
            object.__setattr__(self, "samples_us", Ragged.of(self.samples_us))
        for name in ("status", "reasons", "recorded_at"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        self._check()

    def _check(self) -> None:
        count = len(self.space)
        for name, column in {**_columns(self), **{f"metrics {k}": v for k, v in self.metrics.items()}}.items():
            optional = name in ("reasons", "recorded_at") and not len(column)
            if len(column) != count and not optional:
                raise UsageError(f"{self.name}: {name} has {len(column)} values for {count} candidates")
        if self.clocks_mhz is not None:
            assert isinstance(self.samples_us, Ragged)
            lengths = np.diff(self.clocks_mhz.offsets)
            if ((lengths != 0) & (lengths != np.diff(self.samples_us.offsets))).any():
                raise UsageError(f"{self.name}: a candidate has not as many clocks as samples")
        fine = np.array([s is Status.OK for s in self.status])
        good = np.isfinite(self.time_us) & (self.time_us > 0)
        if (fine & ~good).any():
            at = int(np.flatnonzero(fine & ~good)[0])
            raise UsageError(f"{self.name}: candidate {at} is ok and takes {self.time_us[at]} us")
        if (~fine & (self.time_us != np.inf)).any():
            at = int(np.flatnonzero(~fine & (self.time_us != np.inf))[0])
            raise UsageError(f"{self.name}: candidate {at} failed ({self.status[at]}) and takes {self.time_us[at]} us")

    @property
    def optimum_us(self) -> float:
        """The least time of all candidates."""
        return float(self.time_us.min())

    @property
    def by_status(self) -> dict[str, int]:
        """How many candidates ended how, the most first."""
        return {status.value: n for status, n in sorted(Counter(self.status).items(), key=lambda pair: (-pair[1], pair[0]))}

    @cached_property
    def digest(self) -> str:
        """Identity of the content (16 hex digits): equal spaces have equal digests, whatever file they came from."""
        found = hashlib.sha256()
        head = [self.name, self.device, self.kernel, self.kind, self.problem_size, self.about, self.space.names, self.space.values]
        found.update(canonical_json([*head, self.status, self.reasons, self.recorded_at]).encode())
        found.update(np.ascontiguousarray(self.space.rows).tobytes())
        for name, column in sorted({**_columns(self), **{f"metrics {k}": v for k, v in self.metrics.items()}}.items()):
            if isinstance(column, Ragged):
                found.update(name.encode() + column.offsets.tobytes() + (column.values + 0.0).tobytes())
            elif isinstance(column, np.ndarray):
                found.update(name.encode() + (np.where(np.isnan(column), np.nan, column) + 0.0).tobytes())
        return found.hexdigest()[:16]

    def __eq__(self, other: object) -> bool:
        """The same content, to the last bit; notes do not count."""
        return self.digest == other.digest if isinstance(other, RecordedSpace) else NotImplemented

    def __hash__(self) -> int:
        return hash(self.digest)

    def evaluate(self, ask: Ask) -> Iterator[Evaluation]:
        """Answer as the chip did. A short run of n rounds is the mean of the first n samples, at its share of the benchmark time."""
        for c in ask.candidates:
            samples = self.samples_us[c]
            short = 0 < ask.rounds < len(samples) and self.status[c] is Status.OK
            value = float(np.mean(samples[: ask.rounds])) if short else float(self.time_us[c])
            share = ask.rounds / len(samples) if short else 1.0
            spent_s = float(self.compile_s[c] + share * self.benchmark_s[c])
            yield Evaluation(c, value, self.status[c], ask.rounds if short else 0, spent_s)


_PER_CANDIDATE = (
    "time_us", "status", "compile_s", "benchmark_s", "samples_us", "verification_s", "sm_clock_mhz", "power_w", "energy_j", "clocks_mhz",
    "reasons", "recorded_at",
)  # fmt: skip


def _columns(recorded: RecordedSpace) -> dict[str, Column | Ragged | Sequence[Json]]:
    """What is there per candidate, by name."""
    found = {f.name: getattr(recorded, f.name) for f in fields(recorded) if f.name in _PER_CANDIDATE}
    return {name: column for name, column in found.items() if column is not None}


def read_space(path: Path | str) -> RecordedSpace:
    """See `klab.harness.tune.replay.files.read_space`."""
    from klab.harness.tune.replay import files

    return files.read_space(path)
