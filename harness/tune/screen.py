"""Screen candidates with no GPU: compile each for the chip in a process that may die, and drop what cannot run or cannot matter."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from klab.harness.plan.trial import Trial
from klab.harness.tune.farm import AnyCompiler, Farm
from klab.harness.tune.screen_rules import (
    NOT_SCREENED,
    Limits,
    Screened,
    drop_duplicates,
    drop_hopeless,
    not_screened,
    tally,
)
from klab.kernels.contract import Chip, Kernel
from klab.kernels.discover import discover

__all__ = ["NOT_SCREENED", "Limits", "Screened", "screen", "tally"]


def screen(
    trials: Sequence[Trial],
    chip: Chip,
    *,
    kernel_dirs: Iterable[Path | str] = (),
    jobs: int | None = None,
    limits: Limits | None = None,
    on_done: Callable[[Screened], None] = lambda _: None,
    stop: threading.Event | None = None,
    deadline: float | None = None,
    kernels: Mapping[str, Kernel] | None = None,
    cache_dir: Path | None = None,
    compilers: Sequence[Callable[[], AnyCompiler]] = (),
) -> list[Screened]:
    """Compile every trial for `chip` on `jobs` processes (default: one per core) and judge it; what an earlier run compiled is known.

    Kernels that have nothing to compile (libraries, CPU kernels) come back ok at once. Never raises for a candidate's fault: a
    crash, a hang or a compile error is that candidate's row. The order of the answer is the order of `trials`; which of several duplicates
    stays says `drop_duplicates`. With `stop` set, or past `deadline` (of time.monotonic()), the rest comes back unscreened (ok,
    "not screened"). With `kernels` (by id) every row has its expected time; `limits.hopeless` drops by it.
    `compilers`: makers of compilers elsewhere, for the farm.
    """
    limits = limits or Limits()
    dirs = list(kernel_dirs)
    with Farm(chip, kernel_dirs=dirs, jobs=jobs, limits=limits, cache_dir=cache_dir, on_done=on_done, compilers=compilers) as farm:
        if stop is None or not stop.is_set():
            farm.submit(trials)
            farm.finish(deadline=deadline, stop=stop)
        found = [farm.done(trial) or not_screened(trial, "screening was stopped") for trial in trials]
    found = drop_duplicates(found)
    if kernels is None and limits.hopeless is not None:
        kernels = discover(dirs).kernels
    return found if kernels is None else drop_hopeless(found, kernels, chip, limits.hopeless)
