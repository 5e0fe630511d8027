"""Progress bars for a job, on stderr; on a pipe, one line now and then."""

from __future__ import annotations

from types import TracebackType
from typing import Self

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from klab.harness.cli._console import emit, talk
from klab.harness.store.result import Result, Status
from klab.harness.tune.screen import Screened

# Not a fault of anybody: nothing to show in red.
_QUIET = {Status.OK, Status.SCREENED, Status.UNSUPPORTED}


class Bars:
    """A Listener that draws. With `as_json` every new Result is also a line on stdout."""

    def __init__(self, *, as_json: bool = False) -> None:
        self._as_json = as_json
        self._progress = Progress(
            TextColumn("[bold]{task.description:<10}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("eta"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[now]}"),
            console=talk,
            disable=not talk.is_terminal,
        )
        self._task: TaskID | None = None
        self._name, self._total, self._done = "", 0, 0

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.stop()

    def stop(self) -> None:
        """Take the bars down; calling it twice is fine."""
        self._progress.stop()

    def phase(self, name: str, total: int) -> None:
        """A new bar; more of the same phase lengthens it. A total of 0 is one that nobody knows."""
        if name == self._name and self._task is not None:
            self._total += total
            self._progress.update(self._task, total=self._total or None)
            return
        self._task = self._progress.add_task(name, total=total or None, now="")
        self._name, self._total, self._done = name, total, 0
        if not talk.is_terminal:
            talk.print(f"{name} {total} trials" if total else name)

    def screened(self, found: Screened) -> None:
        """One more candidate compiled."""
        self._step(f"{found.trial.kernel} {found.trial.problem.label()}")

    def result(self, result: Result) -> None:
        """One more row; failures are told at once, in one line each."""
        if self._as_json:
            emit(summary_row(result))
        if self._name != "screening":
            self._step(f"{result.kernel} {result.problem_label}")
        if result.status not in _QUIET:
            line = f"{result.status.value}: {result.kernel} on {result.problem_label}: {result.reason}"
            talk.print(line, style="yellow", markup=False, soft_wrap=True)

    def _step(self, now: str) -> None:
        self._done += 1
        if self._task is not None:
            self._progress.update(self._task, advance=1, now=now[:60])
        # On a pipe: ten lines a phase, so that a log of a night stays readable.
        if not talk.is_terminal and (self._done == self._total or self._done % (self._total // 10 or 20) == 0):
            talk.print(f"{self._name} {self._done}{f'/{self._total}' if self._total else ''}")


def summary_row(result: Result) -> dict[str, object]:
    """A Result without its raw samples and environment: what a pipe wants to read."""
    row = result.to_json()
    for name in ("samples_us", "clocks_mhz", "temperatures_c", "throttle_reasons", "marked", "power_trace", "environment", "build"):
        row.pop(name, None)
    return row
