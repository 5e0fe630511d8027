"""One problem's search with its journal: what makes it this search and no other, and how it goes on after a kill."""

from __future__ import annotations

import hashlib
import importlib.metadata
import inspect
import os
import re
import zipfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from klab.harness.plan.trial import Trial
from klab.harness.store.result import Result
from klab.harness.tune.live import Lane
from klab.harness.tune.objective import Interval
from klab.harness.tune.pack import SLICE, Prospect
from klab.harness.tune.search import Search
from klab.harness.tune.search_journal import SearchJournal, damage
from klab.harness.tune.space import KERNEL, Space, kernel_points
from klab.harness.tune.strategy import Ask, Evaluation, Prior, find_strategy
from klab.kernels.contract import Chip, Json, Kernel, Problem, digest
from klab.kernels.errors import CannotMeasure, UsageError

# Beside the results, and not of their suffix: the store reads *.jsonl.
FOLDER, SUFFIX, PRIOR_SUFFIX = "tune", ".search", ".prior.npz"
# No more of them are compiled on the chance of being asked for.
MOST_LIKELY = 20_000
# A strategy's choices may depend on these.
PACKAGES = ("numpy", "scikit-learn")


@dataclass
class Course:
    """A problem that is tuned. `search` and `lane` are there once `begin` was called.

    defaults: each tuned kernel's default, in the order of the kernels. libraries: the baselines. All measured in full before the search.
    """

    problem: Problem
    prospect: Prospect
    kernels: Mapping[str, Kernel]
    defaults: list[Trial] = field(default_factory=list)
    libraries: list[Trial] = field(default_factory=list)
    default: Trial | None = None
    default_us: float = float("inf")
    library: Trial | None = None
    lane: Lane | None = None
    search: Search | None = None
    prior: Prior = field(default_factory=Prior)
    journal: Path | None = None
    resumed: int = 0
    trouble: str = ""
    foreseen: set[int] = field(default_factory=set)
    failed: list[str] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)
    """Kernels (by id) whose space could not be listed, and why."""
    _order: list[int] | None = None

    @property
    def label(self) -> str:
        """The problem's name for people."""
        return self.problem.label()

    @property
    def found(self) -> Sequence[Evaluation]:
        """The outcomes so far, in order."""
        return self.search.trace.evaluations if self.search else []

    @property
    def evaluations(self) -> int:
        """Candidates of the space that have an outcome."""
        return self.search.trace.distinct if self.search else 0

    def has(self, candidate: int) -> bool:
        """True when this candidate has an outcome."""
        return self.search is not None and self.search.trace.has(candidate)

    def best_us(self) -> float:
        """The best of the kernels that are tuned, of short runs those that look better than the default; infinite when there is none."""
        return min([self.default_us, *(e.value for e in self._standing())])

    @property
    def contested(self) -> bool:
        """True when the search found something that looks better than the default."""
        return self.best_us() < self.default_us

    def finalists(self, count: int, near: float) -> list[Trial]:
        """The best, the best first: at most so many, none slower than `near` times the best. As trials that are measured in full."""
        if self.lane is None:
            return []
        ranked = sorted(self._standing(), key=lambda e: (e.value, e.candidate))
        return [self.lane.trial(e.candidate) for e in ranked[:count] if e.value <= near * ranked[0].value]

    def _standing(self) -> list[Evaluation]:
        """One evaluation of each candidate that never failed: in full, or else its longest short run, if that looks better than the
        default (than its run of as many rounds, where there is one: a few rounds are not worth a full median)."""
        failed = {e.candidate for e in self.found if not e.ok}
        longest: dict[int, Evaluation] = {}
        for e in self.found:
            known = longest.get(e.candidate)
            if e.candidate not in failed and (known is None or (known.rounds and (not e.rounds or e.rounds >= known.rounds))):
                longest[e.candidate] = e
        shorts = [e for e in longest.values() if e.rounds]
        if not shorts:
            return list(longest.values())
        own = self._default_in_short()
        return [e for e in longest.values() if not e.rounds or e.value < own.get(e.rounds, self.default_us)]

    def _default_in_short(self) -> dict[int, float]:
        """Rounds -> the default's time in a run of so many."""
        if self.lane is None or self.default is None:
            return {}
        at = self.lane.space.find({KERNEL: self.default.kernel, **self.default.config.to_json_full()})
        return {e.rounds: e.value for e in self.found if e.candidate == at and e.rounds and e.ok}

    def hopeless(self) -> dict[str, Counter[str]]:
        """Kernels (by id) of which candidates were tried and every one failed: how, and how often."""
        if self.lane is None:
            return {}
        kernel = {e.candidate: self.lane.trial(e.candidate).kernel for e in self.found}
        fine = {kernel[e.candidate] for e in self.found if e.ok}
        last = {e.candidate: e for e in self.found if kernel[e.candidate] not in fine}
        found: dict[str, Counter[str]] = {}
        for candidate, e in last.items():
            found.setdefault(kernel[candidate], Counter())[e.status.value] += 1
        return found

    def by_prior(self) -> list[int]:
        """Candidates from the least expected time on; those of which nothing was expected are left out."""
        if self._order is None:
            expected = self.prior.expected
            self._order = []
            if expected is not None:
                order = np.argsort(expected, kind="stable")[: min(int(np.isfinite(expected).sum()), MOST_LIKELY)]
                self._order = [int(candidate) for candidate in order]
        return self._order

    def note_baseline(self, trial: Trial, result: Result, time_us: Interval | None) -> None:
        """One default or library was measured, or failed."""
        if time_us is None:
            self.failed.append(f"{result.status.value}: {result.reason}" if result.reason else result.status.value)
        elif trial in self.libraries:
            if time_us.median < self.prospect.rival_us:
                self.library, self.prospect.rival_us = trial, time_us.median
        elif time_us.median < self.default_us:
            self.default, self.default_us = trial, time_us.median
            self.prospect.own_us = time_us.median

    @staticmethod
    def journal_path(folder: Path, header: Mapping[str, Json]) -> Path:
        """Where the journal of the search with this header lies."""
        return folder / (digest(dict(header)) + SUFFIX)

    def begin(self, lane: Lane, prior: Prior, name: str, seed: int, folder: Path, header: Mapping[str, Json]) -> None:
        """Open the search: a new one, or the one of the journal with this header, exactly where it was. UsageError for a damaged one."""
        self.lane = lane
        self.journal = self.journal_path(folder, header)
        self.prior = _frozen(self.journal, prior)
        registered = find_strategy(name)
        journal = SearchJournal(self.journal, header)
        self.resumed = len(journal.recorded())
        self.search = Search(registered.make(lane.space, seed, self.prior), None, journal)
        self.search.open()
        told = self.search.trace.evaluations
        for first in range(0, len(told), SLICE):
            part = told[first : first + SLICE]
            self.prospect.note((e.value for e in part if e.ok and not e.rounds), sum(e.spent_s for e in part))

    def open(self) -> Ask | None:
        """What the search asks for next; None, and the prospect exhausted, when it asks for no more."""
        ask = self.search.open() if self.search else None
        self.prospect.exhausted = ask is None
        return ask


