"""A recorded space: what every candidate took on some chip, so that a search can be replayed without that chip."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from klab.harness.store.result import Status
from klab.harness.tune.space import Space
from klab.harness.tune.strategy import Ask, Evaluation


@dataclass(frozen=True)
class RecordedSpace:
    """Arrays run over the candidates of `space`. time_us is infinite for a candidate that failed, and `status` says how.

    compile_s and benchmark_s are what the candidate took then (benchmark_s with verification); samples_us its rounds, perhaps none.
    """

    name: str
    device: str
    kernel: str
    space: Space
    time_us: NDArray[np.float64]
    status: Sequence[Status]
    compile_s: NDArray[np.float64]
    benchmark_s: NDArray[np.float64]
    samples_us: Sequence[Sequence[float]]

    @property
    def optimum_us(self) -> float:
        """The least time of all candidates."""
        return float(self.time_us.min())

    def evaluate(self, ask: Ask) -> Iterator[Evaluation]:
        """Answer as the chip did. A short run of n rounds is the mean of the first n samples, at its share of the benchmark time."""
        for c in ask.candidates:
            samples = self.samples_us[c]
            short = 0 < ask.rounds < len(samples)
            value = float(np.mean(samples[: ask.rounds])) if short else float(self.time_us[c])
            share = ask.rounds / len(samples) if short else 1.0
            spent_s = float(self.compile_s[c] + share * self.benchmark_s[c])
            yield Evaluation(c, value, self.status[c], ask.rounds if short else 0, spent_s)
