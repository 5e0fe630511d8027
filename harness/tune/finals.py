"""The final: the search's best, the default and the libraries measured against each other with fresh data until it is clear who wins."""

from __future__ import annotations

import random
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack

from klab.harness.fleet.estimate import trial_estimate_s
from klab.harness.fleet.local import Fleet
from klab.harness.fleet.open import AnyFleet
from klab.harness.measure.contest import GROUP_SLOTS
from klab.harness.measure.entry import contest_key
from klab.harness.measure.stats import FLOOR_ROUNDS
from klab.harness.plan.trial import Policy, Trial
from klab.harness.store.result import Result, Status
from klab.harness.tune.finals_energy import LEAST_WINDOWS, TIMES_SHARE, WINDOWS, by_value, near_leader, window_trials
from klab.harness.tune.finals_evidence import LEAST_BLOCKS, Block, Rounds
from klab.harness.tune.finals_rule import EMPTY_BLOCKS, TARGET, Race
from klab.harness.tune.finals_told import Final, told_by_time, told_by_value, untold
from klab.harness.tune.job import Job
from klab.harness.tune.objective import LATENCY, Objective, counting_rounds, energy
from klab.kernels.contract import Kernel, canonical_json, digest
from klab.kernels.errors import UsageError

# Laps of one block: enough for a median that outliers do not move, few enough that five blocks take seconds.
ROUNDS = 16
# Libraries in the field: the one that torch takes, and one more.
LIBRARIES = 2
# A block is begun only if as much time is left as the longest took so far; less would end in the midst of it.
LEAST_SHARE = 0.9


def finals(
    job: Job,
    contenders: Sequence[Trial],
    *,
    default: Trial,
    libraries: Sequence[Trial],
    kernels: Mapping[str, Kernel],
    objective: Objective = LATENCY,
    deadline: float | None = None,
    target: float = TARGET,
    fleet: AnyFleet | None = None,
    known: Iterable[Result] = (),
) -> Final:
    """Decide between trials of one problem on the job's chip. Every row goes to the job's store as it comes.

    contenders: the search's best, best first; so many as fit beside the default and the libraries in one group of GROUP_SLOTS take part.
    All run in blocks of ROUNDS laps with data of their own until each is clearly slower than the leader or the 95% interval of its ratio
    to it is narrower than `target`, or until `deadline` (a second of time.monotonic(); the job's own holds too). By another objective
    than latency the energy of those near the leader is measured then, in WINDOWS windows apart; with fewer than LEAST_WINDOWS the default
    stands.

    fleet: workers that are there already (its devices stay locked); without it one is made for this final. known: earlier rows, from
    which a tie is settled by energy. UsageError when the trials are not of one problem. KeyboardInterrupt passes through; what was
    measured until then is stored.
    """
    field = _field(contenders, default, libraries[:LIBRARIES])
    names = {_name(trial): trial for trial in field}
    ends = [at for at in (deadline, job.deadline) if at is not None]
    until = min(ends) if ends else None
    settle = _settle(names, kernels, job, known)
    race = Race(list(names), _name(default), target, settle)
    told: list[Result] = []
    left_out = [trial for trial in _unique(contenders) if _name(trial) not in names]
    with ExitStack() as stack:
        used: AnyFleet = fleet or stack.enter_context(Fleet(job.chip, job.run_id, kernel_dirs=job.kernel_dirs))
        for rows in _blocks(job, used, race, names, _times_end(until) if objective.needs_energy else until):
            told += rows
        verdict = race.verdict()
        if verdict.winner is None and not race.failed:
            return untold(field, contenders[0] if contenders else default, told, left_out)
        if not objective.needs_energy or verdict.winner is None:
            return told_by_time(verdict, names, _name(default), told, left_out, _unsure(race))
        near, windows, short = _windows(job, used, race, names, _name(default), until, told)
    choice = by_value(race, objective, _name(default), windows, len(near) - 1)
    reasons = [row.energy_reason for row in told if row.status is Status.OK and row.policy.get("energy") and row.energy_j is None]
    return told_by_value(choice, race.verdict(), names, _name(default), objective, told, left_out, reasons, short)


