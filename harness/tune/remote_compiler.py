"""Compile on the nodes of a cluster that have no GPU: the farm's threads ask compilers that are elsewhere."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from klab.harness.fleet.cluster import Place, screeners
from klab.harness.fleet.parcel import klab_digest, pack_folders, trial_of, unpack_folders
from klab.harness.fleet.ray_fleet import RayFleet
from klab.harness.measure import environment
from klab.harness.plan.trial import Trial
from klab.harness.tune.farm_compiler import START_LIMIT_S, Compiler, FarmClosed
from klab.kernels.contract import Chip, Json

# The actors are light, but a busy cluster may have no CPU free: then those that came up by this time compile, or this machine does.
COME_UP_S = 20.0
# Beyond a candidate's own limit: the start of a compiling process, twice, and the way there and back.
BEYOND_S = 2 * START_LIMIT_S + 30.0


class CompilerHost:
    """The actor: one compiling process of a farm, on another machine. Answers in JSON text."""

    def __init__(self, setup: str) -> None:
        told = json.loads(setup)
        self._kept = ExitStack()
        dirs = unpack_folders(told["folders"], self._kept)
        self._compiler = Compiler(Chip.from_json(told["chip"]), [str(d) for d in dirs], told["memory_bytes"])

    def hello(self) -> str:
        """Which klab and which compilers are here."""
        return _identity()

    def ask(self, trial: str, timeout_s: float) -> str:
        """farm_compiler.Compiler.ask."""
        return json.dumps(self._compiler.ask(trial_of(json.loads(trial)), timeout_s))


class RemoteCompiler:
    """As farm_compiler.Compiler, of an actor. When it is lost, this machine compiles in its place."""

    def __init__(self, actor: Any, local: Callable[[], Compiler]) -> None:
        self._actor, self._make_local = actor, local
        self._local: Compiler | None = None
        self._closed = False
        self._lock = threading.Lock()

    def ask(self, trial: Trial, timeout_s: float) -> dict[str, Json]:
        """The answer for one candidate. FarmClosed when the farm was closed meanwhile."""
        import ray

        actor = self._actor
        if actor is not None:
            try:
                text = ray.get(actor.ask.remote(json.dumps(trial.to_json()), timeout_s), timeout=timeout_s + BEYOND_S)
                answer: dict[str, Json] = json.loads(text)
            except ray.exceptions.RayError:
                if self._closed:
                    raise FarmClosed from None
                self._leave()
            else:
                return answer
        with self._lock:
            if self._closed:
                raise FarmClosed
            self._local = self._local or self._make_local()
        return self._local.ask(trial, timeout_s)

    def kill(self) -> None:
        """At once and for good, from any thread."""
        with self._lock:
            self._closed = True
        self._leave()
        if self._local is not None:
            self._local.kill()

    def close(self) -> None:
        """Kill and reap."""
        self.kill()
        if self._local is not None:
            self._local.close()

    def _leave(self) -> None:
        import ray

        actor, self._actor = self._actor, None
        if actor is not None and ray.is_initialized():
            with contextlib.suppress(ray.exceptions.RayError, ValueError):
                ray.kill(actor, no_restart=True)


@contextmanager
def remote_compilers(
    fleet: RayFleet, chip: Chip, kernel_dirs: Sequence[Path | str], memory_bytes: int, *, deadline: float | None = None
) -> Iterator[list[Callable[[], RemoteCompiler]]]:
    """Makers of compilers for the farm, one per CPU of the nodes without a GPU that is free; none where there is no such node.

    They end with the block. What did not come up is in the fleet's notes.
    """
    places = screeners(fleet.cluster.nodes(), memory_bytes, busy=fleet.nodes_of("cpu"))
    actors = _started(fleet, places, chip, kernel_dirs, memory_bytes, deadline)
    made: list[RemoteCompiler] = []

    def maker(actor: Any) -> Callable[[], RemoteCompiler]:
        def make() -> RemoteCompiler:
            compiler = RemoteCompiler(actor, lambda: Compiler(chip, [str(Path(d).resolve()) for d in kernel_dirs], memory_bytes))
            made.append(compiler)
            return compiler

        return make

    try:
        yield [maker(actor) for actor in actors]
    finally:
        for compiler in made:
            compiler.close()
        _end(actors)


def _started(
    fleet: RayFleet, places: Sequence[Place], chip: Chip, kernel_dirs: Sequence[Path | str], memory_bytes: int, deadline: float | None
) -> list[Any]:
    if not places:
        return []
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    setup = json.dumps({"chip": dataclasses.asdict(chip), "folders": pack_folders(kernel_dirs), "memory_bytes": memory_bytes})
    remote = ray.remote(CompilerHost)
    waiting: dict[Any, tuple[Place, Any]] = {}
    for place in places:
        pinned = NodeAffinitySchedulingStrategy(node_id=place.node.id, soft=False)
        actor = remote.options(max_restarts=0, scheduling_strategy=pinned, **place.options).remote(setup)
        waiting[actor.hello.remote()] = (place, actor)
    until = time.monotonic() + COME_UP_S
    ready, late = ray.wait(list(waiting), num_returns=len(waiting), timeout=max(0.1, min(until, deadline or until) - time.monotonic()))
    good, other = [], [waiting[reference][1] for reference in late]
    refused: Mapping[str, str] = {waiting[reference][0].node.address: "no CPU was free to compile on" for reference in late}
    for reference in ready:
        place, actor = waiting[reference]
        try:
            same = ray.get(reference) == _identity()
            why = "has another klab or another Triton, and compiles nothing"
        except ray.exceptions.RayError as error:
            same, why = False, f"compiles nothing: {str(error).strip().splitlines()[0][:200]}"
        if same:
            good.append(actor)
        else:
            other.append(actor)
            refused = {**refused, place.node.address: why}
    for address, why in refused.items():
        fleet.note(f"{address}: {why}")
    _end(other)
    return good


def _identity() -> str:
    """What must be equal for an answer to be one for this machine: it is kept in this machine's cache."""
    return json.dumps(
        [
            klab_digest(),
            *(environment.version(name) for name in ("triton", "torch", "nvidia-cuda-nvrtc")),
            environment.version(*environment.CUPY),
        ]
    )


def _end(actors: Sequence[Any]) -> None:
    import ray

    for actor in actors:
        if ray.is_initialized():
            with contextlib.suppress(ray.exceptions.RayError, ValueError):
                ray.kill(actor, no_restart=True)
