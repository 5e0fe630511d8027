"""A whole decoder layer in one CUDA graph, beside the sum of its parts: does what the parts say hold for the whole?"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from klab.harness.measure.check import Check, compare, distance, poison
from klab.harness.measure.rotation import CACHE_MULTIPLE, Rotation, plan, set_bytes
from klab.harness.measure.stats import Spread, paired_ratio, spread
from klab.harness.measure.timer import Batch, Timer
from klab.harness.plan.layer import Glue, Part, Parts
from klab.harness.plan.trial import Policy
from klab.kernels.contract import Chip, Config, Kernel, Launch, Problem, Tensors

if TYPE_CHECKING:
    import torch

# Roundings of the parts are independent and add in quadrature; what multiplies two of them (SwiGLU, gates) doubles that.
TOLERANCE_FACTOR = 2.0


@dataclass(frozen=True)
class Chosen:
    """What runs a part, and why: "chosen" from results, "library" or "own" default."""

    kernel: Kernel
    config: Config
    origin: str


@dataclass(frozen=True)
class PartTime:
    """Microseconds of one part alone, cold, as every Result is measured. `label` is the problem's, or "glue"."""

    role: str
    label: str
    kernel: str
    origin: str
    time: Spread


@dataclass(frozen=True)
class LayerTime:
    """What was measured. `ratio` is (median, low, high) of whole / sum of all parts, lap by lap; `bare_ratio` leaves the glue out of it.

    error: ||out - ref|| / ||ref|| of the layer's output against the parts' references composed; the worst of `out` and `residual`.
    """

    parts: tuple[PartTime, ...]
    whole: Spread
    ratio: tuple[float, float, float]
    bare_ratio: tuple[float, float, float]
    error: float
    tolerance: float
    laps: int
    sets: int
    launch_mode: str
    l2_state: str


class LayerSet:
    """One copy of the layer: weights, cache, and every tensor between the parts. `steps` launch it in order."""

    def __init__(self, parts: Parts, launches: Mapping[str, Launch], *, seed: int, device: str) -> None:
        self.own: dict[str, Tensors] = {}
        for i, part in enumerate(parts):
            if isinstance(part, Part):
                self.own[part.role] = _own_inputs(part.problem, seed=seed + 100 * i, device=device)
        first = next(part for part in parts if isinstance(part, Part))
        self.flow: dict[str, Tensors] = {"hidden": {name: self.own[first.role][name] for name in ("x", "residual")}}
        self.steps: dict[str, Callable[[], None]] = {}
        for part in parts:
            self.steps[part.role] = self._part(part, launches[part.role], device) if isinstance(part, Part) else self._glue(part)

    def _part(self, part: Part, launch: Launch, device: str) -> Callable[[], None]:
        fed = part.feed(self.flow)
        _require_views(part.role, fed, self.flow)
        inputs = self.own[part.role] | fed
        outputs = self.flow[part.role] = part.problem.outputs(device=device)
        return lambda: launch(inputs, outputs)

    def _glue(self, glue: Glue) -> Callable[[], None]:
        own = self.own.get(glue.of, {})
        outputs = self.flow[glue.role] = dict(glue.make(self.flow, own))

        def run() -> None:
            for name, made in glue.make(self.flow, own).items():
                if made.data_ptr() != outputs[name].data_ptr():
                    outputs[name].copy_(made)

        return run

    def run(self) -> None:
        """Launch the whole layer once."""
        for step in self.steps.values():
            step()


def _own_inputs(problem: Problem, *, seed: int, device: str) -> Tensors:
    """The problem's inputs, with a token's cache row in the place of the token, so that what follows reads them in order."""
    import torch

    inputs = problem.inputs(seed=seed, device=device)
    if "slot_mapping" in inputs:
        inputs["slot_mapping"] = torch.arange(len(inputs["slot_mapping"]), dtype=torch.int32, device=device)
    return inputs


def _require_views(role: str, fed: Mapping[str, torch.Tensor], flow: Mapping[str, Tensors]) -> None:
    """A copy made here would be stale in every launch: what is fed must be memory that an earlier part writes."""
    known = {tensor.untyped_storage().data_ptr() for tensors in flow.values() for tensor in tensors.values()}
    for name, tensor in fed.items():
        if tensor.untyped_storage().data_ptr() not in known:
            raise AssertionError(f"{role}: {name} is a copy of what an earlier part wrote")


