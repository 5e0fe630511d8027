"""Sparse latent attention: the reference against brute force, costs against the lists that are drawn, and a check that bites."""

import math

import pytest
import torch
from contest import BLACKWELL, CPU, HOPPER

from klab.harness.measure.check import check
from klab.kernels.discover import discover
from klab.kernels.errors import UsageError
from klab.kernels.sparse_latent_attention.problem import SparseLatentAttention

KERNELS = {k.name: k for k in discover().of("sparse_latent_attention")}
ON_CPU = [k for k in KERNELS.values() if "cpu" in k.kinds]
COMPILED = [k for k in KERNELS.values() if k.backend in ("triton", "cuda")]
SMALL = {"kv_lora_rank": 16, "rope_dim": 16, "page_size": 8, "dtype": "float32"}
AWKWARD = [
    SparseLatentAttention(1, 1, 1, 1, **SMALL),
    SparseLatentAttention(4, 9, 5, 2, **SMALL),
    SparseLatentAttention(6, 3, 4, 2, **SMALL),
    SparseLatentAttention(4, 20, 30, 3, sequences=2, **SMALL),
]


@pytest.mark.parametrize("problem", AWKWARD, ids=lambda p: p.label())
def test_reference_agrees_with_brute_force(problem):
    inputs = problem.inputs(seed=3, row_padding=8)
    reference = problem.reference(inputs)["out"].double()
    for t in range(problem.tokens):
        slots = [s for s in inputs["indices"][t].tolist() if s >= 0]
        rows = [inputs["kv_cache"][s // problem.page_size, s % problem.page_size].double() for s in slots]
        for h in range(problem.heads):
            logits = [float(inputs["q"][t, h].double() @ row) / math.sqrt(problem.qk_dim) for row in rows]
            weights = [math.exp(x - max(logits)) for x in logits]
            expected = sum(
                (w / sum(weights) * r for w, r in zip(weights, rows, strict=True)), torch.zeros(problem.dim, dtype=torch.float64)
            )
            assert torch.allclose(reference[t, h], expected[: problem.kv_lora_rank], atol=1e-6)


@pytest.mark.parametrize("problem", [*AWKWARD, SparseLatentAttention(6, 700, 200, 1, **SMALL)], ids=lambda p: p.label())
def test_lists_and_costs_are_as_described(problem):
    inputs = problem.inputs(seed=4)
    touched, listed = set(), 0
    for t, row in enumerate(inputs["indices"].tolist()):
        slots = [s for s in row if s >= 0]
        assert len(slots) == len(set(slots)) == min(problem.topk, problem.visible(t))
        assert all(s >= problem.page_size for s in slots), "page 0 belongs to nobody"
        touched |= set(slots)
        listed += len(slots)
    assert problem.flops() == 2 * listed * problem.heads * (problem.dim + problem.kv_lora_rank)
    own = problem.tokens * (problem.heads * (problem.dim + problem.kv_lora_rank) + problem.topk) * 4
    # The lists are random: how much they overlap is known on average.
    assert (problem.bytes_moved() - own) / (problem.dim * 4) == pytest.approx(len(touched), rel=0.1)


def test_sequences_have_rows_of_their_own():
    problem = SparseLatentAttention(4, 50, 20, 1, sequences=2, **SMALL)
    lists = [{s for s in row if s >= 0} for row in problem.inputs(seed=1)["indices"].tolist()]
    assert lists[0] & lists[1] and lists[2] & lists[3] and not (lists[0] | lists[1]) & (lists[2] | lists[3])
    with pytest.raises(UsageError):
        SparseLatentAttention(3, 50, 20, 1, sequences=2)
    with pytest.raises(UsageError):
        SparseLatentAttention(1, 50, 0, 1)


def attend(problem, *, lost=0, scale=1.0, holes=False):
    """A right kernel in float32, but for: the last slots of each list lost, a scale that is off, holes read as slot 0."""

    def launch(inputs, outputs):
        cache = inputs["kv_cache"].flatten(0, 1).float()
        for t, row in enumerate(inputs["indices"]):
            slots = row.clamp(min=0) if holes else row[row >= 0]
            slots = slots[: len(slots) - lost].long()
            rows = cache[slots]
            weights = (inputs["q"][t].float() @ rows.T * problem.scale * scale).softmax(-1)
            outputs["out"][t] = weights @ rows[:, : problem.kv_lora_rank]

    return launch


@pytest.mark.parametrize(
    "problem",
    [
        SparseLatentAttention(2, 5000, 2048, 4, kv_lora_rank=128),
        SparseLatentAttention(4, 900, 1000, 4, kv_lora_rank=128),
        SparseLatentAttention(3, 2500, 2048, 2, kv_lora_rank=128, sequences=3),
    ],
    ids=lambda p: p.label(),
)
def test_a_right_kernel_passes_and_a_wrong_one_does_not(problem):
    right = check(problem, attend(problem), seed=1)
    assert right.passed and right.error < 0.5 * right.tolerance
    holes = problem.topk > problem.kv_len
    for fault in [{"lost": 1}, {"scale": 1.02}, *([{"holes": True}] if holes else [])]:
        for seed in (2, 3):
            assert not check(problem, attend(problem, **fault), seed=seed).passed, fault


@pytest.mark.parametrize("kernel", ON_CPU, ids=lambda k: k.name)
def test_cpu_kernels_on_awkward_problems(kernel):
    for problem in AWKWARD:
        for config in kernel.space(problem, CPU):
            found = check(problem, kernel.build(problem, config, CPU), seed=11)
            assert found.passed, f"{problem.label()} {config.label()}: {found.reason}"
        kernel.build(problem, kernel.default(problem, CPU), CPU)(problem.inputs(seed=0, device="meta"), problem.outputs(device="meta"))


@pytest.mark.parametrize("chip", [HOPPER, BLACKWELL], ids=lambda c: c.name)
@pytest.mark.parametrize("kernel", COMPILED, ids=lambda k: k.name)
def test_spaces(kernel, chip):
    for problem in SparseLatentAttention.at_scale():
        space = list(kernel.space(problem, chip))
        assert space[0] == kernel.default(problem, chip)
        assert len(space) == len(set(space)) > 20
