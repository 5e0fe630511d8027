"""`klab bisect` from a series' name to the commit: which kernel it is, how far apart the ends are, and each commit against the good one."""

from __future__ import annotations

import dataclasses
import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from klab.harness.catalog.chips import find_real_chip
from klab.harness.fleet.devices import Device
from klab.harness.plan.trials import default_policy
from klab.harness.store.remote import local_of
from klab.harness.tune.job import new_run_id
from klab.harness.watch.bisect import PATHS, Hunt, Mark, Step
from klab.harness.watch.compare import FAILURES, Bench, Pair, chosen_pairs, laps_policy, pair_up, run_passes
from klab.harness.watch.compare_rule import LOOKS, Answer, Found, Halfway, Question
from klab.harness.watch.compare_run import Request, gentle, locked, measure_words
from klab.harness.watch.comparison import shown
from klab.harness.watch.history import History
from klab.harness.watch.policy import Track, read_policy
from klab.harness.watch.series import Metric, Role
from klab.harness.watch.sides import Given, Kind, Planned, opened, plan
from klab.harness.watch.worktree import Repository
from klab.kernels.contract import Chip, Problem
from klab.kernels.errors import CannotMeasure, UsageError


@dataclass(frozen=True)
class Wanted:
    """A series in words: "CHIP OPERATOR LABEL ROLE METRIC" (Series.name) or "CHIP/PROBLEM_KEY/ROLE/METRIC" (Series.identity)."""

    chip: str
    role: Role
    operator: str = ""
    label: str = ""
    problem_key: str = ""

    @classmethod
    def parse(cls, text: str) -> Wanted:
        """UsageError for a text that names no series, or one of energy."""
        words = text.split("/") if text.count("/") == 3 and " " not in text.strip() else text.split()
        if len(words) < 4 or words[-1] not in set(Metric) or words[-2] not in set(Role):
            raise UsageError(f"--series {text!r}: write CHIP OPERATOR LABEL ROLE METRIC as the night's report does, ROLE chosen or library")
        if words[-1] == Metric.ENERGY:
            raise UsageError(
                "klab bisect measures times; bisect the same series' time, or compare stored energies: klab compare --metric energy"
            )
        if "/" in text and len(words) == 4:
            return cls(words[0], Role(words[2]), problem_key=words[1])
        return cls(words[0], Role(words[-2]), words[1], " ".join(words[2:-2]))

    def names(self, problem: Problem) -> bool:
        """Is it this problem? A night leaves the operator out of a label, and adds a part of the key where two share one."""
        if self.problem_key:
            return problem.key == self.problem_key
        if problem.operator != self.operator:
            return False
        label = problem.label()
        short = label.removeprefix(problem.operator).removeprefix(problem.operator.replace("_", " ")).strip()
        return self.label in {text for one in (label, short or label) for text in (one, f"{one} {problem.key[:6]}")}


@dataclass(frozen=True)
class Search:
    """What was asked for. `request`: the scenario where no policy gives it, the kernel if one was named, the margin and the limits."""

    series: str
    good: str
    bad: str
    request: Request
    policy: Path | None = None
    history: str | None = None
    first_parent: bool = False
    all_commits: bool = False


@dataclass(frozen=True)
class Outcome:
    """`commits`: the one that was found, or several where some could not be tried; empty where good and bad do not differ here (`why`)."""

    commits: Sequence[str]
    why: str
    log: str
    ends: Found
    steps: Sequence[Step]
    ended: str = ""

    @property
    def exit_code(self) -> int:
        """0 found, 3 narrowed down to several, 4 good and bad do not differ here, 130 interrupted."""
        if self.ended == "interrupted":
            return 130
        return 4 if not self.commits else 0 if len(self.commits) == 1 else 3


