"""Where a request's time goes, which of it nobody has measured, and the commands that would measure it."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field

from klab.harness.cost.estimate import Origin, label_of
from klab.harness.cost.flow import flows
from klab.harness.cost.ranges import ZERO, Range
from klab.harness.cost.serving import OperatingPoint
from klab.harness.cost.single_pass import PassPoint
from klab.harness.cost.steps import Part, Steps
from klab.harness.cost.workload import Workload
from klab.harness.plan.communication import KINDS
from klab.kernels.contract import Json


@dataclass(frozen=True)
class Spent:
    """What one operator takes of a request (or another unit): seconds of the replica, its share of them, and what these rest on (shares
    of its own time). `joules`: of all GPUs of the replica. `kernels`: which are launched, the longest first; `how` is the longest launch's.
    "host" is the wait between steps.
    """

    operator: str
    seconds: Range
    share: float
    origins: Mapping[Origin, float]
    joules: Range = ZERO
    kernels: tuple[str, ...] = ()
    how: str = ""

    def to_json(self) -> dict[str, Json]:
        """One line of `klab cost --json`."""
        return {
            "operator": self.operator,
            "seconds": self.seconds.to_json(),
            "share": self.share,
            "origins": {str(origin): share for origin, share in self.origins.items()},
            "joules": self.joules.to_json(),
            "kernels": list(self.kernels),
            "how": self.how,
        }


@dataclass(frozen=True)
class Missing:
    """A launch that was not measured on this chip: its share of a request's time, what its time is taken from."""

    operator: str
    label: str
    share: float
    origin: Origin
    how: str

    def to_json(self) -> dict[str, Json]:
        """One line of `klab cost --json`."""
        return {"operator": self.operator, "label": self.label, "share": self.share, "origin": str(self.origin), "how": self.how}


@dataclass(frozen=True)
class StepTime:
    """One engine step: `batch` sequences with `context` keys each (a prefill: one prompt), and what its time may be called."""

    phase: str
    batch: int
    context: int
    us: Range
    label: Origin

    def to_json(self) -> dict[str, Json]:
        """One line of `klab cost --json`."""
        return {"phase": self.phase, "batch": self.batch, "context": self.context, "us": self.us.to_json(), "label": str(self.label)}


def step_times(steps: Steps, workload: Workload, concurrency: int, most: int) -> list[StepTime]:
    """A whole prompt, and decode steps by batch (one, at `concurrency`, as many as fit) and context (first, middle and last)."""
    w = workload
    prompt = steps.prefill(w.new_tokens, w.cached_tokens)
    found = [StepTime("prefill", 1, w.isl, prompt.us, label_of(prompt.time_shares))]
    for batch in sorted({1, concurrency, most}) if w.decode_steps else []:
        for context in sorted({w.isl + w.draft_tokens + 1, w.context, w.isl + w.osl}):
            step = steps.decode(batch, context, w.draft_tokens + 1)
            found.append(StepTime("decode", batch, context, step.us, label_of(step.time_shares)))
    return found


@dataclass
class _Sum:
    seconds: Range = ZERO
    joules: Range = ZERO
    origins: dict[Origin, float] = field(default_factory=lambda: dict.fromkeys(Origin, 0.0))
    kernels: dict[str, float] = field(default_factory=dict)
    longest: float = -1.0
    how: str = ""

    def add(self, part: Part, count: float, gpus: int) -> None:
        seconds = part.us * (count * 1e-6)
        self.seconds += seconds
        self.origins[part.one.origin] += seconds.mid
        if part.one.joules is not None:
            self.joules += part.one.joules * (part.count * count * gpus)
        if part.one.kernel:
            self.kernels[part.one.kernel] = self.kernels.get(part.one.kernel, 0.0) + seconds.mid
        if seconds.mid > self.longest:
            self.longest, self.how = seconds.mid, part.one.how


def spent(point: OperatingPoint | PassPoint) -> list[Spent]:
    """What each operator takes of a request (or picture, audio hour, ...) at this point, longest first."""
    sums: dict[str, _Sum] = {}
    for count, step in point.mix:
        for part in step.parts:
            sums.setdefault(part.operator, _Sum()).add(part, count, point.deployment.tp)
        if step.host_us.high:
            host = sums.setdefault("host", _Sum(how="the wait between two steps (--host-us)"))
            host.seconds += step.host_us * (count * 1e-6)
            host.origins[Origin.MODELLED] += step.host_us.mid * count * 1e-6
    whole = sum(one.seconds.mid for one in sums.values())
    found = []
    for name, one in sums.items():
        own = sum(one.origins.values())
        origins = {origin: value / own if own else 0.0 for origin, value in one.origins.items()}
        kernels = tuple(sorted(one.kernels, key=lambda kernel: -one.kernels[kernel]))
        found.append(Spent(name, one.seconds, one.seconds.mid / whole if whole else 0.0, origins, one.joules, kernels, one.how))
    return sorted(found, key=lambda s: -s.seconds.mid)


