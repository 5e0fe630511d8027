"""Fit: whether a model and its requests have room in the memory of the GPUs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from klab.harness.cost.estimate import Estimator
from klab.harness.cost.mix import most_concurrent
from klab.harness.cost.steps import Steps
from klab.harness.cost.workload import Deployment, Workload
from klab.harness.plan.memory import cache_bytes, weight_bytes
from klab.harness.plan.precision import planned_dtype
from klab.kernels.errors import UsageError

# Sizes that are looked through for one that has the memory; no model of today needs more GPUs.
SIZES = tuple(2**k for k in range(8))


@dataclass(frozen=True)
class Fit:
    """Bytes per GPU: what an engine may use, the weights, and the cache of one request at its end. `requests`: how many fit, at most."""

    usable_bytes: float
    weight_bytes: float
    request_bytes: float
    requests: int

    @property
    def why_not(self) -> str:
        """Why not even one request fits, or an empty string."""
        usable = f"the {self.usable_bytes / 1e9:.0f} GB that an engine may use of each GPU"
        if self.weight_bytes > self.usable_bytes:
            return f"{self.weight_bytes / 1e9:.0f} GB of weights per GPU exceed {usable}"
        if self.requests < 1:
            free = self.usable_bytes - self.weight_bytes
            return f"{self.request_bytes / 1e9:.1f} GB of cache of one request exceed the {free / 1e9:.1f} GB beside the weights"
        return ""


def fit_of(steps: Steps, workload: Workload) -> Fit:
    """The room of a deployment."""
    chip = steps.deployment.chip
    last = steps.cache_bytes(workload.isl + workload.osl)
    return Fit(chip.memory_bytes * steps.deployment.memory_share, steps.weight_bytes, last, most_concurrent(steps, workload))


def holds(deployment: Deployment, workload: Workload) -> bool:
    """Whether the weights and one whole request fit, by arithmetic alone (no plan, so also where nothing can be planned)."""
    d = deployment
    dtype, _ = planned_dtype(d.model, d.chip, d.dtype, d.quantization)
    taken = weight_bytes(d.model, dtype, d.tp, d.quantization)
    taken += cache_bytes(d.model, d.kv_dtype or dtype, workload.isl + workload.osl, d.tp)
    return taken <= d.chip.memory_bytes * d.memory_share


def least_tp(deployment: Callable[[int], Deployment], workload: Workload, sizes: tuple[int, ...] = SIZES) -> int | None:
    """The least of these tensor-parallel sizes that has the room and divides the model, or None."""
    for tp in sizes:
        one = deployment(tp)
        try:
            if not holds(one, workload):
                continue
            Steps(one, Estimator(one.chip)).decode(1, 1)
        except UsageError:  # this size does not divide the model, or the chip has no link
            continue
        return tp
    return None
