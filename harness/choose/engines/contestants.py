"""Tables -> contestants: the configurations that somebody else found, as what klab's kernels may be measured with."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime

from klab.harness.catalog.architecture import Model
from klab.harness.choose.engines.entries import entry_troubles
from klab.harness.choose.engines.names import DENSE, FIELDS, Dialect, TableName, chip_named, knobs
from klab.harness.choose.engines.reading import Table, printable
from klab.harness.choose.engines.shapes import Shape, experts_of, shapes_of
from klab.harness.plan.trial import Policy, Trial
from klab.harness.store.result import Result, Status
from klab.kernels.contract import Chip, Config, Json, Kernel, Problem, digest
from klab.kernels.errors import KlabError
from klab.kernels.fused_moe.problem import BLOCK, FusedMoe
from klab.kernels.scaled_matmul.problem import ScaledMatmul

KIND = "reference"

# The knobs of klab's tiled products that mean what the engines' mean.
DENSE_FIELDS = dict(zip(FIELDS, ("block_m", "block_n", "block_k", "group_m", "num_warps", "num_stages"), strict=True)) | {
    "SPLIT_K": "split_k"
}


@dataclass(frozen=True)
class Contestant:
    """A configuration of a kernel on a problem, as a table has it."""

    problem: Problem
    kernel: Kernel
    config: Config
    table: Table

    def in_space(self, chip: Chip) -> bool:
        """Whether it is a candidate of `klab tune`; otherwise nothing but measuring it by itself tries it."""
        return self.config in self.kernel.space(self.problem, chip)

    def trial(self, chip: Chip, policy: Policy) -> Trial:
        """To be measured like any other."""
        return Trial.of(self.kernel, self.problem, self.config, chip.name, policy)

    def row(self, chip: Chip, dialect: Dialect) -> Result:
        """A row that says that somebody recommends this configuration. It has no time, for nobody here measured one."""
        facts = {"engine": dialect.engine, "table": printable(self.table.path.name), "sha256": self.table.sha256}
        what = [KIND, facts, self.kernel.id, self.problem.key, self.config.to_json_full(), chip.name]
        return Result(
            key=digest(what),
            status=Status.OK,
            kernel=self.kernel.id,
            backend=self.kernel.backend,
            library=self.kernel.library,
            source_digest=self.kernel.source_digest,
            operator=self.problem.operator,
            problem=self.problem.to_json(),
            problem_key=self.problem.key,
            problem_label=self.problem.label(),
            config=self.config.to_json_full(),
            chip=chip.name,
            policy={},
            run_id=f"import-{self.table.sha256[:12]}",
            recorded_at=datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
            reason=f"recommended by a table of {dialect.title}'s, not measured: {printable(self.table.path.name)}",
            kind=KIND,
            environment={"triton": self.table.triton or None, "imported": facts},
        )


@dataclass(frozen=True)
class Read:
    """What a table gives, and what of it is left out: tokens -> why. `why` says why nothing came of the table as a whole."""

    table: Table
    contestants: tuple[Contestant, ...] = ()
    left_out: Mapping[int, str] = dataclasses.field(default_factory=dict)
    why: str = ""
    notes: tuple[str, ...] = ()
    needs_model: bool = False


def read_contestants(table: Table, dialect: Dialect, chip: Chip, model: Model | None, kernels: Iterable[Kernel]) -> Read:
    """The contestants of a table. A table of experts says neither the hidden size nor how many a token visits: `model` does."""
    name = table.name
    if name is None:
        return Read(table, why="its name is that of no table")
    if table.breaks:
        return Read(table, why=printable(table.breaks[0]))
    shape, why = _shape(name, model) if name.kind != DENSE else (None, _no_product(name))
    if why:
        return Read(table, why=why, needs_model=why == NO_MODEL)
    chosen = [k for k in _kernels(kernels, name.kind) if k.unfit(_problem(name, 1, shape), chip) is None]
    if not chosen:
        return Read(table, why="no kernel of klab's has these knobs")
    found: list[Contestant] = []
    left_out: dict[int, str] = {}
    for tokens, entry in table.entries.items():
        if tokens < 1:
            left_out[tokens] = "no step has so few tokens"
            continue
        stops = [text for severe, text in entry_troubles(tokens, entry, name, dialect, None) if severe]
        if stops:
            left_out[tokens] = printable(stops[0])
            continue
        problem = _problem(name, tokens, shape)
        for kernel in chosen:
            made, reason = _config(kernel, entry, problem, chip, name.kind)
            if made is None:
                left_out[tokens] = printable(f"{kernel.id}: {reason}")
            else:
                found.append(Contestant(problem, kernel, made, table))
    return Read(table, tuple(found), left_out, "" if found else "no entry of it runs here", tuple(_notes(name, shape, dialect, chip)))


def new_rows(read: Iterable[Read], chip: Chip, dialect: Dialect, known: Iterable[Result]) -> list[Result]:
    """The rows to store, without those that the store has already."""
    there = {row.key for row in known if row.kind == KIND}
    rows = {row.key: row for one in read for c in one.contestants for row in [c.row(chip, dialect)]}
    return [row for key, row in rows.items() if key not in there]


def models_for(name: TableName, models: Iterable[Model]) -> list[str]:
    """Names of the models whose experts, spread over some number of GPUs, a table may be for."""
    return sorted(model.name for model in models if next(_matches(name, model), None) is not None)


NO_MODEL = "says neither the hidden size nor how many experts a token visits: --model says them"


def _shape(name: TableName, model: Model | None) -> tuple[Shape | None, str]:
    """Whose experts they are, or why they are none that klab has."""
    if name.down:
        return None, "is of the second product alone, and klab's kernel has one configuration for both"
    if name.dtype not in ("", "float32") and (name.dtype, name.block) != ("fp8_w8a8", (BLOCK, BLOCK)):
        return None, f"klab has experts in 16 bits, in float32 and in fp8 blocks of {BLOCK}x{BLOCK}, not in {_format(name)}"
    if model is None:
        return None, NO_MODEL
    shape = next(_matches(name, model), None)
    if shape is None:
        sizes = ", ".join(f"{e.experts} experts of {e.intermediate}" for e in experts_of(model)) or "no routed experts"
        return None, f"E={name.experts}, N={name.n} is no share of {model.name}, which has {sizes}"
    return shape, ""


def _no_product(name: TableName) -> str:
    fits = name.dtype == "fp8_w8a8" and name.block == (BLOCK, BLOCK)
    return "" if fits else f"klab's dense fp8 products have blocks of {BLOCK}x{BLOCK}"


def _notes(name: TableName, shape: Shape | None, dialect: Dialect, chip: Chip) -> Iterator[str]:
    if shape is not None and name.experts != shape.problem.local:
        yield f"E={name.experts} holds a fused shared expert: taken for the {shape.problem.local} routed ones"
    of = chip_named(name, dialect)
    if of is None or of.name != chip.name:
        yield f"was tuned on {name.device}, not on {chip.name}"


def _matches(name: TableName, model: Model) -> Iterator[Shape]:
    """The ways of spreading a model's experts that fit a table; those with a fused shared expert last."""
    shapes = list(shapes_of(model))
    yield from (s for s in shapes if (s.problem.local, s.problem.intermediate) == (name.experts, name.n))
    yield from (s for s in shapes if s.shared and (s.problem.local + 1, s.problem.intermediate) == (name.experts, name.n))


