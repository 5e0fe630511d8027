"""Which commit is tried next, what is skipped, and a log that git understands; the measuring is made up, the repositories are real."""

import dataclasses
import math
import time
import types

import pytest
from planted_repository import git

from klab.harness.store.result import Status
from klab.harness.watch import bisect_run
from klab.harness.watch.bisect import PATHS, Hunt, Mark, Step
from klab.harness.watch.bisect_run import Search, Wanted, bisect, track_words
from klab.harness.watch.compare_rule import Answer, Found
from klab.harness.watch.compare_run import Request
from klab.harness.watch.policy import Track
from klab.harness.watch.series import Role
from klab.harness.watch.sides import AsWritten, Planned, SideTrial
from klab.harness.watch.worktree import Repository
from klab.kernels.copy.problem import Copy
from klab.kernels.errors import CannotMeasure, UsageError
from klab.kernels.matmul.problem import Matmul

COMMITS = 12


@pytest.fixture(scope="module")
def history(tmp_path_factory):
    """(repository, commits): every third touches only the docs; the one with number 7 is the slow one."""
    folder = tmp_path_factory.mktemp("history")
    git(folder, "init", "--quiet", "--initial-branch", "main", ".")
    commits = []
    for n in range(COMMITS):
        path = folder / ("docs" if n % 3 == 2 else "kernels") / "file"
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"{n}\n")
        git(folder, "add", "--all")
        git(folder, "commit", "--quiet", "--message", f"number {n}")
        commits.append(git(folder, "rev-parse", "HEAD"))
    return Repository.at(folder), commits


def trial_of(commits, slow, skipped=(), failing=()):
    def try_commit(commit):
        n = commits.index(commit)
        if n in failing:
            raise CannotMeasure("does not build")
        mark = Mark.SKIP if n in skipped else Mark.BAD if n >= slow else Mark.GOOD
        return Step(commit, mark, "made up")

    return try_commit


def replayed(repository, log, tmp_path):
    path = tmp_path / "log"
    path.write_text(log)
    try:
        return git(repository.root, "bisect", "replay", str(path), check=False)
    finally:
        git(repository.root, "bisect", "reset")


@pytest.mark.parametrize("slow", [n for n in range(1, COMMITS) if n % 3 != 2])
def test_the_first_bad_commit_is_found_wherever_it_is(history, slow, tmp_path):
    repository, commits = history
    hunt = Hunt(repository, commits[0], commits[-1])
    assert len(hunt.suspects) + 1 == sum(n % 3 != 2 for n in range(1, COMMITS)) and hunt.steps_left == 3
    tried = []
    assert hunt.run(trial_of(commits, slow), lambda step: tried.append(commits.index(step.commit))) == [commits[slow]]
    assert len(tried) <= 3 and all(n % 3 != 2 for n in tried)
    if slow == 7:
        said = replayed(repository, hunt.log([commits[slow]], ["bad is slower"]), tmp_path)
        assert f"{commits[slow]} is the first bad commit" in said


def test_commits_that_do_not_run_are_skipped_and_the_answer_says_what_is_left(history, tmp_path):
    repository, commits = history
    steps = []
    hunt = Hunt(repository, commits[0], commits[-1])
    found = hunt.run(trial_of(commits, 7, failing=(6,), skipped=(4,)), steps.append)
    # 7 is bad and 3 good; 4 and 6 could not be tried, 5 touches nothing.
    assert found[0] == commits[7] and set(found) == {commits[n] for n in (4, 6, 7)}
    assert {commits.index(s.commit): s.why for s in steps if s.mark is Mark.SKIP} == {6: "does not build", 4: "made up"}
    log = hunt.log(found, ["bad is\nslower"])
    assert "# klab: bad is slower\n" in log and log.count("# possible first bad commit") == 3 and log.count("git bisect skip") == 2
    said = replayed(repository, log, tmp_path)
    assert "only 'skip'ped commits left" in said and all(commit in said for commit in found)


def test_a_skip_beside_the_guilty_does_not_hide_it(history):
    repository, commits = history
    assert Hunt(repository, commits[0], commits[-1]).run(trial_of(commits, 7, failing=(1, 9))) == [commits[7]]


def test_all_commits_looks_at_the_docs_too(history):
    repository, commits = history
    assert Hunt(repository, commits[0], commits[-1], ()).run(trial_of(commits, 8)) == [commits[8]]


def test_ends_that_make_no_sense_are_refused(history):
    repository, commits = history
    with pytest.raises(UsageError, match="same commit"):
        Hunt(repository, commits[0], commits[0])
    with pytest.raises(UsageError, match="is no ancestor"):
        Hunt(repository, commits[5], commits[0])
    with pytest.raises(UsageError, match="touches kernels, harness, profiles: try --all-commits"):
        Hunt(repository, commits[1], commits[2], PATHS)


