"""Run by test_matmul.py in a process of its own: TRITON_INTERPRET must be set before triton is imported.

usage: interpreted_matmul.py KERNEL_ID     prints one line per failure; the exit code says whether any
"""

import os
import sys

os.environ["TRITON_INTERPRET"] = "1"

import dataclasses
from itertools import product

import torch
from contest import HOPPER, kernels
from matmul_inputs import cancelling, nan_padded

from klab.harness.measure.check import compare, poison
from klab.kernels.matmul.problem import Matmul

# k = 88 takes 6 steps of 16, the last one half: of 4 splits one is empty.
# A specialised tile has 128 rows, which takes more than 64 to fit.
ROWS = {"matmul/triton_tiled": (1, 19), "matmul/triton_persistent": (1, 70)}


def configs(kernel, problem):
    """The corners of the kernel's knobs that fit, mostly with the smallest tiles: the interpreter is slow."""
    small = dataclasses.replace(kernel.default(problem, HOPPER), block_m=16, block_n=32, block_k=16, group_m=2, num_warps=2, num_stages=2)
    if kernel.name == "triton_tiled":
        corners = [dataclasses.replace(small, split_k=splits) for splits in (1, 2, 4)]
    else:
        corners = [dataclasses.replace(small, epilogue_subtiles=slices, flatten=flatten) for slices, flatten in ((1, False), (2, True))]
        specialised = dataclasses.replace(small, block_m=128, block_n=64, num_warps=4, warp_specialize=True, flatten=False)
        corners += [specialised, dataclasses.replace(small, block_m=64, block_n=64, epilogue_subtiles=4)]
    return [config for config in corners if kernel.fits(problem, config, HOPPER) is None]


def run(kernel, problem, config, inputs):
    outputs = problem.outputs()
    poison(outputs)
    kernel.build(problem, config, HOPPER)(inputs, outputs)
    return outputs


def main(kernel_id):
    kernel = next(k for k in kernels("triton") if k.id == kernel_id)
    ran, failures = 0, []
    for m, (dtype, layout) in product(ROWS[kernel_id], (("float16", "nt"), ("float16", "nn"), ("float32", "nt"))):
        problem = Matmul(m, 40, 88, dtype, layout)
        if kernel.unfit(problem, HOPPER) is not None:
            continue
        hostile = [("NaN beside the rows", nan_padded(problem))]
        if problem.dtype == "float16":
            hostile.append(("huge sums that cancel", cancelling(problem)))
        for config in configs(kernel, problem):
            for what, inputs in hostile:
                found = compare(problem, run(kernel, problem, config, inputs), problem.reference(inputs))
                ran += 1
                if not found.passed:
                    failures.append(f"{problem.label()} {config.label()}, {what}: {found.reason}")
            # The same launch again, other inputs in between: leftovers in the workspace must not show, and sums keep their order.
            launch, first, again = kernel.build(problem, config, HOPPER), problem.outputs(), problem.outputs()
            inputs = problem.inputs(seed=1)
            launch(inputs, first)
            launch(problem.inputs(seed=2), problem.outputs())
            launch(inputs, again)
            if not torch.equal(first["out"], again["out"]):
                failures.append(f"{problem.label()} {config.label()}: two runs differ")
    print(*failures, f"{ran} runs, {len(failures)} failures", sep="\n")
    return 1 if failures or not ran else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
