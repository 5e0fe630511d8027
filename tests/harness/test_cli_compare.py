"""klab compare and klab bisect on the CPU: a planted slow-down of 3%, what did not change, what became wrong, what does not run.

The planted repositories measure with a clock of their own that counts the work which was done: what is proved is the whole way from two
commits to an answer, on a machine that is as busy as it likes. The thorough test takes the real clock.
"""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
import types

import pytest
from made_results import made
from planted_repository import Planted, config, git

from klab.harness.catalog.chips import find_chip
from klab.harness.plan.trial import Policy
from klab.harness.store.read import iter_results
from klab.harness.store.result import Status
from klab.harness.watch import compare
from klab.harness.watch.compare_rule import Answer, Found
from klab.harness.watch.compare_run import Request, compare_live, understood, wanted_pairs, write_out
from klab.harness.watch.sides import AsWritten, Kind, Planned, Side, SideTrial
from klab.harness.watch.worktree import PREFIX
from klab.kernels.copy.problem import Copy
from klab.kernels.errors import UsageError

COPY = Copy(4, 4)
SMALL = ("--isl", "32", "--osl", "8", "--batch", "2", "--phase", "decode")


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """(repository, a model of one problem, commits by name)."""
    folder = tmp_path_factory.mktemp("planted")
    repository = Planted(folder / "repo")
    first = {**repository.kernel("tuned", 100), **repository.kernel("steady", 100), **repository.kernel("frail", 100)}
    commits = {"first": repository.commit("as it is", first)}
    wrong = repository.kernel("frail", 100, right="outputs['out'].zero_()")
    commits["slow"] = repository.commit(
        "tuned works 3% more, frail is wrong", {**repository.kernel("tuned", 103), **wrong, "README.md": "new"}
    )
    return repository, config(folder), commits


def left_behind():
    folder = os.environ.get("TMPDIR", "/tmp")
    return [name for name in os.listdir(folder) if name.startswith(f"{PREFIX}{os.getpid()}-")]


def test_a_planted_slow_down_a_kernel_that_stayed_and_one_that_became_wrong(planted, tmp_path):
    repository, model, commits = planted
    (repository.folder / "kernels/norm/tuned.py").write_text("the user is in the midst of something\n")
    before = git(repository.folder, "status", "--porcelain"), git(repository.folder, "rev-parse", "HEAD")
    request = Request(model=str(model), chip="cpu", words=SMALL, repo=repository.folder, processes=3)
    given = understood(commits["first"], "HEAD", Request(model=str(model), repo=repository.folder))
    found = compare_live(given, request, tmp_path)
    lines = {line.name.split()[-1]: line for line in found.lines}

    assert {name: line.found.answer.value for name, line in lines.items()} == {"tuned": "slower", "steady": "same", "frail": "broken"}
    slow, same = lines["tuned"].found, lines["steady"].found
    assert slow.ratio == pytest.approx(1.03, abs=0.004) and slow.low > 1.0 and slow.replicates == 3
    assert same.ratio == pytest.approx(1.0, abs=0.0015)
    assert lines["frail"].found.reason.startswith("incorrect: ")
    assert {name: line.differs for name, line in lines.items()} == {"tuned": "source", "steady": "nothing", "frail": "source"}
    assert found.answer == "broken" and found.exit_code() == 1

    # Each row is its own side's: that commit's source, and times of the clock that only the planted repository has.
    rows = list(iter_results(tmp_path))
    assert {row.build["side"] for row in rows} == {"A", "B"} and {row.environment["commit"] for row in rows} == set(commits.values())
    for side, units in (("A", 100), ("B", 103)):
        times = [us for row in rows if row.build["side"] == side and row.kernel == "norm/tuned" for us in row.samples_us]
        assert times and all(us == pytest.approx(100.0 * units, rel=0.0015) for us in times)
    assert {row.source_digest for row in rows if row.kernel == "norm/tuned"} == {
        lines["tuned"].a["source_digest"],
        lines["tuned"].b["source_digest"],
    }
    laps = [row.build["contest"]["id"] for row in rows if row.kernel == "norm/steady"]
    assert len(laps) == 6 and len(set(laps)) == 3  # A and B share their laps, and each pass is another pair of processes
    assert all(len(row.samples_us) == 16 for row in rows if row.status == "ok")

    write_out(tmp_path, found, given)
    told = json.loads((tmp_path / "compare.json").read_text())
    assert [row["answer"] for row in told if row["type"] == "pair"] == ["broken", "slower", "same"]
    assert (git(repository.folder, "status", "--porcelain"), git(repository.folder, "rev-parse", "HEAD")) == before
    assert git(repository.folder, "worktree", "list").count("\n") == 0 and left_behind() == []
    git(repository.folder, "checkout", "--quiet", "--", ".")


