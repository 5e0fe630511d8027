"""How well `klab calibrate` finds a power sensor's period and window, on simulated boards: the table of docs/calibration.md.

python -m pytest ci/overheads/test_sensor_inference.py --benchmark-enable -s
"""

from __future__ import annotations

import random
import statistics
import sys
from pathlib import Path
from typing import Any

import pytest

from klab.harness.measure.sensor import averaging_window, counter_window, pulse_lengths, record, update_period

# The same board as in the tests.
sys.path.insert(0, str(Path(__file__).parents[2] / "tests" / "harness"))
from fake_sensor import FakeBoard

RUNS, SECONDS = 12, 40.0
BOARDS: dict[str, dict[str, float]] = {
    "100 ms, sees 25 of them": {"period_s": 0.1, "window_s": 0.025},
    "100 ms, averages 1 s": {"period_s": 0.1, "window_s": 1.0},
    "100 ms, sees all": {"period_s": 0.1, "window_s": 0.1},
    "20 ms, sees all": {"period_s": 0.02, "window_s": 0.02},
}


def inferred(board: dict[str, float], rise_s: float, seed: int) -> tuple[Any, Any, Any]:
    phase = random.Random(seed).uniform(0.0, board["period_s"])
    made = FakeBoard(**board, rise_s=rise_s, phase_s=phase, noise=0.02, counter_window_s=min(board["window_s"], 0.1), seed=seed)
    sensors = {"sensor": made.power_w, "counter": made.energy_j}
    found = record(sensors, made, pulse_lengths(SECONDS, seed=seed), clock=made.clock, sleep=made.sleep)
    sensor, counter = found.sensors["sensor"], found.sensors["counter"]
    return update_period(sensor), averaging_window(sensor, found.busy), counter_window(counter, found.busy, update_period(counter))


@pytest.mark.parametrize("rise_s", [0.0, 0.0065, 0.03])
@pytest.mark.parametrize("name", BOARDS)
def test_a_known_sensor_is_found(name: str, rise_s: float, benchmark: Any) -> None:
    board = BOARDS[name]
    found = [inferred(board, rise_s, seed) for seed in range(RUNS)]
    benchmark.pedantic(inferred, args=(board, rise_s, 0), rounds=1, iterations=1)
    truth = 1e3 * board["window_s"]
    windows = [window.value for _, window, _ in found]
    covered = sum(window.low <= truth <= window.high for _, window, _ in found)
    period = max(abs(p.value / (1e3 * board["period_s"]) - 1) for p, _, _ in found)
    counter_ms = statistics.median(c.value for _, _, c in found)
    print(
        f"\n{name}, power rises in {1e3 * rise_s:.1f} ms: period within {period:.2%}; window {statistics.median(windows):.1f} ms "
        f"({min(windows):.1f}..{max(windows):.1f}), its interval holds it in {covered} of {RUNS}; the counter sees {counter_ms:.0f} ms"
    )
    assert period < 0.005
    assert abs(statistics.median(windows) - truth) < max(0.03 * truth, 2.0)
    assert covered >= 0.9 * RUNS
