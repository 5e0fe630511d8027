"""What a worker does with ONE problem at a time: make the data, judge each contestant, time it round by round. No pipes here."""

from __future__ import annotations

import dataclasses
import gc
import math
import secrets
import time
from dataclasses import dataclass, field

from klab.harness.measure import anchor as anchors
from klab.harness.measure import faults
from klab.harness.measure.check import Check, attempt, compare, distance, exact_sums, fingerprint, guarded_outputs, poison
from klab.harness.measure.cuda_timer import CannotCapture, SpoiledByCapture
from klab.harness.measure.energy import Guard, Window, idle_power, judge, sustain
from klab.harness.measure.power import PowerMeter
from klab.harness.measure.rotation import Rotation, plan, set_bytes
from klab.harness.measure.timer import Batch, Timer
from klab.harness.plan.trial import Policy
from klab.harness.store.result import Status
from klab.kernels.contract import Chip, Json, Launch, Problem, Tensors, canonical_json
from klab.kernels.discover import Catalogue
from klab.kernels.errors import UsageError

# Below this a CPU makes the reference in well under a second; above it the device does, in the reference's own higher precision.
REFERENCE_ON_CPU_FLOPS = 2e9
# An energy run is split over two passes (A B C C B A), so that slow drift meets every contestant alike.
ENERGY_PASSES = 2
# A search opens the same problem again and again. Its data is made afresh after so many contests: making it takes up to seconds, and
# data that stays for ever could hide a mistake for ever.
MOST_OPENINGS = 16
# What of a policy does not touch the data, the state of the cache or the threads.
_TIMING_ONLY: dict[str, Json] = {
    "warmup_ms": 0.0, "min_rounds": 0, "max_rounds": 0, "round_ms": 0.0, "target_ci": 0.0, "limit_s": 0.0, "energy": False, "energy_s": 0.0,
}  # fmt: skip

Answer = dict[str, Json]


@dataclass
class Slot:
    """One contestant that is ready."""

    batch: Batch
    worst: float
    checks: int
    windows: list[Window] = field(default_factory=list)


