"""`klab screen` says how many candidates fell to which rule, what was compiled and what was known, and ends in 4 when nothing is left."""

import json
import os
import sys
from pathlib import Path

import pytest
from test_tune_farm import WORKER

from klab.harness.cli import screen as screen_verb
from klab.harness.cli.main import main
from klab.harness.tune import farm_compiler

KERNEL = '''
from dataclasses import dataclass
from klab.kernels.contract import Config, kernel
from klab.kernels.matmul.problem import Matmul

@dataclass(frozen=True)
class Choice(Config):
    do: str = "well"
    n: int = 0
    code: str = "a"

def space(problem, chip):
    yield from (Choice(n=1), Choice("complain"), Choice(n=2, code="b"))

@kernel(Matmul, backend="triton", config=Choice, space=space)
def choice(problem, config, chip):
    """Never built."""

@kernel(Matmul, backend="triton", config=Choice, default=lambda problem, chip: Choice("complain"))
def hopeless(problem, config, chip):
    """Never built."""

@kernel(Matmul, backend="triton", config=Choice, default=lambda problem, chip: Choice("hang"))
def sleepy(problem, config, chip):
    """Never built."""

@kernel(Matmul, backend="triton", fits=lambda problem, config, chip: "is never right")
def unfit(problem, config, chip):
    """Never built."""
'''


@pytest.fixture
def klab(tmp_path, monkeypatch, capsys):
    """Run `klab screen` with the process of test_tune_farm: (exit code, stdout, stderr)."""
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "choice.py").write_text(KERNEL)
    (tmp_path / "worker.py").write_text(WORKER)
    monkeypatch.setattr(farm_compiler, "WORKER", [sys.executable, str(tmp_path / "worker.py")])
    monkeypatch.setenv("KLAB_TEST_LOG", str(tmp_path / "log"))
    monkeypatch.setenv("KLAB_CACHE", str(tmp_path / "cache"))
    command = ["klab", "screen", "-m", "llama-3.1-8b", "--batch", "1", "--isl", "64", "--kernels", str(tmp_path / "kernels"), "--jobs", "1"]

    def run(*more):
        monkeypatch.setattr(sys, "argv", [*command, *more])
        with pytest.raises(SystemExit) as ended:
            main()
        return ended.value.code or 0, *capsys.readouterr()

    return run


def test_counts_rules_and_what_was_known(klab):
    code, text, _ = klab("--kernel", "choice", "--candidates", "all", "--json", "--hopeless", "4")
    *rows, tally = [json.loads(line) for line in text.splitlines()]
    rows, late = [r for r in rows if r["type"] == "candidate"], [r for r in rows if r["type"] != "candidate"]
    problems = len({json.dumps(row["problem"]) for row in rows})
    assert code == 0 and problems > 1 and len(rows) == 4 * problems
    assert {rule: tally[rule] for rule in ("kept", "duplicate", "crashed")} == {
        "kept": 2 * problems, "duplicate": problems, "crashed": problems
    }  # fmt: skip
    assert (tally["compiled"], tally["cached"]) == (4 * problems, 0) and tally["compiled_per_minute"] > 0
    assert all(row["reason"] and row["rule"] for row in rows if row["status"] != "ok")
    # Judged by itself the candidate was fine; that it is a duplicate comes at the end.
    twins = {row["key"] for row in rows if row["config"]["n"] == 1 and row["config"]["do"] == "well" and row["status"] == "ok"}
    assert {row["key"] for row in late} == twins and len(twins) == problems
    assert all(set(row) == {"type", "key", "twin", "reason"} and "changes nothing" in row["reason"] for row in late)
    assert {row["twin"] for row in late} <= {row["key"] for row in rows} and tally["type"] == "tally"
    # Again: what crashed alone.
    _, text, _ = klab("--kernel", "choice", "--candidates", "all", "--json")
    tally = json.loads(text.splitlines()[-1])
    assert (tally["compiled"], tally["cached"]) == (problems, 3 * problems)
    _, text, _ = klab("--kernel", "choice", "--candidates", "default", "--chip", "h200")
    assert f"0 compiled, {problems} known from before" in text and "modelled" in text


def test_says_so_when_nothing_can_run(klab):
    code, text, error = klab("--kernel", "hopeless")
    assert code == 4 and "crashed" in text
    assert "can be measured on h200; the first, matmul/hopeless do=complain" in error and "no such register" in error
    code, _, error = klab("--kernel", "unfit", "--chip", "b200")
    assert code == 2 and "is never right" in error
    code, _, error = klab("--kernel", "choice", "--chip", "cpu")
    assert code == 2
    code, _, error = klab("--hopeless", "1")
    assert code == 2 and "more than 1" in error


def test_rows_come_as_they_are_judged(klab, monkeypatch):
    """Each before the next is compiled: the log of the process has not grown by two between rows."""
    seen = []
    real = screen_verb.emit
    monkeypatch.setattr(screen_verb, "emit", lambda row: (seen.append((row["type"], len(log_lines()))), real(row)))
    klab("--kernel", "choice", "--candidates", "all", "--problem", "1x128256", "--json")
    assert [kind for kind, _ in seen] == ["candidate"] * 4 + ["duplicate", "tally"]
    assert seen[0][1] < seen[3][1], "the first row was out before the last candidate began"


def log_lines():
    return [line for line in Path(os.environ["KLAB_TEST_LOG"]).read_text().splitlines() if line.startswith("compile")]


def test_only_some_problems_or_a_phase(klab):
    def labels(*more):
        _, text, _ = klab("--kernel", "choice", "--json", *more)
        return {json.dumps(row["problem"]) for row in map(json.loads, text.splitlines()) if row["type"] == "candidate"}

    everything, decode = labels(), labels("--phase", "decode")
    assert decode < everything and len(labels("--problem", "1x128256")) == 1
    code, _, error = klab("--kernel", "choice", "--problem", "none such")
    assert code == 2 and "none matches; there are matmul" in error
    code, _, error = klab("--kernel", "choice", "--phase", "dreaming")
    assert code == 2 and "this model has" in error


def test_a_candidate_has_so_much_time(klab):
    for wrong in ("soon", "0"):
        code, _, error = klab("--kernel", "sleepy", "--timeout", wrong)
        assert code == 2 and "--timeout" in error
    code, text, error = klab("--kernel", "sleepy", "--problem", "1x128256", "--timeout", "0.5s")
    assert code == 4 and "timeout" in text and "timeout" in error


def test_the_table_is_narrow_and_the_rows_are_told_apart(klab):
    _, text, _ = klab("--kernel", "choice", "--candidates", "all")
    assert max(map(len, text.split("candidates by rule")[0].splitlines()[:-8])) <= 160
    assert "n=2 code=b" in text and "default" in text and "duplicate: n=1 changes noth..." in text
    assert "--json has every field" in " ".join(text.split())
