"""What a compiled function needs and uses, read from its cubin: registers, spills, shared memory, tensor-core instructions."""

from __future__ import annotations

import hashlib
import re
import shutil
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from klab.kernels.artifact import Artifact
from klab.kernels.contract import Json
from klab.kernels.errors import CannotMeasure

# From Hopper on the system keeps 1 KB of every block's shared memory, which cuobjdump counts and the 227 KB limit does not.
RESERVED_SMEM_BYTES = 1024

# SASS opcode -> what it is. HGMMA/QGMMA: Hopper's warpgroup mma; UTC*MMA: Blackwell's tcgen05; HMMA and the like: mma.sync.
TENSOR_CORE = {"wgmma": r"[HQIBD]GMMA", "tcgen05": r"UTC[A-Z]*MMA", "mma.sync": r"[HIDQB]MMA", "tma": r"UTMALDG|UTMASTG"}


@dataclass(frozen=True)
class Resources:
    """One device function. `spill_instructions` counts local loads and stores in the SASS (unrolled, not executed counts)."""

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
        }


@cache
def tool(name: str) -> str:
    """Path of `cuobjdump` or `nvdisasm`: the ones in Triton's package, else on PATH. CannotMeasure when there is none."""
    try:
        import triton

        bundled = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
        if bundled.is_file():
            return str(bundled)
    except ModuleNotFoundError:
        pass
    found = shutil.which(name)
    if found is None:
        raise CannotMeasure(f"{name} is not here: install triton (it carries one) or the CUDA toolkit")
    return found


def inspect_artifact(artifact: Artifact) -> Resources:
    """Read one cubin. Raises CannotMeasure if the disassemblers are missing, RuntimeError if they reject the binary."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        # CuPy 14.2's nvrtc.getCUBIN drops the last byte; the ELF readers want it, and one byte more harms none.
        file.write(artifact.cubin + b"\0")
        file.flush()
        usage = _run(tool("cuobjdump"), "-res-usage", file.name)
        sass = _run(tool("nvdisasm"), "-c", "-ndf", file.name)
    found = re.search(rf"Function {re.escape(artifact.name)}:\s*\n\s*(.*)", usage) or re.search(r"Function \S+:\s*\n\s*(.*)", usage)
    if found is None:
        raise RuntimeError(f"cuobjdump lists no function in {artifact.name}")
    numbers = {key: int(value) for key, value in re.findall(r"([A-Z]+)(?:\[\d+\])?:(\d+)", found.group(1))}
    opcodes = _opcodes(sass)
    instructions = {
        kind: sum(n for op, n in opcodes.items() if re.fullmatch(pattern, op.split(".")[0])) for kind, pattern in TENSOR_CORE.items()
    }
    return Resources(
        name=artifact.name,
        registers=numbers.get("REG", 0),
        stack_bytes=numbers.get("STACK", 0),
        spill_instructions=sum(n for op, n in opcodes.items() if op.split(".")[0] in ("STL", "LDL")),
        static_smem_bytes=max(0, numbers.get("SHARED", 0) - RESERVED_SMEM_BYTES),
        dynamic_smem_bytes=artifact.dynamic_smem_bytes,
        threads=artifact.threads,
        tmem_columns=int(artifact.metadata.get("tmem_columns", "0")),
        instructions=instructions,
        warp_specialised=any(op.startswith("USETMAXREG") for op in opcodes) or _more_warps(artifact),
        sass_hash=hashlib.sha256("\n".join(_instructions(sass)).encode()).hexdigest()[:16],
        launch=artifact.metadata.get("launch", ""),
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


def _instructions(sass: str) -> list[str]:
    """The instructions alone: no addresses, labels or comments, which differ between equal functions."""
    found = []
    for line in sass.splitlines():
        text = re.sub(r"/\*.*?\*/", "", line).split("//")[0].strip()
        if text.endswith(";"):
            found.append(re.sub(r"\s+", " ", text))
    return found


def _opcodes(sass: str) -> Counter[str]:
    counts: Counter[str] = Counter()
    for text in _instructions(sass):
        words = text.split()
        counts[words[1] if words[0].startswith("@") else words[0].rstrip(";")] += 1
    return counts
