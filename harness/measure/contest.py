"""A contest: all trials of ONE problem on one device, prepared one by one and then timed lap by lap against each other.

In each lap every contestant has one round, in alternating order (A B C, C B A, ...), so that drift meets all alike. A contestant that
crashes, hangs or is wrong becomes a Result; the others go on, with a fresh worker where the old one died.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress

from klab.harness.measure.anchor_run import AnchorRun, Anchors
from klab.harness.measure.calibration import guard_of
from klab.harness.measure.client import WorkerClient, WorkerDied, WorkerHung
from klab.harness.measure.energy import RAMP_LIMIT_S, RAMP_S
from klab.harness.measure.entry import Baseline, Entry, Place, contest_key
from klab.harness.measure.limits import Limits
from klab.harness.measure.mishaps import Again, DeviceLost, Losses, Lost, NoContest, OutOfTime
from klab.harness.measure.quarantine import Quarantine
from klab.harness.measure.session import ENERGY_PASSES, Answer
from klab.harness.plan.trial import Trial
from klab.harness.store.result import Result, Status
from klab.kernels.contract import Json, digest
from klab.kernels.errors import CannotMeasure, UsageError

# Contestants in one group: more of them would stretch a lap beyond the drift that it is to cancel.
GROUP_SLOTS = 8
# With less of the device's memory free than this, the rest of a group waits for the next.
LEAST_FREE_SHARE = 0.15
# After a request to stop, rounds still missing are taken for at most this long.
STOP_GRACE_S = 3.0
# The closing check of one contestant launches twice and compares; without so much time it is left out.
CLOSING_S = 0.05


class Contest:
    """Trials of one problem. They share everything of their policy but whether energy is wanted; UsageError if they do not.

    `unfinished` holds the trials that have no Result when `run` returned early.
    """

    def __init__(
        self,
        client: WorkerClient,
        trials: Sequence[Trial],
        *,
        run_id: str,
        checkout: Mapping[str, Json] | None = None,
        limits: Limits | None = None,
        quarantine: Quarantine | None = None,
        guest: Trial | None = None,
        keep_data: bool = False,
        anchors: Sequence[str] = (),
    ) -> None:
        """guest: a baseline measured before, which runs along in every group and gives no Result. keep_data: leave the problem's data in
        the worker for the next contest of the problem, and use what the last one left; making it takes up to seconds. anchors: names of
        measure/anchor.py that have a round in every lap; a Result's `build["anchors"]` holds their samples beside its own."""
        if len({contest_key(trial) for trial in trials}) != 1:
            raise UsageError("a contest is about one problem under one policy")
        self.client = client
        self.limits = limits or Limits()
        self.quarantine = quarantine or Quarantine()
        self._problem = trials[0].problem
        self._policy = trials[0].policy
        self._run_id = run_id
        self._checkout = dict(checkout or {})
        self._entries = [Entry(trial, slot) for slot, trial in enumerate(trials)]
        self._waiting: list[Entry] = []
        self._tried_alone: set[int] = set()
        self._is_open = False
        self._data: Answer = {}
        self._losses = Losses()
        self._baseline = guest
        self._keep_data = keep_data
        self._anchors = Anchors(anchors if self._policy.max_rounds else (), self._ask, self.limits)
        self._groups = 0
        self._told: set[int] = set()

    @property
    def unfinished(self) -> list[Trial]:
        """The trials without a Result so far, in the order given."""
        return [e.trial for e in self._entries if e.slot not in self._told]

    def run(self, *, deadline: float | None = None, stop: threading.Event | None = None) -> Iterator[Result]:
        """Yield each Result as soon as it stands. `deadline` is a time.monotonic() second; both it and `stop` end the run early.

        CannotMeasure when no worker comes up; DeviceLost when one did before.
        """
        self._deadline = float("inf") if deadline is None else deadline
        self._budget_s = self._remaining()
        self._stop = stop or threading.Event()
        self._stopped_at = float("inf")
        try:
            self._start()
            for entry in self._entries:
                entry.library = bool(self.client.kernels.get(entry.trial.kernel, {}).get("library"))
                yield from self._skip(entry)
            self._waiting = sorted((e for e in self._entries if e.slot not in self._told), key=lambda e: not e.library)
            while self._waiting and not self._stop.is_set():
                yield from self._group(self._next_group())
        except OutOfTime:
            self.client.kill()  # it may be in the midst of a launch that takes longer than there is time
        except NoContest as error:
            for entry in self._entries:
                if entry.slot not in self._told:
                    yield self._row(entry, error.status, error.reason, {})
        if self.client.alive and self._remaining() > 0 and not self._keep_data:
            self._quietly("close")

    def _remaining(self) -> float:
        return self._deadline - time.monotonic()

    def _next_group(self) -> list[Entry]:
        """The next contestants, with the baseline as a guest where it is not among them. One that ran out of memory goes alone."""
        first = self._waiting[0]
        size = 1 if first.slot in self._tried_alone else GROUP_SLOTS
        group, self._waiting = self._waiting[:size], self._waiting[size:]
        if self._baseline is not None and size > 1:
            group.insert(0, Entry(self._baseline, len(self._entries) + self._groups, guest=True, library=True))
        self._groups += 1
        self._anchors.next_group()
        return group

    def _group(self, group: list[Entry]) -> Iterator[Result]:
        contest_id = digest([self._run_id, self._problem.key, self._policy.to_json(), self._groups, time.time_ns()])
        baseline = Baseline(group, contest_id)
        try:
            while True:
                try:
                    yield from self._prepare(group)
                    yield from self._laps(group, baseline)
                    yield from self._energies(group, baseline)
                    break
                except Lost as lost:
                    yield from self._recover(group, lost)
                except Again:
                    self._start_anew(group)
        except OutOfTime:
            yield from self._tell_what_stands(group, baseline, "the time was up before the energy was measured")
            raise
        except DeviceLost:
            checked = [entry for entry in group if entry.finished]
            yield from self._tell_what_stands(checked, baseline, "the device was lost before the energy was measured")
            raise
        yield from self._tell_what_stands(group, baseline, "interrupted before the energy was measured")
        if baseline.entry is not None:
            self._baseline = baseline.entry.trial
        for entry in group:
            if self.client.alive and entry.ready:
                self._quietly("drop", slot=entry.slot)

    def _tell_what_stands(self, group: list[Entry], baseline: Baseline, energy_reason: str) -> Iterator[Result]:
        for entry in group:
            if entry.slot not in self._told and not entry.guest and entry.tellable:
                if entry.trial.policy.energy and "energy_reason" not in entry.energy:
                    entry.energy["energy_reason"] = energy_reason
                yield self._tell(entry, baseline)

    def _recover(self, group: list[Entry], lost: Lost) -> Iterator[Result]:
        """Record the culprit; the others go on in a fresh worker, which must come up before anybody is blamed."""
        entry, blamed = lost.entry, self._losses.blames(lost)
        if entry is not None and blamed:
            group.remove(entry)
        self._start_anew(group)
        if entry is None or not blamed:
            return
        if not self._stop.is_set():
            with suppress(OutOfTime):
                self._start()
        if not entry.guest:
            yield self._failure(entry, lost.status, lost.reason, {**entry.shape, **lost.answer})
        elif self._baseline is entry.trial:
            self._baseline = None

    def _start_anew(self, group: list[Entry]) -> None:
        """Have all prepared again in a fresh worker; complete laps are kept."""
        self.client.kill()
        self._is_open = False
        whole = min((len(e.samples_us) for e in group if e.shape and not e.done), default=None)
        for entry in group:
            if not entry.done:
                entry.forget_after(whole or 0)
            entry.ready = False
            entry.energy = {}
        self._anchors.start_anew(whole)

    def _start(self) -> None:
        remaining = self._remaining()
        if remaining <= 0:
            raise OutOfTime
        try:
            self.client.start(limit_s=min(self.limits.start_s, remaining))
        except (WorkerHung, CannotMeasure) as error:
            if isinstance(error, WorkerHung) and self._remaining() <= 0:
                raise OutOfTime from error
            raise self._losses.no_worker(error, was_up=bool(self.client.environment) and not self.client.aborted) from error

    def _ask(self, entry: Entry | None, operation: str, limit_s: float, expected_s: float = 0.0, **fields: Json) -> Answer:
        """Ask within the limit and the deadline; whatever ends the worker is laid at the door of `entry`."""
        remaining = self._remaining()
        if remaining <= 0:
            raise OutOfTime
        began = time.monotonic()
        try:
            answer = self.client.ask(operation, limit_s=min(limit_s, remaining), **fields)
        except WorkerHung as error:
            if self._remaining() > 0:
                raise Lost(entry, Status.TIMEOUT, str(error)) from error
            waited = time.monotonic() - began
            if entry is None or not self.limits.blames(waited, expected_s=expected_s, budget_s=self._budget_s):
                raise OutOfTime from error
            reason = f"no answer to {operation} within {waited:.0f} s, then the budget ended"
            raise Lost(entry, Status.TIMEOUT, reason) from error
        except WorkerDied as error:
            raise Lost(entry, Status.CRASHED, f"{error}, in {operation}") from error
        if entry is not None and answer.get("not_captured") and not entry.not_captured:
            entry.not_captured = answer["not_captured"]
            raise Again
        if answer.get("fatal"):
            raise Lost(entry, Status(answer["status"]), answer.get("reason", ""), answer)
        return answer

    def _quietly(self, operation: str, **fields: Json) -> None:
        """Tidy up; a worker that fails at it is replaced when next needed."""
        try:
            self.client.ask(operation, limit_s=max(min(30.0, self._remaining()), 0.1), **fields)
        except (WorkerDied, WorkerHung):
            self.client.kill()

    def _set_up(self) -> None:
        """A worker with the problem open."""
        if not self.client.alive:
            self._is_open = False
            self._start()
        if not self._is_open:
            p, policy = self._problem, self._policy.to_json()
            answer = self._ask(
                None, "open", self.limits.open_s, operator=p.operator, problem=p.to_json(), policy=policy, reuse=self._keep_data
            )
            if answer["status"] != Status.OK.value:
                raise NoContest(Status(answer["status"]), f"while the data of the problem was made: {answer.get('reason', '')}")
            self._is_open, self._data = True, answer

    def _prepare(self, group: list[Entry]) -> Iterator[Result]:
        """Make every contestant of the group ready; those that cannot be are told, those that must wait go back to the queue."""
        self._set_up()
        self._anchors.prepare(self._remaining())
        began, full = time.monotonic(), False
        postponed: list[Entry] = []
        for entry in list(group):
            if entry.ready or entry.slot in self._told:
                continue
            if not entry.samples_us and (self._stop.is_set() or self._must_wait(group, began, full)):
                group.remove(entry)
                postponed += [] if entry.guest else [entry]
                continue
            skipped = [] if entry.guest else list(self._skip(entry))
            if skipped:
                group.remove(entry)
                yield from skipped
                continue
            trial = entry.trial
            answer = self._ask(
                entry,
                "prepare",
                self.limits.preparing_s(self._remaining()),
                slot=entry.slot,
                kernel=trial.kernel,
                source_digest=trial.source_digest,
                config=trial.config.to_json_full(),
                policy=entry.policy.to_json(),
            )
            if answer["status"] == Status.OK.value:
                entry.ready, entry.shape = True, answer
                self.quarantine.worked(trial)
                full = answer["free_share"] < LEAST_FREE_SHARE
                continue
            group.remove(entry)
            if entry.guest:
                self._baseline = None
            elif answer["status"] == Status.OUT_OF_MEMORY.value and any(e.ready for e in group) and entry.slot not in self._tried_alone:
                self._tried_alone.add(entry.slot)
                self._waiting.append(entry)
            else:
                yield self._failure(entry, Status(answer["status"]), answer.get("reason", ""), answer)
        self._waiting[:0] = postponed

    def _must_wait(self, group: list[Entry], began: float, full: bool) -> bool:
        """True when memory is full, or preparing one more would leave too little time to measure those that are ready."""
        ready = [e for e in group if e.ready]
        if full or all(e.guest for e in ready):
            return full and not all(e.guest for e in ready)
        now = time.monotonic()
        cost = (now - began) / len(ready)
        lap_s = self._anchors.lap_s + sum(1.5 * e.round_s + 0.005 for e in ready if not e.done)
        return now + cost + self._policy.min_rounds * lap_s > self._deadline

    def _laps(self, group: list[Entry], baseline: Baseline) -> Iterator[Result]:
        """Rounds until nobody needs more. The baseline runs along as long as anybody does, so that every lap can be paired."""
        lap = 0
        while True:
            wanting = [e for e in group if e.ready and not e.done]
            if not any(e for e in wanting if not e.guest):
                return
            began = time.monotonic()
            for turn in self._anchors.in_turn(wanting, lap) if self._policy.max_rounds else ():
                self._anchors.sample(turn, self._remaining()) if isinstance(turn, AnchorRun) else self._sample(turn)
            lap += 1
            now = time.monotonic()
            closing = [e for e in wanting if self._enough(e)]
            if closing:
                baseline.choose()
                others = [e for e in wanting if e not in closing and e is not baseline.entry]
                if baseline.entry in closing and others and len(baseline.entry.samples_us) < baseline.entry.trial.policy.max_rounds:
                    closing.remove(baseline.entry)
            if now + 1.2 * (now - began) + CLOSING_S * len(wanting) > self._deadline:
                closing = [e for e in wanting if e.tellable]
                if not closing:
                    raise OutOfTime
                for entry in closing:
                    yield from self._close(entry, baseline)
                raise OutOfTime
            for entry in closing:
                yield from self._close(entry, baseline)

    def _sample(self, entry: Entry) -> None:
        began = time.monotonic()
        answer = self._ask(entry, "sample", self.limits.sampling_s(entry.round_s, self._remaining()), entry.round_s, slot=entry.slot)
        if answer["status"] != Status.OK.value:
            # The worker lives, but a launch that fails between good ones has unsettled it: the others get a fresh one.
            raise Lost(entry, Status(answer["status"]), answer.get("reason", ""), answer)
        entry.add(answer, time.monotonic() - began)

    def _enough(self, entry: Entry) -> bool:
        """The stopping rule; or, when asked to stop, the least rounds and a short grace."""
        if self._stop.is_set():
            self._stopped_at = min(self._stopped_at, time.monotonic())
            grace_over = time.monotonic() - self._stopped_at > STOP_GRACE_S
            return len(entry.kept) >= entry.trial.policy.min_rounds or grace_over
        return bool(entry.rule.enough(entry.samples_us, entry.marked, entry.spent_s))

    def _close(self, entry: Entry, baseline: Baseline) -> Iterator[Result]:
        """Check once more, then tell, unless its energy is still to be measured."""
        entry.done = True
        if entry.guest or not entry.tellable:
            return
        answer = self._ask(entry, "finish", self.limits.sampling_s(entry.round_s, self._remaining()), entry.round_s, slot=entry.slot)
        if answer["status"] != Status.OK.value:
            yield self._failure(entry, Status(answer["status"]), answer.get("reason", ""), answer)
            return
        entry.finished = answer
        if not entry.trial.policy.energy:
            yield self._tell(entry, baseline)

    def _energies(self, group: list[Entry], baseline: Baseline) -> Iterator[Result]:
        """Sustained runs in passes of alternating order, for those that want them."""
        wanting = [e for e in group if e.trial.policy.energy and not e.guest and e.ready and e.slot not in self._told]
        guard = guard_of(self.client.environment)
        fields: dict[str, Json] = {"guard": guard.to_json()} if guard else {}
        ramp_s = guard.ramp_s if guard else RAMP_S
        for turn in range(ENERGY_PASSES):
            for entry in wanting if turn % 2 == 0 else wanting[::-1]:
                if turn and not entry.energy.get("power_trace"):
                    continue  # refused for good at the first pass
                seconds = entry.trial.policy.energy_s
                # 2 s measure the idle power, once.
                need_s = seconds / ENERGY_PASSES + ramp_s + 1.0 + (0.0 if turn else 2.0)
                if self._stop.is_set() or self._remaining() < need_s:
                    why = "interrupted" if self._stop.is_set() else f"{max(self._remaining(), 0.0):.0f} s were left"
                    entry.energy = {"energy_reason": f"not measured to the end: {why}, a sustained run takes {need_s:.0f} s"}
                    continue
                limit_s = 3.0 * seconds + max(RAMP_LIMIT_S, ramp_s) + self.limits.sample_s
                answer = self._ask(entry, "energy", limit_s, need_s, slot=entry.slot, seconds=seconds, **fields)
                if answer["status"] != Status.OK.value:
                    raise Lost(entry, Status(answer["status"]), answer.get("reason", ""), answer)
                entry.energy = answer
        for entry in wanting:
            yield self._tell(entry, baseline)

    def _place(self) -> Place:
        environment = {**self.client.environment, **self._checkout}
        return Place.of(self._run_id, environment, self.client.kernels, self._data, self._policy)

    def _skip(self, entry: Entry) -> Iterator[Result]:
        """The row of one that hung or crashed before in this run; nothing for the others."""
        verdict = self.quarantine.verdict(entry.trial)
        if verdict is not None:
            yield self._row(entry, *verdict, {})

    def _failure(self, entry: Entry, status: Status, reason: str, answer: Mapping[str, Json]) -> Result:
        """The row of one that failed by its own fault."""
        self.quarantine.failed(entry.trial, status)
        return self._row(entry, status, reason, answer)

    def _row(self, entry: Entry, status: Status, reason: str, answer: Mapping[str, Json]) -> Result:
        self._told.add(entry.slot)
        entry.done = True
        return entry.failed(self._place(), status, reason, answer)

    def _tell(self, entry: Entry, baseline: Baseline) -> Result:
        self._told.add(entry.slot)
        return entry.measured(self._place(), baseline.beside(entry), self._anchors.to_json(len(entry.samples_us)))
