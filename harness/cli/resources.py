"""`klab resources`: what every kernel's default needs, read from binaries that are compiled with no GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from klab.harness.cli import _options
from klab.harness.cli._console import emit, table, talk

Chips = Annotated[list[str] | None, typer.Option("--chip", "-c", help="A GPU of the catalog. Repeatable. Default: h200 and b200.")]
Operators = Annotated[list[str] | None, typer.Option("--operator", help="Only this operator. Repeatable.")]
Page = Annotated[Path | None, typer.Option("--out", help="Write the page (Markdown) to this file: docs/resources.md in the checkout.")]


def command(app: typer.Typer) -> None:
    """Register the verb."""

    @app.command()
    def resources(
        chip: Chips = None,
        operator: Operators = None,
        kernel: _options.Only = None,
        kernels: _options.KernelDirs = None,
        out: Page = None,
        as_json: _options.AsJson = False,
    ) -> None:
        """Registers, spills, shared memory, matrix units and modelled bounds of all defaults at serving sizes; exit 1 where one spills."""
        from klab.harness.catalog import find_chip
        from klab.harness.choose.profile import write_text
        from klab.harness.measure import environment
        from klab.harness.tune import resources as read
        from klab.kernels.discover import discover
        from klab.kernels.errors import UsageError

        found = discover(kernels or ())
        chosen = found.select(kernel) if kernel else list(found.kernels.values())
        unknown = sorted(set(operator or ()) - set(found.operators))
        if unknown:
            raise UsageError(f"unknown operator {', '.join(unknown)}; known: {', '.join(sorted(found.operators))}")
        chosen = [k for k in chosen if not operator or k.problem_type.operator in operator]
        chips = [find_chip(name) for name in chip or ("h200", "b200")]
        if any(one.kind != "cuda" for one in chips):
            raise UsageError("resources are read from GPU binaries: name a GPU with --chip")
        rows = []
        for one in chips:
            talk.print(f"compiling for {one.title}", markup=False)
            rows += read.resources(chosen, one)
        for row in rows if as_json else ():
            emit(vars(row))
        if out is not None:
            versions = environment.software()
            said = ", ".join(f"{name} {versions[name]}" for name in ("triton", "cupy", "torch") if versions.get(name))
            write_text(out, read.page(rows, said))
            talk.print(f"wrote {out}", markup=False, soft_wrap=True)
        elif not as_json:
            cells = [
                (row.chip, row.problem, row.kernel, f["registers"], f["spill_instructions"] or "", f["smem_bytes"], f["matrix_unit"],
                 "yes" if f["warp_specialised"] else "", f"{row.bound_us:.4g}", "" if row.expected_us is None else f"{row.expected_us:.4g}")
                for row in rows for f in row.functions
            ]  # fmt: skip
            columns = ("chip", "problem", "kernel", "regs", "spills", "smem B", "unit", "WS", "bound us", "model us")
            table("Defaults at serving sizes (modelled times)", columns, cells, ("regs", "spills", "smem B", "bound us", "model us"))
        wrong = read.faults(rows)
        for line in wrong:
            talk.print(line, style="yellow", markup=False, soft_wrap=True)
        if wrong:
            raise typer.Exit(1)
