"""What a person is told about tables: how to use them, what is missing, and the command that measures it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from klab.harness.catalog.architecture import Model
from klab.harness.choose.engines.names import DENSE, USUAL_TOKENS, Dialect
from klab.harness.choose.engines.shapes import experts_of, shapes_of
from klab.harness.choose.engines.tables import EngineTable, Tables, engine_kernels
from klab.harness.plan import plan, scenario_for
from klab.kernels.contract import Chip, Kernel
from klab.kernels.errors import KlabError
from klab.kernels.scaled_matmul.problem import ScaledMatmul


def products_of(model: Model, chip: Chip, gpus: int | None) -> list[tuple[int, int]]:
    """The matrices of a model's layers, [n, k], on one of `gpus` GPUs (None: of 1, 2, 4 or 8)."""
    found: dict[tuple[int, int], None] = {}
    for count in (gpus,) if gpus else (1, 2, 4, 8):
        try:
            rows = plan(model, chip, scenario_for(model, chip, tp=count, batches=(1,))).rows
        except KlabError:  # this many do not divide the model, or the chip has no link
            continue
        found |= {(row.shape["n"], row.shape["k"]): None for row in rows if row.operator == "matmul" and {"n", "k"} <= set(row.shape)}
    return list(found)


def how_to_use(dialect: Dialect, out: Path, tables: Sequence[EngineTable], model: Model) -> list[str]:
    """What a person does with the folder."""
    lines = []
    if any(table.name.kind != DENSE for table in tables):
        lines.append(f"to use: {dialect.variable}={out.resolve()} in the environment of {dialect.title}")
        if dialect.engine == "sglang":
            lines.append("that variable replaces SGLang's own folder of tables: shapes that have none here run with its defaults")
            if any(experts.shared_intermediate for experts in experts_of(model)):
                lines.append(
                    "SGLang may fuse shared experts into the routed ones and then looks for E + 1: these tables are for E, with "
                    "--disable-shared-experts-fusion"
                )
    if any(table.name.kind == DENSE for table in tables):
        lines.append(f"tables of dense products are read from {dialect.package[DENSE]} alone: copy them there")
    return lines


def gaps(table: EngineTable, dialect: Dialect, model: Model, chip: Chip) -> str:
    """Why a table with far-apart entries is not written, and how to fill it."""
    far = ", ".join(f"{tokens} (would take {key})" for tokens, key in table.far.items())
    why = f"{dialect.title} takes the nearest entry, and none is near {far} tokens"
    return f"{dialect.file_name(table.name)} is not written: {why}. {to_measure(model, chip, table)}; --partial writes it as it is"


def to_measure(model: Model, chip: Chip, table: EngineTable | None = None) -> str:
    """The command that measures what a table needs (None: this model's, on one GPU or as few as divide it)."""
    more = ""
    if table is not None:
        wanted = table.problem.get("local_experts", 0), table.problem.get("intermediate")
        shape = next((s for s in shapes_of(model) if (s.problem.local_experts, s.problem.intermediate) == wanted), None)
        more = f" --tp {shape.gpus}" + (" --with expert_parallel=true" if shape.expert_parallel else "") if shape else ""
        more += " --with quantization=fp8_block" if table.problem.get("format") else ""
    batches = ",".join(map(str, USUAL_TOKENS))
    command = (
        f"klab tune --model {model.name} --chip {chip.name} --problem fused_moe --kernel triton_engine --phase decode --batch {batches}"
    )
    return f"To measure: {command}{more}"


def missing(found: Tables, dialect: Dialect, model: Model, chip: Chip, kernels: Iterable[Kernel]) -> str:
    """Why nothing was written."""
    if found.tables:
        return "every table that the results give has gaps (above)"
    if not experts_of(model):
        fields = "BLOCK_SIZE_M .. num_stages"
        return f"{model.name} has no routed experts. {dialect.title}'s tables of dense products have {fields}; {dense(kernels)}"
    return f"no verified result of {model.name}'s experts on {chip.name} with a kernel that {dialect.title} has. {to_measure(model, chip)}"


def dense(kernels: Iterable[Kernel]) -> str:
    """Whether a kernel's results could make a table of dense block-fp8 products."""
    found = engine_kernels(kernel for kernel in kernels if kernel.problem_type.operator == ScaledMatmul.operator)
    if found:
        return f"results of {', '.join(found)} in fp8_block make them"
    return "no kernel of scaled_matmul has these fields, so that no result of klab's is one of the engine's kernel"
