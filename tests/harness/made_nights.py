"""Nights made up for tests: series with a level and noise, and what happened to some of them."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Sequence

from klab.harness.watch.series import Call, Metric, Night, Point, Role, Series, Verdict

EPOCH, NEW_EPOCH = "epoch-a", "epoch-b"
EPOCHS = {
    EPOCH: {"driver": "580.65", "triton": "3.6.0", "torch": "2.11.0"},
    NEW_EPOCH: {"driver": "580.95", "triton": "3.7.1", "torch": "2.11.0"},
}
GPU = "GPU-0f2c51d1-1111-2222-3333-444455556666"


def series(n: int, metric: Metric = Metric.TIME, role: Role = Role.CHOSEN, chip: str = "h200") -> Series:
    """The n-th series; operators take turns."""
    operator = ("matmul", "decode_attention", "norm", "fused_moe")[n % 4]
    return Series(chip, operator, f"{operator}-{n}", f"m{16 * (n + 1)} n4096 k4096 bf16", role.value, metric.value, ("qwen3-0.6b",))


def point(level: float, rng: random.Random, *, noise: float = 0.008, epoch: str = EPOCH, night: float = 1.0, looks: int = 1) -> Point:
    """Three processes; the anchor sees the night's effect too, so the anchored values are free of it."""
    values = tuple(level * night * (1 + rng.gauss(0, noise)) for _ in range(3 * looks))
    anchored = tuple(v / (40.0 * night) for v in values)
    cycles = tuple(v * 1830.0 for v in values)
    kernel = "matmul/triton_split"
    return Point(values, anchored, cycles, "matmul", looks=looks, kernel=kernel, config={"block_m": 64}, device_uuid=GPU, epoch=epoch)


def verdict(one: Series, call: Call, reason: str = "as usual", **more: object) -> Verdict:
    return Verdict(one, call.value, reason, **more)  # type: ignore[arg-type]


def night(verdicts: Sequence[Verdict] = (), day: int = 0, **more: object) -> Night:
    """A night of October 2026 or later, an hour and a half long."""
    at = f"2026-{10 + day // 30:02d}-{1 + day % 30:02d}T02:17:00Z"
    identity = at.replace(":", "").replace("-", "") + "-h200"
    devices = {GPU: {"device": "NVIDIA H200"}}
    commit = f"{day + 1:012x}{0:028x}"
    found = Night(identity, at, "h200", commit, False, tuple(verdicts), EPOCHS, devices, (), 5400.0, "ci/policy.toml")
    return dataclasses.replace(found, **more)  # type: ignore[arg-type]


def history(count: int = 20, nights: int = 30, level: Callable[[int, int], float] | None = None, new_epoch_at: int = 10_000) -> list[Night]:
    """Nights of `count` series; `level(series, night)` in us, steady by default."""
    rng = random.Random(7)
    made = []
    for day in range(nights):
        effect = 1 + rng.gauss(0, 0.01)
        epoch = EPOCH if day < new_epoch_at else NEW_EPOCH
        found = []
        for n in range(count):
            us = level(n, day) if level else 20.0 * (n + 1)
            told = point(us, rng, epoch=epoch, night=effect)
            found.append(verdict(series(n), Call.OK, point=told, ratio=1.0, low=0.99, high=1.01, nights=20))
        made.append(night(found, day))
    return made


def eventful(count: int = 20) -> tuple[Night, list[Night]]:
    """Tonight and the nights before it: one of everything that can be said of a series."""

    def level(n: int, day: int) -> float:
        return 20.0 * (n + 1) * (1.06 if n == 0 and day >= 28 else 1.04 if n == 9 and day >= 12 else 1.0)

    *earlier, last = history(count, 31, level)
    rng = random.Random(1)
    told = list(last.verdicts)
    of_twenty = {"nights": 20}
    told[0] = verdict(
        series(0), Call.SLOWER, "6.0% above the median of 20 nights, limit 3.1%, in all 9 processes; cycles agree",
        point=point(21.2, rng, looks=3), ratio=1.06, low=1.052, high=1.067, **of_twenty,
    )  # fmt: skip
    crash = Point(status="incorrect", reason="error 0.3 above 0.01", kernel="decode_attention/triton_split_kv", epoch=EPOCH)
    told[1] = verdict(series(1), Call.BROKEN, "incorrect: error 0.3 above the tolerance 0.01 at check 2", point=crash)
    told[2] = verdict(series(2), Call.MISSING, "measured on each of the last 30 nights; its kernel is gone")
    told[3] = verdict(
        series(3), Call.SUSPECT, "3.9% above, and 1 of 3 looks is within the limit",
        point=point(83.0, rng, looks=3), ratio=1.039, low=0.99, high=1.06, **of_twenty,
    )  # fmt: skip
    told[4] = verdict(
        series(4), Call.FASTER, "8.0% below the median of 20 nights",
        point=point(92.0, rng, looks=2), ratio=0.92, low=0.91, high=0.93, **of_twenty,
    )  # fmt: skip
    told[5] = verdict(series(5), Call.UNKNOWN, "2 nights of this epoch; 5 are needed", point=point(120.0, rng), nights=2)
    told[6] = verdict(
        series(6), Call.SLOWER, "5.5% above the median of 20 nights", waiver="ada, until 2026-12-24: known, fix in review",
        point=point(147.7, rng), ratio=1.055, low=1.05, high=1.06, **of_twenty,
    )  # fmt: skip
    late = ("2 series were not reached within the budget of 2 h",)
    return dataclasses.replace(last, verdicts=tuple(told), notes=late), earlier
