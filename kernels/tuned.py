"""`klab.kernels.apply`: the kernels that a profile chose, in somebody's own code."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from klab.kernels.contract import Chip, Config, Json, Kernel, Launch, Problem, Tensors
from klab.kernels.errors import UsageError

if TYPE_CHECKING:
    import torch

SCHEMA = 1
# Sizes that change from call to call; every other field of a problem is the model's and must be as it was measured.
LOADS = frozenset({
    "m", "rows", "tokens", "frames", "batch", "kv_len", "q_lens", "kv_lens", "seq_lens", "prefix_lens", "kv_tokens", "sequences",
    "shared_prefix",
})  # fmt: skip
# In a batched matmul the batch are the model's heads.
NOT_LOADS = {"batched_matmul": frozenset({"batch"})}
# Problems whose launch is kept: lengths that differ in every step would otherwise fill the memory.
KEPT = 4096


@dataclass(frozen=True)
class Served:
    """What serves a problem. `measured_at` is the label of the bucket it was chosen for; `distance` how far the problem is from that:
    the sum of |ln(size / its size)| over the sizes that differ (of lengths how many and how long on average), 0 for the very shape.
    `gave_way`: why no configuration that was chosen fits, where the nearest bucket's kernel runs with its default; empty otherwise.
    """

    kernel: str
    config: Config
    measured_at: str
    distance: float
    gave_way: str = ""


@dataclass(frozen=True)
class _Bucket:
    problem: Problem
    label: str
    kernel_id: str
    config: Mapping[str, Json]
    source_digest: str
    loads: Mapping[str, tuple[float, ...]]


class Tuned:
    """The choices of one profile on the device that torch uses. Made by `apply`.

    A launch is built when its problem is first asked for and then found by a dictionary: nothing is searched or timed at run time.
    Not safe for two threads that share a launch's stream (see Launch). `skipped` says which choices do not serve the problem they were
    made for, and why.
    """

    def __init__(self, profile: Mapping[str, Json], where: str, *, changed_code: bool) -> None:
        self.chip = _chip(profile, where)
        self.device = "cpu" if self.chip.kind == "cpu" else "cuda"
        self._where, self._changed_code = where, changed_code
        self._families: dict[Problem, list[_Bucket]] = {}
        self._kernels: dict[str, dict[str, Kernel]] = {}
        self._launches: dict[Problem, tuple[Launch, Served]] = {}
        self._narrower: dict[Problem, str] = {}
        self.skipped: list[str] = []
        for choice in profile["choices"]:
            self._take(choice)

    def launch(self, problem: Problem) -> Launch:
        """`launch(inputs, outputs)` for this problem, as of the nearest bucket. UsageError when no kernel in the profile takes it."""
        found = self._launches.get(problem)
        return found[0] if found is not None else self._build(problem)[0]

    def served(self, problem: Problem) -> Served:
        """Which kernel and configuration `launch` runs, and where that was measured."""
        found = self._launches.get(problem)
        return (found if found is not None else self._build(problem))[1]

    def __call__(self, problem: Problem, inputs: Tensors, outputs: Tensors | None = None) -> dict[str, torch.Tensor]:
        """Run it on torch's current stream; outputs are allocated unless given. `inputs` are named as `problem.inputs` names them."""
        if outputs is None:
            outputs = problem.outputs(device=self.device)
        self.launch(problem)(inputs, outputs)
        return outputs

    def _take(self, choice: Mapping[str, Json]) -> None:
        from klab.kernels.discover import operators

        # A narrower format is another problem with other inputs: whoever wants it asks for that problem.
        fields = choice.get("instead_problem") or choice["wanted"]["problem"]
        operator = choice["kernel"].partition("/")[0]
        label = choice.get("instead") or choice["wanted"]["label"]
        if operator not in operators():
            self.skipped.append(f"{label}: this klab has no operator {operator}")
            return
        problem = operators()[operator].from_json(fields)
        if choice.get("instead_problem") and (wanted := choice["wanted"]["problem"]) and choice["wanted"]["operator"] in operators():
            self._narrower.setdefault(_family(operators()[choice["wanted"]["operator"]].from_json(wanted)), label)
            self.skipped.append(f"{choice['wanted']['label']}: chosen in a narrower format, as {label}: ask for that problem")
        if not isinstance(choice["config"], Mapping):
            raise TypeError
        bucket = _Bucket(problem, label, choice["kernel"], choice["config"], choice["source_digest"], _loads(problem))
        self._families.setdefault(_family(problem), []).append(bucket)

    def _build(self, problem: Problem) -> tuple[Launch, Served]:
        buckets = self._families.get(_family(problem), [])
        nearest = _nearest(problem, buckets)
        reasons: list[str] = []
        for distance, bucket in nearest:
            kernel = self._kernel(bucket)
            config = kernel.config_type.from_json(bucket.config)
            reason = kernel.fits(problem, config, self.chip)
            if reason is None:
                return self._keep(problem, kernel, Served(kernel.id, config, bucket.label, distance))
            reasons.append(f"{bucket.kernel_id} of {bucket.label}: {reason}")
        # Smaller than everything measured: a tile of 64 rows, say, for one row. The default fits wherever any configuration does.
        for distance, bucket in nearest:
            kernel = self._kernel(bucket)
            if kernel.unfit(problem, self.chip) is None:
                served = Served(kernel.id, kernel.default(problem, self.chip), bucket.label, distance, "; ".join(reasons))
                return self._keep(problem, kernel, served)
        if reasons:
            raise UsageError(f"{self._where}: no chosen kernel takes {problem.label()} ({'; '.join(reasons)})")
        if label := self._narrower.get(_family(problem)):
            raise UsageError(f"{self._where} has no choice for {problem.label()} but in a narrower format: ask for one like {label}")
        near = sorted({b.label for family in self._families.values() for b in family if b.problem.operator == problem.operator})
        there = ", ".join(near[:5]) + (" ..." if len(near) > 5 else "") or f"nothing for {problem.operator}"
        raise UsageError(f"{self._where} has no choice for {problem.label()} at any size; it has {there}: klab tune or klab choose adds it")

    def _keep(self, problem: Problem, kernel: Kernel, served: Served) -> tuple[Launch, Served]:
        made = kernel.build(problem, served.config, self.chip), served
        if len(self._launches) >= KEPT:
            self._launches.clear()
        self._launches[problem] = made
        return made

    def _kernel(self, bucket: _Bucket) -> Kernel:
        from klab.kernels.discover import discover

        operator = bucket.problem.operator
        if operator not in self._kernels:
            self._kernels[operator] = discover(only=(operator,)).kernels
        kernel = self._kernels[operator].get(bucket.kernel_id)
        if kernel is None:
            raise UsageError(
                f"{self._where} chose {bucket.kernel_id} for {bucket.label}, which is not here or cannot be imported (klab kernels)"
            )
        if kernel.source_digest != bucket.source_digest and not self._changed_code:
            raise UsageError(
                f"{self._where}: the code of {kernel.id} has changed since it was chosen for {bucket.label}; measure and choose again, or "
                "say apply(..., changed_code=True) to run it unmeasured"
            )
        return kernel


