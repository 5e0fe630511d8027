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
CASES = [
    # (problem, fields of the configuration beside the default)
    (DecodeAttention((65, 64, 63, 1), 4, 2, 64, page_size=16, **HALF), {"num_splits": 3}),
    (DecodeAttention((65, 0, 128), 2, 1, 64, page_size=128, **HALF), {"num_splits": 2}),
    (DecodeAttention((97, 33), 3, 1, 32, page_size=5, **HALF), {"num_splits": 2}),
    (DecodeAttention((130, 8), 8, 1, 64, q_len=4, page_size=1, **HALF), {"num_splits": 3}),
    (DecodeAttention((66, 5), 4, 1, 64, q_len=5, page_size=16, **HALF), {"num_splits": 2}),
    (DecodeAttention((200, 77, 0, 31), 2, 1, 64, window=33, **HALF), {"num_splits": 2}),
    (DecodeAttention((150, 40), 2, 1, 64, q_len=3, window=20, **HALF), {"num_splits": 2}),
    (DecodeAttention((70,), 2, 1, 80, head_dim_v=48, **HALF), {"num_splits": 2}),
    (DecodeAttention((70,), 2, 1, 192, head_dim_v=128, **HALF), {}),
    (DecodeAttention((96, 50), 34, 1, 64, q_len=1, **HALF), {"num_splits": 2}),
    (DecodeAttention((90, 33), 2, 1, 64, logit_gain=400.0, dtype="float32"), {"num_splits": 2}),
    (DecodeAttention((90, 33), 2, 1, 64, logit_gain=60.0, **HALF), {"num_splits": 2}),
]


def spoil_unused(problem, inputs):
    """NaN in every slot of the cache that no sequence holds."""
    used = torch.zeros(inputs["k_cache"].shape[:2], dtype=torch.bool)
    for row, length in zip(inputs["block_table"].tolist(), inputs["kv_lens"].tolist(), strict=True):
        for token in range(length):
            used[row[token // problem.page_size], token % problem.page_size] = True
    inputs["k_cache"][~used] = float("nan")
    inputs["v_cache"][~used] = float("nan")


def shortened(problem, inputs):
    """The same problem and inputs when every sequence but the longest is 7 tokens shorter (none stays without its new tokens)."""
    longest = problem.max_kv_len
    lens = tuple(n if n in (0, longest) else max(problem.q_len, n - 7) for n in problem.kv_lens)
    other = DecodeAttention(**{**vars(problem), "kv_lens": lens})
    return other, inputs | {"kv_lens": torch.tensor(lens, dtype=torch.int32)}


def main(name):
    kernel = next(k for k in discover().of("decode_attention") if k.name == name)
    ran = failures = 0
    for i, (problem, changes) in enumerate(CASES):
        if kernel.unfit(problem, HOPPER) is not None:
            continue
        small = {"block_n": 32} if name == "triton_split_kv" else {"warp_n": 16, "num_warps": 2}
        config = kernel.config_type(**small, **changes)
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
    return 1 if failures or ran < 16 else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