def planned(side, kernels, problem=COPY):
    """A side's plan: kernel -> (source digest, configuration)."""
    trials = [SideTrial(f"copy/{k}", source, problem, AsWritten(c), "cpu", Policy(), side) for k, (source, c) in kernels.items()]
    return Planned(Side(side, Kind.COMMIT, side, sys.executable), {}, trials, ["later/x: this klab does not know 'later'"])


def test_pairs_are_what_both_sides_have_and_the_rest_is_said():
    a = planned("A", {"same": ("1", {}), "edited": ("1", {}), "set": ("1", {"n": 1}), "gone": ("1", {})})
    b = planned("B", {"same": ("1", {}), "edited": ("2", {}), "set": ("1", {"n": 2}), "new": ("1", {})})
    pairs, alone = wanted_pairs([a, b], find_chip("cpu"), Request(margin=0.02))
    assert [pair.name.split()[-1] for pair in pairs] == ["same", "edited", "set"] and {pair.question.margin for pair in pairs} == {0.02}
    assert [(name.split()[-1], why) for name, why in alone[:2]] == [("gone", "only A has it"), ("new", "only B has it")]
    assert ("A", "later/x: this klab does not know 'later'") in alone
    changed, _ = wanted_pairs([a, b], find_chip("cpu"), Request(changed=True))
    assert [pair.name.split()[-1] for pair in changed] == ["edited", "set"]
    assert wanted_pairs([a, b], find_chip("cpu"), Request(changed=True, kernels=("same",)))[0] == []
    with pytest.raises(UsageError, match="neither side measures it; there are copy/edited"):
        wanted_pairs([a, b], find_chip("cpu"), Request(kernels=("nothing",)))
    with pytest.raises(UsageError, match="nothing to compare"):
        wanted_pairs([a, b], find_chip("cpu"), Request(problems=("9x9",)))


def test_a_kernel_whose_file_does_not_load_on_b_is_broken_and_not_just_absent():
    a, b = planned("A", {"torn": ("1", {}), "gone": ("1", {}), "lacking": ("1", {}), "same": ("1", {})}), planned("B", {"same": ("1", {})})
    a.facts["files"] = {f"copy/{name}": f"kernels/copy/{name}.py" for name in ("torn", "gone", "lacking", "same")}
    b.facts["unavailable"] = {
        "kernels/copy/torn.py": {"reason": "NameError: name 'x' is not defined", "install": None},
        "kernels/copy/lacking.py": {"reason": "needs flashinfer", "install": "pip install flashinfer"},
    }
    for changed in (False, True):
        pairs, alone = wanted_pairs([a, b], find_chip("cpu"), Request(changed=changed))
        (torn,) = (pair for pair in pairs if not pair.question.open)
        assert torn.name.endswith("torn") and not torn.same_code and torn.question.found.answer == "broken"
        assert {name.split()[-1]: why for name, why in alone[:2]} == {
            "gone": "only A has it", "lacking": "only A has it; B's file of it: needs flashinfer"
        }  # fmt: skip
        told = compare.conclude([torn], alone)
        assert told.exit_code() == 1 and "NameError" in told.lines[0].found.reason and "not compared" in told.headline()
    # The other way round B mends it: nothing is broken.
    (one,), alone = compare.pair_up(dataclasses.replace(b, side=a.side), dataclasses.replace(a, side=b.side))
    assert one.question.open and any("NameError" in why for _, why in alone)


