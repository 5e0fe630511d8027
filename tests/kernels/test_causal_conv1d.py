"""The short causal convolution: its reference and costs against brute force, and faults that the check must find."""

import math

import pytest
import torch
from contest import BLACKWELL, CPU, HOPPER

from klab.harness.measure.check import check
from klab.kernels.causal_conv1d.problem import CausalConv1d
from klab.kernels.discover import discover
from klab.kernels.errors import UsageError

KERNELS = {k.name: k for k in discover().of("causal_conv1d")}

SMALL = [
    CausalConv1d((1, 0, 2, 5), 3, dtype="float32"),
    CausalConv1d((4, 1), 2, width=2, activation="", dtype="float32"),
    CausalConv1d((1, 1), 5, width=3, dtype="float32"),
]


def brute_force(problem, inputs):
    """One channel of one token at a time, in Python's floats."""
    p, x, weight, state = problem, *(inputs[n].tolist() for n in ("x", "weight", "conv_state"))
    out, final, first = [], [], 0
    for i, length in enumerate(p.seq_lens):
        rows = state[i] + x[first : first + length]
        for t in range(length):
            sums = [sum(weight[c][j] * rows[t + j][c] for j in range(p.width)) for c in range(p.channels)]
            out.append([s / (1.0 + math.exp(-s)) if p.activation else s for s in sums])
        final.append(rows[length:])
        first += length
    return {"out": torch.tensor(out, dtype=torch.float64), "final_state": torch.tensor(final, dtype=torch.float64)}


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
    # A multiply-add per tap; an exponential, a sum, a quotient and a sign for SiLU.
    assert p.flops() == p.tokens * p.channels * (2 * p.width + (4 if p.activation else 0))


@pytest.mark.parametrize(
    "wrong", [{"seq_lens": ()}, {"seq_lens": (0,)}, {"seq_lens": (2, -1)}, {"channels": 0}, {"width": 1}, {"activation": "gelu"}]
)
def test_nonsense_is_refused(wrong):
    with pytest.raises(UsageError):
        CausalConv1d(**({"seq_lens": (3,), "channels": 16} | wrong))


def convolution(problem, *, fault=""):
    """A right launch in float32, but for one fault."""

    def launch(inputs, outputs):
        p, weight = problem, inputs["weight"].float()
        if fault == "taps reversed":
            weight = weight.flip(1)
        for i, (first, length) in enumerate(zip(p.offsets, p.seq_lens, strict=False)):
            state = inputs["conv_state"][i]
            if fault == "no state":
                state = torch.zeros_like(state)
            if fault == "state of the next sequence":
                state = inputs["conv_state"][(i + 1) % p.batch]
            seen = torch.cat([state, inputs["x"][first : first + length]])
            if length:
                shift = 1 if fault == "a token late" else 0
                rows = torch.cat([seen[:shift], seen[: len(seen) - shift]]).float()
                total = sum(rows[j : j + length] * weight[:, j] for j in range(1 if fault == "a tap lost" else 0, p.width))
                silu = p.activation and fault != "no activation"
                outputs["out"][first : first + length] = torch.nn.functional.silu(total) if silu else total
            kept = seen[length - 1 : -1] if fault == "state a token early" and length else seen[length:]
            outputs["final_state"][i] = kept

    return launch


FAULTS = ["taps reversed", "no state", "state of the next sequence", "a token late", "a tap lost", "no activation", "state a token early"]


@pytest.mark.parametrize("problem", [CausalConv1d((130, 0, 2), 40), CausalConv1d((1, 1, 1), 64)], ids=lambda p: p.label())
def test_a_right_launch_passes_and_a_wrong_one_does_not(problem):
    right = check(problem, convolution(problem), seed=1)
    assert right.passed and right.error < 0.7 * right.tolerance
    for fault in FAULTS:
        assert not check(problem, convolution(problem, fault=fault), seed=2).passed, fault


def test_a_lost_state_shows_in_a_long_sequence():
    """Three tokens of 4096: the rows that it reaches are off by more than any rounding."""
    problem = CausalConv1d((4096,), 16)
    assert check(problem, convolution(problem), seed=1).passed
    assert not check(problem, convolution(problem, fault="no state"), seed=1).passed


@pytest.mark.parametrize("chip", [HOPPER, BLACKWELL, CPU], ids=lambda c: c.name)
@pytest.mark.parametrize("kernel", KERNELS.values(), ids=lambda k: k.name)
def test_the_default_fits_wherever_any_does(kernel, chip):
    if chip.kind not in kernel.kinds:
        pytest.skip(f"not on {chip.kind}")
    for problem in [*CausalConv1d.examples(), *CausalConv1d.at_scale(), CausalConv1d((1,), 8192), CausalConv1d((700, 3, 0), 6144)]:
        default = kernel.default(problem, chip)
        if kernel.fits(problem, default, chip) is not None:
            others = [c for c in kernel.space_of(problem, chip) if kernel.fits(problem, c, chip) is None]
            assert not others, f"{problem.label()}: {kernel.fits(problem, default, chip)}, but {others[0].label()} fits"


@pytest.mark.parametrize("kernel", [k for k in KERNELS.values() if k.backend in ("triton", "cuda")], ids=lambda k: k.name)
def test_serving_problems_have_a_real_space(kernel):
    assert all(len(list(kernel.space(p, HOPPER))) >= 4 for p in CausalConv1d.at_scale())


@pytest.mark.skipif("cuda_conv" not in KERNELS, reason="CuPy is not installed")
def test_rows_that_start_between_16_bytes_are_refused():
    problem = CausalConv1d((4,), 16, dtype="float16")
    kernel = KERNELS["cuda_conv"]
    launch = kernel.build(problem, kernel.default(problem, HOPPER), HOPPER)
    with pytest.raises(UsageError, match="16"):
        launch(problem.inputs(seed=0, row_padding=3), problem.outputs())
