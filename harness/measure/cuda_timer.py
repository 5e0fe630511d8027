"""CUDA events around launches that walk through the sets: in CUDA graphs for short kernels, one by one for long ones."""

from __future__ import annotations

import contextlib
import math
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

from klab.harness.measure.power import PowerMeter
from klab.harness.measure.rotation import Rotation, segments
from klab.harness.measure.timer import Batch, Round, Shape, walk
from klab.harness.plan.trial import Policy
from klab.kernels.contract import Chip, Launch

# Launching costs 5-50 us of CPU time, which shows in kernels shorter than this unless a graph launches them.
GRAPH_BELOW_US = 100.0
GRAPH_LAUNCHES = 10
# Capturing a launch costs about 10-50 us; 1024 of them stay below 0.1 s.
MAX_SETS = 1024
# Events tell time in half microseconds: less than one tick is not zero.
CLOCK_TICK_US = 0.5
STEADY_SHARE = 0.02
WARMUP_LIMIT_S = 2.0
CLOCK_EVERY_S = 0.025
# Chunks kept queued in a sustained run, so that reading NVML (up to some ms) never lets the GPU run dry.
QUEUE_DEPTH = 3
SUSTAIN_CHUNK_US = 5e3


class CannotCapture(Exception):
    """The policy insists on a graph and the launch cannot be captured."""


class SpoiledByCapture(Exception):
    """A capture failed and left torch's allocator in a state that the next contestant would trip over: the worker must be replaced."""