@pytest.mark.parametrize(
    ("failing", "answer", "said"),
    [
        ("B", "same", "failed in one pass on B: incorrect: output 0"), ("BB", "broken", "incorrect: output 0"),
        ("AB", "same", "failed in one pass on A"), ("ABB", "not compared", "fails on both sides"), ("BAA", "not compared", "on both sides"),
        ("AA", "not compared", "B may mend it"),
    ],
)  # fmt: skip
def test_what_fails_now_and_then_is_said_and_no_fault_of_b_where_a_does_it_too(failing, answer, said):
    ((pair,), _) = wanted_pairs([planned(name, {"k": ("1", {})}) for name in ("A", "B")], find_chip("cpu"), Request())
    for number, side in enumerate(failing):
        row = dataclasses.replace(made(COPY, "torch_copy"), status=Status.INCORRECT, reason="output 0")
        compare._note(pair, {side: row}, number)
    assert pair.question.open == (answer == "same")
    pair.question.found = pair.question.found or Found(Answer.SAME, 1.0, 0.999, 1.001, 5)
    found = compare.conclude([pair], []).lines[0].found
    assert said in found.reason and found.answer == ("cannot tell" if failing == "B" else answer)


def test_what_each_sides_own_profile_chose_is_compared(monkeypatch):
    chosen = {"/a": ("one", {"n": 1}), "/b": ("two", {"n": 2})}

    def read(path):
        assert path.parts[2:] == ("profiles", "tuned", "cpu", "qwen3-0.6b.json")
        kernel, config = chosen.get(f"/{path.parts[1]}", (None, None))
        wanted = types.SimpleNamespace(problem_key=COPY.key)
        choice = types.SimpleNamespace(wanted=wanted, kernel=f"copy/{kernel}", config=config, instead="")
        return kernel and types.SimpleNamespace(choices=[choice])

    monkeypatch.setattr(compare, "read_profile", read)
    sides = [planned(name, {"one": ("1", {}), "two": ("1", {})}) for name in ("A", "B")]
    for side, root in zip(sides, ("/a", "/b"), strict=True):
        side.facts["harness"] = f"{root}/harness"
    request = Request(model="qwen3-0.6b", chosen=True)
    ((pair,), _) = wanted_pairs(sides, find_chip("cpu"), request)
    assert pair.name.endswith("as chosen") and not pair.same_code
    assert [(t.kernel, t.config.to_json_full()) for t in pair.trials] == [("copy/one", {"n": 1}), ("copy/two", {"n": 2})]
    sides[1].facts["harness"] = "/c/harness"
    with pytest.raises(UsageError, match=r"B .* has no profile for cpu"):
        wanted_pairs(sides, find_chip("cpu"), request)


def test_two_problems_of_one_label_have_two_names():
    class Alike(Copy):
        def label(self):
            return "copy"

    sides = [planned(name, {"k": ("1", {})}, Alike(2, 2)) for name in ("A", "B")]
    for side in sides:
        side.trials += planned(side.side.name, {"k": ("1", {})}, Alike(4, 4)).trials
    assert len({pair.name for pair in wanted_pairs(sides, find_chip("cpu"), Request())[0]}) == 2


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("HEAD", "HEAD"), "--model is needed"),
        (("HEAD", "nowhere", "-m", "qwen3-0.6b"), "no commit of"),
        (("HEAD", "HEAD", "-m", "qwen3-0.6b", "--margin", "0"), "--margin"),
        (("HEAD", "HEAD", "-m", "qwen3-0.6b", "--processes", "2"), "--processes"),
        (("HEAD", "HEAD", "-m", "qwen3-0.6b", "--metric", "energy"), "--metric energy"),
        (("HEAD", "results:.", "-m", "qwen3-0.6b"), "stored results are compared with stored results"),
    ],
)
def test_what_cannot_be_asked_is_one_line_before_anything_runs(klab, planted, words, said):
    code, out, err = klab("compare", *words, "--chip", "cpu", "--repo", planted[0].folder)
    assert code == 2 and said in err and out == "" and len(err.splitlines()) == 1


