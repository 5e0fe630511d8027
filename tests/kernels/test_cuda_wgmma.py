"""The matmul on wgmma and TMA: rings and tiles beyond the default, and that faults planted in its source are found."""

import dataclasses

import pytest
import torch
from contest import BLACKWELL, HOPPER
from cuda_emulator import EmulationError, Emulator

from klab.harness.measure.check import check
from klab.kernels.cuda_module import backend
from klab.kernels.matmul import cuda_wgmma as file
from klab.kernels.matmul.cuda_wgmma import WgmmaConfig, cuda_wgmma
from klab.kernels.matmul.problem import Matmul

emulated = pytest.mark.skipif(bool(Emulator.missing()), reason=Emulator.missing() or "g++ is here")
SMALL = Matmul(130, 136, 200, "float16")
RING = WgmmaConfig(2, 64, 64, 2, 1)


@pytest.fixture(autouse=True)
def nan_in_fresh_tensors():
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def found(problem, config, *, order=0, early=False, padding=0):
    with backend(Emulator(order=order, land_early=early)):
        return check(problem, cuda_wgmma.build(problem, config, HOPPER), seed=1, row_padding=padding)


@emulated
@pytest.mark.parametrize("early", [False, True])
@pytest.mark.parametrize(
    ("problem", "config"),
    [
        (SMALL, RING),
        (Matmul(300, 72, 264, "bfloat16"), WgmmaConfig(1, 128, 32, 3, 2)),
        (Matmul(70, 40, 72, "float16"), WgmmaConfig(3, 64, 32, 4, 1)),
    ],
    ids=lambda v: v.label(),
)
def test_rings_and_tiles(problem, config, early):
    assert cuda_wgmma.fits(problem, config, HOPPER) is None
    for order in (0, 1):
        judged = found(problem, config, order=order, early=early, padding=8 * order)
        assert judged.passed, judged.reason


FAULTS = {
    "the ring is overwritten before it is read": (
        "barrier_wait(empty + stage, (round & 1) ^ 1);",
        "if (!round) barrier_wait(empty + stage, 1);",
    ),
    "products begin before the data have come": ("barrier_wait(full + stage, round & 1);", ""),
    "a stage is freed before its products have ended": (
        "if (step > 0 && thread_idx() % 32 == 0) barrier_arrive(empty + before);",
        "if (thread_idx() % 32 == 0) barrier_arrive(empty + stage);",
    ),
    "the next 16 columns begin 16 bytes on": ("w_at + 32 * i", "w_at + 16 * i"),
    "sums are stored before the last products": ("wgmma_wait<0>();\n", ""),
    "the rows of the second warpgroup are the first's": ("+ first_row * 128;", ";"),
    "the columns of four lanes are not exchanged": ("for (int bit = 1; bit <= 2; bit *= 2)", "for (int bit = 1; bit <= 1; bit *= 2)"),
    "a tile's rows run over the edge": ("at < m && column < n", "column < n"),
}  # fmt: skip


@emulated
@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found(fault, monkeypatch):
    right, wrong = FAULTS[fault]
    assert file.SOURCE.count(right) == 1
    monkeypatch.setattr(file, "SOURCE", file.SOURCE.replace(right, wrong))
    try:
        judged = [found(SMALL, RING, order=order, early=early) for order, early in ((0, False), (1, True))]
    except EmulationError:
        return
    assert not all(one.passed for one in judged)


def test_what_does_not_fit_says_why():
    assert "Hopper" in cuda_wgmma.unfit(SMALL, BLACKWELL)
    for problem, word in (
        (dataclasses.replace(SMALL, layout="nn"), "layout"),
        (Matmul(64, 64, 36), "multiples of 8"),
        (Matmul(64, 64, 64, "float32"), "float32"),
    ):
        assert word in cuda_wgmma.unfit(problem, HOPPER)
    assert "registers" in cuda_wgmma.fits(SMALL, WgmmaConfig(2, 128, 256, 2, 1), HOPPER)
    assert "shared memory" in cuda_wgmma.fits(SMALL, WgmmaConfig(2, 64, 256, 6, 1), HOPPER)
    assert "starts with 128 registers" in cuda_wgmma.fits(SMALL, WgmmaConfig(3, 64, 256, 2, 1), HOPPER)
    assert cuda_wgmma.fits(SMALL, WgmmaConfig(2, 64, 256, 2, 1), HOPPER) is None


def test_the_space_has_no_candidate_twice():
    space = list(cuda_wgmma.space(Matmul(4096, 4096, 4096), HOPPER))
    assert len(space) == len(set(space)) > 30
