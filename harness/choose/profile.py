"""Profile: the chosen pack for a model, a chip and an objective, with the evidence. A text that is reviewed in git."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from klab.harness.store.paths import checkout
from klab.kernels.contract import Json, canonical_json
from klab.kernels.errors import CannotMeasure, UsageError

SCHEMA = 1
# Six digits: below the resolution of any clock used here, and enough that a printed interval is the computed one.
DIGITS = 6
WIDTH = 140


@dataclass(frozen=True)
class Use:
    """Where a problem occurs: in which step, as what, how often, and its share of the step's time (of what has a choice)."""

    phase: str
    batch: int
    role: str
    count: int
    share: float | None = None


@dataclass(frozen=True)
class Wanted:
    """A problem that a choice is asked for, and where it occurs."""

    problem_key: str
    operator: str
    label: str
    problem: Mapping[str, Json]
    uses: tuple[Use, ...] = ()


@dataclass(frozen=True)
class Rival:
    """Another candidate beside the chosen one. `ratio` is its value over the chosen one's: above 1, the chosen one is better.

    `how` it was compared: "same rounds", "same baseline", "separate" or "separate, corrected" (see `compare.Ratio`).
    """

    kernel: str
    config: Mapping[str, Json]
    median_us: float
    ratio: float
    ratio_interval: tuple[float, float]
    how: str
    energy_j: float | None = None


@dataclass(frozen=True)
class Evidence:
    """Why a choice stands. Intervals are 95%. `settled_by`: "alone", "energy", "latency", "previous choice", "simplicity"
    or "final" (a final of `klab tune` decided; `final_reason` is what it said). `wide_error`: distance from the unquantised output.
    `measured_us`: the median as it was measured, where `median_us` is corrected for the device that it was taken on.

    `tied` are the others that could not be told apart (`tied_count` of them, the nearest listed). `library` is the best library
    kernel; `library_reason` says why there is none to compare with. `default` is the chosen kernel in its default configuration;
    `default_reason` says why it is not compared with (empty in profiles that are older than this field).
    """

    median_us: float
    interval_us: tuple[float, float]
    samples: int
    l2_state: str
    launch_mode: str
    error: float | None
    tolerance: float | None
    candidates: int
    settled_by: str
    runner_up: Rival | None
    tied_count: int
    tied: tuple[Rival, ...]
    library: Rival | None
    library_reason: str
    energy_j: float | None
    energy_interval_j: tuple[float, float] | None
    energy_reason: str
    power_w: float | None
    sm_clock_mhz: float | None
    device: str
    epoch: str
    run_ids: tuple[str, ...]
    recorded_at: str
    versions: Mapping[str, Json] = field(default_factory=dict)
    final_reason: str = ""
    wide_error: float | None = None
    measured_us: float | None = None
    default: Rival | None = None
    default_reason: str = ""


@dataclass(frozen=True)
class Choice:
    """The kernel and configuration for one problem. `stale`: the kernel's code has changed since it was measured.

    `instead` is the label of the problem in a narrower format that is run in place of the wanted one (`instead_problem`: its fields), and
    empty where nothing is given up; `evidence.wide_error` is what it costs in accuracy.
    """

    wanted: Wanted
    kernel: str
    backend: str
    library: bool
    config: Mapping[str, Json]
    source_digest: str
    stale: bool
    evidence: Evidence
    instead: str = ""
    instead_problem: Mapping[str, Json] = field(default_factory=dict)


@dataclass(frozen=True)
class Open:
    """A problem without a choice, and why."""

    wanted: Wanted
    reason: str


@dataclass(frozen=True)
class StepTime:
    """One step of the model: the chosen kernels' time, counted as the plan counts them, and how many of its problems have no choice.

    `library_us` is the same sum with the best library for each problem, or null where some problem has none. Work that klab has no
    kernels for is not in it: `modelled_share` is the share of the step's roofline time that the plan's problems stand for.
    """

    phase: str
    batch: int
    us: float
    library_us: float | None
    open: int
    modelled_share: float | None = None


