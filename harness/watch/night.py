"""A night: measure what the policy tracks in fresh processes, judge it, measure suspects again, and say what is to be said."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime

from klab.harness.fleet.devices import devices
from klab.harness.fleet.estimate import COMPILE_S, estimate_s
from klab.harness.fleet.run import AnyFleet
from klab.harness.measure import environment
from klab.harness.measure.anchor import anchor_trouble, which_anchor
from klab.harness.plan.trial import Trial
from klab.harness.store.result import Result, Status
from klab.harness.tune.job import new_run_id
from klab.harness.watch.history import History, last_seen
from klab.harness.watch.judge import judge_night, suspects, too_noisy
from klab.harness.watch.looks import Group, Looks
from klab.harness.watch.points import Found, find_point
from klab.harness.watch.policy import NightPolicy
from klab.harness.watch.series import Call, Metric, Night, Point, Series, Verdict
from klab.harness.watch.tracked import Tracked, Watched, watched
from klab.harness.watch.waivers import lapsed, since_accepted, waive, waiver_notes
from klab.kernels.contract import Chip, Json
from klab.kernels.discover import discover
from klab.kernels.errors import CannotMeasure

# Where energies are tracked too, so much of the time before the second looks is for the times (a guess); what they leave is for energies.
TIME_SHARE = 0.6
# Nights in which the device is looked for that measured last.
LOOKED_BACK = 7
_MOMENT = "%Y-%m-%dT%H:%M:%SZ"
# Of each device: what a reader of a night asks for first.
DEVICE_FACTS = ("device", "driver", "power_limit_w", "cpu_model", "host")


def run_night(
    policy: NightPolicy,
    chip: Chip,
    *,
    fleet: AnyFleet,
    history: History,
    deadline: float | None = None,
    on_result: Callable[[Result], None] = lambda row: None,
    told: Callable[[str], None] = lambda line: None,
    found: Watched | None = None,
    identity: str = "",
    stop: threading.Event | None = None,
    clock: Callable[[], float] = time.monotonic,
    now: datetime | None = None,
) -> Night:
    """Measure and judge; the night is returned and not yet in the history.

    deadline: a second of `clock`. on_result: is handed every row as soon as it stands (it stores them). told: hears what begins.
    found: what is watched, where the caller has looked it up. KeyboardInterrupt passes; CannotMeasure when nothing was measured.
    """
    began, at = clock(), now or datetime.now(UTC)
    identity = identity or new_run_id()
    nights = history.nights(chip.name)
    found = found or watched(policy, chip, discover())
    looks = Looks(fleet, on_result, anchors=policy.measure.anchors, stop=stop, clock=clock)
    made = _Making(policy, chip, nights, found, looks, told, clock, deadline, identity)
    verdicts = waive(made.verdicts(), policy.waivers, at.date())
    rows = looks.all_rows()
    if not rows and any(one.trials for one in found.tracked):
        reasons = dict.fromkeys(v.reason for v in verdicts)
        raise CannotMeasure(f"nothing was measured on {chip.name}: {'; '.join(list(reasons)[:3])}")
    notes = [f"the measuring ended early: {looks.lost}"] if looks.lost else []
    notes += [*history.problems, *fleet.notes, *made.notes, *_anchor_notes(rows, policy.measure.anchors)]
    if ahead := [night for night in nights if night.at > at.strftime(_MOMENT)]:
        told_at = f"{len(ahead)} of {len(nights)} nights of the history are dated after tonight, up to {max(n.at for n in ahead)}"
        notes.append(f"{told_at}: a clock is wrong, or was; they count like the others")
    if noisy := too_noisy(verdicts, policy.rule):
        notes.append(f"{len(noisy)} of {len(verdicts)} series are too noisy to have shown {policy.rule.too_noisy:.0%} tonight")
    notes += waiver_notes(verdicts, policy.waivers, at.date())
    checkout = environment.checkout()
    return Night(
        identity=identity,
        at=at.strftime(_MOMENT),
        chip=chip.name,
        commit=str(checkout["commit"] or ""),
        dirty=bool(checkout["dirty"]),
        verdicts=tuple(verdicts),
        epochs=_epochs(rows),
        devices={row.device_uuid or chip.kind: {n: row.environment.get(n) for n in DEVICE_FACTS} for row in rows if row.environment},
        notes=tuple(dict.fromkeys(notes)),
        seconds=round(clock() - began, 1),
        policy=policy.digest(chip.name),
        incomplete=looks.lost,
        lapsed=lapsed(policy.waivers, at.date()),
    )


def exit_code(night: Night, *, strict: bool = False) -> int:
    """0: fine. 1: a verdict or an expired waiver fails the night. 4: neither, but the measuring ended early. 3: a suspect, if `strict`."""
    if night.lapsed or any(v.fails for v in night.verdicts):
        return 1
    if night.incomplete:
        return CannotMeasure.exit_code
    return 3 if strict and any(v.call == Call.SUSPECT and not v.waiver for v in night.verdicts) else 0


def pick_devices(chip: Chip, history: History, wanted: str = "") -> list[str] | None:
    """Which devices of this machine a night uses; None for all of them (`wanted` is "all"), or on a CPU.

    GPUs of one kind differ by more than 5%, so a night stays on one: the wanted (UUID or index), else the one that measured last, else the
    first. CannotMeasure when the chip is not here.
    """
    here = [device.id for device in devices(chip)]
    if chip.kind != "cuda" or wanted == "all":
        return None
    if wanted:
        return [wanted]
    nights = reversed(history.nights(chip.name, last=LOOKED_BACK))
    used = [v.point.device_uuid for night in nights for v in night.verdicts if v.point and v.point.values]
    return [next((uuid for uuid in used if uuid in here), here[0])]


def estimate_night_s(policy: NightPolicy, chip: Chip, found: Watched) -> float:
    """Seconds that the first looks of a night take, roughly (modelled). Later processes find what the first has compiled."""
    times = {t.key: t for one in found.tracked for t in _metered(one.trials, Metric.TIME) if Metric.TIME in one.metrics}
    held = [_metered(one.trials[:1], Metric.ENERGY) for one in found.tracked if Metric.ENERGY in one.metrics]
    energies = {t.key: t for trials in held for t in trials}
    measure = policy.measure
    timing, energy = (estimate_s(trials.values(), chip, anchors=measure.anchors) for trials in (times, energies))
    passes = measure.processes * timing + measure.energy_processes * energy
    return passes - COMPILE_S[chip.kind] * ((measure.processes - 1) * len(times) + measure.energy_processes * len(energies))


class _Making:
    """The steps of one night. `notes` are for people."""

    def __init__(
        self,
        policy: NightPolicy,
        chip: Chip,
        nights: Sequence[Night],
        found: Watched,
        looks: Looks,
        told: Callable[[str], None],
        clock: Callable[[], float],
        deadline: float | None,
        identity: str,
    ) -> None:
        self._identity = identity
        self.policy, self.chip, self.nights, self.looks = policy, chip, nights, looks
        self.rule, self.measure = policy.rule, policy.measure
        self.found, self.notes = found, list(found.notes)
        self._told, self._clock, self._deadline, self._began = told, clock, deadline, clock()
        self.series = found.series()
        self._of = {one.series(metric).identity: (one, metric) for one in found.tracked for metric in one.metrics}
        self._past, self._since = self._history()
        # Which looks at a series count: the first, and those that were taken because of it.
        self._taken: dict[str, list[int]] = {identity: [0] for identity in self.series}
        self._points: dict[str, Found] = {}
        # Whose energy stands for a series: decided once, after the times.
        self._holding: dict[str, list[Trial]] = {}

    def verdicts(self) -> list[Verdict]:
        """Measure, judge, look again at what asks for it, and judge for good."""
        self._first_look()
        judged = self._judge()
        # A failure may cost a look besides those that a suspect gets.
        for look in range(1, self.rule.looks + 1):
            wanted = [i for i in dict.fromkeys([*suspects(judged, self.rule), *self._failed_once()]) if i in self._of]
            if not wanted or not self._time():
                break
            self._told(f"look {look + 1}: {len(wanted)} of {len(self.series)} series")
            self._look_again(look, wanted)
            judged = self._judge()
        return [self._explained(verdict) for verdict in judged.values()]

    def _failed_once(self) -> list[str]:
        """What failed beside good values in the first look: is it met again?"""
        return [i for i, found in self._points.items() if found.once and len(self._taken[i]) == 1]

    def _first_look(self) -> None:
        measure = self.measure
        energies = [one for one in self.found.tracked if Metric.ENERGY in one.metrics]
        end = self._before_second_looks()
        time_end = end
        if energies and end is not None:
            time_end = self._began + TIME_SHARE * (end - self._began)
        groups = self._groups(Metric.TIME)
        self._told(f"{len(groups)} problems in {measure.processes} processes each")
        left = self.looks.take(0, groups, measure.processes, time_end)
        if energies:
            self._told(f"energy of {len(energies)} contestants in {measure.energy_processes} processes each")
            left += self.looks.take(0, self._groups(Metric.ENERGY), measure.energy_processes, end)
        if left and not self.looks.stopped and not self.looks.lost:
            self.notes.append(f"the budget ended before {len(left)} of the problems were measured; they come first next night")

    def _before_second_looks(self) -> float | None:
        if self._deadline is None:
            return None
        return self._deadline - self.measure.recheck_share * (self._deadline - self._began)

    def _groups(self, metric: Metric, only: Sequence[str] | None = None) -> list[Group]:
        """The trials by problem; what was measured least recently comes first, and the rest in the policy's order."""
        seen = last_seen(self.nights)
        groups: dict[str, dict[str, Trial]] = {}
        age: dict[str, int] = {}
        for one in self.found.tracked:
            if metric not in one.metrics or (only is not None and one.problem.key not in only):
                continue
            own = groups.setdefault(one.problem.key, {})
            own |= {trial.key: trial for trial in self._trials(one, metric)}
            last = seen.get(one.series(metric).identity, -1)
            age[one.problem.key] = min(age.get(one.problem.key, last), last)
        ordered = sorted(groups, key=lambda key: age[key])
        return [tuple(groups[key].values()) for key in ordered if groups[key]]

    def _trials(self, one: Tracked, metric: str) -> list[Trial]:
        """Who may hold a role. A sustained run takes so long that of several only the one that is fastest tonight is metered."""
        trials = _metered(one.trials, metric)
        if metric == Metric.TIME or len(trials) == 1:
            return trials
        identity = one.series(metric).identity
        if identity not in self._holding:
            self._holding[identity] = self._fastest(one, trials)
        return self._holding[identity]

    def _fastest(self, one: Tracked, trials: list[Trial]) -> list[Trial]:
        time_of = one.series(Metric.TIME).identity
        point = self._point(time_of).point if time_of in self.series else None
        held = [t for t in trials if point and (t.kernel, t.config.to_json_full()) == (point.kernel, point.config)]
        return held or trials

    def _look_again(self, look: int, wanted: Sequence[str]) -> None:
        """The problems of these series with all their contestants: the same conditions as at the first look."""
        for metric, processes in ((Metric.TIME, self.measure.processes), (Metric.ENERGY, self.measure.energy_processes)):
            keys = [self._of[i][0].problem.key for i in wanted if self._of[i][1] == metric]
            if keys:
                self.looks.take(look, self._groups(metric, keys), processes, self._deadline)
        for identity in wanted:
            self._taken[identity].append(look)

    def _judge(self) -> dict[str, Verdict]:
        """Points of what was measured so far, and what the rule says of them."""
        self._points = {identity: self._point(identity) for identity in self.series}
        untold = self._untold()
        tonight = {i: f.point or Point(reason=f.reason or self._why_not_reached()) for i, f in self._points.items() if i not in untold}
        tonight = {i: dataclasses.replace(point, night=self._identity) for i, point in tonight.items()}
        series = {i: s for i, s in self.series.items() if i not in untold}
        return judge_night(self._past, tonight, self.rule, series, since=self._since)

    def _point(self, identity: str) -> Found:
        one, metric = self._of[identity]
        if not one.trials:
            return Found(Point(status=Status.UNSUPPORTED.value, reason=one.found))
        trials = self._trials(one, metric)
        last = self._past.get(identity, ())
        found = find_point(
            [(trial, self.looks.of(trial, self._taken[identity])) for trial in trials],
            metric,
            self._anchor(trials[0]),
            processes=self.measure.energy_processes if metric == Metric.ENERGY else self.measure.processes,
            last_kernel=next((p.kernel for p in reversed(last) if p.kernel), ""),
        )
        self.notes += [note for note in found.notes if note not in self.notes]
        return found

    def _anchor(self, trial: Trial) -> str:
        """The anchor that is bound by what bounds the problem, where the policy takes it; else the one that it takes; "" without any."""
        wanted = which_anchor(trial.problem, self.chip)
        return wanted if wanted in self.measure.anchors else next(iter(self.measure.anchors), "")

    def _untold(self) -> set[str]:
        """The energies that this machine never told: they are no series of it, and a note says why."""
        never = {i: f.reason for i, f in self._points.items() if f.refused and not any(p.values for p in self._past.get(i, ()))}
        for reason, count in Counter(never.values()).items():
            note = f"the energy of {count} contestants cannot be watched: {reason}"
            if note not in self.notes:
                self.notes.append(note)
        return set(never)

    def _why_not_reached(self) -> str:
        if self.looks.lost:
            return f"not reached: {self.looks.lost}"
        return "interrupted before it was reached" if self.looks.stopped else "not reached within the budget; it comes first next night"

    def _explained(self, verdict: Verdict) -> Verdict:
        """The verdict with what the judge cannot know: that a failure was met once, that a series is not planned any more."""
        identity = verdict.series.identity
        found = self._points.get(identity)
        if found is None:
            if verdict.call != Call.MISSING or identity not in self._gone:
                return verdict
            reason = "watched until now and not planned any more, though the policy's tracks are the same"
            return dataclasses.replace(verdict, series=self._gone[identity], reason=reason)
        if found.once and Call(verdict.call) in (Call.OK, Call.FASTER, Call.UNKNOWN):
            return dataclasses.replace(verdict, call=Call.SUSPECT.value, reason=found.once)
        return verdict

    def _history(self) -> tuple[dict[str, list[Point]], dict[str, int]]:
        """Earlier points by series, of what is watched and of what vanished although the tracks are the same; and since when they count."""
        points: dict[str, list[Point]] = {}
        where: dict[str, tuple[Series, str]] = {}
        for night in self.nights:
            for verdict in night.verdicts:
                where[verdict.series.identity] = (verdict.series, night.policy)
                if verdict.point is not None:
                    points.setdefault(verdict.series.identity, []).append(dataclasses.replace(verdict.point, night=night.identity))
        digest = self.policy.digest(self.chip.name)
        gone = {i: series for i, (series, _) in where.items() if i not in self.series}
        dropped = {i for i in gone if where[i][1] != digest}
        last = {v.series.identity for night in self.nights[-1:] for v in night.verdicts}
        if names := [gone[i].name for i in gone if i in dropped and i in last]:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            self.notes.append(f"the policy's tracks changed: no longer watched: {', '.join(names[:3])}{more}")
        self._gone = {i: series for i, series in gone.items() if i not in dropped}
        since = since_accepted(self.nights, self.policy.accepted)
        kept = {i: own for i, own in points.items() if i not in dropped}
        return kept, {i: index for i, index in since.items() if i in kept}

    def _time(self) -> bool:
        return not self.looks.stopped and (self._deadline is None or self._clock() < self._deadline)


def _metered(trials: Iterable[Trial], metric: str) -> list[Trial]:
    """The trials as a metric wants them: for energy, with the sustained run."""
    return [trial.with_policy(energy=True) for trial in trials] if metric == Metric.ENERGY else list(trials)


def _anchor_notes(rows: Iterable[Result], anchors: Sequence[str]) -> list[str]:
    """How many good rows lack an anchor, and why the first of them does."""
    notes = []
    for name in anchors:
        found = [why for row in rows if row.status is Status.OK and row.median_us is not None and (why := anchor_trouble(row, name))]
        if found:
            notes.append(f"{len(found)} rows have no {name} anchor, or not in all laps: {found[0]}")
    return notes


def _epochs(rows: Iterable[Result]) -> dict[str, Json]:
    """What each epoch stands for."""
    found: dict[str, Json] = {}
    for row in rows:
        names = environment.EPOCH_CUDA if row.environment.get("kind") == "cuda" else environment.EPOCH_CPU
        found.setdefault(row.epoch, {name: row.environment.get(name) for name in names})
    return found
