"""Other tuners' strategies on a recorded space: Kernel Tuner's through its simulation mode, and Optuna's TPE.

They see the same space, seeds and budget as klab's, and pay on the same clock: each candidate's recorded seconds, once, when it is first
evaluated. Points outside the space, points proposed again and the strategies' own thinking are free to them.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import io
import signal
import threading
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from types import FrameType

from klab.harness.tune.replay.recorded import RecordedSpace
from klab.harness.tune.replay.simulate import require_valid
from klab.kernels.errors import UsageError

KERNEL_TUNER, OPTUNA = "kernel_tuner", "optuna"
TPE = f"{OPTUNA}.tpe"
# For a strategy that never comes back; the longest run of 400 evaluations took 40 s of one core.
RUN_LIMIT_S = 120

_prepared: dict[int, tuple[RecordedSpace, object]] = {}


@dataclass(frozen=True)
class PeerRun:
    """The candidates in the order of their first evaluation, and why the strategy ended: "" when of its own accord or by its budget."""

    candidates: list[int]
    ended: str = ""


def require_peers() -> None:
    """UsageError that names the pip group when a peer's package is missing."""
    missing = [name for name in (KERNEL_TUNER, OPTUNA) if importlib.util.find_spec(name) is None]
    if missing:
        raise UsageError(f"{' and '.join(missing)} cannot be imported here; pip install 'kernel-lab[peers]', or compare klab's own alone")


def versions() -> dict[str, str]:
    """The peers' packages and their versions."""
    return {name: importlib.metadata.version(name) for name in (KERNEL_TUNER, OPTUNA)}


def peers() -> tuple[dict[str, str], dict[str, str]]:
    """(name -> version of its package) of those that can run here, and (name -> why not) of the others."""
    require_peers()
    from klab.harness.tune.replay import peers_kernel_tuner

    runnable, absent = {}, {}
    with _silenced():
        for strategy in peers_kernel_tuner.strategy_names():
            reason = peers_kernel_tuner.cannot_run(strategy)
            name = f"{KERNEL_TUNER}.{strategy}"
            if reason:
                absent[name] = reason
            else:
                runnable[name] = versions()[KERNEL_TUNER]
    runnable[TPE] = versions()[OPTUNA]
    return runnable, absent


def run_peer(recorded: RecordedSpace, name: str, *, seed: int, evaluations: int) -> PeerRun:
    """One run. A strategy that fails or does not end keeps what it evaluated until then; `ended` says so."""
    require_valid(recorded)
    require_peers()
    order: dict[int, None] = {}
    ended = ""
    with _silenced(), _limited(RUN_LIMIT_S):
        try:
            _start(recorded, name, seed, evaluations, order)
        except _OutOfTimeError:
            ended = f"stopped after {RUN_LIMIT_S} s of computing"
        except Exception as error:  # noqa: BLE001 - whatever a foreign strategy raises is its result on this space
            ended = f"failed: {type(error).__name__}: {error}"[:200]
    return PeerRun(list(order), ended)


def _start(recorded: RecordedSpace, name: str, seed: int, evaluations: int, order: dict[int, None]) -> None:
    package, _, strategy = name.partition(".")
    if name == TPE:
        from klab.harness.tune.replay.peers_optuna import run_tpe

        run_tpe(recorded, seed=seed, evaluations=evaluations, order=order)
    elif package == KERNEL_TUNER:
        from klab.harness.tune.replay.peers_kernel_tuner import KernelTunerSpace

        _, prepared = _prepared.get(id(recorded), (None, None))
        if not isinstance(prepared, KernelTunerSpace):
            prepared = KernelTunerSpace(recorded)
            _prepared.clear()  # one space at a time: an entry of a large space takes a kilobyte per candidate
            _prepared[id(recorded)] = (recorded, prepared)
        prepared.run(strategy, seed=seed, evaluations=evaluations, order=order)
    else:
        raise UsageError(f"there is no peer strategy {name!r}")


class _OutOfTimeError(BaseException):
    """No Exception, so that a strategy that catches those ends too."""


@contextlib.contextmanager
def _limited(seconds: float) -> Iterator[None]:
    """Raise _OutOfTimeError in this thread after `seconds` of the processor, so that what a run finds does not depend on the load.

    No limit outside the main thread, which alone gets signals.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(_signal: int, _frame: FrameType | None) -> None:
        raise _OutOfTimeError

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


@contextlib.contextmanager
def _silenced() -> Iterator[None]:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
