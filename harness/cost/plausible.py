"""Which published points can be what they say: not faster than the chip's peak, and not far from another run of the same."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import cache

from klab.harness.cost.published import Published
from klab.harness.cost.workload import Deployment
from klab.harness.plan import plan

# A run whose TPOT is smaller by more than this than another run's of the same, or than one's with fewer requests in flight, is another
# deployment: speculation, which the file does not state, makes DeepSeek's TPOT 1.15 to 2 times smaller.
ALIKE = 1.15


def plausible(points: Sequence[Published]) -> tuple[list[Published], Counter[str]]:
    """Those that can be compared, and why the others were left out (reason: rows)."""
    skipped: Counter[str] = Counter()
    fast, faster = _impossible(points), _unlike(points)
    kept = []
    for one in points:
        if _series(one) in fast:
            skipped["a series in which a row computes prompts faster than the chip's peak"] += 1
        elif one.id in faster:
            skipped["faster than another run of the same, or than with fewer requests: speculation, which the file does not state"] += 1
        else:
            kept.append(one)
    return kept, skipped


def peak_share(point: Published) -> float:
    """Share of the time that prompts alone would take at the roofline, at the rate that the point's own latencies give."""
    w = point.workload
    rate = point.concurrency / (point.ttft_s + (w.osl - 1) * point.tpot_s)
    return rate * _prompt_bound_s(point.deployment, w.isl)


@cache
def _prompt_bound_s(deployment: Deployment, isl: int) -> float:
    found = plan(deployment.model, deployment.chip, deployment.scenario(isl=isl, osl=0, batches=()))
    return sum(row.bound_us * row.count for row in found.step("prefill", 1) if row.problem is not None) * 1e-6


def _series(point: Published) -> tuple[str, ...]:
    return (point.model, point.chip, point.backend, point.version, point.campaign, point.quantization)


def _impossible(points: Sequence[Published]) -> set[tuple[str, ...]]:
    return {_series(one) for one in points if peak_share(one) > 1}


def _unlike(points: Sequence[Published]) -> set[str]:
    groups: dict[object, list[Published]] = {}
    for one in points:
        groups.setdefault((one.setting, one.isl, one.osl), []).append(one)
    found = set()
    for group in groups.values():
        for one in group:
            slowest = max(other.tpot_s for other in group if other.concurrency <= one.concurrency)
            if one.tpot_s * ALIKE < slowest:
                found.add(one.id)
    return found
