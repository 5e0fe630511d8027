"""Who measures what next: groups of trials that wait for a device of their chip, and how often each was lost with one."""

from __future__ import annotations

import threading
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Sequence

from klab.harness.measure.entry import contest_key
from klab.harness.plan.trial import Trial

# A trial that was lost with its device so often is given up. The second loss takes its group apart, so that the third is its own.
MOST_LOSSES = 3
APART_AFTER = 2
POLL_S = 0.2


def contests(trials: Iterable[Trial]) -> list[list[Trial]]:
    """Trials grouped by problem and policy, in the order of each group's first trial: what is most valuable stays first."""
    groups: dict[str, list[Trial]] = {}
    for trial in trials:
        groups.setdefault(contest_key(trial), []).append(trial)
    return list(groups.values())


class Board:
    """The groups of one run by chip. From any thread."""

    def __init__(self, trials: Iterable[Trial]) -> None:
        self._waiting: dict[str, deque[list[Trial]]] = defaultdict(deque)
        self._in_hand: Counter[str] = Counter()
        self._losses: Counter[str] = Counter()
        self._reasons: dict[str, list[str]] = defaultdict(list)
        self._changed = threading.Condition()
        for group in contests(trials):
            self._waiting[group[0].chip].append(group)

    def waiting(self, chip: str = "") -> int:
        """Groups that nobody has taken; of one chip, or of all."""
        with self._changed:
            return sum(len(groups) for name, groups in self._waiting.items() if chip in ("", name))

    @property
    def chips(self) -> list[str]:
        """Those that a group waits for."""
        with self._changed:
            return [name for name, groups in self._waiting.items() if groups]

    def take(self, chip: str, over: Callable[[], bool] = lambda: False) -> list[Trial] | None:
        """The next group of a chip. While another device holds one of them it may come back, and is waited for; None when nothing will
        come any more, or when it is `over`."""
        with self._changed:
            while not over():
                if self._waiting[chip]:
                    self._in_hand[chip] += 1
                    return self._waiting[chip].popleft()
                if not self._in_hand[chip]:
                    break
                self._changed.wait(POLL_S)
        return None

    def done(self, chip: str) -> None:
        """A group came to its end."""
        with self._changed:
            self._in_hand[chip] -= 1
            self._changed.notify_all()

    def back(self, group: Sequence[Trial], why: str, *, blame: bool = True) -> list[tuple[Trial, str]]:
        """Take back what has no Result because its device was lost: first in line again, with other company after the second time.

        Those that were lost MOST_LOSSES times come out, each with what happened. Without `blame` the loss is nobody's.
        """
        if not group:
            return []
        chip, given_up, again = group[0].chip, [], []
        with self._changed:
            for trial in group:
                if blame:
                    self._losses[trial.key] += 1
                    self._reasons[trial.key].append(why)
                if self._losses[trial.key] >= MOST_LOSSES:
                    told = "; ".join(dict.fromkeys(self._reasons[trial.key]))
                    given_up.append((trial, f"lost with its device {self._losses[trial.key]} times: {told}"))
                else:
                    again.append(trial)
            apart = blame and any(self._losses[trial.key] >= APART_AFTER for trial in again)
            parts = [[trial] for trial in again] if apart else [again] if again else []
            self._waiting[chip].extendleft(reversed(parts))
            self._in_hand[chip] -= 1
            self._changed.notify_all()
        return given_up
