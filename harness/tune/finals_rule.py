"""When a final may stop, who drops out on the way, and who has won. Pure: evidence in, verdict out.

The claim that matters is "this one is faster than the default". Over a whole final with K challengers it is made wrongly, where all are
equally fast, with a probability of 5% at most: each challenger has an error of 5% / K to spend, part of it at every look, the rest at the
last (alpha spending, with Bonferroni's sum over looks and challengers).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from klab.harness.tune.finals_evidence import LEAST_BLOCKS, Block, Compared, Evidence

# Blocks after which the evidence is looked at, each about 1.4 times the last: looking more often costs certainty.
LOOKS = (5, 7, 10, 14, 20, 28, 40)
TARGET = 0.005
ALPHA = 0.05
EMPTY_BLOCKS = 5
# A difference below 0.1% is nothing to claim, however sure it is.
CLEAR = 0.001


@dataclass(frozen=True)
class Standing:
    """Where a contender ended. `state`: "winner", "tie", "slower", "out" (it failed: `reason`) or "not compared" (no common laps).

    `to_leader` and `to_default` are its time over theirs, None for themselves or where there are no common laps.
    """

    name: str
    state: str
    rounds: int
    to_leader: Compared | None = None
    to_default: Compared | None = None
    reason: str = ""


@dataclass(frozen=True)
class Verdict:
    """`winner` is None where nobody came through. `ties` are all that cannot be told from the leader, the winner first where it is one.

    `why`: "faster" (than the default, by its evidence), "tie" (the default, as nothing is clearly faster), "not in cycles" (something is
    faster by time, but not in cycles, so the default), "no default" (it failed: the best of the others) or "nobody".
    `cycles`: "confirmed", "no clock" or "not needed".
    """

    winner: str | None
    leader: str | None
    ties: tuple[str, ...]
    why: str
    cycles: str
    standings: tuple[Standing, ...]


@dataclass
class Race:
    """Contenders by name, in the order of the search's ranking; `default` is one of them, or None.

    `settle` picks from a tie that the default is not in; without it the first in the order given. Give it every block that was run and
    every failure; ask it at each step for how many blocks to run next, and of whom.
    """

    contenders: Sequence[str]
    default: str | None
    target: float = TARGET
    settle: Callable[[Sequence[str]], str] | None = None
    looks: Sequence[int] = LOOKS
    evidence: Evidence = field(default_factory=Evidence)
    failed: dict[str, str] = field(default_factory=dict)
    dropped: dict[str, str] = field(default_factory=dict)
    done: bool = False
    _looked: int = 0
    _blocks: int = 0
    _empty: int = 0

    @property
    def running(self) -> list[str]:
        """Who is in the next block: neither failed nor clearly slower than another that has not failed.

        The default runs until every other that runs has been shown to be faster than it: whoever wins then has beaten it.
        """
        return [name for name in self.contenders if name not in self.failed and not self._out_paced(name)]

    def _out_paced(self, name: str) -> bool:
        return name in self.dropped and self.dropped[name] not in self.failed

    @property
    def open_blocks(self) -> int:
        """Blocks to run before the next look; 0 when the final is over."""
        if self.done or len(self.running) < 2 or self._looked == len(self.looks):
            return 0
        return max(1, self.looks[self._looked] - self._blocks)

    def add(self, *parts: Block) -> None:
        """One block, in as many parts as there were groups that shared laps; looks at the evidence when it is time.

        Blocks in a row that gave nothing (the hardware throttles all of them) end the final as well.
        """
        for part in parts:
            self.evidence.add(part)
        self._blocks += 1
        self._empty = 0 if parts else self._empty + 1
        self.done = self.done or self.gave_out
        if self._looked < len(self.looks) and self._blocks >= self.looks[self._looked]:
            self._look()

    @property
    def gave_out(self) -> bool:
        """The last EMPTY_BLOCKS blocks gave nothing."""
        return self._empty >= EMPTY_BLOCKS

    @property
    def blocks(self) -> int:
        """How many have been run."""
        return self._blocks

    def fail(self, name: str, reason: str) -> None:
        """A contender crashed or was wrong: it is out, and nobody stays dropped on its account."""
        self.failed.setdefault(name, reason)

    def _look(self) -> None:
        alpha = self.share * 0.5 ** (self._looked + 2)
        self._looked += 1
        leader = self._leader()
        if leader is None:
            return
        open_questions = False
        for name in self.running:
            if name == leader:
                continue
            found = self.evidence.compare(name, leader, alpha)
            if found is not None and slower(found):
                if name != self.default:
                    self.dropped[name] = leader
            elif found is not None and found.width > self.target:
                open_questions = True
        others = [name for name in self.running if name != self.default]
        if self.default in self.running and others and all(self._beaten(self.default, name, alpha) for name in others):
            self.dropped[self.default] = leader
        self.done = self.done or not open_questions

    @property
    def share(self) -> float:
        """The error that all claims for one challenger together may have."""
        return ALPHA / max(1, len(self.contenders) - 1)

    @property
    def last_alpha(self) -> float:
        """What the looks before the present evidence have left: a quarter of the share went at the first, then half as much at each."""
        earlier = sum(blocks < self._blocks for blocks in self.looks[: self._looked])
        return self.share * (0.5 + 0.5 ** (earlier + 1))

    def _leader(self) -> str | None:
        """The lowest mean of the ratios to the default (or, where that failed, to whoever is first), over the blocks that have both."""
        alive = self.running
        anchor = self.default if self.default in alive else next((n for n in alive if self.evidence.rounds(n)), None)
        if anchor is None:
            return None
        scores = {name: _mean(self.evidence.logs(name, anchor)) for name in alive}
        return min((n for n in alive if scores[n] is not None), key=lambda n: scores[n] or 0.0, default=None)

    def verdict(self) -> Verdict:
        """Who has won, with all the evidence there is."""
        if self._blocks == 0 or (leader := self._leader()) is None:
            return Verdict(None, None, (), "nobody", "not needed", tuple(self._standing(n, "", None, (), 0.0) for n in self.contenders))
        alpha = self.last_alpha
        alive = self.running
        default = self.default if self.default not in self.failed and self.default and self.evidence.rounds(self.default) else None
        tied = [n for n in alive if n == leader or not self._beaten(n, leader, alpha)]
        tied = [n for n in tied if self.evidence.compare(n, leader, alpha) is not None]
        why, winner = self._decide(leader, tied, default, alpha)
        proof = self.evidence.compare(winner, default, alpha) if default and winner != default else None
        cycles = "not needed" if why != "faster" else "confirmed" if proof and proof.cycles is not None else "no clock"
        ties = tuple(sorted(tied, key=lambda n: n != winner))
        standings = tuple(self._standing(n, winner, leader, ties, alpha) for n in self.contenders)
        return Verdict(winner, leader, ties, why, cycles, standings)

    def _decide(self, leader: str, tied: list[str], default: str | None, alpha: float) -> tuple[str, str]:
        if default is None:
            # Too few blocks leave everybody in a tie, however slow: then the lowest, and not the simplest.
            told = len(self.evidence.logs(leader, leader)) >= LEAST_BLOCKS
            return "no default", self.pick(tied) if told else leader
        if default == leader:
            return "tie", default
        if default in tied:
            found = self.evidence.compare(leader, default, alpha)
            return "not in cycles" if found is not None and faster_by_time(found) else "tie", default
        # The simpler member of the tie may win, but only if it is itself shown to be faster than the default.
        proven = [n for n in tied if n == leader or self._beaten(default, n, alpha)]
        return "faster", self.pick(proven)

    def _beaten(self, name: str, by: str, alpha: float) -> bool:
        """Is `by` faster than `name`, in cycles too where there is a clock?"""
        found = self.evidence.compare(by, name, alpha)
        return found is not None and faster(found)

    def pick(self, tied: Sequence[str]) -> str:
        """One of several that cannot be told apart."""
        return self.settle(tied) if self.settle and len(tied) > 1 else min(tied, key=list(self.contenders).index)

    def _standing(self, name: str, winner: str, leader: str | None, ties: Sequence[str], alpha: float) -> Standing:
        rounds = self.evidence.rounds(name)
        to_leader = self.evidence.compare(name, leader, alpha) if leader and name != leader else None
        to_default = self.evidence.compare(name, self.default, alpha) if self.default and name != self.default and alpha else None
        if name in self.failed:
            return Standing(name, "out", rounds, to_leader, to_default, self.failed[name])
        if leader is None or (to_leader is None and name != leader):
            return Standing(name, "not compared", rounds, None, to_default)
        state = "winner" if name == winner else "tie" if name in ties else "slower"
        return Standing(name, state, rounds, to_leader, to_default)


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def faster_by_time(found: Compared) -> bool:
    """The whole interval lies below 1, by more than what is worth claiming."""
    return found.high < 1.0 - CLEAR


def faster(found: Compared) -> bool:
    """By time, and with the same sign in cycles where there is a clock."""
    return faster_by_time(found) and (found.cycles is None or found.cycles < 1.0)


def slower(found: Compared) -> bool:
    """The other way round."""
    above = math.isfinite(found.high) and found.low > 1.0 / (1.0 - CLEAR)
    return above and (found.cycles is None or found.cycles > 1.0)
