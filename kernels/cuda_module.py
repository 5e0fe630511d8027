"""CUDA C++ kernels: compiled by NVRTC for exactly one chip, loaded by CuPy, launched on torch's current stream.

A kernel file keeps its source as a string on the primitives of `device.cuh`, and its build function returns a launch that calls
`CudaKernel.launch`. CuPy's own RawKernel always compiles for `sm_90` and never for `sm_90a`, which wgmma and tcgen05 need, so NVRTC is
called directly. cupy is imported inside functions: this module is also read where it is absent.

Cubins are kept on disk, so that what one process compiled (while screening, say) no other compiles again.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import re
import struct
import sysconfig
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from klab.kernels import disk_cache  # how a binary is kept shapes no launch: it is no part of a kernel's identity
from klab.kernels.artifact import Artifact, recording
from klab.kernels.contract import Chip, digest
from klab.kernels.errors import CannotMeasure, KlabError

if TYPE_CHECKING:
    import torch

HEADERS = Path(__file__).parent
# What a block gets without asking; more needs the function attribute (CUDA programming guide, "Shared Memory 9.0").
SMEM_WITHOUT_OPT_IN_BYTES = 48 << 10
# The device function's C++ type of each torch dtype that a kernel can read; 'ELEMENT' in sources.
ELEMENT = {"float16": "klab::half_t", "bfloat16": "klab::bf16_t", "float32": "float"}


class CompileError(KlabError):
    """The source does not compile for this chip; the message is the compiler's first error, in one line."""


class Int64(int):
    """An integer argument that the kernel declares as `int64_t`; a plain Python int is an `int`."""


@dataclass(frozen=True, eq=False)
class TensorMap:
    """An argument for a `KLAB_TENSOR_MAP` parameter (see tma.cuh): boxes of a matrix [rows, columns] of 16-bit elements, dense rows.

    A box has `box_rows` rows (up to 256) of `box_columns` = 64 columns. Rows start at multiples of 16 bytes.
    """

    tensor: torch.Tensor
    box_rows: int
    box_columns: int = 64

    def encoded(self) -> bytes:
        """The driver's 128 bytes for it; no call to the device. CannotMeasure where there is no driver, or where it refuses."""
        t = self.tensor
        return _encode_map(t.data_ptr(), *t.shape, t.stride(0), str(t.dtype), self.box_rows, self.box_columns)


# CUtensorMapDataType, interleave, swizzle, L2 promotion and fill of cuda.h.
_MAP_TYPES = {"torch.float16": 6, "torch.bfloat16": 9}
_NO_INTERLEAVE, _SWIZZLE_128B, _PROMOTE_256B, _FILL_ZERO = 0, 3, 3, 0


@lru_cache(maxsize=1024)
def _encode_map(address: int, rows: int, columns: int, stride: int, dtype: str, box_rows: int, box_columns: int) -> bytes:
    u32, u64 = ctypes.c_uint32, ctypes.c_uint64
    try:
        encode = ctypes.CDLL("libcuda.so.1").cuTensorMapEncodeTiled
    except (OSError, AttributeError):
        raise CannotMeasure("a tensor map needs NVIDIA's driver 12.0 or newer (libcuda.so.1)") from None
    room = ctypes.create_string_buffer(128 + 64)
    at = (ctypes.addressof(room) + 63) // 64 * 64
    failed = encode(
        ctypes.c_void_p(at), _MAP_TYPES[dtype], u32(2), ctypes.c_void_p(address), (u64 * 2)(columns, rows), (u64 * 1)(stride * 2),
        (u32 * 2)(box_columns, box_rows), (u32 * 2)(1, 1), _NO_INTERLEAVE, _SWIZZLE_128B, _PROMOTE_256B, _FILL_ZERO,
    )  # fmt: skip
    if failed:
        raise CannotMeasure(
            f"the driver refuses a tensor map of {rows}x{columns}, stride {stride}, box {box_rows}x{box_columns}: error {failed}"
        )
    return ctypes.string_at(at, 128)


Argument = Any
"""A tensor, an int, an Int64, a float or a TensorMap."""
Grid = tuple[int, int, int]
Backend = Callable[["CudaKernel", Grid, int, Sequence[Any]], None]

_backend: ContextVar[Backend | None] = ContextVar("klab_cuda_backend", default=None)


@contextmanager
def backend(run: Backend) -> Iterator[None]:
    """Within this block launches go to `run(kernel, grid, block_threads, args)` and not to a GPU: how the tests emulate."""
    token = _backend.set(run)
    try:
        yield
    finally:
        _backend.reset(token)


