"""Strategies: who says which candidates to evaluate next. One file each in strategies/; this module is what they agree on."""

from __future__ import annotations

import importlib
import math
import pkgutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from klab.harness.store.result import Status
from klab.harness.tune.space import Space
from klab.kernels.errors import UsageError

DEFAULT = "gaussian"


@dataclass(frozen=True)
class Evaluation:
    """What a candidate was found to be worth. `value` is minimised; infinite for a candidate that failed.

    rounds: how many rounds the value rests on when it is of a short run; 0 for a full measurement. spent_s: seconds of the device,
    compiling included where the device waited for it.
    """

    candidate: int
    value: float
    status: Status = Status.OK
    rounds: int = 0
    spent_s: float = 0.0

    @property
    def ok(self) -> bool:
        """True when there is a value to compare."""
        return self.status is Status.OK and math.isfinite(self.value)


@dataclass(frozen=True)
class Ask:
    """Candidates to evaluate next, in one interleaved contest. rounds: 0 for a full measurement, else a short run of so many rounds."""

    candidates: tuple[int, ...] = ()
    rounds: int = 0


@dataclass(frozen=True)
class Prior:
    """What is known before the first measurement.

    seeds: candidates to try first, the default configuration before all. expected: (candidates,), a modelled or transferred time in any
    unit, nan where nothing is known: only ratios within it mean anything, and it may be wrong.
    """

    seeds: tuple[int, ...] = ()
    expected: NDArray[np.float64] | None = None


class Strategy(Protocol):
    """Ask, evaluate, tell, and again. Deterministic: the same space, seed, prior and tells make the same asks, whatever the clock says."""

    def ask(self) -> Ask:
        """What to evaluate next; no candidates when there is nothing left to ask. A full measurement is asked for at most once."""

    def tell(self, evaluations: Sequence[Evaluation]) -> None:
        """The outcome of the last ask, in its order: one for each candidate (fewer only when the search ends)."""


Maker = Callable[[Space, int, Prior], Strategy]


@dataclass(frozen=True)
class Registered:
    """A strategy by name. `needs` is the package it cannot do without, if any."""

    name: str
    make: Maker
    summary: str
    needs: str = ""


_found: dict[str, Registered] = {}


def strategy(name: str, *, needs: str = "") -> Callable[[Maker], Maker]:
    """Register `make(space, seed, prior)`, a class or a function; the first line of its docstring is the summary."""

    def register(make: Maker) -> Maker:
        _found[name] = Registered(name, make, (make.__doc__ or "").strip().split("\n")[0], needs)
        return make

    return register


@cache
def _load() -> None:
    package = importlib.import_module("klab.harness.tune.strategies")
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"{package.__name__}.{module.name}")


def strategies() -> dict[str, Registered]:
    """All strategies by name."""
    _load()
    return dict(sorted(_found.items()))


def find_strategy(name: str) -> Registered:
    """UsageError with the known names for an unknown one."""
    known = strategies()
    if name not in known:
        raise UsageError(f"there is no strategy {name!r}; there are {', '.join(known)}")
    return known[name]


def without(candidates: Iterable[int], done: set[int]) -> list[int]:
    """The candidates not done, each once, in order."""
    return [c for c in dict.fromkeys(int(c) for c in candidates) if c not in done]
