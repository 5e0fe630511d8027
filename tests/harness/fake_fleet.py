"""A fleet without processes: every trial ends as `outcome` says, in made-up time."""

from types import SimpleNamespace

from klab.harness.store.result import Result, Status

EPOCH_FACTS = {"kind": "cpu", "device": "made", "cpu_model": "made", "cores": 1, "threads": 1, "uuid": ""}


class Stop(BaseException):
    """What a test raises to end a run in its midst, as a kill would."""


class FakeFleet:
    """As fleet.local.Fleet. `outcome(trial)` is a time in microseconds or a Status; `asked` collects the trials of each run."""

    size = 1

    def __init__(self, outcome, dies_after=None):
        self.outcome, self.dies_after = outcome, dies_after
        self.asked, self.guests, self.busy_s, self.notes = [], [], 0.0, []
        self.told = 0

    def __call__(self, chip, run_id, **_):
        self.run_id = run_id
        return self

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return None

    def environment(self):
        return EPOCH_FACTS

    def run(self, trials, on_result, *, deadline=None, stop=None, guests=None, keep_data=False, anchors=()):
        from klab.harness.measure import environment

        self.asked.append(list(trials))
        self.guests.append(dict(guests or {}))
        for trial in trials:
            if self.told == self.dies_after:
                raise Stop
            found = self.outcome(trial)
            facts = {"epoch": environment.epoch(EPOCH_FACTS), "environment": EPOCH_FACTS, "run_id": self.run_id, "backend": "cpu"}
            library = "torch" in trial.kernel
            if isinstance(found, Status):
                row = Result.of(trial, found, library=library, reason="as the test says", **facts)
            else:
                rounds = max(trial.policy.min_rounds, 1)
                samples = tuple(found * (1 + 0.001 * ((i * 7) % 5 - 2)) for i in range(rounds))
                timing = {"median_us": found, "ci_low_us": 0.999 * found, "ci_high_us": 1.001 * found} if rounds >= 5 else {}
                checked = {"checks": 3, "error": 0.0, "tolerance": 1.0, "l2_state": "cold", "device": "made"}
                laps = {"contest": {"id": f"{len(self.asked)}-{trial.policy.seed}"}}
                row = Result.of(
                    trial, Status.OK, library=library, samples_us=samples, marked=(0,) * rounds, build=laps, **timing, **checked, **facts
                )
            self.told += 1
            self.busy_s += 0.01
            on_result(row)
        return SimpleNamespace(unfinished=[], stopped="", notes=[])

    @property
    def measured(self):
        """All trials so far, one by one."""
        return [trial for run in self.asked for trial in run]
