"""Indexer scores: the reference against brute force, costs against counting, and a check that bites, -inf included."""

import pytest
import torch
from contest import BLACKWELL, CPU, HOPPER

from klab.harness.measure.check import check, compare, distance
from klab.kernels.discover import discover
from klab.kernels.errors import UsageError
from klab.kernels.index_scores.problem import IndexScores

KERNELS = {k.name: k for k in discover().of("index_scores")}
ON_CPU = [k for k in KERNELS.values() if "cpu" in k.kinds]
COMPILED = [k for k in KERNELS.values() if k.backend in ("triton", "cuda")]
AWKWARD = [
    IndexScores(1, 1, 1, 1, 16, "float32"),
    IndexScores(2, 5, 5, 3, 16, "float32"),
    IndexScores(2, 2, 9, 2, 16, "float32", page_size=4),
    IndexScores(1, 3, 7, 2, 16, "float32", "fp8", page_size=4),
    IndexScores(2, 3, 7, 2, 16, "float32", "fp8"),
]


def key_of(problem, inputs, b, s):
    """One key in float64, scaled."""
    if not problem.page_size:
        return inputs["k"][b, s].double() * (inputs["k_scale"][b, s].double() if problem.format else 1.0)
    at = int(inputs["block_table"][b, s // problem.page_size]), s % problem.page_size
    return inputs["k_cache"][at].double() * (inputs["k_scale"][at].double() if problem.format else 1.0)


@pytest.mark.parametrize("problem", AWKWARD, ids=lambda p: p.label())
def test_reference_and_costs_agree_with_brute_force(problem):
    inputs = problem.inputs(seed=3, row_padding=8)
    reference, pairs = problem.reference(inputs)["scores"], 0
    for b in range(problem.batch):
        for t in range(problem.q_len):
            for s in range(problem.kv_len):
                if s > problem.kv_len - problem.q_len + t:
                    assert reference[b, t, s] == -torch.inf
                    continue
                pairs += 1
                q, w = inputs["q"][b, t].double(), inputs["weights"][b, t].double()
                expected = sum(float(w[h]) * max(0.0, float(q[h] @ key_of(problem, inputs, b, s))) for h in range(problem.heads))
                assert float(reference[b, t, s]) == pytest.approx(expected, abs=1e-6)
    assert problem.flops() == 2 * pairs * problem.heads * (problem.head_dim + 1)


def test_inputs_are_as_described():
    problem = IndexScores(2, 3, 70, 4, 64, format="fp8", page_size=16)
    inputs, padded = problem.inputs(seed=1), problem.inputs(seed=1, row_padding=8)
    assert sorted(inputs["block_table"].flatten().tolist()) == list(range(problem.pages))
    assert padded["k_cache"].stride(-2) == padded["q"].stride(-2) == 80
    # Quantised and not, the scores are nearly the same: e4m3 keeps 4 bits, and 64 x 4 products average.
    wide = problem.wide()
    near, exact = problem.reference(inputs), wide.reference(problem.wide_inputs(seed=1))
    assert 0.0 < distance(near, exact) < 0.06
    assert problem.math_dtype == "float8_e4m3fn" and wide.math_dtype == "bfloat16"
    for fields in ({"q_len": 71}, {"format": "int8"}, {"heads": 0}):
        with pytest.raises(UsageError):
            IndexScores(**{"batch": 1, "q_len": 1, "kv_len": 70, "heads": 4, "head_dim": 64, **fields})


def score(problem, *, causal=0, heads=0, relu=True, scales=True):
    """A right kernel in float32, but for: a causal mask shifted, heads dropped, ReLU left out, the keys' scales ignored."""

    def launch(inputs, outputs):
        for b in range(problem.batch):
            k = inputs["k"][b].float()
            if problem.format:
                k = k * (inputs["k_scale"][b][:, None] if scales else inputs["k_scale"][b].mean())
            each = torch.einsum("thd,sd->ths", inputs["q"][b].float(), k)
            w = inputs["weights"][b].clone()
            w[:, problem.heads - heads :] = 0.0
            found = torch.einsum("ths,th->ts", each.relu() if relu else each, w)
            position = torch.arange(problem.q_len)[:, None] + problem.kv_len - problem.q_len + causal
            outputs["scores"][b] = found.masked_fill(torch.arange(problem.kv_len) > position, -torch.inf)

    return launch


@pytest.mark.parametrize("form", ["", "fp8"])
@pytest.mark.parametrize("shape", [(1, 64, 2048), (2, 1, 3000), (1, 300, 300)])
def test_a_right_kernel_passes_and_a_wrong_one_does_not(shape, form):
    problem = IndexScores(*shape, 64, 128, format=form)
    right = check(problem, score(problem), seed=1)
    assert right.passed and right.error < 0.1 * right.tolerance
    for fault in [
        {"causal": -1},
        {"heads": 1},
        {"relu": False},
        *([{"causal": 1}] if problem.q_len > 1 else []),
        *([{"scales": False}] if form else []),
    ]:
        assert not check(problem, score(problem, **fault), seed=2).passed, fault


def test_hidden_positions_are_judged_by_place():
    problem = IndexScores(1, 2, 5, 1, 16)
    reference = problem.reference(problem.inputs(seed=1))
    right = {"scores": reference["scores"].clone()}
    assert compare(problem, right, reference).passed
    for place, value in (((0, 0, 4), 0.0), ((0, 0, 4), float("nan")), ((0, 1, 4), -torch.inf), ((0, 0, 0), float("nan"))):
        wrong = {"scores": reference["scores"].clone()}
        wrong["scores"][place] = value
        assert not compare(problem, wrong, reference).passed, (place, value)


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
    for problem in IndexScores.at_scale():
        space = list(kernel.space(problem, chip))
        assert space[0] == kernel.default(problem, chip)
        assert len(space) == len(set(space)) > 5


@pytest.mark.parametrize("kernel", ON_CPU, ids=lambda k: k.name)
def test_float16_next_to_fp8_does_not_overflow(kernel):
    """Products of e4m3 values reach 448^2 head_dim, far above 65504."""
    for shape in ((1, 3, 40, 8, 128), (1, 2, 40, 32, 128)):
        for page_size in (0, 16):
            problem = IndexScores(*shape, "float16", "fp8", page_size=page_size)
            found = check(problem, kernel.build(problem, kernel.default(problem, CPU), CPU), seed=5)
            assert found.passed, f"{problem.label()}: {found.reason}"


def test_few_heads_or_outputs_pass_on_every_seed():
    """What a 16-bit library rounds averages over heads and outputs; where they are few, the tolerance is wider."""
    kernel = KERNELS["torch_matmul"]
    for shape in ((1, 8, 100, 5), (1, 1, 64, 2), (1, 1, 64, 15), (1, 1, 130, 4), (1, 1, 130, 16)):
        problem = IndexScores(*shape, 64)
        launch = kernel.build(problem, kernel.default(problem, CPU), CPU)
        assert all(check(problem, launch, seed=seed).passed for seed in range(40)), problem.label()
