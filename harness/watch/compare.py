"""Two sides that run: their kernels in turns on one device, pass after pass of fresh processes, until it is clear which is faster."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from klab.harness.catalog import find_model
from klab.harness.choose.profile import read_profile
from klab.harness.fleet.devices import Device
from klab.harness.measure import environment
from klab.harness.measure.contest import Contest
from klab.harness.measure.limits import Limits
from klab.harness.plan.trial import Policy
from klab.harness.store.result import Result, Status
from klab.harness.watch.compare_rule import LAPS, LOOKS, MARGIN, Answer, Found, Question, Rounds, replicate, together
from klab.harness.watch.comparison import Comparison, Line
from klab.harness.watch.sides import AsWritten, Planned, Side, SideTrial, plan
from klab.harness.watch.twin import SideClient, Twin
from klab.kernels.contract import Chip, Json, Problem, digest
from klab.kernels.errors import UsageError

# A kernel that fails in two passes, in fresh processes, is broken; once may be the machine.
FAILURES = 2
# Passes of fresh processes at the most, unless the user says otherwise.
MOST_PASSES = 20
# A pass is begun only if as much time is left as the longest took so far.
LEAST_SHARE = 0.9


@dataclass
class Pair:
    """One problem's kernel on both sides. `name` is unique; `same_code`: source, helpers and configuration are equal on both."""

    name: str
    problem: Problem
    trials: tuple[SideTrial, SideTrial]
    question: Question = field(default_factory=Question)
    failures: dict[str, list[Result]] = field(default_factory=dict)
    passes: dict[int, float] = field(default_factory=dict)

    @property
    def same_code(self) -> bool:
        """Nothing that klab calls the kernel's identity differs: then only what is around it can."""
        a, b = self.trials
        return (a.kernel, a.source_digest, a.config) == (b.kernel, b.source_digest, b.config)


def plan_sides(sides: Sequence[Side], chip: str, words: Sequence[Sequence[str]], policy: Policy) -> list[Planned]:
    """What each side would measure with its own words, asked at the same time. Errors name the side."""
    with ThreadPoolExecutor(len(sides)) as pool:
        return list(pool.map(lambda side, own: plan(side, chip, own, policy), sides, words))


def laps_policy(policy: Policy) -> Policy:
    """The policy of one replicate: LAPS rounds of everybody, however long they take."""
    return dataclasses.replace(policy, min_rounds=LAPS, max_rounds=LAPS, limit_s=600.0, energy=False)


def pair_up(a: Planned, b: Planned) -> tuple[list[Pair], list[tuple[str, str]]]:
    """(each kernel of each problem that both sides have, what only one of them has and why it is not compared)."""
    here, there = ({(t.problem.key, t.kernel): t for t in planned.trials} for planned in (a, b))
    pairs = _named([Pair(_name(t), t.problem, (t, there[key])) for key, t in here.items() if key in there])
    alone: list[tuple[str, str]] = []
    for own, other, ours, theirs in ((a, b, here, there), (b, a, there, here)):
        for trial in (t for key, t in ours.items() if key not in theirs):
            absent = _unavailable(trial.kernel, own, other)
            reason = f"{other.side.name}'s file of it: {absent['reason']}" if absent else ""
            if reason and own is a and not absent.get("install"):
                pairs.append(_lost(_name(trial), trial, reason))
            else:
                alone.append((_name(trial), f"only {own.side.name} has it{f'; {reason}' if reason else ''}"))
    alone += [(f"{p.side.name}", reason) for p in (a, b) for reason in dict.fromkeys(p.not_understood)]
    return pairs, alone


def _unavailable(kernel: str, here: Planned, there: Planned) -> dict[str, Json]:
    """{"reason", "install"} of the file that has this kernel `here` and gives none `there`; empty where it is not there at all."""
    return there.facts.get("unavailable", {}).get(here.facts.get("files", {}).get(kernel), {})  # type: ignore[no-any-return]


def _lost(name: str, trial: SideTrial, reason: str) -> Pair:
    """A kernel that A has and whose file does not load on B: broken, without a pass."""
    gone = dataclasses.replace(trial, source_digest="", side="B")
    return Pair(name, trial.problem, (trial, gone), Question(found=Found(Answer.BROKEN, reason=reason)))


def _name(trial: SideTrial) -> str:
    return f"{trial.problem.label()} {trial.kernel.split('/')[-1]}"


def _named(pairs: list[Pair]) -> list[Pair]:
    """A label leaves out what is rarely of interest: where two pairs have one name, the problem's key tells them apart."""
    count = Counter(pair.name for pair in pairs)
    return [dataclasses.replace(p, name=f"{p.name} ({p.problem.key[:6]})") if count[p.name] > 1 else p for p in pairs]


