"""Which kernels have hung or crashed in this run, so that each does so once and not once per problem."""

from __future__ import annotations

import threading
from dataclasses import dataclass

from klab.harness.plan.trial import Trial
from klab.harness.store.result import Status
from klab.kernels.contract import Json

# A hang costs its whole time limit, a crash costs the others a fresh worker: one is enough, or two.
ENOUGH = {Status.TIMEOUT: 1, Status.CRASHED: 2}
VERB = {Status.TIMEOUT: "hung", Status.CRASHED: "crashed"}


@dataclass(frozen=True)
class _Offence:
    config: Json
    problem_key: str
    label: str


class Quarantine:
    """Shared by the contests of a run, from any thread.

    A kernel (as its file is now) that hung once or crashed twice is skipped on the other problems. Where it has worked in this run,
    only the configurations that failed are skipped, and one failure more is forgiven to a configuration that worked elsewhere.
    """

    def __init__(self) -> None:
        self._offences: dict[tuple[str, str, Status], list[_Offence]] = {}
        self._worked: dict[tuple[str, str], list[Json]] = {}
        self._lock = threading.Lock()

    def worked(self, trial: Trial) -> None:
        """Note that it was built and gave the right answer."""
        with self._lock:
            configs = self._worked.setdefault((trial.kernel, trial.source_digest), [])
            config = trial.config.to_json_full()
            if config not in configs:
                configs.append(config)

    def failed(self, trial: Trial, status: Status) -> None:
        """Note how it ended; only hangs and crashes are kept."""
        if status in ENOUGH:
            offence = _Offence(trial.config.to_json_full(), trial.problem.key, trial.problem.label())
            with self._lock:
                self._offences.setdefault((trial.kernel, trial.source_digest, status), []).append(offence)

    def verdict(self, trial: Trial) -> tuple[Status, str] | None:
        """(status, reason) of a trial that is to be skipped. On the problem where it failed, it takes two hangs to skip the rest."""
        config = trial.config.to_json_full()
        with self._lock:
            worked = self._worked.get((trial.kernel, trial.source_digest), [])
            for status, enough in ENOUGH.items():
                found = self._offences.get((trial.kernel, trial.source_digest, status), [])
                if worked:
                    found = [o for o in found if o.config == config]
                elsewhere = [o for o in found if o.problem_key != trial.problem.key]
                needed = enough + (config in worked)
                if len(elsewhere) >= needed:
                    return status, f"skipped: it {VERB[status]} on {elsewhere[-1].label} in this run"
                if status is Status.TIMEOUT and len(found) >= needed + 1:
                    return status, f"skipped: it {VERB[status]} on {found[-1].label} in this run"
        return None