def include_dirs() -> list[str]:
    """Where headers are found: beside this file, in the CUDA wheels, and in a toolkit ($CUDA_HOME, $CUDA_PATH, /usr/local/cuda)."""
    found = [HEADERS]
    wheels = Path(sysconfig.get_paths()["purelib"]) / "nvidia"
    roots = [*sorted(wheels.glob("cu1*"), reverse=True), wheels / "cuda_runtime", wheels / "cuda_cccl"]
    roots += [Path(os.environ[name]) for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    roots.append(Path("/usr/local/cuda"))
    for root in roots:
        found += [folder for folder in (root / "include", root / "include" / "cccl") if folder.is_dir()]
    return list(dict.fromkeys(str(folder) for folder in found))


def first_error(log: str) -> str:
    """The first line of a compiler's log that reports an error, or the first line at all. ptxas calls some "fatal"."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    return next((line for line in lines if re.search("error|fatal", line, re.IGNORECASE)), lines[0] if lines else "no log")


def compile_cubin(source: str, name: str, arch: str, defines: Mapping[str, str | int]) -> bytes:
    """Compile CUDA C++17 for one architecture (`sm_90a`) and return the cubin. CompileError with the first error line; cached."""
    return _compile(source, name, arch, tuple(sorted((key, str(value)) for key, value in defines.items())))


@lru_cache(maxsize=4096)
def _compile(source: str, name: str, arch: str, defines: tuple[tuple[str, str], ...]) -> bytes:
    key, kept = cubin_key(source, name, arch, defines), cubins()
    cubin = kept.get(key)
    if cubin is None:
        options = [f"-arch={arch}", "-std=c++17", "-default-device", *(f"-I{folder}" for folder in include_dirs())]
        cubin = run_nvrtc(source, name, arch, [*options, *(f"-D{key}={value}" for key, value in defines)])
        kept.put(key, cubin)
    return cubin


def cubins() -> disk_cache.DiskCache:
    """The binaries kept on disk: 20 to 100 KB each, so that the whole stays below about 1 GB."""
    return disk_cache.DiskCache(disk_cache.cache_root() / "cubin", most_per_folder=64)


def cubin_key(source: str, name: str, arch: str, defines: Iterable[tuple[str, str]]) -> str:
    """Identity of a binary: the source with klab's headers, name, architecture, defines, NVRTC's version and the toolkit's headers."""
    from cupy.cuda import nvrtc

    parts = [source, name, arch, list(nvrtc.getVersion()), [list(pair) for pair in defines], _own_headers(source), _toolkit_headers()]
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]


def _own_headers(source: str) -> list[str]:
    """The text of every header beside this file that the source includes, directly or not."""
    texts: dict[str, str] = {}
    todo = [source]
    while todo:
        for header in re.findall(r"[\w.]+\.cuh", todo.pop()):
            path = HEADERS / header
            if header not in texts and path.is_file():
                texts[header] = path.read_text()
                todo.append(texts[header])
    return [texts[header] for header in sorted(texts)]


@lru_cache(maxsize=1)
def _toolkit_headers() -> list[tuple[str, int, int]]:
    """Folder, size and time of the header that every toolkit brings, for each include folder outside klab that has it."""
    found = []
    for folder in include_dirs()[1:]:
        header = Path(folder) / "cuda_bf16.h"
        if header.is_file():
            status = header.stat()
            found.append((str(header.resolve()), status.st_size, status.st_mtime_ns))
    return found


def run_nvrtc(source: str, name: str, arch: str, options: Sequence[str]) -> bytes:
    """Compile, whatever is kept on disk."""
    from cupy.cuda import nvrtc

    program = nvrtc.createProgram(source, f"{name}.cu", [], [])
    try:
        try:
            nvrtc.compileProgram(program, tuple(options))
        except nvrtc.NVRTCError as error:
            log = nvrtc.getProgramLog(program)
            raise CompileError(f"{name} does not compile for {arch}: {first_error(log) if log.strip() else error}") from None
        return _whole_elf(nvrtc.getCUBIN(program))
    finally:
        nvrtc.destroyProgram(program)


def _whole_elf(cubin: bytes) -> bytes:
    """CuPy 14.2's getCUBIN drops the last byte, which is zero: give it back when the section headers say that one is missing."""
    program_headers, section_headers = struct.unpack_from("<QQ", cubin, 32)
    program_size, programs, section_size, sections = struct.unpack_from("<HHHH", cubin, 54)
    end = max(section_headers + section_size * sections, program_headers + program_size * programs)
    return cubin + b"\0" if len(cubin) == end - 1 else cubin


