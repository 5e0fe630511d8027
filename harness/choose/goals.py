"""How fast the kernels are meant to be, and what the results of a chip say of it: each goal with its figure, or why there is none."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from klab.harness.choose.candidates import Candidate, candidates, why_not
from klab.harness.choose.compare import Ratio, ratio
from klab.harness.store.result import Result
from klab.harness.tune.objective import LATENCY
from klab.kernels.discover import Catalogue
from klab.kernels.fused_moe._engine_config import sglang_default, vllm_default


@dataclass(frozen=True)
class Goal:
    """`least` is the figure to reach. `of` tells whether a row's problem belongs; `against` names the baselines ("library": any), or
    "copy" for a share of the measured copy bandwidth; `ours` which kernels are held to it (None: klab's own).
    """

    name: str
    least: float
    operator: str
    of: Callable[[Result], bool]
    against: str = "library"
    ours: Callable[[Result], bool] | None = None


@dataclass(frozen=True)
class Shown:
    """One problem of a goal: baseline over ours (or our share of the copy), with its interval."""

    problem: str
    kernel: str
    baseline: str
    figure: float
    low: float
    high: float


@dataclass(frozen=True)
class Verdict:
    """What the results say: "met", "missed", "cannot tell" (the interval holds the goal) or "not measured". The figure is the geometric
    mean over the problems; its interval comes from theirs.
    """

    goal: Goal
    verdict: str
    figure: float | None = None
    low: float | None = None
    high: float | None = None
    problems: tuple[Shown, ...] = ()
    reason: str = ""


def _number(row: Result, name: str, default: float = 0.0) -> float:
    value = row.problem.get(name, default)
    return float(value) if isinstance(value, int | float) else default


def _lens(row: Result, name: str) -> list[int]:
    value = row.problem.get(name, ())
    return [int(v) for v in value] if isinstance(value, list | tuple) else []


def _bf16(row: Result) -> bool:
    return bool(row.problem.get("dtype", "bfloat16") == "bfloat16")


def _large_matmul(row: Result) -> bool:
    return _bf16(row) and _number(row, "m") >= 512


def _small_matmul(row: Result) -> bool:
    return _bf16(row) and _number(row, "m") <= 64


def _long_causal(row: Result) -> bool:
    lens = _lens(row, "q_lens")
    plain = not row.problem.get("window") and not row.problem.get("prefix_lens") and bool(row.problem.get("causal", True))
    is_128 = row.problem.get("head_dim") == 128 and row.problem.get("head_dim_v", 0) in (0, 128)
    return plain and is_128 and _bf16(row) and bool(lens) and 8192 <= min(lens) <= max(lens) <= 16384


def _long_decode(row: Result) -> bool:
    lens = _lens(row, "kv_lens")
    return len(lens) >= 16 and min(lens) >= 4096 and not row.problem.get("window") and not row.problem.get("shared_prefix")


def _streams(row: Result) -> bool:
    # Smaller ones are all latency, whatever the kernel.
    return row.bytes_moved >= 32e6


def _fp8(row: Result) -> bool:
    return str(row.problem.get("format", "fp8_block")).startswith("fp8")


def _engine(row: Result) -> bool:
    return row.kernel == "fused_moe/triton_engine"


GOALS = (
    Goal("bf16 matmul, m >= 512: of cuBLAS", 0.97, "matmul", _large_matmul),
    Goal("bf16 matmul, m <= 64: of cuBLAS", 1.10, "matmul", _small_matmul),
    Goal("fp8 matmul: of torch._scaled_mm", 1.00, "scaled_matmul", _fp8, "scaled_matmul/torch_scaled_mm"),
    Goal("causal prefill, head dim 128, 8k to 16k: of the best SDPA backend", 1.00, "prefill_attention", _long_causal),
    Goal("decode, batch >= 16, contexts >= 4k: of the copy bandwidth", 0.85, "decode_attention", _long_decode, "copy"),
    Goal("decode, batch >= 16, contexts >= 4k: of SDPA", 1.50, "decode_attention", _long_decode),
    Goal("norms of 32 MB and more: of the copy bandwidth", 0.85, "norm", _streams, "copy"),
    Goal("activations of 32 MB and more: of the copy bandwidth", 0.85, "activation", _streams, "copy"),
    Goal("rotary positions and cache, 32 MB and more: of the copy bandwidth", 0.85, "rope_cache", _streams, "copy"),
    Goal("fused experts: of the same kernel as the engine configures it", 1.30, "fused_moe", lambda row: True, "engine", _engine),
)


Bandwidth = tuple[float, float, float]
"""GB/s: (value, low, high)."""


def judge(results: Iterable[Result], chip: str, *, engine_default: Callable[[Result], bool] | None = None) -> list[Verdict]:
    """Every goal against the valid results of a chip. `engine_default`: whether a row's configuration is the engine's own default."""
    rows = [row for row in results if row.chip == chip and why_not(row, LATENCY) is None]
    by_problem: dict[str, list[Result]] = {}
    for row in rows:
        by_problem.setdefault(row.problem_key, []).append(row)
    copy = copy_gb_per_s(rows)
    return [_judge(goal, by_problem.values(), copy, engine_default or (lambda row: False)) for goal in GOALS]


def engine_default(catalogue: Catalogue) -> Callable[[Result], bool]:
    """Whether a row of the engines' kernel has the configuration that vLLM or SGLang would take without a tuned file."""

    def default(row: Result) -> bool:
        kernel = catalogue.kernels.get(row.kernel)
        if kernel is None or not _engine(row):
            return False
        problem: Any = kernel.problem_type.from_json(row.problem)
        return any(dict(row.config) == find(problem).to_json_full() for find in (vllm_default, sglang_default))

    return default


def copy_gb_per_s(rows: Iterable[Result]) -> Bandwidth | None:
    """(GB/s, low, high) of the fastest copy of at least 32 MB, or None where none was measured."""
    found = [
        (r.bytes_moved / r.median_us / 1e3, r.bytes_moved / r.ci_high_us / 1e3, r.bytes_moved / r.ci_low_us / 1e3)
        for r in rows
        if r.operator == "copy" and _streams(r) and r.median_us and r.ci_low_us and r.ci_high_us
    ]
    return max(found, default=None)


def _judge(goal: Goal, problems: Iterable[Sequence[Result]], copy: Bandwidth | None, engine: Callable[[Result], bool]) -> Verdict:
    if goal.against == "copy" and copy is None:
        return Verdict(goal, "not measured", reason="no copy of 32 MB or more was measured on this chip")
    shown = []
    for rows in problems:
        if rows[0].operator == goal.operator and goal.of(rows[0]):
            one = _shown(goal, rows, copy, engine)
            if one is not None:
                shown.append(one)
    if not shown:
        what = (
            "the engine's configuration and another" if goal.against == "engine" else "a kernel of klab's own and what it is held against"
        )
        return Verdict(goal, "not measured", reason=f"no problem of this kind has both {what}")
    mean, low, high = (math.exp(sum(math.log(getattr(s, name)) for s in shown) / len(shown)) for name in ("figure", "low", "high"))
    verdict = "met" if low >= goal.least else "missed" if high < goal.least else "cannot tell"
    return Verdict(goal, verdict, mean, low, high, tuple(sorted(shown, key=lambda s: s.figure)))


def _shown(goal: Goal, rows: Sequence[Result], copy: Bandwidth | None, engine: Callable[[Result], bool]) -> Shown | None:
    found = candidates(rows)
    ours = [c for c in found if (goal.ours(c.row) if goal.ours else not c.row.library)]
    best = _fastest(ours)
    if best is None:
        return None
    if goal.against == "copy":
        assert copy is not None
        row = best.row
        low_us, high_us = row.ci_low_us or row.median_us or 0.0, row.ci_high_us or row.median_us or 0.0
        shares = (row.bytes_moved / us / 1e3 / gb for us, gb in ((row.median_us or 0.0, copy[0]), (high_us, copy[2]), (low_us, copy[1])))
        return Shown(row.problem_label, row.kernel, "copy", *shares)
    if goal.against == "engine":
        baseline = _fastest([c for c in ours if engine(c.row)])
        if all(engine(c.row) for c in ours):  # nothing else was tried
            return None
    else:
        named = [c for c in found if c.row.library and (goal.against == "library" or c.row.kernel.startswith(goal.against))]
        baseline = _fastest(named)
    if baseline is None:
        return None
    compared = Ratio(1.0, 1.0, 1.0, "itself") if baseline is best else ratio(baseline, best)
    return Shown(best.row.problem_label, best.row.kernel, baseline.row.kernel, compared.ratio, compared.low, compared.high)


def _fastest(found: Sequence[Candidate]) -> Candidate | None:
    return min(found, key=lambda c: (c.row.median_us or math.inf, c.name), default=None)
