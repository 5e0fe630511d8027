"""A simulated CUDA device: a stream is a list of work, an event is the device's clock."""

import contextlib
from types import SimpleNamespace

from klab.harness.measure.power import Reading


class FakeCuda:
    """Work runs when it is enqueued and advances the device's clock; within a capture it is recorded and runs at each replay."""

    def __init__(self):
        self.us, self.capturing, self.broken, self.captures = 0.0, None, False, 0

    def enqueue(self, us, work=lambda: None):
        if self.capturing is not None:
            self.capturing.append((us, work))
            return
        work()
        self.us += us

    def get_device_properties(self, index):
        return SimpleNamespace(L2_cache_size=60 << 20)

    def mem_get_info(self):
        return 100 << 30, 141 << 30

    def synchronize(self):
        if self.capturing is not None:
            raise RuntimeError("operation not permitted when stream is capturing\nmore")
        if self.broken:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def Event(self, enable_timing=False):
        cuda = self

        class Event:
            def record(self):
                self.at = cuda.us

            def synchronize(self):
                cuda.synchronize()

            def elapsed_time(self, end):
                return (end.at - self.at) / 1e3

        return Event()

    def CUDAGraph(self):
        cuda = self

        class Graph:
            def __init__(self):
                self.work = []

            def replay(self):
                for us, work in self.work:
                    cuda.enqueue(us, work)

        return Graph()

    @contextlib.contextmanager
    def graph(self, graph):
        self.capturing, self.captures = graph.work, self.captures + 1
        try:
            yield
        finally:
            self.capturing = None


class Meter:
    """A clock that falls from 1980 to 1500 MHz under load, as a B200's does within 5 ms."""

    trouble = ""

    def __init__(self, clocks=(1980.0, 1700.0, 1505.0, 1500.0)):
        self.clocks, self.reads = list(clocks), 0

    def read(self):
        self.reads += 1
        clock = self.clocks.pop(0) if len(self.clocks) > 1 else self.clocks[0]
        return Reading(clock, 60.0, 4, 650.0)

    def power_w(self):
        return 650.0

    def energy_j(self):
        return None
