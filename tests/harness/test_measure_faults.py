import pytest
import torch

from klab.harness.measure.faults import from_outside, is_fatal, one_line, status_of
from klab.harness.store.result import Status
from klab.kernels.errors import CannotMeasure

ADVICE = "\nCUDA kernel errors might be asynchronously reported\nCompile with `TORCH_USE_CUDA_DSA` to enable device-side assertions."


def named(name, module="cupy.cuda"):
    return type(name, (Exception,), {"__module__": module})


@pytest.mark.parametrize(
    ("error", "building", "status"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), True, Status.OUT_OF_MEMORY),
        (MemoryError(), False, Status.OUT_OF_MEMORY),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:117] . DefaultCPUAllocator: can't allocate memory"), False, Status.OUT_OF_MEMORY),
        (RuntimeError("Triton Error [CUDA]: out of memory"), True, Status.OUT_OF_MEMORY),
        (named("OutOfResources", "triton.runtime.errors")("out of resource: shared memory, Required: 300000"), True, Status.COMPILE_ERROR),
        (named("CompilationError", "triton.compiler.errors")("at 12:3"), True, Status.COMPILE_ERROR),
        (RuntimeError("PassManager::run failed"), True, Status.COMPILE_ERROR),
        (named("CompileException")("nvrtc: error: ..."), True, Status.COMPILE_ERROR),
        (RuntimeError("CUDA error: invalid argument" + ADVICE), True, Status.CRASHED),
        (ValueError("bug"), True, Status.CRASHED),
        (RuntimeError("PassManager::run failed"), False, Status.CRASHED),
        (NotImplementedError("odd"), True, Status.UNSUPPORTED),
        (CannotMeasure("no"), False, Status.UNSUPPORTED),
    ],
)
def test_what_an_exception_means(error, building, status):
    assert status_of(error, building=building) is status


@pytest.mark.parametrize(
    ("text", "fatal"),
    [
        ("CUDA error: an illegal memory access was encountered" + ADVICE, True),
        ("cudaErrorLaunchFailure: unspecified launch failure", True),
        ("Triton Error [CUDA]: misaligned address", True),
        ("CUDA error: device-side assert triggered", True),
        ("CUDA error: invalid argument" + ADVICE, False),
        ("CUDA out of memory", False),
        ("CUDA error: the GPU has fallen off the bus", True),
        ("CUDA error: uncorrectable ECC error encountered" + ADVICE, True),
    ],
)
def test_what_breaks_the_context_for_good(text, fatal):
    assert is_fatal(RuntimeError(text)) is fatal


def test_one_line_of_a_page():
    assert one_line(RuntimeError("\n\n  first \nsecond")) == "RuntimeError: first"
    assert one_line(MemoryError()) == "MemoryError"
    assert len(one_line(ValueError("x" * 9999))) == 300


@pytest.mark.parametrize(
    ("reason", "outside"),
    [
        ("killed by SIGKILL (out of host memory?), in sample", True),
        ("RuntimeError: No CUDA GPUs are available", True),
        ("NVMLError: GPU is lost", True),
        ("killed by SIGSEGV, in prepare", False),
        ("AcceleratorError: CUDA error: unspecified launch failure", False),
    ],
)
def test_what_need_not_be_the_kernels_fault(reason, outside):
    assert from_outside(reason) is outside
