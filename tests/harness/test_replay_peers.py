"""Other tuners on a recorded space: that ours is the same run as theirs, and that what cannot run says so."""

from __future__ import annotations

import contextlib
import io
import warnings
from pathlib import Path

import pytest
import recorded_spaces

from klab.harness.tune.replay import peers, simulate
from klab.harness.tune.replay.peers_kernel_tuner import KernelTunerSpace, seeded
from klab.kernels.errors import UsageError

pytest.importorskip("kernel_tuner")
pytest.importorskip("optuna")

EVALUATIONS = 60
KT_STRATEGIES = [name.partition(".")[2] for name in peers.peers()[0] if name.startswith("kernel_tuner.")]
# These take seconds a run; the quick ones show the same code.
SLOW = {"nsga2", "nsga3", "bayes_opt"}


@pytest.fixture(scope="module")
def as_kernel_tuner_sees_it(tmp_path_factory: pytest.TempPathFactory) -> tuple[KernelTunerSpace, Path]:
    """A space in the order in which Kernel Tuner's own solver enumerates it, and its cache file."""
    from kernel_tuner.searchspace import Searchspace

    ordered = Searchspace(recorded_spaces.TUNE_PARAMS, [recorded_spaces.allowed], 1024).list
    points = [dict(zip(recorded_spaces.TUNE_PARAMS, config, strict=True)) for config in ordered]
    recorded = recorded_spaces.from_points(points, failing=0.15)
    return KernelTunerSpace(recorded), recorded_spaces.cache_file(recorded, tmp_path_factory.mktemp("kt") / "cache.json")


def theirs(strategy: str, seed: int, space: KernelTunerSpace, cache: Path) -> list[int]:
    """tune_kernel itself, in its simulation mode."""
    import kernel_tuner

    with seeded(seed), contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        results, _ = kernel_tuner.tune_kernel(
            "made_kernel", "", (1,), [], recorded_spaces.TUNE_PARAMS, restrictions=[recorded_spaces.allowed], lang="C", cache=str(cache),
            strategy=strategy, strategy_options={"max_fevals": EVALUATIONS}, simulation_mode=True, quiet=True, seed=seed,
        )  # fmt: skip
    return list(dict.fromkeys(space.candidate[tuple(r[name] for name in recorded_spaces.TUNE_PARAMS)] for r in results))


@pytest.mark.parametrize("strategy", [s for s in KT_STRATEGIES if s not in SLOW])
def test_a_run_evaluates_what_tune_kernel_evaluates(strategy: str, as_kernel_tuner_sees_it: tuple[KernelTunerSpace, Path]) -> None:
    space, cache = as_kernel_tuner_sees_it
    for seed in (3, 4):  # the second shows that nothing of the first is left in the shared search space
        order: dict[int, None] = {}
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            space.run(strategy, seed=seed, evaluations=EVALUATIONS, order=order)
        assert list(order) == theirs(strategy, seed, space, cache)
        assert 3 < len(order) <= EVALUATIONS


def test_tpe_stays_in_the_space_and_within_the_budget() -> None:
    recorded = recorded_spaces.small_space()
    found = peers.run_peer(recorded, peers.TPE, seed=1, evaluations=40)
    assert len(found.candidates) == len(set(found.candidates)) == 40
    assert not found.ended
    assert found == peers.run_peer(recorded, peers.TPE, seed=1, evaluations=40)
    assert found != peers.run_peer(recorded, peers.TPE, seed=2, evaluations=40)
    run = simulate.run_of_sequence(recorded, found.candidates, 1)
    assert run.seconds == pytest.approx(sum(recorded.compile_s[c] + recorded.benchmark_s[c] for c in found.candidates))


def test_a_strategy_that_fails_keeps_what_it_had(monkeypatch: pytest.MonkeyPatch) -> None:
    from kernel_tuner.strategies import random_sample

    def tune(searchspace: object, runner: object, options: object) -> None:
        runner.run(space.configs[:5], options)  # type: ignore[attr-defined]
        print("this is not seen")
        raise ZeroDivisionError("of its own making")

    recorded = recorded_spaces.small_space()
    space = KernelTunerSpace(recorded)
    monkeypatch.setattr(random_sample, "tune", tune)
    found = peers.run_peer(recorded, "kernel_tuner.random_sample", seed=0, evaluations=40)
    assert found.candidates == [0, 1, 2, 3, 4]
    assert found.ended == "failed: ZeroDivisionError: of its own making"


def test_a_strategy_that_never_ends_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    from kernel_tuner.strategies import random_sample

    def tune(searchspace: object, runner: object, options: object) -> None:
        runner.run(space.configs[:2], options)  # type: ignore[attr-defined]
        while True:
            with contextlib.suppress(Exception):
                sum(range(1000))

    recorded = recorded_spaces.small_space()
    space = KernelTunerSpace(recorded)
    monkeypatch.setattr(random_sample, "tune", tune)
    monkeypatch.setattr(peers, "RUN_LIMIT_S", 0.2)
    found = peers.run_peer(recorded, "kernel_tuner.random_sample", seed=0, evaluations=40)
    assert (found.candidates, found.ended) == ([0, 1], "stopped after 0.2 s of computing")


def test_strategies_without_their_package_are_told_apart() -> None:
    runnable, absent = peers.peers()
    assert "kernel_tuner.genetic_algorithm" in runnable
    assert peers.TPE in runnable
    assert not set(runnable) & set(absent)
    assert all(absent.values())


def test_missing_packages_name_the_group(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "optuna" else real(name))
    with pytest.raises(UsageError, match=r"optuna cannot be imported.*kernel-lab\[peers\]"):
        peers.require_peers()


def test_parameters_of_other_kernels_words_and_switches_are_no_obstacle() -> None:
    shared = [{"tile": t, "fast": f, "order": o} for t in (16, 32, 64) for f in (False, True) for o in ("row", "column")]
    points = [{"kernel": "a", **p, "stages": s} for p in shared for s in (2, 3)] + [
        {"kernel": "b", **p, "split": s} for p in shared for s in (1, 4)
    ]
    space = recorded_spaces.from_points(points, failing=0.2)
    for name in (peers.TPE, "kernel_tuner.genetic_algorithm", "kernel_tuner.pso"):
        found = peers.run_peer(space, name, seed=1, evaluations=20)
        assert not found.ended
        assert 10 <= len(found.candidates) == len(set(found.candidates)) <= 20
        assert {space.space.point(c)["kernel"] for c in found.candidates} == {"a", "b"}
