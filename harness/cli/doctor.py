"""`klab doctor`: what this machine is, and what is missing for good measurements."""

from __future__ import annotations

from typing import Annotated

import typer

from klab.harness.cli._options import AsJson, Results
from klab.kernels.errors import CannotMeasure

RestoreClocks = Annotated[
    bool, typer.Option("--restore-clocks", help="Put back the power limit and clocks that a killed tuning run left changed.")
]


def command(app: typer.Typer) -> None:
    """Register the verb."""

    @app.command()
    def doctor(results: Results = None, restore_clocks: RestoreClocks = False, as_json: AsJson = False) -> None:
        """Say what this machine is and what is missing for good measurements, each with the remedy.

        Exit code 0: this machine can measure (a machine without a GPU measures its CPU). 4: it cannot.
        """
        from klab.harness.cli._console import emit, out, table, talk
        from klab.harness.measure.health import usable, warn
        from klab.harness.measure.probes import examine
        from klab.harness.store.paths import folder_to_write
        from klab.harness.tune.clock_control import put_back
        from klab.harness.tune.clock_state import left_changed

        if restore_clocks:
            for before in put_back(allowed=True):
                talk.print(f"put back: {before.said}", markup=False, soft_wrap=True)
        findings = examine(folder_to_write(results))
        for before in left_changed():
            remedy = f"klab doctor --restore-clocks, or by hand: {before.remedy}"
            findings.append(warn("clocks", f"a tuning run that was killed left this to put back: {before.said}", remedy))
        if as_json:
            for finding in findings:
                emit(finding.to_json())
        else:
            rows = [(f.level, f.topic, f.finding, f.remedy) for f in findings]
            table("This machine", ("", "topic", "finding", "remedy"), rows)
        counts = {level: sum(f.level == level for f in findings) for level in ("ok", "warn", "fail")}
        verdict = "usable" if usable(findings) else "not usable"
        (talk if as_json else out).print(f"{verdict}: {counts['ok']} ok, {counts['warn']} warnings, {counts['fail']} failures")
        if not usable(findings):
            raise typer.Exit(CannotMeasure.exit_code)
