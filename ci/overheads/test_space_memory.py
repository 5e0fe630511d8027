"""Memory and time of a space of a million configurations of 10 parameters, enumerated lazily in a process of its own.

python -m pytest ci/overheads/test_space_memory.py --benchmark-enable -s
"""

from __future__ import annotations

import itertools
import json
import resource
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest

MILLION = 1_000_000
LIMIT_MB = 500.0
KNOBS: dict[str, tuple[Any, ...]] = {
    "block_m": (16, 32, 64, 128, 256),
    "block_n": (16, 32, 64, 128, 256),
    "block_k": (16, 32, 64, 128),
    "stages": (1, 2, 3, 4, 5),
    "warps": (1, 2, 4, 8),
    "split_k": (1, 2, 4, 8, 16),
    "order": ("rows", "columns", "swizzled", "snake", "morton"),
    "group": (1, 2, 4, 8, 16),
    "persistent": (False, True),
    "unroll": (0.5, 1.0),
}


def generated() -> Iterator[dict[str, Any]]:
    for values in itertools.islice(itertools.product(*KNOBS.values()), MILLION):
        yield dict(zip(KNOBS, values, strict=True))


def of_a_kernel() -> Iterator[dict[str, Any]]:
    from klab.harness.tune.space import kernel_points
    from klab.kernels.contract import Chip, Config, kernel
    from klab.kernels.matmul.problem import Matmul

    @dataclass(frozen=True)
    class Knobs(Config):
        block_m: int = 16
        block_n: int = 16
        block_k: int = 16
        stages: int = 1
        warps: int = 1
        split_k: int = 1
        order: str = "rows"
        group: int = 1
        persistent: bool = False
        unroll: float = 0.5

    def product(problem: Matmul, chip: Chip) -> Iterator[Knobs]:
        return itertools.starmap(Knobs, itertools.islice(itertools.product(*KNOBS.values()), MILLION))

    @kernel(Matmul, backend="cpu", config=Knobs, space=product)
    def large(problem: Matmul, config: Knobs, chip: Chip) -> Any:
        """A kernel with a space of a million."""
        raise AssertionError("it is only enumerated")

    chip = Chip("cpu", "CPU", "cpu", 2, 2000.0, 2000.0, {}, 10**9, 10.0, 10**6)
    return kernel_points([large], Matmul(8, 8, 8), chip)


def child(source: str, traced: bool) -> None:
    """Print one JSON line: what a Space of this source takes, and what looking things up in it takes."""
    from klab.harness.tune.space import Space

    points = {"generator": generated, "kernel": of_a_kernel}[source]()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if traced:
        tracemalloc.start()
    start = time.perf_counter()
    space = Space.of(points)
    made_s = time.perf_counter() - start
    assert len(space) == MILLION
    for candidate in range(0, MILLION, 9973):
        assert space.find(space.point(candidate)) == candidate
    start = time.perf_counter()
    for candidate in range(0, MILLION, 9973):
        assert len(space.neighbours(candidate)) >= 10
    neighbours_ms = 1e3 * (time.perf_counter() - start) / len(range(0, MILLION, 9973))
    found = {
        "seconds": made_s,
        "neighbours_ms": neighbours_ms,
        # KiB on Linux, bytes on macOS.
        "rss_mb": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / (1e6 if sys.platform == "darwin" else 1e3),
        "traced_mb": tracemalloc.get_traced_memory()[1] / 1e6 if traced else None,
    }
    print(json.dumps(found))


def measured(source: str, *, traced: bool = False) -> dict[str, Any]:
    command = [sys.executable, __file__, source, *(["traced"] if traced else [])]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=280)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("source", ["generator", "kernel"])
def test_a_million_configurations_fit_in_little_memory(benchmark: Any, source: str) -> None:
    found = benchmark.pedantic(measured, args=(source,), rounds=1)
    benchmark.extra_info.update(found)
    print(
        f"\n{MILLION:,} configurations of {len(KNOBS)} parameters from a {source}: {found['seconds']:.1f} s, process grew by "
        f"{found['rss_mb']:.0f} MB at its peak; neighbours of a candidate {found['neighbours_ms']:.2f} ms"
    )
    assert found["rss_mb"] < LIMIT_MB


def test_what_python_and_numpy_allocate_is_little() -> None:
    found = measured("generator", traced=True)
    print(f"\nallocated at the peak, by tracemalloc: {found['traced_mb']:.0f} MB")
    assert found["traced_mb"] < LIMIT_MB


if __name__ == "__main__":
    child(sys.argv[1], "traced" in sys.argv[2:])
