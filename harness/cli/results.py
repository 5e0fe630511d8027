"""`klab results`: what the store has, as a table, JSON lines or CSV; and its compaction."""

from __future__ import annotations

import csv
import sys
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from klab.harness.cli._console import emit, table, talk
from klab.harness.cli._options import AsJson

if TYPE_CHECKING:
    from klab.harness.store.result import Result

Where = Annotated[
    list[Path] | None,
    typer.Option("--results", help="Folder or file to read. Repeatable. Default: $KLAB_RESULTS, or results/ of the checkout."),
]
Operators = Annotated[list[str] | None, typer.Option("--operator", help="Only this operator. Repeatable.")]
Kernels = Annotated[list[str] | None, typer.Option("--kernel", "-k", help="Only this kernel (operator/name or name). Repeatable.")]
Chips = Annotated[list[str] | None, typer.Option("--chip", "-c", help="Only this chip. Repeatable.")]
Statuses = Annotated[list[str] | None, typer.Option("--status", help="Only this status (ok, timeout, ...). Repeatable.")]
Limit = Annotated[int | None, typer.Option("--limit", min=1, help="At most so many rows. The table shows 50 unless told otherwise.")]
All = Annotated[bool, typer.Option("--all", help="Every row ever stored, not only what stands (the newest per trial).")]
AsCsv = Annotated[bool, typer.Option("--csv", help="CSV on stdout: one line per row, without samples.")]
Compact = Annotated[
    bool, typer.Option("--compact", help="First write the rows that are in no Parquet file yet to a new one (needs DuckDB).")
]
Delete = Annotated[
    bool,
    typer.Option("--delete-originals", help="With --compact: delete JSON-lines files that are wholly in Parquet and quiet for 10 minutes."),
]

TABLE_ROWS = 50
# "GPU-" and eight digits, or "cpu-" and eight: enough to tell the boards of a node apart.
DEVICE_LETTERS = 12
_COLUMNS = (
    "operator",
    "problem",
    "kernel",
    "config",
    "chip",
    "status",
    "median us",
    "interval us",
    "TFLOP/s",
    "GB/s",
    "error",
    "W",
    "J",
    "when",
)
_RIGHT = ("median us", "interval us", "TFLOP/s", "GB/s", "error", "W", "J")
_CSV = (
    "operator", "problem_label", "problem_key", "dtype", "kernel", "backend", "library", "config_label", "chip", "device", "status", "kind",
    "reason", "median_us", "ci_low_us", "ci_high_us", "rounds", "tflops", "gb_per_s", "error", "tolerance", "checks", "l2_state",
    "launch_mode", "sm_clock_mhz", "power_w", "idle_power_w", "energy_j", "energy_reason", "key", "source_digest", "run_id", "recorded_at",
    "epoch", "device_uuid",
)  # fmt: skip


def command(app: typer.Typer) -> None:
    """Register the verb."""

    @app.command()
    def results(
        where: Where = None,
        operator: Operators = None,
        kernel: Kernels = None,
        chip: Chips = None,
        status: Statuses = None,
        limit: Limit = None,
        everything: All = False,
        as_json: AsJson = False,
        as_csv: AsCsv = False,
        compact: Compact = False,
        delete_originals: Delete = False,
    ) -> None:
        """Show what has been measured. By default the newest row per trial, and its failure where that is newer."""
        from klab.harness.store.paths import folders_to_read
        from klab.harness.store.query import latest
        from klab.harness.store.read import ReadReport, iter_results
        from klab.harness.store.remote import mirror_of, shown
        from klab.harness.store.select import Selection
        from klab.kernels.errors import UsageError

        if as_json and as_csv:
            raise UsageError("--json and --csv exclude each other")
        if delete_originals and not compact:
            raise UsageError("--delete-originals goes with --compact")
        folders = folders_to_read(where)
        if delete_originals and any(mirror_of(folder) for folder in folders):
            raise UsageError("--delete-originals is for folders of this machine: nothing is deleted behind a URL (docs/storage.md)")
        if compact:
            _compact(folders, delete_originals)
            return
        selection = Selection(operator or (), kernel or (), chip or (), status or ())
        report = ReadReport()
        there = [folder for folder in folders if folder.exists()]
        rows = selection.of(iter_results(there, report))
        stands: Iterable[Result] = rows if everything else latest(rows)
        if as_json:
            for row in islice(stands, limit):
                emit(row.to_json())
        elif as_csv:
            _csv(islice(stands, limit))
        else:
            _table(list(stands), limit or TABLE_ROWS, there)
        for line in report.lines():
            talk.print(line, style="yellow", markup=False, soft_wrap=True)
        selection.check_names()
        if not report.rows:
            talk.print(
                f"no results in {', '.join(map(shown, folders))} yet: `klab run --model qwen3-0.6b --chip auto` makes some",
                markup=False,
                soft_wrap=True,
            )


