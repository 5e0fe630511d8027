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


def one_line(error: BaseException) -> str:
    """`Type: first line`, at most 300 characters."""
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {text}"[:300] if text else type(error).__name__


def status_of(error: BaseException, *, building: bool) -> Status:
    """The status of a trial whose kernel raised this; `building` until its first launch has ended."""
    if isinstance(error, NotImplementedError | KlabError):
        return Status.UNSUPPORTED
    kind = type(error).__name__.lower()
    text = f"{kind} {str(error).lower()}"
    if any(word in text for word in _MEMORY):
        return Status.OUT_OF_MEMORY
    module = type(error).__module__.split(".")[0]
    if building and (any(word in kind for word in _COMPILE) or any(word in text[:2000] for word in _COMPILE) or module == "triton"):
        return Status.COMPILE_ERROR
    return Status.CRASHED


def is_fatal(error: BaseException) -> bool:
    """True when the CUDA context is broken for good, so that the worker must be replaced."""
    text = str(error).lower()
    return any(word in text for word in _FATAL)
