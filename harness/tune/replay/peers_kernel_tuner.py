"""Kernel Tuner's own strategies on a recorded space, through its own simulation runner, with what repeats across runs built once.

`tune_kernel(simulation_mode=True)` reads the cache file and builds the search space in every call, which takes longer than most searches.
Here both are built once per space, and each run gets a search space with empty neighbour caches and a fresh runner, as a call of
tune_kernel would (tests/harness/test_replay_peers.py compares the two, evaluation by evaluation).
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import random
from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import Any
from unittest import mock

import numpy as np

from klab.harness.store.result import Status
from klab.harness.tune.replay.recorded import RecordedSpace
from klab.harness.tune.space import ABSENT
from klab.kernels.contract import Json
from klab.kernels.errors import UsageError

# Some strategies go on for ever once they have seen all they can reach (nsga2: 9,560 asks for 399 candidates, and no end); those that
# end by themselves ask up to 9 times per evaluation of the budget (basinhopping).
ASKS_PER_EVALUATION = 20
_NOT_A_STRATEGY = {"brute_force": "it enumerates the space in its order"}


def strategy_names() -> list[str]:
    """All strategies that Kernel Tuner knows and that search."""
    from kernel_tuner.interface import strategy_map

    return sorted(name for name in strategy_map if name not in _NOT_A_STRATEGY)


def cannot_run(strategy: str) -> str:
    """Why a strategy cannot run here, "" when it can: some need packages that Kernel Tuner does not install."""
    from kernel_tuner.interface import strategy_map

    needs = {"pyatf_strategies": "pyatf", "skopt": "skopt"}
    try:
        strategy_map[strategy].tune  # noqa: B018 - looking it up imports it
        if strategy in needs:
            importlib.import_module(needs[strategy])
    except ImportError as error:
        return str(error.__cause__ or error).splitlines()[0]
    return ""


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed the generators that its strategies draw from: Python's, NumPy's old one, and those that SciPy makes for itself.

    diff_evo and bayes_opt draw their first points from a Latin hypercube of SciPy's that nobody gave a seed.
    """
    random.seed(seed)
    np.random.seed(seed)
    make, source = np.random.default_rng, np.random.SeedSequence(seed)

    def default_rng(given: Any = None) -> np.random.Generator:
        return make(source.spawn(1)[0] if given is None else given)

    with mock.patch("numpy.random.default_rng", default_rng):
        yield


class KernelTunerSpace:
    """A recorded space as Kernel Tuner sees it. Its parameters are those of the space, its configurations exactly the recorded ones."""

    def __init__(self, recorded: RecordedSpace) -> None:
        self.recorded = recorded
        space = recorded.space
        self.tune_params: dict[str, list[Json]] = {}
        for column, name in enumerate(space.names):
            values = [_hashable(v) for v in space.values[column]]
            if (space.rows[:, column] == ABSENT).any():
                values.append(_absent(values))
            self.tune_params[name] = values
        lists = list(self.tune_params.values())
        # ABSENT is -1: the last value, which is the one appended for it.
        self.configs = [tuple(lists[c][v] for c, v in enumerate(row)) for row in space.rows.tolist()]
        self.candidate = {config: i for i, config in enumerate(self.configs)}
        # Its keys are text: 1 and True are told apart, 1 and "1" are not; as tuples it is the other way round.
        if min(len(self.candidate), len({_key(config) for config in self.configs})) < len(self.configs):
            raise UsageError(f"{recorded.name}: Kernel Tuner cannot tell some of its values apart")

    @cached_property
    def cache(self) -> dict[str, dict[str, Any]]:
        """Entries as kernel_tuner.util.process_cache reads them from a file: times in ms, failures as its error objects."""
        from kernel_tuner import util

        failures = {
            Status.UNSUPPORTED: util.InvalidConfig,
            Status.COMPILE_ERROR: util.CompilationFailedConfig,
        }
        made = {}
        for i, config in enumerate(self.configs):
            entry: dict[str, Any] = dict(zip(self.tune_params, config, strict=True))
            entry["time"] = 1e-3 * float(self.recorded.time_us[i])
            if not np.isfinite(entry["time"]):
                entry["time"] = entry["__error__"] = failures.get(self.recorded.status[i], util.RuntimeFailedConfig)()
            entry["compile_time"] = _ms(self.recorded.compile_s[i])
            entry["verification_time"] = 0.0
            entry["benchmark_time"] = _ms(self.recorded.benchmark_s[i])
            made[_key(config)] = entry
        return made

    @cached_property
    def _searchspace(self) -> Any:
        from kernel_tuner.searchspace import Searchspace

        return Searchspace(None, None, None, from_cache={"tune_params": self.tune_params, "cache": self.cache})

    def searchspace(self) -> Any:
        """A Searchspace of its own for one run: some strategies take neighbours out of its caches and rely on what is left."""
        made = copy.copy(self._searchspace)
        for name in ("_Searchspace__neighbor_cache", "_Searchspace__neighbor_partial_cache"):
            caches: Mapping[str, Any] = getattr(made, name)
            setattr(made, name, {method: type(kept)(*_factory(kept)) for method, kept in caches.items()})
        return made

    def run(self, strategy: str, *, seed: int, evaluations: int, order: dict[int, None]) -> None:
        """Add the candidates to `order` as they are first evaluated. Whatever the strategy raises is raised."""
        from kernel_tuner import util
        from kernel_tuner.interface import Options, strategy_map
        from kernel_tuner.runners.simulation import SimulationRunner

        candidate = self.candidate
        limit = min(evaluations, len(self.configs))
        asks = 0

        class Recorder(SimulationRunner):  # type: ignore[misc]
            def run(self, parameter_space: Any, tuning_options: Any) -> Any:
                nonlocal asks
                asks += 1
                if asks > ASKS_PER_EVALUATION * limit:
                    raise util.StopCriterionReached(f"{asks} asks for {len(order)} evaluations")
                asked = [tuple(element) for element in parameter_space]
                found = super().run(asked, tuning_options)
                for element, result in zip(asked, found, strict=True):
                    if result is not None and element in candidate:
                        order.setdefault(candidate[element])
                return found

        options = Options(
            tune_params=self.tune_params,
            restrictions=lambda params: tuple(params.values()) in candidate,
            restrictions_unmodified=None,
            strategy=strategy,
            strategy_options=Options(max_fevals=evaluations),
            max_fevals=evaluations,
            objective=["time"],
            objective_higher_is_better=[False],
            cache=self.cache,
            cachefile=None,
            metrics=None,
            simulation_mode=True,
            simulated_time=0,
            verbose=False,
            quiet=True,
            verify=None,
            seed=seed,
            budget=util.TuningBudget(None, limit),
        )
        runner = Recorder(None, Options(kernel_name=self.recorded.kernel), Options(quiet=True), 1, None)
        with seeded(seed):
            strategy_map[strategy].tune(self.searchspace(), runner, options)


def _factory(kept: Any) -> tuple[Any, ...]:
    return (kept.default_factory,) if hasattr(kept, "default_factory") else ()


def _ms(seconds: float) -> float:
    return 1e3 * float(np.nan_to_num(seconds))


def _key(config: tuple[Json, ...]) -> str:
    return ",".join(map(str, config))


def _hashable(value: Json) -> Json:
    return tuple(_hashable(v) for v in value) if isinstance(value, list) else value


def _absent(values: list[Json]) -> Json:
    numeric = all(isinstance(v, int | float) and not isinstance(v, bool) for v in values)
    return max(values, default=0) + 1 if numeric else "absent"
