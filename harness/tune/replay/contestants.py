"""Who takes part in a scoreboard: klab's strategies by the digest of their source, others' by their version."""

from __future__ import annotations

import ast
import hashlib
import importlib.metadata
import importlib.util
import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from klab.harness.tune.replay.recorded import RecordedSpace
from klab.harness.tune.replay.simulate import Run, run_of, run_of_sequence, simulate
from klab.harness.tune.search import Budget
from klab.harness.tune.strategy import Registered, find_strategy, strategies

KLAB = "klab"
_FOLLOWED = "klab.harness.tune."


@dataclass(frozen=True)
class Contestant:
    """A strategy under one name. digest: what changes when its runs may change. origin: klab, or the package it comes from."""

    name: str
    origin: str
    digest: str

    def run(self, recorded: RecordedSpace, *, seed: int, evaluations: int) -> Run:
        """One run on a recorded space, at the prices of that record."""
        if self.origin == KLAB:
            return run_of(recorded, simulate(recorded, self.name, seed=seed, budget=Budget(evaluations=evaluations)), seed)
        from klab.harness.tune.replay.peers import run_peer

        found = run_peer(recorded, self.name, seed=seed, evaluations=evaluations)
        return run_of_sequence(recorded, found.candidates, seed, found.ended)


def own(names: Sequence[str] = ()) -> tuple[list[Contestant], dict[str, str]]:
    """klab's strategies, all or those named, and (name -> reason) of those whose package is missing. UsageError for an unknown name."""
    found, absent = [], {}
    for registered in [find_strategy(name) for name in names] or strategies().values():
        if registered.needs and not _installed(registered.needs):
            absent[registered.name] = f"{registered.needs} is not installed; pip install 'kernel-lab[tune]'"
        else:
            found.append(Contestant(registered.name, KLAB, source_digest(registered)))
    return found, absent


def others() -> tuple[list[Contestant], dict[str, str]]:
    """The peers that run here, and (name -> reason) of the others. UsageError when their packages are missing."""
    from klab.harness.tune.replay.peers import peers

    runnable, absent = peers()
    return [Contestant(name, f"{name.partition('.')[0]} {version}", version) for name, version in runnable.items()], absent


def _installed(package: str) -> bool:
    """Packages are named as pip names them."""
    try:
        importlib.metadata.distribution(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def source_digest(registered: Registered) -> str:
    """Digest of the file that makes the strategy, of klab's tuning modules that it imports, directly or not, and of what it `needs`."""
    # The name as well: one file may register several strategies.
    digest = hashlib.sha256(registered.name.encode())
    if registered.needs:
        digest.update(importlib.metadata.version(registered.needs).encode())
    for module in sorted(_imported(inspect.getmodule(registered.make).__name__, frozenset())):  # type: ignore[union-attr]
        digest.update(module.encode() + _source(module))
    return digest.hexdigest()[:16]


def _imported(module: str, known: frozenset[str]) -> frozenset[str]:
    known |= {module}
    for node in ast.walk(ast.parse(_source(module))):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        for name in names:
            if name.startswith(_FOLLOWED) and name not in known and _path(name):
                known = _imported(name, known)
    return known


@cache
def _path(module: str) -> Path | None:
    try:
        spec = importlib.util.find_spec(module)
    except ModuleNotFoundError:  # a name inside a module
        return None
    return Path(spec.origin) if spec and spec.origin and spec.origin.endswith(".py") else None


@cache
def _source(module: str) -> bytes:
    path = _path(module)
    return path.read_bytes() if path else b""
