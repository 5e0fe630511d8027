"""Figures of the runs of one strategy on one space, as `klab simulate` prints them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from klab.harness.tune.replay.recorded import RecordedSpace
from klab.harness.tune.replay.score import Baseline
from klab.harness.tune.replay.simulate import Run
from klab.harness.tune.replay.standings import WITHIN, Group
from klab.kernels.contract import Json


def summary(recorded: RecordedSpace, runs: Sequence[Run], yardstick: Baseline, marks: Sequence[int], limit_s: float) -> dict[str, Json]:
    """best / optimum at marks (mean, 90th percentile), at the end, seconds to within 5% and 1% (restricted mean, how many arrived), score.

    limit_s: simulated seconds at which the runs end; nothing after it counts. A figure that no run has is None.
    """
    group = Group(runs, yardstick, limit_s)
    ratios = group.ratios(marks)
    end = np.minimum([r.best_us_by(limit_s) for r in runs], yardstick.slowest_us) / yardstick.optimum_us
    made: dict[str, Json] = {
        "space": recorded.name,
        "runs": len(runs),
        "evaluations": float(np.mean([r.evaluations for r in runs])),
        "seconds": float(np.mean([min(r.seconds, limit_s) for r in runs])),
        "best_over_optimum": {str(m): float(ratios[:, i].mean()) for i, m in enumerate(marks)},
        "best_over_optimum_p90": {str(m): float(np.percentile(ratios[:, i], 90)) for i, m in enumerate(marks)},
        "end_best_over_optimum": float(end.mean()),
        "end_best_over_optimum_p90": float(np.percentile(end, 90)),
        "nothing_valid": sum(not r.steps for r in runs),
    }
    for share in WITHIN:
        seconds = group.seconds_within(share)
        made[f"within_{share:.0%}"] = {
            "restricted_mean_s": float(np.minimum(seconds, limit_s).mean()),
            "restricted_to_s": limit_s,
            "reached": int((seconds <= limit_s).sum()),
        }
    score = float(group.scores().mean())
    made["score"] = score if math.isfinite(score) else None
    return made
