"""What is watched night after night: Series, the Point that a night gives it, and the Verdict on that point."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cache
from typing import Any, Self

from klab.harness.store.result import Status
from klab.kernels.contract import Json, Record
from klab.kernels.errors import UsageError


class Role(StrEnum):
    """Which contestant of a problem is watched: the one that the profile chose, or the best library."""

    CHOSEN = "chosen"
    LIBRARY = "library"


class Metric(StrEnum):
    """What of it is watched."""

    TIME = "time"
    ENERGY = "energy"

    @property
    def unit(self) -> str:
        """Of a Point's values: microseconds or joules per launch."""
        return "us" if self is Metric.TIME else "J"


class Call(StrEnum):
    """What a night says of a series. The list is closed.

    unknown: there is no history of this epoch yet, or too little. missing: it was tracked and gave no value tonight. broken: it crashed,
    hung or was numerically wrong. suspect: beyond the limit, and not confirmed.
    """

    OK = "ok"
    FASTER = "faster"
    SUSPECT = "suspect"
    SLOWER = "slower"
    UNKNOWN = "unknown"
    MISSING = "missing"
    BROKEN = "broken"

    @property
    def fails(self) -> bool:
        """Does it fail a night?"""
        return self in (Call.SLOWER, Call.MISSING, Call.BROKEN)


@dataclass(frozen=True)
class Series(Record):
    """One curve over the nights. Its identity is the role, not the kernel: when another kernel is chosen, its curve goes on."""

    chip: str
    operator: str
    problem_key: str
    label: str
    role: str
    metric: str
    models: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """For people, and unique: "h200 matmul m16 n14336 k4096 bf16 chosen time"."""
        return " ".join((self.chip, self.operator, self.label, self.role, self.metric))

    @property
    def identity(self) -> str:
        """What two nights must share to be points of one curve."""
        return "/".join((self.chip, self.problem_key, self.role, self.metric))


@dataclass(frozen=True)
class Point(Record):
    """What a night found for a series. One entry of `values`, `anchored` and `cycles` per fresh process, in the order they were run.

    values: medians, in the metric's unit. anchored: the same over the anchor's time in the same laps (dimensionless; empty where there is
    no anchor). cycles: values times the SM clock in MHz (empty where no clock is read). `looks`: how often it was measured tonight; more
    than once where it was a suspect. `status` is ok, or what the failing trial ended with; `reason` says more of it. `night`: the identity
    of its night, which tells what was measured in the same night.
    """

    values: tuple[float, ...] = ()
    anchored: tuple[float, ...] = ()
    cycles: tuple[float, ...] = ()
    anchor: str = ""
    status: str = Status.OK.value
    reason: str = ""
    looks: int = 1
    kernel: str = ""
    config: Mapping[str, Json] = field(default_factory=dict)
    source_digest: str = ""
    device_uuid: str = ""
    epoch: str = ""
    error: float | None = None
    night: str = ""

    @property
    def value(self) -> float | None:
        """The median over the processes, or None where nothing was measured."""
        return _median(self.values)

    @property
    def anchored_value(self) -> float | None:
        """The median of the anchored values; None without an anchor."""
        return _median(self.anchored)

    @property
    def judged_value(self) -> float | None:
        """What is compared over the nights: anchored where there is an anchor, else the value."""
        return self.anchored_value if self.anchored else self.value

    @property
    def cycles_value(self) -> float | None:
        """The median of the cycles; None without a clock."""
        return _median(self.cycles)


@dataclass(frozen=True)
class Verdict(Record):
    """What is said of a series tonight, and why, in one line.

    `ratio` is the judged value over the reference, with its 95% interval; above 1 is worse. It is of tonight, or of the last `span` nights
    together where these decided. `limit` is the ratio from which on the night would have been called slower (None: not judged). `nights` is
    the number of nights that the reference rests on. `waiver` names the owner and the expiry of a waiver that covers a failing verdict (it
    then fails no night).
    """

    series: Series
    call: str
    reason: str
    point: Point | None = None
    ratio: float | None = None
    low: float | None = None
    high: float | None = None
    nights: int = 0
    new_epoch: bool = False
    waiver: str = ""
    span: int = 1
    limit: float | None = None

    @property
    def fails(self) -> bool:
        """Does it fail the night?"""
        return Call(self.call).fails and not self.waiver

    @classmethod
    def from_json(cls, data: Mapping[str, Json]) -> Self:
        """The inverse of `to_json`; UsageError for what is no verdict."""
        inside: dict[str, Any] = {"series": Series(**_known(Series, data.get("series")))}
        Metric(inside["series"].metric)
        if data.get("point") is not None:
            inside["point"] = Point(**_known(Point, data["point"]))
        return cls(**{**_known(cls, data), "call": Call(data["call"]).value, **inside})