@dataclass(frozen=True)
class CudaKernel:
    """One specialisation of a device function: `source` with `defines`, for one chip; `name` is its `KLAB_KERNEL` name.

    `dynamic_smem_bytes` is the shared memory of a block. Nothing is compiled before the first launch.
    """

    source: str
    name: str
    chip: Chip
    defines: Mapping[str, str | int] = field(default_factory=dict)
    dynamic_smem_bytes: int = 0
    _loaded: dict[int, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    def cubin(self) -> bytes:
        """The binary for the chip's architecture; CompileError if there is none."""
        return compile_cubin(self.source, self.name, self.chip.arch, self.defines)

    def cubin_key(self) -> str:
        """Where the binary is kept among `cubins()`."""
        return cubin_key(self.source, self.name, self.chip.arch, sorted((key, str(value)) for key, value in self.defines.items()))

    def launch(self, grid: Grid, block_threads: int, args: Sequence[Argument]) -> None:
        """Enqueue on torch's current stream (also into a CUDA graph under capture) and return at once.

        Tensors are passed as their data pointer, ints as `int` (Int64 as `int64_t`), floats as `float`. Under `compile_only()` it
        compiles and records an Artifact; under `backend()` that backend runs it.
        """
        artifacts, run = recording(), _backend.get()
        if artifacts is not None:
            artifacts.append(
                Artifact(
                    self.name,
                    self.cubin(),
                    dynamic_smem_bytes=self.dynamic_smem_bytes,
                    threads=block_threads,
                    metadata={
                        # Two launches of one binary are duplicates only when their grid and their scalars agree too.
                        "launch": digest({"grid": list(grid), "scalars": [repr(a) for a in args if isinstance(a, int | float)]}),
                        "grid": ",".join(map(str, grid)),
                        "kept": f"cubin:{self.cubin_key()}",
                    },
                )
            )
        elif run is not None:
            run(self, grid, block_threads, args)
        else:
            self._launch_on_device(grid, block_threads, args)

    def _launch_on_device(self, grid: Grid, block_threads: int, args: Sequence[Argument]) -> None:
        import cupy
        import torch

        device = next(arg.device.index for arg in args if isinstance(arg, torch.Tensor))
        mapped = any(isinstance(arg, TensorMap) for arg in args)
        with cupy.cuda.Device(device):
            if device not in self._loaded:
                self._loaded[device] = _load(self.cubin(), self.name, self.dynamic_smem_bytes)
            stream = torch.cuda.current_stream(device).cuda_stream
            if mapped:
                _launch_by_driver(self._loaded[device], grid, block_threads, self.dynamic_smem_bytes, stream, args)
                return
            with cupy.cuda.ExternalStream(stream, device):
                self._loaded[device](grid, (block_threads, 1, 1), device_arguments(args), shared_mem=self.dynamic_smem_bytes)


def device_arguments(args: Sequence[Argument]) -> tuple[Any, ...]:
    """Scalars of the width that the kernel declares: CuPy passes a numpy scalar as the bytes it has."""
    import numpy
    import torch

    def convert(value: torch.Tensor | int | float) -> Any:
        if isinstance(value, torch.Tensor):
            return numpy.uint64(value.data_ptr())
        if isinstance(value, Int64):
            return numpy.int64(value)
        if isinstance(value, float):
            return numpy.float32(value)
        if not -(2**31) <= value < 2**31:
            raise OverflowError(f"kernel argument {value} does not fit 32 bits: pass Int64({value}) and declare int64_t")
        return numpy.int32(value)

    return tuple(convert(value) for value in args)


def _launch_by_driver(function: Any, grid: Grid, block_threads: int, smem_bytes: int, stream: int, args: Sequence[Argument]) -> None:
    """A launch whose arguments are handed over by address: CuPy's own conversion knows no value of 128 bytes."""
    from cupy_backends.cuda.api import driver

    values: list[Any] = []
    for arg in args:
        if isinstance(arg, TensorMap):
            values.append(ctypes.create_string_buffer(arg.encoded(), 128))
        else:
            (plain,) = device_arguments([arg])
            values.append(ctypes.create_string_buffer(plain.tobytes(), plain.nbytes))
    pointers = (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
    # The driver copies the arguments before it returns.
    driver.launchKernel(function.kernel.ptr, *grid, block_threads, 1, 1, smem_bytes, stream, ctypes.addressof(pointers), 0)


def _load(cubin: bytes, name: str, dynamic_smem_bytes: int) -> Any:
    """The function, loaded on the current device. RawModule takes a file, which get_function reads."""
    import cupy

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        function = cupy.RawModule(path=file.name).get_function(name)
        if dynamic_smem_bytes > SMEM_WITHOUT_OPT_IN_BYTES:
            function.max_dynamic_shared_size_bytes = dynamic_smem_bytes
    return function
