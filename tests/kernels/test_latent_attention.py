"""Latent attention: reference and costs against brute force, a check that bites, and what kernels promise beyond the examples."""

import itertools
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from contest import BLACKWELL, CPU, HOPPER

from klab.harness.measure.check import check
from klab.kernels.discover import discover
from klab.kernels.errors import UsageError
from klab.kernels.latent_attention.problem import LatentAttention
from klab.kernels.latent_tiles import choose, shape_of

KERNELS = {k.name: k for k in discover().of("latent_attention")}
ON_CPU = [k for k in KERNELS.values() if "cpu" in k.kinds]
COMPILED = [k for k in KERNELS.values() if k.backend in ("triton", "cuda")]
SMALL = {"kv_lora_rank": 16, "rope_dim": 16, "page_size": 16}
AWKWARD = [
    LatentAttention((1,), 1, **SMALL, dtype="float32"),
    LatentAttention((15, 16, 17, 32), 3, **SMALL, dtype="float32"),
    LatentAttention((0, 33, 0), 2, **SMALL, dtype="float32"),
    LatentAttention((40, 3), 2, q_len=3, **{**SMALL, "page_size": 7}, dtype="float32"),
    LatentAttention((9, 20), 2, **SMALL, kv_dtype="float8_e4m3fn", dtype="float32"),
]