def _compact(folders: list[Path], delete_originals: bool) -> None:
    from klab.harness.store.compact import compact
    from klab.harness.store.remote import shown

    for folder in folders:
        done = compact(folder, delete_originals=delete_originals)
        where = f" in {shown(done.path)}" if done.path else ", nothing to write"
        talk.print(f"{shown(folder)}: {done.rows} new rows{where}", markup=False, soft_wrap=True)
        for path in done.deleted:
            talk.print(f"deleted {path}", markup=False, soft_wrap=True)
        for why in done.kept:
            talk.print(f"kept {why}", style="yellow", markup=False, soft_wrap=True)


def _table(rows: list[Result], limit: int, folders: list[Path]) -> None:
    if not rows:
        return
    from klab.harness.measure.calibration import device_of, read_calibrations
    from klab.harness.measure.correction import Correction
    from klab.harness.store.frame import config_label, gb_per_s, tflops

    def number(value: float | None, digits: int = 4) -> str:
        return "" if value is None else f"{value:.{digits}g}"

    # Times of several devices of one kind are compared here too: then each row says whose it is, and what a typical one would need.
    troubles: list[str] = []
    correction = Correction(rows, read_calibrations(folders, troubles))
    several = correction.several
    rows = sorted(rows, key=lambda r: (r.chip, r.operator, r.problem_label, r.median_us or float("inf")))
    shown = [
        (
            r.operator, r.problem_label, r.kernel.partition("/")[2], config_label(r), r.chip, _status(r),
            number(r.median_us, 5),
            "" if r.ci_low_us is None or r.ci_high_us is None else f"{r.ci_low_us:.5g}..{r.ci_high_us:.5g}",
            number(tflops(r)), number(gb_per_s(r)), number(r.error, 2), number(r.power_w), number(r.energy_j, 3), r.recorded_at[:16],
            *((device_of(r)[:DEVICE_LETTERS], _corrected(correction.apply(r))) if several else ()),
        )
        for r in rows[:limit]
    ]  # fmt: skip
    table(f"{len(rows)} results", (*_COLUMNS, *(("device", "corrected us") if several else ())), shown, (*_RIGHT, "corrected us"))
    for line in (*troubles, *correction.notes()):
        talk.print(line, style="yellow", markup=False, soft_wrap=True)
    if len(rows) > limit:
        talk.print(f"{len(rows) - limit} more: --limit {len(rows)} shows all, --json and --csv give all", soft_wrap=True)


def _corrected(r: Result) -> str:
    """The time as a typical device of its kind would need it, where that is known."""
    if "corrected" not in r.build or r.median_us is None:
        return ""
    return f"{r.median_us:.5g} ({r.ci_low_us:.5g}..{r.ci_high_us:.5g})"


def _status(r: Result) -> str:
    """The status; of a row that klab did not measure (a published one, say), also what it is."""
    imported = " (imported)" if r.build.get("imported") else ""
    return f"{r.status.value}{imported}" if r.kind in ("measured", r.status.value) else f"{r.status.value} ({r.kind})"


def _csv(rows: Iterable[Result]) -> None:
    from klab.harness.store.frame import config_label, gb_per_s, tflops

    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow(_CSV)
    for r in rows:
        derived = {
            "dtype": r.problem.get("dtype", "bfloat16"),
            "config_label": config_label(r),
            "rounds": len(r.samples_us),
            "tflops": tflops(r),
            "gb_per_s": gb_per_s(r),
            "status": r.status.value,
        }
        writer.writerow("" if v is None else v for v in (derived[c] if c in derived else getattr(r, c) for c in _CSV))
