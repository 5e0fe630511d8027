"""Kernels that take their process along, or never come back."""

import contextlib
import ctypes
import os
import time
from pathlib import Path

from klab.kernels.contract import kernel
from klab.kernels.matmul.problem import Matmul


def contestant(build):
    return kernel(Matmul, backend="cpu", kinds=("cpu",))(build)


def product(inputs):
    return inputs["x"] @ inputs["w"].T


@contestant
def aborts(problem, config, chip):
    """Ends as an assertion in C does."""
    return lambda inputs, outputs: os.abort()


@contestant
def segfaults(problem, config, chip):
    """Reads address 8."""
    return lambda inputs, outputs: ctypes.string_at(8)


@contestant
def tears_the_heap(problem, config, chip):
    """Frees a block twice, as a C kernel does that loses count."""

    def launch(inputs, outputs):
        libc = ctypes.CDLL(None)
        libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, (ctypes.c_void_p,)
        block = libc.malloc(64)
        libc.free(block)
        libc.free(block)

    return launch


@contestant
def hangs(problem, config, chip):
    """Sleeps for an hour."""
    return lambda inputs, outputs: time.sleep(3600)


@contestant
def dies_late(problem, config, chip):
    """Right for 60 launches, then gone."""
    left = [60]

    def launch(inputs, outputs):
        left[0] -= 1
        if left[0] < 0:
            os._exit(7)
        outputs["out"].copy_(product(inputs))

    return launch


@contestant
def chatty(problem, config, chip):
    """Right, and prints to standard output in every way there is."""

    def launch(inputs, outputs):
        print('{"id": 1, "status": "ok"}', flush=True)
        os.write(1, b"noise on descriptor 1\n")
        outputs["out"].copy_(product(inputs))

    return launch


@contestant
def scribbles(problem, config, chip):
    """Writes to every file descriptor it can find, the worker's answers included."""

    def launch(inputs, outputs):
        for descriptor in range(3, 64):
            with contextlib.suppress(OSError):
                os.write(descriptor, b"scribble\n")
        outputs["out"].copy_(product(inputs))

    return launch


@contestant
def takes_its_time(problem, config, chip):
    """Right, 30 ms late."""

    def launch(inputs, outputs):
        time.sleep(0.03)
        outputs["out"].copy_(product(inputs))

    return launch


@contestant
def loses_its_device(problem, config, chip):
    """Right, but the device is gone as often as the file that $KLAB_FAULT_TIMES names has bytes (tests/harness/faulty_worker.py)."""

    def launch(inputs, outputs):
        left = Path(os.environ.get("KLAB_FAULT_TIMES", os.devnull))
        times = len(left.read_bytes())
        if times:
            left.write_bytes(b"." * (times - 1))
            Path(os.environ["KLAB_FAULT_LOST"]).touch()
            raise RuntimeError("CUDA error: unspecified launch failure")
        outputs["out"].copy_(product(inputs))

    return launch