def chosen_pairs(a: Planned, b: Planned, chip: str, model: str) -> tuple[list[Pair], list[tuple[str, str]]]:
    """As `pair_up`, but per problem what each side's own profile of (chip, model) chose. UsageError where a side has no such profile."""
    found: list[dict[str, SideTrial]] = []
    alone: list[tuple[str, str]] = []
    for planned in (a, b):
        path = Path(planned.facts["harness"]).parent / "profiles" / "tuned" / chip / f"{find_model(model).name}.json"
        profile = read_profile(path)
        if profile is None:
            raise UsageError(
                f"{planned.side.name} ({planned.side.title}) has no profile for {chip} and {model}: drop --chosen to compare all kernels"
            )
        own = {(t.problem.key, t.kernel): t for t in planned.trials}
        chosen: dict[str, SideTrial] = {}
        for choice in profile.choices:
            trial = own.get((choice.wanted.problem_key, choice.kernel))
            if trial is not None and not choice.instead:
                chosen[choice.wanted.problem_key] = dataclasses.replace(trial, config=AsWritten(choice.config))
        alone += [(t.problem.label(), f"{planned.side.name}'s profile chooses nothing for it")
                  for t in {t.problem.key: t for t in planned.trials}.values() if t.problem.key not in chosen]  # fmt: skip
        found.append(chosen)
    pairs = [Pair(f"{t.problem.label()} as chosen", t.problem, (t, found[1][key])) for key, t in found[0].items() if key in found[1]]
    return _named(pairs), alone


@dataclass
class Bench:
    """The device that both sides share, and how long things may take. `told` is called with each row, `said` with a line at each look."""

    device: Device
    chip: Chip
    planned: Sequence[Planned]
    run_id: str
    kernel_dirs: Sequence[Sequence[Path]] = ((), ())
    deadline: float | None = None
    limits: Limits = field(default_factory=Limits)
    told: Callable[[Result], None] = lambda row: None
    said: Callable[[str], None] = lambda line: None
    stop: threading.Event = field(default_factory=threading.Event)

    def twin(self, swapped: bool) -> Twin:
        """Two fresh workers; `swapped`: B has the first slot."""
        clients = [
            SideClient(p.side, self.chip, fields=p.facts.get("chip"), cuda_device=self.device.cuda_visible, kernel_dirs=dirs)
            for p, dirs in zip(self.planned, self.kernel_dirs, strict=True)
        ]
        return Twin(clients[::-1] if swapped else clients)

    def over(self, needed_s: float = 0.0) -> bool:
        """Is there no time left?"""
        return self.stop.is_set() or (self.deadline is not None and time.monotonic() + needed_s >= self.deadline)


def run_passes(
    bench: Bench, pairs: Sequence[Pair], *, most: int = MOST_PASSES, looks: Sequence[int] = LOOKS, questions: int = 0
) -> tuple[int, str]:
    """Passes over all open pairs until each is clear, `most` passes were made, or the time is up; (passes, why it stopped).

    In each pass both sides have fresh processes; who goes first alternates. `questions` share the error of 5%: by default the pairs and
    their mean.
    """
    questions = questions or len(pairs) + (len(pairs) > 1)
    looks = (*(n for n in looks if n < most), most)
    number, longest_s, stopped = 0, 0.0, ""
    while any(pair.question.open for pair in pairs) and number < most:
        if bench.over(LEAST_SHARE * longest_s):
            stopped = "interrupted" if bench.stop.is_set() else "the time was up"
            break
        began = time.monotonic()
        _one_pass(bench, [pair for pair in pairs if pair.question.open], number)
        number += 1
        for pair in pairs:
            if pair.question.due(looks):
                pair.question.look(questions, looks=looks)
        if number in looks:
            bench.said(f"after {number} pairs of processes {sum(p.question.open for p in pairs)} of {len(pairs)} are open")
        longest_s = max(longest_s, time.monotonic() - began)
    for pair in pairs:
        if pair.question.open:
            pair.question.look(questions, last=True, looks=looks)
    return number, stopped


def _one_pass(bench: Bench, pairs: Sequence[Pair], number: int) -> None:
    twin = bench.twin(swapped=number % 2 == 1)
    try:
        for pair in pairs:
            if bench.over():
                return
            _one_contest(bench, twin, pair, number)
    finally:
        twin.kill()


def _one_contest(bench: Bench, twin: Twin, pair: Pair, number: int) -> None:
    """Both sides' kernels in one contest; what it gives goes to the pair's question."""
    clients = {client.side.name: client for client in twin.clients}
    policy = dataclasses.replace(pair.trials[0].policy, seed=number)
    trials = {t.side: dataclasses.replace(t, policy=policy) for t in pair.trials}
    by_key = {trial.key: trial for trial in trials.values()}
    contest = Contest(twin, [trials[name] for name in clients], run_id=bench.run_id, limits=bench.limits, keep_data=True)
    rows: dict[str, Result] = {}
    for row in contest.run(deadline=bench.deadline, stop=bench.stop):
        trial = by_key[row.key]
        rows[trial.side] = _as_of(row, trial, clients[trial.side])
        bench.told(rows[trial.side])
    _note(pair, rows, number)


