"""A measuring process with a fault of the machine in it, and the client that starts one. $KLAB_FAULT_*: what is at fault.

LOST: a file; where it exists the device is gone, and no process comes up on it. READINGS: a sensor like NVML's that answers so often and
then is uninitialised. CLOCK: seconds by which time.time jumps, ahead and back by turns.
"""

from __future__ import annotations

import itertools
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path

FAULTS = "KLAB_FAULT_"


def jumping(seconds: float) -> None:
    """From now on time.time and time.time_ns are off by so much at every other call."""
    real, real_ns, turn = time.time, time.time_ns, itertools.count()
    time.time = lambda: real() + seconds * (next(turn) % 2)
    time.time_ns = lambda: real_ns() + int(seconds * 1e9) * (next(turn) % 2)


def unlucky_nvml(readings: int):
    """A board that answers so many questions."""
    from test_measure_power import FakeNvml

    class Board(FakeNvml):
        asked_for = 0
        now = property(lambda self: time.perf_counter(), lambda self, value: None)

        def _alive(self):
            self.asked_for += 1
            if self.asked_for > readings:
                raise self.NVMLError(self.NVML_ERROR_UNINITIALIZED, "Uninitialized")

    return Board()


def faulty_client(chip, kernel_dirs, faults: Mapping[str, object]):
    """A WorkerClient whose worker has these faults, by the end of their variable's name."""
    from klab.harness.measure.client import WorkerClient

    class FaultyClient(WorkerClient):
        def invocation(self):
            _, variables = super().invocation()
            return [sys.executable, "-P", __file__], variables | {FAULTS + name: str(value) for name, value in faults.items()}

    return FaultyClient(chip, kernel_dirs=kernel_dirs)


def main() -> None:
    """The worker's own, with the faults."""
    if Path(os.environ.get(FAULTS + "LOST", "/nowhere")).exists():
        sys.exit("RuntimeError: No CUDA GPUs are available")
    sys.path.insert(0, str(Path(__file__).parent))
    from klab.harness.measure import worker
    from klab.harness.measure.nvml import NvmlMeter

    if readings := os.environ.get(FAULTS + "READINGS"):
        worker.NullMeter = lambda trouble: NvmlMeter(unlucky_nvml(int(readings)), "board")
    if seconds := os.environ.get(FAULTS + "CLOCK"):
        jumping(float(seconds))
    worker.main()


if __name__ == "__main__":
    main()
