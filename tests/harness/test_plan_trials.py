"""From problems and kernels to trials: fitting, once each, the same every time."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from klab.harness.catalog import find_chip, find_model
from klab.harness.plan import plan, scenario_for
from klab.harness.plan.trial import Policy
from klab.harness.plan.trials import default_policy, missing, safe_unfit, trials
from klab.kernels.contract import Chip, Config, kernel
from klab.kernels.errors import UsageError
from klab.kernels.matmul.problem import Matmul
from klab.kernels.prefill_attention.problem import PrefillAttention

H200 = find_chip("h200")
CPU = Chip("cpu", "a CPU", "cpu", 2, 2600, 2600, {"float32": 0.17}, 24 << 30, 20.0, 32 << 20)


@dataclass(frozen=True)
class Tile(Config):
    size: int = 8


def space(problem: Matmul, chip: Chip) -> Iterator[Tile]:
    for size in range(1, 41):
        yield Tile(size)


@kernel(Matmul, backend="torch", library=True, kinds=("cuda", "cpu"))
def plain(problem, config, chip):
    """Nothing to choose."""
    return lambda inputs, outputs: None


@kernel(Matmul, backend="triton", config=Tile, space=space, fits=lambda p, c, chip: "too few rows" if p.m < c.size else None)
def tiled(problem, config, chip):
    """A space of forty."""
    return lambda inputs, outputs: None


@kernel(PrefillAttention, backend="triton")
def attention(problem, config, chip):
    """Another operator."""
    return lambda inputs, outputs: None


KERNELS = [plain, tiled, attention]
PROBLEMS = [Matmul(16, 32, 32), Matmul(4, 32, 32), Matmul(16, 32, 32)]


def test_default_candidates():
    found, skipped = trials(PROBLEMS, KERNELS, H200)
    assert [(t.problem.m, t.kernel) for t in found] == [(16, "matmul/plain"), (16, "matmul/tiled"), (4, "matmul/plain")]
    assert [(s.kernel, s.problem.m, s.reason) for s in skipped] == [("matmul/tiled", 4, "too few rows")]
    assert all(t.chip == "h200" and t.policy == default_policy(H200) for t in found)
    assert found[1].source_digest == tiled.source_digest


def test_all_candidates_are_the_fitting_ones_once():
    found, _ = trials(PROBLEMS, [tiled], H200, candidates="all")
    assert sorted(t.config.size for t in found) == list(range(1, 17))
    assert found[0].config == Tile(), "the default comes first"
    assert len({t.key for t in found}) == len(found)


@pytest.mark.parametrize("count", [1, 2, 5, 16, 99])
def test_samples(count):
    found, _ = trials(PROBLEMS[:1], [tiled], H200, candidates=f"sample:{count}")
    again, _ = trials(PROBLEMS[:1], [tiled], H200, candidates=f"sample:{count}")
    assert found == again
    assert len(found) == min(count, 16) and found[0].config == Tile()
    assert len({t.config for t in found}) == len(found)
    assert all(tiled.fits(t.problem, t.config, H200) is None for t in found)


def test_a_larger_sample_contains_a_smaller_one():
    sizes = [{t.config.size for t in trials([Matmul(64, 8, 8)], [tiled], H200, candidates=f"sample:{n}").trials} for n in (2, 6, 16, 30)]
    assert [len(s) for s in sizes] == [2, 6, 16, 30]
    assert all(smaller < larger for smaller, larger in itertools.pairwise(sizes))


def _raises(*arguments):
    raise ZeroDivisionError("division by zero\nand more")


@pytest.mark.parametrize("part", ["fits", "default", "space"])
def test_a_kernel_whose_own_code_raises_is_skipped_and_stops_no_other(part):
    @kernel(Matmul, backend="triton", config=Tile, **{part: _raises})
    def broken(problem, config, chip):
        """Raises before anything is launched."""

    found, skipped = trials(PROBLEMS[:1], [broken, plain], H200, candidates="all")
    assert {t.kernel for t in found} == {"matmul/plain"}
    assert [(s.kernel, s.reason.split(" raised ")[1]) for s in skipped] == [("matmul/broken", "ZeroDivisionError: division by zero")]
    assert (safe_unfit(broken, PROBLEMS[0], H200) is None) == (part == "space")
    assert safe_unfit(plain, PROBLEMS[0], H200) is None


def test_samples_differ_between_problems():
    found, _ = trials([Matmul(64, 8, n) for n in range(8, 48, 8)], [tiled], H200, candidates="sample:4")
    assert len({tuple(t.config.size for t in found if t.problem.n == n) for n in range(8, 48, 8)}) > 1


@pytest.mark.parametrize("candidates", ["", "some", "sample", "sample:", "sample:0", "sample:-1", "sample:x", "all:3"])
def test_unknown_candidates(candidates):
    with pytest.raises(UsageError, match="candidates"):
        trials(PROBLEMS, KERNELS, H200, candidates=candidates)


def test_a_plan_gives_its_problems_grouped():
    model = find_model("qwen3-0.6b")
    made = plan(model, CPU, scenario_for(model, CPU, isl=32, osl=8, batches=(2,)))
    found, skipped = trials(made, KERNELS, CPU)
    matmuls = [p for p in made.problems() if isinstance(p, Matmul)]
    assert [t.problem for t in found] == matmuls and {t.kernel for t in found} == {"matmul/plain"}
    assert {s.reason for s in skipped} == {"runs on cuda, not cpu"}


def test_missing():
    found, _ = trials(PROBLEMS, KERNELS, H200)
    assert missing(found, []) == found
    assert missing(found, [found[0].key]) == found[1:]
    assert missing(found, {t.key for t in found}) == []
    # A trial under another policy is another trial.
    assert missing(found, {t.with_policy(l2="warm").key for t in found}) == found


def test_energy_is_for_the_few_that_are_asked_again():
    assert not default_policy(H200).energy and not default_policy(CPU).energy
    other = Policy(l2="warm")
    assert {t.policy for t in trials(PROBLEMS, KERNELS, H200, other).trials} == {other}