class Session:
    """The state of one worker. Every method returns a JSON object; a contestant's failure is a status in it, never an exception.

    `fatal` in an answer says that the device's context is broken and the worker must end.
    """

    def __init__(self, chip: Chip, catalogue: Catalogue, timer: Timer, meter: PowerMeter) -> None:
        self.chip, self.catalogue, self.timer, self.meter = chip, catalogue, timer, meter
        # Anchors outlive a problem: making their data takes up to a second. By name: what of the policy they were made under, the batch.
        self._anchors: dict[str, tuple[tuple[int, float], Batch]] = {}
        self._forget()

    def _forget(self) -> None:
        self.slots: dict[int, Slot] = {}
        self.policy = Policy()
        self.rotation = Rotation([], [], (), "")
        self._problem: Problem | None = None
        self._idle_w: float | None = None
        self._opened: tuple[str, str, Policy] | None = None
        self._openings = 0
        self._data: Answer = {}
        # What each original must give and must still hold, and the tensors in which a contestant first meets them.
        self._answers: list[Tensors] = []
        self._prints: list[dict[str, int]] = []
        # What the unquantised problem gives for the first original, where there is one: made when first asked for.
        self._wide: Tensors | None = None
        self._buffer: Tensors = {}

    @property
    def problem(self) -> Problem:
        """The open problem; UsageError when there is none."""
        if self._problem is None:
            raise UsageError("no problem is open")
        return self._problem

    def open(self, operator: str, problem: Json, policy: Json, reuse: bool = False) -> Answer:
        """Make the rotated sets and the answers for `problem`, shared by every contestant.

        With `reuse`, what an earlier opening of the same problem made serves again, up to MOST_OPENINGS times.
        """
        chosen = Policy.from_json(policy)
        same = (operator, canonical_json(problem), dataclasses.replace(chosen, **_TIMING_ONLY))
        if reuse and self._opened == same and self._openings < MOST_OPENINGS:
            self._openings += 1
            self.slots = {}
            self.policy = chosen
            release(self.timer.device)
            return self._data | self.timer.begin(chosen)
        self.close()
        if operator not in self.catalogue.operators:
            raise UsageError(f"unknown operator {operator!r}; known: {', '.join(sorted(self.catalogue.operators))}")
        self._problem = self.catalogue.operators[operator].from_json(problem)
        self.policy = chosen
        try:
            self._data = self._fill()
            self._opened, self._openings = same, 1
            return self._data
        except Exception as error:  # noqa: BLE001  whatever allocation or the reference raises
            return self._failure(error, building=False)

    def _fill(self) -> Answer:
        exact_sums()
        conditions = self.timer.begin(self.policy)
        stored, touched = set_bytes(self.problem)
        how = plan(
            stored=stored,
            touched=touched,
            l2=self.policy.l2,
            l2_bytes=self.timer.l2_bytes,
            memory_bytes=self.timer.memory_bytes,
            max_sets=self.timer.max_sets,
            can_flush=self.timer.can_flush,
        )
        on_cpu = self.timer.device == "cpu" or self.problem.flops() <= REFERENCE_ON_CPU_FLOPS
        self._reference_device = "cpu" if on_cpu else self.timer.device
        # Fresh at every opening, so that no kernel is ever tuned to the data that it is judged by; the policy's seed shifts it.
        self._seed = self.policy.seed + secrets.randbelow(2**31)
        self.rotation = Rotation.make(self.problem, how, seed=self._seed, device=self.timer.device)
        self._answers = [self._reference(inputs) for inputs in self.rotation.originals]
        self._prints = [fingerprint(inputs) for inputs in self.rotation.originals]
        self._buffer = {name: tensor.clone() for name, tensor in self.rotation.originals[1].items()}
        self.timer.wait()
        return {
            "status": Status.OK.value,
            "l2_state": how.l2_state,
            "sets": how.count,
            "set_bytes": stored,
            "l2_bytes": self.timer.l2_bytes,
            "reference_device": self._reference_device,
            **conditions,
        }

    def _reference(self, inputs: Tensors) -> Tensors:
        return self.problem.reference({name: tensor.to(self._reference_device) for name, tensor in inputs.items()})

    def _wide_error(self, outputs: Tensors) -> float | None:
        """How far a launch on the first original is from the unquantised problem, or None where there is none."""
        wide = self.problem.wide()
        if wide is None:
            return None
        if self._wide is None:
            inputs = self.problem.wide_inputs(seed=self._seed, device=self.timer.device)
            self._wide = wide.reference({name: tensor.to(self._reference_device) for name, tensor in inputs.items()})
        return distance(outputs, self._wide)

    def prepare(self, slot: int, kernel: str, source_digest: str, config: Json, policy: Json) -> Answer:
        """Build, judge on unseen data, make ready to be timed and judge what the timed form writes."""
        problem = self.problem
        found = self.catalogue.kernels.get(kernel)
        if found is None:
            return _unsupported(f"{kernel} is not available here: {self._why_absent(kernel)}")
        if found.source_digest != source_digest:
            return _unsupported(f"{found.path.name} changed since the trial was planned; plan again")
        built, compile_s = False, None
        try:
            self.drop(slot)
            release(self.timer.device)
            chosen = found.config_type.from_json(config)
            unfit = found.fits(problem, chosen, self.chip)
            if unfit is not None:
                return _unsupported(unfit)
            # The first launch compiles. What it writes is judged by nobody, but goes between guard bands: on a CPU a store that
            # runs over would tear up the heap.
            self._fill_buffer(1)
            outputs, _ = guarded_outputs(problem, self.timer.device)
            self.timer.wait()
            started = time.perf_counter()
            launch = found.build(problem, chosen, self.chip)
            launch(self._buffer, outputs)
            self.timer.wait()
            compile_s = time.perf_counter() - started
            built = True
            del outputs
            return {"compile_s": compile_s} | self._make_ready(slot, launch, Policy.from_json(policy))
        except SpoiledByCapture as error:
            # Another worker tries it without a graph, where the policy lets it.
            retry = {} if policy.get("launch", "auto") == "graph" else {"not_captured": str(error)}
            return _unsupported(f"cannot be captured in a CUDA graph: {error}") | {"compile_s": compile_s, "fatal": True} | retry
        except CannotCapture as error:
            return _unsupported(str(error)) | {"compile_s": compile_s}
        except SpoiledInputs as error:
            return _spoiled(error) | {"compile_s": compile_s}
        except BaseException as error:  # noqa: BLE001  a kernel may raise anything, SystemExit included
            return {"compile_s": compile_s} | self._failure(error, building=not built)

    def _why_absent(self, kernel: str) -> str:
        stem = kernel.split("/")[-1]
        for absent in self.catalogue.unavailable:
            if absent.path.stem == stem:
                return absent.reason
        return "no kernel file of that name was found"

    def _make_ready(self, slot: int, launch: Launch, policy: Policy) -> Answer:
        worst, wide_error = 0.0, None
        for original in range(len(self._answers)):
            found, outputs = self._judge(launch, original)
            if found.passed and original == 0:
                wide_error = self._wide_error(outputs)
            if not found.passed:
                return _incorrect(found, f"{found.reason} (seed {self._seed + 1000 * original})", original)
            worst = max(worst, found.error)
        batch = self.timer.batch(launch, self.rotation, policy)
        after = self._verify(batch)
        checks = len(self._answers)
        if not after.passed:
            return _incorrect(after, f"{after.reason}, when launched as it is timed ({batch.shape.mode})", checks)
        ready = self.slots[slot] = Slot(batch, max(worst, after.error), checks + 1)
        shape = batch.shape
        return {
            "status": Status.OK.value,
            "error": ready.worst,
            "tolerance": after.tolerance,
            "checks": ready.checks,
            "wide_error": wide_error,
            "launches": shape.launches,
            "launch_mode": shape.mode,
            "l2_state": shape.l2_state,
            "estimate_us": shape.estimate_us,
            "free_share": self.timer.free_share(),
            "build": shape.details | {"data_seed": self._seed},
        }

    def _fill_buffer(self, original: int) -> None:
        for name, tensor in self.rotation.originals[original].items():
            self._buffer[name].copy_(tensor)

    def _judge(self, launch: Launch, original: int) -> tuple[Check, Tensors]:
        """Launch on other data at the same addresses as before: what a kernel keeps by address is stale now."""
        self._fill_buffer(original)
        outputs, wrong = attempt(self.problem, launch, self._buffer, device=self.timer.device, finite=original > 0)
        if wrong:
            return Check(float("inf"), self.problem.tolerance(), wrong), outputs
        return compare(self.problem, outputs, self._answers[original]), outputs

    def _verify(self, batch: Batch, *, finite: bool = False) -> Check:
        """Poison the sets' outputs, launch as in a round, and judge the first and the last set. Raises SpoiledInputs."""
        for outputs in self.rotation.outputs:
            poison(outputs, finite=finite)
        batch.verify()
        worst = 0.0
        for i, original in self.rotation.ends.items():
            if fingerprint(self.rotation.inputs[i]) != self._prints[original]:
                raise SpoiledInputs("changed its inputs in the timed launches")
            found = compare(self.problem, self.rotation.outputs[i], self._answers[original])
            if not found.passed:
                return found
            worst = max(worst, found.error)
        return Check(worst, self.problem.tolerance(), "")

    def sample(self, slot: int) -> Answer:
        """Time one round."""
        return self._round(self._slot(slot).batch)

    def anchor(self, name: str) -> Answer:
        """Make an anchor ready for the rounds of the open problem; one that is ready stays as it is."""
        conditions = (self.policy.threads, self.policy.round_ms)
        try:
            if name not in self._anchors or self._anchors[name][0] != conditions:
                self._anchors.pop(name, None)
                self._anchors[name] = conditions, anchors.make(name, self.timer, self.policy)
        except UsageError:
            raise
        except BaseException as error:  # noqa: BLE001  whatever allocation or the library raises
            return self._failure(error, building=False)
        shape, what = self._anchors[name][1].shape, anchors.work(name, self.chip.kind).what
        return {"status": Status.OK.value, "what": what, "launches": shape.launches, "estimate_us": shape.estimate_us}

    def sample_anchor(self, name: str) -> Answer:
        """Time one round of an anchor."""
        if name not in self._anchors:
            raise UsageError(f"the anchor {name} is not ready")
        return self._round(self._anchors[name][1])

    def _round(self, batch: Batch) -> Answer:
        try:
            taken = batch.round()
        except BaseException as error:  # noqa: BLE001  as in prepare
            return self._failure(error, building=False)
        state = taken.reading
        return {
            "status": Status.OK.value,
            "us": taken.us,
            "sm_clock_mhz": state.sm_clock_mhz,
            "temperature_c": state.temperature_c,
            "throttle_reasons": state.throttle_reasons,
            "power_w": state.power_w,
        }

    def finish(self, slot: int) -> Answer:
        """Judge once more, after the rounds: a launch that stopped working in their midst must not pass."""
        ready = self._slot(slot)
        try:
            found = self._verify(ready.batch, finite=True)
        except SpoiledInputs as error:
            return _spoiled(error)
        except BaseException as error:  # noqa: BLE001  as in prepare
            return self._failure(error, building=False)
        if not found.passed:
            return _incorrect(found, f"{found.reason}, after the rounds", ready.checks)
        ready.worst = max(ready.worst, found.error)
        ready.checks += 1
        return {"status": Status.OK.value, "error": ready.worst, "tolerance": found.tolerance, "checks": ready.checks}

    def energy(self, slot: int, seconds: float, guard: Json = None) -> Answer:
        """One of ENERGY_PASSES sustained runs; the answer covers all runs of this slot so far. guard: of this device's calibration."""
        ready, wanted = self._slot(slot), Guard.from_json(guard or {})
        if ready.batch.shape.l2_state == "flush":
            return _no_energy("the cache is flushed between launches, and the flush's energy cannot be told from the launch's")
        if self.meter.energy_j() is None:
            return _no_energy(self.meter.trouble or "no energy counter")
        try:
            if self._idle_w is None:
                self._idle_w = idle_power(self.meter)
            updates = -(-wanted.updates // ENERGY_PASSES)
            ready.windows.append(sustain(ready.batch, self.meter, seconds=seconds / ENERGY_PASSES, updates=updates, ramp_s=wanted.ramp_s))
        except BaseException as error:  # noqa: BLE001  as in prepare
            return self._failure(error, building=False)
        found = judge(ready.windows, seconds=seconds, seed=self.policy.seed, guard=wanted)
        return {
            "status": Status.OK.value,
            "energy_j": found.energy_j,
            "energy_ci_low_j": found.low_j,
            "energy_ci_high_j": found.high_j,
            "power_w": found.power_w,
            "idle_power_w": self._idle_w,
            "energy_reason": found.reason,
            "power_trace": [list(point) for point in found.trace],
        }

    def _slot(self, slot: int) -> Slot:
        if slot not in self.slots:
            raise UsageError(f"slot {slot} is not prepared")
        return self.slots[slot]

    def drop(self, slot: int) -> Answer:
        """Forget a contestant and free what it held."""
        self.slots.pop(slot, None)
        return {"status": Status.OK.value}

    def close(self) -> Answer:
        """Forget the problem."""
        self._forget()
        release(self.timer.device)
        return {"status": Status.OK.value}

    def _failure(self, error: BaseException, *, building: bool) -> Answer:
        """The status of what was raised; checks whether the device survived it."""
        answer: Answer = {"status": faults.status_of(error, building=building).value, "reason": faults.one_line(error)}
        fatal = faults.is_fatal(error)
        if not fatal:
            try:
                self.timer.wait()
            except Exception as broken:  # noqa: BLE001  any error of an idle device means that its context is gone
                fatal = True
                answer["reason"] = faults.one_line(broken)
        return answer | {"status": Status.CRASHED.value, "fatal": True} if fatal else answer


class SpoiledInputs(Exception):
    """A launch wrote to the data that all contestants share: nothing measured on it afterwards can be judged."""


def _unsupported(reason: str) -> Answer:
    return {"status": Status.UNSUPPORTED.value, "reason": reason}


def _spoiled(error: SpoiledInputs) -> Answer:
    return {"status": Status.INCORRECT.value, "reason": str(error), "fatal": True}


def _incorrect(found: Check, reason: str, checks: int) -> Answer:
    """`error` is null where it is infinite (JSON has no infinity)."""
    error = found.error if math.isfinite(found.error) else None
    return {"status": Status.INCORRECT.value, "reason": reason, "error": error, "tolerance": found.tolerance, "checks": checks}


def _no_energy(reason: str) -> Answer:
    return {"status": Status.OK.value, "energy_j": None, "energy_reason": reason}


def release(device: str) -> None:
    """Give freed memory back, so that the next contestant finds the device as the first did."""
    gc.collect()
    if device != "cpu":
        import torch

        torch.cuda.empty_cache()
