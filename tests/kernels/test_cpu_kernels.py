"""Every kernel that runs on a CPU gives the reference's answer, on every example it fits."""

import pytest
from contest import CPU, cases, kernels

from klab.harness.measure.check import check

CPU_KERNELS = [k for k in kernels("torch", "cpu") if "cpu" in k.kinds]


@pytest.mark.parametrize("kernel", CPU_KERNELS, ids=lambda k: k.id)
@pytest.mark.parametrize("row_padding", [0, 8])
def test_agrees_with_reference(kernel, row_padding):
    ran = 0
    for i, (problem, config) in enumerate(cases(kernel, CPU, dtypes=("float32", "bfloat16"), configs=3)):
        found = check(problem, kernel.build(problem, config, CPU), seed=i, row_padding=row_padding)
        assert found.passed, f"{problem.label()} {config.label()}: {found.reason}"
        ran += 1
    assert ran > 0, "the kernel fits none of the examples"
