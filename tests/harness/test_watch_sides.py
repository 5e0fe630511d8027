"""Sides of a comparison: what a word means, worktrees that leave nothing behind, and processes that run their own klab and no other."""

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from planted_repository import git

from klab.harness.catalog.chips import find_chip
from klab.harness.plan.trial import Policy
from klab.harness.watch.sides import Given, Kind, Side, opened, plan, shim_for, understand
from klab.harness.watch.twin import SideClient, Twin
from klab.harness.watch.worktree import _HOST, PREFIX, Repository
from klab.kernels.errors import CannotMeasure, UsageError

# A klab in miniature: it is imported, greets and answers, and needs nothing.
WORKER = """
import json, os, sys
for line in sys.stdin:
    request = json.loads(line)
    answer = {answer}
    print(json.dumps({{"id": request["id"], **answer}}), flush=True)
"""
GREETING = '{"environment": {"root": __file__, "path": os.environ.get("PYTHONPATH"), "secret": os.environ.get("MY_TOKEN")}, "kernels": {}}'
MAIN = """
import json, sys
trial = {"type": "trial", "kernel": "norm/mine", "source_digest": "d", "chip": "cpu", "policy": {}}
print(json.dumps({**trial, "operator": "norm", "problem": {"rows": 2, "width": 64}, "config": {"size": 3}}))
print(json.dumps({**trial, "kernel": "later/mine", "operator": "later", "problem": {}, "config": {}}))
"""


def small_klab(folder, answer=GREETING, main=MAIN):
    files = {
        "kernels/__init__.py": "", "kernels/contract.py": "", "harness/__init__.py": "", "harness/measure/__init__.py": "",
        "harness/cli/__init__.py": "", "harness/cli/__main__.py": main, "harness/measure/worker.py": WORKER.format(answer=answer),
    }  # fmt: skip
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


@pytest.fixture
def repository(tmp_path):
    folder = small_klab(tmp_path / "repo")
    git(folder, "init", "--quiet", "--initial-branch", "main", ".")
    git(folder, "add", "--all")
    git(folder, "commit", "--quiet", "--message", "first")
    (folder / "harness/__init__.py").write_text("# second\n")
    git(folder, "commit", "--quiet", "--all", "--message", "second")
    return Repository.at(folder)


def side_of(folder, tmp_path, name="A"):
    return Side(name, Kind.TREE, name, sys.executable, folder, shim_for(folder, tmp_path, name))


def test_a_word_is_a_commit_a_checkout_a_venv_or_results(repository, tmp_path):
    def find():
        return repository

    (tmp_path / "rows").mkdir()
    python = tmp_path / "venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.symlink_to(sys.executable)
    head = git(repository.root, "rev-parse", "HEAD")
    assert understand("HEAD", find) == Given(Kind.COMMIT, head, "HEAD")
    assert understand("main~1", find).text == git(repository.root, "rev-parse", "main~1")
    assert understand(str(repository.root), find).kind is Kind.TREE
    # The link itself: what it points to would be another environment.
    assert understand(str(tmp_path / "venv"), find) == Given(Kind.ENVIRONMENT, str(python), str(tmp_path / "venv"))
    assert understand(str(python), find).text == str(python)
    assert understand(str(tmp_path / "rows"), find).kind is Kind.RESULTS
    assert understand("s3://bucket/rows", find).kind is Kind.RESULTS
    assert understand(f"results:{tmp_path}", find).kind is Kind.RESULTS


def test_a_word_that_is_nothing_or_two_things_is_refused(repository, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "main").mkdir()
    (tmp_path / "tagged" / "bin").mkdir(parents=True)
    (tmp_path / "tagged" / "bin" / "python").touch()
    git(repository.root, "tag", "tagged")
    for word, said in (
        ("main", "both a commit and a path"), ("tagged", "commit:tagged or env:tagged"), ("", "a side is empty"),
        ("nowhere", "no commit of"), ("--output=x", "no commit of"), ("commit:nowhere", "no commit"),
        ("tree:main", "no checkout"), ("env:main", "no bin/python"), ("results:gone", "does not exist"),
    ):  # fmt: skip
        with pytest.raises(UsageError, match=said):
            understand(word, lambda: repository)
    assert understand("commit:main", lambda: repository).kind is Kind.COMMIT


