"""`python -m klab.harness.watch.node_load JOB`: one process that loads one device (or the links between several) and says what it saw.

One JSON object per line on the standard output it was started with. The work is that of the lab's anchors, on random data.
first: nearly all of a GPU's memory is written and read, then as probe. probe: rounds of the matmul and of the copy in turn. sustain: the
matmul without a gap until the time is up, with clocks, temperatures and power every second, and every output compared with the first.
links: copies between host and GPUs and from GPU to GPU.
"""

from __future__ import annotations

import json
import math
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from klab.harness.measure import anchor, calibrate_steps, environment, nvml
from klab.harness.measure.faults import one_line
from klab.harness.measure.power import NullMeter, PowerMeter
from klab.harness.measure.timer import CpuTimer
from klab.harness.plan.trial import Policy
from klab.harness.store.result import Status
from klab.harness.watch import node_facts
from klab.kernels.contract import Chip, Json, Tensors

ROUND_MS = {"cuda": 80.0, "cpu": 60.0}
# A GPU's clock falls within 5 ms of load and its temperature within a second or two (flashinfer issue 2899).
PROBE_WARMUP_S = {"cuda": 2.0, "cpu": 0.3}
SAMPLE_S = 1.0
# Rows of the product that are compared with float64: enough to see a wrong kernel, little enough for a CPU (16 x 8192 x 4096 = 0.5 GFLOP).
REFERENCE_ROWS = 16
TOLERANCE = {"bfloat16": 1e-2, "float32": 1e-4}
# Two runs of one product on a CPU may split it differently over the threads: equal to rounding, not to the bit.
CPU_REPEAT_TOLERANCE = 1e-5
# Of what is free; the comparison needs some itself. Bits alternately set, and their complement.
MEMORY_SHARE, MEMORY_BLOCK_BYTES = 0.9, 4 << 30
MEMORY_PATTERNS = (0x5555555555555555, -0x5555555555555556)
LINK_BYTES = 256 << 20
LINK_ROUNDS = 10

Tell = Callable[[dict[str, Json]], None]


class Bench:
    """The device of this process, with its timer and its sensors."""

    def __init__(self, chip: Chip) -> None:
        import torch

        self.chip, self.torch = chip, torch
        self.kind = "cuda" if chip.kind == "cuda" else "cpu"
        self.library: Any = None
        self.handle: Any = None
        self.trouble = ""
        self.meter: PowerMeter = NullMeter("no power sensor on this CPU")
        if self.kind == "cuda":
            from klab.harness.measure.cuda_timer import CudaTimer

            properties = torch.cuda.get_device_properties(0)
            self.meter = nvml.open_meter(properties)
            try:
                self.library = nvml.load()
                self.handle = nvml.handle_of(self.library, **nvml.torch_address(properties))
            except Exception as error:  # noqa: BLE001  ImportError, NVMLError or a broken driver library: no sensors, and that is said
                self.library, self.trouble = None, one_line(error)
            self.timer: Any = CudaTimer(chip, self.meter)
        else:
            self.timer = CpuTimer(chip, self.meter)
        self.policy = Policy(round_ms=ROUND_MS[self.kind], warmup_ms=anchor.WARMUP_MS)
        self.conditions = self.timer.begin(self.policy)

    def state(self) -> dict[str, Json]:
        """Clocks, temperatures, power and the PCIe link, now; of a CPU its clock and how often it throttled."""
        if self.kind == "cpu":
            return cpu_state(Path("/sys/devices/system/cpu"))
        if self.library is None:
            return {"why": {"sensors": self.trouble}}
        return node_facts.live(self.library, self.handle)

    def describe(self) -> dict[str, Json]:
        """What a result is comparable by: device, versions, epoch."""
        facts: dict[str, Json] = {**environment.software(), **environment.host()}
        if self.kind == "cuda":
            facts |= environment.cuda_device(self.torch.cuda.get_device_properties(0), self.torch.version.cuda)
            facts["sm_count"] = int(self.torch.cuda.get_device_properties(0).multi_processor_count)
        else:
            facts |= {"kind": "cpu", "device": facts["cpu_model"], "uuid": ""} | self.conditions
        return facts | {"epoch": environment.epoch(facts)}


def cpu_state(folder: Path) -> dict[str, Json]:
    """{"sm_clock_mhz": mean over the cores, "throttles": events since boot, all packages}; None where the system does not say."""
    clocks: list[int] = []
    throttles: list[int] = []
    for path in folder.glob("cpu[0-9]*"):
        for found, name in ((clocks, "cpufreq/scaling_cur_freq"), (throttles, "thermal_throttle/package_throttle_count")):
            try:
                found.append(int((path / name).read_text()))
            except (OSError, ValueError):
                continue
    return {"sm_clock_mhz": sum(clocks) / len(clocks) / 1e3 if clocks else None, "throttles": max(throttles) if throttles else None}


