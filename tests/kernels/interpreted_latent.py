"""Run by test_latent_attention.py in a process of its own: TRITON_INTERPRET must be set before triton is imported.

What the examples do not have: caches whose unused slots hold NaN, one launch used again with other lengths (its workspace then holds old
partial results), ranges that lie wholly behind a row's last key, an fp8 cache in several ranges.
"""

import os
import sys

os.environ["TRITON_INTERPRET"] = "1"

import torch
from contest import HOPPER

from klab.harness.measure.check import compare, poison
from klab.kernels.discover import discover
from klab.kernels.latent_attention.problem import LatentAttention

SMALL = {"kv_lora_rank": 64, "rope_dim": 32, "dtype": "float16"}
CASES = [
    (LatentAttention((65, 64, 63, 1), 4, page_size=16, **SMALL), {"num_splits": 3}),
    (LatentAttention((70, 0, 33), 20, page_size=5, **SMALL), {"num_splits": 2}),
    (LatentAttention((34, 8), 3, q_len=8, page_size=1, **SMALL), {"num_splits": 3}),
    (LatentAttention((60, 20), 5, q_len=2, page_size=64, kv_dtype="float8_e4m3fn", **SMALL), {"num_splits": 2}),
]


def spoil_unused(problem, inputs):
    """NaN in every slot of the cache that no sequence holds."""
    used = torch.zeros(inputs["kv_cache"].shape[:2], dtype=torch.bool)
    for row, length in zip(inputs["block_table"].tolist(), inputs["kv_lens"].tolist(), strict=True):
        for token in range(length):
            used[row[token // problem.page_size], token % problem.page_size] = True
    if problem.kv_dtype:
        inputs["kv_cache"].view(torch.uint8)[~used] = 0x7F
    else:
        inputs["kv_cache"][~used] = float("nan")


def shortened(problem, inputs):
    """The same problem and inputs when every sequence but the longest is 7 tokens shorter (none stays without its new tokens)."""
    longest = problem.max_kv_len
    lens = tuple(n if n in (0, longest) else max(problem.q_len, n - 7) for n in problem.kv_lens)
    return LatentAttention(**{**vars(problem), "kv_lens": lens}), inputs | {"kv_lens": torch.tensor(lens, dtype=torch.int32)}


def main():
    kernel = next(k for k in discover().of("latent_attention") if k.name == "triton_split_latent")
    failures = 0
    for i, (problem, changes) in enumerate(CASES):
        config = kernel.config_type(block_m=16, block_n=32 if problem.q_len == 1 else 16, num_warps=4, **changes)
        assert kernel.fits(problem, config, HOPPER) is None, (problem, config, kernel.fits(problem, config, HOPPER))
        launch, inputs = kernel.build(problem, config, HOPPER), problem.inputs(seed=i, row_padding=16)
        spoil_unused(problem, inputs)
        for again in (False, True):
            now, given = shortened(problem, inputs) if again else (problem, inputs)
            outputs = now.outputs()
            poison(outputs)
            launch(given, outputs)
            found = compare(now, outputs, now.reference(given))
            if not found.passed:
                failures += 1
                print(f"{now.label()} [{config.label()}] again={again}: {found.reason}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
