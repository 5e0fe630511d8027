"""How often `klab compare` is right, by simulation: docs/compare.md has a copy of what this prints.

pytest ci/overheads/test_compare_rates.py --benchmark-enable -s
"""

from __future__ import annotations

import math
import random
from collections import Counter
from typing import Any

import pytest
from simulated_comparison import Noise, hunt, rates

from klab.harness.watch.compare_rule import Answer

PAIRS = 40
TIMES = 400
NOISES = {
    "0.1%": Noise(0.001), "0.3%": Noise(0.003), "0.5%": Noise(0.005), "1%": Noise(0.01), "2%": Noise(0.02), "5%": Noise(0.05),
    "0.3%, 5% of the pairs of processes ten times that": Noise(0.003, spikes=0.05),
    "0.5%, and 1% that all pairs share": Noise(0.005, common=0.01),
}  # fmt: skip


def test_compare_rates(benchmark: Any, capsys: pytest.CaptureFixture[str]) -> None:
    def table() -> list[str]:
        columns = (
            "noise of a pair of processes", "nothing changed: any slower or faster", "said to be the same", "passes",
            "one of 40 is 3% slower: found", "passes", "one alone is 3% slower: found", "passes",
        )  # fmt: skip
        lines = [f"| {' | '.join(columns)} |", f"|---|{'--:|' * (len(columns) - 1)}"]
        for name, noise in NOISES.items():
            same, _, wrong, quiet_passes = rates([0.0] * PAIRS, noise, times=TIMES)
            slow, _, wrong_beside, passes = rates([math.log(1.03), *[0.0] * (PAIRS - 1)], noise, times=TIMES, seed=1)
            alone, _, _, alone_passes = rates([math.log(1.03)], noise, times=TIMES, seed=2)
            assert wrong <= 0.08 and wrong_beside <= 0.08, name  # 5%, and three standard errors of 400
            lines.append(
                f"| {name} | {wrong:.1%} | {same[Answer.SAME]:.0%} | {quiet_passes:.0f} | {slow[Answer.SLOWER]:.0%} | {passes:.0f} "
                f"| {alone[Answer.SLOWER]:.0%} | {alone_passes:.0f} |"
            )
        return lines

    lines = benchmark.pedantic(table, rounds=1)
    with capsys.disabled():
        print("\n" + "\n".join(lines))


def test_bisect_rates(benchmark: Any, capsys: pytest.CaptureFixture[str]) -> None:
    def table() -> list[str]:
        lines = ["| noise of a pair of processes | found | several left | wrong | ends not told apart |", "|---|--:|--:|--:|--:|"]
        for size in (0.001, 0.003, 0.005, 0.01, 0.02):
            rng = random.Random(3)
            ends = Counter(hunt(64, 1.03, Noise(size), rng) for _ in range(TIMES))
            assert ends["wrong"] <= 0.08 * TIMES
            shares = (ends[name] / TIMES for name in ("found", "several", "wrong", "no difference"))
            lines.append(f"| {size:.1%} | {' | '.join(f'{share:.1%}' for share in shares)} |")
        return lines

    lines = benchmark.pedantic(table, rounds=1)
    with capsys.disabled():
        print("\n" + "\n".join(lines))
