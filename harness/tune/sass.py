"""The instructions of a cubin. nvdisasm takes 0.3 s to start, as long as compiling: it is asked only about opcodes not met before."""

from __future__ import annotations

import json
import re
import struct
from collections import Counter
from collections.abc import Callable

from klab.kernels import disk_cache
from klab.kernels.contract import digest

# An instruction is 16 bytes; its low 12 bits name the operation and the form of its operands (Volta and everything since).
INSTRUCTION_BYTES = 16
_OPCODE_BITS = 0xFFF
_EXECUTABLE = 0x4
_LINE = re.compile(r"\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*).*?/\*\s*0x([0-9a-f]{16})\s*\*/")

# (disassembler, architecture) -> opcode -> name as nvdisasm wrote it, learned as they come; "" where it gave one opcode two names.
Names = dict[int, str]
_learned: dict[tuple[str, int], Names] = {}


def code_of(cubin: bytes) -> bytes:
    """The machine code of all functions of a 64-bit ELF image, one behind another. ValueError where there is none."""
    try:
        if cubin[:4] != b"\x7fELF":
            raise ValueError("not an ELF image")
        (table,) = struct.unpack_from("<Q", cubin, 40)
        size, count = struct.unpack_from("<HH", cubin, 58)
        code = b""
        for i in range(count):
            _, kind, flags, _, offset, length = struct.unpack_from("<IIQQQQ", cubin, table + i * size)
            if kind == 1 and flags & _EXECUTABLE:
                code += cubin[offset : offset + length]
    except struct.error as error:
        raise ValueError(f"a torn ELF image: {error}") from None
    if not code:
        raise ValueError("an ELF image without code")
    return code


def opcodes(cubin: bytes, disassemble: Callable[[], str], *, disassembler: str) -> Counter[str]:
    """How often each operation occurs in the code, by its name without suffixes (`HGMMA`, `STL`).

    `disassemble` gives nvdisasm's listing of the cubin with encodings (-hex); it is called when the code has an opcode that no process
    on this machine has met. `disassembler` identifies the version that names them.
    """
    (architecture,) = struct.unpack_from("<I", cubin, 48)
    code = code_of(cubin)
    whole = code[: len(code) // INSTRUCTION_BYTES * INSTRUCTION_BYTES]
    counts = Counter(low & _OPCODE_BITS for low, _ in struct.iter_unpack("<QQ", whole))
    known = _learned.setdefault((disassembler, architecture), {})
    if not all(known.get(opcode) for opcode in counts):
        kept, key = _kept(), digest({"disassembler": disassembler, "architecture": architecture})
        _merge(known, _read(kept.get(key)))
        if not all(known.get(opcode) for opcode in counts):
            listed, names = _listing(disassemble())
            _merge(known, names)
            kept.put(key, json.dumps({str(opcode): name for opcode, name in known.items()}).encode())
            return listed
    named: Counter[str] = Counter()
    for opcode, n in counts.items():
        named[known[opcode]] += n
    return named


def _listing(text: str) -> tuple[Counter[str], Names]:
    listed: Counter[str] = Counter()
    names: Names = {}
    for line in text.splitlines():
        found = _LINE.match(line)
        if found is not None:
            name, opcode = found.group(1), int(found.group(2), 16) & _OPCODE_BITS
            listed[name] += 1
            _merge(names, {opcode: name})
    return listed, names


def _merge(known: Names, more: Names) -> None:
    for opcode, name in more.items():
        known[opcode] = name if known.get(opcode, name) == name else ""


def _kept() -> disk_cache.DiskCache:
    return disk_cache.DiskCache(disk_cache.cache_root() / "opcodes")


def _read(body: bytes | None) -> Names:
    try:
        return {int(opcode): str(name) for opcode, name in json.loads(body or b"{}").items()}
    except (ValueError, AttributeError):
        return {}