def layer_check(parts: Parts, found: LayerSet, *, reference_device: str = "cpu") -> Check:
    """Run once into poisoned tensors; judge every part on what it read, and the whole against the parts' references, composed.

    The first finds a wrong launch however little it adds to the output (attention over 8k keys is a hundredth of the residual); the second
    finds what the parts' own references cannot: a stale tensor, a launch out of order. The choice of an expert is what the composed
    reference goes on with: another one that rounding allows would lead elsewhere.
    """
    for part in parts:
        if isinstance(part, Part):
            poison(found.flow[part.role])
    found.run()
    flow: dict[str, Tensors] = {"hidden": _moved(found.flow["hidden"], reference_device)}
    squares = 0.0
    for part in parts:
        if isinstance(part, Glue):
            own = {name: tensor.to(reference_device, copy=True) for name, tensor in found.own.get(part.of, {}).items()}
            flow[part.role] = dict(part.make(flow, {n: t.float() if t.is_floating_point() else t for n, t in own.items()}))
            continue
        problem, own = part.problem, _moved(found.own[part.role], reference_device)
        seen = own | {name: tensor.to(reference_device) for name, tensor in part.feed(found.flow).items()}
        outputs = _moved(found.flow[part.role], reference_device)
        judged = compare(problem, outputs, problem.reference(seen))
        if not judged.passed:
            return Check(judged.error, judged.tolerance, f"{part.role}: {judged.reason}")
        if any(not tensor.is_floating_point() for tensor in outputs.values()):
            flow[part.role] = outputs
            continue
        squares += problem.tolerance() ** 2
        flow[part.role] = problem.reference(own | part.feed(flow))
    tolerance = TOLERANCE_FACTOR * math.sqrt(squares)
    last = parts[-1].role
    ends = {"out": found.flow[last]["out"], "residual": found.flow["post_norm"]["residual"]}
    error = distance(ends, {"out": flow[last]["out"], "residual": flow["post_norm"]["residual"]})
    reason = "" if error <= tolerance else f"the layer's output is off by {error:.2e}, tolerance {tolerance:.2e}"
    return Check(error, tolerance, reason)


def _moved(tensors: Mapping[str, torch.Tensor], device: str) -> Tensors:
    return {name: tensor.to(device) for name, tensor in tensors.items()}


def measure_layer(
    parts: Parts,
    chosen: Mapping[str, Chosen],
    chip: Chip,
    timer: Timer,
    policy: Policy,
    *,
    laps: int = 15,
    seed: int = 0,
    tell: Callable[[str], None] = lambda _: None,
) -> LayerTime:
    """Check the layer, then time it and each of its parts in turn, lap after lap. CheckFailed when the numbers are wrong.

    The copies of the layer follow one another as layers of a model do, and together exceed the last-level cache several times; the parts
    are measured cold, each on its own, as in every Result.
    """
    timer.begin(policy)
    launches = {role: one.kernel.build(_problem(parts, role), one.config, chip) for role, one in chosen.items()}
    first = LayerSet(parts, launches, seed=seed, device=timer.device)
    tell("checking the layer against the composed references")
    checked = layer_check(parts, first, reference_device="cpu" if timer.device == "cpu" else timer.device)
    if not checked.passed:
        raise CheckFailed(checked.reason)
    others = range(1, _copies(first, timer))
    sets = [first, *(LayerSet(parts, launches, seed=seed + 10_000 * i, device=timer.device) for i in others)]
    cold = "cold" if len(sets) * _bytes(first) > CACHE_MULTIPLE * timer.l2_bytes else "unproven"
    rotation, launch = _walk(sets, lambda one: one.run, cold)
    tell(f"warming up the whole layer, {len(sets)} copies of {_bytes(first) / 1e6:.0f} MB")
    whole = timer.batch(launch, rotation, policy)
    batches: dict[str, Batch] = {}
    for part in parts:
        if isinstance(part, Part):
            batches[part.role] = _alone(part.problem, launches[part.role], timer, policy, seed)
        else:
            among, glue_launch = _walk(sets, partial(_step, part.role), cold)
            batches[part.role] = timer.batch(glue_launch, among, policy)
    tell(f"timing the whole and its {len(batches)} parts, {laps} laps")
    samples: dict[str, list[float]] = {role: [] for role in batches}
    wholes: list[float] = []
    for lap in range(laps):
        order: Iterable[str] = batches if lap % 2 else reversed(batches)
        wholes.append(whole.round().us)
        for role in order:
            samples[role].append(batches[role].round().us)
    glue = {part.role for part in parts if isinstance(part, Glue)}
    sums = [sum(samples[role][lap] for role in samples) for lap in range(laps)]
    bare = [sum(samples[role][lap] for role in samples if role not in glue) for lap in range(laps)]
    return LayerTime(
        parts=tuple(_timed(part, chosen, spread(samples[part.role])) for part in parts),
        whole=spread(wholes),
        ratio=paired_ratio(wholes, sums),
        bare_ratio=paired_ratio(wholes, bare),
        error=checked.error,
        tolerance=checked.tolerance,
        laps=laps,
        sets=len(sets),
        launch_mode=whole.shape.mode,
        l2_state=cold,
    )


