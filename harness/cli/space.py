"""`klab space`: recorded spaces as files: what is in one, from one format to another, and out of klab's own results."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from klab.harness.cli._console import emit, table, talk
from klab.harness.cli._options import AsJson

if TYPE_CHECKING:
    from klab.harness.tune.replay.export import Recordings
    from klab.harness.tune.replay.recorded import RecordedSpace

File = Annotated[Path, typer.Argument(help="A Kernel Tuner cache or a T4 file, perhaps gzipped, perhaps not closed.")]
Files = Annotated[list[Path], typer.Argument(help="Kernel Tuner caches or T4 files, perhaps gzipped, perhaps not closed.")]
Target = Annotated[Path, typer.Argument(help="The file to write; gzipped where its name ends in .gz.")]
Format = Annotated[str, typer.Option("--format", help="kernel-tuner or t4.")]
Force = Annotated[bool, typer.Option("--force", help="Replace a file that is there.")]
ChipName = Annotated[str, typer.Option("--chip", "-c", help="Results of this chip.")]
ProblemName = Annotated[
    str | None, typer.Option("--problem", "-p", help="A problem's key, or a part of its label. Default: every problem.")
]
Where = Annotated[
    list[Path] | None,
    typer.Option("--results", help="Folder or file to read. Repeatable. Default: $KLAB_RESULTS, or results/ of the checkout."),
]
Out = Annotated[Path, typer.Option("--out", "-o", help="A file for one problem, or a folder: one file per problem.")]
Epoch = Annotated[str | None, typer.Option("--epoch", help="Results of this epoch (its beginning will do). Default: the newest.")]
PolicyKey = Annotated[
    str | None, typer.Option("--policy", help="Results of this policy (its beginning will do). Default: that of most candidates.")
]

# Shares above the optimum that tell how hard a space is.
WITHIN = (0.01, 0.05, 0.20)
# Problems named in an error.
NAMED = 8


def command(app: typer.Typer) -> None:
    """Register the verb."""
    space = typer.Typer(name="space", help="Recorded spaces: look into, convert, and export from results.", no_args_is_help=True)
    app.add_typer(space)

    @space.command()
    def show(files: Files, as_json: AsJson = False) -> None:
        """Tell what recorded spaces hold: parameters, failures, the optimum and how rare it is, and what they cost to record."""
        from klab.harness.tune.replay.files import read_space

        for path in files:
            recorded = read_space(path)
            row = facts(recorded)
            if as_json:
                emit({"file": str(path), **row})
            else:
                _show(row)
                _notes(recorded)

    @space.command()
    def convert(source: File, target: Target, format: Format = "kernel-tuner", force: Force = False, as_json: AsJson = False) -> None:
        """Write a recorded space in another format. A file that was not closed or is torn comes out whole, with what is whole in it."""
        from klab.harness.tune.replay.files import read_space, write_space

        recorded = read_space(source)
        write_space(recorded, target, format, force=force)
        _wrote(recorded, target, format, as_json)

    @space.command()
    def export(
        out: Out,
        chip: ChipName,
        problem: ProblemName = None,
        results: Where = None,
        format: Format = "kernel-tuner",
        epoch: Epoch = None,
        policy: PolicyKey = None,
        force: Force = False,
        as_json: AsJson = False,
    ) -> None:
        """Write what was measured of a problem on a chip as a recorded space: all candidates, with samples, clocks and power."""
        from klab.harness.store.paths import folders_to_read
        from klab.harness.store.read import ReadReport, iter_results
        from klab.harness.tune.replay.export import export as exported
        from klab.harness.tune.replay.export import recordings
        from klab.harness.tune.replay.files import ENDING, write_space
        from klab.kernels.errors import UsageError

        report = ReadReport()
        folders = [folder for folder in folders_to_read(results) if folder.exists()]
        chosen = _chosen(recordings(iter_results(folders, report), chip), problem)
        for line in report.lines():
            talk.print(line, style="yellow", markup=False, soft_wrap=True)
        to_folder = out.is_dir() or (not out.suffix and (len(chosen) > 1 or problem is None))
        if len(chosen) > 1 and not to_folder:
            asked = f"--problem {problem!r} matches" if problem else "there are"
            raise UsageError(f"{asked} {len(chosen)} problems: {_named(chosen)}; name one, or a folder with --out")
        if format not in ENDING:
            raise UsageError(f"there is no format {format!r}; there are {', '.join(ENDING)}")
        wrote = 0
        for recording in chosen:
            try:
                recorded = exported(recording, epoch=epoch, policy=policy)
            except UsageError as error:
                if len(chosen) == 1:
                    raise
                talk.print(f"left out: {error}", style="yellow", markup=False, soft_wrap=True)
                continue
            target = out / f"{_file_stem(recording, chosen)}{ENDING[format]}" if to_folder else out
            write_space(recorded, target, format, force=force)
            _wrote(recorded, target, format, as_json)
            wrote += 1
        if not wrote:
            raise UsageError(f"none of the {len(chosen)} problems can be exported")


def facts(recorded: RecordedSpace) -> dict[str, Any]:
    """What there is to say of a recorded space, as JSON."""
    import numpy as np

    valid = recorded.time_us[np.isfinite(recorded.time_us)]
    best = int(recorded.time_us.argmin())
    rounds = [len(s) for s in recorded.samples_us]
    kept = [name for name in ("sm_clock_mhz", "power_w", "energy_j", "clocks_mhz") if getattr(recorded, name) is not None]
    return {
        "name": recorded.name,
        "device": recorded.device,
        "kernel": recorded.kernel,
        "kind": recorded.kind,
        "problem_size": recorded.problem_size,
        "digest": recorded.digest,
        "candidates": len(recorded.space),
        "status": recorded.by_status,
        "parameters": {name: len(values) for name, values in zip(recorded.space.names, recorded.space.values, strict=True)},
        "optimum_us": recorded.optimum_us,
        "optimum": recorded.space.point(best),
        "median_us": float(np.median(valid)),
        "worst_us": float(valid.max()),
        "within": {f"{share:.0%}": int((valid <= (1 + share) * recorded.optimum_us).sum()) for share in WITHIN},
        "rounds": int(np.median(rounds)),
        "compile_s": float(recorded.compile_s.sum()),
        "benchmark_s": float(recorded.benchmark_s.sum()),
        "columns": [*kept, *recorded.metrics],
        "about": dict(recorded.about),
        "notes": list(recorded.notes),
    }


def _show(row: dict[str, Any]) -> None:
    valid = row["status"].get("ok", 0)
    failures = ", ".join(f"{n:,} {status}" for status, n in row["status"].items() if status != "ok")
    lines: list[tuple[str, str]] = [
        ("device", row["device"]),
        ("kernel", row["kernel"] + (f", {row['about']['problem_label']}" if "problem_label" in row["about"] else "")),
        ("problem size", "x".join(map(str, row["problem_size"])) if isinstance(row["problem_size"], list) else row["problem_size"] or ""),
        ("recorded by", "klab" if row["kind"] == "measured" else "others"),
        ("candidates", f"{row['candidates']:,}: {valid:,} valid" + (f", {failures}" if failures else "")),
        *[("parameter", f"{name}: {n} {'value' if n == 1 else 'values'}") for name, n in row["parameters"].items()],
        ("optimum", f"{row['optimum_us']:.6g} us: {' '.join(f'{k}={v}' for k, v in row['optimum'].items())}"),
        ("median, worst", f"{row['median_us']:.6g} us, {row['worst_us']:.6g} us"),
        *[(f"within {share}", f"{n:,} of {valid:,}") for share, n in row["within"].items()],
        ("rounds", f"{row['rounds']} in the median candidate"),
        ("took", f"{row['compile_s']:,.1f} s compiling, {row['benchmark_s']:,.1f} s on the device"),
        ("also has", ", ".join(row["columns"])),
        ("digest", row["digest"]),
    ]
    table(row["name"], ("what", ""), [line for line in lines if line[1]])


def _notes(recorded: RecordedSpace) -> None:
    for note in recorded.notes:
        talk.print(f"{recorded.name}: {note}", style="yellow", markup=False, soft_wrap=True)


def _wrote(recorded: RecordedSpace, target: Path, format: str, as_json: bool) -> None:
    if as_json:
        row = {"file": str(target), "format": format, "name": recorded.name, "candidates": len(recorded.space)}
        emit({**row, "status": recorded.by_status, "digest": recorded.digest, "notes": list(recorded.notes)})
        return
    _notes(recorded)
    talk.print(f"{target}: {len(recorded.space):,} candidates", markup=False, soft_wrap=True)


def _chosen(found: list[Recordings], problem: str | None) -> list[Recordings]:
    """The problem with this key or label, else all whose label has this part; UsageError names what there is."""
    from klab.kernels.errors import UsageError

    if problem is None:
        return found
    exact = [r for r in found if problem in (r.problem_key, r.label)]
    matching = exact or [r for r in found if problem in r.label or (len(problem) >= 4 and r.problem_key.startswith(problem))]
    if not matching:
        raise UsageError(f"no problem {problem!r} among the results of {found[0].rows[0].chip}; there are: {_named(found)}")
    return matching


def _named(found: Sequence[Recordings]) -> str:
    more = f" and {len(found) - NAMED} more" if len(found) > NAMED else ""
    return "; ".join(f"{r.label} ({r.problem_key}, {r.candidates} candidates)" for r in found[:NAMED]) + more


def _file_stem(recording: Recordings, among: Sequence[Recordings]) -> str:
    """Its slug; with the beginning of its key where two problems share it."""
    shared = sum(r.slug == recording.slug for r in among) > 1
    return f"{recording.slug}_{recording.problem_key[:8]}" if shared else recording.slug
