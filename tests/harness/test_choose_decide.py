"""Choosing for a plan, with the kernels as they are, and `klab choose`."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from made_results import made
from typer.testing import CliRunner

from klab.harness.catalog import find_chip, find_model
from klab.harness.choose.decide import decide, defaults_of, same_choice, sources_of, this_device, wanted_of
from klab.harness.choose.profile import read_profile, write_text
from klab.harness.cli.main import build_app
from klab.harness.plan import plan as make_plan
from klab.harness.plan.rows import Plan
from klab.harness.store.journal import Journal
from klab.harness.store.result import Result
from klab.kernels.discover import discover
from klab.kernels.errors import UsageError
from klab.kernels.matmul.problem import Matmul


@pytest.fixture(scope="module")
def plan() -> Plan:
    return make_plan(find_model("qwen3-0.6b"), find_chip("h200"))


def rows_of(plan: Plan) -> list[Result]:
    slow = [made(problem, "torch", level_us=50.0) for problem in plan.problems()]
    return slow + [made(problem, "triton_a", config={"block": 64}, level_us=40.0) for problem in plan.problems()]


def test_a_plan_says_where_each_problem_occurs(plan: Plan) -> None:
    wanted = wanted_of(plan)
    assert len(wanted) == len(plan.problems()) == len({w.problem_key for w in wanted})
    launches = sum(use.count for w in wanted for use in w.uses)
    assert launches == sum(row.count for row in plan.rows if row.problem)


def test_the_profile_of_a_plan(plan: Plan, tmp_path: Path) -> None:
    results = [*rows_of(plan), made(Matmul(7, 7, 7)), made(plan.problems()[0], chip="cpu")]
    out = tmp_path / "p.json"
    profile = decide(results, plan, "h200")
    write_text(out, profile.to_text())
    assert profile.model == "qwen3-0.6b" and profile.scenario["isl"] == 8192 and profile.scenario["dtype"] == "bfloat16"
    assert len(profile.choices) == len(plan.problems()) and not profile.open
    for step in profile.steps:
        rows = [row for row in plan.step(step.phase, step.batch) if row.problem]
        assert step.us == pytest.approx(sum(row.count for row in rows) * 40.0, rel=0.05)
        assert step.library_us == pytest.approx(1.25 * step.us, rel=0.05) and 0.5 < (step.modelled_share or 0) <= 1
    first = next(p for p in plan.problems() if p.operator == "matmul")
    by_final = decide(results, plan, "h200", finals={first.key: ("matmul/torch", {}, "the default")})
    assert by_final.chosen(first.key) == ("matmul/torch", "{}") and same_choice(by_final, profile) == [first.label()]
    again = decide(reversed(results), plan, "h200", previous=read_profile(out))
    assert again.to_text() == out.read_text() and same_choice(again, profile) == []


def test_what_changed_is_named(plan: Plan) -> None:
    rows = rows_of(plan)
    first = decide(rows, plan, "h200")
    label = plan.problems()[0].label()
    fewer = decide([r for r in rows if r.library or r.problem_label != label], plan, "h200")
    assert same_choice(first, fewer) == [label]


def test_defaults_and_digests_come_from_the_kernels(plan: Plan) -> None:
    catalogue = discover()
    kernel = next(k for k in catalogue.of("matmul") if "cpu" in k.kinds and not k.library)
    cpu = find_chip("cpu")
    problem = Matmul(4, 64, 64, "float32")
    default = kernel.default(problem, cpu).to_json_full()
    row = dataclasses.replace(made(problem, kernel.name, chip="cpu", config=default), source_digest=kernel.source_digest)
    known = defaults_of(catalogue, cpu)
    assert known(row) == default and known(made(problem, "nobody")) is None
    assert known(dataclasses.replace(row, problem={"from": "an older klab"}, problem_key="x")) is None
    assert sources_of(catalogue)[kernel.id] == kernel.source_digest
    (choice,) = decide([row], None, "cpu", catalogue=catalogue, limits=cpu).choices
    assert not choice.stale
    old = dataclasses.replace(row, source_digest="of last year")
    (choice,) = decide([old], None, "cpu", catalogue=catalogue, limits=cpu).choices
    assert choice.stale
    refused = decide([old], None, "cpu", catalogue=catalogue, limits=cpu, current_only=True)
    assert "the kernel's code has changed since" in refused.open[0].reason
    gone = decide([made(problem, "nobody", chip="cpu")], None, "cpu", catalogue=catalogue, limits=cpu)
    assert not gone.choices[0].stale and "not known" in gone.notes[0]


def test_the_cpu_of_this_machine_is_meant_where_it_has_results() -> None:
    from klab.harness.catalog.cpu_probe import probe

    problem = Matmul(4, 64, 64)
    here = made(problem, chip="cpu", device=probe().model, recorded_at="2026-01-01T00:00:00Z")
    shipped = made(problem, chip="cpu", device="the CPU of somebody else", recorded_at="2026-12-01T00:00:00Z")
    assert this_device("cpu", [here, shipped]) == here.device and this_device("cpu", [shipped]) is None
    assert this_device("h200", [here]) is None
    assert decide([here, shipped], None, "cpu").device == here.device


def test_the_verb(plan: Plan, tmp_path: Path) -> None:
    with Journal(tmp_path / "store", "run") as journal:
        for row in rows_of(plan)[3:]:
            journal.append(row)
    out = tmp_path / "p.json"
    words = ["choose", "--model", "qwen3-0.6b", "--chip", "h200", "--results", str(tmp_path / "store"), "--out", str(out)]
    done = CliRunner().invoke(build_app(), words, catch_exceptions=False)
    assert done.exit_code == 0 and "triton_a" in done.stdout and str(out) in done.stderr
    assert json.loads(out.read_text())["model"] == "qwen3-0.6b"
    told = CliRunner().invoke(build_app(), [*words, "--json", "--objective", "energy"], catch_exceptions=False)
    lines = [json.loads(line) for line in told.stdout.splitlines()]
    assert lines[0]["type"] == "profile" and {line["type"] for line in lines} == {"profile", "step", "open"}
    assert "no energy: not asked for" in lines[-1]["reason"] and "nothing was written" in told.stderr and told.exit_code == 4
    assert json.loads(out.read_text())["objective"] == "latency", "what was there is kept"


def test_a_step_with_open_problems_is_a_lower_bound_and_no_speed_up(plan: Plan, tmp_path: Path) -> None:
    missing = plan.problems()[0].key
    with Journal(tmp_path / "store", "run") as journal:
        for row in rows_of(plan):
            if row.problem_key != missing:
                journal.append(row)
    words = ["--model", "qwen3-0.6b", "--chip", "h200", "--results", str(tmp_path / "store"), "--out"]
    told = CliRunner().invoke(build_app(), ["choose", *words, str(tmp_path / "p.json"), "--json"], catch_exceptions=False)
    steps = [step for step in map(json.loads, told.stdout.splitlines()) if step["type"] == "step"]
    assert {step["open"] for step in steps} == {0, 1} and all((step["library_us"] is None) == bool(step["open"]) for step in steps)
    shown = CliRunner().invoke(build_app(), ["choose", *words, str(tmp_path / "p.json")], catch_exceptions=False, env={"COLUMNS": "250"})
    lower = [line for line in shown.stdout.splitlines() if ">= " in line]
    assert len(lower) == sum(step["open"] for step in steps) and all("1 problem not measured" in line for line in lower)
    page = CliRunner().invoke(build_app(), ["report", *words, str(tmp_path / "r.html")], catch_exceptions=False)
    text = (tmp_path / "r.html").read_text()
    assert page.exit_code == 0 and "&gt;= " in text and "1 problem not measured" in text


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--objective", "speed"], "unknown objective 'speed'"),
        (["--chip", "nowhere"], "unknown chip"),
        (["--model", "nobody", "--chip", "h200"], "nobody"),
        (["--chip", "h200", "--isl", "64"], "give --model too"),
        (["--chip", "h200", "--results", "/no/such/folder"], "does not exist"),
    ],
)
def test_a_bad_request_is_one_line(words: list[str], said: str) -> None:
    done = CliRunner().invoke(build_app(), ["choose", *words])
    assert isinstance(done.exception, UsageError) and said in str(done.exception) and "\n" not in str(done.exception)
