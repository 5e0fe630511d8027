"""Searching: budgets, journals and kills, with a strategy of this file's own."""

from __future__ import annotations

import errno
import itertools
import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest

from klab.harness.store.result import Status
from klab.harness.tune.search import Budget, Trace, search
from klab.harness.tune.search_journal import SearchJournal
from klab.harness.tune.strategy import Ask, Evaluation, find_strategy, strategies
from klab.kernels.errors import CannotMeasure, UsageError

COUNT = 60
HEADER = {"space": "abc", "strategy": "halving", "seed": 3}


def value(candidate: int) -> float:
    return 100.0 + (candidate * 37) % COUNT


class Halving:
    """Short runs of eight, then the better half in full: what it asks depends on every value it was told."""

    def __init__(self, seed: int = 0) -> None:
        self._rng = np.random.default_rng(seed)
        self._left = list(range(COUNT))
        self._short: list[Evaluation] = []
        self.told: list[list[Evaluation]] = []

    def ask(self) -> Ask:
        if self._short:
            best = sorted((e for e in self._short if e.ok), key=lambda e: e.value)[:4]
            return Ask(tuple(e.candidate for e in best))
        chosen = self._rng.permutation(self._left)[:8].tolist()
        return Ask(tuple(chosen), rounds=2)

    def tell(self, evaluations: Sequence[Evaluation]) -> None:
        self.told.append(list(evaluations))
        if self._short:
            self._short = []
            return
        self._short = [e for e in evaluations if e.ok]
        tried = {e.candidate for e in evaluations}
        self._left = [c for c in self._left if c not in tried]
        # The order of the rest depends on what was found.
        if self._short:
            self._rng = np.random.default_rng(int(min(e.value for e in self._short) * 8))


class Device:
    """Answers and counts; candidates divisible by seven crash. `until`: how many evaluations it lives for."""

    def __init__(self, until: float = math.inf) -> None:
        self.asked: list[tuple[int, int]] = []
        self.until = until

    def __call__(self, ask: Ask) -> Iterator[Evaluation]:
        for c in ask.candidates:
            if len(self.asked) >= self.until:
                return
            self.asked.append((c, ask.rounds))
            if c % 7 == 0:
                yield Evaluation(c, math.inf, Status.CRASHED, ask.rounds, 0.5)
            else:
                yield Evaluation(c, value(c) + (1.5 if ask.rounds else 0.0), Status.OK, ask.rounds, 0.25 if ask.rounds else 1.0)


def keys(trace: Trace) -> list[tuple[int, float, int]]:
    return [(e.candidate, e.value, e.rounds) for e in trace.evaluations]


def test_a_budget_counts_candidates_and_not_runs() -> None:
    device = Device()
    trace = search(Halving(), device, Budget(evaluations=19))
    assert trace.ended == "evaluations"
    assert trace.distinct == 19
    assert len(trace.evaluations) == len(device.asked) > 19  # the full runs of candidates already known by a short one cost none
    assert trace.spent_s == pytest.approx(sum(e.spent_s for e in trace.evaluations))
    assert len(trace.best_after()) == 19


def test_a_budget_of_seconds_ends_after_the_ask_that_spends_it() -> None:
    trace = search(Halving(), Device(), Budget(device_s=5.0))
    assert trace.ended == "device seconds"
    before = sum(e.spent_s for e in trace.evaluations[:-8])
    assert before < 5.0 <= trace.spent_s


def test_no_budget_ends_when_nothing_is_left() -> None:
    trace = search(Halving(), Device(), Budget())
    assert trace.ended == "exhausted"
    assert trace.distinct == COUNT
    assert trace.best is not None
    assert trace.best.value == min(value(c) for c in range(COUNT) if c % 7)


@pytest.mark.parametrize("bad", [{"evaluations": 0}, {"evaluations": -1}, {"device_s": 0.0}, {"device_s": -2.0}, {"device_s": math.nan}])
def test_a_budget_too_small_for_one_is_refused(bad: dict[str, float]) -> None:
    with pytest.raises(UsageError, match="too small for one"):
        Budget(**bad)  # type: ignore[arg-type]


def test_the_best_is_a_full_measurement_where_there_is_one() -> None:
    trace = Trace()
    trace.add(Evaluation(1, 90.0, rounds=2))
    assert trace.best is not None
    assert trace.best.candidate == 1  # of short runs where there is no full one
    trace.add(Evaluation(2, 100.0))
    trace.add(Evaluation(3, math.inf, Status.TIMEOUT))
    trace.add(Evaluation(1, 95.0))
    assert trace.best.candidate == 1
    assert trace.best.value == 95.0
    assert [e.candidate for e in trace.ranked()] == [1, 2]
    assert trace.ranked()[0].value == 95.0  # the last of each
    assert trace.distinct == 3


def test_everything_failing_is_no_best() -> None:
    def crash(ask: Ask) -> Iterator[Evaluation]:
        yield from (Evaluation(c, math.inf, Status.CRASHED, ask.rounds, 0.1) for c in ask.candidates)

    trace = search(Halving(), crash, Budget())
    assert trace.ended == "exhausted"
    assert (trace.distinct, trace.best, trace.ranked()) == (COUNT, None, [])
    assert set(trace.best_after()) == {math.inf}


