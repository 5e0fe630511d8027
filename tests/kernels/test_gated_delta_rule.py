"""The gated delta rule: its reference and costs against brute force, and faults that the check must find."""

import itertools
import math

import pytest
import torch
from contest import BLACKWELL, CPU, HOPPER

from klab.harness.measure.check import check, compare
from klab.kernels.contract import Chip
from klab.kernels.discover import discover
from klab.kernels.errors import UsageError
from klab.kernels.gated_delta_rule.problem import NORM_EPSILON, GatedDeltaRule

KERNELS = {k.name: k for k in discover().of("gated_delta_rule")}
ON_CPU = [k for k in KERNELS.values() if "cpu" in k.kinds]

SMALL = [
    GatedDeltaRule((3, 0, 2), 1, 2, 4, 3, dtype="float32"),
    GatedDeltaRule((4,), 2, 4, 3, 5, dtype="float32", qk_norm=False),
    GatedDeltaRule((1, 1), 1, 1, 2, 2, dtype="float32", state_dtype="bfloat16"),
]


def brute_force(problem, inputs):
    """One element of the state at a time, in Python's floats."""
    t = {name: tensor.tolist() for name, tensor in inputs.items()}
    p, out, final = problem, [], []
    for i in range(p.batch):
        heads = []
        for h in range(p.value_heads):
            state = [row[:] for row in t["initial_state"][i][h]]
            source = h * p.key_heads // p.value_heads
            for token in range(sum(p.seq_lens[:i]), sum(p.seq_lens[: i + 1])):
                q, k = t["q"][token][source], t["k"][token][source]
                if p.qk_norm:
                    q, k = ([x / math.sqrt(sum(y * y for y in row) + NORM_EPSILON) for x in row] for row in (q, k))
                state = [[math.exp(t["g"][token][h]) * x for x in row] for row in state]
                for c in range(p.value_dim):
                    seen = sum(state[r][c] * k[r] for r in range(p.key_dim))
                    correction = t["beta"][token][h] * (t["v"][token][h][c] - seen)
                    for r in range(p.key_dim):
                        state[r][c] += k[r] * correction
                    out.append((token, h, c, sum(state[r][c] * q[r] for r in range(p.key_dim)) / math.sqrt(p.key_dim)))
            heads.append(state)
        final.append(heads)
    made = torch.empty((p.tokens, p.value_heads, p.value_dim), dtype=torch.float64)
    for token, h, c, value in out:
        made[token, h, c] = value
    return {"out": made, "final_state": torch.tensor(final, dtype=torch.float64)}


@pytest.mark.parametrize("problem", SMALL, ids=lambda p: p.label())
def test_reference_agrees_with_brute_force(problem):
    inputs = problem.inputs(seed=3, row_padding=4)
    found, expected = problem.reference(inputs), brute_force(problem, inputs)
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("problem", SMALL, ids=lambda p: p.label())
def test_costs_agree_with_counting(problem):
    p = problem
    read = sum(t.numel() * t.element_size() for name, t in p.inputs(seed=0).items() if name != "seq_offsets")
    assert p.bytes_moved() == read + sum(t.numel() * t.element_size() for t in p.outputs().values())
    per_head = sum(1 + 2 + 2 + 2 for _ in itertools.product(range(p.key_dim), range(p.value_dim)))
    assert p.flops() == p.tokens * p.value_heads * per_head


def test_inputs_are_what_they_say():
    p = GatedDeltaRule((40, 3), 1, 2, 64, 32, decay=2.0)
    inputs = p.inputs(seed=1, row_padding=8)
    assert float(inputs["g"].max()) <= 0.0 and 1.5 < float(-inputs["g"].median()) < 2.7
    assert float(inputs["beta"].min()) >= 0.0 and float(inputs["beta"].max()) <= 1.0
    assert abs(float(inputs["k"].float().mean()) - p.key_offset) < 0.1
    assert all(t.stride(-1) == 1 and t.stride(-2) == t.shape[-1] + 8 for n, t in inputs.items() if n != "seq_offsets")
    assert inputs["seq_offsets"].tolist() == [0, 40, 43]


@pytest.mark.parametrize(
    "wrong",
    [
        {"seq_lens": ()}, {"seq_lens": (0, 0)}, {"seq_lens": (3, -1)}, {"key_heads": 3}, {"key_dim": 0}, {"decay": -0.1},
        {"state_dtype": "int8"},
    ],
)  # fmt: skip
def test_nonsense_is_refused(wrong):
    fields = {"seq_lens": (3,), "key_heads": 2, "value_heads": 4, "key_dim": 16, "value_dim": 16} | wrong
    with pytest.raises(UsageError):
        GatedDeltaRule(**fields)


