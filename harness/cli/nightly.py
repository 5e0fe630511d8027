"""`klab nightly`: measure what the policy tracks, judge it against the nights before, and say it in every form that CI reads."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from klab.harness.cli import _options
from klab.harness.cli._console import emit, out, table, talk

if TYPE_CHECKING:
    from klab.harness.store.result import Result
    from klab.harness.watch.history import History
    from klab.harness.watch.policy import NightPolicy
    from klab.harness.watch.series import Night
    from klab.kernels.contract import Chip

PolicyFile = Annotated[Path, typer.Option("--policy", help="What is tracked, how it is measured and judged, and what is waived.")]
Out = Annotated[Path, typer.Option("--out", help="Folder for night.json, junit.xml, summary.md, badge.json, report.html and the raw rows.")]
Budget = Annotated[str | None, typer.Option("--budget", help="Time for everything: 90m, 2h. Default: the policy's, else until done.")]
Nights = Annotated[Path | None, typer.Option("--history", help="Folder of the nights. Default: the policy's, or results/local/nights.")]
Pack = Annotated[Path | None, typer.Option("--profile", help="The chosen pack. Default: profiles/tuned/CHIP/MODEL.json of each model.")]
Evidence = Annotated[
    list[Path] | None, typer.Option("--results", help="Where results are read that choose, where no profile does. Repeatable.")
]
Strict = Annotated[bool, typer.Option("--strict", help="End with 3 when there is a suspect and nothing worse.")]
OneDevice = Annotated[str | None, typer.Option("--device", help="GPU (UUID or index) to measure on, or all. Default: last night's.")]
Energy = Annotated[bool, typer.Option("--energy/--no-energy", help="On GPUs: the energy series too.")]
Record = Annotated[bool, typer.Option("--record/--no-record", help="Put the night into the history.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Show the series and the estimated time, and measure nothing.")]
Accept = Annotated[
    str | None,
    typer.Option("--accept", help="Measure nothing: write into the policy that the level of this series (* for any text) is the new one."),
]
Owner = Annotated[str, typer.Option("--owner", help="With --accept: who answers for it.")]
Reason = Annotated[str, typer.Option("--reason", help="With --accept: why.")]

# Judging, drawing and writing after the measuring, on two cores.
WRAP_UP_S = 6.0
_COLUMNS = ("verdict", "series", "tonight", "against usual", "kernel", "why")


def command(app: typer.Typer) -> None:
    """Register the verb."""

    @app.command()
    def nightly(
        policy: PolicyFile = Path("ci/policy.toml"),
        chip: _options.Chip = "auto",
        budget: Budget = None,
        out_dir: Out = Path("klab-night"),
        history: Nights = None,
        profile: Pack = None,
        results: Evidence = None,
        kernels: _options.KernelDirs = None,
        strict: Strict = False,
        device: OneDevice = None,
        energy: Energy = True,
        record: Record = True,
        fleet: _options.FleetKind = "local",
        address: _options.Address = None,
        dry_run: DryRun = False,
        accept: Accept = None,
        owner: Owner = "",
        reason: Reason = "",
        as_json: _options.AsJson = False,
    ) -> None:
        """Judge tonight's kernels.

        Exit codes: 0 fine, 1 slower, missing, broken or an expired waiver, 2 usage, 3 suspect (--strict), 4 could not measure.
        """
        from klab.harness.catalog.chips import find_real_chip
        from klab.harness.store.remote import local_of, writable
        from klab.harness.watch.history import History
        from klab.harness.watch.policy import read_policy, without_energy

        found = read_policy(policy)
        found = found if energy else without_energy(found)
        nights = History(local_of(history or found.history or _default_history()))
        if accept is not None:
            _accept(policy, accept, owner, reason, nights)
            return
        where = find_real_chip(chip)
        if dry_run:
            _show(found, where, kernels, profile, results, as_json=as_json)
            return
        if record:
            writable(nights.folder)
        night = _measure(
            found, where, nights, budget=budget, out_dir=out_dir, kernels=kernels, profile=profile, results=results,
            device=device, fleet=fleet, address=address,
        )  # fmt: skip
        _tell(night, nights, out_dir, record=record, strict=strict, as_json=as_json)


def _measure(
    policy: NightPolicy,
    chip: Chip,
    history: History,
    *,
    budget: str | None,
    out_dir: Path,
    kernels: list[Path] | None,
    profile: Path | None,
    results: list[Path] | None,
    device: str | None,
    fleet: str,
    address: str | None,
) -> Night:
    from klab.harness.cli._setup import deadline_of
    from klab.harness.fleet.open import open_fleet
    from klab.harness.store.journal import Journal
    from klab.harness.store.paths import folders_to_read
    from klab.harness.store.read import iter_results
    from klab.harness.store.remote import shown
    from klab.harness.store.result import Status
    from klab.harness.tune.job import new_run_id
    from klab.harness.watch.night import pick_devices, run_night
    from klab.harness.watch.tracked import watched
    from klab.kernels.discover import discover

    deadline = deadline_of(_options.seconds(budget or policy.measure.budget or None), reserve_s=WRAP_UP_S)
    folders = [folder for folder in folders_to_read(results) if folder.exists()]
    found = watched(policy, chip, discover(kernels or ()), profile=profile, results=lambda: iter_results(folders))
    run_id = new_run_id()
    wanted = device or policy.measure.device
    # Of a cluster's devices this machine knows nothing: it is asked for the named one, or for all.
    only = pick_devices(chip, history, wanted) if fleet == "local" else [wanted] if wanted not in ("", "all") else None
    with (
        open_fleet(fleet, [chip], run_id, address=address, kernel_dirs=kernels or (), only_devices=only) as opened,
        Journal(out_dir, run_id) as journal,
    ):
        journal.ready()

        def store(row: Result) -> None:
            journal.append(row)
            if row.status not in (Status.OK, Status.UNSUPPORTED):
                line = f"{row.status.value}: {row.kernel} on {row.problem_label}: {row.reason}"
                talk.print(line, style="yellow", markup=False, soft_wrap=True)

        def told(line: str) -> None:
            talk.print(line, markup=False, soft_wrap=True)

        try:
            return run_night(
                policy, chip, fleet=opened, history=history, deadline=deadline, on_result=store, told=told, found=found, identity=run_id
            )
        except KeyboardInterrupt:
            talk.print(f"interrupted: no verdicts; {journal.rows} rows are in {shown(out_dir)}", markup=False, soft_wrap=True)
            raise


def _tell(night: Night, history: History, folder: Path, *, record: bool, strict: bool, as_json: bool) -> None:
    """Write every output, what can be least done without first; then the table, and the exit code."""
    from klab.harness.choose.profile import write_text
    from klab.harness.report.night_page import night_page
    from klab.harness.store.remote import shown
    from klab.harness.watch.badge import badge
    from klab.harness.watch.junit import junit
    from klab.harness.watch.night import exit_code
    from klab.harness.watch.night_json import night_json
    from klab.harness.watch.summary import github_annotations, summary
    from klab.harness.watch.wording import headline, lapsed_lines
    from klab.kernels.errors import CannotMeasure

    earlier = history.nights(night.chip)
    text = summary(night, earlier, strict=strict)
    unwritten: list[str] = []

    def keep(write: Callable[..., object], *what: object) -> None:
        """A full disk hides no verdict: what it does not take is told, and the other files are tried."""
        try:
            write(*what)
        except CannotMeasure as error:
            unwritten.append(str(error))

    keep(write_text, folder / "night.json", night_json(night, strict=strict))
    if record:
        keep(history.add, night)
    keep(write_text, folder / "junit.xml", junit(night, strict=strict))
    keep(write_text, folder / "summary.md", text)
    keep(write_text, folder / "badge.json", badge(night, strict=strict))
    _append_summary(text)
    if os.environ.get("GITHUB_ACTIONS") == "true":
        for command in github_annotations(night, strict=strict):
            print(command) if not as_json else talk.print(command, markup=False, soft_wrap=True)
    code = exit_code(night, strict=strict)
    code = CannotMeasure.exit_code if unwritten and code != 1 else code
    _show_verdicts(night, strict=strict, as_json=as_json)
    if as_json:
        emit({"type": "night", "identity": night.identity, "headline": headline(night), "exit": code, "out": str(folder.resolve()),
              "lapsed": [one.to_json() for one in night.lapsed]})  # fmt: skip
    for told in lapsed_lines(night):
        talk.print(told, style="red", markup=False, soft_wrap=True)
    for note in night.notes:
        talk.print(note, style="yellow", markup=False, soft_wrap=True)
    page = folder / "report.html"
    try:
        write_text(page, night_page(night, earlier, strict=strict))
    except Exception as error:  # noqa: BLE001  whatever drawing meets, the verdicts stand and are told
        talk.print(f"no report page: {type(error).__name__}: {error}", style="red", markup=False, soft_wrap=True)
    for line in unwritten:
        talk.print(f"klab: {line}", style="red", markup=False, soft_wrap=True)
    talk.print(f"{headline(night)}. {shown(folder)}", markup=False, soft_wrap=True)
    if code:
        raise typer.Exit(code)


def _append_summary(text: str) -> None:
    """GitHub shows what is in this file; a run there must not fail because of it."""
    path = os.environ.get("GITHUB_STEP_SUMMARY")
    if not path:
        return
    try:
        with Path(path).open("a", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        talk.print(f"no job summary: {path}: {error.strerror}", style="yellow", markup=False, soft_wrap=True)


def _show_verdicts(night: Night, *, strict: bool, as_json: bool) -> None:
    from klab.harness.watch.series import Call
    from klab.harness.watch.wording import change_of, fails, ordered, reason_of, value_of

    if as_json:
        for one in ordered(night.verdicts):
            emit({"type": "verdict", "name": one.series.name, "fails": fails(one, strict), **one.to_json(), "series": one.series.to_json(),
                  "point": one.point.to_json() if one.point else None})  # fmt: skip
        return
    loud = [one for one in ordered(night.verdicts) if one.call != Call.OK] or ordered(night.verdicts)
    rows = [
        (one.call, one.series.name, value_of(one), change_of(one), one.point.kernel.partition("/")[2] if one.point else "", reason_of(one))
        for one in loud
    ]
    quiet = len(night.verdicts) - len(loud)
    table(f"The night of {night.at} on {night.chip}", _COLUMNS, rows, right=("tonight",))
    if quiet:
        out.print(f"and {quiet} ok")


def _show(
    policy: NightPolicy,
    chip: Chip,
    kernels: list[Path] | None,
    profile: Path | None,
    results: list[Path] | None,
    *,
    as_json: bool,
) -> None:
    """What would be measured, and about how long it would take."""
    from datetime import UTC, datetime

    from klab.harness.store.paths import folders_to_read
    from klab.harness.store.read import iter_results
    from klab.harness.watch.night import estimate_night_s
    from klab.harness.watch.tracked import watched
    from klab.harness.watch.waivers import lapsed
    from klab.kernels.discover import discover

    folders = [folder for folder in folders_to_read(results) if folder.exists()]
    found = watched(policy, chip, discover(kernels or ()), profile=profile, results=lambda: iter_results(folders))
    rows = [(one.series(m), one) for one in found.tracked for m in one.metrics]
    seconds = estimate_night_s(policy, chip, found)
    if as_json:
        for series, one in rows:
            emit({"type": "series", "name": series.name, **series.to_json(), "kernels": [t.kernel for t in one.trials], "found": one.found})
        emit({"type": "estimate", "series": len(rows), "seconds": round(seconds, 1)})
    else:
        cells = [(s.name, ", ".join(t.kernel.partition("/")[2] for t in one.trials), one.found, ", ".join(s.models)) for s, one in rows]
        table(f"{len(rows)} series on {chip.title}", ("series", "kernels", "found", "models"), cells)
        out.print(f"about {seconds / 60:.0f} minutes (modelled, not measured)")
    for past in lapsed(policy.waivers, datetime.now(UTC).date()):
        talk.print(past.told, style="red", markup=False, soft_wrap=True)
    for note in found.notes:
        talk.print(note, style="yellow", markup=False, soft_wrap=True)


def _accept(policy: Path, series: str, owner: str, reason: str, history: History) -> None:
    from datetime import UTC, datetime

    from klab.harness.watch.waivers import accept

    nights = {chip: history.nights(chip) for chip in history.chips()}
    made, count = accept(policy, series, owner, reason, nights, datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"))
    talk.print(f"{policy}: the level of {count} series since {made.since} is accepted by {made.owner}", markup=False, soft_wrap=True)


def _default_history() -> Path:
    from klab.harness.store.paths import folder_to_write

    return folder_to_write() / "nights"
