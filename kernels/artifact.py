"""What a compiler produced for one launch, and the switch that makes a launch compile without running.

Screening runs a kernel's own `build` and launch on meta tensors inside `compile_only()`. Whatever would have been launched is
compiled for the chip and recorded here, so the specialisation that is inspected is the one that a GPU would run.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Artifact:
    """One compiled device function: `name`, the binary, its PTX where there is any, and what the compiler said of it."""

    name: str
    cubin: bytes
    ptx: str = ""
    dynamic_smem_bytes: int = 0
    threads: int = 0
    metadata: dict[str, str] = field(default_factory=dict)


_recording: ContextVar[list[Artifact] | None] = ContextVar("klab_recording", default=None)


@contextmanager
def compile_only() -> Iterator[list[Artifact]]:
    """Within this block launches compile and record, and nothing runs. Yields the list that fills."""
    artifacts: list[Artifact] = []
    token = _recording.set(artifacts)
    try:
        yield artifacts
    finally:
        _recording.reset(token)


def recording() -> list[Artifact] | None:
    """The list to append to when compiling only, or None when launches are to run."""
    return _recording.get()
