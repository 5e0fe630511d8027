"""The contract between what competes (kernels) and the lab that measures it.

Five nouns live here: Chip (limits), Problem (the mathematics), Config (the knobs), Kernel (problem, config, chip -> launch)
and Launch (what is timed). A kernel file imports this module, its operator's `problem.py` and the helpers beside this file;
it never imports another kernel file.
"""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

from klab.kernels.errors import UsageError
from klab.kernels.sources import source_digest

if TYPE_CHECKING:
    import torch

Json = Any

# `dict[str, torch.Tensor]`, spelled as a string so that this module imports where torch is absent.
Tensors = dict[str, "torch.Tensor"]
Launch = Callable[[Tensors, Tensors], None]
"""`launch(inputs, outputs)`: enqueue the work on torch's current stream and return at once.

A launch never reads a tensor's values on the host (it must run on meta tensors and inside a CUDA graph): sizes come from the
Problem. It writes every element of every output. Workspaces are allocated at the first call, so a warm-up precedes capture, and
are shared by the calls of one launch: it is for one stream at a time.
"""


def canonical_json(value: Json) -> str:
    """One text per value: sorted keys, no spaces, so that equal values hash equally on every machine."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def digest(value: Json) -> str:
    """First 16 hex digits (64 bits) of the SHA-256 of the canonical JSON: a billion rows collide with probability 3%."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()[:16]


def _plain(value: Any) -> Json:
    """A dataclass field as JSON has it: tuples become lists."""
    return [_plain(item) for item in value] if isinstance(value, tuple) else value


def _frozen(value: Json) -> Any:
    """The inverse of `_plain`: lists become tuples, so that a frozen dataclass stays hashable."""
    return tuple(_frozen(item) for item in value) if isinstance(value, list) else value


class Record:
    """What Problem and Config share: frozen dataclasses that go to JSON and back.

    Fields at their default are left out of the JSON, so that a field added later changes no existing key.
    """

    def to_json(self) -> dict[str, Json]:
        """Return the fields that differ from their default."""
        return {
            f.name: _plain(getattr(self, f.name))
            for f in dataclasses.fields(self)  # type: ignore[arg-type]
            if f.default is dataclasses.MISSING or getattr(self, f.name) != f.default
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Json]) -> Self:
        """Build from `to_json`'s form; UsageError names every unknown or missing field."""
        fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
        unknown = sorted(set(data) - set(fields))
        if unknown:
            raise UsageError(f"{cls.__name__} has no field {', '.join(unknown)}; it has {', '.join(fields)}")
        missing = [
            name
            for name, f in fields.items()
            if name not in data and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        ]
        if missing:
            raise UsageError(f"{cls.__name__} needs {', '.join(missing)}")
        return cls(**{name: _frozen(value) for name, value in data.items()})


@dataclass(frozen=True)
class Chip:
    """The limits of one kind of chip. Bandwidths are decimal (GB/s = 1e9 B/s), peaks are dense.

    `kind` is "cuda", "cpu" or "datasheet": no kernel runs on the last, plans and costs alone are made of its figures, and what it does not
    state is zero. For a CPU, `sm_count` counts cores, `l2_bytes` is the last-level cache and the shared-memory fields are zero.
    `link_gb_per_s` reaches the other chips of a board, `network_gb_per_s` other machines; both one way per chip. `phases` are those that it
    is made for. `provenance` maps a field's name to where its value comes from.
    """

    name: str
    title: str
    kind: str
    sm_count: int
    max_clock_mhz: float
    spec_clock_mhz: float
    peak_tflops: Mapping[str, float] = field(hash=False)
    memory_bytes: int
    memory_gb_per_s: float
    l2_bytes: int
    compute_capability: tuple[int, int] = (0, 0)
    smem_per_block_bytes: int = 0
    smem_per_sm_bytes: int = 0
    tdp_w: float | None = None
    link_gb_per_s: float | None = None
    network_gb_per_s: float | None = None
    phases: tuple[str, ...] = ("prefill", "decode")
    provenance: Mapping[str, str] = field(default_factory=dict, hash=False)

    @classmethod
    def from_json(cls, data: Mapping[str, Json]) -> Self:
        """The chip of its fields as JSON has them: lists become tuples, so that it stays hashable."""
        return cls(**{name: _frozen(value) for name, value in data.items()})

    @property
    def target(self) -> int:
        """Compute capability as Triton writes it: 90 for Hopper, 100 for Blackwell, 0 for a CPU."""
        major, minor = self.compute_capability
        return major * 10 + minor

    @property
    def arch(self) -> str:
        """NVRTC's architecture with the chip's own instructions: `sm_90a`, `sm_100a` (wgmma and tcgen05 need the `a`)."""
        return f"sm_{self.target}{'a' if self.target >= 90 else ''}"

    def peak_flops(self, dtype: str, clock_mhz: float | None = None) -> float | None:
        """Dense FLOP/s for a dtype at the specification's clock, or scaled to a measured SM clock; None if unknown."""
        peak = self.peak_tflops.get(dtype)
        if peak is None:
            return None
        return peak * 1e12 * (1.0 if clock_mhz is None else clock_mhz / self.spec_clock_mhz)


