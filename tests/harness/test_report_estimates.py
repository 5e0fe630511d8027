"""What the page keeps of its estimates and believes: changed code, tables or prices, spoilt files, odd published rows, labels."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest
from made_results import made
from test_report_money import MODEL, story_of

from klab.harness.catalog import find_chip, find_model
from klab.harness.catalog.architecture import Note
from klab.harness.cost.answer import Question, options_of
from klab.harness.cost.estimate import Estimator
from klab.harness.plan import plan as make_plan
from klab.harness.report import estimates
from klab.harness.report.estimates import fastest_published, known, no_price, published_tables
from klab.harness.report.limits import limits_of
from klab.harness.report.subject import Subject, tell
from klab.harness.store.result import Result
from klab.kernels.errors import UsageError
from klab.kernels.matmul.problem import Matmul


def made_here() -> tuple[list[dict[str, object]], list[str]]:
    return [{"chip": "h200", "usd": 1.5, "nothing": None}], ["why"]


def never() -> estimates.Made:
    pytest.fail("it is in the cache")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("KLAB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_an_answer_is_kept_for_the_same_question_and_code(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = estimates._kept("serving", ["a"], made_here)
    assert first == made_here() and estimates._kept("serving", ["a"], never) == first
    asked: list[str] = []

    def again() -> estimates.Made:
        asked.append("")
        return made_here()

    estimates._kept("serving", ["b"], again)
    estimates._kept("placements", ["a"], again)
    monkeypatch.setattr(estimates, "_code", lambda: "other code")
    estimates._kept("serving", ["a"], again)
    assert len(asked) == 3, "another input, another question, other code"


def test_a_spoilt_file_is_computed_again_and_a_cache_that_cannot_be_written_does_not_matter(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    estimates._kept("serving", ["a"], made_here)
    (path,) = [path for path in cache.rglob("*") if path.is_file()]
    whole = path.read_bytes()
    for spoilt in (b"", whole[:-3], b"{}", whole[:20] + b"x" + whole[21:]):
        path.write_bytes(spoilt)
        assert estimates._kept("serving", ["a"], made_here) == made_here() and path.read_bytes() == whole
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("KLAB_CACHE", str(tmp_path / "file"))
    assert estimates._kept("serving", ["a"], made_here) == made_here()


def test_code_is_all_that_an_answer_rests_on(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    plain = Path.read_bytes

    def noted(path: Path) -> bytes:
        read.append("/".join(path.parts[-3:]))
        return plain(path)

    monkeypatch.setattr(Path, "read_bytes", noted)
    estimates._code.__wrapped__()
    for name in (
        "cost/steps.py",
        "plan/planner.py",
        "catalog/prices.py",
        "reference/tables.py",
        "report/estimates.py",
        "matmul/problem.py",
    ):
        assert any(path.endswith(name) for path in read), name
    assert any(path.endswith("kernels/expert_routing.py") for path in read), "what problems import"


def test_changed_tables_are_other_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = tmp_path / "data" / "h200_sxm" / "trtllm" / "1.0.0" / "gemm.parquet"
    table.parent.mkdir(parents=True)
    table.write_bytes(b"one")
    monkeypatch.setenv("KLAB_REFERENCE", str(tmp_path))
    before = published_tables()
    assert before and before == published_tables()
    table.write_bytes(b"another")
    assert published_tables() != before
    monkeypatch.setenv("KLAB_REFERENCE", str(tmp_path / "nowhere"))
    assert published_tables() == ""


def published(median_us: float, kernel: str = "theirs") -> Result:
    row = made(Matmul(8, 512, 512), kernel, level_us=10.0)
    return dataclasses.replace(row, kind="reference", key=kernel, median_us=median_us, device="NVIDIA H200")


def subject_of(*rows: Result) -> Subject:
    (subject,) = tell([], lambda chip, _: story_of(chip).subjects[0].profile, limits_of, chips=["h200"]).subjects
    return dataclasses.replace(subject, reference=rows)


def test_of_published_rows_the_fastest_that_is_a_time_counts_with_its_doubt() -> None:
    odd = [published(value, f"k{n}") for n, value in enumerate((math.nan, math.inf, 0.0, -1.0, 7.0, 5.0, 6.0, math.nan))]
    ((row, us),) = fastest_published(subject_of(*odd)).values()
    assert row.median_us == 5.0 and us.mid == 5.0 and us.low < 5.0 < us.high
    _, (fact,) = known(subject_of(*odd))
    assert fact.us == us and str(fact.origin) == "reference"
    assert known(subject_of(*odd[:4])) == ([], [])


def test_of_a_model_that_is_not_wholly_understood_no_time_is_called_measured() -> None:
    plan = make_plan(find_model(MODEL), find_chip("h200"))
    (option, *_) = options_of(Question(plan.model, plan.chip, estimates.workload_of(plan)), "", Estimator(plan.chip))
    shares = dict.fromkeys(option.points[0].time_shares, 0.0) | {estimates.Origin.MEASURED: 1.0}
    point = dataclasses.replace(option.points[0], time_shares=shares, energy_shares=shares)
    assert estimates._point(point, plan, "bf16", True)["times_are"] == "measured"
    note = Note("layers", "some are unknown", 0.88, "warning")
    partly = dataclasses.replace(plan, model=dataclasses.replace(plan.model, notes=(note,)))
    cell = estimates._point(point, partly, "bf16", True)
    assert (cell["times_are"], cell["joules_are"]) == ("modelled", "modelled"), "as klab cost calls it"


def test_why_there_is_no_price(monkeypatch: pytest.MonkeyPatch) -> None:
    assert no_price("zzz") == "No price of zzz is known"
    two = (estimates.find_price("h200", "on_demand"),) * 2
    monkeypatch.setattr(estimates, "load_prices", lambda: two)
    assert no_price("h200") == "Several prices of h200 are known"

    def broken() -> None:
        raise UsageError("h200.toml: price 1 lacks date")

    monkeypatch.setattr(estimates, "load_prices", broken)
    assert no_price("h200") == "Prices cannot be read (h200.toml: price 1 lacks date)"
