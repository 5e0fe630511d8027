"""How long will it take? Rough on purpose: for a dry run, and to see whether a budget can be kept."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence

from klab.harness.measure.anchor import MATMUL, work
from klab.harness.measure.contest import GROUP_SLOTS
from klab.harness.measure.energy import RAMP_S
from klab.harness.measure.entry import contest_key
from klab.harness.measure.session import ENERGY_PASSES
from klab.harness.plan.trial import Trial
from klab.kernels.contract import Chip

# Seconds: for cpu as seen on two cores, for cuda from Triton's 0.5-6 s per compilation. A worker imports torch, Triton and CuPy.
WORKER_S = {"cuda": 12.0, "cpu": 6.0}
DATA_S = {"cuda": 1.0, "cpu": 0.5}
COMPILE_S = {"cuda": 2.5, "cpu": 0.05}
# Rounds that a typical trial needs until its interval is narrow, and the share of the roofline that a typical kernel reaches.
TYPICAL_ROUNDS = 30
TYPICAL_SHARE = 0.4
# What a round costs beside its launches: the pipe, the reading of the sensors, the untimed launch in front.
ROUND_OVERHEAD_S = 0.003
# An anchor's data and warm-up, once per worker: half a gigabyte of random numbers, or some 100 MB on a CPU.
ANCHOR_S = {"cuda": 1.0, "cpu": 1.0}
# A reference in float64 on a CPU makes about so many FLOP per second and core.
REFERENCE_FLOPS_PER_CORE = 5e9


def trial_estimate_s(trial: Trial, chip: Chip) -> float:
    """Seconds that one trial adds to a run: compile, check, warm up, rounds, energy."""
    policy, problem = trial.policy, trial.problem
    peak = chip.peak_flops(problem.math_dtype) or chip.peak_flops("float32") or 1e11
    launch_s = max(problem.flops() / peak, problem.bytes_moved() / (chip.memory_gb_per_s * 1e9)) / TYPICAL_SHARE
    round_s = max(policy.round_ms / 1e3, launch_s) + ROUND_OVERHEAD_S
    timing_s = min(_rounds(trial) * round_s, policy.limit_s)
    warm_s = policy.warmup_ms / 1e3 + 10 * launch_s
    energy_s = policy.energy_s + ENERGY_PASSES * RAMP_S + 1.0 if policy.energy and chip.kind == "cuda" else 0.0
    return COMPILE_S[chip.kind] + warm_s + timing_s + energy_s


def _rounds(trial: Trial) -> int:
    return min(max(trial.policy.min_rounds, TYPICAL_ROUNDS), trial.policy.max_rounds)


def anchor_round_s(name: str, trial: Trial, chip: Chip) -> float:
    """Seconds of one round of an anchor beside this trial; UsageError for an unknown anchor."""
    done = work(name, chip.kind)
    peak = chip.peak_flops(MATMUL[chip.kind][3]) or chip.peak_flops("float32") or 1e11
    launch_s = max(done.flops / peak, done.bytes_moved / (chip.memory_gb_per_s * 1e9)) / TYPICAL_SHARE
    return max(trial.policy.round_ms / 1e3, launch_s) + ROUND_OVERHEAD_S


def estimate_s(trials: Iterable[Trial], chip: Chip, *, devices: int = 1, anchors: Sequence[str] = ()) -> float:
    """Seconds for all of them on so many devices of this chip, with these anchors in every lap."""
    total, seen = 0.0, Counter[str]()
    for trial in trials:
        total += trial_estimate_s(trial, chip)
        key = contest_key(trial)
        seen[key] += 1
        if seen[key] % GROUP_SLOTS == 1:  # a further group of contestants, beside which the anchors run again
            lap_s = math.fsum(anchor_round_s(name, trial, chip) for name in anchors)
            total += min(_rounds(trial) * lap_s, len(anchors) * trial.policy.limit_s)
        if seen[key] == 1:
            total += DATA_S[chip.kind]
            if chip.kind == "cpu":
                total += 4 * trial.problem.flops() / (REFERENCE_FLOPS_PER_CORE * max(chip.sm_count, 1))
    return total / max(devices, 1) + (WORKER_S[chip.kind] + len(anchors) * ANCHOR_S[chip.kind] if seen else 0.0)
