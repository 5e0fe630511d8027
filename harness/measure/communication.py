"""Collectives between the GPUs of this machine (or between CPU processes), timed by torch.distributed: one process per rank.

`python -m klab.harness.measure.communication` is one rank; `measure` starts them and reads what the first one writes.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from klab.harness.measure.client import scrubbed
from klab.harness.measure.stats import spread
from klab.harness.plan.communication import Collective, Point
from klab.kernels.errors import CannotMeasure

if TYPE_CHECKING:
    import torch

ROUNDS = 15
ROUND_S = 0.002
START_LIMIT_S = 120.0
ORPHAN_CHECK_S = 0.5
# What the libraries of a collective are configured by; a rank inherits it besides what a worker does.
NETWORK = ("NCCL_", "TORCH_NCCL_", "GLOO_", "UCX_", "FI_")


def measure(collectives: Sequence[Collective], *, backend: str, limit_s: float = 120.0, devices: Sequence[int] = ()) -> list[Point]:
    """Check and time each collective; all are over the same number of ranks. CannotMeasure with the first error of a rank, or when they
    take longer than `limit_s` beyond their start. With NCCL `devices` are the ranks' GPUs by CUDA's number (default: the first ones).
    """
    (gpus,) = {one.gpus for one in collectives}
    with tempfile.TemporaryDirectory(prefix="klab-ranks-") as folder:
        job = {"collectives": [vars(one) for one in collectives], "backend": backend, "folder": folder, "gpus": gpus,
               "devices": list(devices or range(gpus)), "parent": os.getpid()}  # fmt: skip
        ranks: list[subprocess.Popen[bytes]] = []
        try:
            for rank in range(gpus):
                ranks.append(_start(job, rank))
            _wait(ranks, START_LIMIT_S + limit_s)
        finally:
            _end(ranks)
        written = Path(folder, "points.json")
        if any(rank.returncode for rank in ranks) or not written.exists():
            texts = (Path(folder, f"{rank}.log").read_text(errors="replace") for rank in range(gpus))
            said = [line for text in texts for line in text.splitlines() if "Error" in line]
            raise CannotMeasure(f"a rank of {gpus} ({backend}) failed: {said[-1].strip() if said else 'it said nothing'}")
        return [Point(**point) for point in json.loads(written.read_text())]


def _start(job: dict[str, Any], rank: int) -> subprocess.Popen[bytes]:
    # Gloo's ranks share the cores; one thread each keeps them from fighting.
    passed = {name: value for name, value in os.environ.items() if name.startswith(NETWORK)}
    environment = scrubbed(os.environ) | {"GLOO_SOCKET_IFNAME": "lo"} | passed | {"OMP_NUM_THREADS": "1"}
    with Path(job["folder"], f"{rank}.log").open("wb") as log:
        words = [sys.executable, "-m", "klab.harness.measure.communication", json.dumps(job | {"rank": rank})]
        return subprocess.Popen(words, stdout=log, stderr=log, stdin=subprocess.DEVNULL, env=environment)


def _wait(ranks: Sequence[subprocess.Popen[bytes]], limit_s: float) -> None:
    """Until all have ended, or one has failed (the others then wait for it in vain)."""
    deadline = time.monotonic() + limit_s
    while any(rank.poll() is None for rank in ranks):
        if any(rank.returncode for rank in ranks):
            return
        if time.monotonic() > deadline:
            raise CannotMeasure(f"the ranks did not end within {limit_s:.0f} s")
        time.sleep(0.05)


def _end(ranks: Sequence[subprocess.Popen[bytes]]) -> None:
    """Kill and reap all of them: their devices are free when this returns."""
    for rank in ranks:
        rank.kill()
    for rank in ranks:
        with contextlib.suppress(subprocess.TimeoutExpired):
            rank.wait(timeout=10)  # a process stuck in the driver cannot be reaped


def _end_with(parent: int) -> None:
    """End this rank when its parent has, however that went: it would wait for the other ranks and keep its device."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(ORPHAN_CHECK_S)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


