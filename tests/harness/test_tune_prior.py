"""Seeds and expectations from the store and the model, and what they are worth in a replay."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from modelled_matmul import B200, H200, SMALL, Device, configs, results, time_us
from modelled_matmul import space as modelled

from klab.harness.store.result import Result, Status
from klab.harness.tune.prior import prior_for, sources_of
from klab.harness.tune.replay.recorded import RecordedSpace
from klab.harness.tune.search import Budget, search
from klab.harness.tune.space import KERNEL, Space
from klab.harness.tune.strategy import Prior, find_strategy
from klab.kernels.contract import Chip, Config, Kernel, kernel
from klab.kernels.matmul.problem import Matmul

CHIP = Chip(
    name="h200", title="H200", kind="cuda", sm_count=132, max_clock_mhz=1980.0, spec_clock_mhz=1830.0, peak_tflops={"bfloat16": 989.0},
    memory_bytes=141 * 10**9, memory_gb_per_s=4800.0, l2_bytes=50 * 2**20, compute_capability=(9, 0), smem_per_block_bytes=232_448,
)  # fmt: skip
N = K = 4096


@dataclass(frozen=True)
class Tiles(Config):
    block_m: int = 64
    block_n: int = 64
    block_k: int = 64
    stages: int = 3
    warps: int = 4
    split_k: int = 1


def space_of(problem: Matmul, chip: Chip) -> Iterator[Tiles]:
    return (Tiles(**config) for config in configs())


@kernel(Matmul, backend="triton", config=Tiles, space=space_of)
def tiled(problem: Matmul, config: Tiles, chip: Chip) -> Any:
    """The contestant of the modelled family."""
    raise AssertionError("it is only searched")


@kernel(Matmul, backend="torch", library=True)
def blas(problem: Matmul, config: Config, chip: Chip) -> Any:
    """A library."""
    raise AssertionError("it is only searched")


KERNELS: dict[str, Kernel] = {k.id: k for k in (blas, tiled)}


def rows_of(m: int, candidates: Sequence[int] | None = None, device: Device = H200, *, fresh: bool = True) -> list[Result]:
    """The store after tuning this shape on this device: of these candidates, or of every fifth."""
    recorded = modelled(m, N, K, device)
    found = results(recorded, Matmul(m, N, K), list(range(0, len(recorded.space), 5)) if candidates is None else list(candidates))
    return [dataclasses.replace(row, source_digest=tiled.source_digest if fresh else "an older one") for row in found]


def prior(m: int, rows: Sequence[Result], **more: Any) -> Prior:
    return prior_for(modelled(m, N, K).space, Matmul(m, N, K), CHIP, KERNELS, rows, **more)


def model_us(problem: Matmul, contestant: Kernel, config: Any, chip: Chip) -> float | None:
    found = time_us(problem, config.to_json_full(), dataclasses.replace(H200, tflops=400.0)) if contestant is tiled else None
    return found if found is None or math.isfinite(found) else None


def default_of(m: int) -> int:
    found = modelled(m, N, K).space.find({KERNEL: tiled.id, **Tiles().to_json_full()})
    assert found is not None
    return found


def test_an_empty_store_gives_the_defaults_alone() -> None:
    found = prior(64, [])
    assert found.seeds == (default_of(64),)
    assert found.expected is None
    both = Space.of(
        [{KERNEL: tiled.id, **Tiles(block_m=16).to_json_full()}, {KERNEL: tiled.id, **Tiles().to_json_full()}, {KERNEL: blas.id}]
    )
    assert prior_for(both, Matmul(64, N, K), CHIP, KERNELS, []).seeds == (2, 1)


def test_the_default_comes_first_then_the_nearest_shapes_then_other_chips() -> None:
    rows = [*rows_of(1024), *rows_of(128, device=B200), *rows_of(64), *rows_of(4096)]
    found = prior(128, rows)
    space = modelled(128, N, K).space
    assert found.seeds[0] == default_of(128)
    assert len(found.seeds) <= 1 + 2 * 4

    def winner(m: int, device: Device = H200) -> int | None:
        recorded = modelled(m, N, K, device)
        tuned = np.arange(0, len(recorded.space), 5)
        return space.find(recorded.space.point(int(tuned[recorded.time_us[tuned].argmin()])))

    expected = [default_of(128), winner(64), winner(1024), winner(4096), winner(128, B200)]
    assert list(found.seeds[: len(dict.fromkeys(expected))]) == list(dict.fromkeys(expected))


def test_a_winner_that_does_not_exist_here_gives_way_to_the_best_that_does() -> None:
    recorded = modelled(64, N, K)
    best = int(recorded.time_us.argmin())
    here = Space.of(recorded.space.point(c) for c in range(len(recorded.space)) if c != best)
    found = prior_for(here, Matmul(64, N, K), CHIP, KERNELS, rows_of(64, range(len(recorded.space))))
    order = np.argsort(recorded.time_us, kind="stable")
    assert [here.point(c) for c in found.seeds[1:]] == [recorded.space.point(int(c)) for c in order[1:3]]


def test_sources_are_ranked_by_doublings_chip_and_code() -> None:
    rows = [*rows_of(64), *rows_of(512), *rows_of(64, device=SMALL), *rows_of(16, fresh=False)]
    found = sources_of(rows, Matmul(64, N, K), CHIP, KERNELS)
    assert [(s.chip, s.distance) for s in found] == [("h200", 0.0), ("small", 1.0), ("h200", 3.0), ("h200", 2.0)]
    assert [s.fresh for s in found] == [1.0, 1.0, 1.0, 0.0]
    assert np.isinf(found[1].time_us).any()  # what failed there is kept as such
    half = dataclasses.replace(Matmul(64, N, K), dtype="float16")
    assert sources_of(rows_of(64), half, CHIP, KERNELS)[0].distance == 2.0


def test_of_equal_points_the_present_code_and_then_the_newest_stands() -> None:
    (row,) = rows_of(64, [0])
    older = dataclasses.replace(row, median_us=50.0, recorded_at="2020-01-01T00:00:00Z")
    stale = dataclasses.replace(row, median_us=70.0, source_digest="other", recorded_at="2030-01-01T00:00:00Z")
    (source,) = sources_of([stale, older, row], Matmul(64, N, K), CHIP, KERNELS)
    assert source.time_us.tolist() == [row.median_us]


def test_rows_that_say_nothing_are_left_out() -> None:
    (row,) = rows_of(64, [0])
    silent = [
        dataclasses.replace(row, status=Status.SCREENED, kind="screened"),
        dataclasses.replace(row, status=Status.THROTTLED),
        dataclasses.replace(row, operator="decode_attention"),
        dataclasses.replace(row, kernel="matmul/gone"),
        dataclasses.replace(row, problem={"m": 64, "n": 1, "k": 1, "unheard": 2}, problem_key="x"),
        dataclasses.replace(row, median_us=None),
        dataclasses.replace(row, status=Status.CRASHED, median_us=None),  # a source in which nothing ran has no scale
    ]
    found = prior(64, silent)
    assert found == Prior((default_of(64),), None)


def test_the_model_enters_by_its_ratios_alone() -> None:
    recorded = modelled(256, N, K)
    alone = prior(256, [], expected_us=model_us).expected
    assert alone is not None
    assert np.isnan(alone[~np.isfinite(recorded.time_us)]).all()
    scaled = prior(256, rows_of(64), expected_us=lambda *a: None if (t := model_us(*a)) is None else 1000.0 * t).expected
    plain = prior(256, rows_of(64), expected_us=model_us).expected
    assert plain is not None
    assert scaled is not None
    assert scaled / scaled[0] == pytest.approx(plain / plain[0])
    # Records of this very problem outweigh it.
    known = list(range(0, len(recorded.space), 5))
    reversed_model = prior(256, rows_of(256, known), expected_us=lambda *a: None if (t := model_us(*a)) is None else 1e4 / t).expected
    assert reversed_model is not None
    fine = [c for c in known if np.isfinite(recorded.time_us[c])]
    assert np.corrcoef(np.log(reversed_model[fine]), np.log(recorded.time_us[fine]))[0, 1] > 0.9


def efficiency(recorded: RecordedSpace, given: Prior, evaluations: int, seeds: int, name: str = "gaussian") -> float:
    """Geometric mean over seeds of optimum / best found."""
    found = []
    for seed in range(seeds):
        best = search(find_strategy(name).make(recorded.space, seed, given), recorded.evaluate, Budget(evaluations=evaluations)).best
        found.append(recorded.optimum_us / best.value if best else 0.01)
    return float(np.exp(np.mean(np.log(found))))


@pytest.mark.parametrize(("m", "near", "far"), [(64, 32, 4096), (1024, 2048, 8)])
def test_the_nearest_tuned_shape_helps_a_search(m: int, near: int, far: int) -> None:
    recorded = modelled(m, N, K)
    cold = efficiency(recorded, prior(m, []), 16, 3)
    warm = efficiency(recorded, prior(m, [*rows_of(near), *rows_of(far)]), 16, 3)
    assert warm > 0.93
    assert warm > cold + 0.02


def test_another_chip_s_records_help_a_search() -> None:
    recorded = modelled(512, N, K)
    cold = efficiency(recorded, prior(512, []), 16, 3)
    warm = efficiency(recorded, prior(512, rows_of(512, device=B200)), 16, 3)
    assert warm > cold + 0.02


@pytest.mark.parametrize("wrong", ["reversed", "random"])
def test_a_misleading_prior_costs_a_bounded_part(wrong: str) -> None:
    recorded = modelled(512, N, K)
    truth = np.where(np.isfinite(recorded.time_us), recorded.time_us, np.nan)
    lie = 1e4 / truth if wrong == "reversed" else np.random.default_rng(0).permutation(truth)
    # Eight seeds: with three the mean of either moves by 10%.
    cold = efficiency(recorded, Prior(), 60, 8)
    misled = efficiency(recorded, Prior((), lie), 60, 8)
    assert misled > 0.88 * cold
