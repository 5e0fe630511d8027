"""Runs klab's CUDA C++ kernels on the host: the same source, compiled by g++, one fiber per thread, every memory access checked.

    with backend(Emulator()):
        launch(inputs, outputs)      # CPU tensors

What it finds, as EmulationError with the kernel's source line: an access outside the elements of the tensors passed, or outside shared
memory; a read or write that no barrier orders with another thread's; use of what a cp.async brings before cp_async_wait; unaligned
accesses; lanes that part at a warp-collective function; deadlock; index arithmetic that overflows. Wrong numbers are the check's
business: shared memory, local variables and fresh tensors start as NaN patterns.
"""

from __future__ import annotations

import ctypes
import hashlib
import itertools
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import torch

from klab.kernels.cuda_module import HEADERS, Argument, CudaKernel, Grid, Int64, TensorMap

HERE = Path(__file__).parent
# -fsanitize=thread calls a hook at each memory access (memory.cpp defines the hooks); the others trap.
CHECKS = ["-fsanitize=thread", "--param=tsan-instrument-func-entry-exit=0"]
CHECKS += ["-fsanitize=alignment,bounds,shift,signed-integer-overflow,integer-divide-by-zero,return", "-fsanitize-undefined-trap-on-error"]
COMMON = ["-std=c++17", "-fPIC", "-g1", "-U_FORTIFY_SOURCE", "-fno-strict-aliasing", "-Wno-unknown-pragmas", "-I", str(HEADERS)]


class EmulationError(Exception):
    """A kernel did what no GPU guarantees to work; one line, with the source line at fault where it is known."""


class Emulator:
    """A backend for `klab.kernels.cuda_module.backend`.

    order: in which order threads take turns: 0 ascending, 1 descending, more seeds a permutation. land_early: what cp.async copies arrives
    at once instead of at the wait. Both change what a kernel with a race computes; the races themselves are found by rule in any case.
    """

    def __init__(self, order: int = 0, land_early: bool = False) -> None:
        self.order, self.land_early = order, land_early

    @staticmethod
    def missing() -> str:
        """Why kernels cannot be emulated here, or an empty string."""
        return "" if shutil.which("g++") else "needs g++ to compile CUDA kernels for the host"

    def __call__(self, kernel: CudaKernel, grid: Grid, block_threads: int, args: Sequence[Argument]) -> None:
        """Run one launch on CPU tensors; EmulationError says what went wrong."""
        defines = tuple(sorted((name, str(value)) for name, value in kernel.defines.items()))
        library = _library(kernel.source, kernel.name, defines)
        storage, tensors, keep = _arguments(kernel.name, library.klab_signature(), args)
        text, offset = ctypes.create_string_buffer(1024), ctypes.c_size_t()
        pointers = (ctypes.c_void_p * len(storage))(*(ctypes.addressof(value) for value in storage))
        failed = library.klab_launch(
            (ctypes.c_int * 3)(*grid), block_threads, ctypes.c_size_t(kernel.dynamic_smem_bytes), pointers, len(tensors),
            (_Tensor * len(tensors))(*tensors), self.order, int(self.land_early), text, ctypes.c_size_t(1024), ctypes.byref(offset),
        )  # fmt: skip
        del keep
        if failed:
            raise EmulationError(f"{kernel.name}: {text.value.decode()}{_source_line(library._name, offset.value)}")


class _Tensor(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("bytes", ctypes.c_size_t), ("accessible", ctypes.c_void_p), ("item_bytes", ctypes.c_size_t))


class _TensorMap(ctypes.Structure):
    _fields_ = (
        ("base", ctypes.c_void_p), ("rows", ctypes.c_int64), ("columns", ctypes.c_int64), ("row_bytes", ctypes.c_int64),
        ("box_rows", ctypes.c_int64),
    )  # fmt: skip


