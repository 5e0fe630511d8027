"""Calibrates one device through its worker. A step that fails costs its figures alone, which then say why."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from klab.harness.measure import environment as places
from klab.harness.measure.anchor import ANCHORS, work
from klab.harness.measure.calibration import Calibration, Figure, device_id
from klab.harness.measure.client import WorkerClient, WorkerDied, WorkerHung
from klab.harness.measure.sensor import Recording, averaging_window, counter_window, update_period
from klab.harness.measure.session import Answer
from klab.harness.measure.stats import FLOOR_ROUNDS, counting, spread
from klab.harness.store.result import Status
from klab.kernels.contract import Chip
from klab.kernels.errors import UsageError

PARTS = ("anchors", "launch", "matmul", "sensor")
SENSOR_S = 40.0
# Random data in these; where the chip's specification has no peak for one, it is not tried.
MATMUL_DTYPES = {"cuda": ("bfloat16", "float16", "float8_e4m3fn"), "cpu": ("float32", "bfloat16")}
STEP_LIMIT_S = 300.0
KEPT = (*places.EPOCH_CUDA, *places.EPOCH_CPU, "power_limit_default_w", "host", "python")


class Calibrator:
    """One device, one worker. `say` is told what happens, in a few words."""

    def __init__(
        self, client: WorkerClient, chip: Chip, *, sensor_s: float = SENSOR_S, say: Callable[[str], None] = lambda text: None
    ) -> None:
        self._client, self._chip, self._sensor_s, self._say = client, chip, sensor_s, say

    def run(self, parts: Sequence[str] = PARTS) -> Calibration:
        """All the figures of `parts`. CannotMeasure when no worker comes up; UsageError for an unknown part."""
        checked_parts(parts)
        began = time.monotonic()
        self._client.start()
        facts = dict(self._client.environment)
        found: dict[str, Any] = {}
        for part in PARTS:
            if part in parts:
                found |= getattr(self, f"_{part}")()
        return Calibration(
            device_id(facts),
            str(facts.get("device", "")),
            self._chip.name,
            datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
            places.epoch(facts),
            environment={name: facts[name] for name in KEPT if facts.get(name) is not None},
            seconds=round(time.monotonic() - began, 1),
            **found,
        )

    def _ask(self, step: str, *, limit_s: float = STEP_LIMIT_S, **how: Any) -> tuple[Answer, str]:
        """(answer, "") or ({}, why there is none)."""
        try:
            self._client.start()
            answer = self._client.ask("calibrate", limit_s=limit_s, step=step, **how)
        except (WorkerDied, WorkerHung) as error:
            return {}, str(error)
        if answer["status"] != Status.OK.value:
            return {}, str(answer.get("reason") or answer["status"])
        return answer, str(answer.get("trouble", ""))

    def _anchors(self) -> dict[str, Any]:
        self._say("anchors")
        answer, trouble = self._ask("anchors")
        if trouble:
            return {"anchors": {name: Figure.missing(trouble) for name in ANCHORS}, "copy_gb_per_s": Figure.missing(trouble)}
        times = {name: time_of(answer["rounds"][name], answer["what"][name]) for name in ANCHORS}
        copy = work("copy", self._chip.kind)
        return {"anchors": times, "copy_gb_per_s": rate_of(times["copy"], copy.bytes_moved / 1e3)}

    def _launch(self) -> dict[str, Any]:
        self._say("launches")
        answer, trouble = self._ask("launch")
        rounds = answer.get("rounds", {})
        what = "torch.add of one element"
        on_cpu = "a CPU has no graphs" if self._chip.kind == "cpu" else ""
        return {
            "launch_overhead_us": Figure.missing(trouble) if trouble else time_of(rounds["events"], f"{what}, one after another"),
            "graph_overhead_us": time_of(rounds["graph"], f"{what}, from a CUDA graph")
            if "graph" in rounds
            else Figure.missing(trouble or on_cpu),
        }

    def _matmul(self) -> dict[str, Any]:
        found = {}
        for dtype in MATMUL_DTYPES[self._chip.kind]:
            if self._chip.peak_flops(dtype) is None:
                found[dtype] = Figure.missing(f"{self._chip.name} has no peak for it")
                continue
            self._say(f"matmul {dtype}")
            answer, trouble = self._ask("matmul", dtype=dtype)
            found[dtype] = Figure.missing(trouble) if trouble else self._best(answer)
        return {"matmul_tflops": found}

    @staticmethod
    def _best(answer: Answer) -> Figure:
        rates = [rate_of(time_of(rounds, name), answer["flops"][name] / 1e6) for name, rounds in answer["rounds"].items()]
        return max(rates, key=lambda figure: figure.value or 0.0)

    def _sensor(self) -> dict[str, Any]:
        names = ("sensor_period_ms", "sensor_window_ms", "average_period_ms", "average_window_ms", "counter_period_ms", "counter_window_ms")
        trouble = "no power sensor on this CPU" if self._chip.kind == "cpu" else ""
        if not trouble:
            self._say(f"power sensor, {self._sensor_s:.0f} s")
            answer, trouble = self._ask("sensor", limit_s=STEP_LIMIT_S + 3 * self._sensor_s, seconds=self._sensor_s)
        if trouble:
            return {name: Figure.missing(trouble) for name in names}
        return sensor_figures(Recording.from_json(answer["recording"]))


def checked_parts(parts: Sequence[str]) -> tuple[str, ...]:
    """These parts in the order in which they are measured; UsageError for an unknown one."""
    if unknown := sorted(set(parts) - set(PARTS)):
        raise UsageError(f"a calibration has no part {', '.join(unknown)}; it has {', '.join(PARTS)}")
    return tuple(part for part in PARTS if part in parts)


def sensor_figures(found: Recording) -> dict[str, Figure]:
    """The periods and windows that a recording shows, by the names of Calibration's fields."""
    figures: dict[str, Figure] = {}
    for name in ("sensor", "average", "counter"):
        seen = found.sensors.get(name)
        if seen is None:
            figures |= {f"{name}_{what}_ms": Figure.missing("this board has no such reading") for what in ("period", "window")}
            continue
        period = update_period(seen)
        window = counter_window(seen, found.busy, period) if name == "counter" else averaging_window(seen, found.busy)
        figures |= {f"{name}_period_ms": period, f"{name}_window_ms": window}
    return figures


def time_of(rounds: Mapping[str, Sequence[Any]], what: str) -> Figure:
    """Microseconds per launch of the rounds that count."""
    kept = counting(rounds["us"], rounds["marked"])
    if len(kept) < FLOOR_ROUNDS:
        return Figure.missing(f"the hardware throttled in {sum(rounds['marked'])} of {len(rounds['marked'])} rounds")
    found = spread(kept)
    clocks = sorted(mhz for mhz, mark in zip(rounds["mhz"], rounds["marked"], strict=True) if not mark and mhz is not None)
    clock = f", {clocks[len(clocks) // 2]:,.0f} MHz" if clocks else ""
    return Figure(found.median, found.low, found.high, note=f"{what}, {len(kept)} rounds{clock}")


def rate_of(times_us: Figure, work_per_us: float) -> Figure:
    """A rate from a time: `work_per_us` over microseconds."""
    if times_us.value is None or times_us.low is None or times_us.high is None:
        return times_us
    return Figure(work_per_us / times_us.value, work_per_us / times_us.high, work_per_us / times_us.low, note=times_us.note)
