"""The identity of a kernel's code: its file and every helper that it imports."""

from __future__ import annotations

import ast
import hashlib
import re
from functools import cache
from pathlib import Path

# Kernels import these too, but they shape no launch: a change in them retires no result. (A Problem's identity is its own key.)
_NOT_CODE = {"contract", "errors", "discover", "dtypes", "artifact", "problem", "disk_cache"}


def sources_of(path: Path) -> list[Path]:
    """A kernel's file first, then every helper beside this module that it imports, CUDA headers included."""
    folder = Path(__file__).parent
    files, todo = {path}, [path]
    while todo:
        at = todo.pop()
        text = at.read_text()
        names = _imported(text) if at.suffix == ".py" else set()
        helpers = [folder / f"{name.replace('.', '/')}.py" for name in names if name.split(".")[-1] not in _NOT_CODE]
        headers = [folder / name for name in re.findall(r"[\w.]+\.cuh", text)]
        for file in helpers + headers:
            if file.is_file() and file not in files:
                files.add(file)
                todo.append(file)
    return sorted(files, key=lambda f: (f != path, f.name))


@cache
def _imported(text: str) -> set[str]:
    """What may be modules of this package in a source's imports, without its name: `from klab.kernels.a import b` gives a and a.b."""
    found: set[str] = set()
    # An import is a statement: expressions, nine tenths of a tree, are not looked into.
    todo: list[ast.AST] = [ast.parse(text)]
    while todo:
        node = todo.pop()
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.update([node.module, *(f"{node.module}.{alias.name}" for alias in node.names)])
        for block in ("body", "orelse", "finalbody", "handlers", "cases"):
            inside = getattr(node, block, ())
            todo += inside if isinstance(inside, list) else ()
    return {name.removeprefix("klab.kernels.") for name in found if name.startswith("klab.kernels.")}


@cache
def source_digest(path: Path) -> str:
    """Hash of everything in `sources_of` (16 hex digits)."""
    return hashlib.sha256(b"\0".join(file.read_bytes() for file in sources_of(path))).hexdigest()[:16]