def probe(bench: Bench, seconds: float, tell: Tell) -> None:
    """After a warm-up: rounds of the matmul and the copy in turn, and of a launch that does next to nothing."""
    warm = anchor.make("matmul", bench.timer, bench.policy)
    started = time.perf_counter()
    while time.perf_counter() - started < min(PROBE_WARMUP_S[bench.kind], seconds):
        warm.round()
    for step in ("anchors", "launch"):
        answer = calibrate_steps.run(bench.chip, bench.timer, bench.meter, step)
        if answer["status"] != Status.OK.value:
            raise RuntimeError(f"{step}: {answer.get('reason') or answer['status']}")
        for name, rounds in answer["rounds"].items():
            done = anchor.work(name, bench.kind) if step == "anchors" else anchor.Work(name, "launch", 0.0, 0.0)
            tell({"work": name, "what": done.what, "flops": done.flops, "bytes": done.bytes_moved, **rounds})


def memory(bench: Bench, seconds: float, tell: Tell) -> None:
    """Write patterns to nearly all free memory of a GPU and read them back: stuck bits, and memory that answers at two addresses."""
    torch = bench.torch
    free, total = torch.cuda.mem_get_info()
    words = int(free * MEMORY_SHARE) // 8
    blocks = []
    try:
        while words > 0:
            count = min(words, MEMORY_BLOCK_BYTES // 8)
            blocks.append(torch.empty(count, dtype=torch.int64, device="cuda"))
            words -= count
    except torch.cuda.OutOfMemoryError:  # fragmentation, or a neighbour: what was had is tested
        torch.cuda.empty_cache()
    wrong = 0
    for turn in range(len(MEMORY_PATTERNS) + 1):
        for write in (True, False):
            for number, block in enumerate(blocks):
                # In the last turn every word holds a number of its own.
                first = number * (MEMORY_BLOCK_BYTES // 8)
                if turn < len(MEMORY_PATTERNS):
                    wrong += _pattern(block, MEMORY_PATTERNS[turn], write)
                else:
                    wrong += _numbers(torch, block, first, write)
    tested = 8 * sum(block.numel() for block in blocks)
    tell({"memory_bytes_tested": tested, "memory_bytes_total": int(total), "memory_words_wrong": wrong})


def _pattern(block: Any, pattern: int, write: bool) -> int:
    if write:
        block.fill_(pattern)
        return 0
    return int((block != pattern).sum())


def _numbers(torch: Any, block: Any, first: int, write: bool) -> int:
    """In pieces, as the numbers to compare with need memory of their own."""
    wrong, piece = 0, MEMORY_BLOCK_BYTES // 64
    for start in range(0, block.numel(), piece):
        part = block[start : start + piece]
        want = torch.arange(first + start, first + start + part.numel(), dtype=torch.int64, device=block.device)
        if write:
            part.copy_(want)
        else:
            wrong += int((part != want).sum())
    return wrong


def first(bench: Bench, seconds: float, tell: Tell) -> None:
    """The first process on a device: its memory (of a GPU), then a probe."""
    if bench.kind == "cuda":
        memory(bench, seconds, tell)
        bench.torch.cuda.empty_cache()
    probe(bench, seconds, tell)


class Compared:
    """Whether a product still is what it was: the same inputs must give the same outputs, to the bit on a GPU."""

    def __init__(self, bench: Bench, inputs: Tensors, out: Any) -> None:
        self._bench, self._inputs, self._out = bench, inputs, out
        self.checked = self.wrong = 0
        self._first: Any = None

    def first(self) -> str:
        """Keep the output that is there now as the right one; why it is not, or "". It is compared with float64 on some rows."""
        torch = self._bench.torch
        self._first = self._out.clone()
        rows = torch.linspace(0, self._out.shape[0] - 1, REFERENCE_ROWS).long()
        want = self._inputs["x"][rows.to(self._out.device)].double().cpu() @ self._inputs["w"].double().cpu().T
        got = self._out[rows.to(self._out.device)].double().cpu()
        error = float((got - want).norm() / want.norm())
        limit = TOLERANCE[str(self._out.dtype).removeprefix("torch.")]
        return "" if error <= limit else f"the product is wrong by {error:.2g} of its norm ({limit:g} is allowed)"

    def again(self) -> None:
        """Compare what the last launch wrote, then poison it: a launch that writes nothing must not pass for one that is right."""
        torch = self._bench.torch
        self.checked += 1
        if self._bench.kind == "cuda":
            same = bool(torch.equal(self._out, self._first))
        else:
            error = float((self._out - self._first).norm() / self._first.norm())
            same = math.isfinite(error) and error <= CPU_REPEAT_TOLERANCE
        self.wrong += not same
        self._out.fill_(float("nan"))


def sustain(bench: Bench, seconds: float, tell: Tell) -> None:
    """The matmul without a gap for `seconds`; a line about every second, and a last one with what was compared."""
    launch, rotation = anchor.launch_of("matmul", bench.timer.device)
    batch = bench.timer.batch(launch, rotation, bench.policy)
    flops = anchor.work("matmul", bench.kind).flops
    batch.verify()
    compared = Compared(bench, rotation.inputs[0], rotation.outputs[0]["out"])
    tell({"wrong_at_first": compared.first()})
    started = time.perf_counter()
    ended = batch.advance()
    while True:
        began, count = time.perf_counter(), ended
        states: list[dict[str, Json]] = []
        # In a thread: NVML may take longer than the work that is queued lasts.
        reader = threading.Thread(target=lambda states=states: states.append(bench.state()), daemon=True)
        reader.start()
        now = began
        while now - began < SAMPLE_S:
            ended = batch.advance()
            now = time.perf_counter()
        reader.join(timeout=10.0)
        rate = (ended - count) * flops / (now - began) / 1e12
        line = {
            "at": round(now - started, 2),
            "tflops": rate,
            "differ": compared.wrong,
        }  # so far: the process may not live to the last line
        tell(line | (states[0] if states else {"why": {"sensors": "no answer in 10 s"}}))
        batch.settle()
        compared.again()
        if now - started >= seconds:
            break
        ended = batch.advance()
    tell({"checked": compared.checked, "wrong": compared.wrong})


def links(bench: Bench, seconds: float, tell: Tell) -> None:
    """Host to GPU, GPU to host, and every ordered pair of GPUs, one after another. All GPUs are visible to this process."""
    torch = bench.torch
    count = torch.cuda.device_count()
    host = torch.empty(LINK_BYTES, dtype=torch.uint8, pin_memory=True)
    host.random_()
    give_up = time.perf_counter() + seconds
    for index in range(count):
        device = torch.empty(LINK_BYTES, dtype=torch.uint8, device=f"cuda:{index}")
        tell({"link": "host", "from": -1, "to": index, "gb_per_s": _copies(torch, index, device, host)})
        tell({"link": "host", "from": index, "to": -1, "gb_per_s": _copies(torch, index, host, device)})
    buffers = [torch.empty(LINK_BYTES, dtype=torch.uint8, device=f"cuda:{i}") for i in range(count)] if count > 1 else []
    for step in range(1, count):
        for index in range(count):
            other = (index + step) % count
            line = {"link": "peer", "from": index, "to": other, "direct": bool(torch.cuda.can_device_access_peer(index, other))}
            if time.perf_counter() > give_up:
                tell({**line, "gb_per_s": [], "reason": "the time was up"})
                continue
            tell({**line, "gb_per_s": _copies(torch, index, buffers[other], buffers[index])})


def _copies(torch: Any, index: int, target: Any, source: Any) -> list[float]:
    """Gigabytes per second of each of some copies, timed on GPU `index`; two before that are not counted."""
    found = []
    with torch.cuda.device(index):
        for turn in range(LINK_ROUNDS + 2):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            target.copy_(source, non_blocking=True)
            end.record()
            end.synchronize()
            if turn >= 2:
                found.append(LINK_BYTES / (start.elapsed_time(end) * 1e-3) / 1e9)
    return found


def _end_with_parent() -> None:
    """A launch that hangs does not see that nobody listens any more: without this it would keep the GPU."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1.0)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def work(name: str, chip: Chip, seconds: float, tell: Tell) -> None:
    """Say where this is, then do the work of that name. Raises what the device raises."""
    bench = Bench(chip)
    tell({"describe": bench.describe(), "idle": bench.state()})
    WORKS[name](bench, seconds, tell)


WORKS: dict[str, Callable[[Bench, float, Tell], None]] = {"first": first, "probe": probe, "sustain": sustain, "links": links}


def main() -> None:
    """Do the job of the first argument. What goes wrong is a line too: {"error": ...}."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    _end_with_parent()

    def tell(line: dict[str, Json]) -> None:
        answers.write(json.dumps(line) + "\n")
        answers.flush()

    job = json.loads(sys.argv[1])
    try:
        work(job["work"], Chip.from_json(job["chip"]), float(job["seconds"]), tell)
        tell({"done": True})
    except BaseException as error:  # noqa: BLE001  a GPU that falls off the bus raises anything; the parent grades it
        tell({"error": one_line(error)})
    answers.flush()
    sys.stderr.flush()
    os._exit(0)  # the atexit handlers of a broken CUDA context hang


if __name__ == "__main__":
    main()
