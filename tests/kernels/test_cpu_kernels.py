"""Every kernel that runs on a CPU gives the reference's answer, on every example it fits."""

import pytest
from contest import CPU, cases, kernels

from klab.harness.measure.check import check

# torch multiplies float16 slowly on a CPU: only where the examples are small and float16's range is what may go wrong.
ALSO_FLOAT16 = ("gated_delta_rule", "index_scores", "latent_attention", "sparse_latent_attention", "topk_select")
CPU_KERNELS = [k for k in kernels("torch", "cpu") if "cpu" in k.kinds]


@pytest.mark.parametrize("kernel", CPU_KERNELS, ids=lambda k: k.id)
@pytest.mark.parametrize("row_padding", [0, 8])
def test_agrees_with_reference(kernel, row_padding):
    ran = 0
    dtypes = ("float32", "bfloat16", *(["float16"] if kernel.problem_type.operator in ALSO_FLOAT16 else []))
    for i, (problem, config) in enumerate(cases(kernel, CPU, dtypes=dtypes, configs=3)):
        found = check(problem, kernel.build(problem, config, CPU), seed=i, row_padding=row_padding)
        assert found.passed, f"{problem.label()} {config.label()}: {found.reason}"
        ran += 1
    assert ran > 0, "the kernel fits none of the examples"
