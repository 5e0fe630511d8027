"""Results -> tables: per shape of experts and number of tokens the best configuration that the engine's kernel was measured with."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from klab.harness.choose.candidates import Candidate
from klab.harness.choose.choose import choose, place
from klab.harness.choose.compare import ratio
from klab.harness.choose.engines.entries import entry_troubles
from klab.harness.choose.engines.names import DENSE, FIELDS, MOE, Dialect, TableName, far_off, knobs
from klab.harness.choose.engines.shapes import Shape, table_name
from klab.harness.choose.profile import Choice, Profile, Wanted
from klab.harness.choose.select import Selection
from klab.harness.choose.settle import Defaults
from klab.harness.store.result import Result, Status
from klab.harness.tune.objective import LATENCY, Objective
from klab.kernels.contract import Chip, Json, Kernel, Problem, canonical_json
from klab.kernels.errors import KlabError
from klab.kernels.fused_moe._engine_config import sglang_default, vllm_default
from klab.kernels.fused_moe.problem import FusedMoe
from klab.kernels.scaled_matmul.problem import ScaledMatmul

UNTUNED = {"vllm": vllm_default, "sglang": sglang_default}
"""What an engine runs where it finds no table."""

# Knobs that some kernels have beside a table's fields, at the value at which they do nothing.
NEUTRAL = {"SPLIT_K": 1, "SWAP_AB": False, "USE_TMA": False}
_NOTHING = object()


@dataclass(frozen=True)
class Against:
    """What the engine runs without a table, measured too: its time over the chosen configuration's (above 1, the table is faster)."""

    config: Mapping[str, Json] = field(hash=False)
    median_us: float
    ratio: float
    interval: tuple[float, float]
    how: str


@dataclass(frozen=True)
class Entry:
    """One number of tokens."""

    tokens: int
    config: Mapping[str, Json] = field(hash=False)
    choice: Choice
    untuned: Against | None


@dataclass(frozen=True)
class EngineTable:
    """A table before it is written. `problem` is its experts (or product) without the number of tokens; `skipped`: tokens -> why not.
    `filled`: tokens -> what the engine runs there without a table, for numbers that are far from every measured one.
    """

    name: TableName
    triton: str
    problem: Mapping[str, Json] = field(hash=False)
    entries: tuple[Entry, ...]
    skipped: Mapping[int, str] = field(hash=False)
    notes: tuple[str, ...] = ()
    filled: Mapping[int, Mapping[str, Json]] = field(default_factory=dict, hash=False)

    @property
    def far(self) -> dict[int, int]:
        """Usual numbers of tokens -> the far entry that the engine would take for them."""
        return far_off(tuple(sorted([*self.filled, *(entry.tokens for entry in self.entries)])))

    @property
    def speed_up(self) -> tuple[float, float, float] | None:
        """(value, low, high) of what the engine runs without a table over the table's, geometric mean over the entries; None where that was
        not measured. The bounds are those of all entries at once: errors are taken as common to them.
        """
        known = [(entry.untuned.ratio, *entry.untuned.interval) for entry in self.entries if entry.untuned]
        if not known:
            return None
        value, low, high = (math.exp(sum(math.log(one[place]) for one in known) / len(known)) for place in range(3))
        return value, low, high

    def text(self, dialect: Dialect) -> str:
        """The file, as the engine's own tuner writes it."""
        version = {"triton_version": self.triton} if self.name.kind in dialect.version_key and self.triton else {}
        configs = {**self.filled, **{entry.tokens: entry.config for entry in self.entries}}
        return json.dumps(version | {str(tokens): dict(configs[tokens]) for tokens in sorted(configs)}, indent=4) + "\n"


@dataclass(frozen=True)
class Tables:
    """What results give for an engine. `open`: names or shapes without a table, and why."""

    tables: tuple[EngineTable, ...]
    open: tuple[str, ...]
    notes: tuple[str, ...]
    device: str = ""


@dataclass(frozen=True)
class Asked:
    """What to choose by. `previous`: the standing profile, which settles ties. `triton`: only results of it (None: of the newest)."""

    objective: Objective = LATENCY
    previous: Profile | None = None
    device: str | None = None
    triton: str | None = None
    sources: Mapping[str, str] | None = field(default=None, hash=False)
    defaults: Defaults | None = None
    current_only: bool = False