class CheckFailed(Exception):
    """The composed layer gave wrong numbers: nothing of it was timed."""


def quickest(problem: Problem, kernels: Sequence[Kernel], chip: Chip, timer: Timer, *, tries: int = 3) -> Kernel:
    """Of several kernels the one whose default was fastest in a few launches: good enough to pick a baseline, not to choose by."""
    if len(kernels) == 1:
        return kernels[0]
    inputs, outputs = problem.inputs(seed=0, device=timer.device), problem.outputs(device=timer.device)

    def least_s(kernel: Kernel) -> float:
        try:
            launch = kernel.build(problem, kernel.default(problem, chip), chip)
            launch(inputs, outputs)
            found = []
            for _ in range(tries):
                timer.wait()
                started = time.perf_counter()
                launch(inputs, outputs)
                timer.wait()
                found.append(time.perf_counter() - started)
            return min(found)
        except Exception:  # noqa: BLE001  one that fails here is not the quickest; if all do, the first says why when it is built
            return math.inf

    return min(kernels, key=least_s)


def _problem(parts: Parts, role: str) -> Problem:
    return next(part.problem for part in parts if isinstance(part, Part) and part.role == role)


def _step(role: str, one: LayerSet) -> Callable[[], None]:
    return one.steps[role]


def _bytes(one: LayerSet) -> int:
    """Bytes of everything that one pass through a copy touches."""
    tensors = [tensor for group in (*one.own.values(), *one.flow.values()) for tensor in group.values()]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def _copies(first: LayerSet, timer: Timer) -> int:
    """So many that the others touch CACHE_MULTIPLE caches before a copy comes again, within the timer's memory; at least one."""
    needed = math.ceil(CACHE_MULTIPLE * timer.l2_bytes / _bytes(first)) + 1
    return max(1, min(needed, timer.memory_bytes // (2 * _bytes(first))))


def _walk(sets: Sequence[LayerSet], step: Callable[[LayerSet], Callable[[], None]], l2_state: str) -> tuple[Rotation, Launch]:
    """A rotation whose inputs name a copy, and the launch that runs it: the timers know tensors, not layers."""
    names = [dict(one.flow["hidden"]) for one in sets]
    steps = {id(name): step(one) for name, one in zip(names, sets, strict=True)}

    def launch(inputs: Tensors, outputs: Tensors) -> None:
        steps[id(inputs)]()

    return Rotation(names, [{} for _ in sets], (names[0], names[-1]), l2_state), launch


def _alone(problem: Problem, launch: Launch, timer: Timer, policy: Policy, seed: int) -> Batch:
    stored, touched = set_bytes(problem)
    how = plan(
        stored=stored,
        touched=touched,
        l2=policy.l2,
        l2_bytes=timer.l2_bytes,
        # The parts hold their sets at the same time.
        memory_bytes=timer.memory_bytes // 2,
        max_sets=timer.max_sets,
        can_flush=timer.can_flush,
    )
    return timer.batch(launch, Rotation.make(problem, how, seed=seed, device=timer.device), policy)


def _timed(part: Part | Glue, chosen: Mapping[str, Chosen], found: Spread) -> PartTime:
    if isinstance(part, Glue):
        return PartTime(part.role, "glue", "torch", "glue", found)
    one = chosen[part.role]
    return PartTime(part.role, part.problem.label(), one.kernel.name, one.origin, found)
