"""What every kernel test shares: the chips, and the pairs of kernel and example that fit."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from klab.kernels.contract import Chip, Config, Kernel, Problem
from klab.kernels.discover import discover

GPU_FIELDS = {
    "kind": "cuda",
    "peak_tflops": {"bfloat16": 989.0, "float16": 989.0, "float32": 67.0},
    "memory_bytes": 141_000_000_000,
    "memory_gb_per_s": 4800.0,
    "l2_bytes": 60 << 20,
    "smem_per_block_bytes": 227 << 10,
    "smem_per_sm_bytes": 228 << 10,
    "tdp_w": 700.0,
}
HOPPER = Chip("h200", "H200", sm_count=132, max_clock_mhz=1980, spec_clock_mhz=1830, compute_capability=(9, 0), **GPU_FIELDS)
BLACKWELL = Chip("b200", "B200", sm_count=148, max_clock_mhz=1965, spec_clock_mhz=1850, compute_capability=(10, 0), **GPU_FIELDS)
CPU = Chip("cpu", "CPU", "cpu", 2, 2600, 2600, {"float32": 0.3, "bfloat16": 0.6}, 24 << 30, 40.0, 32 << 20)


def kernels(*backends: str) -> list[Kernel]:
    """Every kernel of these backends."""
    return [k for k in discover().kernels.values() if k.backend in backends]


def cases(kernel: Kernel, chip: Chip, *, dtypes: tuple[str, ...], configs: int) -> Iterator[tuple[Problem, Config]]:
    """Each example of the operator that the kernel fits, with the default and `configs` candidates spread over its space."""
    for problem in kernel.problem_type.examples():
        if problem.dtype not in dtypes or kernel.unfit(problem, chip) is not None:
            continue
        yield problem, kernel.default(problem, chip)
        # A space may be huge: look at its first 400 candidates and take a few, evenly spread.
        space = list(itertools.islice(kernel.space(problem, chip), 1, 400))
        for config in space[:: max(1, len(space) // configs)][:configs] if configs else []:
            yield problem, config