def tables_of(results: Iterable[Result], dialect: Dialect, chip: Chip, shapes: Sequence[Shape], products: Sequence[tuple[int, int]],
              asked: Asked) -> Tables:  # fmt: skip
    """The tables of these shapes of experts and of these block-fp8 products [n, k] that the results of a chip hold."""
    rows = [row for row in results if row.chip == chip.name and _is_engines(row, dialect)]
    rows, notes = _one_triton(rows, {one.problem_key for group in _wanted(rows, shapes, products).values() for one in group}, asked)
    wanted = _wanted(rows, shapes, products)
    every = [one for group in wanted.values() for one in group]
    profile = choose(rows, every, asked.objective, asked.previous, chip=chip.name, device=asked.device, sources=asked.sources,
                     defaults=asked.defaults, current_only=asked.current_only)  # fmt: skip
    selection = Selection(rows, asked.objective, chip=chip.name, device=asked.device or profile.device or None, sources=asked.sources,
                          defaults=asked.defaults, current_only=asked.current_only)  # fmt: skip
    chosen = {choice.wanted.problem_key: choice for choice in profile.choices}
    refused = {one.wanted.problem_key: one.reason for one in profile.open}
    made: dict[str, EngineTable] = {}
    missing: list[str] = []
    for group in wanted.values():
        table = _table(group, chosen, refused, selection, dialect, chip, asked)
        if table is None:
            missing.append(f"{group[0].label} and the like: {refused.get(group[0].problem_key, 'no result')}")
            continue
        name = dialect.file_name(table.name)
        if name in made:  # bfloat16 and float16 share a name
            first, second = sorted((made[name], table), key=lambda t: (t.problem.get("dtype", "") != "", -len(t.entries)))
            dtype = second.problem.get("dtype", "bfloat16")
            missing.append(f"{name}: results of {dtype} have the same name, and the table is of {first.problem.get('dtype', 'bfloat16')}")
            table = first
        made[name] = table
    return Tables(tuple(made[name] for name in sorted(made)), tuple(missing), (*notes, *profile.notes), profile.device)


def with_defaults(table: EngineTable, dialect: Dialect, chip: Chip) -> EngineTable:
    """The table with what the engine runs without one at the usual numbers of tokens that are far from every measured one: an engine that
    has a table takes its nearest entry, however far. Tables of dense products, whose engines' defaults klab does not know, stay.
    """
    if table.name.kind != MOE:
        return table
    filled = {}
    for tokens in table.far:
        default = UNTUNED[dialect.engine](FusedMoe.from_json({**table.problem, "tokens": tokens})).to_json_full()
        config = {name: default[name] for name in _fields(dialect, table.name.kind)}
        if not any(severe for severe, _ in entry_troubles(tokens, config, table.name, dialect, chip)):
            filled[tokens] = config
    return replace(table, filled=filled)


def engine_kernels(kernels: Iterable[Kernel]) -> list[str]:
    """Ids of the kernels whose configurations have the fields of a table."""
    return sorted(k.id for k in kernels if set(FIELDS) <= knobs(k))


def engine_sources(kernels: Iterable[Kernel]) -> dict[str, str]:
    """The digest of the code, as it is now, of those kernels."""
    return {k.id: k.source_digest for k in kernels if set(FIELDS) <= knobs(k)}


def _fields(dialect: Dialect, kind: str) -> tuple[str, ...]:
    """What an entry is written with. Of the extras, those of experts say what klab has no kernel for."""
    return (*FIELDS, *(dialect.extras[DENSE] if kind == DENSE else ()))


def _is_engines(row: Result, dialect: Dialect) -> bool:
    """Whether a row's configuration is one that the engine's kernel can run: its fields, and nothing beside them that changes the work."""
    fp8 = row.operator == ScaledMatmul.operator and row.problem.get("format", "fp8_block") == "fp8_block"
    if row.operator != FusedMoe.operator and not fp8:
        return False
    beside = set(row.config) - set(_fields(dialect, DENSE if fp8 else MOE))
    return set(FIELDS) <= set(row.config) and all(row.config[name] == NEUTRAL.get(name, _NOTHING) for name in beside)


def _one_triton(rows: list[Result], wanted: set[str], asked: Asked) -> tuple[list[Result], list[str]]:
    """The rows of one version of Triton, and what was set aside: what is fastest differs between versions.

    The newest is that of the `wanted` problems on the device that is asked for: another model's results or another device's hide nothing.
    """
    fine = [row for row in rows if row.problem_key in wanted and row.kind == "measured" and row.status is Status.OK]
    fine = [row for row in fine if asked.device in (None, row.device)]
    newest = max((_version(row) for row in fine), key=_order, default="")
    version = asked.triton or newest
    kept = [row for row in rows if _version(row) == version or row.status is Status.INCORRECT]
    aside = [_version(row) for row in fine if _version(row) != version]
    others = ", ".join(sorted(set(aside) - {""}, key=_order)) or "V"
    here = version or "the one not stated"
    return kept, [f"{len(aside)} results of another Triton than {here} are set aside (--triton {others})"] if aside else []


