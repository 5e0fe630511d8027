"""`klab bisect`: which commit made a series slower?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from klab.harness.cli import _options
from klab.harness.cli._console import emit, out, talk
from klab.harness.cli.compare import DeviceId, Margin, OptionalModel, Processes, Repo, options_of_measure
from klab.harness.cli.measure import Phase

Good = Annotated[str, typer.Argument(metavar="GOOD", help="A commit where it was fast.")]
Bad = Annotated[str, typer.Argument(metavar="BAD", help="A later commit where it is slow (or broken, or faster).")]
Name = Annotated[str, typer.Option("--series", help="As the night's report calls it: 'h200 matmul m16 n14336 k4096 bf16 chosen time'.")]
PolicyFile = Annotated[
    Path | None, typer.Option("--policy", help="The night's policy, which has the series' scenario. Default: ci/policy.toml.")
]
Nights = Annotated[str | None, typer.Option("--history", help="Folder or URL of nights: the kernel that the series had last.")]
Kernel = Annotated[str | None, typer.Option("--kernel", "-k", help="The kernel, where neither a profile nor the history says it.")]
Log = Annotated[Path | None, typer.Option("--log", help="Write the search as `git bisect log` does; `git bisect replay` takes it.")]
FirstParent = Annotated[bool, typer.Option("--first-parent", help="Only the commits of the main line, as merges brought them.")]
AllCommits = Annotated[bool, typer.Option("--all-commits", help="Also commits that touch none of kernels/, harness/ and profiles/.")]


def command(app: typer.Typer) -> None:
    """Register the verb."""

    @app.command()
    def bisect(
        good: Good,
        bad: Bad,
        series: Name,
        model: OptionalModel = None,
        kernel: Kernel = None,
        policy: PolicyFile = None,
        history: Nights = None,
        isl: _options.Isl = None,
        osl: _options.Osl = None,
        batch: _options.Batch = None,
        tp: _options.Tp = 1,
        dtype: _options.Dtype = None,
        further: _options.With = None,
        phase: Phase = None,
        margin: Margin = 0.01,
        processes: Processes = 20,
        budget: _options.Budget = None,
        device: DeviceId = None,
        repo: Repo = None,
        first_parent: FirstParent = False,
        all_commits: AllCommits = False,
        log: Log = None,
        as_json: _options.AsJson = False,
    ) -> None:
        """Find the commit that made a series slower, each commit in turns with the good one on one device. Commits that do not run, or
        cannot be told, are skipped. Exit 0 found, 3 several are left, 4 good and bad do not differ here.
        """
        from klab.harness.cli._setup import deadline_of
        from klab.harness.watch.bisect_run import Search
        from klab.harness.watch.bisect_run import bisect as find
        from klab.harness.watch.compare_run import Request, checked

        request = checked(
            Request(
                model=model,
                words=options_of_measure(isl, osl, batch, tp, dtype, further, phase),
                kernels=(kernel,) if kernel else (),
                margin=margin,
                processes=processes,
                deadline=deadline_of(_options.seconds(budget), reserve_s=2.0),
                device=device,
                repo=repo,
            )
        )
        search = Search(series, good, bad, request, policy, history, first_parent, all_commits)
        found = find(search, said=lambda text: talk.print(text, markup=False, soft_wrap=True))
        if log is not None:
            from klab.harness.choose.profile import write_text

            write_text(log, found.log)
        if as_json:
            for step in found.steps:
                emit({"type": "step", "commit": step.commit, "mark": step.mark.value, "reason": step.why})
            emit({"type": "outcome", "commits": list(found.commits), "reason": found.why, "ratio": found.ends.ratio})
        else:
            out.print(found.log, markup=False, highlight=False, soft_wrap=True, end="")
        repository = request.repository()
        if len(found.commits) == 1:
            talk.print(f"the first bad commit is {repository.title(found.commits[0])} ({found.why})", markup=False, soft_wrap=True)
        elif found.commits:
            talk.print("the first bad commit is one of these; those between could not be tried:", style="yellow")
            for commit in found.commits:
                talk.print(f"  {repository.title(commit)}", markup=False, soft_wrap=True)
        else:
            talk.print(found.why, style="yellow", markup=False, soft_wrap=True)
        raise typer.Exit(found.exit_code)