def _as_of(row: Result, trial: SideTrial, client: SideClient) -> Result:
    """The row as the side's own klab would have stored it, with the side's environment, marked with the side's name."""
    place = dict(client.environment)
    threads = row.environment.get("threads")
    place |= {"threads": threads} if threads else {}
    place |= {"commit": client.side.commit or None}
    return dataclasses.replace(
        row,
        key=digest(trial.to_json()),
        environment=place,
        device=str(place.get("device", "")),
        device_uuid=str(place.get("uuid", "")),
        epoch=environment.epoch(place),
        build={**row.build, "side": client.side.name, "side_title": client.side.title},
    )


def _note(pair: Pair, rows: Mapping[str, Result], number: int) -> None:
    """Tell the question what this pass gave, and close it where a side fails for good."""
    bad = {name: row for name, row in rows.items() if row.status not in (Status.OK, Status.THROTTLED)}
    for name, row in bad.items():
        pair.failures.setdefault(name, []).append(row)
    if bad:
        _close_broken(pair)
        return
    names = [trial.side for trial in pair.trials]
    if any(name not in rows for name in names) or len({_laps(row) for row in rows.values()}) != 1:
        return  # the time was up
    told = replicate(*(Rounds(rows[n].samples_us, rows[n].clocks_mhz, rows[n].marked) for n in names))
    pair.question.add(told)
    if told is not None:
        pair.passes[number] = told[0]


def _laps(row: Result) -> Json:
    contest = row.build.get("contest")
    return contest.get("id") if isinstance(contest, dict) else None


def _close_broken(pair: Pair) -> None:
    a, b = (pair.failures.get(trial.side, []) for trial in pair.trials)
    if max(len(a), len(b)) < FAILURES:
        return
    runs = len(pair.question.logs)
    if a:
        # A kernel that fails now and then does so on both sides: who was the first to do it twice is chance.
        said = f"fails on {'both sides' if b else 'A'}: {_ending(a[-1])}"
        pair.question.found = Found(Answer.NOT_COMPARED, replicates=runs, reason=said if b else f"{said}; B may mend it")
    else:
        pair.question.found = Found(Answer.BROKEN, replicates=runs, reason=_ending(b[-1]))


def _ending(row: Result) -> str:
    return f"{row.status.value}: {row.reason}" if row.reason else row.status.value


def conclude(
    pairs: Sequence[Pair], alone: Sequence[tuple[str, str]], notes: Sequence[str] = (), passes: int = 0, stopped: str = ""
) -> Comparison:
    """The comparison from what the passes left."""
    lines = [Line(pair.name, _with_failures(pair), *_both(pair)) for pair in pairs]
    timed = [pair for pair in pairs if pair.passes]
    common = sorted(set.intersection(*(set(pair.passes) for pair in timed))) if timed else []
    margin = pairs[0].question.margin if pairs else MARGIN
    if len(pairs) == 1:
        mean = lines[0].found
    else:
        mean = together([[pair.passes[n] for pair in timed] for n in common], questions=len(pairs) + 1, margin=margin)
    return Comparison.of(lines, mean, margin=margin, alone=alone, notes=notes, passes=passes, stopped=stopped)


def _with_failures(pair: Pair) -> Found:
    """What was found; a pass that failed is said, and as good as A is only what did not fail where A never did."""
    found = pair.question.found or Found(Answer.CANNOT_TELL, reason="nothing was measured")
    if found.answer in (Answer.BROKEN, Answer.NOT_COMPARED) or not pair.failures:
        return found
    said = [f"failed in one pass on {name}: {_ending(rows[-1])}" for name, rows in sorted(pair.failures.items()) if rows]
    only_b = pair.failures.get(pair.trials[1].side) and not pair.failures.get(pair.trials[0].side)
    doubtful = only_b and found.answer in (Answer.SAME, Answer.FASTER)
    return dataclasses.replace(
        found, answer=Answer.CANNOT_TELL if doubtful else found.answer, reason="; ".join(filter(None, (found.reason, *said)))
    )


def _both(pair: Pair) -> list[dict[str, Json]]:
    return [{"kernel": t.kernel, "config": t.config.to_json_full(), "source_digest": t.source_digest} for t in pair.trials]


def differences(a: Mapping[str, Json], b: Mapping[str, Json]) -> list[str]:
    """What differs between the sides' environments, one line each."""
    names = ("python", "torch", "triton", "cupy-cuda13x", "cupy-cuda12x", "numpy")
    return [f"{name}: {a.get(name) or 'absent'} on A, {b.get(name) or 'absent'} on B" for name in names if a.get(name) != b.get(name)]
