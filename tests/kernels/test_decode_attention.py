"""Decode attention: the reference and its costs against brute force, and what its kernels promise beyond the examples."""

import itertools
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from contest import BLACKWELL, CPU, HOPPER

from klab.harness.measure.check import check, compare, poison
from klab.kernels.decode_attention.problem import DecodeAttention
from klab.kernels.discover import discover
from klab.kernels.errors import UsageError
from klab.kernels.triton_support import cdiv

FP8 = "float8_e4m3fn"
KERNELS = {k.name: k for k in discover().of("decode_attention")}
ON_CPU = [k for k in KERNELS.values() if "cpu" in k.kinds]
TRITON = [k for k in KERNELS.values() if k.backend == "triton"]
needs_triton = pytest.mark.skipif(not TRITON, reason="Triton is not installed")

AWKWARD = [
    DecodeAttention((1,), 1, 1, 16, dtype="float32"),
    DecodeAttention((15, 16, 17, 32), 4, 2, 16, dtype="float32"),
    DecodeAttention((0, 33, 0), 3, 1, 16, dtype="float32"),
    DecodeAttention((9, 5), 2, 1, 16, page_size=1, dtype="float32"),
    DecodeAttention((70, 3), 4, 2, 16, q_len=3, page_size=7, dtype="float32"),
    DecodeAttention((40, 11), 2, 1, 16, window=10, dtype="float32"),
    DecodeAttention((40, 4), 2, 1, 16, q_len=4, window=3, dtype="float32"),
    DecodeAttention((21,), 6, 2, 24, head_dim_v=8, dtype="float32"),
    DecodeAttention((30,), 2, 2, 16, logit_gain=300.0, dtype="float32"),
    DecodeAttention((40, 0, 11), 4, 2, 16, window=10, sinks=True, dtype="float32"),
    DecodeAttention((40, 7), 4, 2, 16, q_len=2, softcap=5.0, sinks=True, logit_gain=2.0, dtype="float32"),
    DecodeAttention((40, 7), 6, 3, 32, q_len=2, page_size=8, kv_dtype=FP8, dtype="float32"),
    DecodeAttention((40, 0, 17, 30), 4, 2, 32, page_size=8, shared_prefix=16, kv_dtype=FP8, softcap=8.0, dtype="float32"),
    DecodeAttention((40, 33), 2, 1, 16, page_size=8, shared_prefix=32, window=5, dtype="float32"),
]

REAL = [
    DecodeAttention((8192,) * 32, 32, 8, 128),
    DecodeAttention((131072,), 32, 8, 128),
    DecodeAttention((8192,) * 32, 32, 8, 64),
    DecodeAttention((4096,) * 8, 16, 2, 256, page_size=64),
    DecodeAttention((131072, *(1024,) * 31), 32, 8, 128),
    DecodeAttention((2048,) * 256, 64, 8, 128, page_size=128),
    DecodeAttention((8192,) * 16, 64, 8, 64, window=128),
    DecodeAttention((8192,) * 16, 128, 8, 128, q_len=4),
    DecodeAttention((8192,) * 64, 32, 8, 128, kv_dtype=FP8, page_size=64),
    DecodeAttention((9000,) * 64, 32, 8, 128, shared_prefix=8192),
]


def visible_keys(problem, length, t):
    """Keys that query t of a sequence sees, straight from the definition."""
    position = length - problem.q_len + t
    return [j for j in range(length) if j <= position and (not problem.window or j > position - problem.window)]


