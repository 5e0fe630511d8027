"""Anchors: two library launches that have a round in every lap of a contest, so that a value can be divided by what the device did then.

A warmer GPU, a lower clock, a busy neighbour and another board of the same kind slow the anchor as they slow the kernel: the ratio of the
two survives what the time alone does not. The simulation behind harness/watch found ">5%" alarms of nights with 2% of common noise to
fall from 7.7% to 1.95%. The work of an anchor is fixed per kind of chip, its data has a fixed seed, and it is no kernel of this
repository: what is edited here cannot move it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from klab.harness.plan.roofline import Roofline
from klab.kernels.contract import Chip, Json, Launch, Problem, Tensors
from klab.kernels.errors import UsageError

if TYPE_CHECKING:
    from klab.harness.measure.rotation import Rotation
    from klab.harness.measure.timer import Batch, Timer
    from klab.harness.plan.trial import Policy
    from klab.harness.store.result import Result

ANCHORS = ("matmul", "copy")
SEED = 20_230
# An anchor is warmed up once per contest and not once per contestant.
WARMUP_MS = 25.0
# cuda: 0.55 TFLOP, 0.7 ms of an H200; cpu: 1.1 GFLOP, some milliseconds of a few cores.
MATMUL = {"cuda": (8192, 8192, 4096, "bfloat16"), "cpu": (512, 1024, 1024, "float32")}
# (bytes of one copy, copies walked through). 512 MiB each way is four times the largest cache (B200: 126 MB); on a CPU 8 x 16 MiB each way
# exceed the caches of most, and one launch stays at some milliseconds.
COPY = {"cuda": (512 << 20, 1), "cpu": (16 << 20, 8)}


@dataclass(frozen=True)
class Work:
    """What a launch of an anchor does: for rates, and for people."""

    name: str
    what: str
    flops: float
    bytes_moved: float


def work(name: str, kind: str) -> Work:
    """The anchor's work on a kind of chip ("cuda" or "cpu"); UsageError for an unknown anchor."""
    if name == "matmul":
        m, n, k, dtype = MATMUL[kind]
        size = 2 if dtype == "bfloat16" else 4
        return Work(name, f"torch.matmul {m}x{n}x{k} {dtype}", 2.0 * m * n * k, float(size * (m * k + n * k + m * n)))
    if name == "copy":
        size, sets = COPY[kind]
        return Work(name, f"copy of {size >> 20} MiB" + (f", {sets} in turn" if sets > 1 else ""), 0.0, 2.0 * size)
    raise UsageError(f"unknown anchor {name!r}; known: {', '.join(ANCHORS)}")


def which_anchor(problem: Problem, chip: Chip) -> str:
    """ "matmul" for a problem that the chip's arithmetic bounds, "copy" for one that its memory bounds."""
    if chip.peak_flops(problem.math_dtype) is None and chip.peak_flops("float32") is None:
        return "copy"
    return "matmul" if Roofline(chip, problem.math_dtype).bound(problem.flops(), problem.bytes_moved())[1] == "compute" else "copy"


def pairs(result: Result, name: str) -> list[tuple[float, float]]:
    """(sample, anchor's sample) in microseconds of every lap in which both rounds count; empty where there is no such anchor."""
    found = _anchor_of(result, name)
    times, marks = found.get("us", ()), found.get("marked") or [0] * len(found.get("us", ()))
    return [
        (own, float(other))
        for own, mark, other, other_mark in zip(result.samples_us, result.marked, times, marks, strict=False)
        if not mark and not other_mark and other
    ]


def anchor_times(result: Result, name: str) -> list[float]:
    """The anchor's own times beside a result, in microseconds, of its rounds that count."""
    found = _anchor_of(result, name)
    times = [float(us) for us in found.get("us", ())]
    marks = found.get("marked") or [0] * len(times)
    return [us for us, mark in zip(times, marks, strict=False) if not mark]


def anchored(result: Result, name: str) -> list[float]:
    """Each sample over the anchor's of the same lap, for the rounds that count; empty where the anchor was not taken or failed."""
    return [own / other for own, other in pairs(result, name)]


def anchor_trouble(result: Result, name: str) -> str:
    """Why a result has no samples of this anchor, or not all of them; "" where it has."""
    if not (result.build.get("anchors") or {}).get(name):
        return f"no {name} anchor was taken"
    return str(_anchor_of(result, name).get("reason", ""))


def _anchor_of(result: Result, name: str) -> Mapping[str, Json]:
    found = (result.build.get("anchors") or {}).get(name) or {}
    return found if isinstance(found, Mapping) else {}


def make(name: str, timer: Timer, policy: Policy) -> Batch:
    """The anchor made ready to be timed on the timer's device, in rounds of the policy's length. Raises what the device raises."""
    launch, rotation = launch_of(name, timer.device)
    return timer.batch(launch, rotation, dataclasses.replace(policy, warmup_ms=min(policy.warmup_ms, WARMUP_MS), launch="auto"))


def launch_of(name: str, device: str) -> tuple[Launch, Rotation]:
    """The anchor's launch and its data on a device, for a caller that also looks at the outputs."""
    kind = "cpu" if device == "cpu" else "cuda"
    return _matmul(kind, device) if name == "matmul" else _copy(name, kind, device)


def _matmul(kind: str, device: str) -> tuple[Launch, Rotation]:
    import torch

    from klab.harness.measure.rotation import Rotation
    from klab.kernels.dtypes import random_normal, torch_dtype

    m, n, k, dtype = MATMUL[kind]
    inputs = {
        "x": random_normal((m, k), dtype, seed=SEED, device=device),
        "w": random_normal((n, k), dtype, seed=SEED + 1, device=device, scale=k**-0.5),
    }
    outputs = {"out": torch.empty((m, n), dtype=torch_dtype(dtype), device=device)}

    def launch(inputs: Tensors, outputs: Tensors) -> None:
        torch.matmul(inputs["x"], inputs["w"].T, out=outputs["out"])

    return launch, Rotation([inputs], [outputs], (), "cold")


def _copy(name: str, kind: str, device: str) -> tuple[Launch, Rotation]:
    import torch

    from klab.harness.measure.rotation import Rotation

    work(name, kind)  # UsageError for what is no anchor
    size, sets = COPY[kind]
    generator = torch.Generator(device=device).manual_seed(SEED)
    inputs = [
        {"x": torch.randint(-(2**31), 2**31 - 1, (size // 4,), dtype=torch.int32, device=device, generator=generator)} for _ in range(sets)
    ]

    def launch(inputs: Tensors, outputs: Tensors) -> None:
        outputs["out"].copy_(inputs["x"])

    # Clones and not empty tensors: their pages must exist before they are timed.
    return launch, Rotation(inputs, [{"out": i["x"].clone()} for i in inputs], (), "cold")
