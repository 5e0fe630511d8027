"""How many candidates per minute the farm compiles on this machine's cores, for Hopper and Blackwell: the Triton matmuls, a cold cache.

Run with `pytest ci/overheads/test_compile_rate.py -s`. Importing torch and triton in each process is counted.
"""

import os
import random

import pytest

from klab.harness.catalog import find_chip
from klab.harness.plan.trial import Policy, Trial
from klab.harness.tune.farm import default_jobs
from klab.harness.tune.screen import Limits, screen, tally
from klab.kernels.discover import discover
from klab.kernels.matmul.problem import Matmul

CANDIDATES = 40
PROBLEM = Matmul(2048, 4096, 4096)


def sample(chip):
    """The same candidates every time, drawn from the spaces of the Triton matmuls as they are."""
    kernels = [k for k in discover().of("matmul") if k.backend == "triton"]
    trials = [Trial.of(k, PROBLEM, config, chip.name, Policy()) for k in kernels for config in k.space(PROBLEM, chip)]
    return len(trials), random.Random(0).sample(trials, CANDIDATES)


@pytest.mark.parametrize("name", ["h200", "b200"])
def test_candidates_per_minute(name, benchmark, tmp_path, monkeypatch, capsys):
    pytest.importorskip("triton")
    monkeypatch.setenv("KLAB_CACHE", str(tmp_path / "klab"))
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))
    chip = find_chip(name)
    total, trials = sample(chip)
    found = benchmark.pedantic(screen, args=(trials, chip), rounds=1)
    assert not any(item.cached for item in found) and tally(found).get("kept", 0) >= CANDIDATES // 4
    if benchmark.stats is None:  # --benchmark-disable: it ran once, untimed
        return
    rate = 60 * CANDIDATES / benchmark.stats.stats.mean
    benchmark.extra_info |= {"candidates_per_minute": round(rate), "processes": default_jobs(Limits()), "cores": os.cpu_count()}
    with capsys.disabled():
        print(f"\n{name}: {rate:.0f} candidates/min in {default_jobs(Limits())} processes ({CANDIDATES} of {total:,}); {tally(found)}")
