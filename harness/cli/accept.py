"""`klab accept`: is this machine what was ordered? Everything is run, graded with reasons, and put on one page for the provider."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from klab.harness.cli import _options
from klab.harness.cli._console import emit, out, table, talk
from klab.kernels.errors import UsageError

if TYPE_CHECKING:
    from klab.harness.watch.accept import Acceptance

ReferenceName = Annotated[
    str | None, typer.Option("--reference", help="What is expected: a chip (h200) or a TOML file. Default: the chip that is here.")
]
Minutes = Annotated[float, typer.Option("--minutes", help="For everything. Below 4 nothing can be said of how it warms.")]
Gpus = Annotated[int | None, typer.Option("--gpus", help="How many were ordered: fewer is a failure.")]
Devices = Annotated[list[str] | None, typer.Option("--device", help="Only this GPU, by UUID or CUDA index. Repeatable.")]
Out = Annotated[Path | None, typer.Option("--out", "-o", help="Folder for accept.html and accept.json. Default: under the results.")]
RecordIt = Annotated[bool, typer.Option("--record", help="If it is accepted: let later machines be judged by what this one did.")]
Strict = Annotated[bool, typer.Option("--strict", help="Warnings end with exit code 3.")]


def command(app: typer.Typer) -> None:
    """Register the verb."""

    @app.command()
    def accept(
        chip: _options.Chip = "auto",
        reference: ReferenceName = None,
        minutes: Minutes = 10.0,
        gpus: Gpus = None,
        device: Devices = None,
        out_folder: Out = None,
        results: _options.Results = None,
        record: RecordIt = False,
        strict: Strict = False,
        as_json: _options.AsJson = False,
    ) -> None:
        """Accept a machine: speed, heat, clocks, power, memory errors, links, settings and noise, graded against its chip.

        Changes no setting. Exit 0: accepted (with or without warnings); 1: not accepted; 3: cannot be decided (with --strict also for
        warnings); 4: cannot be run.
        """
        from klab.harness.catalog.chips import find_real_chip
        from klab.harness.catalog.models import PROFILES
        from klab.harness.measure.calibration import read_calibrations
        from klab.harness.store.paths import folder_to_read, folder_to_write
        from klab.harness.watch import accept as acceptance
        from klab.harness.watch.reference_nodes import find_reference, kind_of
        from klab.harness.watch.reference_nodes import record as write_record

        if not 0 < minutes <= 24 * 60:
            raise UsageError(f"--minutes {minutes:g}: give more than none and no more than a day")
        if gpus is not None and gpus < 1:
            raise UsageError(f"--gpus {gpus}: at least one is ordered")
        found_chip = find_real_chip(chip)
        store = folder_to_write(results) / "acceptance"
        expected = find_reference(reference or kind_of(found_chip), [PROFILES / "acceptance", store])
        if reference and not expected.expected and expected.name != kind_of(found_chip):
            known = ", ".join(sorted(path.stem for path in (PROFILES / "acceptance").glob("*.toml")))
            raise UsageError(f"--reference {reference}: nothing is published or recorded for it; published are {known}")
        for note in expected.notes:
            talk.print(note, style="yellow", markup=False, soft_wrap=True)
        require_writable(out_folder or store)
        found = acceptance.accept(
            found_chip, expected, minutes=minutes, expected_gpus=gpus, only=device, results=store,
            calibrations=read_calibrations({store.parent, folder_to_read(None)}),
            tell=lambda line: talk.print(line, markup=False, soft_wrap=True),
        )  # fmt: skip
        _show(found, as_json=as_json)  # first: a disk that is full by now must not cost the answer
        folder = out_folder or store / "reports" / f"{found.at[:19].replace(':', '')}-{found.environment.get('host', 'host')}"
        _write(found, folder)
        talk.print(f"the page and the raw readings: {folder}", markup=False, soft_wrap=True)
        if record:
            paths = [write_record(store, one) for one in found.records()]
            said = f"recorded {len(paths)} devices under {store}" if paths else "nothing was recorded: this machine is no example"
            talk.print(said, markup=False, soft_wrap=True)
        code = found.outcome.exit_code(strict=strict)
        if code:
            raise typer.Exit(code)


def require_writable(folder: Path) -> None:
    """Make the folder; UsageError where it cannot be written, before minutes are spent."""
    import os

    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"cannot write {folder}: {error.strerror}; name another folder with --out or --results") from None
    if not os.access(folder, os.W_OK):
        raise UsageError(f"cannot write {folder}: permission denied; name another folder with --out or --results")


def _write(found: Acceptance, folder: Path) -> None:
    from klab.harness.choose.profile import write_text
    from klab.harness.report.accept_page import accept_page

    write_text(folder / "accept.json", json.dumps(found.to_json(), allow_nan=False, default=str) + "\n")
    write_text(folder / "accept.html", accept_page(found))


def _show(found: Acceptance, *, as_json: bool) -> None:
    from klab.harness.report.accept_page import FINDINGS, device_rows, finding_rows

    if as_json:
        for check in found.checks:
            emit({"type": "check", **check.to_json()})
        emit({"type": "outcome", "outcome": found.outcome.value, "chip": found.chip, "reference": found.reference, "at": found.at})
        return
    columns, rows = device_rows(found)
    table(f"{len(found.devices)} x {found.title}", columns, rows)
    findings = finding_rows(found)
    if findings:
        table("Findings", FINDINGS, findings)
    out.print(f"{found.outcome.value}; what is expected of {found.reference}: {found.expected_from}", markup=False, soft_wrap=True)