def test_bisect_needs_a_series_of_times(klab, planted):
    repository, model, commits = planted
    code, _, err = klab(
        "bisect", commits["first"], "HEAD", "--series", "cpu norm x chosen energy", "-m", model, "--repo", repository.folder
    )
    assert code == 2 and "measures times" in err


def test_a_comparison_that_is_ended_leaves_nothing(planted, tmp_path):
    repository, model, _ = planted
    words = ("compare", "HEAD~1", "HEAD", "-m", model, "--chip", "cpu", *SMALL, "--repo", repository.folder)
    variables = {**os.environ, "TMPDIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    klab = subprocess.Popen([sys.executable, "-m", "klab.harness.cli", *map(str, words)], stderr=subprocess.PIPE, env=variables, text=True)
    try:
        assert klab.stderr is not None and "as it is" in klab.stderr.readline()
        klab.send_signal(signal.SIGTERM)
        klab.wait(timeout=240)
    finally:
        klab.kill()
        klab.stderr.close()
    assert klab.returncode == 143
    assert list(tmp_path.iterdir()) == [] and git(repository.folder, "worktree", "list").count("\n") == 0


@pytest.mark.thorough
@pytest.mark.timeout(900)
def test_bisect_finds_the_commit_and_skips_what_does_not_run(klab, tmp_path):
    repository = Planted(tmp_path / "repo")
    # Of the six that touch kernels the third halves them: it is the first to be tried, and does not run.
    for message, files in (
        ("as it is", repository.kernel("tuned", 100)),
        ("a helper", {"kernels/norm/_one.py": "# 1\n"}),
        ("words", {"docs/x.md": "1"}),
        ("another", {"kernels/norm/_two.py": "# 1\n"}),
        ("does not import", {"kernels/norm/tuned.py": "def broken(:\n"}),
        ("mended", repository.kernel("tuned", 100)),
        ("slower", repository.kernel("tuned", 103)),
        ("a third", {"kernels/norm/_three.py": "# 1\n"}),
    ):
        last = repository.commit(message, files)
    log = tmp_path / "log"
    words = ("--series", "cpu norm rms norm 2x64 +residual fp32 chosen time", "-m", config(tmp_path), *SMALL, "--log", log)
    code, out, err = klab("bisect", "HEAD~7", last, *words, "--processes", 7, "--repo", repository.folder, "--json")
    assert code == 0, err
    told = [json.loads(line) for line in out.splitlines()]
    assert told[-1]["commits"] == [git(repository.folder, "rev-parse", "HEAD~1")]
    assert "skip" in {row["mark"] for row in told[:-1]} and "slower" in log.read_text()
    said = git(repository.folder, "bisect", "replay", str(log), check=False)
    assert f"{told[-1]['commits'][0]} is the first bad commit" in said


@pytest.mark.thorough
@pytest.mark.timeout(900)
def test_three_percent_of_real_time(tmp_path):
    """On the wall clock; a machine too busy to tell says so, and is never wrong."""
    repository = Planted(tmp_path / "repo", real_clock=True, size=96)
    repository.commit("as it is", {**repository.kernel("tuned", 100), **repository.kernel("steady", 100)})
    repository.commit("slower", repository.kernel("tuned", 103))
    request = Request(
        model=str(config(tmp_path)), chip="cpu", words=SMALL, repo=repository.folder, processes=20, deadline=time.monotonic() + 240
    )
    found = compare_live(understood("HEAD~1", "HEAD", request), request)
    answers = {line.name.split()[-1]: line.found for line in found.lines}
    assert answers["tuned"].answer in ("slower", "cannot tell") and answers["steady"].answer in ("same", "cannot tell"), answers
    assert answers["tuned"].low <= 1.03 <= answers["tuned"].high and answers["steady"].low <= 1.0 <= answers["steady"].high
