"""A search on a recorded space: its clock, its figures, and the verb."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import recorded_spaces
from typer.testing import CliRunner

from klab.harness.cli.main import build_app
from klab.harness.tune import strategy
from klab.harness.tune.replay.recorded import RecordedSpace
from klab.harness.tune.replay.simulate import Run, Step, run_of, run_of_sequence, simulate
from klab.harness.tune.search import Budget
from klab.harness.tune.space import Space
from klab.harness.tune.strategy import Ask, Evaluation, Prior, Registered
from klab.kernels.errors import UsageError


class Scripted:
    """Asks what it was told to ask."""

    def __init__(self, asks: Sequence[Ask]) -> None:
        self._asks = list(asks)

    def ask(self) -> Ask:
        return self._asks.pop(0) if self._asks else Ask()

    def tell(self, evaluations: Sequence[Evaluation]) -> None:
        pass


def scripted(monkeypatch: pytest.MonkeyPatch, *asks: Ask) -> None:
    def make(space: Space, seed: int, prior: Prior) -> Scripted:
        return Scripted(asks)

    monkeypatch.setitem(strategy.strategies(), "scripted", None)  # loads what is registered before it is added to
    monkeypatch.setitem(strategy._found, "scripted", Registered("scripted", make, ""))


def tiny(times_us: Sequence[float], **changes: object) -> RecordedSpace:
    """Candidates 0, 1, 2 ... of these times: 1 s to compile, 2 s to benchmark."""
    count = len(times_us)
    made = recorded_spaces.from_points([{"tile": i} for i in range(count)], failing=0)
    status = [made.status[i] if math.isfinite(t) else recorded_spaces.Status.CRASHED for i, t in enumerate(times_us)]
    fields = {"time_us": np.array(times_us), "status": status, "compile_s": np.full(count, 1.0), "benchmark_s": np.full(count, 2.0)}
    samples = [[t * 1.5, t * 0.5] if math.isfinite(t) else [] for t in times_us]
    return dataclasses.replace(made, **{**fields, "samples_us": samples, **changes})


def test_failed_candidates_are_paid_for(monkeypatch: pytest.MonkeyPatch) -> None:
    scripted(monkeypatch, Ask((1, 0)), Ask((2,)))
    space = tiny([30.0, math.inf, 20.0, 10.0])
    run = run_of(space, simulate(space, "scripted", seed=0, budget=Budget(evaluations=10)), 0)
    assert run.steps == (Step(2, 6.0, 30.0), Step(3, 9.0, 20.0))
    assert (run.evaluations, run.seconds, run.ended) == (3, 9.0, "exhausted")
    assert [run.best_us(n) for n in (1, 2, 3, 400)] == [math.inf, 30.0, 20.0, 20.0]
    assert [run.best_us_by(s) for s in (5.9, 6.0, 8.0, 9.0)] == [math.inf, 30.0, 30.0, 20.0]
    assert (run.seconds_within(20.0), run.seconds_within(25.0), run.seconds_within(15.0)) == (9.0, 9.0, math.inf)


def test_a_short_run_costs_its_share_and_compiling_only_once(monkeypatch: pytest.MonkeyPatch) -> None:
    # Half of the samples of 0: 15 instead of 10. What the search would hand out is judged by its full time all the same.
    scripted(monkeypatch, Ask((0, 1), rounds=1), Ask((1,)))
    space = tiny([10.0, 12.0], samples_us=[[15.0, 5.0], [12.0, 12.0]])
    trace = simulate(space, "scripted", seed=0, budget=Budget(evaluations=10))
    assert [e.spent_s for e in trace.evaluations] == [1 + 1.0, 1 + 1.0, 2.0]
    run = run_of(space, trace, 0)
    assert run.steps == (Step(1, 2.0, 10.0), Step(2, 4.0, 12.0), Step(2, 6.0, 12.0))
    assert run.best_us(2) == 12.0
    assert run.seconds_within(11.0) == math.inf  # it had the better one and left it


def test_a_sequence_is_charged_like_a_search() -> None:
    space = recorded_spaces.small_space()
    trace = simulate(space, "random", seed=5, budget=Budget(evaluations=50))
    sequence = [e.candidate for e in trace.evaluations]
    assert run_of_sequence(space, [*sequence, sequence[0]], 5, trace.ended) == run_of(space, trace, 5)


def test_a_run_survives_its_line() -> None:
    space = recorded_spaces.small_space()
    run = run_of(space, simulate(space, "random", seed=1, budget=Budget(evaluations=60)), 1)
    again = Run.from_json(json.loads(json.dumps(run.to_json())))
    assert len(json.dumps(run.to_json())) < 600
    assert math.isnan(again.mark_seconds[-1])
    assert again.mark_seconds[:2] == pytest.approx(run.mark_seconds[:2], rel=1e-6)
    assert [s.evaluations for s in again.steps] == [s.evaluations for s in run.steps]
    assert again.best_us(60) == pytest.approx(run.best_us(60), rel=1e-6)


def test_nothing_valid_is_refused() -> None:
    with pytest.raises(UsageError, match="none of its 2 candidates is valid"):
        simulate(tiny([math.inf, math.inf]), "random", seed=0, budget=Budget(evaluations=1))


def test_unrecorded_times_cost_nothing_rather_than_making_all_sums_nan() -> None:
    space = tiny([1.0, 2.0], compile_s=np.array([math.nan, 1.0]))
    run = run_of(space, simulate(space, "random", seed=0, budget=Budget(evaluations=2)), 0)
    assert run.seconds == 3.0


# The verb


def klab(*arguments: object) -> tuple[str, Exception | None]:
    found = CliRunner().invoke(build_app(), [str(a) for a in arguments])
    return found.stdout, found.exception if isinstance(found.exception, Exception) else None


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return recorded_spaces.cache_file(recorded_spaces.small_space(), tmp_path / "made.json")


def test_json_is_pure_and_holds_every_run_and_a_summary(file: Path) -> None:
    text, error = klab("simulate", "--space", file, "--strategy", "random", "--repeats", 3, "--evaluations", 50, "--json")
    assert error is None
    rows = [json.loads(line) for line in text.splitlines()]
    assert [r["type"] for r in rows] == ["run", "run", "run", "summary"]
    assert [r["seed"] for r in rows[:3]] == [0, 1, 2]
    summary = rows[3]
    assert list(summary["best_over_optimum"]) == ["20", "50"]
    assert summary["best_over_optimum"]["20"] >= summary["best_over_optimum"]["50"] >= 1
    assert summary["within_5%"]["restricted_mean_s"] <= summary["within_5%"]["restricted_to_s"]
    assert text == klab("simulate", "--space", file, "-s", "random", "--repeats", 3, "--evaluations", 50, "--json")[0]


def test_gpu_seconds_end_a_run(file: Path) -> None:
    text, error = klab("simulate", "--space", file.parent, "-s", "random", "--repeats", 2, "--gpu-seconds", 60, "--json")
    assert error is None
    rows = [json.loads(line) for line in text.splitlines()]
    assert all(60 <= r["seconds"] < 60 + 8 * 4.5 for r in rows[:2])  # the batch of 8 in which they ran out is finished
    assert rows[2]["seconds"] == 60
    assert all(r["ended"] == "device seconds" for r in rows[:2])


def test_a_warm_start_is_shown_beside_the_cold_one(file: Path, tmp_path: Path) -> None:
    other = recorded_spaces.cache_file(recorded_spaces.small_space(seed=1), tmp_path / "other.json")
    text, error = klab("simulate", "--space", file, "-s", "random", "--repeats", 2, "--warm", other, "--json")
    assert error is None
    rows = [json.loads(line) for line in text.splitlines() if '"summary"' in line]
    assert [r["start"] for r in rows] == ["cold", "warm"]
    foreign = dataclasses.replace(recorded_spaces.small_space(seed=1), kernel="another_kernel")
    foreign_file = recorded_spaces.cache_file(foreign, tmp_path / "foreign.json")
    for of_no_use in (file, foreign_file):
        text, _ = klab("simulate", "--space", file, "-s", "random", "--repeats", 2, "--warm", of_no_use, "--json")
        assert [json.loads(line)["start"] for line in text.splitlines() if '"summary"' in line] == ["cold"]


def test_people_get_a_table(file: Path) -> None:
    text, error = klab("simulate", "--space", file, "-s", "random", "--repeats", 2)
    assert error is None
    assert "random" in text
    assert "s to 5%" in text


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--strategy", "nope"], "there is no strategy 'nope'; there are .*random"),
        (["-s", "random", "--evaluations", "0"], "budget of 0 evaluations is too small"),
        (["-s", "random", "--gpu-seconds", "0.01"], "too small for one evaluation; the cheapest took"),
        (["-s", "random", "--repeats", "0"], "at least one run"),
        (["-s", "random", "--evaluations", "5", "--gpu-seconds", "5"], "not both"),
        (["--scoreboard", "--gpu-seconds", "5"], "--gpu-seconds does not go with --scoreboard"),
        (["--scoreboard", "--repeats", "1", "--no-peers"], "gives no interval"),
        (["-s", "random", "--space", "/nonexistent"], "/nonexistent"),
    ],
)
def test_wrong_requests_say_what_is_wrong(file: Path, arguments: list[str], said: str) -> None:
    _, error = klab("simulate", "--space", file, *arguments)
    assert isinstance(error, UsageError)
    with pytest.raises(UsageError, match=said):
        raise error


def test_files_that_are_no_space_are_refused(tmp_path: Path) -> None:
    broken = tmp_path / "broken.json"
    broken.write_text('{"cache": {"1,2": {"time": ')
    failed = recorded_spaces.cache_file(tiny([math.inf, math.inf]), tmp_path / "failed.json")
    empty = tmp_path / "empty"
    empty.mkdir()
    for path, said in ((broken, "broken.json"), (failed, "none of its 2 candidates|no valid"), (empty, "has no recorded space")):
        _, error = klab("simulate", "--space", path, "-s", "random")
        assert isinstance(error, UsageError), path
        with pytest.raises(UsageError, match=said):
            raise error
