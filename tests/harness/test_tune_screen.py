"""Screening compiles real launches for sm_90 and sm_100 with no GPU, and a bad candidate is a row, never an end."""

import dataclasses

import pytest
from contest import BLACKWELL, CPU, HOPPER

from klab.harness.plan.trial import Policy, Trial
from klab.harness.store.result import Status
from klab.harness.tune.screen import Limits, screen, tally
from klab.kernels.discover import discover
from klab.kernels.matmul.problem import Matmul

TRITON = """
from __future__ import annotations
import os, time
from dataclasses import dataclass
import triton
import triton.language as tl
from klab.kernels.contract import Config, kernel
from klab.kernels.matmul.problem import Matmul

@triton.jit
def product(x, w, out, m, n, k, sx, sw, so, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, UNUSED: tl.constexpr):
    rm = tl.program_id(0) * BM + tl.arange(0, BM)
    rn = tl.program_id(1) * BN + tl.arange(0, BN)
    acc = tl.zeros((BM, BN), tl.float32)
    for start in range(0, k, BK):
        rk = start + tl.arange(0, BK)
        a = tl.load(x + rm[:, None] * sx + rk[None, :], mask=(rm[:, None] < m) & (rk[None, :] < k), other=0.0)
        b = tl.load(w + rn[None, :] * sw + rk[:, None], mask=(rn[None, :] < n) & (rk[:, None] < k), other=0.0)
        acc = tl.dot(a, b, acc)
    tl.store(out + rm[:, None] * so + rn[None, :], acc.to(out.dtype.element_ty), mask=(rm[:, None] < m) & (rn[None, :] < n))

@dataclass(frozen=True)
class Tile(Config):
    bm: int = 128
    bn: int = 128
    num_warps: int = 4
    num_stages: int = 3
    unused: int = 0
    warp_specialize: bool = False
    fault: str = ""

@kernel(Matmul, backend="triton", config=Tile)
def tile(problem, config, chip):
    '''A tile.'''
    if config.fault == "abort":
        os.abort()
    if config.fault == "hang":
        time.sleep(60)
    if config.fault == "print":
        print('{"status": "ok"}', flush=True)
    def launch(inputs, outputs):
        if config.fault == "raise":
            raise ValueError("no such tile" + chr(10) + "and more")
        x, w, out = inputs["x"], inputs["w"], outputs["out"]
        grid = (triton.cdiv(problem.m, config.bm), triton.cdiv(problem.n, config.bn))
        product[grid](x, w, out, problem.m, problem.n, problem.k, x.stride(0), w.stride(0), out.stride(0),
                      config.bm, config.bn, 64, config.unused, num_warps=config.num_warps, num_stages=config.num_stages)
    return launch
"""

PROBLEM = Matmul(512, 1024, 512)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "tile.py").write_text(TRITON)
    return tmp_path


def trials(folder, chip, *configs):
    kernel = discover([folder]).kernels["matmul/tile"]
    return [Trial.of(kernel, PROBLEM, kernel.config_type(**config), chip.name, Policy()) for config in configs]


@pytest.mark.parametrize(("chip", "unit"), [(HOPPER, "wgmma"), (BLACKWELL, "tcgen05")], ids=lambda v: getattr(v, "name", v))
def test_reads_what_was_built_for_the_chip(folder, chip, unit):
    pytest.importorskip("triton")
    (found,) = screen(trials(folder, chip, {}), chip, kernel_dirs=[folder], jobs=1)
    (function,) = found.functions
    assert found.status is Status.OK and found.compile_s and function["matrix_unit"] == unit
    assert 64 <= function["registers"] <= 255 and function["stack_bytes"] == 0 and function["threads"] == 128
    # Two stages of a 128x64 and a 128x64 tile in bf16 at least: 64 KB; the system's own 1 KB is not counted.
    assert 64 << 10 <= function["smem_bytes"] <= 128 << 10


def test_every_rule_drops_its_own_and_the_rest_is_kept(folder):
    pytest.importorskip("triton")
    wanted = [
        ({}, "ok", ""),
        ({"unused": 1}, "screened", "duplicate"),
        ({"bn": 256}, "screened", "spills"),
        ({"bn": 256, "num_warps": 8, "num_stages": 7}, "screened", "does not fit"),
        ({"num_warps": 8, "warp_specialize": True}, "screened", "silent no-op"),
        ({"fault": "raise"}, "compile_error", "compile error"),
        ({"fault": "abort"}, "crashed", "crashed"),
        ({"fault": "hang"}, "timeout", "timeout"),
        ({"bm": 64, "fault": "print"}, "ok", ""),
    ]
    configs = trials(folder, HOPPER, *(config for config, _, _ in wanted))
    done = []
    found = screen(configs, HOPPER, kernel_dirs=[folder], jobs=1, limits=Limits(timeout_s=25), on_done=done.append)
    assert [(s.status.value, s.rule) for s in found] == [(status, rule) for _, status, rule in wanted]
    assert [s.trial for s in found] == configs and len(done) == len(configs)
    assert found[5].reason == "ValueError: no such tile"
    assert tally(found)["kept"] == 2 and sum(tally(found).values()) == len(wanted)


def test_what_has_nothing_to_compile_is_kept_and_what_does_not_fit_says_why():
    library = next(k for k in discover().kernels.values() if k.library and "cpu" in k.kinds and k.problem_type is Matmul)
    trial = Trial.of(library, PROBLEM, library.default(PROBLEM, CPU), "cpu", Policy())
    unknown = dataclasses.replace(trial, kernel="matmul/none_such")
    kept, dropped = screen([trial, unknown], CPU, jobs=1)
    assert kept.status is Status.OK and kept.functions == []
    assert dropped.status is Status.UNSUPPORTED and "cannot be imported" in dropped.reason
