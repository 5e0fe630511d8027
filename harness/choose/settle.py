"""The stable rule for a tie: what else is known to be lower, then last time's choice, then the simpler; nothing slower than a default."""

from __future__ import annotations

import math
from collections.abc import Callable

from klab.harness.choose.candidates import Candidate, value
from klab.harness.store.result import Result
from klab.harness.tune.objective import Interval, Objective, energy, latency
from klab.kernels.contract import canonical_json

Defaults = Callable[[Result], dict[str, object] | None]
"""The configuration that the kernel of a row takes by default for the row's problem (all fields), or None where that is unknown."""


def settle(
    tied: list[Candidate], objective: Objective, previous: tuple[str, str] | None, defaults: Defaults | None
) -> tuple[Candidate, str]:
    """(the chosen candidate, what settled it): "alone", "energy" or "latency", "previous choice" or "simplicity".

    `tied` holds at least one candidate; `previous` is last time's (kernel, canonical JSON of its configuration).
    """
    if len(tied) == 1:
        return tied[0], "alone"
    if not objective.needs_energy:
        by, left = "energy", _not_beaten(tied, [energy(c.metered_row) for c in tied])
    else:
        by, left = "latency", _not_beaten(tied, [latency(c.row) for c in tied])
    if len(left) == 1:
        return left[0], by
    left = _not_slower(left, objective, defaults)
    simplest = min(left, key=lambda c: _complexity(c, defaults))
    again = [c for c in left if (c.kernel, c.config) == previous]
    # Named only where it made the difference, so that choosing twice from the same results writes the same profile.
    if again and again[0] is not simplest:
        return again[0], "previous choice"
    return simplest, "simplicity"


def _not_beaten(tied: list[Candidate], values: list[Interval | None]) -> list[Candidate]:
    """Those that no other is known to beat: both were measured, and the intervals lie apart. The unmeasured stay in."""
    lowest_high = min((v.high for v in values if v is not None), default=0.0)
    return [c for c, v in zip(tied, values, strict=True) if v is None or v.low <= lowest_high]


def _not_slower(left: list[Candidate], objective: Objective, defaults: Defaults | None) -> list[Candidate]:
    """Those whose median is no higher than that of the best default configuration of a kernel of one's own among them: neither simplicity
    nor habit puts what is slower, by its own evidence, in the place of a default.
    """
    own = [c for c in left if defaults and not c.row.library and defaults(c.row) is not None and not _complexity(c, defaults)[1]]
    most = min((value(c.row, objective).median for c in own), default=math.inf)
    return [c for c in left if value(c.row, objective).median <= most]


def _complexity(candidate: Candidate, defaults: Defaults | None) -> tuple[bool, bool, int, tuple[str, str, str, str]]:
    """A library before a kernel of one's own to maintain, the default before any other configuration, then fewer fields that differ
    from it, then the name. An unknown default counts every field.
    """
    config = dict(candidate.row.config)
    default = defaults(candidate.row) if defaults else None
    if default is None:
        return not candidate.row.library, bool(config), len(config), candidate.name
    different = [name for name in config if name not in default or canonical_json(default[name]) != canonical_json(config[name])]
    return not candidate.row.library, bool(different), len(different), candidate.name
