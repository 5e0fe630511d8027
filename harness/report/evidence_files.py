"""What is made of a chip's recorded rows for others to use: packs, the tables of serving engines, recorded spaces."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from klab.harness.catalog import find_model
from klab.harness.catalog.architecture import Model
from klab.harness.choose.choose import Finals
from klab.harness.choose.decide import decide, defaults_of
from klab.harness.choose.engines import DIALECTS
from klab.harness.choose.engines.advice import gaps, missing, products_of, to_measure
from klab.harness.choose.engines.lint import BREAKS, NEVER, Expected, lint
from klab.harness.choose.engines.names import Dialect
from klab.harness.choose.engines.shapes import experts_of, shapes_of
from klab.harness.choose.engines.tables import Asked, EngineTable, engine_sources, tables_of, with_defaults
from klab.harness.choose.engines.writing import targets, write
from klab.harness.choose.profile import Profile, profile_path, read_profile, write_text
from klab.harness.plan import plan, scenario_for
from klab.harness.plan.rows import Plan
from klab.harness.store.paths import checkout
from klab.harness.store.result import Result
from klab.harness.tune.replay.export import Recordings, export
from klab.harness.tune.replay.files import ENDING, write_space
from klab.kernels.contract import Chip
from klab.kernels.discover import Catalogue
from klab.kernels.errors import KlabError, UsageError


@dataclass(frozen=True)
class Served:
    """A model as it is served: `text` as it was asked for ("llama-3.1-70b@4")."""

    text: str
    model: Model
    plan: Plan

    @property
    def name(self) -> str:
        """The pack's name: another number of GPUs than one, and a format, are in it."""
        _, _, quantization = self.text.partition("+")
        tp = self.plan.scenario.tp
        return self.model.name + (f".tp{tp}" if tp > 1 else "") + (f".{quantization}" if quantization else "")


def served(text: str, chip: Chip) -> Served:
    """`name`, `name@4`, `name@4+fp8_block`. UsageError for anything else."""
    before, _, quantization = text.partition("+")
    name, _, tp = before.partition("@")
    if tp and not tp.isdecimal():
        raise UsageError(f"--model {text}: write name@4 for tensor parallelism over 4, name@4+fp8_block for a format too")
    model = find_model(name)
    scenario = scenario_for(model, chip, tp=int(tp) if tp else None, quantization=quantization or None)
    return Served(text, model, plan(model, chip, scenario))


def pack_path(one: Served, chip: Chip, folder: Path) -> Path:
    """profiles/tuned/CHIP/NAME.json of the checkout for rows that lie in its results, else packs/NAME.json beside the rows."""
    root = checkout()
    if root is not None and folder.resolve().is_relative_to((root / "results").resolve()):
        return profile_path(chip.name, one.name)
    return folder / "packs" / f"{one.name}.json"


def packs(
    models: Sequence[Served], rows: Sequence[Result], chip: Chip, catalogue: Catalogue, finals: Finals, folder: Path
) -> tuple[dict[str, Profile], list[Path], list[str]]:
    """The profiles by name, the files they went to, and a line for each."""
    made: dict[str, Profile] = {}
    paths, lines = [], []
    for one in models:
        path = pack_path(one, chip, folder)
        profile = decide(rows, one.plan, chip.name, catalogue=catalogue, previous=read_profile(path), limits=chip, finals=finals)
        made[one.name] = profile
        count = f"{len(profile.choices)} of {len(profile.choices) + len(profile.open)} problems"
        if not profile.choices:
            lines.append(f"no pack for {one.name}: none of its problems has a verified result")
            continue
        write_text(path, profile.to_text())
        paths.append(path)
        lines.append(f"pack {one.name}: {count} have a kernel")
    return made, paths, lines


def tables(
    models: Iterable[Served], rows: Sequence[Result], chip: Chip, catalogue: Catalogue, folder: Path
) -> tuple[list[Path], list[str]]:
    """The engines' tables of the models' experts below engines/, and lines: what was written or why not, and what lint finds."""
    if chip.kind != "cuda":
        return [], [f"no engines' tables: they are for GPUs, and {chip.title} is none"]
    paths, lines = [], []
    with_experts = {one.model.name: one for one in models if experts_of(one.model)}
    if not with_experts:
        return [], ["no engines' tables: none of these models has routed experts"]
    for dialect in DIALECTS.values():
        out = folder / "engines" / dialect.engine
        for one in with_experts.values():
            found, said = _tables(one.model, dialect, rows, chip, catalogue, out)
            paths += found
            lines += said
        if out.is_dir():
            bad = [f for f in lint(out, dialect, Expected(chip=chip)) if f.level in (NEVER, BREAKS)]
            lines += [f"{dialect.title}: {f.file}: {f.text}" for f in bad] or [f"{dialect.title}: klab lint-tuned finds nothing wrong"]
    return paths, lines


def _tables(
    model: Model, dialect: Dialect, rows: Sequence[Result], chip: Chip, catalogue: Catalogue, out: Path
) -> tuple[list[Path], list[str]]:
    asked = Asked(sources=engine_sources(catalogue.kernels.values()), defaults=defaults_of(catalogue, chip))
    found = tables_of(rows, dialect, chip, list(shapes_of(model)), products_of(model, chip, None), asked)
    filled = [with_defaults(one, dialect, chip) for one in found.tables]
    whole = [one for one in filled if not one.far]
    lines = [f"{dialect.title}: {gaps(one, dialect, model, chip)}" for one in filled if one.far]
    if not whole:
        return [], lines or [f"{dialect.title}: no table: {missing(found, dialect, model, chip, catalogue.kernels.values())}"]
    try:
        planned = targets(whole, dialect, out)
        write(planned, dialect, {"model": model.name, "chip": chip.name, "device": found.device, "objective": "latency"})
    except UsageError as error:
        return [], [*lines, f"{dialect.title}: {error}"]
    return [one.path for one in planned], [
        *lines,
        *(f"{dialect.title}: {one.path.name}, {_covers(one.table, model, chip)}" for one in planned),
    ]


def _covers(table: EngineTable, model: Model, chip: Chip) -> str:
    """What of it was measured, and what is the engine's own."""
    text = f"measured at {_tokens(entry.tokens for entry in table.entries)} tokens"
    searched = [entry.tokens for entry in table.entries if entry.untuned and dict(entry.untuned.config) != dict(entry.choice.config)]
    text += f", of which {_tokens(searched)} differ from the engine's own configuration" if searched else ""
    if not table.filled:
        return text
    rest = f"{_tokens(table.filled)} tokens, far from all of these, have what the engine runs without a table"
    return f"{text}; {rest}. {to_measure(model, chip, table)}"


def _tokens(numbers: Iterable[int]) -> str:
    return ", ".join(str(number) for number in numbers)


def spaces(recordings: Iterable[Recordings], folder: Path) -> tuple[list[Path], list[str]]:
    """Each as spaces/NAME.json.gz (Kernel Tuner's cache) and spaces/NAME.t4.json.gz, with all kernels, libraries too."""
    paths, lines = [], []
    for recording in recordings:
        try:
            recorded = export(recording)
        except KlabError as error:
            lines.append(f"space not exported: {error}")
            continue
        for form, ending in ENDING.items():
            path = folder / "spaces" / f"{recording.slug}{ending}"
            write_space(recorded, path, form, force=True)
            paths.append(path)
        lines.append(f"space {recording.label}: {len(recorded.space):,} candidates")
    return paths, lines


def sizes(paths: Iterable[Path]) -> Mapping[str, int]:
    """Bytes by name of file."""
    return {path.name: path.stat().st_size for path in paths if path.is_file()}