class Problem(Record, ABC):
    """One operator at one shape: a frozen dataclass per operator, in the operator's `problem.py`.

    It knows its inputs (seeded, fresh), its reference, its minimal work and its tolerance. Every subclass has a `dtype` field
    ("bfloat16", "float16", "float32"): that of its unquantised activations.
    """

    operator: ClassVar[str]
    dtype: str

    @abstractmethod
    def inputs(self, *, seed: int, device: str = "cpu", row_padding: int = 0) -> Tensors:
        """Fresh inputs, drawn from a normal distribution of this seed on this device ("meta" gives shapes alone).

        With `row_padding` > 0, every floating-point tensor is a view whose rows lie that many elements further apart than they are
        long (the last dimension stays dense): what a slice of a fused buffer looks like.
        """

    @abstractmethod
    def outputs(self, *, device: str = "cpu") -> Tensors:
        """Uninitialised output tensors of the right shapes and dtypes."""

    @abstractmethod
    def reference(self, inputs: Tensors) -> Tensors:
        """The outputs by definition, for clarity and not speed, in float32 or float64, on the device of the inputs."""

    @abstractmethod
    def flops(self) -> float:
        """The least floating-point operations that the definition needs (a multiply-add counts two)."""

    @abstractmethod
    def bytes_moved(self) -> float:
        """The least bytes to and from memory: every input read once, every output written once."""

    @abstractmethod
    def tolerance(self) -> float:
        """Largest accepted ||out - ref|| / ||ref|| (Frobenius), per output."""

    def tolerance_of(self, output: str) -> float:
        """The tolerance of one output, where they differ: an fp8 output is rounded more coarsely than the residual beside it."""
        return self.tolerance()

    def mismatch(self, output: str, got: torch.Tensor, reference: Tensors) -> str:
        """Why an integer output is wrong, or "". By default every element must be equal.

        A problem whose answer is a choice (a sampled token, an expert) accepts what rounding may decide either way: its `reference` may
        return further tensors, which are no outputs, to tell by.
        """
        wrong = int((got != reference[output]).sum())
        return f"{wrong} of {got.numel()} elements of {output} differ" if wrong else ""

    @property
    def math_dtype(self) -> str:
        """The dtype whose peak bounds this problem on a chip that multiplies it natively: `dtype` unless the operands are narrower."""
        return self.dtype

    def wide(self) -> Problem | None:
        """The unquantised problem that this one approximates, or None. Its inputs of a seed are `wide_inputs`, its outputs have the same
        names, shapes and meaning.
        """
        return None

    def wide_inputs(self, *, seed: int, device: str = "cpu") -> Tensors:
        """The inputs of `wide()` before they were quantised into `inputs` of the same seed; realistic ones, with outlier channels."""
        raise NotImplementedError(f"{self.operator} approximates no other problem")

    @abstractmethod
    def label(self) -> str:
        """A short name for tables, with the shape: `matmul 16x14336x4096 bf16`."""

    @classmethod
    @abstractmethod
    def examples(cls) -> list[Problem]:
        """Small awkward instances (not multiples of tiles, one row, empty entries): every kernel is tested on those it fits."""

    @classmethod
    def approximations(cls, wide: Problem) -> list[Problem]:
        """The problems of this operator that approximate `wide` in narrower formats, each once; their `wide()` is `wide` again."""
        return []

    @classmethod
    def at_scale(cls) -> list[Problem]:
        """One to four instances of the size that serving has (a prefill and a decode step): what resource tables are made of."""
        return []

    @property
    def key(self) -> str:
        """The identity of this problem in the store."""
        return digest({"operator": self.operator, **self.to_json()})


class Config(Record):
    """The knobs of one kernel: subclass as a frozen dataclass. Its order of fields is the order in tables."""

    @property
    def key(self) -> str:
        """The identity of this configuration in the store."""
        return digest(self.to_json_full())

    def to_json_full(self) -> dict[str, Json]:
        """All fields, defaults included: a stored configuration must survive a change of the defaults."""
        return {f.name: _plain(getattr(self, f.name)) for f in dataclasses.fields(self)}  # type: ignore[arg-type]

    def label(self) -> str:
        """`block_m=128 block_n=64 ...`, or "-" where there is nothing to choose."""
        return " ".join(f"{name}={value}" for name, value in self.to_json_full().items()) or "-"


@dataclass(frozen=True)
class NoConfig(Config):
    """For kernels with nothing to choose: the libraries."""