class _Raised(Exception):
    """A kernel's own code raised while its space was listed."""


def make_space(problem: Problem, kernels: Iterable[Kernel], chip: Chip, left_out: dict[str, str] | None = None) -> Space:
    """The candidates of the kernels that are tuned. A kernel whose space raises or is empty is left out and put into `left_out`, by its id
    with the reason. UsageError, naming the problem and the reasons, when nothing is left.
    """
    where = f"{problem.label()} on {chip.name}"
    out = {} if left_out is None else left_out
    able = list(kernels)
    while True:
        out.update((k.id, "its space has no valid candidate") for k in able if k.id not in out)  # until its first one comes
        try:
            return Space.of(_points(able, problem, chip, out))
        except _Raised as error:
            kernel, reason = error.args
            able = [k for k in able if k.id != kernel]
            out[kernel] = reason
        except UsageError as error:
            why = "; ".join(f"{kernel}: {reason}" for kernel, reason in out.items())
            raise UsageError(f"{where}: {why or error}") from error


def _points(kernels: Iterable[Kernel], problem: Problem, chip: Chip, empty: dict[str, str]) -> Iterator[dict[str, Json]]:
    for kernel in kernels:
        try:
            for point in kernel_points([kernel], problem, chip):
                empty.pop(kernel.id, None)
                yield point
        except Exception as error:
            raise _Raised(kernel.id, f"its space raised {type(error).__name__}: {error}") from error


