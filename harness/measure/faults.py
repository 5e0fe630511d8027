"""What an exception of somebody's kernel means: one of the closed list of statuses, and one line."""

from __future__ import annotations

from klab.harness.store.result import Status
from klab.kernels.errors import KlabError

# Parts of the texts and type names by which toolkits report these. Triton's OutOfResources (shared memory, registers) is a compiler's
# finding, not a full device.
_MEMORY = ("outofmemory", "out of memory", "can't allocate memory", "cannot allocate memory", "memoryerror")
_COMPILE = ("compil", "outofresources", "nvrtc", "passmanager", "ptxas", "nvcc", "syntaxerror", "mlir")
_FATAL = (
    "illegal memory access",
    "illegal instruction",
    "misaligned address",
    "unspecified launch failure",
    "device-side assert",
    "launch timed out",
)


# Only the first line is looked at: torch ends every CUDA error with advice on compiling "to enable device-side assertions".
def one_line(error: BaseException) -> str:
    """`Type: first line`, at most 300 characters."""
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {text}"[:300] if text else type(error).__name__


def status_of(error: BaseException, *, building: bool) -> Status:
    """The status of a trial whose kernel raised this; `building` until its first launch has ended."""
    if isinstance(error, NotImplementedError | KlabError):
        return Status.UNSUPPORTED
    said = one_line(error).lower()
    if any(word in said for word in _MEMORY):
        return Status.OUT_OF_MEMORY
    if building and (any(word in said for word in _COMPILE) or type(error).__module__.split(".")[0] == "triton"):
        return Status.COMPILE_ERROR
    return Status.CRASHED


def is_fatal(error: BaseException) -> bool:
    """True when the CUDA context is broken for good, so that the worker must be replaced."""
    said = one_line(error).lower()
    return any(word in said for word in _FATAL)