def bisect(search: Search, said: Callable[[str], None] = lambda text: None) -> Outcome:
    """Find it. UsageError for what makes no sense, CannotMeasure where the good commit itself does not run."""
    wanted = Wanted.parse(search.series)
    repository = search.request.repository()
    good, bad = repository.commit(search.good), repository.commit(search.bad)
    hunt = Hunt(repository, good, bad, () if search.all_commits else PATHS, search.first_parent)
    chip = find_real_chip(wanted.chip)
    with ExitStack() as stack:
        stop = stack.enter_context(gentle())
        said(f"good: {repository.title(good)}")
        said(f"bad:  {repository.title(bad)}")
        request = dataclasses.replace(search.request, chip=wanted.chip)
        (side,) = stack.enter_context(opened({"A": Given(Kind.COMMIT, good, search.good)}, request.repository))
        trials = _Trials(search, wanted, chip, repository)
        a = trials.plan_good(side)
        device = stack.enter_context(locked(chip, request.device))
        lab = _Lab(request, chip, device, stop)
        with trials.against(a, bad) as (b, pair):
            ends = lab.measure(a, b, pair, Question(request.margin))
        if ends.answer not in (Answer.SLOWER, Answer.FASTER, Answer.BROKEN):
            why = f"good and bad do not differ here: {ends.answer.value}{f' ({ends.reason})' if ends.reason else ''} {shown(ends)}"
            return Outcome((), why.strip(), hunt.log(reasons=[why]), ends, (), lab.over)
        said(f"bad is {ends.answer.value}: {shown(ends) or ends.reason}; {len(hunt.suspects) + 1} commits, about {hunt.steps_left} to try")
        broken, questions = ends.answer is Answer.BROKEN, hunt.steps_left + 1

        def try_commit(commit: str) -> Step:
            if lab.over:
                raise _Ended(lab.over)
            question = Question(request.margin) if broken else Halfway(request.margin, threshold=math.log(ends.ratio or 1.0) / 2)
            with trials.against(a, commit) as (b, pair):
                found = lab.measure(a, b, pair, question, questions=questions, most=passes_to_trust(ends.replicates) if broken else 0)
                failed = pair.failures.get("B")
            if broken and failed:
                # The good one never failed: once is enough here.
                found = Found(Answer.BROKEN, replicates=found.replicates, reason=f"{failed[-1].status.value}: {failed[-1].reason}")
            if found.answer is Answer.CANNOT_TELL and lab.over:
                raise _Ended(lab.over)
            return _step(commit, found, ends)

        def tell(step: Step) -> None:
            said(f"{step.mark.value}: {repository.title(step.commit)}: {step.why}; about {hunt.steps_left} to try")

        ended = ""
        try:
            hunt.run(try_commit, tell)
        except _Ended as reason:
            ended = str(reason)
    commits = hunt.answer()
    about = f"bad is {ends.answer.value}: {shown(ends) or ends.reason}{f'; {ended}' if ended else ''}"
    return Outcome(commits, about, hunt.log(() if ended else commits, [about]), ends, hunt.steps, ended)


def passes_to_trust(worked: int) -> int:
    """After how many passes without a failure a commit works, where the bad one failed FAILURES times and worked `worked` times: as many as
    leave a commit that fails as often a chance of 5%.
    """
    return FAILURES if worked == 0 else math.ceil(math.log(0.05) / math.log(worked / (worked + FAILURES)))


class _Ended(Exception):
    """There is no more time, or the user wants no more; the text says which."""


def _step(commit: str, found: Found, ends: Found) -> Step:
    """What is said of a commit from how it compared with the good one."""
    said = f"{shown(found)} of the good one's time, {found.replicates} pairs of processes" if found.ratio is not None else found.reason
    if ends.answer is Answer.BROKEN:
        return Step(commit, Mark.BAD, found.reason, found) if found.answer is Answer.BROKEN else Step(commit, Mark.GOOD, "it works", found)
    if found.answer is ends.answer:
        return Step(commit, Mark.BAD, said, found)
    if found.answer is Answer.SAME:
        return Step(commit, Mark.GOOD, said, found)
    return Step(
        commit, Mark.SKIP, f"{found.answer.value}: {found.reason or said}" + (f"; {said}" if found.ratio is not None else ""), found
    )


@dataclass
class _Lab:
    """Where commits are measured."""

    request: Request
    chip: Chip
    device: Device
    stop: threading.Event

    @property
    def over(self) -> str:
        """Why no more is to be measured; "" while it is."""
        late = self.request.deadline is not None and time.monotonic() >= self.request.deadline
        return "interrupted" if self.stop.is_set() else "the time was up" if late else ""

    def measure(self, a: Planned, b: Planned, pair: Pair, question: Question, *, questions: int = 1, most: int = 0) -> Found:
        """One comparison of two planned sides. CannotMeasure where it is not b alone that fails."""
        bench = Bench(self.device, self.chip, [a, b], new_run_id(), deadline=self.request.deadline, stop=self.stop)
        pair.question = question
        # Whether it works at all is seen after all passes: that it is as fast is no reason to end before.
        run_passes(bench, [pair], most=most or self.request.processes, looks=() if most else LOOKS, questions=questions)
        found = pair.question.found or Found(Answer.CANNOT_TELL, reason="nothing was measured")
        if found.answer is Answer.NOT_COMPARED:
            raise CannotMeasure(
                found.reason.replace("fails on A", "the good commit fails").replace("fails on both sides", "good and this one fail")
            )
        return found


