"""The policy of a night, as a file that is reviewed in git: what is tracked, how it is measured and judged, and what is waived by whom."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

from klab.harness.catalog.toml_file import read_toml
from klab.harness.measure.anchor import ANCHORS
from klab.harness.plan.scenario import Scenario
from klab.harness.plan.trial import Policy
from klab.harness.watch.rule import Rule
from klab.harness.watch.series import Metric, Role
from klab.kernels.contract import Json, digest
from klab.kernels.errors import UsageError

# Policy fields that a night may set for its trials; the rest belongs to the trial's identity and stays as everywhere else.
TRIAL_FIELDS = ("l2", "launch", "warmup_ms", "min_rounds", "max_rounds", "round_ms", "target_ci", "limit_s", "energy_s", "threads")
# Scenario's fields by the names that the file has for them.
_SCENARIO = {f.name: f for f in dataclasses.fields(Scenario) if f.name != "batches"}
_TRACK = ("model", "chip", "batch", *_SCENARIO, "phase", "operators", "roles", "metrics", "profile")
_WAIVER = ("series", "owner", "expires", "reason")
_ACCEPTED = ("series", "owner", "since", "reason")
_SECTIONS = ("track", "measure", "rule", "waiver", "accept", "history")


@dataclass(frozen=True)
class Track:
    """A model on a chip, whose problems are watched. `scenario` holds the fields of a Scenario that differ from the chip's default;
    `phase` and `operators` narrow it; `profile` is the file of the chosen pack (empty: profiles/tuned/CHIP/MODEL.json)."""

    model: str
    chip: str
    scenario: Mapping[str, object] = field(default_factory=dict)
    phase: str = ""
    operators: tuple[str, ...] = ()
    roles: tuple[str, ...] = tuple(role.value for role in Role)
    metrics: tuple[str, ...] = tuple(metric.value for metric in Metric)
    profile: str = ""

    def to_json(self) -> dict[str, Json]:
        """For the policy's digest."""
        return {name: list(v) if isinstance(v, tuple) else v for name, v in dataclasses.asdict(self).items()}


@dataclass(frozen=True)
class Measure:
    """How a night measures. `processes`: fresh processes per look at a time, `energy_processes` at an energy. `budget`: time for all,
    as --budget has it; empty: until done. `recheck_share`: of the budget, kept for measuring suspects again (a guess). `anchors`: of
    measure/anchor.py. `device`: UUID or index of the GPU to use; empty: the one that was used last, else the first. `trial`: fields of a
    trial's Policy that differ from the default of its kind of chip.
    """

    processes: int = 5
    energy_processes: int = 2
    budget: str = ""
    recheck_share: float = 0.25
    anchors: tuple[str, ...] = ("matmul", "copy")
    device: str = ""
    trial: Mapping[str, Json] = field(default_factory=dict)


@dataclass(frozen=True)
class Waiver:
    """Whose name stands for it that the failing verdicts of some series fail no night until (and on) a day. After it, the waiver fails
    every night itself."""

    series: str
    owner: str
    expires: date
    reason: str = ""

    def expired(self, today: date) -> bool:
        """Is its last day over?"""
        return today > self.expires

    @property
    def label(self) -> str:
        """`waived by ann until 2026-12-31: reason`."""
        return f"waived by {self.owner} until {self.expires}{f': {self.reason}' if self.reason else ''}"


@dataclass(frozen=True)
class Accepted:
    """Whose name stands for it that some series have a new level: nights before `since` are no baseline any more.

    since: a day, or a moment in UTC ("2026-12-01", "2026-12-01T02:00:00Z"); it compares with a night's `at`.
    """

    series: str
    owner: str
    since: str
    reason: str = ""


@dataclass(frozen=True)
class NightPolicy:
    """What `ci/policy.toml` says. `history`: the folder of the nights, empty where the file names none."""

    tracks: tuple[Track, ...]
    measure: Measure = field(default_factory=Measure)
    rule: Rule = field(default_factory=Rule)
    waivers: tuple[Waiver, ...] = ()
    accepted: tuple[Accepted, ...] = ()
    history: str = ""
    path: Path | None = None

    def tracks_of(self, chip: str) -> tuple[Track, ...]:
        """Those on one chip; UsageError, naming the chips that there are, when there is none."""
        found = tuple(track for track in self.tracks if track.chip == chip)
        if not found:
            chips = ", ".join(dict.fromkeys(track.chip for track in self.tracks)) or "no chip"
            raise UsageError(f"{self.path or 'the policy'} tracks nothing on {chip} (it has {chips}): add a [[track]] with chip = {chip!r}")
        return found

    def digest(self, chip: str) -> str:
        """Identity of what is tracked on a chip: with an equal one, a series that is gone is missing and was not taken off the list."""
        return digest([track.to_json() for track in self.tracks if track.chip == chip])


