"""What every kernel's default needs on a chip, read from its binary: registers, spills, shared memory, matrix unit; and its bound."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from klab.harness.plan.roofline import Roofline
from klab.harness.plan.trial import Trial
from klab.harness.plan.trials import default_policy, safe_unfit
from klab.harness.store.result import Status
from klab.harness.tune.rank import expected_us
from klab.harness.tune.rank_work import work_of
from klab.harness.tune.screen import Screened, screen
from klab.kernels.contract import Chip, Kernel, Problem

COMPILED = ("triton", "cuda")


@dataclass(frozen=True)
class Row:
    """A kernel's default on one problem of serving size and one chip.

    `functions` are the device functions of a launch as screening reads them; `bound_us` is the roofline's least time, `limit` what sets
    it; `expected_us` is the analytic model's (None where the tile is not known). All times are modelled. `reason` says why there is none.
    """

    kernel: str
    backend: str
    problem: str
    config: str
    chip: str
    functions: tuple[dict[str, object], ...]
    bound_us: float
    limit: str
    expected_us: float | None
    reason: str = ""


def resources(
    kernels: Iterable[Kernel], chip: Chip, *, jobs: int | None = None, on_done: Callable[[Screened], None] = lambda _: None
) -> list[Row]:
    """Compile the default of every Triton and CUDA C++ kernel for each problem `at_scale` that it takes on this chip, by operator."""
    chosen = sorted((k for k in kernels if k.backend in COMPILED), key=lambda k: k.id)
    wanted: list[tuple[Kernel, Problem]] = []
    refused: list[Row] = []
    for kernel in chosen:
        reasons = {problem: safe_unfit(kernel, problem, chip) for problem in kernel.problem_type.at_scale()}
        fitting = [problem for problem, reason in reasons.items() if reason is None]
        wanted += [(kernel, problem) for problem in fitting]
        if reasons and not fitting:
            problem, reason = next(iter(reasons.items()))
            refused.append(_row(kernel, problem, "-", chip, (), reason or ""))
    policy = default_policy(chip)
    trials = [Trial.of(k, problem, k.default(problem, chip), chip.name, policy) for k, problem in wanted]
    found = screen(trials, chip, jobs=jobs, on_done=on_done)
    rows = [_found(kernel, problem, item, chip) for (kernel, problem), item in zip(wanted, found, strict=True)]
    return sorted([*rows, *refused], key=lambda row: (row.kernel.partition("/")[0], row.problem, row.kernel))


def _found(kernel: Kernel, problem: Problem, item: Screened, chip: Chip) -> Row:
    reason = "" if item.status is Status.OK else f"{item.status}: {item.reason}"
    row = _row(kernel, problem, item.trial.config.label(), chip, tuple(item.functions), reason)
    # Where the configuration's fields name no tile, the model knows the grid alone and is far off in absolute terms.
    known = not reason and work_of(problem, item.trial.config, chip, None) is not None
    expected = expected_us(problem, kernel, item.trial.config, chip, list(item.functions)) if known else None
    return Row(**{**vars(row), "expected_us": expected})


def _row(kernel: Kernel, problem: Problem, config: str, chip: Chip, functions: tuple[dict[str, object], ...], reason: str) -> Row:
    bound_us, limit = Roofline(chip, problem.dtype).of(problem.math_dtype).bound(problem.flops(), problem.bytes_moved())
    return Row(kernel.id, kernel.backend, problem.label(), config, chip.name, functions, bound_us, limit, None, reason)


def faults(rows: Sequence[Row]) -> list[str]:
    """What is wrong with a default: it spills, or does not compile."""
    wrong = [f"{row.kernel} on {row.problem} ({row.chip}): {row.reason}" for row in rows if row.reason and row.config != "-"]
    for row in rows:
        spilled = [f["name"] for f in row.functions if f["spill_instructions"]]
        if spilled:
            wrong.append(f"{row.kernel} on {row.problem} ({row.chip}) spills in {', '.join(map(str, spilled))}")
    return wrong


HEAD = """# What the kernels' defaults need

Made by `klab resources`; not edited by hand. Every Triton and CUDA C++ kernel, compiled with no GPU for the problems of serving size of its
operator, in its default configuration: registers per thread, local loads and stores in the machine code (spills), shared memory per block,
the strongest matrix unit it uses (wgmma on sm_90, tcgen05 on sm_100, mma.sync on both), whether it copies by TMA, whether its warps are
specialised (setmaxnreg), tensor memory. A launch of several functions has several lines. `bound` is the roofline's least time by the chip's
data sheet and what sets it; `model` is the analytic model's time of this configuration. Both are modelled: nothing here was measured.
"""


def page(rows: Sequence[Row], versions: str) -> str:
    """The page as Markdown: a section per chip, a table per operator."""
    lines = [HEAD, f"Compiled with {versions}.", ""]
    for chip in dict.fromkeys(row.chip for row in rows):
        lines += [f"## {chip}", ""]
        here = [row for row in rows if row.chip == chip]
        for operator in dict.fromkeys(row.kernel.partition("/")[0] for row in here):
            mine = [row for row in here if row.kernel.partition("/")[0] == operator]
            lines += [f"### {operator}", "", *_table(mine), ""]
    return "\n".join(lines).rstrip() + "\n"


COLUMNS = ("problem", "kernel", "function", "regs", "spills", "smem KB", "unit", "TMA", "WS", "TMEM", "threads", "bound us", "model us")


def _table(rows: Sequence[Row]) -> list[str]:
    lines = ["| " + " | ".join(COLUMNS) + " |", "|" + "|".join(["---"] * 3 + ["---:"] * 3 + ["---"] * 3 + ["---:"] * 4) + "|"]
    for row in rows:
        bound = f"{row.bound_us:.4g} {row.limit}"
        model = "" if row.expected_us is None else f"{row.expected_us:.4g}"
        if not row.functions:
            cells = [row.problem, row.kernel.partition("/")[2], row.reason or "nothing compiled", *[""] * 8, bound, ""]
            lines.append("| " + " | ".join(cells) + " |")
        for i, f in enumerate(row.functions):
            first = [row.problem, row.kernel.partition("/")[2]] if i == 0 else ["", ""]
            times = [bound, model] if i == 0 else ["", ""]
            lines.append("| " + " | ".join([*first, *_cells(f), *times]) + " |")
    return lines


def _cells(f: dict[str, object]) -> list[str]:
    smem = f["smem_bytes"]
    return [
        f"`{str(f['name']).lstrip('_')}`",
        str(f["registers"]),
        str(f["spill_instructions"] or ""),
        f"{int(str(smem)) / 1024:.4g}",
        str(f["matrix_unit"]).replace("none", ""),
        "yes" if f["tma"] else "",
        "yes" if f["warp_specialised"] else "",
        str(f["tmem_columns"] or ""),
        str(f["threads"]),
    ]