@dataclass
class _Trials:
    """How the series is found on each side: with which options its klab is asked, and which of its trials is the one."""

    search: Search
    wanted: Wanted
    chip: Chip
    repository: Repository
    words: Sequence[str] = ()
    model: str = ""
    kernel: str = ""

    def plan_good(self, side: object) -> Planned:
        """The good side's plan that has the problem; finds out which kernel is meant. UsageError where no plan has it."""
        tried: list[str] = []
        for model, words in self._scenarios():
            planned = self._planned(side, words)
            if planned.trials:
                self.model, self.words = model, words
                self.kernel = self._kernel(planned)
                return planned
            tried.append(model)
        raise UsageError(f"--series {self.search.series!r}: no problem of {', '.join(tried)} at the good commit is called that")

    def _scenarios(self) -> Iterator[tuple[str, Sequence[str]]]:
        request = self.search.request
        if request.model is not None:
            yield request.model, measure_words(request, request.kernel_dirs)
            return
        path = self.search.policy or self.repository.root / "ci" / "policy.toml"
        if not path.exists():
            raise UsageError("name the model of the series with --model, or the night's policy with --policy")
        for track in read_policy(path).tracks_of(self.wanted.chip):
            yield track.model, track_words(track)

    def _planned(self, side: object, words: Sequence[str]) -> Planned:
        planned = plan(side, self.wanted.chip, words, laps_policy(default_policy(self.chip)))  # type: ignore[arg-type]
        planned.trials = [t for t in planned.trials if self.wanted.names(t.problem)]
        return planned

    def _kernel(self, planned: Planned) -> str:
        """The kernel that is meant; "" where it is what each side's profile chose."""
        asked = self.search.request.kernels
        there = list(dict.fromkeys(t.kernel for t in planned.trials))
        if asked:
            found = [kernel for kernel in there if asked[0] in (kernel, kernel.split("/")[-1])]
            if len(found) != 1:
                raise UsageError(f"--kernel {asked[0]}: the good commit has {', '.join(there)} for it")
            return found[0]
        if self.wanted.role is Role.CHOSEN and self._has_profile(planned):
            return ""
        if self.search.history is not None and (known := self._of_history()):
            if known not in there:
                raise UsageError(f"the history says {known}, and the good commit has {', '.join(there)}: name one with --kernel")
            return known
        if len(there) == 1:
            return there[0]
        raise UsageError(f"which kernel is {self.search.series!r}? The night's report names it; --kernel takes one of {', '.join(there)}")

    def _has_profile(self, planned: Planned) -> bool:
        try:
            pairs, _ = chosen_pairs(planned, planned, self.wanted.chip, self.model)
        except UsageError:
            return False
        return bool(pairs)

    def _of_history(self) -> str:
        """The kernel of the series' last point in the history."""
        for night in reversed(History(local_of(self.search.history or "")).nights(self.wanted.chip)):
            for verdict in night.verdicts:
                if (
                    self.search.series in (verdict.series.name, verdict.series.identity)
                    and verdict.point is not None
                    and verdict.point.kernel
                ):
                    return verdict.point.kernel
        return ""

    @contextmanager
    def against(self, a: Planned, commit: str) -> Iterator[tuple[Planned, Pair]]:
        """The commit's side with the same problem, and the pair; CannotMeasure or UsageError where it cannot be tried."""
        with opened({"B": Given(Kind.COMMIT, commit, commit[:10])}, self.search.request.repository) as (side,):
            b = self._planned(side, self.words)
            pairs, alone = pair_up(a, b) if self.kernel else chosen_pairs(a, b, self.wanted.chip, self.model)
            found = [pair for pair in pairs if not self.kernel or pair.trials[0].kernel == self.kernel]
            if not found:
                raise CannotMeasure(
                    next((f"{name}: {why}" for name, why in alone), f"it does not have {self.kernel or 'a choice'} for the problem")
                )
            if found[0].question.found is not None:
                raise CannotMeasure(found[0].question.found.reason)
            yield b, found[0]


def track_words(track: Track) -> list[str]:
    """The options of `klab measure` that plan what a track of the policy plans."""
    words = ["--model", track.model]
    for name, value in track.scenario.items():
        if name == "batches":
            words += ["--batch", ",".join(str(one) for one in value)]  # type: ignore[attr-defined]
        elif name in ("isl", "osl", "tp", "dtype"):
            words += [f"--{name}", str(value)]
        else:
            words += ["--with", f"{name}={value}"]
    return words + (["--phase", track.phase] if track.phase else [])