def without_energy(policy: NightPolicy) -> NightPolicy:
    """The same, watching times alone."""
    tracks = [dataclasses.replace(t, metrics=tuple(m for m in t.metrics if m != Metric.ENERGY)) for t in policy.tracks]
    return dataclasses.replace(policy, tracks=tuple(track for track in tracks if track.metrics))


def read_policy(path: Path | str) -> NightPolicy:
    """The policy in a TOML file. UsageError names the table and the key of what is unknown, missing or no value of its kind."""
    path = Path(path)
    data = read_toml(path)
    _only(f"{path}", data, _SECTIONS)
    tracks = [t for at, table in enumerate(_tables(path, data, "track"), 1) for t in _tracks(path.parent, f"{path}: track {at}", table)]
    if not tracks:
        raise UsageError(f"{path} tracks nothing: add a [[track]] with a model and a chip")
    history = _table(f"{path}: history", data.get("history", {}))
    _only(f"{path}: history", history, ("folder",))
    return NightPolicy(
        tracks=tuple(tracks),
        measure=_measure(f"{path}: measure", data.get("measure", {})),
        rule=_rule(f"{path}: rule", data.get("rule", {})),
        waivers=tuple(_waiver(f"{path}: waiver {at}", table) for at, table in enumerate(_tables(path, data, "waiver"), 1)),
        accepted=tuple(_accepted(f"{path}: accept {at}", table) for at, table in enumerate(_tables(path, data, "accept"), 1)),
        history=_text(f"{path}: history", history, "folder", ""),
        path=path,
    )


def _tracks(folder: Path, where: str, table: Any) -> list[Track]:
    """One per chip that the table names; `folder` is the policy's."""
    table = _table(where, table)
    _only(where, table, _TRACK)
    _needs(where, table, ("model", "chip"))
    model = _text(where, table, "model")
    scenario: dict[str, object] = {}
    for name, known in _SCENARIO.items():
        if name in table:
            scenario[name] = _value(where, name, table[name], type(known.default))
    if "batch" in table:
        given = table["batch"] if isinstance(table["batch"], list) else [table["batch"]]
        if not given or not all(isinstance(one, int) and not isinstance(one, bool) and one >= 1 for one in given):
            raise UsageError(f"{where}: batch is a list of whole numbers from 1, not {table['batch']!r}")
        scenario["batches"] = tuple(given)
    try:
        Scenario(**scenario)  # type: ignore[arg-type]
    except UsageError as error:
        raise UsageError(f"{where}: {error}") from None
    profile = _text(where, table, "profile", "")
    return [
        Track(
            model=_near(folder, model),
            chip=chip.strip().lower(),
            scenario=scenario,
            phase=_text(where, table, "phase", ""),
            operators=_texts(where, table, "operators"),
            roles=_of(where, table, "roles", tuple(role.value for role in Role)),
            metrics=_of(where, table, "metrics", tuple(metric.value for metric in Metric)),
            profile=_near(folder, profile),
        )
        for chip in _texts(where, table, "chip")
    ]


def _near(folder: Path, name: str) -> str:
    """The path of a file in the policy's folder; any other name as it is."""
    near = folder / name
    return str(near) if name.endswith(".json") and near.is_file() else name


def _measure(where: str, table: Any) -> Measure:
    table = _table(where, table)
    own = {f.name: f for f in dataclasses.fields(Measure) if f.name != "trial"}
    _only(where, table, (*own, *TRIAL_FIELDS))
    given: dict[str, Any] = {}
    for name in own:
        if name in table:
            default = getattr(Measure(), name)
            given[name] = _texts(where, table, name) if isinstance(default, tuple) else _value(where, name, table[name], type(default))
    found = Measure(**given, trial={n: _value(where, n, table[n], type(getattr(Policy(), n))) for n in TRIAL_FIELDS if n in table})
    for name in ("processes", "energy_processes"):
        if not 1 <= getattr(found, name) <= 100:
            raise UsageError(f"{where}: {name} is a number of processes, 1 to 100, not {getattr(found, name)}")
    if unknown := sorted(set(found.anchors) - set(ANCHORS)):
        raise UsageError(f"{where}: anchors are of {', '.join(ANCHORS)}, not {', '.join(unknown)}")
    if not 0 <= found.recheck_share <= 0.9:
        raise UsageError(f"{where}: recheck_share is a share of the budget, 0 to 0.9, not {found.recheck_share:g}")
    if found.budget and not re.fullmatch(r"\s*\d+(\.\d+)?\s*[smh]?\s*", found.budget):
        raise UsageError(f"{where}: budget {found.budget!r} is not a time; write 90s, 8m or 1.5h")
    return found