def test_a_branch_that_was_merged_is_searched_and_first_parent_is_not(tmp_path):
    git(tmp_path, "init", "--quiet", "--initial-branch", "main", ".")
    commits = {}

    def commit(name, *words):
        (tmp_path / "kernels").mkdir(exist_ok=True)
        (tmp_path / "kernels" / name).write_text(name)
        git(tmp_path, "add", "--all")
        git(tmp_path, "commit", "--quiet", "--message", name)
        commits[name] = git(tmp_path, "rev-parse", "HEAD")

    commit("root")
    git(tmp_path, "checkout", "--quiet", "-b", "side")
    commit("side 1")
    commit("side 2")
    git(tmp_path, "checkout", "--quiet", "main")
    commit("main 1")
    git(tmp_path, "merge", "--quiet", "--no-ff", "--message", "merge", "side")
    commits["merge"] = git(tmp_path, "rev-parse", "HEAD")
    commit("main 2")
    repository = Repository.at(tmp_path)
    bad = {commits[name] for name in ("side 2", "merge", "main 2")}

    def try_commit(one):
        return Step(one, Mark.BAD if one in bad else Mark.GOOD, "")

    assert Hunt(repository, commits["root"], commits["main 2"]).run(try_commit) == [commits["side 2"]]
    assert Hunt(repository, commits["root"], commits["main 2"], first_parent=True).run(try_commit) == [commits["merge"]]


def test_a_series_is_found_by_the_name_or_the_identity_that_a_night_gives_it():
    problem = Matmul(16, 64, 32)
    label = problem.label()
    short = label.removeprefix("matmul").strip()
    for text in (label, short, f"{short} {problem.key[:6]}"):
        wanted = Wanted.parse(f"h200 matmul {text} chosen time")
        assert wanted.chip == "h200" and wanted.role is Role.CHOSEN and wanted.names(problem) and not wanted.names(Matmul(17, 64, 32))
    assert Wanted.parse(f"h200/{problem.key}/library/time").names(problem)
    assert not Wanted.parse(f"h200 copy {short} chosen time").names(Copy(16, 64))


@pytest.mark.parametrize("text", ["", "h200 matmul", "h200 matmul m16 chosen energy", "h200 matmul m16 best time", "h200/key/chosen"])
def test_what_is_no_series_of_times_is_refused(text):
    with pytest.raises(UsageError):
        Wanted.parse(text)


def test_a_track_becomes_the_options_of_klab_measure():
    track = Track("m", "h200", {"isl": 128, "batches": (1, 8), "quantization": "fp8_block", "tp": 2}, phase="decode")
    assert track_words(track) == [
        "--model", "m", "--isl", "128", "--batch", "1,8", "--with", "quantization=fp8_block", "--tp", "2", "--phase", "decode"
    ]  # fmt: skip


class Speeds:
    """A repository whose commits say how slow they are; "" does not run, "wrong" is broken. Planning and measuring reads that."""

    def __init__(self, folder, monkeypatch, speeds):
        self.tried = []
        git(folder, "init", "--quiet", "--initial-branch", "main", ".")
        for n, speed in enumerate(speeds):
            for path in ("kernels/contract.py", "harness/measure/worker.py"):
                (folder / path).parent.mkdir(parents=True, exist_ok=True)
                (folder / path).touch()
            (folder / "kernels/speed").write_text(f"{speed}\n{n}")
            git(folder, "add", "--all")
            git(folder, "commit", "--quiet", "--message", f"number {n}")
        self.commits = git(folder, "rev-list", "--reverse", "HEAD").split()
        self.request = Request(model="qwen3-0.6b", repo=folder)
        monkeypatch.setattr(bisect_run, "plan", self.plan)
        monkeypatch.setattr(bisect_run._Lab, "measure", self.measure)

    def plan(self, side, chip, words, policy):
        if not self.speed(side):
            raise CannotMeasure("does not build")
        return Planned(
            side, {"harness": str(side.root / "harness")}, [SideTrial("copy/mine", "1", Copy(4, 4), AsWritten({}), chip, policy, side.name)]
        )

    def speed(self, side):
        return (side.root / "kernels/speed").read_text().splitlines()[0]

    def measure(self, a, b, pair, question, *, questions=1, most=0):
        self.tried.append(self.commits.index(b.side.commit))
        if self.speed(b.side) == "wrong":
            return Found(Answer.BROKEN, reason="incorrect: output 0")
        for noise in (0.0003, -0.0003, 0.0001, -0.0001, 0.0):
            question.add((math.log(float(self.speed(b.side)) / float(self.speed(a.side))) + noise, None))
        return question.look(questions, last=True)

    def search(self, **more):
        series = f"cpu copy {Copy(4, 4).label()} chosen time"
        said = []
        return bisect(Search(series, self.commits[0], self.commits[-1], self.request, **more), said.append), said


