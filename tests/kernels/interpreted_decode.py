"""Run by test_decode_attention.py in a process of its own: TRITON_INTERPRET must be set before triton is imported.

What the examples do not have: caches whose unused slots hold NaN, one launch used again with other lengths (its workspace then holds
old partial results), ranges that lie wholly behind a row's last key, windows that begin inside a block, views of fused buffers.
"""

import os
import sys

os.environ["TRITON_INTERPRET"] = "1"

import torch
from contest import HOPPER

from klab.harness.measure.check import compare, poison
from klab.kernels.decode_attention.problem import DecodeAttention
from klab.kernels.discover import discover

HALF = {"dtype": "float16"}
FP8 = "float8_e4m3fn"
CASES = [
    # (problem, fields of the configuration beside the default)
    (DecodeAttention((65, 64, 63, 1), 4, 2, 64, page_size=16, **HALF), {"num_splits": 3}),
    (DecodeAttention((65, 0, 128), 2, 1, 64, page_size=128, **HALF), {"num_splits": 2}),
    (DecodeAttention((97, 33), 3, 1, 32, page_size=5, **HALF), {"num_splits": 2}),
    (DecodeAttention((130, 8), 8, 1, 64, q_len=4, page_size=1, **HALF), {"num_splits": 3}),
    (DecodeAttention((66, 5), 4, 1, 64, q_len=5, page_size=16, **HALF), {"num_splits": 2}),
    (DecodeAttention((200, 77, 0, 31), 2, 1, 64, window=33, **HALF), {"num_splits": 2}),
    (DecodeAttention((150, 40), 2, 1, 64, q_len=3, window=40, **HALF), {"num_splits": 2}),
    (DecodeAttention((70,), 2, 1, 80, head_dim_v=48, **HALF), {"num_splits": 2}),
    (DecodeAttention((70,), 2, 1, 192, head_dim_v=128, **HALF), {}),
    (DecodeAttention((96, 50), 34, 1, 64, q_len=1, **HALF), {"num_splits": 2}),
    (DecodeAttention((90, 33), 2, 1, 64, logit_gain=400.0, dtype="float32"), {"num_splits": 2}),
    (DecodeAttention((90, 33), 2, 1, 64, logit_gain=60.0, **HALF), {"num_splits": 2}),
    (DecodeAttention((90, 0, 33), 6, 2, 64, sinks=True, window=40, **HALF), {"num_splits": 2}),
    (DecodeAttention((90, 33), 6, 2, 64, sinks=True, softcap=20.0, q_len=2, **HALF), {}),
    # bf16 queries become fp16 beside an fp8 cache, and in fp16 the interpreter is right.
    (DecodeAttention((90, 33), 4, 2, 96, head_dim_v=64, page_size=1, kv_dtype=FP8, dtype="bfloat16"), {"num_splits": 2}),
    (DecodeAttention((70, 5), 4, 1, 80, page_size=64, kv_dtype=FP8, softcap=20.0, sinks=True, q_len=2, **HALF), {"num_splits": 2}),
    # The prefix ends inside a tile of keys; the last tile of rows is ragged; a padding entry comes first.
    (DecodeAttention((0, 96, 75, 130), 6, 2, 64, shared_prefix=64, page_size=32, **HALF), {"num_splits": 2}),
    (DecodeAttention((60, 75, 61), 6, 2, 48, q_len=3, shared_prefix=48, sinks=True, softcap=20.0, **HALF), {}),
    (DecodeAttention((60, 75, 59), 34, 2, 64, shared_prefix=48, page_size=1, kv_dtype=FP8, dtype="bfloat16"), {"num_splits": 1}),
    (DecodeAttention((75, 60), 4, 2, 80, shared_prefix=58, page_size=29, **HALF), {"prefix_splits": 2}),
]
SMALL = {
    "triton_split_kv": {"block_n": 32},
    "triton_warp_split": {"warp_n": 16, "num_warps": 2},
    "triton_cascade": {"block_n": 16, "prefix_m": 16, "prefix_n": 32, "prefix_warps": 4},
}


def spoil_unused(problem, inputs):
    """NaN in every slot of the cache that no sequence holds."""
    used = torch.zeros(inputs["k_cache"].shape[:2], dtype=torch.bool)
    for row, length in zip(inputs["block_table"].tolist(), inputs["kv_lens"].tolist(), strict=True):
        for token in range(length):
            used[row[token // problem.page_size], token % problem.page_size] = True
    for cache in (inputs["k_cache"], inputs["v_cache"]):
        if cache.element_size() == 1:
            cache.view(torch.uint8)[~used] = 0x7F
        else:
            cache[~used] = float("nan")


def shortened(problem, inputs):
    """The same problem and inputs when every sequence but the longest is 7 tokens shorter (none stays without its new tokens)."""
    longest = problem.max_kv_len
    lens = tuple(n if n in (0, longest) else max(problem.shared_prefix + problem.q_len, n - 7) for n in problem.kv_lens)
    other = DecodeAttention(**{**vars(problem), "kv_lens": lens})
    return other, inputs | {"kv_lens": torch.tensor(lens, dtype=torch.int32)}


def main(name):
    kernel = next(k for k in discover().of("decode_attention") if k.name == name)
    ran = failures = 0
    for i, (problem, changes) in enumerate(CASES):
        if kernel.unfit(problem, HOPPER) is not None:
            continue
        fields = SMALL[name] | changes
        config = kernel.config_type(**{field: value for field, value in fields.items() if hasattr(kernel.config_type(), field)})
        assert kernel.fits(problem, config, HOPPER) is None, (problem, config, kernel.fits(problem, config, HOPPER))
        launch = kernel.build(problem, config, HOPPER)
        inputs = problem.inputs(seed=i, row_padding=16)
        spoil_unused(problem, inputs)
        for again in (False, True):
            now, given = shortened(problem, inputs) if again else (problem, inputs)
            outputs = now.outputs()
            poison(outputs)
            launch(given, outputs)
            found = compare(now, outputs, now.reference(given))
            ran += 1
            if not found.passed:
                failures += 1
                print(f"{now.label()} [{config.label()}] again={again}: {found.reason}")
    print(f"{ran} runs, {failures} failures")
    return 1 if failures or ran < (8 if name == "triton_cascade" else 16) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