def _version(row: Result) -> str:
    """The version of Triton as `triton.__version__` says it."""
    return str(row.environment.get("triton") or "")


def _order(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("+")[0].split(".") if part.isdigit())


def _wanted(rows: Iterable[Result], shapes: Sequence[Shape], products: Sequence[tuple[int, int]]) -> dict[str, list[Wanted]]:
    """What was measured of these shapes and products, by what makes a table; each table's in order of tokens."""
    asked = {_without(shape.problem, "tokens", "dtype", "format") for shape in shapes}
    found: dict[str, dict[str, Wanted]] = defaultdict(dict)
    for row in rows:
        moe = row.operator == FusedMoe.operator
        try:
            problem: FusedMoe | ScaledMatmul = (FusedMoe if moe else ScaledMatmul).from_json(row.problem)
        except (KlabError, TypeError, ValueError):  # of an older klab
            continue
        if isinstance(problem, FusedMoe):
            wanted, size = _without(problem, "tokens", "dtype", "format") in asked, "tokens"
        else:
            wanted, size = (problem.n, problem.k) in products, "m"
        if wanted:
            one = Wanted(row.problem_key, row.operator, row.problem_label, dict(row.problem))
            found[f"{row.operator} {_without(problem, size)}"][row.problem_key] = one
    return {key: sorted(group.values(), key=place) for key, group in found.items()}


def _without(problem: Problem, *names: str) -> str:
    return canonical_json({name: value for name, value in problem.to_json().items() if name not in names})


def _table(group: Sequence[Wanted], chosen: Mapping[str, Choice], refused: Mapping[str, str], selection: Selection, dialect: Dialect,
           chip: Chip, asked: Asked) -> EngineTable | None:  # fmt: skip
    choices = [chosen[one.problem_key] for one in group if one.problem_key in chosen]
    if not choices:
        return None
    device = choices[0].evidence.device
    moe = group[0].operator == FusedMoe.operator
    name = table_name(FusedMoe.from_json(group[0].problem), device) if moe else _dense_name(group[0], device)
    size = "tokens" if moe else "m"
    fields = _fields(dialect, name.kind)
    entries, skipped = [], {int(one.problem[size]): refused[one.problem_key] for one in group if one.problem_key in refused}
    for choice in choices:
        tokens = int(choice.wanted.problem[size])
        config = {field_: choice.config[field_] for field_ in fields if field_ in choice.config}
        stops = [text for severe, text in entry_troubles(tokens, config, name, dialect, chip) if severe]
        if stops:
            skipped[tokens] = f"{dialect.title} would not run it: {stops[0]}"
            continue
        entries.append(Entry(tokens, config, choice, _against(choice, selection, dialect, asked.objective) if moe else None))
    if not entries:
        return None
    entries.sort(key=lambda entry: entry.tokens)
    problem = {field_: value for field_, value in group[0].problem.items() if field_ != size}
    stale = sum(entry.choice.stale for entry in entries)
    notes = [f"{stale} entries rest on code of the kernel that has changed since (stale)"] if stale else []
    version = str(entries[0].choice.evidence.versions.get("triton", ""))
    return EngineTable(name, version, problem, tuple(entries), dict(sorted(skipped.items())), tuple(notes))


def _dense_name(one: Wanted, device: str) -> TableName:
    problem = ScaledMatmul.from_json(one.problem)
    return TableName(DENSE, device, problem.n, k=problem.k, dtype="fp8_w8a8", block=(128, 128))


def _against(choice: Choice, selection: Selection, dialect: Dialect, objective: Objective) -> Against | None:
    """The engine's own configuration beside the chosen one, where both were measured in one state."""
    default = UNTUNED[dialect.engine](FusedMoe.from_json(choice.wanted.problem)).to_json_full()
    found = selection.candidates(choice.wanted.problem_key)
    ours = _candidate(found, choice.kernel, choice.config)
    theirs = _candidate(found, choice.kernel, default)
    if ours is None or theirs is None or theirs.row.median_us is None:
        return None
    compared = ratio(theirs, ours, objective)
    return Against(default, theirs.row.median_us, compared.ratio, (compared.low, compared.high), compared.how)


def _candidate(found: Iterable[Candidate], kernel: str, config: Mapping[str, Json]) -> Candidate | None:
    return next((c for c in found if c.kernel == kernel and c.config == canonical_json(config)), None)
