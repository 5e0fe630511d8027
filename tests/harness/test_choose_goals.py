"""Goals are judged by intervals, per problem and by the right baseline."""

import dataclasses

import pytest
from made_results import made

from klab.harness.choose.goals import GOALS, judge
from klab.kernels.copy.problem import Copy
from klab.kernels.decode_attention.problem import DecodeAttention
from klab.kernels.fused_moe.problem import FusedMoe
from klab.kernels.matmul.problem import Matmul

LARGE = Matmul(4096, 4096, 4096)
DECODE = DecodeAttention((8192,) * 16, 32, 8, 128)
COPY = Copy(65536, 8192)


def verdict(rows, start, **given):
    (found,) = [v for v in judge(rows, "h200", **given) if v.goal.name.startswith(start)]
    return found


def pair(problem, ours_us, library_us, noise=0.002, **changes):
    return [
        made(problem, "triton_x", level_us=ours_us, noise=noise, **changes),
        made(problem, "torch_x", level_us=library_us, noise=noise, **changes),
    ]


@pytest.mark.parametrize(("ours_us", "noise", "said"), [(100.0, 0.002, "met"), (120.0, 0.002, "missed"), (103.2, 0.08, "cannot tell")])
def test_the_interval_decides(ours_us, noise, said):
    found = verdict(pair(LARGE, ours_us, 100.0, noise), "bf16 matmul, m >= 512")
    assert found.verdict == said and found.figure == pytest.approx(100 / ours_us, rel=0.06)
    assert found.low <= found.figure <= found.high


def test_a_figure_is_the_geometric_mean_over_problems():
    rows = pair(LARGE, 100.0, 200.0) + pair(Matmul(8192, 4096, 4096), 100.0, 50.0)
    found = verdict(rows, "bf16 matmul, m >= 512")
    assert found.figure == pytest.approx(1.0, rel=0.01) and [p.figure < 1 for p in found.problems] == [True, False]
    # Other shapes, dtypes and chips are other goals', or nobody's.
    others = pair(Matmul(128, 4096, 4096), 1.0, 9.0) + pair(Matmul(4096, 4096, 4096, "float16"), 1.0, 9.0)
    elsewhere = [dataclasses.replace(row, chip="b200") for row in pair(LARGE, 1.0, 9.0)]
    assert verdict(rows + others + elsewhere, "bf16 matmul, m >= 512").figure == found.figure


def test_memory_bound_kernels_are_held_to_the_measured_copy():
    copy_us = COPY.bytes_moved() / 4300e3  # 4.3 TB/s
    ours_us = DECODE.bytes_moved() / 3870e3  # nine tenths of it
    rows = [*pair(DECODE, ours_us, 2 * ours_us), made(COPY, "torch_copy", level_us=copy_us, noise=0.001)]
    found = verdict(rows, "decode, batch >= 16, contexts >= 4k: of the copy")
    assert found.verdict == "met" and found.figure == pytest.approx(0.9, rel=0.01)
    assert verdict(rows, "decode, batch >= 16, contexts >= 4k: of SDPA").figure == pytest.approx(2.0, rel=0.01)
    without = verdict(rows[:2], "decode, batch >= 16, contexts >= 4k: of the copy")
    assert without.verdict == "not measured" and "copy" in without.reason


def test_the_engines_own_configuration_alone_shows_nothing():
    rows = [made(FusedMoe(64, 2048, 768, 128, 8), "triton_engine", config={"BLOCK_SIZE_M": 16}, level_us=100.0, noise=0.002)]
    found = verdict(rows, "fused experts", engine_default=lambda row: True)
    assert found.verdict == "not measured" and "configuration and another" in found.reason


def test_experts_are_held_to_the_engines_own_configuration():
    problem = FusedMoe(64, 2048, 768, 128, 8)
    rows = [made(problem, "triton_engine", config={"BLOCK_SIZE_M": m}, level_us=us, noise=0.002) for m, us in ((16, 100.0), (32, 70.0))]
    found = verdict(rows, "fused experts", engine_default=lambda row: row.config["BLOCK_SIZE_M"] == 16)
    assert found.verdict == "met" and found.figure == pytest.approx(10 / 7, rel=0.02)
    assert verdict(rows, "fused experts").verdict == "not measured"


def test_nothing_measured_is_said_of_every_goal():
    assert [v.verdict for v in judge([], "h200")] == ["not measured"] * len(GOALS)
    lost = [dataclasses.replace(row, checks=0) for row in pair(LARGE, 1.0, 9.0)]
    assert verdict(lost, "bf16 matmul, m >= 512").verdict == "not measured"
