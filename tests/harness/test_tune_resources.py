"""The resource page: what is read from a real binary, what counts as a fault, and a page that reads."""

import dataclasses

import pytest
from typer.testing import CliRunner

from klab.harness.catalog import find_chip
from klab.harness.cli.main import build_app
from klab.harness.tune.resources import Row, faults, page, resources
from klab.kernels.discover import discover

FUNCTION = {
    "name": "_tile", "registers": 128, "spill_instructions": 0, "smem_bytes": 98304, "matrix_unit": "wgmma", "tma": True,
    "warp_specialised": False, "tmem_columns": 0, "threads": 256,
}  # fmt: skip
ROW = Row("matmul/triton_tiled", "triton", "matmul 8x8x8 bf16", "block_m=64", "h200", (FUNCTION,), 10.0, "memory", 12.5)


def test_a_default_is_compiled_and_read():
    pytest.importorskip("cupy")
    h200 = find_chip("h200")
    (kernel,) = discover().select(["matmul/cuda_gemv"])
    (row,) = resources([kernel], h200)
    assert row.problem.startswith("matmul 1x14336x4096") and row.config == kernel.default(kernel.problem_type.at_scale()[2], h200).label()
    assert row.functions[0]["registers"] > 16 and not faults([row])
    assert row.limit == "memory" and row.bound_us == pytest.approx(2 * 14336 * 4096 / 4800e3, rel=0.01)


def test_libraries_have_no_row():
    assert not resources(discover().select(["matmul/torch_matmul"]), find_chip("h200"))


def test_spills_and_failures_are_faults_and_a_refusal_is_none():
    spills = dataclasses.replace(ROW, functions=({**FUNCTION, "spill_instructions": 12},))
    broken = dataclasses.replace(ROW, functions=(), reason="compile_error: no such instruction", expected_us=None)
    refused = dataclasses.replace(ROW, config="-", functions=(), reason="needs tcgen05", expected_us=None)
    assert not faults([ROW, refused])
    assert "spills in _tile" in faults([spills])[0] and "compile_error" in faults([broken])[0]


def test_the_page_has_a_line_per_function_and_says_what_is_modelled():
    two = dataclasses.replace(ROW, functions=(FUNCTION, {**FUNCTION, "name": "_sum_splits", "matrix_unit": "none"}))
    text = page([two, dataclasses.replace(ROW, chip="b200", functions=(), reason="needs wgmma", expected_us=None)], "triton 3.7.1")
    assert text.count("| matmul 8x8x8 bf16 |") == 2 and "`tile`" in text and "`sum_splits`" in text
    assert "10 memory | 12.5 |" in text and "needs wgmma" in text and "nothing here was measured" in text
    widths = {line.count("|") for line in text.splitlines() if line.startswith("|")}
    assert len(widths) == 1


@pytest.mark.parametrize(("words", "says"), [
    (["--operator", "matmull"], "unknown operator"), (["--chip", "cpu"], "GPU"), (["--kernel", "none"], "unknown kernel"),
])  # fmt: skip
def test_the_verb_refuses_in_one_line(words, says):
    found = CliRunner().invoke(build_app(), ["resources", *words])
    assert says in str(found.exception)