def rows_of(problem, inputs, i):
    """The cached rows of a sequence in float64, scaled, with those behind its end."""
    rows = inputs["kv_cache"][inputs["block_table"][i, : -(-problem.kv_lens[i] // problem.page_size)].long()].flatten(0, 1).double()
    return rows * inputs["kv_scale"].double() if problem.kv_dtype else rows


def brute_force(problem, inputs):
    """One query, one head, one key at a time, in float64."""
    out = torch.zeros((problem.batch, problem.q_len, problem.heads, problem.kv_lora_rank), dtype=torch.float64)
    for i, length in enumerate(problem.kv_lens):
        rows = rows_of(problem, inputs, i) if length else None
        for t, h in itertools.product(range(problem.q_len if length else 0), range(problem.heads)):
            seen = range(length - problem.q_len + t + 1)
            logits = [float(inputs["q"][i, t, h].double() @ rows[j]) / math.sqrt(problem.qk_dim) for j in seen]
            weights = [math.exp(x - max(logits)) for x in logits]
            for j in seen:
                out[i, t, h] += weights[j] / sum(weights) * rows[j, : problem.kv_lora_rank]
    return out


@pytest.mark.parametrize("problem", AWKWARD, ids=lambda p: p.label())
def test_reference_agrees_with_brute_force(problem):
    inputs = problem.inputs(seed=3, row_padding=8)
    expected = brute_force(problem, inputs)
    assert float((problem.reference(inputs)["out"].double() - expected).norm()) <= 1e-6 * float(expected.norm())


@pytest.mark.parametrize("problem", AWKWARD, ids=lambda p: p.label())
def test_costs_agree_with_counting(problem):
    pairs = sum(n - problem.q_len + t + 1 for n in problem.kv_lens if n for t in range(problem.q_len))
    assert problem.flops() == 2 * pairs * problem.heads * (problem.dim + problem.kv_lora_rank)
    size = 1 if problem.kv_dtype else 4
    tokens = problem.batch * problem.q_len * problem.heads * (problem.dim + problem.kv_lora_rank) * 4
    assert problem.bytes_moved() == sum(problem.kv_lens) * problem.dim * size + tokens


def test_inputs_are_as_described():
    problem = LatentAttention((33, 0, 16), 2, **SMALL)
    inputs, padded = problem.inputs(seed=1), problem.inputs(seed=1, row_padding=8)
    table = inputs["block_table"].tolist()
    assert [sum(page >= 0 for page in row) for row in table] == [3, 0, 1]
    assert sorted(page for row in table for page in row if page >= 0) == list(range(problem.pages)), "every page has one owner"
    assert padded["kv_cache"].stride(-2) == 40 and padded["q"].stride(-2) == 40
    assert LatentAttention.from_json(problem.to_json()) == problem
    narrow = LatentAttention((33, 20), 2, **SMALL, kv_dtype="float8_e4m3fn")
    wide, cache = narrow.wide_inputs(seed=2)["kv_cache"].float(), narrow.inputs(seed=2, row_padding=8)
    assert cache["kv_cache"].stride(-2) == 48
    # e4m3 has 4 significand bits: half a unit in the last place is 1/16 at most.
    assert float((cache["kv_cache"].float() * cache["kv_scale"] - wide).norm() / wide.norm()) < 1 / 16
    assert narrow.wide() == LatentAttention((33, 20), 2, **SMALL)


@pytest.mark.parametrize("fields", [{"kv_lens": ()}, {"kv_lens": (0, 0)}, {"kv_lens": (3, 2), "q_len": 3}, {"kv_dtype": "int8"}])
def test_impossible_problems_are_refused(fields):
    with pytest.raises(UsageError):
        LatentAttention(**({"kv_lens": (8,), "heads": 4} | fields))


def attend(problem, *, first=0, last=0, causal=0, scale=1.0, overrun=0, kv_scale=1.0):
    """A right kernel in float32, but for: keys dropped at the ends, a causal mask shifted, a scale off, slots read past the end."""

    def launch(inputs, outputs):
        for i, length in enumerate(problem.kv_lens):
            rows = rows_of(problem, inputs, i)[: length + overrun].float() * kv_scale
            scores = torch.einsum("qhd,kd->hqk", inputs["q"][i].float(), rows) * problem.scale * scale
            position = torch.arange(problem.q_len)[:, None] + length - problem.q_len
            key = torch.arange(len(rows))[None, :]
            hidden = (key > position + causal + overrun) | (key < first) | (key >= length - last + overrun)
            weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
            outputs["out"][i] = torch.einsum("hqk,kd->qhd", weights, rows[:, : problem.kv_lora_rank])

    return launch


SERVING = [
    LatentAttention((8705,), 4, kv_lora_rank=128),
    LatentAttention((8705, 600), 4, kv_lora_rank=128, q_len=4),
    LatentAttention((16386,), 2, kv_lora_rank=128),
    LatentAttention((4097,), 3, kv_lora_rank=128, kv_dtype="float8_e4m3fn"),
]
FAULTS = [{"last": 1}, {"scale": 1.02}, {"causal": -1}, {"overrun": 1}, {"first": 1}]


@pytest.mark.parametrize("problem", SERVING, ids=lambda p: p.label())
def test_a_right_kernel_passes_and_a_wrong_one_does_not(problem):
    right = check(problem, attend(problem), seed=1)
    assert right.passed and right.error < 0.5 * right.tolerance
    for fault in [*FAULTS, *([{"causal": 1}] if problem.q_len > 1 else []), *([{"kv_scale": 1.02}] if problem.kv_dtype else [])]:
        for seed in (2, 3):
            assert not check(problem, attend(problem, **fault), seed=seed).passed, fault


@pytest.mark.parametrize("kernel", ON_CPU, ids=lambda k: k.name)
@pytest.mark.parametrize("problem", AWKWARD, ids=lambda p: p.label())
def test_cpu_kernels_on_awkward_problems(kernel, problem):
    for config in kernel.space(problem, CPU):
        found = check(problem, kernel.build(problem, config, CPU), seed=11)
        assert found.passed, f"{config.label()}: {found.reason}"


@pytest.mark.parametrize("kernel", ON_CPU, ids=lambda k: k.name)
def test_launches_read_no_values_on_the_host(kernel):
    for problem in AWKWARD:
        kernel.build(problem, kernel.default(problem, CPU), CPU)(problem.inputs(seed=0, device="meta"), problem.outputs(device="meta"))


@pytest.mark.parametrize("chip", [HOPPER, BLACKWELL], ids=lambda c: c.name)
@pytest.mark.parametrize("kernel", COMPILED, ids=lambda k: k.name)
def test_spaces(kernel, chip):
    for problem in LatentAttention.at_scale():
        space = list(kernel.space(problem, chip))
        if kernel.unfit(problem, chip) is not None:
            assert not space and kernel.backend == "cuda" and problem.kv_dtype
            continue
        assert space[0] == kernel.default(problem, chip)
        assert len(space) == len(set(space)) > 20
        assert kernel.fits(problem, type(space[0])(num_splits=10**6), chip)


def splits(problem, block_m=64, block_n=64, programs_per_sm=1):
    return choose(shape_of(problem), HOPPER, block_m=block_m, block_n=block_n, programs_per_sm=programs_per_sm)


def test_split_rule():
    # 64 programs of 64 rows on 132 SMs: twice as many fill them, and more would write partial results of 128 KiB each.
    assert splits(LatentAttention((8704,) * 32, 128)) == 2
    assert splits(LatentAttention((8704,) * 256, 128)) == 1
    # One sequence alone: as many programs as there are SMs, or a little fewer.
    assert 40 <= 2 * splits(LatentAttention((131072,), 128)) <= HOPPER.sm_count
    counts = [splits(LatentAttention((length,), 16), block_m=16, block_n=32) for length in (1, 32, 33, 1024, 8192, 65536)]
    assert counts[:2] == [1, 1] and counts == sorted(counts)


@pytest.mark.interpreter
def test_triton_kernel_beyond_the_examples():
    script = Path(__file__).with_name("interpreted_latent.py")
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