def recurrence(problem, *, fault=""):
    """A right launch in float32, but for one fault."""

    def launch(inputs, outputs):
        p, group = problem, problem.value_heads // problem.key_heads
        q, k, v, g, beta = (inputs[n].float() for n in ("q", "k", "v", "g", "beta"))
        if p.qk_norm and fault != "no norm":
            q, k = (x * (x.square().sum(-1, keepdim=True) + NORM_EPSILON).rsqrt() for x in (q, k))
        repeat = (lambda x: x.repeat(1, group, 1)) if fault == "wrong heads" else (lambda x: x.repeat_interleave(group, 1))
        q, k = repeat(q * p.scale * (1.03 if fault == "scale" else 1.0)), repeat(k)
        for i, (first, end) in enumerate(itertools.pairwise(p.offsets)):
            state = inputs["initial_state"][i].float()
            if fault == "no initial state":
                state = torch.zeros_like(state)
            for t in range(first, end):
                chunk_start = (t - first) % 64 == 0 and t > first
                if fault == "state lost between chunks" and chunk_start:
                    state = torch.zeros_like(state)
                before = state
                if not (fault == "first decay of a chunk lost" and chunk_start):
                    state = state * g[t].exp()[:, None, None]
                seen = before if fault == "reads before decay" else state
                correction = beta[t][:, None] * (v[t] - torch.einsum("hkv,hk->hv", seen, k[t]))
                if fault == "last token of a chunk lost" and (t - first) % 64 == 63:
                    correction = torch.zeros_like(correction)
                state = state + k[t][:, :, None] * correction[:, None, :]
                if fault == "state of the token before" and t == end - 1:
                    outputs["final_state"][i] = before
                if fault == "state in bf16":
                    state = state.bfloat16().float()
                outputs["out"][t] = torch.einsum("hkv,hk->hv", before if fault == "out before correction" else state, q[t])
            if fault != "state of the token before" or end == first:
                outputs["final_state"][i] = state

    return launch


FAULTS = [
    "no norm", "wrong heads", "scale", "no initial state", "state lost between chunks", "first decay of a chunk lost", "reads before decay",
    "last token of a chunk lost", "state of the token before", "out before correction",
]  # fmt: skip
LONG = [
    GatedDeltaRule((150, 0, 64), 2, 4, 32, 16),
    GatedDeltaRule((200,), 2, 4, 64, 16, decay=0.3),
]


@pytest.mark.parametrize("problem", LONG, ids=lambda p: p.label())
def test_a_right_launch_passes_and_a_wrong_one_does_not(problem):
    right = check(problem, recurrence(problem), seed=1)
    assert right.passed and right.error < 0.5 * right.tolerance
    for fault in FAULTS:
        assert not check(problem, recurrence(problem, fault=fault), seed=2).passed, fault


def test_the_smallest_faults_of_a_decode_step_are_found():
    problem = GatedDeltaRule((1,) * 3, 1, 2, 128, 32)
    assert check(problem, recurrence(problem), seed=1).passed
    for fault in ("no norm", "scale", "no initial state", "reads before decay", "state of the token before", "out before correction"):
        assert not check(problem, recurrence(problem, fault=fault), seed=2).passed, fault


def test_a_state_in_bf16_between_few_tokens_is_found():
    for dtype in ("bfloat16", "float32"):
        problem = GatedDeltaRule((4,) * 16, 1, 2, 128, 32, dtype=dtype)
        assert check(problem, recurrence(problem), seed=1).passed
        assert not check(problem, recurrence(problem, fault="state in bf16"), seed=1).passed


def small_chip(smem_bytes: int) -> Chip:
    return Chip(**{**HOPPER.__dict__, "name": "small", "smem_per_block_bytes": smem_bytes})


@pytest.mark.parametrize("chip", [HOPPER, BLACKWELL, CPU, small_chip(99 << 10)], ids=lambda c: c.name)
@pytest.mark.parametrize("kernel", KERNELS.values(), ids=lambda k: k.name)
def test_the_default_fits_wherever_any_does(kernel, chip):
    """Also with 99 KiB of shared memory, as consumer chips have it."""
    if chip.kind not in kernel.kinds:
        pytest.skip(f"not on {chip.kind}")
    qwen = {"key_heads": 16, "value_heads": 32, "key_dim": 128, "value_dim": 128}
    problems = [
        *GatedDeltaRule.examples(),
        *GatedDeltaRule.at_scale(),
        GatedDeltaRule((4,) * 32, **qwen),
        GatedDeltaRule((900,) * 16, **qwen),
    ]
    for problem in problems:
        default = kernel.default(problem, chip)
        if kernel.fits(problem, default, chip) is not None:
            others = [c for c in kernel.space_of(problem, chip) if kernel.fits(problem, c, chip) is None]
            assert not others, f"{problem.label()}: {kernel.fits(problem, default, chip)}, but {others[0].label()} fits"


@pytest.mark.parametrize("kernel", KERNELS.values(), ids=lambda k: k.name)
def test_some_serving_problem_has_a_real_space(kernel):
    chip = CPU if kernel.backend == "torch" else HOPPER
    sizes = [len(list(kernel.space(p, chip))) for p in GatedDeltaRule.at_scale()]
    assert max(sizes) >= (1 if kernel.name == "torch_recurrent" else 5)


@pytest.mark.parametrize("kernel", ON_CPU, ids=lambda k: k.name)
def test_strong_and_no_decay_stay_finite(kernel):
    for decay in (0.0, 60.0):
        problem = GatedDeltaRule((80, 5), 1, 2, 32, 32, dtype="float32", decay=decay)
        assert check(problem, kernel.build(problem, kernel.default(problem, CPU), CPU), seed=5).passed


def test_single_strong_decays_cost_the_others_nothing():
    """In fp32: g = -100 on every eighth token, weak ones between."""
    problem = GatedDeltaRule((150,), 1, 2, 64, 32, dtype="float32")
    inputs = problem.inputs(seed=3)
    inputs["g"][::8] = -100.0
    expected = problem.reference(inputs)
    for kernel in ON_CPU:
        outputs = problem.outputs()
        kernel.build(problem, kernel.default(problem, CPU), CPU)(inputs, outputs)
        found = compare(problem, outputs, expected)
        assert found.passed and found.error < 1e-6, f"{kernel.name}: {found.error} {found.reason}"
