"""Prefill attention: the reference and its costs against brute force, and what its kernels promise beyond the examples."""

import dataclasses
import itertools
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from contest import BLACKWELL, CPU, HOPPER
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from klab.harness.measure.check import check, compare
from klab.kernels.discover import discover
from klab.kernels.errors import UsageError
from klab.kernels.prefill_attention.problem import PrefillAttention, offsets
from klab.kernels.prefill_tiles import Tiles, key_span, padded, split_dim

KERNELS = {k.name: k for k in discover().of("prefill_attention")}
TRITON = [k for k in KERNELS.values() if k.backend == "triton"]
needs_triton = pytest.mark.skipif(not TRITON, reason="Triton is not installed")

REAL = [
    PrefillAttention((8192,), 32, 8, 64),
    PrefillAttention((8192,), 32, 8, 128),
    PrefillAttention((8192,), 16, 2, 256),
    PrefillAttention((8192,), 128, 128, 192, head_dim_v=128),
    PrefillAttention((4096, 100, 1), 64, 8, 64, window=128),
    PrefillAttention((512,) * 4, 64, 8, 128, prefix_lens=(32768,) * 4),
    PrefillAttention((4096,), 24, 24, 128, causal=False),
    PrefillAttention((2048,), 32, 8, 128, dtype="float32"),
    PrefillAttention((8192,), 32, 16, 128, window=4096, softcap=50.0),
    PrefillAttention((1024,) * 4, 64, 8, 64, prefix_lens=(8192,) * 4, page_size=64, sinks=True, kv_dtype="float8_e4m3fn"),
    PrefillAttention((4096,), 16, 16, 72, causal=False),
    PrefillAttention((77,) * 2, 24, 24, 128, kv_tokens=(4096,) * 2, causal=False),
]


@st.composite
def problems(draw):
    """Small problems of every kind: full or causal, windows, prefixes, other sequences' keys, empty sequences, grouped heads, features."""
    batch = draw(st.integers(1, 3))

    def lens(least=0):
        return draw(st.lists(st.integers(least, 9), min_size=batch, max_size=batch).filter(any))

    q_lens, causal = lens(), draw(st.booleans())
    others = not causal and draw(st.booleans())
    return PrefillAttention(
        tuple(q_lens),
        draw(st.sampled_from([2, 4])),
        draw(st.sampled_from([1, 2])),
        16,
        prefix_lens=tuple(lens()) if not others and draw(st.booleans()) else (),
        kv_tokens=tuple(lens(1)) if others else (),
        head_dim_v=draw(st.sampled_from([0, 8])),
        causal=causal,
        window=draw(st.integers(0, 12)) if causal else 0,
        logit_gain=draw(st.sampled_from([1.0, 50.0])),
        sinks=draw(st.booleans()),
        softcap=draw(st.sampled_from([0.0, 5.0])),
        page_size=draw(st.sampled_from([0, 1, 4])),
        kv_dtype=draw(st.sampled_from(["", "float8_e4m3fn"])),
        dtype="float32",
    )


def seen_keys(problem, sequence, t):
    """Keys that query t of a sequence sees, straight from the definition."""
    keys = range(problem.kv_lens[sequence])
    position = problem.prefixes[sequence] + t
    if not problem.causal:
        return list(keys)
    return [j for j in keys if j <= position and (not problem.window or j > position - problem.window)]


