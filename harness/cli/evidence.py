"""`klab evidence`: what is to be recorded of a chip, in as many sittings as one gets it for; `--finish` makes packs and pages of it."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated

import typer

from klab.harness.cli import _options
from klab.harness.cli._console import emit, table, talk

if TYPE_CHECKING:
    from klab.harness.tune.evidence import Done

Out = Annotated[Path, typer.Option("--out", help="Folder of the chip's evidence, say results/h200; a later sitting goes on there.")]
Models = Annotated[
    list[str] | None, typer.Option("--model", "-m", help="Model, or model@4 for tensor parallelism over 4. Repeatable. Default: four.")
]
Parts = Annotated[list[str] | None, typer.Option("--part", help="Only this part; repeatable. Default: all, the most valuable first.")]
Finish = Annotated[
    bool, typer.Option("--finish", help="Measure nothing: packs, engines' tables, recorded spaces, report and README of what is there.")
]
SensorSeconds = Annotated[float, typer.Option("--sensor-seconds", min=5.0, max=600.0, help="How long the power sensor is watched.")]


def command(app: typer.Typer) -> None:
    """Register the verb."""

    @app.command()
    def evidence(
        out_dir: Out,
        budget: _options.Budget = None,
        chip: _options.Chip = "auto",
        model: Models = None,
        part: Parts = None,
        kernels: _options.KernelDirs = None,
        sensor_seconds: SensorSeconds = 40.0,
        finish: Finish = False,
        as_json: _options.AsJson = False,
    ) -> None:
        """Record a chip: tests, correctness, calibration, comparison, energy, whole spaces, the tuner, repeats. Safe to stop; goes on."""
        from klab.harness.catalog.chips import find_chip, find_real_chip
        from klab.harness.cli._progress import Bars
        from klab.harness.cli._setup import deadline_of
        from klab.kernels.discover import discover
        from klab.kernels.errors import CannotMeasure, UsageError

        catalogue = discover(kernels or [])
        if finish:
            from klab.harness.report.evidence_finish import finish as make

            if part or budget:
                raise UsageError("--finish measures nothing: leave out --budget and --part")
            made = make(out_dir, find_chip(chip), catalogue, tuple(model or ()))
            for line in made.lines:
                talk.print(line, markup=False, soft_wrap=True)
            if as_json:
                emit({"type": "finished", "files": [str(path) for path in made.files], "lines": list(made.lines)})
            return
        from klab.harness.tune.evidence import Evidence
        from klab.harness.tune.evidence_folder import alone, pack_all, pack_s

        seconds = _options.seconds(budget)
        found_chip = find_real_chip(chip)
        ends = deadline_of(seconds, reserve_s=pack_s(out_dir))
        overdue = _Overdue(ends, deadline_of(seconds))
        with alone(out_dir), Bars(as_json=as_json) as bars:
            made_of = Evidence(
                found_chip,
                out_dir,
                catalogue,
                deadline=ends,
                models=model or (),
                parts=part or (),
                kernel_dirs=kernels or (),
                listener=bars,
                sensor_s=sensor_seconds,
            )
            try:
                with overdue:
                    for done in made_of.run():
                        _tell(done, as_json=as_json)
            except KeyboardInterrupt:
                if not overdue.came:
                    raise
                talk.print("ended in the middle of a part that did not end by itself; its rows are stored", style="yellow")
            finally:
                packed = pack_all(out_dir, lambda line: talk.print(line, style="yellow", markup=False, soft_wrap=True))
        for line in made_of.job.report.lines():
            talk.print(line, style="yellow", markup=False, soft_wrap=True)
        rows = [
            (d.part, f"{d.seconds:.0f}", ", ".join(f"{n} {s}" for s, n in d.statuses.items()), d.known, d.left)
            for d in made_of.sitting.parts
        ]
        if not as_json:
            table(
                f"This sitting on {made_of.chip.title}", ("part", "s", "new", "known", "not reached"), rows, ("s", "known", "not reached")
            )
        reached = {d.part for d in made_of.sitting.parts}
        if missing := [one for one in made_of.parts if one not in reached]:
            talk.print(f"not begun for want of time: {', '.join(missing)}; the same command goes on", markup=False, soft_wrap=True)
        talk.print(
            f"rows in {packed}; klab evidence --out {out_dir} --finish makes packs and the report" if packed else "no rows",
            markup=False,
            soft_wrap=True,
        )
        parts = made_of.sitting.parts
        if any(d.failed for d in parts) and not any(d.statuses or d.known for d in parts):
            raise CannotMeasure("nothing came of this sitting; each part above says why")


# A budget that is over when the command has only started: the sitting finds that for itself.
LEAST_TIMER_S = 2.0


class _Overdue:
    """An interrupt as of Ctrl-C, when half of the time for packing is over and a part has not ended: what runs the command may kill it."""

    def __init__(self, ends: float | None, last: float | None) -> None:
        self.came = False
        self._timer: threading.Timer | None = None
        if ends is not None and last is not None:
            self._timer = threading.Timer(max(LEAST_TIMER_S, (ends + last) / 2 - time.monotonic()), self._press)

    def _press(self) -> None:
        self.came = True
        os.kill(os.getpid(), signal.SIGINT)

    def _heard(self, number: int, frame: FrameType | None) -> None:
        if self.came:
            raise KeyboardInterrupt

    def __enter__(self) -> _Overdue:
        if self._timer is not None:
            # A shell starts what runs in the background with Ctrl-C ignored, and this would be too.
            if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
                signal.signal(signal.SIGINT, self._heard)
            self._timer.daemon = True
            self._timer.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._timer is not None:
            self._timer.cancel()
        if signal.getsignal(signal.SIGINT) == self._heard:
            signal.signal(signal.SIGINT, signal.SIG_IGN)


def _tell(done: Done, *, as_json: bool) -> None:
    if as_json:
        emit({"type": "part", **vars(done), "notes": list(done.notes)})
    counts = ", ".join(f"{n} {s}" for s, n in done.statuses.items()) or "nothing new"
    known = f"; {done.known} known" if done.known else ""
    left = f"; {done.left} not reached" if done.left else ""
    talk.print(f"{done.part}: {counts} in {done.seconds:.0f} s{known}{left}", markup=False, soft_wrap=True)
    for note in done.notes:
        talk.print(f"  {note}", markup=False, soft_wrap=True)
