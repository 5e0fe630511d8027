"""Find the commit that made a series slower: git's own choice of the next commit, klab's own comparison with the good one."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from klab.harness.watch.compare_rule import Found
from klab.harness.watch.worktree import Repository
from klab.kernels.errors import CannotMeasure, UsageError

# What can change a measurement: the kernels, how they are measured, and what was chosen.
PATHS = ("kernels", "harness", "profiles")


class Mark(StrEnum):
    """What is said of a commit, in git's words. A commit that cannot be told from both ends is skipped, and said to be unclear."""

    GOOD = "good"
    BAD = "bad"
    SKIP = "skip"


@dataclass(frozen=True)
class Step:
    """A commit that was tried, what was said of it and why, in one line."""

    commit: str
    mark: Mark
    why: str
    found: Found | None = None


@dataclass
class Hunt:
    """A search between a good commit and a bad one, which is its descendant. `paths`: only commits that touch these can be the one.

    `start` says how many commits there are; `run` tries one after the other. UsageError where `good` is no ancestor of `bad`.
    """

    repository: Repository
    good: str
    bad: str
    paths: Sequence[str] = PATHS
    first_parent: bool = False
    steps: list[Step] = field(default_factory=list)
    _goods: list[str] = field(default_factory=list)
    _bad: str = ""

    def __post_init__(self) -> None:
        if self.good == self.bad:
            raise UsageError("good and bad are the same commit")
        if not self.repository.succeeds("merge-base", "--is-ancestor", self.good, self.bad):
            raise UsageError(f"{self.good[:10]} is no ancestor of {self.bad[:10]}: bisect from a good commit to a later bad one")
        self._goods = [self.good]
        # What the bad commit has of these paths came in with the last commit that touched them.
        self._bad = self._listed("--max-count=1")[0] if self._listed("--max-count=1") else ""
        if not self._bad:
            raise UsageError(f"no commit from {self.good[:10]} to {self.bad[:10]} touches {', '.join(self.paths)}: try --all-commits")

    def _listed(self, *words: str) -> list[str]:
        parents = ("--first-parent",) if self.first_parent else ()
        where = ("--", *self.paths) if self.paths else ()
        text = self.repository.git("rev-list", *words, *parents, self._bad or self.bad, *(f"^{one}" for one in self._goods), *where)
        return [line.split()[0] for line in text.splitlines()]

    @property
    def suspects(self) -> list[str]:
        """The commits of which one is the first bad one: the one that halves them best first, the bad one itself not among them."""
        return [one for one in self._listed("--bisect-all") if one != self._bad]

    @property
    def steps_left(self) -> int:
        """Tries that are needed if none is skipped."""
        return math.ceil(math.log2(len(self.suspects) + 1))

    def next(self) -> str | None:
        """The commit to try, or None when there is none left."""
        tried = {step.commit for step in self.steps}
        return next((one for one in self.suspects if one not in tried), None)

    def note(self, step: Step) -> None:
        """What was said of a commit."""
        self.steps.append(step)
        if step.mark is Mark.GOOD:
            self._goods.append(step.commit)
        elif step.mark is Mark.BAD:
            self._bad = step.commit

    def run(self, try_commit: Callable[[str], Step], said: Callable[[Step], None] = lambda step: None) -> list[str]:
        """Try commits until one is left, and return it; with skipped ones beside it, all of which any may be it."""
        while (commit := self.next()) is not None:
            try:
                step = try_commit(commit)
            except (CannotMeasure, UsageError) as error:
                step = Step(commit, Mark.SKIP, str(error))
            self.note(step)
            said(step)
        return self.answer()

    def answer(self) -> list[str]:
        """The first bad commit; or, where commits before it were skipped, all that may be it. The bad one first."""
        return [self._bad, *self.suspects]

    def log(self, first: Sequence[str] = (), reasons: Sequence[str] = ()) -> str:
        """The search as `git bisect log` writes it, so that `git bisect replay` takes it; klab's reasons are comments."""
        where = " '--' " + " ".join(f"'{path}'" for path in self.paths) if self.paths else ""
        lines = [f"git bisect start{' --first-parent' if self.first_parent else ''}{where}"]
        for mark, commit, why in (
            (Mark.BAD, self.bad, ""),
            (Mark.GOOD, self.good, "; ".join(reasons)),
            *((step.mark, step.commit, step.why) for step in self.steps),
        ):
            title = self.repository.git("show", "--no-patch", "--format=%s", commit)
            lines.append(f"# {mark.value}: [{commit}] {title}")
            lines += [f"# klab: {' '.join(why.split())}"] if why else []
            lines.append(f"git bisect {mark.value} {commit}")
        for commit in first if len(first) == 1 else ():
            lines.append(f"# first bad commit: [{commit}] {self.repository.git('show', '--no-patch', '--format=%s', commit)}")
        for commit in first if len(first) > 1 else ():
            lines.append(f"# possible first bad commit: [{commit}] {self.repository.git('show', '--no-patch', '--format=%s', commit)}")
        return "\n".join(lines) + "\n"