def _arguments(name: str, signature: ctypes.Array, args: Sequence[Argument]) -> tuple[list, list[_Tensor], list]:
    """Each argument as a C value, after a check against the kernel's parameters; and which bytes the tensors allow."""
    parameters = [text.decode() for text in itertools.takewhile(lambda text: text is not None, (signature[i] for i in itertools.count()))]
    if len(parameters) != len(args):
        raise EmulationError(f"{name} takes {len(parameters)} arguments and was launched with {len(args)}")
    storage, tensors, keep = [], [], []
    for i, (parameter, value) in enumerate(zip(parameters, args, strict=True)):
        if isinstance(value, torch.Tensor):
            given = f"{str(value.dtype).removeprefix('torch.')} tensor"
            storage.append(ctypes.c_void_p(value.data_ptr()))
            tensors.append(_allowed(value, keep))
        elif isinstance(value, TensorMap):
            given, t = "tensor map", value.tensor
            storage.append(_TensorMap(t.data_ptr(), *t.shape, t.stride(0) * t.element_size(), value.box_rows))
            tensors.append(_allowed(t, keep))
        elif isinstance(value, float):
            given = "float"
            storage.append(ctypes.c_float(value))
        else:
            given = "int64_t" if isinstance(value, Int64) else "int"
            storage.append(ctypes.c_int64(value) if given == "int64_t" else ctypes.c_int32(value))
            if storage[-1].value != value:
                raise EmulationError(f"argument {i} of {name} is {value}: more than 32 bits need Int64")
        if given != parameter and not (parameter == "tensor" and given.endswith(parameter)):
            raise EmulationError(f"argument {i} of {name} is {given}; the kernel declares {parameter}")
    return storage, tensors, keep


def _allowed(tensor: torch.Tensor, keep: list[torch.Tensor]) -> _Tensor:
    """Which bytes a kernel may touch for the sake of a tensor: its elements, not what lies between its rows."""
    extent = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)) if tensor.numel() else 0
    accessible = torch.zeros(extent, dtype=torch.uint8)
    if extent:
        accessible.as_strided(tensor.shape, tensor.stride()).fill_(1)
    keep.append(accessible)
    return _Tensor(tensor.data_ptr(), extent * tensor.element_size(), accessible.data_ptr(), tensor.element_size())


@lru_cache(maxsize=1)
def _folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="klab-emulator-")


@lru_cache(maxsize=1)
def _runtime() -> list[str]:
    """The emulator itself, compiled once per process and without instrumentation."""
    objects = []
    for source in sorted(HERE.glob("*.cpp")):
        objects.append(f"{_folder().name}/{source.stem}.o")
        _run(["g++", *COMMON, "-O2", "-c", str(source), "-o", objects[-1]])
    return objects


@lru_cache(maxsize=4096)
def _library(source: str, name: str, defines: tuple[tuple[str, str], ...]) -> ctypes.CDLL:
    """The kernel with the emulator, as a library. EmulationError with the first error line if g++ rejects the source."""
    stem = f"{_folder().name}/{name}-{hashlib.sha256(repr((source, defines)).encode()).hexdigest()[:16]}"
    text = f'#line 1 "{name}.cu"\n{source}\n#include <utility>\n#include "{HERE}/entry.h"\n'
    Path(stem + ".cpp").write_text(text)
    names = [f"-D{key}={value}" for key, value in (*defines, ("KLAB_NAME", name))]
    poison = ["-ftrivial-auto-var-init=pattern"] if _compiler_version() >= 12 else []
    _run(["g++", *COMMON, "-O1", "-w", *CHECKS, *poison, *names, "-c", stem + ".cpp", "-o", stem + ".o"])
    _run(["g++", "-shared", "-Wl,-Bsymbolic", stem + ".o", *_runtime(), "-o", stem + ".so", "-ldl"])
    library = ctypes.CDLL(stem + ".so")
    library.klab_signature.restype = ctypes.POINTER(ctypes.c_char_p)
    return library


@lru_cache(maxsize=1)
def _compiler_version() -> int:
    return int(re.split(r"\D", subprocess.run(["g++", "-dumpversion"], capture_output=True, text=True, check=True).stdout)[0])


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise EmulationError(next((line for line in done.stderr.splitlines() if "error" in line), done.stderr[:300]))


def _source_line(library: str, offset: int) -> str:
    """` (name.cu:12)` for an offset in a library, if binutils are here to tell."""
    if not offset or not shutil.which("addr2line"):
        return ""
    command = ["addr2line", "-i", "-e", library, hex(offset - 1)]
    lines = subprocess.run(command, capture_output=True, text=True).stdout.splitlines()
    places = [Path(line.split(" ")[0]).name for line in lines if ".cu:" in line and "?" not in line]
    return f" ({' in '.join(dict.fromkeys(places))})" if places else ""
