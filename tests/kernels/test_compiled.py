"""Every Triton and CUDA C++ kernel compiles for sm_90 and sm_100 with no GPU: its default, at serving shapes."""

import pytest
from contest import kernels

from klab.harness.catalog import find_chip
from klab.harness.plan.trials import default_policy, trials
from klab.harness.store.result import Status
from klab.harness.tune.screen import screen
from klab.kernels.discover import discover

COMPILED = kernels("triton", "cuda")
# One process compiles; the mark is static because pytest-xdist reads it before the hook in tests/conftest.py adds others.
pytestmark = pytest.mark.xdist_group("compiled")


def serving_trials(chip):
    """Per kernel the first problem of its operator, at the size that serving has, that it takes (klab resources compiles all)."""
    made = []
    for kernel in COMPILED:
        fitting = [p for p in kernel.problem_type.at_scale() if kernel.unfit(p, chip) is None]
        made += trials(fitting[:1], [kernel], chip, default_policy(chip), "default").trials
    return made


def for_this_chip(chip):
    """The kernels that take some example on this chip: a kernel for tcgen05 has none on Hopper."""
    return {k.id for k in COMPILED if any(k.unfit(p, chip) is None for p in k.problem_type.examples())}


def test_every_operator_has_problems_at_scale():
    assert not [name for name, problem_type in discover().operators.items() if not problem_type.at_scale()]


@pytest.fixture(scope="module", params=["h200", "b200"])
def screened(request):
    pytest.importorskip("triton")
    pytest.importorskip("cupy")
    chip = find_chip(request.param)
    return chip, screen(serving_trials(chip), chip, jobs=2)


def test_all_compile(screened):
    chip, found = screened
    assert {item.trial.kernel for item in found} == for_this_chip(chip)
    failed = [item for item in found if item.status not in (Status.OK, Status.SCREENED)]
    assert not failed, "\n".join(f"{s.trial.kernel} {s.trial.problem.label()} {s.trial.config.label()}: {s.reason}" for s in failed)
    assert all(item.functions for item in found)


def test_no_default_is_dropped(screened):
    chip, found = screened
    by_id = {kernel.id: kernel for kernel in COMPILED}
    dropped = [
        f"{item.trial.kernel} {item.trial.problem.label()}: {item.rule}: {item.reason}"
        for item in found
        if item.trial.config == by_id[item.trial.kernel].default(item.trial.problem, chip) and item.status is not Status.OK
    ]
    assert not dropped, "\n".join(dropped)


def test_large_tiles_use_the_chips_matrix_unit(screened):
    chip, found = screened
    unit = {"h200": "wgmma", "b200": "tcgen05"}[chip.name]
    using = {item.trial.kernel for item in found if any(f["matrix_unit"] == unit for f in item.functions)}
    # CUDA C++ runs on mma.sync on every chip but for cuda_wgmma, and decoding has too few rows for the large units.
    assert {"matmul/triton_tiled", "matmul/triton_persistent", "prefill_attention/triton_flash"} <= using
