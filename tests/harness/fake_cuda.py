"""A simulated CUDA device: a stream is a list of work, an event is the device's clock."""

import contextlib
from types import SimpleNamespace

from klab.harness.measure.power import Reading


class FakeCuda:
    """Work runs when it is enqueued and advances the device's clock; within a capture it is recorded and runs at each replay.

    What a failed capture leaves behind is as in torch: the capture's stream stays the current one, and `ends_pools` says whether its
    pool is no longer being captured to (torch 2.12) or still is, so that empty_cache raises (before). With `mendable` false nothing
    can end it.
    """

    def __init__(self, *, ends_pools=False, mendable=True):
        self.us, self.capturing, self.broken, self.captures = 0.0, None, False, 0
        self.ends_pools, self.mendable = ends_pools, mendable
        self.stream, self.pools, self.underway, self.released = "main", 0, set(), []

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

    def graph_pool_handle(self):
        self.pools += 1
        return (0, self.pools)

    def current_stream(self):
        return self.stream

    def set_stream(self, stream):
        self.stream = stream

    def current_device(self):
        return 0

    def empty_cache(self):
        if self.underway:
            raise RuntimeError("captures_underway.empty() INTERNAL ASSERT FAILED\nmore")

    def _cuda_endAllocateToPool(self, device, pool):
        if not self.mendable or pool not in self.underway:
            raise RuntimeError("endAllocatePool: not currently recording to mempool_id")
        self.underway.remove(pool)

    def _cuda_releasePool(self, device, pool):
        self.released.append(pool)

    @contextlib.contextmanager
    def graph(self, graph, pool):
        self.empty_cache()
        before, self.stream = self.stream, "capture"
        self.capturing, self.captures = graph.work, self.captures + 1
        self.underway.add(pool)
        try:
            yield
        except Exception as error:
            self.capturing = None
            if self.ends_pools:
                self.underway.remove(pool)
            raise RuntimeError("CUDA error: operation failed due to a previous error during capture") from error
        self.capturing = None
        self.underway.remove(pool)
        self.stream = before


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