def missing(point: OperatingPoint | PassPoint) -> list[Missing]:
    """The launches whose time was not measured by klab on this chip, the longest first. The host's waits are no launches."""
    found: dict[tuple[str, str], tuple[float, Part]] = {}
    whole = 0.0
    for count, step in point.mix:
        whole += step.us.mid * count
        for part in step.parts:
            if part.one.origin is not Origin.MEASURED:
                share, _ = found.get((part.operator, part.label), (0.0, part))
                found[(part.operator, part.label)] = (share + part.us.mid * count, part)
    named = [Missing(op, label, us / whole, part.one.origin, part.one.how) for (op, label), (us, part) in found.items()]
    return sorted(named, key=lambda m: -m.share)


def commands(point: OperatingPoint, model: str, chip: str, lacking: list[Missing]) -> list[str]:
    """The command lines that measure what is lacking: launches with `klab run`, collectives with `klab communication`.

    `model` and `chip` as the user named them. Shapes between measured ones are interpolated, so one decode batch below and one above are
    enough for those in between.
    """
    w, d = point.workload, point.deployment
    base = f"--model {shlex.quote(model)} --chip {shlex.quote(chip)}"
    shared = f"--tp {d.tp}" + (f" --dtype {d.dtype}" if d.dtype else "")
    kept = [f"quantization={d.quantization}" if d.quantization else "", f"kv_dtype={d.kv_dtype}" if d.kv_dtype else ""]
    kept.append("expert_parallel=true" if d.expert_parallel else "")
    with_ = "".join(f" --with {one}" for one in kept if one)
    found = []
    if any(m.operator not in (*KINDS, "draft") for m in lacking):
        new = min(w.new_tokens, w.chunk_tokens)
        prefix = w.cached_tokens + (w.new_tokens - new) // 2
        before = f" --with prefix_len={prefix}" if prefix else ""
        kinds = flows(w, point.concurrency)[-1].kinds
        # While prompts wait or are computed, fewer sequences decode than are in flight.
        decoding = [max(1, round(kind.decoding)) for kind in kinds if kind.decoding]
        sizes = {*decoding, max(1, min(decoding) // 2), point.concurrency} if decoding else {point.concurrency}
        batches = ",".join(map(str, sorted(sizes)))
        verify = f" --with q_len={w.draft_tokens + 1}" if w.draft_tokens else ""
        decode = f"--isl {w.isl} --osl {w.osl} --batch {batches} {shared}{with_}{verify}"
        prefill = f"--isl {new + prefix} --osl {w.osl} {shared}{with_}{before}"
        if w.osl > 1 and not (prefix or verify) and new == w.isl:
            found.append(f"klab run {base} {decode}")
        else:
            found.append(f"klab run {base} {prefill} --phase prefill")
            found += [f"klab run {base} {decode} --phase decode"] if w.osl > 1 else []
        # Short prompts share a step: its launches see all their tokens as one heap.
        together = max((kind.prompts for kind in kinds), default=1)
        found += [f"klab run {base} {prefill} --with prefill_batch={together} --phase prefill"] if together > 1 else []
    if any(m.operator in KINDS for m in lacking):
        out = f"links-{d.chip.name}-{d.tp}.json"
        found.append(f"klab communication --chip {shlex.quote(chip)} --gpus {d.tp} --out {out}   (then: klab cost ... --table {out})")
    return found


def unit_command(point: PassPoint, model: str, chip: str) -> str:
    """The command line that measures the launches of a single pass."""
    d, (_, first) = point.deployment, point.mix[0]
    diffusion = d.model.kind == "diffusion_transformer"
    tokens = point.task.tokens or (d.model.default_tokens if diffusion else 0)
    length = f" --isl {tokens}" if tokens else ""
    rows = first.tokens // tokens if tokens else point.batch
    generated = f" --osl {point.task.window_tokens} --batch {point.batch}" if len(point.mix) > 1 else ""
    kept = f" --with quantization={d.quantization}" if d.quantization else ""
    dtype = f" --dtype {d.dtype}" if d.dtype else ""
    base = f"klab run --model {shlex.quote(model)} --chip {shlex.quote(chip)}"
    return f"{base}{length}{generated} --tp {d.tp}{dtype} --with prefill_batch={rows}{kept}"
