"""Where problems occur: exactly those rows of plans that have the problem's key, and nothing made up."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from klab.harness.catalog import find_chip, find_model
from klab.harness.choose.profile import Wanted
from klab.harness.plan import Plan, Row, Scenario, plan
from klab.harness.report import places
from klab.harness.report.places import places_of
from klab.harness.report.subject import Occurrence
from klab.kernels.contract import Problem
from klab.kernels.decode_attention.problem import DecodeAttention
from klab.kernels.matmul.problem import Matmul


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and a catalog of three models: planning all of them takes half a second."""
    few = tuple(find_model(name) for name in ("qwen3-0.6b", "qwen3-8b", "whisper-large-v3"))
    monkeypatch.setattr(places, "load_models", lambda: few)
    monkeypatch.setenv("KLAB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def wanted(problem: Problem) -> Wanted:
    return Wanted(problem.key, problem.operator, problem.label(), problem.to_json())


def planned(model: str, **scenario: object) -> Plan:
    return plan(find_model(model), find_chip("h200"), Scenario(**scenario))  # type: ignore[arg-type]


def test_every_problem_of_a_models_usual_scenario_is_found_with_its_counts() -> None:
    """Of a decode step and a prompt: the same rows as the plan has, by an independent look at it."""
    made = planned("qwen3-8b", isl=2048, osl=1, batches=(4,), tp=2)
    found = places_of([wanted(problem) for problem in made.problems()], {})
    for row in made.rows:
        if row.problem is not None:
            here = Occurrence("qwen3-8b", row.phase, row.batch, row.role, row.count)
            assert here in found[row.problem.key], row
    assert all(one.model for listed in found.values() for one in listed)


def test_no_occurrence_that_no_plan_has() -> None:
    problem = DecodeAttention(kv_lens=(1024,) * 8, heads=16, kv_heads=8, head_dim=128)
    for one in places_of([wanted(problem)], {})[problem.key]:
        keys = [
            row.problem.key
            for tp in places.TENSOR_PARALLEL
            if find_model(one.model).name == one.model
            for row in _rows(one.model, tp)
            if row.problem is not None and (row.phase, row.batch, row.role, row.count) == (one.phase, one.batch, one.role, one.count)
        ]
        assert problem.key in keys


def _rows(model: str, tp: int) -> tuple[Row, ...]:
    try:
        return planned(model, isl=1024, osl=1, batches=(8,), tp=tp).rows
    except Exception:  # noqa: BLE001  this model cannot be split so
        return ()


def test_given_plans_count_and_shapes_of_no_model_do_not() -> None:
    """A plan of an unusual scenario is told of, because it was given; an operator that only one phase has still tells the phase."""
    made = planned("qwen3-0.6b", isl=777, osl=10, batches=(3,))
    problem = next(row.problem for row in made.rows if row.phase == "decode" and row.operator == "matmul" and row.problem)
    odd, attention = Matmul(3, 5, 7), DecodeAttention(kv_lens=(1000, 3), heads=3, kv_heads=1, head_dim=64)
    found = places_of([wanted(problem), wanted(odd), wanted(attention)], {"h200": made})
    assert {one.model for one in found[problem.key]} >= {"qwen3-0.6b"} and {one.batch for one in found[problem.key]} >= {3}
    assert odd.key not in found
    assert found[attention.key] == (Occurrence("", "decode", 0, "", 0),)
    assert places_of([], {}) == {}


def test_a_narrower_format_occurs_where_the_wide_problem_does() -> None:
    wide = Matmul(8, 6144, 4096)
    narrow = Wanted("narrow", "scaled_matmul", "fp8", {"m": 8})
    found = places_of([narrow], {"h200": planned("qwen3-8b", batches=(8,))}, {"narrow": wide.key})
    assert any(one.model == "qwen3-8b" and one.batch == 8 for one in found["narrow"])


def test_what_was_computed_is_kept_and_believed_only_for_the_same_code(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = [wanted(Matmul(8, 6144, 4096))]
    first = places_of(made, {})
    assert first and list(cache.rglob("*"))
    monkeypatch.setattr(places, "_computed", lambda *_: {})
    assert places_of(made, {}) == first, "from the cache"
    code = places._code
    monkeypatch.setattr(places, "_code", lambda: "another")
    assert code() == code() and places_of(made, {}) == {}, "a changed catalog or planner is asked again"
    for path in cache.rglob("*"):
        if path.is_file():
            path.write_bytes(b"broken")
    monkeypatch.setattr(places, "_computed", lambda *_: {"x": []})
    assert places_of(made, {}) == {}, "computed again where the file is no longer what was written"
    assert places._of_catalog({}, ["x"]) == {"x": []}


def test_the_number_of_steps_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(places, "MOST_STEPS", 3)
    made = planned("qwen3-0.6b")
    steps: list[int] = []
    plain = places._planned

    def counted(*given: object) -> Plan | None:
        one = plain(*given)  # type: ignore[arg-type]
        scenario = given[2]
        assert isinstance(scenario, Scenario)
        if one and scenario.isl != 2:
            steps.append(len(one.steps))
        return one

    monkeypatch.setattr(places, "_planned", counted)
    places_of([dataclasses.replace(wanted(problem)) for problem in made.problems()], {})
    assert 3 <= sum(steps) <= 3 + 1 + places.MOST_BATCHES
