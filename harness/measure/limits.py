"""How long a request may take, and when a contestant that the deadline cut short is to be blamed for it."""

from __future__ import annotations

from dataclasses import dataclass

from klab.harness.measure.client import START_LIMIT_S

# A request that has taken so many times what was expected of it is not merely slow.
BLAME_FACTOR = 5.0


@dataclass(frozen=True)
class Limits:
    """Seconds after which a request counts as hung. `sample_s` comes on top of twenty times what the calibration expects.

    Near a deadline one hanging contestant must not use up the time of all: preparing may then take a tenth of what is left, but
    `prepare_floor_s` at least (compilers take up to 10 s), and half of what is left where that is less.
    """

    start_s: float = START_LIMIT_S
    open_s: float = 300.0
    prepare_s: float = 180.0
    prepare_floor_s: float = 20.0
    sample_s: float = 30.0
    blame_s: float = 10.0

    def preparing_s(self, remaining_s: float) -> float:
        """The limit of one `prepare` with so much time left."""
        near = max(self.prepare_floor_s / 2, remaining_s / 2)
        return min(self.prepare_s, max(self.prepare_floor_s, remaining_s / 10), near)

    def sampling_s(self, round_s: float, remaining_s: float) -> float:
        """The limit of one round (or closing check) that should take `round_s`."""
        return min(self.sample_s, max(self.prepare_floor_s / 2, remaining_s / 4)) + 20 * round_s

    def blames(self, waited_s: float, *, expected_s: float, budget_s: float) -> bool:
        """True when a request that the deadline cut after `waited_s` is the contestant's fault and not the budget's.

        `blame_s`, or half of a budget that is shorter than twice that (but half of `blame_s` at least): otherwise a kernel that hangs
        would leave no trace in a short run, and block every continuation of it.
        """
        return waited_s >= max(min(self.blame_s, max(self.blame_s / 2, budget_s / 2)), BLAME_FACTOR * expected_s)
