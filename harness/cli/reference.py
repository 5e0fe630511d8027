"""`klab reference`: published measurements of chips that are not at hand."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from klab.harness.cli import _options
from klab.harness.cli._console import emit, table, talk
from klab.kernels.errors import UsageError

if TYPE_CHECKING:
    from klab.kernels.contract import Chip

Chips = Annotated[str | None, typer.Option("--chip", "-c", help="h200: what is known of it; h200,b200: the second against the first.")]
Operators = Annotated[str | None, typer.Option("--operator", "-o", help="Only these operators, with commas. Default: all.")]
Backend = Annotated[str | None, typer.Option("--backend", help="Whose kernels: trtllm (the default), sglang, vllm or all.")]
Data = Annotated[Path | None, typer.Option("--data", help="Folder of tables. Default: KLAB_REFERENCE, or the installed package.")]
Traps = Annotated[bool, typer.Option("--traps", help="The rows that are not used, table by table, and why.")]


ALL = "all"


def command(app: typer.Typer) -> None:
    """Register the verb."""

    @app.command()
    def reference(
        chip: Chips = None,
        operator: Operators = None,
        backend: Backend = None,
        data: Data = None,
        traps: Traps = False,
        as_json: _options.AsJson = False,
    ) -> None:
        """Published operator times (NVIDIA's aiconfigurator-core): what there is, one chip's, or one chip against another.

        With one chip, --json gives its rows as results of kind reference.
        """
        from klab.harness.store.reference.systems import chip_of
        from klab.harness.store.reference.tables import BACKENDS, require

        root = require(data)
        if backend is not None and backend not in (*BACKENDS, ALL):
            raise UsageError(f"--backend is {', '.join(BACKENDS)} or {ALL}, not {backend}")
        operators = _operators(operator)
        if chip is None:
            if traps or operator or backend:
                raise UsageError("--traps, --operator and --backend are of a chip: say --chip h200")
            _what_there_is(root, as_json)
            return
        chips = [chip_of(name.strip(), root) for name in chip.split(",") if name.strip()]
        if not chips:
            raise UsageError("--chip names no chip")
        if len({one.name for one in chips}) < len(chips):
            raise UsageError(f"--chip names one chip twice: {chip}")
        engine = None if backend == ALL else backend or BACKENDS[0]
        if len(chips) > 1:
            if traps:
                raise UsageError("--traps is of one chip")
            _compared(chips, operators, engine, root, as_json)
        elif as_json:
            _rows(chips[0], operators, engine, root, traps)
        else:
            _of_chip(chips[0], operators, engine, root, traps)


def _operators(given: str | None) -> list[str] | None:
    """The names in an option; UsageError for one that no table is of."""
    from klab.harness.plan.communication import KINDS
    from klab.harness.store.reference.families import FAMILIES

    if given is None:
        return None
    known = [*dict.fromkeys(name for family in FAMILIES for name in family.operators), *KINDS]
    names = [name.strip() for name in given.split(",") if name.strip()]
    strange = [name for name in names if name not in known]
    if strange or not names:
        raise UsageError(f"--operator: no table is of {', '.join(strange) or 'nothing'}; there are {', '.join(known)}")
    return names


def _what_there_is(root: Path, as_json: bool) -> None:
    from klab.harness.catalog.chips import load_chips
    from klab.harness.store.reference.tables import inventory, package_version

    profiles = {chip.name for chip in load_chips()}
    found = inventory(root)
    for one in found if as_json else ():
        emit({"system": one.system, "engines": dict(one.engines), "tables": one.tables, "rows": one.rows})
    if not as_json:
        rows = [
            (one.system, name if (name := one.system.removesuffix("_sxm")) in profiles else "no profile",
             ", ".join(f"{engine} {version}" for engine, version in one.engines.items()), one.tables, f"{one.rows:,}")
            for one in found
        ]  # fmt: skip
        table("Published tables", ("system", "klab's chip", "engines", "tables", "rows"), rows, ("tables", "rows"))
        talk.print(f"{package_version(root)} in {root}", markup=False, soft_wrap=True)
        talk.print("klab reference --chip h200,b200 compares two; klab cost uses them where nothing was measured here", markup=False)


def _of_chip(chip: Chip, operators: list[str] | None, backend: str | None, root: Path, traps: bool) -> None:
    from klab.harness.store.reference.points import Reading
    from klab.harness.store.reference.summary import summary

    reading = Reading()
    found = summary(chip, operators, backend=backend, root=root, reading=reading)
    cells = [
        (one.operator, one.form, one.engine, one.version, f"{one.used:,}", f"{one.left_out:,}" if one.left_out else "",
         f"{one.low:.2f}  {one.middle:.2f}  {one.high:.2f}" if one.middle is not None else "")
        for one in found
    ]  # fmt: skip
    columns = ("operator", "format", "engine", "version", "rows", "left out", "share of the roofline")
    table(f"Published times on {chip.title}", columns, cells, ("rows", "left out"))
    talk.print(
        "Shares: a quarter, half and three quarters of the rows whose bound is 10 us or more. Times are means; no power is published."
    )
    if traps:
        rows = [(label, why, f"{count:,}") for (label, why), count in sorted(reading.flagged.items())]
        table("Rows that are not used", ("table", "because", "rows"), rows, ("rows",))
    elif reading.flagged:
        talk.print(f"{sum(reading.flagged.values()):,} rows are not used (--traps says which and why)")
    for why, count in sorted(reading.unmapped.items(), key=lambda item: -item[1]):
        talk.print(f"{count:,} rows are no problem of klab's: {why}", markup=False, soft_wrap=True)


def _rows(chip: Chip, operators: list[str] | None, backend: str | None, root: Path, traps: bool) -> None:
    from klab.harness.store.reference.results import results

    for one in results(chip, operators, backend, root, flagged=traps):
        emit(one.to_json())


def _compared(chips: list[Chip], operators: list[str] | None, backend: str | None, root: Path, as_json: bool) -> None:
    from klab.harness.store.reference.compare import LARGE_US, compare

    found = []
    for one in compare(chips, operators, backend=backend, root=root):
        if as_json:
            emit(vars(one))
        found.append(one)
    if not found:
        raise UsageError(f"the tables of {' and '.join(chip.name for chip in chips)} have no shape in common")
    if as_json:
        return
    for chip in chips[1:]:
        cells = [
            (one.operator, one.form, one.engine, one.versions, one.regime, f"{one.shapes:,}", f"{one.ratio:.2f}",
             f"{one.low:.2f}..{one.high:.2f}" if one.low is not None else "", f"{one.least:.2f}..{one.most:.2f}")
            for one in found
            if one.chip == chip.name
        ]  # fmt: skip
        columns = ("operator", "format", "engine", "version", "bound by", "shapes", "ratio", "5%..95%", "all")
        table(f"Time on {chip.name} over time on {chips[0].name}, same shape, same engine", columns, cells, ("shapes", "ratio"))
    small = f"small: the roofline of {chips[0].name} allows less than {LARGE_US:g} us (a collective takes less than twice that)"
    talk.print(f"Ratios: geometric means over shapes; below 1 the second chip is faster. {small}", markup=False, soft_wrap=True)