class CudaTimer:
    """`cuda` is torch.cuda, or what stands in for it in a test."""

    device = "cuda"
    max_sets = MAX_SETS
    can_flush = True

    def __init__(self, chip: Chip, meter: PowerMeter, *, cuda: Any = None) -> None:
        if cuda is None:
            import torch

            cuda = torch.cuda
            allocator: Any = torch._C
        else:
            allocator = cuda
        self._cuda, self._allocator = cuda, allocator
        self._meter = meter
        # The driver's figure counts where the two differ: an H200 reports 60 MB, its data sheet says 50.
        self.l2_bytes = max(chip.l2_bytes, int(getattr(cuda.get_device_properties(0), "L2_cache_size", 0)))

    @property
    def memory_bytes(self) -> int:
        """Half of what is free: workspaces and graphs need the rest."""
        return int(self._cuda.mem_get_info()[0]) // 2

    def free_share(self) -> float:
        """Free over total, as the driver says."""
        free, total = self._cuda.mem_get_info()
        return float(free / total)

    def begin(self, policy: Policy) -> dict[str, Any]:
        """Nothing to set: clocks and power are never touched."""
        return {}

    def wait(self) -> None:
        """Synchronise."""
        self._cuda.synchronize()

    def batch(self, launch: Launch, rotation: Rotation, policy: Policy) -> Batch:
        """Flush, graph or events, by the cache's state, the policy and the launch's length."""
        step = walk(launch, rotation)
        for _ in range(3):  # workspaces are allocated and modules loaded by the first launches
            step()
        self.wait()
        estimate_us, host_us = self._estimate(step)
        details: dict[str, Any] = {"sets": len(rotation), "host_us": round(host_us, 1)}
        if rotation.l2_state == "flush":
            return _Flushed(self, launch, rotation, policy, host_us, details)
        # A launch that keeps the host busy for half its time may be bound by the host: then its length says nothing of the kernel.
        short = estimate_us < GRAPH_BELOW_US or host_us > 0.5 * estimate_us
        if policy.launch == "graph" or (policy.launch == "auto" and short):
            try:
                return _Graphs(self, launch, rotation, policy, estimate_us, details)
            except Exception as error:
                self.wait()  # raises when the device itself is broken, which is then the finding
                # The capture's end raises too, and says less than what was raised first.
                first = error.__context__ or error
                reason = str(first).splitlines()[0] if str(first) else type(first).__name__
                self._tidy_after(reason)
                if policy.launch == "graph":
                    raise CannotCapture(f"cannot be captured in a CUDA graph: {reason}") from error
                details["not_captured"] = reason
        return _Events(self, launch, rotation, policy, estimate_us, details)

    def _estimate(self, step: Callable[[], None], launches: int = 5) -> tuple[float, float]:
        """Microseconds per launch: on the device (its waiting for the host included), and on the host."""
        host_ns = 0

        def work() -> None:
            nonlocal host_ns
            began = time.perf_counter_ns()
            for _ in range(launches):
                step()
            host_ns = time.perf_counter_ns() - began

        device_us = self.elapsed_us(work)
        return device_us / launches, host_ns / 1e3 / launches

    def elapsed_us(self, work: Callable[[], Any], during: Callable[[], Any] = lambda: None) -> float:
        """Device time of what `work` enqueues; `during` runs on the host while the device works."""
        start, end = (self._cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        end.record()
        during()
        end.synchronize()
        return max(float(start.elapsed_time(end)) * 1e3, CLOCK_TICK_US)

    def timed(self, work: Callable[[], Any], launches: int) -> Round:
        """One round: microseconds per launch, and the meter's reading taken in its midst."""
        readings = []
        us = self.elapsed_us(work, lambda: readings.append(self._meter.read()))
        return Round(us / launches, readings[0])

    def warm_up(self, work: Callable[[], Any], policy: Policy) -> float:
        """Keep the device busy for policy.warmup_ms and until its clock is steady within 2%, 2 s at most; return the seconds spent."""
        started = read_at = time.perf_counter()
        clock = self._meter.read().sm_clock_mhz
        while True:
            work()
            self.wait()
            now = time.perf_counter()
            if now - read_at < CLOCK_EVERY_S and now - started < WARMUP_LIMIT_S:
                continue
            before, clock, read_at = clock, self._meter.read().sm_clock_mhz, now
            steady = before is None or clock is None or abs(clock - before) <= STEADY_SHARE * before
            if now - started >= WARMUP_LIMIT_S or (steady and now - started >= policy.warmup_ms / 1e3):
                return now - started

    def event(self) -> Any:
        """A recorded event, to be waited for."""
        event = self._cuda.Event()
        event.record()
        return event

    @contextlib.contextmanager
    def capture(self) -> Iterator[Any]:
        """A CUDA graph of what is enqueued in the block."""
        graph, pool = self._cuda.CUDAGraph(), self._cuda.graph_pool_handle()
        stream = self._cuda.current_stream()
        try:
            with self._cuda.graph(graph, pool=pool):
                yield graph
        except BaseException:
            self._give_up(stream, pool)
            raise

    def _give_up(self, stream: Any, pool: Any) -> None:
        """Undo what torch's own exit skips when the capture's end raises: the current stream, and (torch < 2.12) the pool's capture."""
        with contextlib.suppress(Exception):  # a broken device is found by the wait that follows
            self._cuda.set_stream(stream)
            device = self._cuda.current_device()
            # Raises where torch has ended it already; then the pool is no longer ours to release.
            self._allocator._cuda_endAllocateToPool(device, pool)
            self._allocator._cuda_releasePool(device, pool)

    def _tidy_after(self, reason: str) -> None:
        """Give the memory of a failed capture back. SpoiledByCapture when torch cannot any more."""
        try:
            self._cuda.empty_cache()
        except Exception as error:
            raise SpoiledByCapture(reason) from error


class _Queue:
    """Keeps QUEUE_DEPTH chunks queued; counts launches as their events pass."""

    def __init__(self, timer: CudaTimer) -> None:
        self._timer = timer
        self._pending: deque[tuple[Any, int]] = deque()
        self._ended = 0

    def advance(self, work: Callable[[], int]) -> int:
        """`work` enqueues one chunk and returns its launches."""
        while len(self._pending) < QUEUE_DEPTH:
            launches = work()
            self._pending.append((self._timer.event(), launches))
        event, launches = self._pending.popleft()
        event.synchronize()
        self._ended += launches
        return self._ended

    def settle(self) -> None:
        self._timer.wait()
        self._ended += sum(launches for _, launches in self._pending)
        self._pending.clear()


class _Events:
    """Launches one by one, for kernels longer than their launch."""

    def __init__(
        self, timer: CudaTimer, launch: Launch, rotation: Rotation, policy: Policy, estimate_us: float, details: dict[str, Any]
    ) -> None:
        self._timer, self._launch, self._rotation = timer, launch, rotation
        self._step = walk(launch, rotation)
        self._queue = _Queue(timer)
        burst = max(1, math.ceil(5e3 / estimate_us))
        details["warmup_s"] = round(timer.warm_up(lambda: self._go(burst), policy), 3)
        estimate_us = timer.elapsed_us(lambda: self._go(burst)) / burst
        self.shape = Shape(max(1, math.ceil(policy.round_ms * 1e3 / estimate_us)), "events", rotation.l2_state, estimate_us, details)

    def _go(self, launches: int) -> int:
        for _ in range(launches):
            self._step()
        return launches

    def round(self) -> Round:
        """The untimed launch in front keeps the device busy until the start event is queued, and warms a warm cache."""
        self._step()
        return self._timer.timed(lambda: self._go(self.shape.launches), self.shape.launches)

    def verify(self) -> None:
        for i in self._rotation.ends:
            self._launch(self._rotation.inputs[i], self._rotation.outputs[i])
        self._timer.wait()

    def advance(self) -> int:
        chunk = max(1, math.ceil(SUSTAIN_CHUNK_US / self.shape.estimate_us))
        return self._queue.advance(lambda: self._go(chunk))

    def settle(self) -> None:
        self._queue.settle()


class _Graphs:
    """Graphs of at least 10 launches that together walk through all sets, replayed one after another."""

    def __init__(
        self, timer: CudaTimer, launch: Launch, rotation: Rotation, policy: Policy, estimate_us: float, details: dict[str, Any]
    ) -> None:
        self._timer = timer
        self._queue = _Queue(timer)
        self._at = 0
        wanted = max(GRAPH_LAUNCHES, min(len(rotation), math.ceil(policy.round_ms * 1e3 / estimate_us)))
        walks = segments(len(rotation), wanted)
        self._lengths = [len(w) for w in walks]
        self._graphs = []
        for indices in walks:
            with timer.capture() as graph:
                for i in indices:
                    launch(rotation.inputs[i], rotation.outputs[i])
            self._graphs.append(graph)
        details |= {"graphs": len(walks), "launches_per_graph": max(self._lengths)}
        details["warmup_s"] = round(timer.warm_up(lambda: self._go(1), policy), 3)
        launches = 0

        def lap() -> None:
            nonlocal launches
            launches = self._go(len(self._graphs))

        # A graph's first replay uploads it; the second tells its length.
        lap()
        estimate_us = timer.elapsed_us(lap) / launches
        mean = sum(self._lengths) / len(self._lengths)
        self._replays = max(1, round(policy.round_ms * 1e3 / (estimate_us * mean)))
        self.shape = Shape(round(self._replays * mean), "graph", rotation.l2_state, estimate_us, details)

    def _go(self, replays: int) -> int:
        launches = 0
        for _ in range(replays):
            self._graphs[self._at].replay()
            launches += self._lengths[self._at]
            self._at = (self._at + 1) % len(self._graphs)
        return launches

    def round(self) -> Round:
        """An untimed replay in front, then the timed ones; graphs may differ in length by one launch, so launches are counted."""
        self._go(1)
        counted = sum(self._lengths[(self._at + i) % len(self._graphs)] for i in range(self._replays))
        return self._timer.timed(lambda: self._go(self._replays), counted)

    def verify(self) -> None:
        self._go(len(self._graphs))
        self._timer.wait()

    def advance(self) -> int:
        mean_us = self.shape.estimate_us * sum(self._lengths) / len(self._lengths)
        return self._queue.advance(lambda: self._go(max(1, math.ceil(SUSTAIN_CHUNK_US / mean_us))))

    def settle(self) -> None:
        self._queue.settle()


class _Flushed:
    """Each launch between two events of its own, behind an untimed write of twice the cache. Adds 1-2 us of event to each."""

    def __init__(
        self, timer: CudaTimer, launch: Launch, rotation: Rotation, policy: Policy, host_us: float, details: dict[str, Any]
    ) -> None:
        import torch

        self._timer, self._launch, self._rotation = timer, launch, rotation
        some = next(iter(rotation.outputs[0].values()))
        self._scratch = torch.empty(2 * timer.l2_bytes, dtype=torch.int8, device=some.device)
        self._fills = 1
        self._flush()
        # The device must still be flushing when the launch is queued, or it waits for the host within the timed span.
        fill_us = timer.elapsed_us(self._flush)
        self._fills = min(16, max(1, math.ceil(2 * host_us / fill_us)))
        details["warmup_s"] = round(timer.warm_up(lambda: self._go(2), policy), 3)
        estimate_us = self._go(3)
        self.shape = Shape(max(3, math.ceil(policy.round_ms * 1e3 / estimate_us)), "events", "flush", estimate_us, details)

    def _flush(self) -> None:
        for _ in range(self._fills):
            self._scratch.fill_(1)

    def _once(self) -> None:
        self._launch(self._rotation.inputs[0], self._rotation.outputs[0])

    def _go(self, launches: int) -> float:
        """Mean microseconds of so many launches, each flushed before."""
        total = 0.0
        for _ in range(launches):
            self._flush()
            total += self._timer.elapsed_us(self._once)
        return total / launches

    def round(self) -> Round:
        self._flush()
        first = self._timer.timed(self._once, 1)
        rest = self._go(self.shape.launches - 1)
        return Round((first.us + rest * (self.shape.launches - 1)) / self.shape.launches, first.reading)

    def verify(self) -> None:
        self._once()
        self._timer.wait()

    def advance(self) -> int:
        raise NotImplementedError("the energy of flushing cannot be told from the launch's")

    def settle(self) -> None:
        self._timer.wait()
