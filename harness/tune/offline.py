"""Compile a launch for a chip that is not here: the launch's own code, on meta tensors, with a driver that only compiles."""

from __future__ import annotations

import inspect
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from klab.kernels.artifact import Artifact, compile_only, recording
from klab.kernels.contract import Chip, Config, Kernel, Problem, digest


def compile_launch(kernel: Kernel, problem: Problem, config: Config, chip: Chip) -> tuple[list[Artifact], float]:
    """Every device function that this launch would run on `chip`, in order, and the seconds it took to compile them.

    Works with no GPU. The Triton binaries land in Triton's own cache under the key that a live launch looks up, so a later
    measurement on the same versions does not compile again. Whatever the compiler raises passes through.
    """
    start = time.perf_counter()
    with compile_only() as artifacts, _offline_triton(chip):
        launch = kernel.build(problem, config, chip)
        launch(problem.inputs(seed=0, device="meta"), problem.outputs(device="meta"))
    return artifacts, time.perf_counter() - start


@contextmanager
def _offline_triton(chip: Chip) -> Iterator[None]:
    """Make Triton compile for `chip` and record instead of launching; a no-op where Triton is not installed."""
    try:
        from triton.backends.compiler import GPUTarget
        from triton.backends.driver import DriverBase
        from triton.runtime.driver import driver
        from triton.runtime.jit import JITFunction
    except ModuleNotFoundError:
        yield
        return

    class OfflineDriver(DriverBase):  # type: ignore[misc]
        """Answers what the compiler asks of a driver, and nothing that needs a device."""

        @classmethod
        def is_active(cls) -> bool:
            return True

        def map_python_to_cpp_type(self, ty: str) -> str:
            return ty

        def get_current_target(self) -> Any:
            return GPUTarget("cuda", chip.target, 32)

        # Triton keeps one cache of specialisations per device index: a chip must not meet another chip's.
        def get_current_device(self) -> int:
            return chip.target

        def get_current_stream(self, device: int) -> int:
            return 0

        def get_active_torch_device(self) -> Any:
            import torch

            return torch.device("meta")

        def get_benchmarker(self) -> Any:
            raise RuntimeError("nothing is timed offline")

    live_run = JITFunction.run

    def record_run(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        compiled = live_run(self, *args, grid=grid, warmup=True, **kwargs)
        artifacts = recording()
        if artifacts is not None and compiled is not None:
            metadata = compiled.metadata
            artifacts.append(
                Artifact(
                    name=metadata.name,
                    cubin=compiled.asm["cubin"],
                    ptx=compiled.asm["ptx"],
                    dynamic_smem_bytes=metadata.shared,
                    threads=metadata.num_warps * 32,
                    metadata={
                        "tmem_columns": str(getattr(metadata, "tmem_size", None) or 0),
                        "requested_threads": str(kwargs.get("num_warps", 4) * 32),
                        **_launch_facts(self, args, kwargs, grid, metadata),
                        "kept": f"triton:{_folder(compiled)}",
                    },
                )
            )
        return compiled

    # The driver that was active (a real one on a GPU machine) is put back; reading `active` where there is no GPU would raise.
    previous = driver._active
    driver.set_active(OfflineDriver())
    JITFunction.run = record_run
    try:
        yield
    finally:
        JITFunction.run = live_run
        driver._active = previous


def _folder(compiled: Any) -> str:
    """Name of the folder in Triton's cache that holds the binary; empty where it is kept nowhere."""
    return next((Path(path).parent.name for path in compiled.metadata_group.values()), "")


# What the launch is told beside the grid, and the machine code need not show.
_ATTRIBUTES = ("launch_pdl", "launch_cooperative_grid", "num_ctas", "cluster_dims")


def _launch_facts(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any], grid: Any, metadata: Any) -> dict[str, str]:
    """Grid, and a digest of what a launch is told: two launches of one binary are duplicates only when this agrees too."""
    names = set(inspect.signature(function.fn).parameters)
    bound = inspect.signature(function.fn).bind_partial(*args, **{k: v for k, v in kwargs.items() if k in names}).arguments
    size = list(grid(dict(bound)) if callable(grid) else grid)
    # A constexpr that changed nothing in the machine code changes nothing at all, so it does not count.
    run_time = {param.name for param in function.params if not param.is_constexpr}
    scalars = {name: repr(value) for name, value in bound.items() if name in run_time and isinstance(value, int | float)}
    attributes = {name: repr(getattr(metadata, name, None)) for name in _ATTRIBUTES}
    return {"launch": digest({"grid": size, "scalars": scalars, "attributes": attributes}), "grid": ",".join(map(str, size))}
