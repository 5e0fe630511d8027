"""Made-up but plausible Results: real problems and configurations, times from a simple model plus noise of a stated size."""

from __future__ import annotations

import dataclasses
import random
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from klab.harness.plan.trial import Policy
from klab.harness.store.result import Result, Status
from klab.kernels.contract import Problem, digest
from klab.kernels.decode_attention.problem import DecodeAttention
from klab.kernels.matmul.problem import Matmul
from klab.kernels.prefill_attention.problem import PrefillAttention

# name -> (peak TFLOP/s, GB/s, watts, device): enough of a chip to make up a time.
CHIPS = {"h200": (989.0, 4800.0, 700.0, "NVIDIA H200"), "cpu": (0.15, 30.0, 0.0, "Example CPU @ 2.50GHz")}
CONTEST: dict[str, tuple[tuple[str, str, bool, float], ...]] = {
    # operator -> (kernel, backend, library, share of the bound it reaches)
    "matmul": (("torch", "torch", True, 0.78), ("triton_tiled", "triton", False, 0.70), ("cuda_mma", "cuda", False, 0.62)),
    "prefill_attention": (("torch_flash", "torch", True, 0.62), ("triton_flash", "triton", False, 0.5)),
    "decode_attention": (("torch", "torch", True, 0.3), ("triton_split_kv", "triton", False, 0.8), ("cuda_split_kv", "cuda", False, 0.82)),
}
CONFIGS: dict[str, list[dict[str, Any]]] = {
    "triton": [{"block_m": 64, "block_n": 128, "warps": 4}, {"block_m": 128, "block_n": 128, "warps": 8}],
    "cuda": [{"splits": 4}, {"splits": 8}],
    "torch": [{}],
}


def problems() -> list[Problem]:
    """A small model's worth of shapes: projections at several batches, prefill and decode attention at several lengths."""
    found: list[Problem] = [Matmul(m, 2048, 1024) for m in (1, 8, 64, 512, 4096)]
    found += [PrefillAttention(q_lens=(n,), heads=16, kv_heads=8, head_dim=128) for n in (512, 2048, 8192)]
    found += [DecodeAttention(kv_lens=(n,) * batch, heads=16, kv_heads=8, head_dim=128) for n in (1024, 16384) for batch in (1, 8, 64)]
    return found


def made(
    problem: Problem,
    kernel: str = "torch",
    *,
    chip: str = "h200",
    config: Mapping[str, Any] | None = None,
    samples: Sequence[float] = (),
    noise: float = 0.01,
    level_us: float = 100.0,
    rounds: int = 20,
    seed: int = 0,
    drift: Sequence[float] = (),
    **changes: Any,
) -> Result:
    """One ok Result. `drift` multiplies the samples round by round: what interleaved candidates have in common."""
    rng = random.Random(f"{kernel} {problem.key} {config} {chip} {seed}")
    times = list(samples) or [level_us * (1 + abs(rng.gauss(0, noise))) for _ in range(rounds)]
    if drift:
        times = [t * d for t, d in zip(times, drift, strict=True)]
    middle = statistics.median(times)
    spread = 1.25 * statistics.pstdev(times) / max(len(times), 1) ** 0.5
    policy = Policy()
    trial = {"kernel": kernel, "problem": problem.key, "config": config or {}, "chip": chip, "policy": policy.to_json()}
    row = Result(
        key=digest(trial),
        status=Status.OK,
        kernel=f"{problem.operator}/{kernel}",
        backend="torch" if kernel.startswith("torch") else kernel.split("_")[0],
        library=kernel.startswith("torch"),
        source_digest=digest(kernel),
        operator=problem.operator,
        problem=problem.to_json(),
        problem_key=problem.key,
        problem_label=problem.label(),
        config=dict(config or {}),
        chip=chip,
        policy=policy.to_json(),
        run_id="run-1",
        recorded_at=f"2026-11-20T10:00:{seed % 60:02d}Z",
        error=problem.tolerance() / 4,
        tolerance=problem.tolerance(),
        checks=3,
        reference_device="cpu",
        samples_us=tuple(times),
        median_us=middle,
        q1_us=sorted(times)[len(times) // 4],
        q3_us=sorted(times)[3 * len(times) // 4],
        ci_low_us=middle - 2 * spread,
        ci_high_us=middle + 2 * spread,
        launches_per_round=40,
        launch_mode="events",
        l2_state="cold",
        clocks_mhz=(1755.0,) * len(times) if chip != "cpu" else (),
        temperatures_c=(52.0,) * len(times) if chip != "cpu" else (),
        throttle_reasons=(0,) * len(times) if chip != "cpu" else (),
        marked=(0,) * len(times),
        sm_clock_mhz=1755.0 if chip != "cpu" else None,
        energy_reason="no power meter on this machine" if chip == "cpu" else "not asked for",
        flops=problem.flops(),
        bytes_moved=problem.bytes_moved(),
        device=CHIPS[chip][3],
        device_uuid="GPU-0" if chip != "cpu" else "cpu-0",
        epoch="epoch-1",
        environment={"torch": "2.13.0", "triton": "3.7.1", "driver": "580.159", "commit": "0123456789ab"},
    )
    return dataclasses.replace(row, **changes)


def failed(problem: Problem, kernel: str, status: Status, reason: str, **changes: Any) -> Result:
    """A row of a trial that gave no time."""
    empty: dict[str, Any] = {"samples_us": (), "median_us": None, "q1_us": None, "q3_us": None, "ci_low_us": None, "ci_high_us": None}
    return made(problem, kernel, **empty | {"status": status, "reason": reason, "marked": (), "error": None, "checks": 0} | changes)


def contest(chip: str = "h200", seed: int = 0) -> list[Result]:
    """Every kernel and configuration on every problem of a small model, interleaved in one run, with a few failures."""
    tflops, bandwidth, watts, _ = CHIPS[chip]
    rng = random.Random(seed)
    rows = []
    for problem in problems():
        bound_us = max(problem.flops() / tflops / 1e6, problem.bytes_moved() / bandwidth / 1e3) + (1.5 if chip != "cpu" else 4.0)
        drift = [1 + 0.01 * rng.random() for _ in range(20)]
        for kernel, backend, _, share in CONTEST[problem.operator]:
            for n, config in enumerate(CONFIGS[backend]):
                level = bound_us / (share * (1 - 0.06 * n) * rng.uniform(0.9, 1.1))
                row = made(problem, kernel, chip=chip, config=config, level_us=level, noise=0.004, drift=drift, seed=seed)
                if watts and level > 50:
                    energy = rng.uniform(0.75, 0.95) * watts * level * 1e-6
                    extra = {"energy_j": energy, "energy_ci_low_j": energy * 0.99, "energy_ci_high_j": energy * 1.01}
                    power = {"power_w": energy / level * 1e6, "idle_power_w": 76.0, "energy_reason": "counter, cross-checked within 2%"}
                    row = dataclasses.replace(row, **extra, **power)
                rows.append(row)
    shape = problems()[0]
    rows.append(failed(shape, "triton_broken", Status.COMPILE_ERROR, "ptxas: <too much> shared data & more", chip=chip))
    rows.append(failed(shape, "cuda_wild", Status.CRASHED, "illegal memory access", chip=chip))
    rows.append(
        failed(shape, "cuda_wrong", Status.INCORRECT, "out is off by 3.10e-01, tolerance 3.91e-03", chip=chip, error=0.31, checks=1)
    )
    return rows