def _rule(where: str, table: Any) -> Rule:
    table = _table(where, table)
    known = {f.name: f for f in dataclasses.fields(Rule)}
    _only(where, table, tuple(known))
    default = Rule()
    try:
        return Rule(**{name: _value(where, name, value, type(getattr(default, name))) for name, value in table.items()})
    except UsageError as error:
        raise UsageError(f"{where}: {str(error).removeprefix('rule: ')}") from None


def _waiver(where: str, table: Any) -> Waiver:
    table = _table(where, table)
    _only(where, table, _WAIVER)
    _needs(where, table, ("series", "owner", "expires"))
    words = (_text(where, table, "series"), _text(where, table, "owner"))
    return Waiver(*words, _date(where, table, "expires"), _text(where, table, "reason", ""))


def _accepted(where: str, table: Any) -> Accepted:
    table = _table(where, table)
    _only(where, table, _ACCEPTED)
    _needs(where, table, ("series", "owner", "since"))
    words = (_text(where, table, "series"), _text(where, table, "owner"))
    since = table["since"]
    if isinstance(since, str) and "T" in since:
        try:
            since = datetime.fromisoformat(since)
        except ValueError:
            raise UsageError(f"{where}: since is a day or a moment, such as 2027-01-31 or 2027-01-31T02:00:00Z, not {since!r}") from None
    if isinstance(since, datetime):
        moment = since.replace(tzinfo=since.tzinfo or UTC).astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    else:
        moment = str(_date(where, table, "since"))
    return Accepted(*words, moment, _text(where, table, "reason", ""))


def _tables(path: Path, data: Mapping[str, Any], name: str) -> Sequence[Any]:
    found = data.get(name, [])
    if not isinstance(found, list):
        raise UsageError(f"{path}: {name} is a list of tables; write [[{name}]] with two brackets")
    return found


def _table(where: str, given: Any) -> Mapping[str, Any]:
    if not isinstance(given, Mapping):
        raise UsageError(f"{where} is a table, not {str(given)[:40]!r}")
    return given


def _only(where: str, table: Mapping[str, Any], known: Sequence[str]) -> None:
    unknown = sorted(set(table) - set(known))
    if unknown:
        raise UsageError(f"{where}: unknown key {', '.join(unknown)}; it has {', '.join(known)}")


def _needs(where: str, table: Mapping[str, Any], names: Sequence[str]) -> None:
    missing = [name for name in names if name not in table]
    if missing:
        raise UsageError(f"{where} lacks {', '.join(missing)}")


def _text(where: str, table: Mapping[str, Any], name: str, default: str | None = None) -> str:
    """A text that is not empty, unless it may be left out."""
    value = table.get(name, default)
    if not isinstance(value, str) or (default is None and not value.strip()):
        raise UsageError(f"{where}: {name} is a text, not {value!r}")
    return value.strip()


def _texts(where: str, table: Mapping[str, Any], name: str) -> tuple[str, ...]:
    given = table.get(name, [])
    given = [given] if isinstance(given, str) else given
    if not isinstance(given, list) or not all(isinstance(one, str) and one.strip() for one in given):
        raise UsageError(f"{where}: {name} is a text or a list of texts, not {table.get(name)!r}")
    if name == "chip" and not given:
        raise UsageError(f"{where}: chip names no chip")
    return tuple(given)


def _of(where: str, table: Mapping[str, Any], name: str, known: tuple[str, ...]) -> tuple[str, ...]:
    given = _texts(where, table, name) if name in table else known
    if not given or set(given) - set(known):
        raise UsageError(f"{where}: {name} are of {', '.join(known)}, not {table[name]!r}")
    return given


def _date(where: str, table: Mapping[str, Any], name: str) -> date:
    value = table[name]
    if isinstance(value, str):
        try:
            value = date.fromisoformat(value)
        except ValueError:
            value = None
    if not isinstance(value, date) or isinstance(value, datetime):
        raise UsageError(f"{where}: {name} is a day that there is, such as {name} = 2027-01-31, not {str(table[name])!r}")
    return value


def _value(where: str, name: str, value: Any, kind: type) -> Any:
    """A value of the kind that a field's default has; a whole number is a number too."""
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if kind is tuple and isinstance(value, list):
        value = tuple(value)
    right = isinstance(value, kind) and (kind is bool or not isinstance(value, bool))
    if not right or (isinstance(value, float) and not math.isfinite(value)):
        said = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}.get(kind, f"a {kind.__name__}")
        raise UsageError(f"{where}: {name} is {said}, not {value!r}")
    return value