@dataclass(frozen=True)
class Lapsed(Record):
    """A waiver of the policy that is past its last day (`expires`, ISO 8601). It fails the night whatever its series say."""

    series: str
    owner: str
    expires: str
    reason: str = ""

    @property
    def told(self) -> str:
        """What is to be done, in one line."""
        known = f" ({self.reason})" if self.reason else ""
        return f"the waiver of {self.owner} for {self.series!r}{known} expired on {self.expires}: renew it in the policy or remove it"


@dataclass(frozen=True)
class Night(Record):
    """One night on one chip: when and on what it was made, and its verdicts (each with its point).

    `at` is UTC, ISO 8601; `identity` sorts by time. `epochs`: what each epoch in the points stands for (driver, CUDA, Triton, torch, power
    limit, GPU). `devices`: per device UUID what is known of it. `notes`: lines for people (what was not measured and why). `incomplete`:
    why the measuring ended before the budget did (a device was lost), else "". `lapsed`: waivers that are past their day, which fail it.
    """

    identity: str
    at: str
    chip: str
    commit: str = ""
    dirty: bool = False
    verdicts: tuple[Verdict, ...] = ()
    epochs: Mapping[str, Json] = field(default_factory=dict)
    devices: Mapping[str, Json] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    seconds: float = 0.0
    policy: str = ""
    schema: int = 1
    incomplete: str = ""
    lapsed: tuple[Lapsed, ...] = ()

    @classmethod
    def from_json(cls, data: Mapping[str, Json]) -> Self:
        """The inverse of `to_json`; UsageError for what is no night."""
        inside = {"verdicts": tuple(Verdict.from_json(v) for v in data.get("verdicts", ()))}
        return cls(**{**_known(cls, data), **inside, "lapsed": tuple(Lapsed(**_known(Lapsed, one)) for one in data.get("lapsed", ()))})

    def points(self) -> dict[str, Point]:
        """Tonight's points by the identity of their series."""
        return {v.series.identity: v.point for v in self.verdicts if v.point is not None}


def _known(cls: type, data: Any) -> dict[str, Any]:
    """The fields of `data` as constructor arguments; UsageError for a foreign or missing one, or a value of another kind.

    A file of others is read here: what it claims must not end a night hours later.
    """
    if not isinstance(data, Mapping):
        raise UsageError(f"not a {cls.__name__}: {str(data)[:40]!r}")
    kinds, needed = _fields(cls)
    if data.keys() - kinds.keys() or needed - data.keys():
        raise UsageError(f"not a {cls.__name__}: unknown {sorted(data.keys() - kinds.keys())}, missing {sorted(needed - data.keys())}")
    return {name: _value(cls, name, kinds[name], value) for name, value in data.items()}


@cache
def _fields(cls: type) -> tuple[dict[str, str], frozenset[str]]:
    """The kinds of a class's fields by their names, and which of them must be given."""
    fields = dataclasses.fields(cls)
    needed = [f.name for f in fields if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING]
    return {f.name: str(f.type) for f in fields}, frozenset(needed)


def _value(cls: type, name: str, kind: str, value: Any) -> Any:
    if kind.startswith("tuple["):
        inside = kind.removeprefix("tuple[").partition(",")[0]
        if isinstance(value, list | tuple):
            return tuple(math.nan if inside == "float" and one is None else _value(cls, name, inside, one) for one in value)
    elif (value is None and kind.endswith(" | None")) or kind.removesuffix(" | None") not in _KINDS:
        return value  # what is not in the list is a class of its own, which looks itself
    elif isinstance(value, _KINDS[kind.removesuffix(" | None")]) and (kind == "bool" or not isinstance(value, bool)):
        return value
    raise UsageError(f"not a {cls.__name__}: {name} is {str(value)[:40]!r}")


# How JSON may hold what a field has. An infinite number was written as null.
_KINDS: dict[str, type | tuple[type, ...]] = {"str": str, "int": int, "bool": bool, "float": (int, float), "Mapping[str, Json]": Mapping}


def _median(values: Sequence[float]) -> float | None:
    kept = [v for v in values if math.isfinite(v)]
    return statistics.median(kept) if kept else None
