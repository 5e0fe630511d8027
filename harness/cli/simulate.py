"""`klab simulate`: search strategies on recorded spaces instead of a chip, one by one or as a scoreboard against other tuners."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from klab.harness.cli import _options
from klab.harness.cli._console import emit, out, table, talk

if TYPE_CHECKING:
    from klab.harness.tune.replay.recorded import RecordedSpace
    from klab.harness.tune.replay.scoreboard import Scoreboard
    from klab.harness.tune.strategy import Prior

Spaces = Annotated[
    list[Path], typer.Option("--space", help="A recorded space (Kernel Tuner cache or T4, also gzipped), or a folder of them. Repeatable.")
]
Strategies = Annotated[list[str] | None, typer.Option("--strategy", "-s", help="A search strategy. Repeatable. Default: klab's default.")]
Repeats = Annotated[int | None, typer.Option("--repeats", help="Runs per strategy and space. Default: 10; 50 with --scoreboard.")]
Evaluations = Annotated[int | None, typer.Option("--evaluations", help="Budget in distinct candidates. Default: 400.")]
GpuSeconds = Annotated[float | None, typer.Option("--gpu-seconds", help="Budget in recorded seconds of the chip instead.")]
Seed = Annotated[int, typer.Option("--seed", min=0, help="Seed of the first repeat; each further one counts up.")]
Warm = Annotated[
    list[Path] | None,
    typer.Option("--warm", help="A space of the same kernel on another chip or shape to start from; shown with and without."),
]
WholeBoard = Annotated[bool, typer.Option("--scoreboard", help="All of klab's strategies, or those named, and other tuners'.")]
Runs = Annotated[Path | None, typer.Option("--runs", help="Scoreboard: folder of runs, not run twice. Default: results/local/scoreboard.")]
Jobs = Annotated[int, typer.Option("--jobs", min=1, help="Scoreboard: processes.")]
Peers = Annotated[bool, typer.Option("--peers/--no-peers", help="Scoreboard: with Kernel Tuner's strategies and Optuna's TPE, or without.")]
Show = Annotated[bool, typer.Option("--show", help="Scoreboard: run nothing, show what is there.")]
Markdown = Annotated[Path | None, typer.Option("--markdown", help="Scoreboard: also write the page to this file.")]
Note = Annotated[list[str] | None, typer.Option("--note", help="Scoreboard: a line for the page, such as the spaces' licence. Repeatable.")]


def command(app: typer.Typer) -> None:
    """Register the verb."""

    @app.command()
    def simulate(
        space: Spaces,
        strategy: Strategies = None,
        repeats: Repeats = None,
        evaluations: Evaluations = None,
        gpu_seconds: GpuSeconds = None,
        seed: Seed = 0,
        warm: Warm = None,
        scoreboard: WholeBoard = False,
        runs: Runs = None,
        jobs: Jobs = 1,
        peers: Peers = True,
        show: Show = False,
        markdown: Markdown = None,
        note: Note = None,
        as_json: _options.AsJson = False,
    ) -> None:
        """Search recorded spaces as if they were a chip: what a strategy finds, after how many candidates and GPU seconds."""
        from klab.harness.tune.strategy import find_strategy
        from klab.kernels.errors import UsageError

        for name in strategy or ():
            find_strategy(name)
        if scoreboard:
            refused = {"--gpu-seconds": gpu_seconds is not None, "--warm": bool(warm), "--seed": seed != 0}
            if any(refused.values()):
                raise UsageError(f"{next(o for o, given in refused.items() if given)} does not go with --scoreboard")
            found = _read(space)
            _scoreboard(found, strategy or (), repeats, evaluations, runs, jobs, peers, show, markdown, note or (), as_json)
            return
        if evaluations is not None and gpu_seconds is not None:
            raise UsageError("give --evaluations or --gpu-seconds, not both")
        _simulate(
            _read(space), strategy or (), 10 if repeats is None else repeats, evaluations, gpu_seconds, seed, _read(warm or ()), as_json
        )


def _read(paths: Sequence[Path]) -> list[RecordedSpace]:
    """Each file, and each file of each folder whose name ends as recorded spaces do; UsageError for a folder without any."""
    from klab.harness.tune.replay.files import read_space
    from klab.harness.tune.replay.simulate import require_valid
    from klab.kernels.errors import UsageError

    found: list[RecordedSpace] = []
    for path in paths:
        files = sorted(f for f in path.iterdir() if f.name.endswith((".json", ".json.gz"))) if path.is_dir() else [path]
        if not files:
            raise UsageError(f"{path} has no recorded space (*.json, *.json.gz)")
        for file in files:
            recorded = read_space(file)
            for line in recorded.notes:
                talk.print(f"{file.name}: {line}", style="yellow", markup=False)
            require_valid(recorded)
            if recorded in found:
                talk.print(f"{file}: the same space as one before it; it counts once", style="yellow", markup=False)
            else:
                found.append(recorded)
    return found


def _simulate(
    spaces: Sequence[RecordedSpace],
    names: Sequence[str],
    repeats: int,
    evaluations: int | None,
    gpu_seconds: float | None,
    seed: int,
    warm: Sequence[RecordedSpace],
    as_json: bool,
) -> None:
    from klab.harness.tune import strategy
    from klab.harness.tune.replay.report import summary
    from klab.harness.tune.replay.score import baseline
    from klab.harness.tune.replay.simulate import MARKS, candidate_s, run_of
    from klab.harness.tune.replay.simulate import simulate as run_simulation
    from klab.harness.tune.search import Budget
    from klab.kernels.errors import UsageError

    if repeats < 1:
        raise UsageError(f"--repeats {repeats}: at least one run is needed")
    budget = Budget(device_s=gpu_seconds) if gpu_seconds is not None else Budget(400 if evaluations is None else evaluations)
    rows: list[dict[str, Any]] = []
    for recorded in spaces:
        cost_s = candidate_s(recorded)
        if gpu_seconds is not None and gpu_seconds < cost_s.min():
            raise UsageError(
                f"{recorded.name}: --gpu-seconds {gpu_seconds:g} is too small for one evaluation; the cheapest took {cost_s.min():.3g} s"
            )
        affordable = len(cost_s) if gpu_seconds is None else max(1, int(gpu_seconds / max(float(cost_s.mean()), 1e-9)))
        most = min(budget.evaluations or affordable, len(cost_s))
        limit_s = gpu_seconds if gpu_seconds is not None else most * float(cost_s.mean())
        yardstick = baseline(recorded, most_evaluations=most, by_seconds=gpu_seconds is not None)
        marks = [m for m in MARKS if m <= most]
        for name in names or [strategy.DEFAULT]:
            for label, prior in _priors(recorded, warm):
                done = []
                for at in range(seed, seed + repeats):
                    run = run_of(recorded, run_simulation(recorded, name, seed=at, budget=budget, prior=prior), at)
                    done.append(run)
                    if as_json:
                        emit({"type": "run", "space": recorded.name, "strategy": name, "start": label, **run.to_json()})
                rows.append({"strategy": name, "start": label, **summary(recorded, done, yardstick, marks, limit_s)})
                if as_json:
                    emit({"type": "summary", **rows[-1]})
    if not as_json:
        _print(rows)


def _priors(recorded: RecordedSpace, warm: Sequence[RecordedSpace]) -> Iterator[tuple[str, Prior]]:
    from klab.harness.tune.strategy import Prior
    from klab.harness.tune.transfer import transfer

    yield "cold", Prior()
    # Parameters of another kernel may have the same names and mean something else.
    others = [w for w in warm if w.kernel == recorded.kernel and w.digest != recorded.digest]
    if others:
        yield "warm", Prior(expected=transfer(recorded.space, [(w.space, w.time_us) for w in others]))
    elif warm:
        talk.print(
            f"{recorded.name}: no other space of {recorded.kernel} in --warm; only the cold start is run", style="yellow", markup=False
        )


def _print(rows: Sequence[dict[str, Any]]) -> None:
    marks = list(dict.fromkeys(m for row in rows for m in row["best_over_optimum"]))
    heads = ["space", "strategy", "start", "runs", "made", *marks, "end", "end p90", "s to 5%", "s to 1%", "score"]
    shown = []
    for row in rows:
        within = [row[f"within_{share}"] for share in ("5%", "1%")]
        ratios = [row["best_over_optimum"].get(m) for m in marks]
        shown.append(
            [
                *(row["space"], row["strategy"], row["start"], row["runs"], f"{row['evaluations']:.0f}"),
                *("" if r is None else f"{r:.4f}" for r in ratios),
                *(f"{row['end_best_over_optimum']:.4f}", f"{row['end_best_over_optimum_p90']:.4f}"),
                *(f"{w['restricted_mean_s']:.0f} ({w['reached']}/{row['runs']})" for w in within),
                "" if row["score"] is None else f"{row['score']:.3f}",
            ]
        )
    table("Best found / optimum on recorded spaces", heads, shown, right=heads[3:])
    out.print(
        "Numbers head the mean after so many distinct candidates. s to 5%: simulated seconds to within 5% of the optimum, "
        "mean restricted to the budget (runs that arrived / runs). score: 0 random search, 1 the optimum at once."
    )


def _scoreboard(
    spaces: Sequence[RecordedSpace],
    names: Sequence[str],
    repeats: int | None,
    evaluations: int | None,
    runs: Path | None,
    jobs: int,
    peers: bool,
    show: bool,
    markdown: Path | None,
    notes: Sequence[str],
    as_json: bool,
) -> None:
    from klab.harness.store.paths import folder_to_write
    from klab.harness.tune.replay import scoreboard as boards
    from klab.harness.tune.replay.scoreboard_page import cells, columns, comparison, verdict
    from klab.harness.tune.replay.scoreboard_page import markdown as page

    board = boards.scoreboard(
        spaces,
        runs or folder_to_write() / "scoreboard",
        names=names,
        repeats=boards.REPEATS if repeats is None else repeats,
        evaluations=boards.EVALUATIONS if evaluations is None else evaluations,
        with_peers=peers,
    )
    for name, why in board.absent.items():
        talk.print(f"not here: {name}: {why}", style="yellow", markup=False)
    if not show:
        _fill(board, jobs)
    found = board.standings()
    if markdown:
        markdown.parent.mkdir(parents=True, exist_ok=True)
        given = [word for space in spaces for word in ("--space", space.name)]
        command = shlex.join(["klab", "simulate", "--scoreboard", *given, "--repeats", str(board.repeats)])
        markdown.write_text(page(board, command=command, licences=notes), encoding="utf-8")
    if as_json:
        for standing in found:
            emit({"type": "standing", **standing.to_json()})
        for row in comparison(board, found):
            emit(row)
        return
    heads = columns(board)
    table("Scoreboard", heads, [cells(s) for s in found], right=heads[2:])
    out.print("\n".join(verdict(board, found)), markup=False, soft_wrap=True)


def _fill(board: Scoreboard, jobs: int) -> None:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    total = sum(len(turn.seeds) for turn in board.missing())
    if not total:
        return
    if not talk.is_terminal:
        talk.print(f"{total} runs to do", soft_wrap=True)
    columns = (TextColumn("runs"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=talk, disable=not talk.is_terminal) as progress:
        task = progress.add_task("runs", total=total)
        board.fill(jobs=jobs, on_run=lambda: progress.advance(task))
