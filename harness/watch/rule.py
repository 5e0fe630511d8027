"""Every threshold by which a night is judged, with its reason. The figures that they give stand in docs/night.md."""

from __future__ import annotations

from dataclasses import dataclass

from klab.harness.watch.series import Metric
from klab.kernels.contract import Record
from klab.kernels.errors import UsageError


@dataclass(frozen=True)
class Rule(Record):
    """The thresholds of a policy's [rule] table. Shares are of the value: 0.02 is 2%.

    window: nights of one level. The reference of a series is the best level that it has held for so many nights in this epoch.
    least_nights: with fewer in an epoch nothing is judged (unknown).
    multiples: how many standard deviations a series must be beyond its reference to have changed. first_look: beyond so many it is measured
    again.
    floor, floor_energy: smaller changes are no change, however quiet the series is.
    looks: how often a suspect is measured before it may be called slower or faster, the first time included.
    confirm: the share of the limit that every look, and the cycles, must exceed too.
    spans: the last so many nights together are held against the reference too: what is too small for one night shows in ten.
    peers: how many nights the noise of series of like duration counts for, beside a series' own nights.
    device_spread, device_spread_anchored: what two GPUs of one kind differ by, while this one has too few nights of its own.
    passing: the share of nights that may bring a slow-down that is gone the next night though no source changed. Where the history has
    more of such, what is no larger than they were, of a series with unchanged source, is suspect on its first night.
    too_noisy: a series that could not show so much tonight is counted as too noisy. blind: one that could not even show this is unknown.
    recent: a series that was measured in the last so many nights of the history is expected tonight.
    patience: after so many nights in a row without a value, whatever the excuse, a series is missing.
    """

    # Half a month: the median of 10 nights is known to 0.4 of one night's deviation; a better level becomes the reference within a week.
    window: int = 10
    # The range of 5 draws covers the median with 94%; below that there is no telling what a series' noise is.
    least_nights: int = 5
    # 200 series, 5 spans of nights, 1 false alarm in 20 nights: 1 in 20,000 for each, 3.9 deviations of a normal one.
    multiples: float = 4.0
    # Some 7 of 200 are measured again for nothing (noise and spikes), which costs 7% of the night's time; a change passed over costs more.
    first_look: float = 2.5
    # A guess of what is worth somebody's morning; rebuilding an unchanged kernel moves it by up to 1%.
    floor: float = 0.02
    # The sensor's window and the board's temperature move energy by more than time (a guess; the sensor itself errs by 5%).
    floor_energy: float = 0.04
    # Measured twice more: what hits 2% of all looks then hits all three of one of 200 series once in 600 nights.
    looks: int = 3
    # A spike at two looks needs a third one beyond this share: 1 in 75. A true change fails it as rarely (docs/night.md).
    confirm: float = 0.6
    spans: tuple[int, ...] = (1, 2, 3, 5, 10)
    # A series' own 30 nights know its noise to 15% (one standard error); with its peers to 8%.
    peers: int = 30
    # GPUs of one node differ by more than 5% in time; over an anchor of the same lap by less (a guess until calibrated).
    device_spread: float = 0.05
    device_spread_anchored: float = 0.015
    # What is aimed at. One night in 20 is what the limits allow anyway, so quiet machines hardly feel it (docs/night.md).
    passing: float = 0.05
    too_noisy: float = 0.05
    blind: float = 0.25
    recent: int = 5
    patience: int = 3

    def __post_init__(self) -> None:
        """UsageError for thresholds that make no sense, by name."""
        least = {"window": 3, "least_nights": 3, "looks": 2, "recent": 1, "patience": 1, "peers": 0}
        for name, floor in least.items():
            if not isinstance(getattr(self, name), int) or getattr(self, name) < floor:
                raise UsageError(f"rule: {name} must be a whole number of at least {floor}, not {getattr(self, name)!r}")
        for name in (
            "multiples",
            "first_look",
            "floor",
            "floor_energy",
            "confirm",
            "device_spread",
            "device_spread_anchored",
            "passing",
            "too_noisy",
            "blind",
        ):
            if not isinstance(getattr(self, name), int | float) or not 0 < getattr(self, name) < 100:
                raise UsageError(f"rule: {name} must be a number above 0, not {getattr(self, name)!r}")
        if not all(isinstance(nights, int) and nights >= 1 for nights in self.spans) or 1 not in self.spans:
            raise UsageError(f"rule: spans must be whole numbers of nights, 1 among them, not {self.spans!r}")
        if self.least_nights > self.window:
            raise UsageError(f"rule: least_nights ({self.least_nights}) must not exceed window ({self.window})")

    def floor_of(self, metric: str) -> float:
        """The smallest change of a metric that counts."""
        return self.floor_energy if metric == Metric.ENERGY else self.floor