def test_an_evaluator_that_ends_early_stops_the_search_and_its_answers_count() -> None:
    strategy = Halving()
    trace = search(strategy, Device(until=21), Budget())
    assert trace.ended == "stopped"
    assert len(trace.evaluations) == 21
    assert sum(map(len, strategy.told)) == 21


@pytest.mark.parametrize("name", [name for name, found in strategies().items() if not found.needs])
def test_every_strategy_without_needs_obeys_a_budget(name: str) -> None:
    from klab.harness.tune.space import Space
    from klab.harness.tune.strategy import Prior

    space = Space.of({"x": x, "y": y} for x in range(10) for y in range(6))
    trace = search(find_strategy(name).make(space, 1, Prior(seeds=(5,))), Device(), Budget(evaluations=13))
    assert trace.ended == "evaluations"
    assert trace.distinct == 13


def test_a_search_killed_anywhere_goes_on_exactly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # the kills are files cut short; a real sync takes milliseconds
    budget = Budget(evaluations=20)
    whole = search(Halving(3), Device(), budget)
    path = tmp_path / "full.jsonl"
    kept = SearchJournal(path, HEADER)
    assert keys(search(Halving(3), Device(), budget, kept)) == keys(whole)
    text = path.read_bytes()
    lines = text.splitlines(keepends=True)
    ends = np.cumsum([0, *map(len, lines)])
    # After every line, and inside every line, one byte into it, at its middle and one byte before its end.
    cuts = {int(e) for e in ends} | {int(s + d) for s, e in itertools.pairwise(ends) for d in (1, (e - s) // 2, e - s - 1)}
    for cut in sorted(cuts):
        torn = tmp_path / "torn.jsonl"
        torn.write_bytes(text[:cut])
        device = Device()
        again = search(Halving(3), device, budget, SearchJournal(torn, HEADER))
        done = max(text[:cut].count(b"\n") - 1, 0)
        assert keys(again) == keys(whole), cut
        assert len(device.asked) == len(whole.evaluations) - done  # nothing is measured twice
        assert again.ended == whole.ended
        assert torn.read_bytes() == text


def test_a_search_stopped_by_its_device_goes_on_with_a_larger_budget(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    search(Halving(3), Device(until=13), Budget(evaluations=20), SearchJournal(path, HEADER))
    search(Halving(3), Device(), Budget(evaluations=20), SearchJournal(path, HEADER))
    more = search(Halving(3), Device(), Budget(evaluations=40), SearchJournal(path, HEADER))
    assert keys(more)[:20] == keys(search(Halving(3), Device(), Budget(evaluations=40)))[:20]
    assert more.distinct == 40


def test_a_journal_of_another_search_is_refused_by_its_header(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    search(Halving(3), Device(), Budget(evaluations=8), SearchJournal(path, HEADER))
    before = path.read_bytes()
    with pytest.raises(UsageError, match=r"another search .other seed, space"):
        SearchJournal(path, {"seed": 4, "space": "def", "strategy": "halving"})
    assert path.read_bytes() == before


def test_a_journal_whose_evaluations_the_strategy_would_not_make_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    search(Halving(3), Device(), Budget(evaluations=8), SearchJournal(path, HEADER))
    with pytest.raises(UsageError, match="records another search; remove it"):
        search(Halving(4), Device(), Budget(evaluations=8), SearchJournal(path, HEADER))


@pytest.mark.parametrize(
    "text",
    [
        "{}\n{}\n",
        "not json\n",
        '{"schema": 1}\n{"candidate": 1}\n',
        "[1, 2]\n",
        '"text"\n',
        "7\n",
        '{"schema": 1}\n[1]\n',
        "\xff\xfe\n",
        "\n",
        "a letter without an end",
    ],
)
def test_a_file_that_is_no_journal_is_refused_and_left_alone(tmp_path: Path, text: str) -> None:
    path = tmp_path / "journal.jsonl"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(UsageError, match=r"is not a journal|is of another search") as told:
        SearchJournal(path, HEADER)
    assert "\n" not in str(told.value)
    assert path.read_bytes() == text.encode("latin-1")


def test_a_journal_that_cannot_be_read_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(CannotMeasure, match="cannot be read: Is a directory"):
        SearchJournal(tmp_path, HEADER)


def test_infinity_and_failures_survive_the_journal(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "journal.jsonl"
    rows = [Evaluation(7, math.inf, Status.OUT_OF_MEMORY, 0, 0.125), Evaluation(1, 12.5, Status.OK, 3, 1e-9)]
    journal = SearchJournal(path, HEADER)
    for row in rows:
        journal.append(row)
    assert SearchJournal(path, HEADER).recorded() == rows


def test_a_full_disk_is_one_clear_line_and_what_was_written_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "journal.jsonl"
    journal = SearchJournal(path, HEADER)
    budget, left, sync = Budget(evaluations=16), 5, os.fsync

    def full(descriptor: int) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CannotMeasure, match="cannot be written: No space left on device"):
        search(Halving(3), Device(), budget, journal)
    monkeypatch.undo()
    again = search(Halving(3), Device(), budget, SearchJournal(path, HEADER))
    assert keys(again) == keys(search(Halving(3), Device(), budget))