@dataclass(frozen=True)
class Package:
    """What an outside contestant needs: the module that it imports (inside its build function) and how to install it.

    `distributions` are the names under which that module is installed (default: the module's own first part); the first one found tells
    the version.
    """

    module: str
    install: str
    distributions: tuple[str, ...] = ()

    @property
    def version(self) -> str:
        """`name==1.2.3` of what is installed, or "" where it is not or does not tell."""
        return _installed_version(self.distributions or (self.module.split(".")[0],))


@cache
def _installed_version(names: tuple[str, ...]) -> str:
    import importlib.metadata

    for name in names:
        try:
            return f"{name}=={importlib.metadata.version(name)}"
        except importlib.metadata.PackageNotFoundError:
            continue
    return ""


@dataclass(frozen=True)
class Kernel:
    """One contestant. `build` returns the launch for (problem, config, chip); `fits` says why not, or None.

    `kinds` are the kinds of chip it runs on ("cuda", "cpu"); `library` marks a baseline that klab did not write.
    """

    name: str
    problem_type: type[Problem]
    backend: str
    config_type: type[Config]
    build: Callable[[Any, Any, Chip], Launch]
    space_of: Callable[[Any, Chip], Iterator[Any]]
    default_of: Callable[[Any, Chip], Any]
    fits_in: Callable[[Any, Any, Chip], str | None]
    kinds: tuple[str, ...]
    library: bool
    path: Path
    summary: str
    requires: Package | None = None

    @property
    def id(self) -> str:
        """`operator/name`: unique in the lab."""
        return f"{self.problem_type.operator}/{self.name}"

    @property
    def source_digest(self) -> str:
        """Identity of the code: a kernel that changed is another contestant, so old results do not stand for it.

        The version of the package that an outside kernel calls is part of it.
        """
        code = source_digest(self.path)
        return digest([code, self.requires.version]) if self.requires else code

    def fits(self, problem: Problem, config: Config, chip: Chip) -> str | None:
        """None when it can run; otherwise the reason in a few words."""
        if not isinstance(problem, self.problem_type):
            return f"is for {self.problem_type.operator}, not {problem.operator}"
        if chip.kind not in self.kinds:
            return f"runs on {' and '.join(self.kinds)}, not {chip.kind}"
        return self.fits_in(problem, config, chip)

    def default(self, problem: Problem, chip: Chip) -> Config:
        """The safe configuration: one that fits wherever any does."""
        config: Config = self.default_of(problem, chip)
        return config

    def unfit(self, problem: Problem, chip: Chip) -> str | None:
        """Why this kernel cannot compete here at all (its default does not fit), or None."""
        if not isinstance(problem, self.problem_type) or chip.kind not in self.kinds:
            return self.fits(problem, NoConfig(), chip)
        return self.fits(problem, self.default(problem, chip), chip)

    def space(self, problem: Problem, chip: Chip) -> Iterator[Config]:
        """Every valid candidate, lazily; the default is always among them and comes first."""
        if self.unfit(problem, chip) is not None:
            return
        default = self.default(problem, chip)
        yield default
        for config in self.space_of(problem, chip):
            if config != default and self.fits(problem, config, chip) is None:
                yield config


def _only_default(problem: Problem, chip: Chip) -> Iterator[NoConfig]:
    yield NoConfig()


def kernel(
    problem_type: type[Problem],
    *,
    backend: str,
    config: type[Config] = NoConfig,
    space: Callable[[Any, Chip], Iterator[Any]] = _only_default,
    default: Callable[[Any, Chip], Any] | None = None,
    fits: Callable[[Any, Any, Chip], str | None] | None = None,
    kinds: tuple[str, ...] | None = None,
    library: bool = False,
    name: str | None = None,
    requires: Package | None = None,
) -> Callable[[Callable[[Any, Any, Chip], Launch]], Kernel]:
    """Make a Kernel of a build function `(problem, config, chip) -> launch`. Its docstring's first line is the kernel's summary.

    `backend` is "torch", "triton", "cuda" (CUDA C++ through CuPy), "cupy" or "cpu". `kinds` are the kinds of chip it runs on; default:
    ("cpu",) for the backend "cpu", ("cuda",) for the others. With `requires` the kernel competes only where that package is installed, and
    `klab kernels` says how to get it; its file imports the package inside the build function, never at the top.
    """

    def decorate(build: Callable[[Any, Any, Chip], Launch]) -> Kernel:
        return Kernel(
            name=name or build.__name__,
            problem_type=problem_type,
            backend=backend,
            config_type=config,
            build=build,
            space_of=space,
            default_of=default or (lambda problem, chip: config()),
            fits_in=fits or (lambda problem, config, chip: None),
            kinds=kinds or (("cpu",) if backend == "cpu" else ("cuda",)),
            library=library,
            path=Path(inspect.getfile(build)),
            summary=(build.__doc__ or "").strip().split("\n")[0],
            requires=requires,
        )

    return decorate
