"""`klab import`: tables of tuned configurations from vLLM or SGLang, as what klab tries first and measures against its own; and the JSON
of klab's pytest-benchmark suite.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from klab.harness.cli import _options
from klab.harness.cli._console import emit, out, table, talk

if TYPE_CHECKING:
    from klab.harness.choose.engines.contestants import Contestant, Read
    from klab.harness.choose.engines.names import Dialect
    from klab.harness.choose.engines.reading import Table
    from klab.kernels.contract import Chip
    from klab.kernels.discover import Catalogue

Folder = Annotated[Path, typer.Argument(help="A folder of tables, one table, or the JSON of `pytest ci/benchmarks`.")]
Engine = Annotated[str, typer.Option("--engine", "-e", help="vllm or sglang. Default: by the look of the files.")]
Model = Annotated[str | None, typer.Option("--model", "-m", help="Whose experts they are: a table does not say the hidden size.")]
Chip_ = Annotated[str | None, typer.Option("--chip", "-c", help="The chip to try them on. Default: the tables' own; others are left out.")]
Measure = Annotated[bool, typer.Option("--measure", help="Measure them now, beside the kernels' defaults and the libraries.")]

COLUMNS = ("table", "problem", "kernel", "entries", "left out", "why")
RIGHT = ("entries", "left out")


def command(app: typer.Typer) -> None:
    """Register the verb."""

    @app.command("import")
    def import_tuned(
        folder: Folder,
        engine: Engine = "auto",
        model: Model = None,
        chip: Chip_ = None,
        kernels: _options.KernelDirs = None,
        results: _options.Results = None,
        measure: Measure = False,
        budget: _options.Budget = None,
        again: Annotated[bool, typer.Option("--again", help="With --measure: also what has a result already.")] = False,
        dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be read, and store nothing.")] = False,
        as_json: _options.AsJson = False,
    ) -> None:
        """Read tables as warm starts of `klab tune` and as contestants: rows of kind reference, without a time. Or a file that `pytest
        ci/benchmarks --benchmark-json` wrote: its measured rows.
        """
        from klab.harness.catalog import find_model
        from klab.harness.choose.engines import find_dialect
        from klab.harness.choose.engines.contestants import new_rows, read_contestants
        from klab.harness.choose.engines.lint import guess
        from klab.harness.choose.engines.reading import files_of, read_table
        from klab.harness.store.benchmark_json import is_benchmark_json
        from klab.harness.store.journal import Journal
        from klab.harness.store.paths import folder_to_write
        from klab.harness.store.read import ReadReport, iter_results
        from klab.kernels.discover import discover
        from klab.kernels.errors import UsageError

        if not folder.exists():
            raise UsageError(f"{folder} does not exist; name the folder with the tables, or one of them")
        if (budget or again) and not measure:
            raise UsageError("--budget and --again go with --measure")
        if is_benchmark_json(folder):
            if engine != "auto" or model or chip or kernels or measure:
                raise UsageError(
                    f"{folder} is pytest-benchmark's: its rows say all themselves, so it goes with --results, --dry-run and --json"
                )
            _import_benchmarks(folder, results, dry_run=dry_run, as_json=as_json)
            return
        dialect = find_dialect(guess(folder) if engine == "auto" else engine)
        tables = [read_table(path) for path in files_of(folder)]
        if not tables:
            raise UsageError(f"{folder} holds no .json file: no tables")
        found_chip, tables, aside = _chip(chip, tables, dialect)
        found_model = find_model(model) if model else None
        catalogue = discover(kernels or ())
        read = [read_contestants(one, dialect, found_chip, found_model, catalogue.kernels.values()) for one in tables]
        _show(read, aside, as_json=as_json)
        _hint(read)
        if not any(one.contestants for one in read):
            raise UsageError(f"nothing in {folder} is for a kernel of klab's on {found_chip.name}: {_first(read, aside)}")
        if dry_run:
            return
        where = folder_to_write(results)
        rows = new_rows(read, found_chip, dialect, iter_results([where] if where.exists() else [], ReadReport()))
        with Journal(where, rows[0].run_id if rows else "import") as journal:
            for row in rows:
                journal.append(row)
        contestants = [c for one in read for c in one.contestants]
        _tell(contestants, len(rows), found_chip, where, as_json=as_json)
        if measure:
            _measure(contestants, found_chip, catalogue, kernels, where, budget, again=again, as_json=as_json)


def _import_benchmarks(file: Path, results: Path | None, *, dry_run: bool, as_json: bool) -> None:
    """The rows of klab's own suite, labelled, into the store; those that are there already are not stored twice."""
    from klab.harness.choose.engines.reading import printable
    from klab.harness.store.benchmark_json import new_rows, read_benchmarks
    from klab.harness.store.journal import Journal
    from klab.harness.store.paths import folder_to_write
    from klab.harness.store.read import ReadReport, iter_results
    from klab.harness.store.remote import shown
    from klab.harness.tune.job import new_run_id
    from klab.kernels.errors import UsageError

    found = read_benchmarks(file)
    where = folder_to_write(results)
    new = new_rows(found.rows, iter_results([where] if where.exists() else [], ReadReport()))
    if not dry_run:
        with Journal(where, f"{new_run_id()}-import") as journal:
            if new:
                journal.ready()
            for row in new:
                journal.append(row)
    counts = dict(Counter(row.status.value for row in new))
    if as_json:
        emit({"type": "import", "stored": 0 if dry_run else len(new), "new": counts, "known": len(found.rows) - len(new),
              "left_out": found.left_out, "results": shown(where)})  # fmt: skip
    for name, why in found.left_out.items():
        talk.print(printable(f"left out: {name}: {why}"), style="yellow", markup=False, soft_wrap=True)
    if not found.rows and found.left_out:
        raise UsageError(f"{file}: no benchmark of it can be imported")
    said = ", ".join(f"{n} {status}" for status, n in sorted(counts.items())) or "nothing new"
    known = f"; {len(found.rows) - len(new)} were there" if len(new) < len(found.rows) else ""
    label = ". `klab results` calls them imported" if new else ""
    done = "would be stored" if dry_run else "stored"
    talk.print(f"{said} {done} in {shown(where)}{known}{label}", markup=False, soft_wrap=True)


