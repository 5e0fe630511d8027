"""Published rows on the report: those of its very problems, and a page of them alone that says what it is. Small tables, written here."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from made_results import made

pytest.importorskip("duckdb")
from test_store_reference import gemm, write

from klab.harness.catalog import find_chip, find_model
from klab.harness.choose.decide import decide
from klab.harness.plan import plan
from klab.harness.report.figures import chips
from klab.harness.report.frames import standing
from klab.harness.report.limits import limits_of
from klab.harness.report.published import published
from klab.harness.report.subject import tell
from klab.harness.store.result import Status
from klab.kernels.errors import UsageError
from klab.kernels.matmul.problem import Matmul

PLACES = {"h200": "h200_sxm/gemm/trtllm/1.3.0rc20/gemm_perf", "b200": "b200_sxm/gemm/trtllm/1.3.0rc20/gemm_perf"}


def tables(root: Path) -> Path:
    """Rows of both chips at sizes around 4096, and one size that h200 alone has."""
    for chip, us in (("h200", 100.0), ("b200", 55.0)):
        rows = [gemm(m, 4096, 4096, us * (1 + m / 4096)) for m in (64, 128, 1024, 2048)]
        rows += [gemm(64, 8192, 4096, 140.0)] if chip == "h200" else []
        write(root, PLACES[chip], rows)
    return root


def test_only_the_very_problems_come(tmp_path: Path) -> None:
    own = [made(Matmul(m, 4096, 4096), level_us=90.0) for m in (128, 129, 1024)]
    found = published(["h200", "b200", "cpu"], {}, own, root=tables(tmp_path))
    assert sorted((row.chip, row.problem_key) for row in found.rows) == sorted(
        (chip, Matmul(m, 4096, 4096).key) for chip in ("h200", "b200") for m in (128, 1024)
    )
    assert all((row.kind, row.status, row.energy_j, row.ci_low_us) == ("reference", Status.OK, None, None) for row in found.rows)
    (row,) = [row for row in found.rows if (row.chip, row.problem["m"]) == ("b200", 128)]
    assert row.median_us == pytest.approx(55.0 * (1 + 128 / 4096)) and row.kernel == "matmul/trtllm.k"
    assert [line.split(" (")[0] for line in found.lines] == [
        f"{chip}: 2 of 3 problems are published at exactly their size" for chip in ("h200", "b200")
    ]


def test_a_plan_asks_for_its_problems_and_what_approximates_them(tmp_path: Path) -> None:
    own = plan(find_model("qwen3-0.6b"), find_chip("h200"))
    problem = next(p for p in own.problems() if isinstance(p, Matmul))
    us = problem.flops() / 989e6
    write(tmp_path, PLACES["h200"], [
        gemm(problem.m, problem.n, problem.k, 1.5 * us),
        gemm(problem.m, problem.n, problem.k, us, "fp8"),
        gemm(problem.m + 1, problem.n, problem.k, 1.6 * us),
    ])  # fmt: skip
    found = published(["h200"], {"h200": own}, root=tmp_path)
    assert sorted((row.operator, row.median_us) for row in found.rows) == [
        ("matmul", pytest.approx(1.5 * us)),
        ("scaled_matmul", pytest.approx(us)),
    ]


def test_of_one_size_the_fastest_of_each_engine(tmp_path: Path) -> None:
    write(tmp_path, PLACES["h200"], [gemm(64, 4096, 4096, us, kernel_source=f"k{us:.0f}") for us in (60.0, 40.0, 50.0)])
    write(tmp_path, "h200_sxm/gemm/vllm/0.24.0/gemm_perf", [gemm(64, 4096, 4096, 45.0)])
    found = published(["h200"], {}, [made(Matmul(64, 4096, 4096))], root=tmp_path)
    assert sorted((row.kernel, row.median_us) for row in found.rows) == [("matmul/trtllm.k40", 40.0), ("matmul/vllm.k", 45.0)]


def test_without_tables_there_is_a_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("klab.harness.report.published.available", lambda root: None)
    found = published(["h200"], {}, [made(Matmul(1, 64, 64))])
    assert found.rows == () and "pip install" in found.lines[0]
    monkeypatch.undo()
    with pytest.raises(UsageError, match="holds no tables"):
        published(["h200"], {}, root=tmp_path)


def test_a_problem_of_another_klab_is_passed_over(tmp_path: Path) -> None:
    row = made(Matmul(64, 4096, 4096))
    strange = [dataclasses.replace(row, problem={"m": "many"}, problem_key="x"), dataclasses.replace(row, operator="gone", problem_key="y")]
    assert published(["h200"], {}, strange, root=tables(tmp_path)).rows == ()


def test_the_figure_of_published_rows_says_so(tmp_path: Path) -> None:
    own = [made(Matmul(m, 4096, 4096), level_us=90.0) for m in (64, 128, 1024, 2048)]
    rows = published(["h200", "b200"], {}, own, root=tables(tmp_path)).rows
    story = tell([*own, *rows], lambda chip, found: decide(found, None, chip), limits_of)
    (figure,) = chips.figures(story, standing(story))
    assert figure.caption.startswith("B200 takes 0.550× of H200's time: the geometric mean over 4 problems that others published for both")
    assert "Rests on published rows alone" in figure.caption and figure.variant.endswith("reference")
    alone = tell(rows, lambda chip, found: decide(found, None, chip), limits_of)
    (same,) = chips.figures(alone, standing(alone))
    assert same.caption == figure.caption
