"""What screening says of a candidate, and by which rule it falls."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from klab.harness.plan.trial import Trial
from klab.harness.store.result import Status
from klab.harness.tune.rank import expected_us
from klab.kernels.contract import Chip, Json, Kernel

NOT_SCREENED = "not screened"
DUPLICATE = "duplicate"
HOPELESS = "hopeless"


@dataclass(frozen=True)
class Limits:
    """When a candidate is dropped. 512 B of stack per thread is where a matmul tile is lost to spills: 128x256x64 with
    4 warps spills 792 B on sm_90, and its 8-warp twin none.

    timeout_s: seconds of compiling. memory_bytes: of a compiling process with its children; a Triton matmul takes 0.4 GB, imports
    included. hopeless: drop what the analytic rank expects to take more than so many times the best one's time (None: nothing is
    dropped for that; the rank is modelled, and has not been held against measurements).
    """

    stack_bytes: int = 512
    timeout_s: float = 120.0
    memory_bytes: int = 2 << 30
    hopeless: float | None = None


@dataclass(frozen=True)
class Screened:
    """What screening says of one trial. `status` is ok (worth measuring), screened (dropped by `rule`), or how it failed.

    cached: it was known, and nothing was compiled now. from_default: how many fields of the configuration differ from the kernel's default
    (0: it is the default). twin: key of the trial that a duplicate's time can be taken from. expected_us: modelled by the analytic rank.
    """

    trial: Trial
    status: Status
    rule: str
    reason: str
    functions: Sequence[dict[str, Json]] = field(default_factory=list)
    compile_s: float | None = None
    cached: bool = False
    from_default: int | None = None
    twin: str | None = None
    expected_us: float | None = None

    def to_json(self) -> dict[str, Json]:
        """One row for `klab screen --json`."""
        return {
            **self.trial.to_json(),
            "key": self.trial.key,
            "status": self.status.value,
            "rule": self.rule,
            "reason": self.reason,
            "compile_s": self.compile_s,
            "cached": self.cached,
            "from_default": self.from_default,
            "twin": self.twin,
            "expected_us": None if self.expected_us is None else round(self.expected_us, 3),
            "functions": list(self.functions),
        }

    @property
    def signature(self) -> tuple[Json, ...] | None:
        """Equal for candidates of one problem that run the same machine code with the same launches; None where nothing was compiled."""
        if self.status is not Status.OK or not self.functions:
            return None
        return (self.trial.problem.key, *((f["sass_hash"], f["launch"], f["threads"], f["smem_bytes"]) for f in self.functions))


def not_screened(trial: Trial, why: str) -> Screened:
    """A trial that was not reached: it may be as good as any."""
    return Screened(trial, Status.OK, NOT_SCREENED, why)


def judge(trial: Trial, answer: Mapping[str, Json], chip: Chip, limits: Limits, *, cached: bool = False) -> Screened:
    """What a compiling process's answer means for the trial."""
    functions: list[dict[str, Json]] = answer.get("functions", [])

    def ended(status: Status, rule: str, reason: str) -> Screened:
        return Screened(trial, status, rule, reason, functions, answer.get("compile_s"), cached, answer.get("from_default"))

    status = Status(answer["status"])
    if status is not Status.OK:
        return ended(status, status.value.replace("_", " "), answer.get("reason", ""))
    for f in functions:
        if f["smem_bytes"] > chip.smem_per_block_bytes:
            need, have = f["smem_bytes"] / 1024, chip.smem_per_block_bytes / 1024
            return ended(Status.SCREENED, "does not fit", f"{f['name']} needs {need:.0f} KB of shared memory, {chip.name} has {have:.0f}")
        if f["tmem_columns"] > 512:
            return ended(Status.SCREENED, "does not fit", f"{f['name']} needs {f['tmem_columns']} columns of tensor memory of 512")
        if f["threads"] * f["registers"] > 65536:
            return ended(Status.SCREENED, "does not fit", f"{f['name']} needs {f['threads']} x {f['registers']} registers of 65536")
        if f["stack_bytes"] > limits.stack_bytes:
            return ended(Status.SCREENED, "spills", f"{f['name']} spills: {f['stack_bytes']} B of stack per thread")
    wants = trial.config.to_json_full().get("warp_specialize", False)
    if wants and functions and not any(f["warp_specialised"] for f in functions):
        return ended(Status.SCREENED, "silent no-op", "warp specialisation was asked for and not built")
    return ended(Status.OK, "", "")