def test_worktrees_hold_the_commits_and_leave_nothing_behind(repository):
    root = repository.root
    (root / "kernels/contract.py").write_text("# not committed\n")
    hook = root / ".git/hooks/post-checkout"
    hook.parent.mkdir(exist_ok=True)
    hook.write_text(f"#!/bin/sh\ntouch {root}/hooked\n")
    hook.chmod(hook.stat().st_mode | stat.S_IXUSR)
    before = git(root, "status", "--porcelain"), git(root, "rev-parse", "HEAD"), git(root, "worktree", "list")
    given = {"A": understand("HEAD~1", lambda: repository), "B": understand("HEAD", lambda: repository)}
    with pytest.raises(RuntimeError), opened(given, lambda: repository) as sides:
        texts = [(side.root / "harness/__init__.py").read_text() for side in sides]
        assert texts == ["", "# second\n"] and all((side.root / "kernels/contract.py").read_text() == "" for side in sides)
        assert [side.title.split(" ", 1)[1] for side in sides] == ["first", "second"]
        folder = sides[0].root.parent
        raise RuntimeError("in the midst")
    assert not folder.exists() and not (root / "hooked").exists()
    assert (git(root, "status", "--porcelain"), git(root, "rev-parse", "HEAD"), git(root, "worktree", "list")) == before


def test_what_a_killed_comparison_left_is_swept_and_what_lives_is_not(repository, tmp_path):
    ended = subprocess.Popen(["true"])
    ended.wait()
    # The third is of another node that shares the repository: no process of this one tells whether it is alive.
    for name in (f"{ended.pid}-{_HOST}", f"{os.getpid()}-{_HOST}", f"{ended.pid}-elsewhere"):
        (tmp_path / f"{PREFIX}{name}-x").mkdir()
        repository.git("worktree", "add", "--quiet", "--detach", str(tmp_path / f"{PREFIX}{name}-x" / "A"), "HEAD")
    assert repository.sweep() == [tmp_path / f"{PREFIX}{ended.pid}-{_HOST}-x"]
    listed = repository.git("worktree", "list")
    assert (
        f"{PREFIX}{os.getpid()}-" in listed and f"{PREFIX}{ended.pid}-elsewhere" in listed and f"{PREFIX}{ended.pid}-{_HOST}" not in listed
    )


def test_git_is_not_misled_by_the_variables_of_a_hook(repository, monkeypatch, tmp_path):
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "elsewhere"))
    monkeypatch.setenv("GIT_INDEX_FILE", "nonsense")
    assert Repository.at(repository.root).resolve("HEAD")


def test_a_worker_runs_its_own_side_and_inherits_no_secret(tmp_path, monkeypatch):
    monkeypatch.setenv("MY_TOKEN", "secret")
    monkeypatch.setenv("PYTHONPATH", "/somewhere/else")
    # In the current folder as well: -P must keep it out.
    (tmp_path / "klab").mkdir()
    monkeypatch.chdir(tmp_path)
    for name in ("A", "B"):
        folder = small_klab(tmp_path / name)
        client = SideClient(side_of(folder, tmp_path, name), find_chip("cpu"))
        client.start(limit_s=60)
        told = client.environment
        client.kill()
        assert Path(told["root"]).resolve() == folder / "harness/measure/worker.py"
        assert told["secret"] is None and told["path"].endswith(":/somewhere/else")


def test_a_side_whose_klab_would_come_from_elsewhere_does_not_run(tmp_path):
    folder, other = small_klab(tmp_path / "mine"), small_klab(tmp_path / "other")
    wrong = Side("A", Kind.TREE, "A", sys.executable, folder, shim_for(other, tmp_path, "A"))
    with pytest.raises(CannotMeasure, match=r"klab would come from .*other"):
        SideClient(wrong, find_chip("cpu")).start(limit_s=60)
    with pytest.raises(CannotMeasure, match=r"klab would come from .*other"):
        plan(wrong, "cpu", [], Policy())
    # An installed klab does not fill a gap (an editable install offers itself for any part that is missing).
    (folder / "kernels/contract.py").unlink()
    (folder / "kernels/__init__.py").unlink()
    (folder / "kernels").rmdir()
    with pytest.raises(CannotMeasure, match=r"No module named 'klab\.kernels'|would come from"):
        plan(side_of(folder, tmp_path, "C"), "cpu", [], Policy())