@dataclass(frozen=True)
class Profile:
    """What to run where. `notes` tell what a reader must know (rows set aside, mixed epochs, stale code). `limits` is the chip that the
    kernels were built for, so that `klab.kernels.apply` needs this file alone.
    """

    chip: str
    objective: str
    model: str = ""
    scenario: Mapping[str, Json] = field(default_factory=dict)
    device: str = ""
    steps: tuple[StepTime, ...] = ()
    choices: tuple[Choice, ...] = ()
    open: tuple[Open, ...] = ()
    notes: tuple[str, ...] = ()
    limits: Mapping[str, Json] = field(default_factory=dict)
    schema: int = SCHEMA

    def chosen(self, problem_key: str) -> tuple[str, str] | None:
        """(kernel, canonical JSON of the configuration) for a problem, or None."""
        for choice in self.choices:
            if choice.wanted.problem_key == problem_key:
                return choice.kernel, canonical_json(choice.config)
        return None

    def to_text(self) -> str:
        """JSON in a fixed order with rounded numbers: the same choice gives the same bytes."""
        return _text(_plain(self)) + "\n"

    @classmethod
    def from_text(cls, text: str, where: str = "profile") -> Profile:
        """The inverse of `to_text`; UsageError when the text is something else."""
        try:
            data = json.loads(text)
            schema = data["schema"]
            if schema != SCHEMA:
                raise UsageError(f"{where} has schema {schema}; this klab reads {SCHEMA}: update klab, or choose anew")
            choices = tuple(_choice(c) for c in data["choices"])
            unsolved = tuple(Open(_wanted(o["wanted"]), o["reason"]) for o in data["open"])
            steps = tuple(StepTime(**step) for step in data["steps"])
            return cls(**data | {"steps": steps, "choices": choices, "open": unsolved, "notes": tuple(data["notes"])})
        except (ValueError, KeyError, TypeError, AttributeError):
            raise UsageError(f"{where} is not a profile that klab wrote: delete it, or name another file with --out") from None


def profile_path(chip: str, model: str, objective: str = "latency") -> Path:
    """profiles/tuned/<chip>/<model>.json of the checkout (or of ./klab-profiles); another objective than latency is in the name."""
    root = checkout()
    folder = (root / "profiles" if root else Path("klab-profiles")) / "tuned" / chip
    return folder / f"{model}{'' if objective == 'latency' else f'.{objective}'}.json"


def read_profile(path: Path) -> Profile | None:
    """The profile in a file, or None when there is no such file; UsageError when it is something else."""
    try:
        text = path.read_text()
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read {path}: {getattr(error, 'strerror', None) or 'not text'}") from None
    return Profile.from_text(text, str(path))


def write_text(path: Path, text: str) -> None:
    """Replace a file as a whole: a reader sees the old text or the new one. CannotMeasure when the disk does not take it."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with part.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        with suppress(OSError):  # where there is no folder, there is no part either
            part.unlink()
        raise CannotMeasure(f"cannot write {path} ({error.strerror or error}): free space, or name another file with --out") from None


def _plain(value: Any) -> Json:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: _plain(getattr(value, f.name)) for f in sorted(dataclasses.fields(value), key=lambda f: f.name != "schema")}
    if isinstance(value, Mapping):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return float(f"{value:.{DIGITS}g}") if isinstance(value, float) else value


def _text(value: Json, depth: int = 0) -> str:
    """JSON for reading a difference: what fits in a line is in one, and so are lists of numbers."""
    line = json.dumps(value, allow_nan=False)
    flat = isinstance(value, list) and not any(isinstance(item, list | dict) for item in value)
    if depth and (flat or not isinstance(value, list | dict) or len(line) <= WIDTH - depth):
        return line
    inner = " " * (depth + 1)
    if isinstance(value, dict):
        parts = [f"{inner}{json.dumps(name)}: {_text(item, depth + 1)}" for name, item in value.items()]
        return "{\n" + ",\n".join(parts) + "\n" + " " * depth + "}"
    return "[\n" + ",\n".join(inner + _text(item, depth + 1) for item in value) + "\n" + " " * depth + "]"


def _wanted(data: dict[str, Any]) -> Wanted:
    return Wanted(**data | {"uses": tuple(Use(**use) for use in data["uses"])})


def _rival(data: dict[str, Any] | None) -> Rival | None:
    return None if data is None else Rival(**data | {"ratio_interval": tuple(data["ratio_interval"])})


def _choice(data: dict[str, Any]) -> Choice:
    e = data["evidence"]
    joules = e["energy_interval_j"]
    evidence = Evidence(
        **e
        | {
            "interval_us": tuple(e["interval_us"]),
            "energy_interval_j": None if joules is None else tuple(joules),
            "runner_up": _rival(e["runner_up"]),
            "library": _rival(e["library"]),
            "default": _rival(e.get("default")),
            "tied": tuple(r for r in map(_rival, e["tied"]) if r is not None),
            "run_ids": tuple(e["run_ids"]),
        }
    )
    return Choice(**data | {"wanted": _wanted(data["wanted"]), "evidence": evidence})
