"""Every kernel that runs on a CPU gives the reference's answer, on every example it fits."""

import pytest
from contest import CPU, cases, kernels

from klab.harness.measure.check import check
from klab.kernels.activation.problem import Activation
from klab.kernels.fused_moe.problem import FusedMoe
from klab.kernels.index_scores.problem import IndexScores
from klab.kernels.weight_only_matmul.problem import WeightOnlyMatmul

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


@pytest.mark.parametrize(
    ("name", "problem", "seeds"),
    [
        ("activation/torch_activation", Activation(1, 1, dtype="float16"), (28, 26, 9)),
        ("fused_moe/torch_dense", FusedMoe(1, 64, 32, 8, 2, "float16"), (12776941,)),
        ("fused_moe/torch_dense", FusedMoe(1, 136, 144, 6, 1, "float16", "fp8_block"), (193, 270)),
        ("fused_moe/torch_dense", FusedMoe(12, 136, 144, 6, 2, "bfloat16", "fp8_block", local_experts=4), (113, 207)),
        ("index_scores/torch_matmul", IndexScores(1, 2, 300, 32, 128, "float16", "fp8", page_size=64), (114,)),
        # The first queries see a handful of keys each.
        ("index_scores/torch_matmul", IndexScores(1, 70, 70, 8, 64), (133, 143)),
        ("weight_only_matmul/torch_dequantize_mm", WeightOnlyMatmul(1, 1, 2), (10263445, 3246602)),
    ],
    ids=lambda value: value.label() if hasattr(value, "label") else "",
)
def test_few_outputs_pass_where_their_rounding_errors_add_up(name, problem, seeds):
    """Every opening of a problem draws a new seed: one in a hundred like these, and right kernels would be called wrong."""
    kernel = next(k for k in CPU_KERNELS if k.id == name)
    for seed in seeds:
        found = check(problem, kernel.build(problem, kernel.default(problem, CPU), CPU), seed=seed)
        assert found.passed, found.reason