def _format(name: TableName) -> str:
    block = f" with a block of {name.block[0]}x{name.block[1]}" if name.block else " without blocks"
    return name.dtype + block


def _problem(name: TableName, tokens: int, shape: Shape | None) -> FusedMoe | ScaledMatmul:
    if shape is None:
        return ScaledMatmul(tokens, name.n, name.k, format="fp8_block")
    return shape.at(tokens, name.dtype or "bfloat16") if name.dtype in ("", "float32") else shape.at(tokens, block_fp8=True)


def _kernels(kernels: Iterable[Kernel], kind: str) -> list[Kernel]:
    """Those whose knobs are a table's: by its own names for experts, by klab's for products."""
    wanted = set(FIELDS) if kind != DENSE else {DENSE_FIELDS[field] for field in FIELDS}
    operator = ScaledMatmul.operator if kind == DENSE else FusedMoe.operator
    fitting = (k for k in kernels if k.problem_type.operator == operator and k.backend == "triton" and not k.library)
    return sorted((k for k in fitting if wanted <= knobs(k)), key=lambda k: k.id)


def _config(kernel: Kernel, entry: Mapping[str, Json], problem: Problem, chip: Chip, kind: str) -> tuple[Config | None, str]:
    """The entry as a configuration of a kernel, or why it is none."""
    fields = knobs(kernel)
    names = DENSE_FIELDS if kind == DENSE else {field: field for field in entry}
    given = {names[field]: value for field, value in entry.items() if field in names and names[field] in fields}
    try:
        config = kernel.config_type.from_json(given)
        reason = kernel.unfit(problem, chip) or kernel.fits(problem, config, chip)
    except (KlabError, TypeError, ValueError) as error:
        return None, str(error)
    return (None, reason) if reason else (config, "")