def apply(profile: str | Path | Mapping[str, Any], *, any_device: bool = False, changed_code: bool = False) -> Tuned:
    """The chosen kernels of a profile (a file that `klab choose` wrote, or its JSON), ready to run here.

    any_device: also on a device of another name than the one it was measured on (same kind and compute capability). changed_code: also
    kernels whose code, or the version of whose package, is another than the measured one. UsageError for anything else that does not fit:
    not a profile, another kind of chip, no limits in it (written by an older klab: choose again).
    """
    where = "profile"
    if not isinstance(profile, Mapping):
        where = str(profile)
        try:
            profile = json.loads(Path(profile).read_text(encoding="utf-8"))
        except OSError as error:
            raise UsageError(f"cannot read {where}: {error.strerror}") from None
        except ValueError:
            raise UsageError(f"{where} is not a profile that klab wrote") from None
    if not isinstance(profile, Mapping) or not isinstance(profile.get("choices"), list):
        raise UsageError(f"{where} is not a profile that klab wrote")
    if profile.get("schema") != SCHEMA:
        raise UsageError(f"{where} has schema {profile.get('schema')}; this klab reads {SCHEMA}: choose again")
    try:
        tuned = Tuned(profile, where, changed_code=changed_code)
    except (KeyError, TypeError, AttributeError):
        raise UsageError(f"{where} is not a profile that klab wrote") from None
    _check_device(tuned.chip, str(profile.get("device", "")), where, any_device)
    return tuned


