"""The row of a trial that was given up because one device after another was lost with it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from klab.harness.measure import environment
from klab.harness.plan.trial import Trial
from klab.harness.store.result import Result, Status
from klab.kernels.discover import discover


def epitaph(trial: Trial, why: str, *, run_id: str, kernel_dirs: Sequence[Path | str]) -> Result:
    """A row `crashed` that says why; of no device, and so of no epoch."""
    kernel = discover(kernel_dirs).kernels.get(trial.kernel)
    backend, library = (kernel.backend, kernel.library) if kernel else ("", False)
    facts = {**environment.software(), **environment.checkout()}
    return Result.of(trial, Status.CRASHED, backend=backend, library=library, run_id=run_id, reason=why, environment=facts)