def _chip(chip: str | None, tables: list[Table], dialect: Dialect) -> tuple[Chip, list[Table], list[str]]:
    """The chip to try the tables on, the tables that are for it, and what was set aside."""
    from klab.harness.catalog import find_chip
    from klab.harness.choose.engines.names import chip_named
    from klab.kernels.errors import UsageError

    of = {one.path: known.name if one.name and (known := chip_named(one.name, dialect)) else "" for one in tables}
    if chip is None:
        names = sorted(set(of.values()) - {""})
        if len(names) != 1:
            there = f"of several chips ({', '.join(names)})" if names else "of no chip that the catalog knows"
            raise UsageError(f"the tables are {there}: name one with --chip, whatever device they were tuned on")
        chip = names[0]
    found = find_chip(chip)
    if found.kind != "cuda":
        raise UsageError(f"{found.title} is no GPU, and these tables are for kernels of GPUs")
    # Its own, where there are any: another chip's best is a guess.
    own = [one for one in tables if of[one.path] == found.name] or [one for one in tables if one.name] or tables
    left = len(tables) - len(own)
    return found, own, [f"{left} files are left out: for other devices than {found.name}, or no tables"] if left else []


def _tell(contestants: Sequence[Contestant], stored: int, chip: Chip, where: Path, *, as_json: bool) -> None:
    inside = sum(one.in_space(chip) for one in contestants)
    if as_json:
        emit({"type": "import", "stored": stored, "known": len(contestants) - stored, "in_space": inside, "results": str(where)})
    known = f", {len(contestants) - stored} were there" if stored < len(contestants) else ""
    tried = f"`klab tune` begins with those that are candidates of its own ({inside} of {len(contestants)})"
    said = f"{stored} recommendations stored in {where}{known}. They are no measurements: {tried}, --measure measures all"
    talk.print(said, markup=False, soft_wrap=True)


def _show(read: Sequence[Read], aside: Sequence[str], *, as_json: bool) -> None:
    from klab.harness.choose.engines.reading import printable

    for one in read if as_json else ():
        first = one.contestants[0] if one.contestants else None
        emit({"type": "table", "file": str(one.table.path), "contestants": len(one.contestants), "why": one.why, "notes": list(one.notes),
              "problem": first.problem.to_json() if first else None, "kernels": sorted({c.kernel.id for c in one.contestants}),
              "left_out": dict(one.left_out)})  # fmt: skip
    if not as_json:
        rows = [
            (printable(one.table.path.name), one.contestants[0].problem.label() if one.contestants else "",
             ", ".join(sorted({c.kernel.id for c in one.contestants})), len(one.contestants), len(one.left_out) or "",
             one.why or next(iter(one.left_out.values()), ""))
            for one in read
        ]  # fmt: skip
        table("Tables", COLUMNS, rows, RIGHT)
    for line in (*aside, *(f"{one.table.path.name}: {note}" for one in read for note in one.notes)):
        talk.print(printable(line), style="yellow", markup=False, soft_wrap=True)


def _hint(read: Sequence[Read]) -> None:
    """Which models a table of experts may be of, where nobody said."""
    from klab.harness.catalog.models import load_models
    from klab.harness.choose.engines.contestants import models_for

    for name in dict.fromkeys(one.table.name for one in read if one.needs_model and one.table.name):
        models = ", ".join(models_for(name, load_models())) or "none"
        talk.print(f"E={name.experts}, N={name.n}: such experts have, of the catalog's models, {models}", markup=False, soft_wrap=True)


def _first(read: Sequence[Read], aside: Sequence[str]) -> str:
    from klab.harness.choose.engines.reading import printable

    return next((printable(f"{one.table.path.name} {one.why}") for one in read if one.why), aside[0] if aside else "no entries")


def _measure(contestants: Sequence[Contestant], chip: Chip, catalogue: Catalogue, kernel_dirs: list[Path] | None, where: Path,
             budget: str | None, *, again: bool, as_json: bool) -> None:  # fmt: skip
    """As one job: the contestants, and on their problems every kernel's default and the libraries."""
    from klab.harness.cli._progress import Bars
    from klab.harness.cli._setup import deadline_of, tell_outcome
    from klab.harness.plan.trials import default_policy, trials
    from klab.harness.store.paths import folder_to_read
    from klab.harness.tune.job import Job

    policy = default_policy(chip)
    problems = {c.problem.key: c.problem for c in contestants}.values()
    beside = trials(problems, sorted(catalogue.kernels.values(), key=lambda k: (not k.library, k.id)), chip, policy).trials
    wanted = {trial.key: trial for trial in (*(c.trial(chip, policy) for c in contestants), *beside)}
    ordered = sorted(wanted.values(), key=lambda trial: list(problems).index(trial.problem))
    deadline = deadline_of(_options.seconds(budget))
    with Bars(as_json=as_json) as bars:
        job = Job(chip, where, read_from=[folder_to_read()], kernel_dirs=kernel_dirs or [], deadline=deadline, again=again, listener=bars)
        try:
            job.run(ordered, catalogue.kernels)
        finally:
            tell_outcome(job.outcome, where, as_json=as_json, again=again)
    out.print("klab choose and klab export weigh them with the rest", markup=False)
