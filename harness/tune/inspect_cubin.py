"""What a compiled function needs and uses, read from its cubin: registers, spills, shared memory, tensor-core instructions."""

from __future__ import annotations

import hashlib
import importlib.util
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from klab.harness.tune.sass import code_of, opcodes
from klab.kernels.artifact import Artifact
from klab.kernels.contract import Json
from klab.kernels.errors import CannotMeasure

# From Hopper on the system keeps 1 KB of every block's shared memory, which cuobjdump counts and the 227 KB limit does not.
RESERVED_SMEM_BYTES = 1024

# SASS opcode -> what it is. HGMMA/QGMMA: Hopper's warpgroup mma; UTC*MMA: Blackwell's tcgen05; HMMA and the like: mma.sync.
TENSOR_CORE = {"wgmma": r"[HQIBD]GMMA", "tcgen05": r"UTC[A-Z]*MMA", "mma.sync": r"[HIDQB]MMA", "tma": r"UTMALDG|UTMASTG"}


@dataclass(frozen=True)
class Resources:
    """One device function. `spill_instructions` counts local loads and stores in the SASS (unrolled, not executed counts).

    `sass_hash` is of the machine code; `launch` of grid and run-time scalars; `grid` is empty where the launch did not tell.
    """

    name: str
    registers: int
    stack_bytes: int
    spill_instructions: int
    static_smem_bytes: int
    dynamic_smem_bytes: int
    threads: int
    tmem_columns: int
    instructions: dict[str, int]
    warp_specialised: bool
    sass_hash: str
    launch: str
    grid: tuple[int, ...]

    @property
    def smem_bytes(self) -> int:
        """Shared memory per block."""
        return self.static_smem_bytes + self.dynamic_smem_bytes

    @property
    def matrix_unit(self) -> str:
        """`wgmma`, `tcgen05`, `mma.sync` or `none`: the strongest one that the function uses."""
        return next((kind for kind in ("tcgen05", "wgmma", "mma.sync") if self.instructions.get(kind)), "none")

    def to_json(self) -> dict[str, Json]:
        """A flat row."""
        return {
            "name": self.name,
            "registers": self.registers,
            "stack_bytes": self.stack_bytes,
            "spill_instructions": self.spill_instructions,
            "smem_bytes": self.smem_bytes,
            "threads": self.threads,
            "tmem_columns": self.tmem_columns,
            "matrix_unit": self.matrix_unit,
            "tma": self.instructions.get("tma", 0) > 0,
            "warp_specialised": self.warp_specialised,
            "sass_hash": self.sass_hash,
            "launch": self.launch,
            "grid": list(self.grid),
        }


@cache
def tool(name: str) -> str:
    """Path of `cuobjdump` or `nvdisasm`: the ones in Triton's package, else on PATH. CannotMeasure when there is none."""
    triton = importlib.util.find_spec("triton")
    if triton is not None and triton.origin:
        bundled = Path(triton.origin).parent / "backends" / "nvidia" / "bin" / name
        if bundled.is_file():
            return str(bundled)
    found = shutil.which(name)
    if found is None:
        raise CannotMeasure(f"{name} is not here: install triton (it carries one) or the CUDA toolkit")
    return found


@cache
def identity(name: str) -> str:
    """Path, size and time of one of the tools: another version is another file."""
    status = Path(tool(name)).stat()
    return f"{tool(name)} {status.st_size} {status.st_mtime_ns}"


def inspect_artifact(artifact: Artifact) -> Resources:
    """Read one cubin. Raises CannotMeasure if the disassemblers are missing, RuntimeError or ValueError if they reject the binary."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        # CuPy 14.2's nvrtc.getCUBIN drops the last byte; the ELF readers want it, and one byte more harms none.
        file.write(artifact.cubin + b"\0")
        file.flush()
        usage = _run(tool("cuobjdump"), "-res-usage", file.name)
        found_opcodes = opcodes(
            artifact.cubin + b"\0", lambda: _run(tool("nvdisasm"), "-c", "-ndf", "-hex", file.name), disassembler=identity("nvdisasm")
        )
    found = re.search(rf"Function {re.escape(artifact.name)}:\s*\n\s*(.*)", usage) or re.search(r"Function \S+:\s*\n\s*(.*)", usage)
    if found is None:
        raise RuntimeError(f"cuobjdump lists no function in {artifact.name}")
    numbers = {key: int(value) for key, value in re.findall(r"([A-Z]+)(?:\[\d+\])?:(\d+)", found.group(1))}
    instructions = {kind: sum(n for op, n in found_opcodes.items() if re.fullmatch(pattern, op)) for kind, pattern in TENSOR_CORE.items()}
    grid = artifact.metadata.get("grid", "")
    return Resources(
        name=artifact.name,
        registers=numbers.get("REG", 0),
        stack_bytes=numbers.get("STACK", 0),
        spill_instructions=found_opcodes["STL"] + found_opcodes["LDL"],
        static_smem_bytes=max(0, numbers.get("SHARED", 0) - RESERVED_SMEM_BYTES),
        dynamic_smem_bytes=artifact.dynamic_smem_bytes,
        threads=artifact.threads,
        tmem_columns=int(artifact.metadata.get("tmem_columns", "0")),
        instructions=instructions,
        warp_specialised=found_opcodes["USETMAXREG"] > 0 or _more_warps(artifact),
        sass_hash=hashlib.sha256(code_of(artifact.cubin + b"\0")).hexdigest()[:16],
        launch=artifact.metadata.get("launch", ""),
        grid=tuple(int(n) for n in grid.split(",")) if grid else (),
    )


def _more_warps(artifact: Artifact) -> bool:
    """Triton adds warps to the launch when it really splits the kernel into producers and consumers."""
    requested = int(artifact.metadata.get("requested_threads", artifact.threads))
    return artifact.threads > requested


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    if done.returncode:
        raise RuntimeError((done.stderr or done.stdout).strip().splitlines()[0])
    return done.stdout
