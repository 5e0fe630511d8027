"""What `klab calibrate` runs in a worker: steps of some seconds each, by the lab's own timer, with library launches alone."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from klab.harness.measure import anchor, faults
from klab.harness.measure.power import PowerMeter
from klab.harness.measure.rotation import Rotation
from klab.harness.measure.sensor import pulse_lengths, record
from klab.harness.measure.session import Answer
from klab.harness.measure.stats import is_marked
from klab.harness.measure.timer import Batch, Timer
from klab.harness.plan.trial import Policy
from klab.harness.store.result import Status
from klab.kernels.contract import Chip, Launch, Tensors
from klab.kernels.errors import UsageError

ROUNDS = 30
# A matmul's rounds follow one another, so that the device is as warm and as power-limited as in a prefill.
MATMUL_ROUND_MS = {"cuda": 20.0, "cpu": 10.0}
MATMUL_WARMUP_MS = {"cuda": 500.0, "cpu": 50.0}
# The best of these is the peak: no library is at its best at every size.
MATMUL_SHAPES = {
    "cuda": ((4096, 4096, 4096), (8192, 8192, 8192), (16384, 8192, 8192)),
    "cpu": ((1024, 1024, 1024), (2048, 2048, 1024)),
}
SEED = 41
# Before the pulses the device rests, so that no earlier load is left in the longest window.
REST_S = 2.5
PULSE_SHAPE = (4096, 4096, 4096)
# Queued ahead of a poll: enough that no poll lets the device run dry, little enough that a pulse ends when it is to end.
CHUNK_US, CHUNKS = 2e3, 3


def run(chip: Chip, timer: Timer, meter: PowerMeter, step: str, **how: Any) -> Answer:
    """The answer to one step; a failure is a status in it, as in Session. UsageError for an unknown step."""
    steps: dict[str, Callable[..., Answer]] = {"anchors": _anchors, "launch": _launch, "matmul": _matmul, "sensor": _sensor}
    if step not in steps:
        raise UsageError(f"unknown step {step!r} of a calibration; known: {', '.join(steps)}")
    try:
        timer.begin(Policy())
        return {"status": Status.OK.value, **steps[step](chip, timer, meter, **how)}
    except BaseException as error:  # noqa: BLE001  a library may raise anything
        answer: Answer = {"status": faults.status_of(error, building=False).value, "reason": faults.one_line(error)}
        return answer | ({"fatal": True} if faults.is_fatal(error) else {})


def _rounds(batches: dict[str, Batch]) -> Answer:
    """Rounds of all in turn, in alternating order: {"rounds": {name: {"us", "mhz", "marked"}}}."""
    taken: dict[str, dict[str, list[Any]]] = {name: {"us": [], "mhz": [], "marked": []} for name in batches}
    names = list(batches)
    for turn in range(ROUNDS):
        for name in names if turn % 2 == 0 else names[::-1]:
            one = batches[name].round()
            taken[name]["us"].append(one.us)
            taken[name]["mhz"].append(one.reading.sm_clock_mhz)
            taken[name]["marked"].append(int(is_marked(one.reading.throttle_reasons)))
    return {"rounds": taken}


def _anchors(chip: Chip, timer: Timer, meter: PowerMeter) -> Answer:
    """Both anchors, as in a contest."""
    made = {name: anchor.make(name, timer, Policy()) for name in anchor.ANCHORS}
    return _rounds(made) | {"what": {name: anchor.work(name, chip.kind).what for name in made}}


def _launch(chip: Chip, timer: Timer, meter: PowerMeter) -> Answer:
    """A torch operation on one element, launched one by one, and (on a GPU) from a graph."""
    import torch

    one = {"x": torch.ones(1, device=timer.device)}
    rotation = Rotation([one], [{"out": torch.empty(1, device=timer.device)}], (), "warm")

    def launch(inputs: Tensors, outputs: Tensors) -> None:
        torch.add(inputs["x"], 1.0, out=outputs["out"])

    made = {"events": timer.batch(launch, rotation, Policy(launch="events", round_ms=2.0))}
    if chip.kind == "cuda":
        made["graph"] = timer.batch(launch, rotation, Policy(launch="graph", round_ms=2.0))
    return _rounds(made)


def _matmul(chip: Chip, timer: Timer, meter: PowerMeter, dtype: str) -> Answer:
    """Library matmuls of random numbers in this dtype, size after size."""
    answer: Answer = {"rounds": {}, "flops": {}}
    how = Policy(round_ms=MATMUL_ROUND_MS[chip.kind], warmup_ms=MATMUL_WARMUP_MS[chip.kind], launch="auto")
    for m, n, k in MATMUL_SHAPES[chip.kind]:
        launch, rotation = _product(timer.device, m, n, k, dtype)
        name = f"{m}x{n}x{k}"
        answer["rounds"] |= _rounds({name: timer.batch(launch, rotation, how)})["rounds"]
        answer["flops"][name] = 2.0 * m * n * k
    return answer


def _product(device: str, m: int, n: int, k: int, dtype: str) -> tuple[Launch, Rotation]:
    import torch

    from klab.kernels.dtypes import random_normal, torch_dtype

    narrow = dtype == "float8_e4m3fn"
    matmul: Any = torch._scaled_mm if narrow else torch.matmul
    inputs = {
        "x": random_normal((m, k), dtype, seed=SEED, device=device),
        # At fp8 the usual 1/sqrt(k) would round most weights to nothing, and zeros cost no power.
        "w": random_normal((n, k), dtype, seed=SEED + 1, device=device, scale=1.0 if narrow else k**-0.5),
    }
    outputs = {"out": torch.empty((m, n), dtype=torch.bfloat16 if narrow else torch_dtype(dtype), device=device)}
    scale = torch.tensor(k**-0.5, device=device)
    one = torch.tensor(1.0, device=device)

    def wide(inputs: Tensors, outputs: Tensors) -> None:
        matmul(inputs["x"], inputs["w"].T, out=outputs["out"])

    def fp8(inputs: Tensors, outputs: Tensors) -> None:
        out = outputs["out"]
        matmul(inputs["x"], inputs["w"].T, one, scale, out_dtype=out.dtype, use_fast_accum=True, out=out)

    return fp8 if narrow else wide, Rotation([inputs], [outputs], (), "warm")


def _sensor(chip: Chip, timer: Timer, meter: PowerMeter, seconds: float, seed: int = 0) -> Answer:
    """Poll all sensors under pulses of load: {"recording"}, or {"trouble"} where there is nothing to poll."""
    sensors = {"sensor": meter.power_w, "average": getattr(meter, "average_w", None), "counter": meter.energy_j}
    there = {name: read for name, read in sensors.items() if read is not None and read() is not None}
    if not there:
        return {"trouble": meter.trouble or "no sensor answers"}
    load = CudaPulses(timer)
    timer.wait()
    time.sleep(REST_S)
    found = record(there, load, pulse_lengths(seconds, seed=seed))
    timer.wait()
    return {"recording": found.to_json(), "absent": sorted(set(sensors) - set(there))}


class CudaPulses:
    """Matmuls in chunks of CHUNK_US on a GPU, CHUNKS of them queued, of which one has begun."""

    ahead_s = (CHUNKS - 0.5) * CHUNK_US / 1e6

    def __init__(self, timer: Any) -> None:
        self._timer = timer
        launch, rotation = _product(timer.device, *PULSE_SHAPE, "bfloat16")
        self._launch: Callable[[], None] = lambda: launch(rotation.inputs[0], rotation.outputs[0])
        for _ in range(3):
            self._launch()
        timer.wait()
        self._launches = max(1, math.ceil(CHUNK_US / timer.elapsed_us(self._launch)))
        self._pending: deque[Any] = deque()

    def feed(self) -> None:
        """Queue what is missing."""
        self.idle()
        while len(self._pending) < CHUNKS:
            for _ in range(self._launches):
                self._launch()
            self._pending.append(self._timer.event())

    def idle(self) -> bool:
        """Forget what has ended; True when nothing is left."""
        while self._pending and self._pending[0].query():
            self._pending.popleft()
        return not self._pending
