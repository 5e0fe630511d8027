"""`klab doctor`: what this machine is, and what is missing for good measurements."""

from __future__ import annotations

import typer

from klab.harness.cli._options import AsJson, Results
from klab.kernels.errors import CannotMeasure


def command(app: typer.Typer) -> None:
    """Register the verb."""

    @app.command()
    def doctor(results: Results = None, as_json: AsJson = False) -> None:
        """Say what this machine is and what is missing for good measurements, each with the remedy.

        Exit code 0: this machine can measure (a machine without a GPU measures its CPU). 4: it cannot.
        """
        from klab.harness.cli._console import emit, out, table, talk
        from klab.harness.measure.health import usable
        from klab.harness.measure.probes import examine
        from klab.harness.store.paths import folder_to_write

        findings = examine(folder_to_write(results))
        if as_json:
            for finding in findings:
                emit(finding.to_json())
        else:
            marks = {"ok": "[green]ok[/]", "warn": "[yellow]warn[/]", "fail": "[bold red]fail[/]"}
            rows = [(marks[f.level], f.topic, f.finding, f.remedy) for f in findings]
            table("This machine", ("", "topic", "finding", "remedy"), rows)
        counts = {level: sum(f.level == level for f in findings) for level in ("ok", "warn", "fail")}
        verdict = "usable" if usable(findings) else "not usable"
        (talk if as_json else out).print(f"{verdict}: {counts['ok']} ok, {counts['warn']} warnings, {counts['fail']} failures")
        if not usable(findings):
            raise typer.Exit(CannotMeasure.exit_code)
