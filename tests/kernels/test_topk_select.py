"""Top-k selection: what counts as right, and that kernels end on rows that are hard for bisection."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from contest import BLACKWELL, CPU, HOPPER
from cuda_emulator import Emulator

from klab.harness.measure.check import check
from klab.kernels.cuda_module import backend
from klab.kernels.discover import discover
from klab.kernels.errors import UsageError
from klab.kernels.topk_select.problem import TopkSelect

KERNELS = {k.name: k for k in discover().of("topk_select")}
ON_CPU = [k for k in KERNELS.values() if "cpu" in k.kinds]
COMPILED = [k for k in KERNELS.values() if k.backend in ("triton", "cuda")]


def judged(problem, scores, rows):
    """What `mismatch` says of these indices."""
    reference = problem.reference({"scores": torch.tensor(scores)})
    return problem.mismatch("indices", torch.tensor(rows, dtype=torch.int32), reference)


def test_what_is_right():
    problem = TopkSelect(1, 5, 3)
    tied = [[3.0, 1.0, 2.0, 2.0, 2.0]]
    assert not judged(problem, tied, [[0, 2, 3]]) and not judged(problem, tied, [[4, 0, 2]])
    for wrong in ([0, 2, 2], [0, 2, 1], [0, 2, -1], [0, 2, 5], [2, 3, 4], [-2, 0, 2]):
        assert judged(problem, tied, [wrong]), wrong
    hidden = [[1.0, -torch.inf, 2.0, -torch.inf, -torch.inf]]
    assert not judged(problem, hidden, [[-1, 0, 2]]) and not judged(problem, hidden, [[2, 0, -1]])
    for wrong in ([0, 2, 1], [0, -1, -1], [0, 2, 2]):
        assert judged(problem, hidden, [wrong]), wrong
    wide = TopkSelect(1, 2, 4)
    assert not judged(wide, [[1.0, 2.0]], [[-1, 0, 1, -1]]) and judged(wide, [[1.0, 2.0]], [[-1, 0, 0, 1]])


def test_problem_is_as_described():
    problem = TopkSelect(4, 6, 3, causal=True)
    scores = problem.inputs(seed=1)["scores"]
    assert [int(row.isfinite().sum()) for row in scores] == [3, 4, 5, 6] == [problem.visible(r) for r in range(4)]
    assert problem.flops() == 18 and problem.bytes_moved() == 4 * 24 + 4 * 12
    with pytest.raises(UsageError):
        TopkSelect(1, 0, 1)


@pytest.mark.parametrize("lost", ["one", "swapped"])
def test_the_check_bites(lost):
    problem = TopkSelect(3, 3000, 512)

    def launch(inputs, outputs):
        best = inputs["scores"].topk(513, dim=1).indices.int()
        outputs["indices"].copy_(best[:, :512])
        outputs["indices"][1, 511] = -1 if lost == "one" else best[1, 512]

    assert not check(problem, launch, seed=1).passed


def hard_rows(width):
    """Rows on which interpolation or bisection of floats has a long way to go."""
    ramp = torch.arange(width, dtype=torch.float32)
    return {
        "equal": torch.zeros(width),
        "two values": (ramp % 2),
        "signs": torch.where(ramp % 2 == 0, ramp * 1e-38, -ramp),
        "powers": torch.ldexp(torch.ones(width), (ramp % 250 - 125).int()),
        "infinite": torch.where(ramp == 3, torch.inf, ramp),
        "hidden but one": torch.where(ramp == 7, ramp, -torch.inf),
        "all hidden": torch.full((width,), -torch.inf),
        "as many as wanted": torch.where(ramp < 40, ramp, -torch.inf),
    }


class HardRows(TopkSelect):
    """The same problem on `hard_rows`."""

    def inputs(self, *, seed, device="cpu", row_padding=0):
        return {"scores": torch.stack(list(hard_rows(self.width).values()))}


HARD = HardRows(8, 200, 40)


@pytest.mark.parametrize("kernel", ON_CPU, ids=lambda k: k.name)
def test_cpu_kernels_on_hard_rows(kernel):
    for config in kernel.space(HARD, CPU):
        assert check(HARD, kernel.build(HARD, config, CPU), seed=1).passed, config.label()
    kernel.build(HARD, kernel.default(HARD, CPU), CPU)(TopkSelect(8, 200, 40).inputs(seed=0, device="meta"), HARD.outputs(device="meta"))


@pytest.mark.skipif(bool(Emulator.missing()), reason="needs g++")
@pytest.mark.parametrize("chunk", [256, 128])
def test_cuda_kernel_on_hard_rows(chunk):
    kernel = KERNELS["cuda_bisect"]
    config = kernel.config_type(chunk, 2)
    assert kernel.fits(HARD, config, HOPPER) is None
    with backend(Emulator()):
        found = check(HARD, kernel.build(HARD, config, HOPPER), seed=1)
    assert found.passed, found.reason


@pytest.mark.interpreter
def test_triton_kernel_on_hard_rows():
    script = (
        "from test_topk_select import *\nfor chunk in (256, 128):\n    k = KERNELS['triton_bisect']\n"
        "    found = check(HARD, k.build(HARD, k.config_type(chunk, 2), HOPPER), seed=1)\n    assert found.passed, found.reason"
    )
    folder = Path(__file__).parent
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": f"{folder}:{folder.parent}"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=280, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("chip", [HOPPER, BLACKWELL], ids=lambda c: c.name)
@pytest.mark.parametrize("kernel", COMPILED, ids=lambda k: k.name)
def test_spaces(kernel, chip):
    for problem in TopkSelect.at_scale():
        space = list(kernel.space(problem, chip))
        assert space[0] == kernel.default(problem, chip)
        assert len(space) == len(set(space)) > 5