def brute_force(problem, inputs):
    """One query, one head, one key at a time, in float64."""
    t = {name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in inputs.items()}
    if problem.kv_dtype:
        for name in ("k", "v"):
            t[f"{name}_cache"] = t[f"{name}_cache"] * t[f"{name}_scale"][None, None, :, None]
    page_size, table = problem.page_size, t["block_table"].tolist()
    out = torch.zeros((problem.batch, problem.q_len, problem.heads, problem.dim_v), dtype=torch.float64)
    for i, length in enumerate(problem.kv_lens):
        for q, h in itertools.product(range(problem.q_len), range(problem.heads)):
            kv_head = h * problem.kv_heads // problem.heads
            keys = visible_keys(problem, length, q) if length else []
            where = [(table[i][j // page_size], j % page_size, kv_head) for j in keys]
            logits = [float(t["q"][i, q, h] @ t["k_cache"][at]) * problem.scale for at in where]
            if problem.softcap:
                logits = [problem.softcap * math.tanh(x / problem.softcap) for x in logits]
            base = max(logits, default=0.0)
            weights = [math.exp(x - base) for x in logits]
            total = sum(weights) + (math.exp(float(t["sinks"][h]) - base) if problem.sinks else 0.0)
            for at, weight in zip(where, weights, strict=True):
                out[i, q, h] += weight / total * t["v_cache"][at]
    return out


@pytest.mark.parametrize("problem", AWKWARD, ids=lambda p: p.label())
def test_reference_agrees_with_brute_force(problem):
    inputs = problem.inputs(seed=3, row_padding=4)
    reference = problem.reference(inputs)["out"].double()
    expected = brute_force(problem, inputs)
    assert float((reference - expected).norm()) <= 1e-5 * max(1.0, problem.logit_gain / 10) * float(expected.norm())


@pytest.mark.parametrize("problem", AWKWARD, ids=lambda p: p.label())
def test_costs_agree_with_counting(problem):
    pairs = sum(len(visible_keys(problem, n, t)) for n in problem.kv_lens if n for t in range(problem.q_len))
    read = [
        {(i if j >= problem.shared_prefix else -1, j) for t in range(problem.q_len) for j in visible_keys(problem, n, t)}
        for i, n in enumerate(problem.kv_lens)
        if n
    ]
    dims, size = problem.head_dim + problem.dim_v, 1 if problem.kv_dtype else 4
    parameters = 4 * (2 * problem.kv_heads * bool(problem.kv_dtype) + problem.heads * problem.sinks)
    assert problem.flops() == 2 * pairs * problem.heads * dims
    cache = size * dims * len(set.union(*read)) * problem.kv_heads
    assert problem.bytes_moved() == cache + 4 * dims * problem.batch * problem.q_len * problem.heads + parameters


def test_inputs_are_as_described():
    problem = DecodeAttention((33, 0, 16), 2, 1, 16)
    inputs = problem.inputs(seed=1)
    table = inputs["block_table"].tolist()
    assert [sum(page >= 0 for page in row) for row in table] == [3, 0, 1]
    assert sorted(page for row in table for page in row if page >= 0) == list(range(problem.pages)), "every page has one owner"
    other = problem.inputs(seed=2)
    assert not torch.equal(inputs["q"], other["q"])
    assert DecodeAttention.from_json(problem.to_json()) == problem
    shared = DecodeAttention((48, 0, 33), 2, 1, 16, shared_prefix=32)
    first, _, third = shared.inputs(seed=1)["block_table"].tolist()
    assert first[:2] == third[:2] and first[2] != third[2] and sorted({*first, *third}) == list(range(shared.pages))
    narrow = DecodeAttention((700,), 4, 4, 64, kv_dtype=FP8)
    given, wide = narrow.inputs(seed=1), narrow.wide_inputs(seed=1)
    assert narrow.inputs(seed=1, row_padding=8)["k_cache"].stride(-2) == 80, "rows stay 16-byte aligned"
    for name in ("k", "v"):
        back = given[f"{name}_cache"].float() * given[f"{name}_scale"][:, None]
        assert (back - wide[f"{name}_cache"].float()).norm() < 0.04 * back.norm()
    assert narrow.wide() == DecodeAttention((700,), 4, 4, 64)
    padded = problem.inputs(seed=1, row_padding=8)
    assert padded["k_cache"].stride(-2) == 24 and padded["k_cache"].shape == inputs["k_cache"].shape


@pytest.mark.parametrize(
    "fields",
    [
        {"kv_lens": ()},
        {"kv_lens": (0, 0)},
        {"kv_lens": (3, 2), "q_len": 3},
        {"kv_lens": (8,), "kv_heads": 3},
        {"kv_lens": (40,), "shared_prefix": 20},
        {"kv_lens": (40, 32), "shared_prefix": 32},
        {"kv_lens": (8,), "kv_dtype": "int8"},
        {"kv_lens": (8,), "softcap": -1.0},
    ],
)
def test_impossible_problems_are_refused(fields):
    with pytest.raises(UsageError):
        DecodeAttention(**({"heads": 4, "kv_heads": 2, "head_dim": 16} | fields))


@pytest.mark.parametrize("kernel", ON_CPU, ids=lambda k: k.name)
@pytest.mark.parametrize("problem", AWKWARD, ids=lambda p: p.label())
def test_cpu_kernels_on_awkward_problems(kernel, problem):
    for config in list(kernel.space(problem, CPU))[::7]:
        found = check(problem, kernel.build(problem, config, CPU), seed=11)
        assert found.passed, f"{config.label()}: {found.reason}"


def test_cpu_split_kv_reads_nothing_behind_the_end():
    problem = DecodeAttention((33, 17), 2, 1, 16, dtype="float32")
    inputs = problem.inputs(seed=4)
    for row, length in zip(inputs["block_table"].tolist(), problem.kv_lens, strict=True):
        for name in ("k_cache", "v_cache"):
            inputs[name][row[(length - 1) // 16], length % 16 :] = float("nan")
    kernel = KERNELS["cpu_split_kv"]
    for config in kernel.space(problem, CPU):
        outputs = problem.outputs()
        poison(outputs)
        kernel.build(problem, config, CPU)(inputs, outputs)
        assert compare(problem, outputs, problem.reference(inputs)).passed, config.label()


@pytest.mark.parametrize("kernel", ON_CPU, ids=lambda k: k.name)
@pytest.mark.parametrize("problem", AWKWARD, ids=lambda p: p.label())
def test_launches_read_no_values_on_the_host(kernel, problem):
    kernel.build(problem, kernel.default(problem, CPU), CPU)(problem.inputs(seed=0, device="meta"), problem.outputs(device="meta"))


def test_padded_baselines_refuse_what_cannot_fit():
    long_and_short = DecodeAttention((131072, *(16,) * 255), 64, 8, 128)
    assert "GB" in KERNELS["torch_sdpa"].unfit(long_and_short, HOPPER)
    assert KERNELS["torch_sdpa_each"].unfit(long_and_short, HOPPER) is None


@pytest.mark.interpreter
@pytest.mark.parametrize("kernel", TRITON, ids=lambda k: k.name)
def test_triton_kernels_beyond_the_examples(kernel):
    script = Path(__file__).with_name("interpreted_decode.py")
    done = subprocess.run([sys.executable, str(script), kernel.name], capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


@needs_triton
@pytest.mark.parametrize("chip", [HOPPER, BLACKWELL], ids=lambda c: c.name)
@pytest.mark.parametrize("problem", REAL, ids=lambda p: p.label())
def test_triton_spaces(problem, chip):
    spaces = {k.name: list(k.space(problem, chip)) for k in TRITON}
    assert len(spaces["triton_split_kv"]) > 50
    for kernel in TRITON:
        space = spaces[kernel.name]
        if kernel.unfit(problem, chip) is not None:
            assert not space
            continue
        assert (kernel.name == "triton_cascade") <= (problem.shared_prefix > 0)
        assert space[0] == kernel.default(problem, chip)
        assert len(space) == len(set(space)) > 20
        assert all(kernel.fits(problem, config, chip) is None for config in space)
        assert {config.num_splits for config in space} >= {0}
        assert any(config.early_merge for config in space) or all(config.num_splits < 2 for config in space)
        assert kernel.fits(problem, type(space[0])(num_splits=10**6), chip)


def splits(problem, chip=HOPPER, **config):
    from klab.kernels.decode_attention import triton_split_kv as module

    return module.split_count(problem, module.SplitKvConfig(**config), chip)


@needs_triton
def test_split_rule_in_its_kernels():
    # Two programs per SM draw the whole bandwidth: 256 programs on 132 SMs need no split, 2048 still less.
    assert splits(DecodeAttention((8192,) * 32, 32, 8, 128)) == 1
    assert splits(DecodeAttention((8192,) * 256, 32, 8, 128)) == 1
    # One long sequence: one wave, and a nearly full one.
    alone = splits(DecodeAttention((131072,), 32, 8, 128))
    assert 0.85 * 2 * HOPPER.sm_count <= alone * 8 <= 2 * HOPPER.sm_count
    # Short contexts are not cut into less than blocks, and a longer context is never cut into fewer ranges.
    counts = [splits(DecodeAttention((length,), 32, 8, 128)) for length in (1, 64, 65, 256, 1024, 4096, 16384, 65536, 131072)]
    assert counts[:2] == [1, 1] and counts == sorted(counts)
    # One long sequence among short ones is cut, though the batch fills the chip.
    assert splits(DecodeAttention((131072, *(1024,) * 31), 32, 8, 128)) >= 16
    # A window bounds what is read, whatever the length.
    assert splits(DecodeAttention((131072,), 32, 8, 128, window=64)) <= 2
    for length, batch, block_n in itertools.product((1, 63, 640, 4097), (1, 7), (16, 128)):
        count = splits(DecodeAttention((length,) * batch, 8, 2, 64), block_n=block_n)
        blocks = cdiv(length, block_n)
        assert 1 <= count <= blocks
        assert (count - 1) * cdiv(blocks, count) < blocks, "the last range would be empty"


def loop_of(ptx):
    """The lines of the last loop: from its label to the branch back to it."""
    lines = ptx.splitlines()
    labels = {line.split(":")[0]: i for i, line in enumerate(lines) if line.startswith("$L__BB")}
    back = [
        (labels[name], j) for j, line in enumerate(lines) for name in labels if "bra" in line and f"{name};" in line and labels[name] < j
    ]
    return lines[slice(*max(back))]


@needs_triton
@pytest.mark.parametrize(
    ("name", "kv_dtype", "chip", "barriers"),
    [
        ("triton_split_kv", "", HOPPER, 6),
        ("triton_split_kv", FP8, BLACKWELL, 9),  # with 128 keys in a step the pages' numbers come through shared memory
        ("triton_warp_split", "", BLACKWELL, 2),
        ("triton_warp_split", FP8, HOPPER, 2),
    ],
    ids=lambda value: getattr(value, "name", str(value)),
)
def test_triton_loop_is_as_its_file_says(name, kv_dtype, chip, barriers):
    from klab.harness.tune.inspect_cubin import inspect_artifact
    from klab.harness.tune.offline import compile_launch

    problem, kernel = replace(REAL[1], kv_dtype=kv_dtype), KERNELS[name]
    (read, merge), _ = compile_launch(kernel, problem, kernel.default(problem, chip), chip)
    found = inspect_artifact(read)
    assert found.matrix_unit == "mma.sync" and found.stack_bytes == 0
    module = sys.modules[kernel.build.__module__]
    assert found.smem_bytes <= module.smem_bytes(problem, kernel.default(problem, chip))
    loop = loop_of(read.ptx)
    assert sum("bar.sync" in line for line in loop) <= barriers
    # Keys and values arrive 16 bytes at a time, also the pages' first.
    assert sum("cp.async.cg" in line for line in loop) == sum("cp.async.c" in line and "commit" not in line for line in loop) > 0
    # The paged addresses do not cost a stage: with 3 stages two blocks are under way.
    assert read.dynamic_smem_bytes >= 2 * 64 * 256 * (1 if kv_dtype else 2)
    # The elements of an fp8 tile are not read one by one.
    assert not any("ld.shared.b8" in line or "ld.shared.u8" in line for line in loop)
    assert merge.name == "merge_ranges"


@needs_triton
def test_cascade_reads_its_prefix_with_the_large_matrix_unit():
    from klab.harness.tune.inspect_cubin import inspect_artifact
    from klab.harness.tune.offline import compile_launch

    problem, kernel, chip = REAL[-1], KERNELS["triton_cascade"], HOPPER
    config = replace(kernel.default(problem, chip), early_merge=True, overlap=True)
    assert kernel.fits(problem, config, chip) is None
    (prefix, read, merge), _ = compile_launch(kernel, problem, config, chip)
    found = inspect_artifact(prefix)
    assert found.matrix_unit == "wgmma" and found.stack_bytes == 0
    # Each pass signals the next, and waits for the one before: an early pass must not be merged before the prefix is done.
    assert "griddepcontrol.launch_dependents" in prefix.ptx and "griddepcontrol.wait" not in prefix.ptx
    assert "griddepcontrol.launch_dependents" in read.ptx and "griddepcontrol.wait" in read.ptx
    assert "griddepcontrol.wait" in merge.ptx
