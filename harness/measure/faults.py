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
# The device itself, whatever ran on it: fallen off the bus (Xid 79), not to be had, or with memory or links that failed. Texts of the CUDA
# runtime (cudaGetErrorString), of torch and of NVML.
_DEVICE = (
    "fallen off the bus",
    "gpu is lost",
    "no cuda-capable device",
    "no cuda gpus are available",
    "devices are busy or unavailable",
    "uncorrectable ecc error",
    "uncorrectable nvlink error",
    "system not yet initialized",
)
# How the text of a worker that was killed begins (client.py). No kernel ends its own process so, but who is short of memory kills the
# largest.
KILLED = "killed by SIGKILL"


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
    return any(word in said for word in (*_FATAL, *_DEVICE))


def is_of_device(reason: str) -> bool:
    """True when a reason speaks of the device as such, and not of what ran on it."""
    return any(word in reason.lower() for word in _DEVICE)


def from_outside(reason: str) -> bool:
    """True when what ended a worker need not be its kernel's fault: the trial is tried once more before it is blamed."""
    return reason.startswith(KILLED) or is_of_device(reason)
