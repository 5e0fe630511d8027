"""Run by test_triton_interpreted.py in a process of its own: TRITON_INTERPRET must be set before triton is imported.

usage: interpreted_triton.py KERNEL_ID CONFIGS_PER_EXAMPLE     prints one line per failure; the exit code says whether any
"""

import os
import sys

os.environ["TRITON_INTERPRET"] = "1"

from contest import HOPPER, cases, kernels

from klab.harness.measure.check import check


def main(kernel_id: str, configs: int) -> int:
    kernel = next(k for k in kernels("triton") if k.id == kernel_id)
    ran = failures = 0
    # bf16 arithmetic is garbage in the interpreter (it computes on the bit patterns), so bf16 is checked on a device only.
    for i, (problem, config) in enumerate(cases(kernel, HOPPER, dtypes=("float16", "float32"), configs=configs)):
        for row_padding in (0, 8):
            found = check(problem, kernel.build(problem, config, HOPPER), seed=i, row_padding=row_padding)
            ran += 1
            if not found.passed:
                failures += 1
                print(f"{problem.label()} [{config.label()}] row_padding={row_padding}: {found.reason}")
    print(f"{ran} runs, {failures} failures")
    return 1 if failures or not ran else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], int(sys.argv[2])))