class Rank:
    """One process of the group."""

    def __init__(self, job: dict[str, Any]) -> None:
        import torch
        import torch.distributed as dist

        self.rank, self.gpus, self.dist = job["rank"], job["gpus"], dist
        self.device = f"cuda:{job['devices'][self.rank]}" if job["backend"] == "nccl" else "cpu"
        if self.device != "cpu":
            torch.cuda.set_device(self.device)
        store = f"file://{job['folder']}/store"
        dist.init_process_group(job["backend"], init_method=store, rank=self.rank, world_size=self.gpus)

    def launch(self, one: Collective) -> tuple[Callable[[], Any], Callable[[], bool]]:
        """A function that runs the collective once, and one that says whether its result is right."""
        import torch

        dist, n = self.dist, self.gpus
        # Whole pieces for every rank; float32, because every backend adds it.
        piece = max(1, one.message_bytes // 4 // n)
        whole = torch.full((piece * n,), float(self.rank + 1), device=self.device)
        part = torch.full((piece,), float(self.rank + 1), device=self.device)
        total = n * (n + 1) / 2
        if one.kind == "all_reduce":
            source = whole.clone()

            def reduce() -> None:
                dist.all_reduce(whole)

            def reduced() -> bool:
                whole.copy_(source)
                reduce()
                return bool((whole == total).all())

            return reduce, reduced
        if one.kind == "all_gather":
            want = torch.arange(1.0, n + 1, device=self.device).repeat_interleave(piece)
            return lambda: dist.all_gather_into_tensor(whole, part), lambda: bool((whole == want).all())
        if one.kind == "reduce_scatter":
            return lambda: dist.reduce_scatter_tensor(part, whole), lambda: bool((part == total).all())
        out = torch.empty_like(whole)
        want = torch.arange(1.0, n + 1, device=self.device).repeat_interleave(piece)
        return lambda: dist.all_to_all_single(out, whole), lambda: bool((out == want).all())

    def time(self, one: Collective) -> dict[str, Any]:
        """Rounds of enough launches, each as long as the slowest rank needs."""
        import torch

        launch, right = self.launch(one)
        launch()
        if not right():
            raise RuntimeError(f"{one.kind} over {self.gpus} ranks gave a wrong result")
        guess = max(self._seconds(launch, 3) / 3, 1e-6)
        launches = torch.tensor([max(1.0, ROUND_S / guess)], device=self.device)
        self.dist.all_reduce(launches, op=self.dist.ReduceOp.MAX)
        count = int(launches.item())
        samples = [self._seconds(launch, count) / count * 1e6 for _ in range(ROUNDS)]
        found = spread(samples)
        return vars(one) | {"median_us": found.median, "ci_low_us": found.low, "ci_high_us": found.high, "rounds": ROUNDS}

    def _seconds(self, launch: Callable[[], Any], count: int) -> float:
        """Of the slowest rank, from a common start."""
        import torch

        self.dist.barrier()
        if self.device == "cpu":
            started = time.perf_counter()
            for _ in range(count):
                launch()
            mine = time.perf_counter() - started
        else:
            cuda: Any = torch.cuda
            begin, end = cuda.Event(enable_timing=True), cuda.Event(enable_timing=True)
            launch()
            begin.record()
            for _ in range(count):
                launch()
            end.record()
            end.synchronize()
            mine = begin.elapsed_time(end) / 1e3
        slowest: torch.Tensor = torch.tensor([mine], device=self.device)
        self.dist.all_reduce(slowest, op=self.dist.ReduceOp.MAX)
        return float(slowest.item())


def main(text: str) -> None:
    """One rank."""
    job = json.loads(text)
    _end_with(job["parent"])
    rank = Rank(job)
    points = [rank.time(Collective(**one)) for one in job["collectives"]]
    if rank.rank == 0:
        Path(job["folder"], "points.json").write_text(json.dumps(points))
    rank.dist.barrier()
    rank.dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