def key_and_value(problem, inputs, sequence, token, head):
    """One key and one value in float64, wherever they lie."""
    for name in ("k", "v"):
        if problem.page_size:
            page = inputs["block_table"][sequence, token // problem.page_size]
            x = inputs[f"{name}_cache"][page, token % problem.page_size, head]
        else:
            x = inputs[name][offsets(problem.kv_lens)[sequence] + token, head]
        yield x.double() * (inputs[f"{name}_scale"][head].double() if problem.kv_dtype else 1.0)


def brute_force(problem, inputs):
    """One query and one head at a time over the keys it sees, in float64."""
    q_at, group = offsets(problem.q_lens), problem.heads // problem.kv_heads
    out = torch.zeros((q_at[-1], problem.heads, problem.dim_v), dtype=torch.float64)
    for i, q_len in enumerate(problem.q_lens):
        pairs = [[list(key_and_value(problem, inputs, i, j, h)) for j in range(problem.kv_lens[i])] for h in range(problem.kv_heads)]
        for t, h in itertools.product(range(q_len), range(problem.heads)):
            seen = [pairs[h // group][j] for j in seen_keys(problem, i, t)]
            logits = torch.stack([inputs["q"][q_at[i] + t, h].double() @ k for k, _ in seen]) * problem.scale
            if problem.softcap:
                logits = problem.softcap * torch.tanh(logits / problem.softcap)
            if problem.sinks:
                logits = torch.cat((logits, inputs["sinks"][h, None].double()))
            out[q_at[i] + t, h] = torch.softmax(logits, 0)[: len(seen)] @ torch.stack([v for _, v in seen])
    return {"out": out}


@given(problem=problems())
@settings(max_examples=40, deadline=None)
def test_reference_and_costs_follow_the_definition(problem):
    inputs = problem.inputs(seed=1)
    found = compare(problem, problem.reference(inputs), brute_force(problem, inputs))
    assert found.passed, found.reason
    seen = [[seen_keys(problem, i, t) for t in range(q_len)] for i, q_len in enumerate(problem.q_lens)]
    pairs = sum(len(keys) for sequence in seen for keys in sequence)
    assert problem.visible_pairs() == pairs
    assert problem.flops() == 2 * pairs * problem.heads * (16 + problem.dim_v)
    if min(problem.q_lens):
        read = sum(len(set().union(*sequence)) for sequence in seen)
        queries, keys = 4 * sum(problem.q_lens) * problem.heads, (1 if problem.kv_dtype else 4) * read * problem.kv_heads
        inputs = {name: x for name, x in problem.inputs(seed=1, device="meta").items() if name in ("sinks", "k_scale", "v_scale")}
        small = 4 * (sum(x.numel() for x in inputs.values()) + problem.pages)
        assert problem.bytes_moved() == (queries + keys) * (16 + problem.dim_v) + small


def test_reference_agrees_with_torch():
    problem = PrefillAttention((20, 7), 4, 2, 32, prefix_lens=(5, 11), window=9, dtype="float32")
    inputs = problem.inputs(seed=3)
    expected = []
    for i, (q_len, kv_len) in enumerate(zip(problem.q_lens, problem.kv_lens, strict=True)):
        q, k, v = (
            inputs[name][at[i] : at[i + 1]].transpose(0, 1)
            for name, at in (("q", offsets(problem.q_lens)), ("k", offsets(problem.kv_lens)), ("v", offsets(problem.kv_lens)))
        )
        below = torch.ones(q_len, kv_len, dtype=torch.bool).tril(kv_len - q_len)
        mask = below & ~torch.ones(q_len, kv_len, dtype=torch.bool).tril(kv_len - q_len - problem.window)
        result = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
        expected.append(result.transpose(0, 1))
    assert torch.allclose(problem.reference(inputs)["out"], torch.cat(expected), atol=1e-5)


@pytest.mark.parametrize(
    "fields",
    [
        {"q_lens": ()},
        {"q_lens": (0, 0)},
        {"q_lens": (-1, 2)},
        {"q_lens": (3,), "prefix_lens": (1, 2)},
        {"q_lens": (3,), "kv_heads": 3},
        {"q_lens": (3,), "window": -1},
        {"q_lens": (3,), "window": 4, "causal": False},
        {"q_lens": (3,), "softcap": -1.0},
        {"q_lens": (3,), "kv_dtype": "int8"},
        {"q_lens": (3,), "page_size": -1},
        {"q_lens": (3,), "kv_tokens": (3,)},
        {"q_lens": (3, 4), "kv_tokens": (3,), "causal": False},
        {"q_lens": (3, 4), "kv_tokens": (3, 0), "causal": False},
        {"q_lens": (3,), "kv_tokens": (3,), "prefix_lens": (1,), "causal": False},
    ],
)
def test_a_senseless_problem_is_refused(fields):
    with pytest.raises(UsageError):
        PrefillAttention(**{"heads": 4, "kv_heads": 2, "head_dim": 64} | fields)


@given(problem=problems(), block_m=st.sampled_from([4, 16]), packed=st.booleans())
@settings(max_examples=40, deadline=None)
def test_tiles_cover_every_row_once_and_span_the_keys_seen(problem, block_m, packed):
    rows_per_token = problem.heads // problem.kv_heads if packed else 1
    tiles = Tiles(problem, block_m, rows_per_token)
    rows, spans = Counter(), []
    q_at, kv_at = offsets(problem.q_lens)[:-1], offsets(problem.kv_lens)[:-1]
    sequences = list(zip(q_at, problem.q_lens, kv_at, problem.kv_lens, strict=True))
    for *sequence, block, i in tiles.rows:
        assert tuple(sequence) == sequences[i]
        q_len = problem.q_lens[i]
        mine = [r for r in range(block * block_m, (block + 1) * block_m) if r < q_len * rows_per_token]
        rows.update((i, r) for r in mine)
        tokens = [r // rows_per_token for r in mine]
        seen = set().union(*(seen_keys(problem, i, t) for t in tokens))
        begin, end = key_span(problem, i, tokens[0], tokens[-1])
        assert set(range(begin, end)) == seen
        spans.append(end - begin)
    assert rows == Counter((i, r) for i, q_len in enumerate(problem.q_lens) for r in range(q_len * rows_per_token))
    assert spans == sorted(spans, reverse=True)
    on_host = tiles.on(torch.device("cpu"))
    assert on_host.shape == (len(tiles), 6) and tiles.on(torch.device("cpu")) is on_host


def test_head_dimensions_split_into_powers_of_two():
    assert [split_dim(d) for d in (8, 16, 64, 72, 80, 96, 128, 192, 256)] == [
        (16, 0), (16, 0), (64, 0), (64, 16), (64, 16), (64, 32), (128, 0), (128, 64), (256, 0),
    ]  # fmt: skip
    assert [padded(d) for d in (1, 16, 48, 128, 192)] == [16, 16, 64, 128, 256]


@needs_triton
@pytest.mark.parametrize("chip", [HOPPER, BLACKWELL], ids=lambda c: c.name)
@pytest.mark.parametrize("problem", REAL, ids=lambda p: p.label())
def test_spaces_are_distinct_and_valid(problem, chip):
    for kernel in TRITON:
        space = list(kernel.space(problem, chip))
        if kernel.name == "triton_flash_tma" and problem.dtype == "float32":
            assert not space and "16-bit" in kernel.unfit(problem, chip)
            continue
        if kernel.name == "triton_flash_tma" and problem.head_dim == 72:
            assert not space and "another head" in kernel.unfit(problem, chip)
            continue
        assert len(space) >= 10, kernel.name
        assert len({c.key for c in space}) == len(space)
        assert space[0] == kernel.default(problem, chip)
        assert all(kernel.config_type.from_json(c.to_json_full()) == c for c in space)
        if problem.heads == problem.kv_heads:
            assert not any(c.pack_gqa for c in space)
        elif problem.dtype != "float32":
            assert {c.pack_gqa for c in space} == {True, False}


@needs_triton
@pytest.mark.interpreter
@pytest.mark.parametrize("kernel", TRITON, ids=lambda k: k.name)
def test_paths_beyond_the_defaults(kernel):
    script = Path(__file__).with_name("interpreted_prefill.py")
    done = subprocess.run([sys.executable, str(script), kernel.name], capture_output=True, text=True, timeout=290)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


def compiled(name, problem, chip, **changes):
    """What the one function of this launch needs, compiled with no GPU."""
    from klab.harness.tune.inspect_cubin import inspect_artifact
    from klab.harness.tune.offline import compile_launch

    kernel = KERNELS[name]
    default = kernel.default(problem, chip)
    config = kernel.config_type(**{**default.to_json_full(), **changes})
    assert kernel.fits(problem, config, chip) is None
    (artifact,), _ = compile_launch(kernel, problem, config, chip)
    return inspect_artifact(artifact)


@needs_triton
@pytest.mark.parametrize(("chip", "unit"), [(HOPPER, "wgmma"), (BLACKWELL, "tcgen05")], ids=["sm_90", "sm_100"])
@pytest.mark.parametrize("kernel", TRITON, ids=lambda k: k.name)
@pytest.mark.parametrize("problem", REAL[:2], ids=lambda p: f"d{p.head_dim}")
def test_defaults_use_the_tensor_cores_and_spill_nothing(kernel, problem, chip, unit):
    found = compiled(kernel.name, problem, chip)
    assert (found.matrix_unit, found.stack_bytes, found.warp_specialised) == (unit, 0, False)
    assert found.smem_bytes <= chip.smem_per_block_bytes
    assert bool(found.instructions["tma"]) == (kernel.name == "triton_flash_tma")


@needs_triton
@pytest.mark.parametrize(("chip", "warps"), [(HOPPER, 4), (BLACKWELL, 8)], ids=["sm_90", "sm_100"])
@pytest.mark.parametrize("problem", [REAL[1], REAL[4]], ids=["plain", "window"])
def test_warp_specialisation_is_real(problem, chip, warps):
    if chip is BLACKWELL and len(problem.q_lens) > 1:
        # The values of the next sequence would have to be masked, which the compiler fails on: refused, and one sequence is not.
        kernel = KERNELS["triton_flash_tma"]
        assert not any(config.warp_specialize for config in kernel.space(problem, chip))
        problem = dataclasses.replace(problem, q_lens=problem.q_lens[:1])
    found = compiled("triton_flash_tma", problem, chip, warp_specialize=True, num_warps=warps)
    assert found.warp_specialised and found.threads > 32 * warps and found.stack_bytes <= 16


@needs_triton
def test_what_the_compiler_does_not_specialise_is_no_candidate():
    kernel = KERNELS["triton_flash_tma"]
    for config in kernel.space(REAL[1], HOPPER):
        assert not config.warp_specialize or (config.num_warps == 4 and not config.pack_gqa)


class Recorder(TorchDispatchMode):
    """Counts operations and keeps the size of the largest tensor that one made."""

    def __init__(self):
        super().__init__()
        self.calls, self.largest = Counter(), 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.calls[str(func.overloadpacket)] += 1
        if isinstance(result, torch.Tensor):
            self.largest = max(self.largest, result.numel())
        return result


def test_cpu_flash_skips_hidden_blocks_and_makes_no_score_matrix():
    problem = PrefillAttention((512,), 2, 1, 16, dtype="float32")
    kernel = KERNELS["cpu_flash"]
    launch = kernel.build(problem, kernel.config_type(block_q=64, block_kv=64), CPU)
    with Recorder() as recorder:
        launch(problem.inputs(seed=0), problem.outputs())
    assert recorder.calls["aten.bmm"] == 8 * 9 // 2
    assert recorder.largest <= 512 * 2 * 16  # the queries; the scores of both heads would be 2 * 512 * 512


@pytest.mark.parametrize("window", [0, 1, 100, 4096])
def test_cpu_kernels_at_a_length_of_many_blocks(window):
    problem = PrefillAttention((700, 0, 41), 4, 2, 32, prefix_lens=(300, 0, 9), window=window, logit_gain=20.0, dtype="bfloat16")
    for kernel in KERNELS.values():
        if "cpu" in kernel.kinds:
            found = check(problem, kernel.build(problem, kernel.default(problem, CPU), CPU), seed=2)
            assert found.passed, f"{kernel.name}: {found.reason}"


def test_one_launch_serves_fresh_inputs():
    """Masks and tiles are kept between calls; nothing of the first inputs is."""
    problem = PrefillAttention((30, 5), 2, 1, 64, prefix_lens=(7, 0), dtype="float32")
    for kernel in KERNELS.values():
        if "cpu" in kernel.kinds:
            launch = kernel.build(problem, kernel.default(problem, CPU), CPU)
            assert all(check(problem, launch, seed=seed).passed for seed in (1, 2)), kernel.name


@pytest.mark.parametrize(
    ("name", "problem", "reason"),
    [
        ("torch_sdpa_cudnn", PrefillAttention((5,), 2, 1, 64, dtype="float32"), "16-bit"),
        ("torch_sdpa_cudnn", PrefillAttention((1, 9), 2, 1, 64), "single key"),
        ("torch_sdpa_cudnn", PrefillAttention((9,), 2, 1, 192), "head dimensions"),
        ("torch_sdpa_cudnn", PrefillAttention((9,), 2, 1, 192, head_dim_v=128), None),
        ("torch_sdpa_cudnn", PrefillAttention((65536,), 2, 1, 128, prefix_lens=(1 << 20,)), "GB"),
        ("torch_sdpa_flash", PrefillAttention((9,), 2, 1, 192, head_dim_v=128), "same head dimension"),
        ("torch_sdpa_flash", PrefillAttention((9,), 2, 1, 512), "up to 256"),
        ("torch_sdpa_flash", PrefillAttention((9,), 2, 1, 64, dtype="float32"), "16-bit"),
        ("torch_sdpa_flash", PrefillAttention((65536,), 2, 1, 128, prefix_lens=(1 << 20,)), None),
        ("torch_sdpa_efficient", PrefillAttention((9,), 2, 1, 68), "16 bytes"),
        ("torch_sdpa_efficient", PrefillAttention((9,), 2, 1, 192, head_dim_v=128), None),
        ("torch_sdpa_math", PrefillAttention((65536,), 32, 8, 128), "GB"),
        ("torch_sdpa_math", PrefillAttention((1024,), 32, 8, 128), None),
        ("torch_sdpa_cudnn", PrefillAttention((9,), 2, 1, 64, sinks=True, softcap=3.0), "sinks nor a soft-cap"),
        ("torch_sdpa_flash", PrefillAttention((9,), 2, 1, 64, prefix_lens=(30,), page_size=16, kv_dtype="float8_e4m3fn"), None),
        ("torch_sdpa_flash", PrefillAttention((9,), 2, 1, 64, kv_tokens=(3,), causal=False), None),
        ("torch_explicit", PrefillAttention((65536,), 64, 8, 64, window=128, sinks=True, softcap=3.0), None),
        ("triton_flash_tma", PrefillAttention((9,), 2, 1, 64, prefix_lens=(300,), page_size=16), "in one page"),
        ("cuda_flash_hopper", PrefillAttention((9,), 2, 1, 64, kv_dtype="float8_e4m3fn"), "keys and values in fp8"),
    ],
)
def test_what_a_library_cannot_do_is_said(name, problem, reason):
    said = KERNELS[name].unfit(problem, HOPPER)
    assert said is None if reason is None else reason in said


LIBRARIES = ["torch_sdpa_cudnn", "torch_sdpa_flash", "torch_sdpa_efficient", "torch_sdpa_math", "torch_explicit"]


@pytest.mark.parametrize("name", LIBRARIES)
def test_libraries_read_no_values_on_the_host(name):
    """On meta tensors there are none to read: lengths come from the problem."""
    kernel = KERNELS[name]
    for problem in PrefillAttention.examples():
        if kernel.unfit(problem, HOPPER) is None:
            outputs = problem.outputs(device="meta")
            kernel.build(problem, kernel.default(problem, HOPPER), HOPPER)(problem.inputs(seed=0, device="meta"), outputs)


def test_narrow_keys_approximate_the_wide_problem():
    problem = PrefillAttention((40, 7), 4, 2, 64, prefix_lens=(30, 0), page_size=16, kv_dtype="float8_e4m3fn")
    wide = problem.wide()
    assert PrefillAttention.approximations(wide) == [problem] and PrefillAttention.approximations(problem) == []
    inputs, kept = problem.inputs(seed=4), problem.wide_inputs(seed=4)
    assert {name: (x.shape, x.dtype) for name, x in kept.items()} == {n: (x.shape, x.dtype) for n, x in wide.inputs(seed=4).items()}
    assert all(inputs[name].equal(kept[name]) for name in ("q", "block_table", "q_offsets", "kv_offsets"))
    narrow, exact = problem.reference(inputs)["out"], wide.reference(kept)["out"]
    # e4m3 rounds to 2^-4 at worst: neither exact nor another problem.
    assert 1e-3 < float((narrow - exact).norm() / exact.norm()) < 0.1


def test_pages_are_scattered_and_hold_each_token_once():
    problem = PrefillAttention((40, 0, 7), 2, 1, 64, prefix_lens=(30, 5, 0), page_size=16)
    table = problem.inputs(seed=1)["block_table"]
    used = table[table >= 0]
    assert sorted(used.tolist()) == list(range(problem.pages)) and not used.equal(used.sort().values)
    assert (table >= 0).sum(dim=1).tolist() == [5, 1, 1]
