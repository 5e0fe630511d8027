"""Run by test_triton_interpreted.py in a process of its own: TRITON_INTERPRET must be set before triton is imported.

usage: interpreted_triton.py OPERATOR CONFIGS_PER_EXAMPLE [KERNEL_NAME]     prints one line per failure; the exit code says whether any
"""

import os
import sys

os.environ["TRITON_INTERPRET"] = "1"

from contest import BLACKWELL, HOPPER, cases, kernels

from klab.harness.measure.check import check


def main(operator: str, configs: int, name: str = "") -> int:
    failed = False
    for kernel in kernels("triton"):
        if kernel.problem_type.operator != operator or (name and kernel.name != name):
            continue
        ran = failures = 0
        # A kernel for Blackwell's own instructions takes nothing on Hopper.
        examples = kernel.problem_type.examples()
        chip = HOPPER if any(kernel.unfit(problem, HOPPER) is None for problem in examples) else BLACKWELL
        # bf16 arithmetic is garbage in the interpreter (it computes on the bit patterns), so bf16 is checked on a device only.
        for i, (problem, config) in enumerate(cases(kernel, chip, dtypes=("float16", "float32"), configs=configs)):
            # Rows lie apart for every other default, and for every other of the further candidates.
            row_padding = 8 * ((i // 2 + i) % 2)
            found = check(problem, kernel.build(problem, config, chip), seed=i, row_padding=row_padding)
            ran += 1
            if not found.passed:
                failures += 1
                print(f"{kernel.name}: {problem.label()} [{config.label()}] row_padding={row_padding}: {found.reason}")
        print(f"{kernel.name}: {ran} runs, {failures} failures")
        failed = failed or bool(failures) or not ran
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], int(sys.argv[2]), *sys.argv[3:]))