def _chip(profile: Mapping[str, Json], where: str) -> Chip:
    limits = profile.get("limits")
    if not limits:
        raise UsageError(f"{where} does not say for which chip its kernels were built (an older klab wrote it): choose again")
    known = {f.name for f in dataclasses.fields(Chip)}
    return Chip.from_json({name: value for name, value in limits.items() if name in known})


def _check_device(chip: Chip, measured_on: str, where: str, any_device: bool) -> None:
    import torch

    if chip.kind == "cpu":
        return  # built for any CPU; how fast it is elsewhere is not known, and nothing breaks
    if not torch.cuda.is_available():
        raise UsageError(f"{where} is for {chip.title}, and torch sees no GPU here")
    here, capability = torch.cuda.get_device_name(), torch.cuda.get_device_capability()
    if tuple(capability) != tuple(chip.compute_capability):
        raise UsageError(f"{where} is for compute capability {chip.compute_capability}, and {here} has {capability}")
    if here != measured_on and not any_device:
        raise UsageError(
            f"{where} was measured on {measured_on or chip.title}, not on {here}: say apply(..., any_device=True) to use it here"
        )


def _load_fields(problem: Problem) -> list[str]:
    skipped = NOT_LOADS.get(problem.operator, frozenset())
    return [f.name for f in dataclasses.fields(problem) if f.name in LOADS and f.name not in skipped]  # type: ignore[arg-type]


def _load(problem: Problem, name: str) -> Any:
    """A size; a list of nothing but zeros (no sequence has a prefix) is none."""
    value = getattr(problem, name)
    return () if isinstance(value, tuple) and not any(value) else value


def _family(problem: Problem) -> Problem:
    """The problem with its loads made equal (one sequence, one token): problems of one model's matrix or head count share it.

    What is empty or zero stays so: no prefix, or keys that are not another stream's, is a different operation.
    """
    values = {name: _load(problem, name) for name in _load_fields(problem)}
    ones = {name: value and ((1,) if isinstance(value, tuple) else 1) for name, value in values.items()}
    found = object.__new__(type(problem))  # no __post_init__: a stand-in that is compared and hashed, never run
    for f in dataclasses.fields(problem):  # type: ignore[arg-type]
        object.__setattr__(found, f.name, ones.get(f.name, getattr(problem, f.name)))
    return found


def _loads(problem: Problem) -> dict[str, tuple[float, ...]]:
    """The sizes that vary, as numbers: of a list how many and how long on average."""
    found: dict[str, tuple[float, ...]] = {}
    for name in _load_fields(problem):
        value = _load(problem, name)
        found[name] = (float(len(value)), sum(value) / max(1, len(value))) if isinstance(value, tuple) else (float(value),)
    return found


def _nearest(problem: Problem, buckets: list[_Bucket]) -> list[tuple[float, _Bucket]]:
    """Buckets with their distances, the nearest first; among those as near (lengths count by their mean) the very problem."""
    found = [(_distance(problem, bucket), bucket) for bucket in buckets]
    return sorted(found, key=lambda pair: (pair[0], pair[1].problem != problem, pair[1].label))


def _distance(problem: Problem, bucket: _Bucket) -> float:
    mine = _loads(problem)
    pairs = ((a, b) for name, sizes in bucket.loads.items() for a, b in zip(mine[name], sizes, strict=True))
    return sum(abs(math.log((1 + a) / (1 + b))) for a, b in pairs)