def as_duplicate(item: Screened, twin: Screened) -> Screened:
    """`item`, dropped in favour of `twin`, with what differs between their configurations and changed nothing."""
    a, b = item.trial, twin.trial
    reason = f"the same machine code and launch as {b.kernel} {b.config.label()}"
    if a.kernel == b.kernel:
        mine, others = a.config.to_json_full(), b.config.to_json_full()
        idle = " ".join(f"{name}={value}" for name, value in mine.items() if others.get(name) != value)
        reason = f"{idle} changes nothing: {reason}"
    return dataclasses.replace(item, status=Status.SCREENED, rule=DUPLICATE, reason=reason, twin=b.key)


def drop_duplicates(found: Sequence[Screened]) -> list[Screened]:
    """Of candidates with equal machine code and launches one stays: a default, else the one with the fewest fields changed from its
    kernel's default, else the first. Two defaults both stay, and so does the same configuration under two policies."""
    best: dict[tuple[Json, ...], Screened] = {}
    for item in found:
        signature = item.signature
        if signature is not None and (signature not in best or _distance(item) < _distance(best[signature])):
            best[signature] = item
    kept = []
    for item in found:
        twin = None if item.signature is None else best[item.signature]
        keep = twin is None or item.from_default == 0 or _code(item) == _code(twin)
        kept.append(item if keep or twin is None else as_duplicate(item, twin))
    return kept


def drop_hopeless(found: Sequence[Screened], kernels: Mapping[str, Kernel], chip: Chip, times: float | None) -> list[Screened]:
    """Give every candidate its expected time, and with `times` drop what is expected to take more than that many times the problem's
    best. A default is never dropped, nor what the rank says nothing of."""
    ranked = [dataclasses.replace(item, expected_us=_expected(item, kernels, chip)) for item in found]
    if times is None:
        return ranked
    best: dict[str, float] = {}
    for item in ranked:
        if item.status is Status.OK and item.expected_us is not None:
            key = item.trial.problem.key
            best[key] = min(item.expected_us, best.get(key, item.expected_us))
    kept = []
    for item in ranked:
        least = best.get(item.trial.problem.key)
        if item.status is Status.OK and item.from_default != 0 and item.expected_us is not None and least is not None:
            ratio = item.expected_us / least
            if ratio > times:
                reason = f"expected (modelled) {item.expected_us:.1f} us, {ratio:.1f} times the best's {least:.1f} us"
                item = dataclasses.replace(item, status=Status.SCREENED, rule=HOPELESS, reason=reason)
        kept.append(item)
    return kept


def tally(found: Iterable[Screened]) -> dict[str, int]:
    """How many candidates fell to which rule; "kept" for those worth measuring, "not screened" for those not reached."""
    return dict(Counter((s.rule or "kept") if s.status is Status.OK else s.rule for s in found))


def _expected(item: Screened, kernels: Mapping[str, Kernel], chip: Chip) -> float | None:
    kernel = kernels.get(item.trial.kernel)
    return None if kernel is None else expected_us(item.trial.problem, kernel, item.trial.config, chip, item.functions)


def _distance(item: Screened) -> int:
    return 1 << 30 if item.from_default is None else item.from_default


def _code(item: Screened) -> tuple[str, str]:
    return item.trial.kernel, item.trial.config.key