def test_from_a_series_to_the_commit(tmp_path, monkeypatch):
    # Of eight commits the fourth halves them: it is the first to be tried, and does not build.
    speeds = Speeds(tmp_path, monkeypatch, ["100", "100.2", "99.9", "100", "", "100.1", "103", "103.1", "102.9"])
    found, said = speeds.search()
    assert found.commits == [speeds.commits[6]] and found.exit_code == 0 and speeds.tried[0] == 8
    marks = {speeds.commits.index(step.commit): step.mark.value for step in found.steps}
    assert marks[4] == "skip" and marks[5] == "good" and marks[6] == "bad"
    assert all(mark == ("skip" if n == 4 else "good" if n < 6 else "bad") for n, mark in marks.items())
    assert "bad is slower: 1.02" in found.why and f"# first bad commit: [{speeds.commits[6]}]" in found.log
    assert any("skip: " in line and "does not build" in line for line in said)
    assert git(tmp_path, "worktree", "list").count("\n") == 0


def test_a_commit_that_did_half_of_it_is_unclear_and_a_mend_is_found_as_well(tmp_path, monkeypatch):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    speeds = Speeds(tmp_path / "a", monkeypatch, ["100", "101.5", "103"])
    found, _ = speeds.search()
    assert found.commits == [speeds.commits[2], speeds.commits[1]] and found.exit_code == 3
    assert found.steps[0].mark == "skip" and "cannot tell" in found.steps[0].why and "possible first bad" in found.log
    speeds = Speeds(tmp_path / "b", monkeypatch, ["103", "103", "100", "100"])
    found, _ = speeds.search()
    assert found.commits == [speeds.commits[2]] and "bad is faster" in found.why


def test_what_broke_is_searched_too(tmp_path, monkeypatch):
    speeds = Speeds(tmp_path, monkeypatch, ["100", "110", "100", "wrong", "wrong", "wrong"])
    found, _ = speeds.search()
    assert found.commits == [speeds.commits[3]] and "broken" in found.why
    assert all(step.why in ("it works", "incorrect: output 0") for step in found.steps)


def test_a_commit_that_fails_now_and_then_is_not_said_to_work(tmp_path, monkeypatch):
    speeds = Speeds(tmp_path, monkeypatch, ["100", "100", "flaky", "flaky", "wrong"])
    asked = []

    def measure(a, b, pair, question, *, questions=1, most=0):
        asked.append(most)
        if speeds.speed(b.side) == "wrong":
            return Found(Answer.BROKEN, replicates=3, reason="incorrect: output 0")
        if speeds.speed(b.side) == "flaky":
            pair.failures["B"] = [types.SimpleNamespace(status=Status.INCORRECT, reason="output 0")]
        return Found(Answer.CANNOT_TELL, reason="the interval is too wide", replicates=most)

    monkeypatch.setattr(bisect_run._Lab, "measure", staticmethod(measure))
    found, _ = speeds.search()
    assert found.commits == [speeds.commits[2]] and {step.mark.value for step in found.steps} == {"good", "bad"}
    # Two failures of five: six passes without one leave 5%.
    assert set(asked[1:]) == {6} == {bisect_run.passes_to_trust(3)} and bisect_run.passes_to_trust(0) == 2


def test_ends_that_do_not_differ_and_a_deadline_that_is_over(tmp_path, monkeypatch):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    found, _ = Speeds(tmp_path / "a", monkeypatch, ["100", "105", "100"]).search()
    assert found.commits == () and found.exit_code == 4 and "do not differ here: same" in found.why
    speeds = Speeds(tmp_path / "b", monkeypatch, ["100", "100", "100", "103", "103"])
    speeds.request = dataclasses.replace(speeds.request, deadline=time.monotonic())
    found, _ = speeds.search()
    assert len(found.commits) == 4 and found.exit_code == 3 and found.ended == "the time was up" and found.steps == []


def test_without_a_model_or_a_policy_it_says_what_it_needs(history):
    repository, commits = history
    search = Search("cpu norm 2x64 chosen time", commits[0], commits[-1], Request(repo=repository.root))
    with pytest.raises(CannotMeasure, match="holds no klab"):
        bisect(search)