def header_of(lane: Lane, strategy: str, seed: int, epoch: str) -> dict[str, Json]:
    """What a search is. Any difference makes another one with a journal of its own.

    Searching is by time whatever the objective is: energy takes 6 s and more of a device per candidate, so it is for the finals.
    """
    return {
        "kind": "search",
        "space": space_digest(lane.space, lane.kernels),
        "candidates": len(lane.space),
        "strategy": strategy,
        "strategy_source": strategy_digest(strategy),
        "seed": seed,
        "objective": "latency",
        "problem": lane.problem.key,
        "label": lane.problem.label(),
        "chip": lane.chip,
        "policy": lane.policy.to_json(),
        "epoch": epoch,
    }


def space_digest(space: Space, kernels: Mapping[str, Kernel]) -> str:
    """Hash of the candidates in their order and of the code of their kernels."""
    used = sorted(str(name) for name in space.values[space.names.index(KERNEL)]) if KERNEL in space.names else []
    code = {name: kernels[name].source_digest for name in used if name in kernels}
    rows = hashlib.sha256(np.ascontiguousarray(space.rows).tobytes()).hexdigest()
    return digest({"names": list(space.names), "values": [list(v) for v in space.values], "rows": rows, "code": code})


def strategy_digest(name: str) -> str:
    """Hash of the code that decides what is asked next (the strategy's file and what it imports of this room), and of the versions of the
    packages that it rests on."""
    found = hashlib.sha256()
    start = inspect.getsourcefile(find_strategy(name).make)
    folder = Path(__file__).parent
    todo, files = [Path(start)] if start else [], {folder / "search.py", folder / "strategy.py", folder / "space.py"}
    while todo:
        file = todo.pop()
        if file in files or not file.is_file():
            continue
        files.add(file)
        text = file.read_text()
        names = re.findall(r"klab\.harness\.tune\.([\w.]+)(?: import ([\w, ]+))?", text)
        for module, members in names:
            parts = [module, *(f"{module}.{member.strip()}" for member in members.split(",") if member.strip())]
            todo += [folder / f"{part.replace('.', '/')}.py" for part in parts]
    for file in sorted(files):
        found.update(file.read_bytes())
    for package in PACKAGES:
        try:
            found.update(f"{package} {importlib.metadata.version(package)}".encode())
        except importlib.metadata.PackageNotFoundError:
            continue
    return found.hexdigest()[:16]


def damaged(folder: Path) -> dict[Path, str]:
    """Journals of a folder that cannot be gone on with, as they are or for their prior, each with a line that says why."""
    found: dict[Path, str] = {}
    for journal in sorted(folder.glob(f"*{SUFFIX}")):
        reason = damage(journal)
        try:
            if not reason and journal.stat().st_size > 0:
                _kept(_prior_path(journal), journal)
        except UsageError as error:
            reason = str(error)
        if reason:
            found[journal] = reason
    return found


def _prior_path(journal: Path) -> Path:
    return journal.with_name(journal.name.removesuffix(SUFFIX) + PRIOR_SUFFIX)


def _kept(path: Path, journal: Path) -> Prior:
    try:
        with np.load(path, allow_pickle=False) as kept:
            expected = kept["expected"]
            return Prior(tuple(int(c) for c in kept["seeds"]), expected if len(expected) else None)
    except FileNotFoundError:
        raise UsageError(f"{path} is gone, without which {journal} cannot go on; move that file away to start anew") from None
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise UsageError(f"{path} is damaged ({type(error).__name__}); move it and {journal.name} away to start anew") from error


def _frozen(journal: Path, prior: Prior) -> Prior:
    """The prior that the search began with: stored beside its journal, because the store knows more now than it did then."""
    path = _prior_path(journal)
    if journal.exists() and journal.stat().st_size > 0:
        return _kept(path, journal)
    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with part.open("wb") as file:
            expected = np.empty(0) if prior.expected is None else prior.expected
            np.savez(file, seeds=np.array(prior.seeds, dtype=np.int64), expected=expected)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except OSError as error:
        raise CannotMeasure(f"{path} cannot be written: {error.strerror}; name another folder with --results") from error
    return prior