def test_a_plan_is_the_sides_own_and_what_is_not_understood_is_said(tmp_path):
    found = plan(side_of(small_klab(tmp_path / "a"), tmp_path), "cpu", [], Policy(seed=7))
    assert [(t.kernel, t.problem.label(), t.config.to_json_full(), t.policy.seed) for t in found.trials] == [
        ("norm/mine", found.trials[0].problem.label(), {"size": 3}, 7)
    ]
    assert found.not_understood == ["later/mine: this klab does not know 'later'"]
    assert Path(found.facts["harness"]).is_relative_to(tmp_path / "a")


@pytest.mark.parametrize(
    ("main", "error", "said"),
    [
        ("import sys; print('klab: unknown model', file=sys.stderr); sys.exit(2)", UsageError, r"A \(A\): unknown model"),
        ("raise RuntimeError('no such thing')", CannotMeasure, r"A \(A\): RuntimeError: no such thing"),
        ("print('measured nothing')", CannotMeasure, "is not understood by this klab"),
    ],
)
def test_a_side_that_cannot_be_planned_says_so_with_its_name(tmp_path, main, error, said):
    with pytest.raises(error, match=said):
        plan(side_of(small_klab(tmp_path / "a", main=main), tmp_path), "cpu", [], Policy())


def test_an_environment_without_klab_says_so(tmp_path):
    bare = Side("B", Kind.ENVIRONMENT, "bare", sys.executable, None, None)
    command = bare.command("klab.harness.cli", "--chip", "cpu")
    assert command[3] == "-" and "PYTHONPATH" not in bare.variables() and "VIRTUAL_ENV" not in bare.variables()
    gone = Side("B", Kind.ENVIRONMENT, "gone", str(tmp_path / "python"), None, None)
    with pytest.raises(CannotMeasure, match="does not start"):
        plan(gone, "cpu", [], Policy())


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ('{"hello": "there"}', "greeting lacks"),
        (f'{GREETING} if request["op"] == "hello" else {{"refused": "unknown operation", "exit_code": 2}}', "unknown operation"),
        (f'{GREETING} if request["op"] == "hello" else {{"time": 3}}', "answers open with time"),
    ],
)
def test_a_worker_of_another_protocol_is_told_from_a_crash(tmp_path, answer, said):
    clients = [SideClient(side_of(small_klab(tmp_path / name, answer), tmp_path, name), find_chip("cpu")) for name in ("A", "B")]
    twin = Twin(clients)
    try:
        with pytest.raises(CannotMeasure, match="do not understand each other") as error:
            twin.start(limit_s=60)
            twin.ask("open", limit_s=30)
        assert said in str(error.value) and "klab measure" in str(error.value)
    finally:
        twin.kill()


def test_slots_belong_to_sides_and_both_hear_of_the_problem(tmp_path):
    answer = f'{GREETING} if request["op"] == "hello" else {{"status": "ok" if "/A-path/" in __file__ else "crashed", "reason": __file__}}'
    clients = [SideClient(side_of(small_klab(tmp_path / name, answer), tmp_path, name), find_chip("cpu")) for name in ("A", "B")]
    twin = Twin(clients)
    twin.start(limit_s=60)
    assert twin.alive and len({client.pid for client in clients}) == 2
    assert twin.ask("prepare", limit_s=30, slot=0)["status"] == "ok" and twin.ask("prepare", limit_s=30, slot=1)["status"] == "crashed"
    both = twin.ask("open", limit_s=30)
    assert both["status"] == "crashed" and "/B-path/" in both["reason"]
    clients[0].kill()
    assert not twin.alive
    twin.kill()


def test_kernel_folders_in_the_repository_are_the_sides_own(repository, tmp_path):
    outside = tmp_path / "mine"
    outside.mkdir()
    own = repository.root / "kernels"
    given = {"A": understand("HEAD", lambda: repository)}
    with opened(given, lambda: repository) as (side,):
        assert side.kernel_dirs([own, outside, tmp_path / "gone"], repository.root) == [side.root / "kernels", outside]
    json.dumps(side.variables())
