"""Every Triton and CUDA C++ kernel compiles for sm_90 and sm_100 with no GPU: its default and a sample of its space, at serving shapes."""

import pytest
from contest import kernels

from klab.harness.catalog import find_chip, find_model
from klab.harness.plan import plan, scenario_for
from klab.harness.plan.trials import default_policy, trials
from klab.harness.store.result import Status
from klab.harness.tune.screen import screen

SAMPLE = 2
COMPILED = kernels("triton", "cuda")


def serving_problems(chip):
    """One problem per operator and phase of llama-3.1-8b: the heaviest of each."""
    model = find_model("llama-3.1-8b")
    rows = [row for row in plan(model, chip, scenario_for(model, chip, batches=(16,))).rows if row.problem]
    heaviest = {}
    for row in sorted(rows, key=lambda row: row.bound_us):
        heaviest[row.operator, row.phase] = row.problem
    return list(heaviest.values())


@pytest.fixture(scope="module", params=["h200", "b200"])
def screened(request):
    pytest.importorskip("triton")
    pytest.importorskip("cupy")
    chip = find_chip(request.param)
    made = trials(serving_problems(chip), COMPILED, chip, default_policy(chip), f"sample:{SAMPLE}").trials
    return chip, screen(made, chip, jobs=2)


def test_all_compile(screened):
    _, found = screened
    assert {item.trial.kernel for item in found} == {kernel.id for kernel in COMPILED}
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
    # CUDA C++ runs on mma.sync on every chip, and decoding has too few rows for the large units.
    assert {"matmul/triton_tiled", "matmul/triton_persistent", "prefill_attention/triton_flash"} <= using