def _windows(
    job: Job, fleet: AnyFleet, race: Race, names: Mapping[str, Trial], default: str, until: float | None, told: list[Result]
) -> tuple[list[str], list[dict[str, Result]], str]:
    """(whose energy was measured, per window the rows that have one, why there are fewer windows than wanted or "").

    As many contenders as there is time for; the first window says how long one takes.
    """
    verdict, seed, began = race.verdict(), _seed(job, names[default], 0), time.monotonic()
    near = near_leader(verdict, default)
    if until is not None:
        each_s = trial_estimate_s(window_trials(near[:1], names, seed, 0, ROUNDS)[0], job.chip) if near else 0.0
        near = near_leader(verdict, default, min(max(2, int((until - began) / (each_s * LEAST_WINDOWS + 1e-9))), GROUP_SLOTS))
    windows: list[dict[str, Result]] = []
    for number in range(WINDOWS):
        before = time.monotonic()
        running = [name for name in near if name not in race.failed]
        rows = _measure(job, fleet, window_trials(running, names, seed, number, ROUNDS), until)
        told += rows
        if not rows:
            return near, windows, "the time was up"
        for row in rows:
            if row.status not in (Status.OK, Status.THROTTLED):
                race.fail(_name_of(row), f"{row.status.value}: {row.reason}")
        windows.append({_name_of(row): row for row in rows if row.status is Status.OK and row.energy_j is not None})
        if number == 0 and not windows[-1] and all(row.status is Status.OK for row in rows):
            return near, windows, ""  # where nobody's energy can be measured, no other window will show it
        if number + 1 < WINDOWS and _over(job, until, LEAST_SHARE * (time.monotonic() - before)):
            return near, windows, "the time was up"
    return near, windows, ""


def _unsure(race: Race) -> str:
    """Why the intervals are wider than was wanted, or "" where they are not."""
    if race.gave_out:
        return f"the last {EMPTY_BLOCKS} blocks gave nothing"
    if race.blocks < LEAST_BLOCKS:
        return f"tie, not confirmed: {race.blocks} block{'s' if race.blocks > 1 else ''} in the time, {LEAST_BLOCKS} are the least"
    if race.open_blocks:
        return "the time was up before the intervals were narrow"
    return "" if race.done or len(race.running) < 2 else f"the intervals are still wide after {race.looks[-1]} blocks"


def _times_end(until: float | None) -> float | None:
    """Where energy is to be measured as well, the blocks have a part of the time."""
    now = time.monotonic()
    return until if until is None or until <= now else now + TIMES_SHARE * (until - now)


def _name(trial: Trial) -> str:
    """Who it is, whatever it is measured under."""
    return f"{trial.kernel} {canonical_json(trial.config.to_json_full())}"


def _name_of(row: Result) -> str:
    return f"{row.kernel} {canonical_json(row.config)}"


def _unique(trials: Iterable[Trial]) -> list[Trial]:
    return list({_name(trial): trial for trial in trials}.values())


def _field(contenders: Sequence[Trial], default: Trial, libraries: Sequence[Trial]) -> list[Trial]:
    """Who takes part: the default, the libraries, and of the contenders as many as share a lap with them. In the search's order."""
    everybody = [default, *libraries, *contenders]
    policies = {contest_key(trial.with_policy(seed=0)) for trial in everybody}
    if len(policies) > 1:
        raise UsageError("a final is between trials of one problem, on one chip, under one policy")
    chosen = {_name(trial) for trial in _unique(everybody)[:GROUP_SLOTS]}
    return [trial for trial in _unique([*contenders, default, *libraries]) if _name(trial) in chosen]


