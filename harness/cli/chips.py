"""`klab chips`: the limits of the chips of the catalog and of this machine's CPU."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from klab.harness.cli._console import emit, out, table
from klab.harness.cli._options import AsJson

if TYPE_CHECKING:
    from klab.kernels.contract import Chip

Name = Annotated[str | None, typer.Argument(help="A chip's name, a TOML file, cpu or auto: show it with the source of every figure.")]


def command(app: typer.Typer) -> None:
    """Register the verb."""

    @app.command()
    def chips(name: Name = None, as_json: AsJson = False) -> None:
        """List the chips that klab knows, or show one with where its figures come from. Peaks are dense."""
        from klab.harness.catalog.chips import find_chip, load_chips

        if name is not None:
            chip = find_chip(name)
            if as_json:
                emit(_row(chip))
            else:
                _show(chip)
            return
        found = [*load_chips(), find_chip("cpu")]
        if as_json:
            for chip in found:
                emit(_row(chip))
            return
        table("Chips (dense peaks in TFLOP/s)", _COLUMNS, [_cells(chip) for chip in found], right=_COLUMNS[2:])
        out.print("klab chips NAME shows the source of every figure.")
        out.print("Another chip: a TOML file like profiles/chips/h200.toml, given as --chip FILE.toml.")


_PEAKS = {"bf16": "bfloat16", "fp32": "float32", "tf32": "tensorfloat32", "fp8": "float8_e4m3fn", "fp4": "float4_e2m1"}
_COLUMNS = ("name", "chip", "SMs/cores", "clock MHz", *_PEAKS, "memory GB", "GB/s", "L2 MB", "smem KB", "TDP W", "link GB/s")


def _row(chip: Chip) -> dict[str, Any]:
    return {
        "name": chip.name,
        "title": chip.title,
        "kind": chip.kind,
        "compute_capability": list(chip.compute_capability),
        "sm_count": chip.sm_count,
        "spec_clock_mhz": chip.spec_clock_mhz,
        "max_clock_mhz": chip.max_clock_mhz,
        "peak_tflops": dict(chip.peak_tflops),
        "memory_bytes": chip.memory_bytes,
        "memory_gb_per_s": chip.memory_gb_per_s,
        "l2_bytes": chip.l2_bytes,
        "smem_per_block_bytes": chip.smem_per_block_bytes,
        "smem_per_sm_bytes": chip.smem_per_sm_bytes,
        "tdp_w": chip.tdp_w,
        "link_gb_per_s": chip.link_gb_per_s,
        "network_gb_per_s": chip.network_gb_per_s,
        "phases": list(chip.phases),
        "provenance": dict(chip.provenance),
    }


def _number(value: float | None) -> str:
    return "" if not value else f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _cells(chip: Chip) -> tuple[object, ...]:
    return (
        chip.name,
        chip.title,
        chip.sm_count,
        _number(chip.max_clock_mhz),
        *(_number(chip.peak_tflops.get(dtype)) for dtype in _PEAKS.values()),
        _number(chip.memory_bytes / 1e9),
        _number(chip.memory_gb_per_s),
        _number(chip.l2_bytes / 2**20),
        _number(chip.smem_per_block_bytes / 1024),
        _number(chip.tdp_w),
        _number(chip.link_gb_per_s),
    )


def _show(chip: Chip) -> None:
    rows = []
    for field, value in _row(chip).items():
        if field in ("name", "title", "kind", "phases", "provenance") or value in (None, 0) or value == [0, 0]:
            continue
        if field == "peak_tflops":
            rows += [(f"{field}.{dtype}", f"{peak:.4g}", chip.provenance.get(f"{field}.{dtype}", "")) for dtype, peak in value.items()]
        else:
            shown = f"{value:,.6g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else ".".join(map(str, value))
            rows.append((field, shown, chip.provenance.get(field, "")))
    table(f"{chip.name}: {chip.title}", ("field", "value", "source"), rows, right=("value",))
