"""Where problems occur: in which model of the catalog, in which phase, at which batch, as what and how often per step."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import klab.harness.catalog
import klab.harness.plan
import klab.kernels
from klab.harness.catalog import Model, find_chip, load_models
from klab.harness.catalog.models import PROFILES
from klab.harness.choose.profile import Wanted
from klab.harness.plan import Plan, Scenario, plan
from klab.harness.plan.scenario import PLANNED_DTYPES
from klab.harness.report.subject import Occurrence
from klab.kernels.contract import Chip, Json, canonical_json, digest
from klab.kernels.disk_cache import DiskCache, cache_root
from klab.kernels.errors import KlabError

Places = dict[str, tuple[Occurrence, ...]]

TENSOR_PARALLEL = (1, 2, 4, 8)
LARGEST_BATCH = 1024
# A step is planned in about 1 ms, and all of this must stay well below two seconds. What is asked for most often comes first.
MOST_STEPS = 600
MOST_LENGTHS, MOST_BATCHES = 8, 8
# Fields that the number of tokens decides, in every operator; the others belong to the model.
TOKENS = frozenset(
    {"m", "rows", "tokens", "batch", "frames", "q_lens", "kv_lens", "seq_lens", "prefix_lens", "kv_tokens", "q_len", "kv_len"}
)
CONTEXTS = ("kv_lens", "q_lens", "seq_lens", "kv_len")
PHASES = {
    **dict.fromkeys(("prefill_attention", "conv1d"), "prefill"),
    **dict.fromkeys(("decode_attention", "latent_attention", "sampling"), "decode"),
}


def places_of(problems: Iterable[Wanted], plans: Mapping[str, Plan], wide: Mapping[str, str] | None = None) -> Places:
    """By problem key, where a problem occurs: exactly, by its key, in these plans and in plans of the catalog's models.

    The catalog's models are planned on one to eight GPUs, at batches that are powers of two and at the lengths that the problems have
    (at most MOST_STEPS steps, those first whose shapes match most problems). wide: by key, the problem that one in a narrower format
    approximates; it occurs where that does. A problem of no model has one Occurrence without a model where its operator tells the phase,
    else none.
    """
    wanted = {one.problem_key: one for one in problems}
    given = wide or {}
    asked = wanted.keys() | {given[key] for key in wanted if key in given}
    found: dict[str, dict[Occurrence, None]] = defaultdict(dict)
    for given_plan in plans.values():
        _add(found, given_plan, asked)
    for key, listed in _of_catalog(wanted, asked).items():
        found[key] |= dict.fromkeys(listed)
    places: Places = {}
    for key, one in wanted.items():
        there = found.get(key) or found.get(given.get(key, "")) or {}
        phase = PHASES.get(one.operator)
        places[key] = tuple(there) or ((Occurrence("", phase, 0, "", 0),) if phase else ())
    return {key: listed for key, listed in places.items() if listed}


def _add(found: dict[str, dict[Occurrence, None]], planned: Plan, asked: Iterable[str]) -> None:
    """What is there already stays, with the options that led to it."""
    keys = asked if isinstance(asked, set | frozenset) else set(asked)
    options = options_of(planned)
    for row in planned.rows:
        if row.problem is not None and row.problem.key in keys:
            found[row.problem.key].setdefault(Occurrence(planned.model.name, row.phase, row.batch, row.role, row.count, options))


def options_of(planned: Plan) -> str:
    """The options of `klab measure` and the other verbs that plan, by which the steps of this plan are planned again on any chip."""
    scenario, usual = planned.scenario, Scenario()
    words = f"--isl {scenario.isl} --osl {scenario.osl} --dtype {planned.dtype}{f' --tp {scenario.tp}' if scenario.tp != 1 else ''}"
    further = {one.name for one in dataclasses.fields(Scenario)} - {"isl", "osl", "batches", "tp", "dtype"}
    return words + "".join(
        f" --with {name}={value}" for name in sorted(further) if (value := getattr(scenario, name)) != getattr(usual, name)
    )


def _of_catalog(wanted: Mapping[str, Wanted], asked: Iterable[str]) -> dict[str, list[Occurrence]]:
    """From the cache where these problems were asked for before with the same catalog and the same code of the plan."""
    keys = sorted(asked)
    cache = DiskCache(cache_root() / "places")
    form = [one.name for one in dataclasses.fields(Occurrence)]
    name = digest(
        {
            "problems": keys,
            "code": _code(),
            "form": form,
            "bounds": [MOST_STEPS, MOST_LENGTHS, MOST_BATCHES, LARGEST_BATCH, *TENSOR_PARALLEL],
        }
    )
    kept = cache.get(name)
    if kept is not None:
        return {key: [Occurrence(*values) for values in listed] for key, listed in json.loads(kept).items()}
    found = _computed(wanted, set(keys))
    cache.put(name, json.dumps({key: [dataclasses.astuple(one) for one in listed] for key, listed in found.items()}).encode())
    return found


def _code() -> str:
    """The digest of everything that a plan of the catalog depends on: its models and chips, and the code of plan, catalog and problems."""
    rooms = [Path(room.__path__[0]) for room in (klab.harness.plan, klab.harness.catalog)]
    files = [path for room in rooms for path in room.glob("*.py")]
    kernels = Path(klab.kernels.__path__[0])
    files += [*kernels.glob("*.py"), *kernels.glob("*/problem.py"), *(PROFILES / "models").glob("*.json"), *(PROFILES / "chips").glob("*")]
    summed = hashlib.sha256()
    for path in sorted(path for path in files if path.is_file()):
        summed.update(f"{path.parent.name}/{path.name}\0".encode() + path.read_bytes() + b"\0")
    return summed.hexdigest()


def _computed(wanted: Mapping[str, Wanted], asked: set[str]) -> dict[str, list[Occurrence]]:
    shapes = Counter(_shape(one.operator, one.problem) for one in wanted.values())
    lengths, batches = _lengths(wanted.values()), _batches(wanted.values())
    dtypes = {str(one.problem.get("dtype", "bfloat16")) for one in wanted.values()} & set(PLANNED_DTYPES)
    chip = find_chip("h200")
    matches = []
    for model in load_models():
        for tp in TENSOR_PARALLEL:
            for dtype in sorted(dtypes):
                planned = _planned(model, chip, Scenario(isl=2, osl=1, batches=(1,), tp=tp, dtype=dtype))
                own = {_shape(p.operator, p.to_json()) for p in planned.problems()} if planned else set()
                if matching := sum(shapes[shape] for shape in own):
                    matches.append((-matching, tp, model.name, dtype, model))
    found: dict[str, dict[Occurrence, None]] = defaultdict(dict)
    steps = 0
    for _, tp, _, dtype, model in sorted(matches, key=lambda match: match[:4]):
        for length in _within(model, lengths):
            if steps >= MOST_STEPS:
                break
            one = _planned(model, chip, Scenario(isl=length, osl=1, batches=batches, tp=tp, dtype=dtype))
            if one is not None:
                steps += len(one.steps)
                _add(found, one, asked)
    return {key: list(listed) for key, listed in found.items()}


def _planned(model: Model, chip: Chip, scenario: Scenario) -> Plan | None:
    """None where the model cannot be split so, or has no such step."""
    try:
        return plan(model, chip, scenario)
    except KlabError:
        return None


def _within(model: Model, lengths: Sequence[int]) -> Iterator[int]:
    """A diffusion transformer has one usual number of tokens, and an encoder no more than it can read."""
    if model.kind == "diffusion_transformer":
        yield model.default_tokens
    else:
        yield from (length for length in lengths if not model.max_tokens or length <= model.max_tokens)


def _shape(operator: str, problem: Mapping[str, Json]) -> str:
    """What a problem has of its model, apart from the number of tokens."""
    return operator + canonical_json({name: value for name, value in problem.items() if name not in TOKENS})


def _lengths(problems: Iterable[Wanted]) -> list[int]:
    """The lengths to plan: contexts and prompts that most problems have, with the tokens of large launches behind them."""
    plain: Counter[int] = Counter()
    rows: Counter[int] = Counter()
    for one in problems:
        plain.update({value for name in CONTEXTS for value in set(_numbers(one.problem.get(name)))})
        rows.update({value for name in ("m", "rows", "tokens") for value in _numbers(one.problem.get(name)) if value >= 128})
    ordered = [value for counted in (plain, rows) for value, _ in sorted(counted.items(), key=lambda item: (-item[1], item[0]))]
    return list(dict.fromkeys(ordered))[:MOST_LENGTHS] or [1]


def _batches(problems: Iterable[Wanted]) -> tuple[int, ...]:
    """Powers of two that occur as a number of sequences or rows, those of most problems first."""
    counted: Counter[int] = Counter()
    for one in problems:
        sizes = {value for name in ("m", "rows", "tokens", "batch") for value in _numbers(one.problem.get(name))}
        sizes |= {len(lens) for name in ("kv_lens", "seq_lens") if isinstance(lens := one.problem.get(name), list | tuple)}
        counted.update(size for size in sizes if 0 < size <= LARGEST_BATCH and size & (size - 1) == 0)
    ordered = sorted(counted, key=lambda size: (-counted[size], size))
    return tuple(sorted(ordered[:MOST_BATCHES]))


def _numbers(value: Json) -> list[int]:
    return [v for v in (value if isinstance(value, list | tuple) else [value]) if isinstance(v, int) and not isinstance(v, bool) and v > 0]
