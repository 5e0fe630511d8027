"""Run by test_prefill_attention.py in a process of its own: TRITON_INTERPRET must be set before triton is imported.

What the examples and defaults do not have: packed query heads, a group that is no power of two, head dimensions that need padding or
splitting, windows that end inside a block, a prefix that is no multiple of a tile, both ways of making descriptors.

usage: interpreted_prefill.py KERNEL     prints one line per failure; the exit code says whether any
"""

import itertools
import os
import sys

os.environ["TRITON_INTERPRET"] = "1"

from contest import BLACKWELL, HOPPER

from klab.harness.measure.check import check
from klab.kernels.discover import discover
from klab.kernels.prefill_attention.problem import PrefillAttention

HALF = {"dtype": "float16"}
PROBLEMS = [
    PrefillAttention((130, 1, 66), 6, 2, 64, **HALF),
    PrefillAttention((33, 50), 10, 2, 64, prefix_lens=(70, 129), **HALF),
    PrefillAttention((90, 20), 4, 1, 64, prefix_lens=(3, 200), window=50, **HALF),
    PrefillAttention((140,), 2, 1, 64, window=1, **HALF),
    PrefillAttention((64, 128), 2, 1, 64, causal=False, prefix_lens=(64, 0), **HALF),
    PrefillAttention((70, 5), 4, 2, 80, head_dim_v=48, **HALF),
    PrefillAttention((70,), 2, 1, 72, prefix_lens=(9,), **HALF),
    PrefillAttention((65,), 4, 2, 192, head_dim_v=128, window=40, **HALF),
    PrefillAttention((100,), 4, 2, 64, logit_gain=300.0, **HALF),
    PrefillAttention((40, 31), 6, 2, 80, logit_gain=300.0, dtype="float32"),
    PrefillAttention((100,), 2, 1, 64, window=30, dtype="float32"),
    PrefillAttention((70, 9), 6, 2, 64, sinks=True, softcap=5.0, window=40, **HALF),
    PrefillAttention((66, 5), 4, 2, 64, prefix_lens=(100, 40), page_size=64, sinks=True, kv_dtype="float8_e4m3fn", **HALF),
    PrefillAttention((66,), 4, 2, 128, prefix_lens=(100,), page_size=32, softcap=5.0, **HALF),
    PrefillAttention((90, 40), 2, 1, 64, kv_tokens=(20, 150), causal=False, sinks=True, **HALF),
]


def path(config):
    """The knobs that change which code runs."""
    return config.pack_gqa, getattr(config, "warp_specialize", False)


def chosen(kernel, problem, chip, turn):
    """For each path that this chip alone takes, the smallest tile or one a third up the list (an interpreted tile costs seconds)."""
    space = sorted(kernel.space(problem, chip), key=lambda c: (c.block_m * c.block_n, c.heads_fastest))
    for wanted in sorted({path(c) for c in space if chip is HOPPER or path(c)[1]}):
        on_path = [c for c in space if path(c) == wanted]
        yield on_path[len(on_path) // 3 * (turn % 2)]


def leaks(kernel, chip, config):
    """Does an infinity among one sequence's values reach the sequence before it in the packed tensor?"""
    problem = PrefillAttention((33, 40), 4, 2, 64, **HALF)
    if kernel.fits(problem, config, chip) is not None:
        return False
    inputs, outputs = problem.inputs(seed=1), problem.outputs()
    inputs["v"][33:] = float("inf")
    kernel.build(problem, config, chip)(inputs, outputs)
    return not bool(outputs["out"][:33].isfinite().all())


def main(name):
    kernel = next(k for k in discover().of("prefill_attention") if k.name == name)
    ran = failures = 0
    for chip in (HOPPER, BLACKWELL):
        problem = PrefillAttention((33, 40), 4, 2, 64, **HALF)
        for config in (kernel.default(problem, chip), *chosen(kernel, problem, chip, 0)):
            if leaks(kernel, chip, config):
                failures += 1
                print(f"{chip.name} [{config.label()}]: an infinity reaches the neighbouring sequence")
    for i, (problem, chip) in enumerate(itertools.product(PROBLEMS, (HOPPER, BLACKWELL))):
        for config in chosen(kernel, problem, chip, i // 2) if kernel.unfit(problem, chip) is None else ():
            found = check(problem, kernel.build(problem, config, chip), seed=i, row_padding=8 * (i % 2))
            ran += 1
            if not found.passed:
                failures += 1
                print(f"{chip.name} {problem.label()} [{config.label()}]: {found.reason}")
    print(f"{ran} runs, {failures} failures")
    return 1 if failures or not ran else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
