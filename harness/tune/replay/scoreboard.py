"""The scoreboard: all strategies on all given spaces, many repeats, nothing run twice."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from klab.harness.tune import strategy
from klab.harness.tune.replay.contestants import KLAB, Contestant, others, own
from klab.harness.tune.replay.recorded import RecordedSpace
from klab.harness.tune.replay.run_store import RunStore
from klab.harness.tune.replay.score import Baseline, baseline
from klab.harness.tune.replay.simulate import MARKS, Run, candidate_s, require_valid
from klab.harness.tune.replay.standings import Group, Standing, standings
from klab.kernels.errors import UsageError

REPEATS = 50
EVALUATIONS = 400
# Repeats of one strategy on one space that are run before its turn is over: an interrupted scoreboard has some of everything.
_TURN = 10


@dataclass(frozen=True)
class Turn:
    """Some seeds of one contestant on one space."""

    space: int
    contestant: Contestant
    seeds: tuple[int, ...]


@dataclass
class Scoreboard:
    """Spaces, contestants and their runs so far. absent: strategies that cannot run here, and why."""

    spaces: Sequence[RecordedSpace]
    contestants: Sequence[Contestant]
    store: RunStore
    repeats: int = REPEATS
    absent: dict[str, str] = field(default_factory=dict)

    @cached_property
    def yardsticks(self) -> list[Baseline]:
        """Random search on each space."""
        return [baseline(space, most_evaluations=self.store.evaluations) for space in self.spaces]

    @property
    def marks(self) -> tuple[int, ...]:
        """The marks within the budget; the budget itself where it is below the first."""
        return tuple(m for m in MARKS if m <= self.store.evaluations) or (self.store.evaluations,)

    def missing(self) -> list[Turn]:
        """What is still to run, in order: every strategy's first seeds before any strategy's next."""
        turns = []
        done = {(s, c.name): self.store.runs(space, c) for s, space in enumerate(self.spaces) for c in self.contestants}
        for start in range(0, self.repeats, _TURN):
            wanted = range(start, min(start + _TURN, self.repeats))
            for s in range(len(self.spaces)):
                for contestant in self.contestants:
                    seeds = tuple(seed for seed in wanted if seed not in done[s, contestant.name])
                    if seeds:
                        turns.append(Turn(s, contestant, seeds))
        return turns

    def fill(self, *, jobs: int = 1, on_run: Callable[[], None] = lambda: None) -> None:
        """Run what is missing. A run (with several jobs: a turn of one) is on disk before its process begins the next."""
        turns = self.missing()
        for turn, run in _inline(self.spaces, turns, self.store.evaluations) if jobs == 1 else self._pooled(turns, jobs):
            self.store.append(self.spaces[turn.space], turn.contestant, run)
            on_run()

    def _pooled(self, turns: Sequence[Turn], jobs: int) -> Iterator[tuple[Turn, Run]]:
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(jobs, context, initializer=_receive, initargs=(list(self.spaces), self.store.evaluations)) as pool:
            try:
                pending = {pool.submit(_take, turn): turn for turn in turns}
                for future in as_completed(pending):
                    yield from ((pending[future], run) for run in future.result())
            finally:
                pool.shutdown(wait=True, cancel_futures=True)

    def standings(self) -> list[Standing]:
        """Those of which every space has a run, the best at the middle mark first. The first `repeats` seeds count."""
        groups: dict[tuple[str, str], list[Group]] = {}
        for contestant in self.contestants:
            found = []
            for space, yardstick in zip(self.spaces, self.yardsticks, strict=True):
                runs = [run for seed, run in sorted(self.store.runs(space, contestant).items()) if seed < self.repeats]
                limit_s = self.store.evaluations * float(candidate_s(space).mean())
                found.append(Group(runs, yardstick, limit_s, space.name))
            if all(g.runs for g in found):
                groups[contestant.name, contestant.origin] = found
        return standings(groups, self.marks)


def scoreboard(
    spaces: Sequence[RecordedSpace],
    folder: Path,
    *,
    names: Sequence[str] = (),
    repeats: int = REPEATS,
    evaluations: int = EVALUATIONS,
    with_peers: bool = True,
) -> Scoreboard:
    """A scoreboard of klab's strategies (`names`, or all) and the peers. Without the peers' packages, `absent` says how to get them."""
    if not spaces:
        raise UsageError("a scoreboard needs at least one recorded space")
    if repeats < 2:
        raise UsageError(f"{repeats} repeat gives no interval; ask for 2 or more")
    if evaluations < 1:
        raise UsageError(f"a budget of {evaluations} evaluations is too small for one")
    for space in spaces:
        require_valid(space)
    contestants, absent = own(names)
    if with_peers:
        try:
            more, cannot = others()
            contestants, absent = contestants + more, absent | cannot
        except UsageError as error:
            absent["peers"] = str(error)
    return Scoreboard(spaces, contestants, RunStore(folder, evaluations), repeats, absent)


def default_of(found: Iterable[Standing]) -> Standing | None:
    """The standing of klab's default strategy, if it took part."""
    return next((s for s in found if s.origin == KLAB and s.name == strategy.DEFAULT), None)


def _inline(spaces: Sequence[RecordedSpace], turns: Iterable[Turn], evaluations: int) -> Iterator[tuple[Turn, Run]]:
    for turn in turns:
        for seed in turn.seeds:
            yield turn, turn.contestant.run(spaces[turn.space], seed=seed, evaluations=evaluations)


_received: tuple[list[RecordedSpace], int] = ([], 0)


def _receive(spaces: list[RecordedSpace], evaluations: int) -> None:
    global _received
    _received = (spaces, evaluations)


def _take(turn: Turn) -> list[Run]:
    spaces, evaluations = _received
    return [run for _, run in _inline(spaces, [turn], evaluations)]
