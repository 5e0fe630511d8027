"""Speculation: from which acceptance on drafts pay at a load."""

from __future__ import annotations

from dataclasses import replace

from klab.harness.cost.serving import operating_points
from klab.harness.cost.steps import Steps
from klab.harness.cost.workload import Workload

# Acceptances are looked for this closely.
CLOSE = 0.005


def least_acceptance(steps: Steps, workload: Workload, concurrency: int) -> float | None:
    """The acceptance from which on the workload's drafts give more requests per second than none; None: not even at 1, or does not fit.

    Of many requests in flight a verifying step costs nearly a token's work per draft, so that what pays for one user may not for hundreds.
    """
    plain = operating_points(steps, replace(workload, draft_tokens=0), [concurrency])
    if not plain or not workload.draft_tokens:
        return None
    goal = plain[0].requests_per_s.mid

    def pays(acceptance: float) -> bool:
        found = operating_points(steps, replace(workload, acceptance=acceptance), [concurrency])
        return bool(found) and found[0].requests_per_s.mid >= goal

    if not pays(1.0):
        return None
    low, high = 0.0, 1.0
    while high - low > CLOSE:
        middle = (low + high) / 2
        low, high = (low, middle) if pays(middle) else (middle, high)
    return high
