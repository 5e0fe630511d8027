"""The CUDA C++ attention kernels beyond the operators' examples: index arithmetic, spaces, refusals, odd shapes, compiled resources."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from contest import BLACKWELL, HOPPER
from cuda_emulator import Emulator

from klab.harness.measure.check import check
from klab.kernels.contract import Chip
from klab.kernels.cuda_module import CudaKernel, backend
from klab.kernels.decode_attention.problem import DecodeAttention
from klab.kernels.errors import UsageError
from klab.kernels.prefill_attention.problem import PrefillAttention
from klab.kernels.split_rule import choose_splits, tiles_per_split

pytest.importorskip("cupy")
from klab.kernels.decode_attention import cuda_split_kv as decode
from klab.kernels.prefill_attention import cuda_flash as prefill

FLASH, SPLIT = prefill.cuda_flash, decode.cuda_split_kv
FP8 = "float8_e4m3fn"
TURING = Chip("t4", "T4", "cuda", 40, 1590, 1590, {}, 16 << 30, 320.0, 4 << 20, (7, 5), 64 << 10, 64 << 10)
needs_gcc = pytest.mark.skipif(bool(Emulator.missing()), reason=Emulator.missing() or "g++ is here")

REAL_PREFILL = [
    PrefillAttention((4096,), 32, 8, 128),
    PrefillAttention((4096, 100), 64, 8, 64, window=128, dtype="float16"),
    PrefillAttention((1500,) * 4, 20, 20, 64, causal=False),
    PrefillAttention((2048,), 128, 128, 192, head_dim_v=128),
    PrefillAttention((300,) * 40, 16, 2, 256),
]
REAL_DECODE = [
    DecodeAttention((8192,) * 16, 32, 8, 128),
    DecodeAttention((131072, *(1000,) * 15), 64, 8, 64, window=128, page_size=64, dtype="float16"),
    DecodeAttention((4096,) * 4, 64, 1, 128, q_len=4, page_size=1),
    DecodeAttention((2048,), 16, 2, 256, page_size=128),
    DecodeAttention((8192,) * 64, 32, 8, 128, kv_dtype=FP8),
]


def probe(source, bodies, count, **defines):
    """For each body, an expression in i, its integers for i < count: compiled together with a kernel's source and run on the host."""
    stores = "\n".join(f"out[{n * count} + i] = {body};" for n, body in enumerate(bodies))
    kernel = f"KLAB_KERNEL(probe, 128)(int* out) {{ int i = block_idx_x() * 128 + thread_idx(); if (i < {count}) {{ {stores} }} }}"
    out = torch.empty(len(bodies), count, dtype=torch.int32)
    with backend(Emulator()):
        CudaKernel(f"{source}\n{kernel}", "probe", HOPPER, defines).launch((-(-count // 128), 1, 1), 128, [out])
    return out.tolist()


FLASH_DEFINES = {
    "ELEMENT": "half_t", "HEAD_DIM": 64, "HEAD_DIM_V": 64, "BLOCK_M": 32, "BLOCK_N": 16, "WARPS": 2, "STAGES": 1, "Q_IN_REGISTERS": 0,
    "HEADS_INNER": 0, "SINKS": 0, "SOFTCAP": 0, "PAGE_SIZE": 0,
}  # fmt: skip


@needs_gcc
@pytest.mark.parametrize(("causal", "windowed"), [(1, 0), (1, 1), (0, 0)])
def test_masks_agree_with_the_definition(causal, windowed):
    """Every warp position x tile x window: nothing visible is skipped, nothing hidden passes unmasked."""
    window, kv_len, rows = 21, 80, 16
    firsts, keys = range(0, 65, 5), range(0, 80, 16)
    cases = list(itertools.product(firsts, keys))
    at = f"(i / {len(keys)} * 5), (i % {len(keys)} * 16)"
    defines = {**FLASH_DEFINES, "CAUSAL": causal, "WINDOWED": windowed}
    bodies = [f"sees_some({at}, {window})", f"sees_all({at}, {kv_len}, {window})", f"sees_some(-1, i * 16, {window})"]
    bodies += [f"is_hidden(i % {kv_len}, i / {kv_len}, {kv_len}, {window})", f"first_key(i, {window})"]
    some, every, idle, pairs, begins = probe(prefill.SOURCE, bodies, kv_len * kv_len, **defines)
    visible = [
        (not causal or key <= position) and (not windowed or key > position - window) for position in range(kv_len) for key in range(kv_len)
    ]
    assert [not hidden for hidden in pairs] == visible
    for (first, key), sees_some, sees_all in zip(cases, some, every, strict=False):
        tile = [visible[p * kv_len + k] for p in range(first, first + rows) if p < kv_len for k in range(key, key + 16)]
        assert sees_some >= any(tile) and sees_all <= all(tile)
        if first + rows <= kv_len:
            assert bool(sees_some) == any(tile) and bool(sees_all) == all(tile)
    assert not any(idle[:5])
    assert begins[:kv_len] == [max(0, p - window + 1) // 16 * 16 if windowed else 0 for p in range(kv_len)]


@needs_gcc
def test_columns_further_is_the_swizzle():
    """One XOR from a lane's own chunk gives the address that the swizzle defines, for every row, column and row length."""
    bodies = []
    for row_bytes in (128, 256, 384, 512):
        row, chunk, step = f"(i / {row_bytes // 16})", f"(i / {row_bytes // 32} % 2)", f"(i % {row_bytes // 32})"
        swizzled = f"swizzle<{row_bytes}>({row}, {chunk} + 2 * {step})"
        bodies.append(f"columns_further(swizzle<{row_bytes}>({row}, {chunk}), {step}) - {swizzled}")
    found = probe('#include "attention.cuh"\nusing namespace klab;', bodies, 16 * 32)
    assert all(set(differences) == {0} for differences in found)


@needs_gcc
@pytest.mark.parametrize("window", [0, 50])
def test_pieces_on_the_device_are_those_of_the_host(window):
    """The kernels decide from kv_lens how many pieces there are; the grid and the workspace were sized from the Problem."""
    config = decode.SplitConfig(block_n=16, warps=2, num_splits=3)
    longest = DecodeAttention((700,), 4, 4, 64, q_len=3, window=window)
    piece, most = decode.pieces(longest, config, HOPPER)
    source = '#include "split_pieces.cuh"\nusing namespace klab;'
    (counts,) = probe(source, [f"piece_count(tile_count(i, 3, {window}), {piece})"], 701, TILE=32, WINDOWED=int(window > 0))
    for kv_len, count in enumerate(counts):
        tiles = -(-(min(kv_len, window + 2) if window else kv_len) // 32)
        assert count == max(1, -(-tiles // piece)) <= most
    assert counts[700] == most == (2 if window else 3)


ODD_PREFILL = [
    # More sequences than a warp has lanes, some empty, so that the search for a tile's sequence goes around twice.
    (PrefillAttention((3, 0, 17) * 15, 2, 1, 64, dtype="float16"), {"block_m": 64, "block_n": 16, "heads_inner": False}),
    (PrefillAttention((70, 20), 4, 1, 80, prefix_lens=(13, 90)), {"stages": 3, "block_n": 32}),
    (PrefillAttention((50,), 2, 2, 112, head_dim_v=48, causal=False), {"block_m": 64, "warps": 2, "stages": 1}),
    (PrefillAttention((150,), 1, 1, 128, window=40, dtype="float16"), {"warps": 8, "block_n": 32, "q_in_registers": True}),
    # Pages that are no multiple of a block, or of a power of two, behind a window; sinks and a cap; more queries than keys.
    (
        PrefillAttention((70, 9), 4, 2, 64, prefix_lens=(60, 3), page_size=3, window=50, sinks=True, softcap=20.0),
        {"block_m": 64, "block_n": 32, "warps": 2, "stages": 2},
    ),
    (PrefillAttention((130, 40), 2, 1, 72, kv_tokens=(17, 90), causal=False, dtype="float16"), {"block_n": 48, "stages": 1}),
]
ODD_DECODE = [
    # 40 query rows of one key/value head: three blocks of 16 rows, or two of 32, the last one ragged; pieces that some rows do not see.
    (DecodeAttention((300, 90, 0, 33), 20, 2, 64, q_len=4, dtype="float16"), {"num_splits": 3, "warps": 2, "block_n": 16}),
    (DecodeAttention((300, 7), 20, 1, 64, q_len=2, window=70, page_size=128), {"num_splits": 2, "row_fragments": 2, "block_n": 16}),
    (DecodeAttention((129, 1), 3, 1, 112, head_dim_v=80, page_size=3), {"stages": 1, "block_n": 64, "warps": 1}),
    (
        DecodeAttention((130,), 2, 1, 192, head_dim_v=128, page_size=64, dtype="float16"),
        {"stages": 4, "block_n": 16, "num_splits": 2, "warps": 1},
    ),
    (DecodeAttention((40, 500), 8, 8, 16, page_size=16), {"num_splits": 4, "warps": 4, "block_n": 32}),
    # Sinks where some sequences have one piece (added at once) and some have more (added by the merge).
    (DecodeAttention((300, 40, 0), 12, 2, 64, sinks=True, dtype="float16"), {"num_splits": 3, "warps": 2, "block_n": 16}),
    (
        DecodeAttention((300, 20), 20, 2, 96, head_dim_v=64, q_len=2, page_size=64, kv_dtype=FP8, softcap=20.0, sinks=True),
        {"num_splits": 2, "row_fragments": 2, "block_n": 32, "warps": 2},
    ),
    (
        DecodeAttention((70,), 2, 1, 32, head_dim_v=128, page_size=1, kv_dtype=FP8, dtype="float16"),
        {"block_n": 16, "warps": 1, "stages": 1},
    ),
]


@needs_gcc
@pytest.mark.parametrize(
    ("kernel", "problem", "changes"),
    [*((FLASH, *case) for case in ODD_PREFILL), *((SPLIT, *case) for case in ODD_DECODE)],
    ids=lambda value: value.name if hasattr(value, "name") else "",
)
def test_odd_shapes(kernel, problem, changes):
    config = replace(kernel.config_type(), **changes)
    assert kernel.fits(problem, config, HOPPER) is None
    launch = kernel.build(problem, config, HOPPER)
    # Twice the same launch on other data: whatever the first left in a workspace must not be seen by the second.
    for seed, emulator in enumerate((Emulator(2, land_early=True), Emulator(3))):
        with backend(emulator):
            found = check(problem, launch, seed=seed, row_padding=8 * seed)
        assert found.passed, found.reason


def test_spaces_are_valid_and_lead_with_the_default():
    for kernel, problems in ((FLASH, REAL_PREFILL), (SPLIT, REAL_DECODE)):
        for problem, chip in itertools.product(problems, (HOPPER, BLACKWELL)):
            space = list(kernel.space(problem, chip))
            assert space[0] == kernel.default(problem, chip)
            assert len(space) == len(set(space)) > 20
            module = prefill if kernel is FLASH else decode
            assert all(module.smem_bytes(problem, config) <= chip.smem_per_block_bytes for config in space)


@pytest.mark.parametrize(
    ("problem", "changes", "says"),
    [
        (REAL_PREFILL[0], {"block_m": 96}, "16 or 32 rows"),
        (REAL_PREFILL[0], {"block_m": 64, "warps": 1}, "16 or 32 rows"),
        (REAL_PREFILL[0], {"block_n": 24}, "multiples of 16"),
        (REAL_PREFILL[0], {"stages": 0}, "stages"),
        (REAL_PREFILL[0], {"stages": 7}, "B of shared memory, h200 has 232448"),
        (REAL_PREFILL[0], {"block_n": 128}, "would spill"),
        (REAL_PREFILL[0], {"q_in_registers": True}, "would spill"),
        (replace(REAL_PREFILL[0], dtype="float32"), {}, "not float32"),
        (replace(REAL_PREFILL[0], head_dim=68), {}, "multiples of 8"),
        (replace(REAL_PREFILL[0], head_dim=512), {}, "up to 256"),
        (replace(REAL_PREFILL[0], head_dim=64, head_dim_v=128), {}, "larger than that of k"),
        (replace(REAL_PREFILL[0], q_lens=(1,) * 70000), {}, "second dimension"),
        (REAL_DECODE[0], {"block_n": 48}, "block_n is"),
        (REAL_DECODE[0], {"warps": 0}, "warps"),
        (REAL_DECODE[0], {"stages": 8}, "B of shared memory, h200 has 232448"),
        (REAL_DECODE[0], {"row_fragments": 2}, "row_fragments"),
        (REAL_DECODE[2], {"row_fragments": 5}, "would spill"),
        (REAL_DECODE[0], {"num_splits": 1000}, "even pieces"),
        (REAL_DECODE[0], {"num_splits": 10**6}, "65535"),
        (REAL_DECODE[0], {"num_splits": 127}, "even pieces"),  # 128 tiles: 127 pieces would be 64 of two tiles
        (REAL_DECODE[0], {"num_splits": -1}, "num_splits"),
        (replace(REAL_DECODE[0], dtype="float32"), {}, "not float32"),
        (replace(REAL_DECODE[0], head_dim=576, head_dim_v=512), {}, "up to 256"),
        (replace(REAL_DECODE[4], head_dim=80), {}, "multiples of 32"),
        (replace(REAL_DECODE[0], kv_lens=(1,) * 70000), {}, "65535"),
    ],
)
def test_what_cannot_run_is_refused_with_the_reason(problem, changes, says):
    kernel = FLASH if isinstance(problem, PrefillAttention) else SPLIT
    reason = kernel.fits(problem, replace(kernel.config_type(), **changes), HOPPER)
    assert reason is not None and says in reason


@needs_gcc
def test_columns_of_fp8_fragments():
    """Queries and keys agree on their columns, and every column of the output has one place."""
    source = '#include "fp8_cache.cuh"\nusing namespace klab;'
    queries, outputs, sorted_bytes = probe(
        source,
        ["query_column(i)", "column_of(i / 8, i % 8 / 2, i % 2)", "static_cast<int>(sort_bytes(i | i << 8 | 7 << 16 | 9 << 24))"],
        64,
    )
    for dim, column in enumerate(queries):
        # A lane's four bytes of a key are columns 4 pair .. 4 pair + 3; the fragment has its columns 2 pair, + 1, + 8 and + 9.
        pair, byte = dim % 16 // 4, dim % 4
        assert column == dim // 16 * 16 + 2 * pair + (0, 1, 8, 9)[byte]
    assert sorted(outputs) == list(range(64))
    # Two bytes of a key's row are columns 2 quad and 2 quad + 1: even columns go to one tile, odd ones to the next.
    assert outputs[:16] == [*range(0, 16, 2), *range(1, 16, 2)]
    assert sorted_bytes[5] == 5 | 7 << 8 | 5 << 16 | 9 << 24


def test_older_chips_are_refused():
    for kernel, problem in ((FLASH, REAL_PREFILL[0]), (SPLIT, REAL_DECODE[0])):
        assert "compute capability" in (kernel.unfit(problem, TURING) or "")
        assert not list(kernel.space(problem, TURING))


@pytest.mark.parametrize(("kernel", "problem"), [(FLASH, REAL_PREFILL[0]), (SPLIT, REAL_DECODE[0])], ids=lambda v: getattr(v, "name", ""))
def test_rows_off_16_bytes_are_one_clear_error(kernel, problem):
    launch = kernel.build(problem, kernel.default(problem, HOPPER), HOPPER)
    with pytest.raises(UsageError, match="16-byte aligned"):
        launch(problem.inputs(seed=0, device="meta", row_padding=4), problem.outputs(device="meta"))


def test_split_rule():
    """Full waves without splitting are left alone; one long sequence fills the chip; equal pieces for all lengths; always within bounds."""
    assert choose_splits([64] * 256, 2048, 264) == 1
    assert choose_splits([1], 8, 264) == 1 and choose_splits([0, 0], 16, 264) == 1
    alone = choose_splits([2048], 8, 264)
    assert 0.9 * 264 <= 8 * alone <= 264
    assert choose_splits([2048, *[16] * 63], 512, 264) >= 8, "a single long sequence in a full batch is still the longest work"
    assert choose_splits([2048], 8, 264, merge_tiles=1e9) == 1
    for longest, splits in itertools.product((1, 7, 64, 2048), (1, 3, 64, 5000)):
        piece = tiles_per_split(longest, splits)
        assert 1 <= piece <= longest and -(-longest // piece) <= max(splits, 1)


@pytest.mark.parametrize("chip", [HOPPER, BLACKWELL], ids=lambda chip: chip.arch)
@pytest.mark.parametrize(
    ("kernel", "problems"), [(FLASH, REAL_PREFILL[::4]), (SPLIT, REAL_DECODE[2:])], ids=lambda v: getattr(v, "name", "")
)
def test_defaults_compile_without_spills(kernel, problems, chip):
    inspect = pytest.importorskip("klab.harness.tune.inspect_cubin")
    from cupy.cuda import nvrtc

    from klab.harness.tune.offline import compile_launch

    # The register allocation is that of the pinned compiler; another one may be a few registers short of the 255 there are.
    allowed = 0 if nvrtc.getVersion() == (13, 0) else 64
    for problem in problems:
        artifacts, _ = compile_launch(kernel, problem, kernel.default(problem, chip), chip)
        module = prefill if kernel is FLASH else decode
        for artifact in artifacts:
            found = inspect.inspect_artifact(artifact)
            assert found.stack_bytes <= allowed, f"{problem.label()}: {artifact.name} spills {found.stack_bytes} bytes"
            assert found.registers * artifact.threads <= 65536
            if artifact.name != "combine_pieces":
                assert found.matrix_unit == "mma.sync"
                assert artifact.dynamic_smem_bytes == module.smem_bytes(problem, kernel.default(problem, chip))
                # The estimate that `fits` prunes by: never far from what the compiler takes.
                assert abs(found.registers - module.registers(problem, kernel.default(problem, chip))) <= 64