def _settle(names: Mapping[str, Trial], kernels: Mapping[str, Kernel], job: Job, known: Iterable[Result]) -> Callable[[Sequence[str]], str]:
    """A tie without the default goes to whoever is not known to take more energy, then to a library, then to the simpler: the fewest
    fields that differ from the kernel's own default; then to the search's order.
    """
    first = next(iter(names.values()))
    own = [row for row in known if (row.problem_key, row.chip, row.status) == (first.problem.key, first.chip, Status.OK)]
    as_it_is = [row for row in own if not Policy.from_json(row.policy).setting]
    metered = {_name_of(row): joules for row in as_it_is if (joules := energy(row)) is not None}

    def complexity(name: str) -> tuple[bool, int, int]:
        trial = names[name]
        kernel, config = kernels[trial.kernel], trial.config.to_json_full()
        usual = kernel.default(trial.problem, job.chip).to_json_full()
        different = sum(canonical_json(value) != canonical_json(usual.get(field)) for field, value in config.items())
        return not kernel.library, different, list(names).index(name)

    def settle(tied: Sequence[str]) -> str:
        least = min((metered[name].high for name in tied if name in metered), default=0.0)
        return min((name for name in tied if name not in metered or metered[name].low <= least), key=complexity)

    return settle


def _seed(job: Job, default: Trial, number: int) -> int:
    """Another for each block of each final, so that no block is taken for one that was measured before."""
    return 1 + int(digest([job.run_id, default.problem.key, time.time_ns()]), 16) % 2**20 * 64 + number


def _blocks(job: Job, fleet: AnyFleet, race: Race, names: Mapping[str, Trial], until: float | None) -> Iterator[list[Result]]:
    """Run blocks until the race is over or the time; as many at a time as there are devices."""
    first = _seed(job, next(iter(names.values())), 1)
    number, longest_s = 0, 0.0
    while race.open_blocks and not _over(job, until, LEAST_SHARE * longest_s):
        began = time.monotonic()
        todo: list[Trial] = []
        for _ in range(min(race.open_blocks, fleet.size)):
            block = [
                names[name].with_policy(seed=first + number, min_rounds=ROUNDS, max_rounds=ROUNDS, energy=False) for name in race.running
            ]
            # Whom one follows matters (heat, caches): drawn anew each time, so that it is no property of a contender.
            random.Random(first + number).shuffle(block)
            todo += block
            number += 1
        rows = _measure(job, fleet, todo, until)
        _note(rows, race)
        longest_s = max(longest_s, time.monotonic() - began)
        yield rows
        if not rows:
            return


def _measure(job: Job, fleet: AnyFleet, trials: Sequence[Trial], until: float | None) -> list[Result]:
    rows: list[Result] = []

    def store(row: Result) -> None:
        job.journal.append(row)
        job.listener.result(row)
        rows.append(row)

    if trials and not _over(job, until):
        job.listener.phase("final", len(trials))
        fleet.run(trials, store, deadline=until, stop=job.stop)
    return rows


def _over(job: Job, until: float | None, needed_s: float = 0.0) -> bool:
    return job.stop.is_set() or (until is not None and time.monotonic() + needed_s >= until)


def _note(rows: Sequence[Result], race: Race) -> None:
    """Tell the race: what failed, and per block what shared its laps."""
    blocks: dict[object, dict[str, dict[str, Rounds]]] = defaultdict(lambda: defaultdict(dict))
    for row in rows:
        here = blocks[row.policy.get("seed")]  # a block in which nobody came through is one as well, or it would go on for ever
        if row.status is Status.OK:
            if len(counting_rounds(row)) < FLOOR_ROUNDS:
                continue
            contest = row.build.get("contest")
            laps = str(contest.get("id", "")) if isinstance(contest, dict) else ""
            here[laps][_name_of(row)] = Rounds(row.samples_us, row.clocks_mhz, row.marked)
        elif row.status is not Status.THROTTLED:
            race.fail(_name_of(row), f"{row.status.value}: {row.reason}" if row.reason else row.status.value)
    for parts in blocks.values():
        made: list[Block] = list(parts.values())
        race.add(*made)
