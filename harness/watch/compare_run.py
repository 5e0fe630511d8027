"""A comparison from what the user asked for to its answer: sides, plans, pairs, the device, the passes, the files."""

from __future__ import annotations

import dataclasses
import json
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from klab.harness.catalog.chips import find_real_chip
from klab.harness.choose.profile import write_text
from klab.harness.fleet.devices import Device, devices
from klab.harness.measure.lock import exclusive
from klab.harness.plan.trials import default_policy
from klab.harness.store.journal import Journal
from klab.harness.tune.job import new_run_id
from klab.harness.watch.compare import Bench, Pair, chosen_pairs, conclude, differences, laps_policy, pair_up, plan_sides, run_passes
from klab.harness.watch.compare_rule import Answer, Found
from klab.harness.watch.comparison import Comparison
from klab.harness.watch.sides import Given, Kind, Planned, opened, understand
from klab.harness.watch.worktree import Repository
from klab.kernels.contract import Chip
from klab.kernels.errors import CannotMeasure, UsageError

LEAST_PROCESSES = 5
NOTHING_CHANGED = "no kernel's source or configuration differs, so nothing was measured"


@dataclass(frozen=True)
class Request:
    """What was asked for. `words` are the options that a side's `klab measure` gets; `deadline` a second of time.monotonic()."""

    model: str | None = None
    chip: str = "auto"
    words: tuple[str, ...] = ()
    kernels: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()
    kernel_dirs: tuple[Path, ...] = ()
    chosen: bool = False
    changed: bool = False
    margin: float = 0.01
    processes: int = 20
    deadline: float | None = None
    device: str | None = None
    repo: Path | None = None
    metric: str = "time"

    def repository(self) -> Repository:
        """Of the commits; UsageError where there is none."""
        return Repository.at(self.repo)


def understood(a: str, b: str, request: Request) -> tuple[Given, Given]:
    """The two sides; UsageError for what is none, and for what cannot be asked of them."""
    found = understand(a, request.repository), understand(b, request.repository)
    if found[0].kind.live != found[1].kind.live:
        raise UsageError(
            f"{a} ({found[0].kind}) and {b} ({found[1].kind}): stored results are compared with stored results, as what ran on another day "
            "differs by more than a kernel's change; measure both sides, or name two folders"
        )
    checked(request)
    if found[0].kind.live:
        if request.model is None:
            raise UsageError("--model is needed: its shapes are what the sides are compared on")
        if request.metric == "energy":
            raise UsageError("--metric energy: measure both sides with `klab measure --energy --results DIR`, then compare the two folders")
    return found


def checked(request: Request) -> Request:
    """The request as it is; UsageError for numbers that make no sense."""
    if request.metric not in ("time", "energy"):
        raise UsageError(f"--metric {request.metric}: time or energy")
    if not 0 < request.margin < 0.5:
        raise UsageError(f"--margin {request.margin:g}: a share between 0 and 0.5; 0.01 is 1%")
    if request.processes < LEAST_PROCESSES:
        raise UsageError(
            f"--processes {request.processes}: fewer than {LEAST_PROCESSES} pairs of processes do not show how much they differ"
        )
    return request


def compare_live(
    given: tuple[Given, Given], request: Request, out: Path | None = None, said: Callable[[str], None] = lambda text: None
) -> Comparison:
    """Run both sides on one device. Ctrl-C ends with what stands. UsageError and CannotMeasure name the side."""
    chip = find_real_chip(request.chip)
    with ExitStack() as stack:
        stop = stack.enter_context(gentle())
        sides = stack.enter_context(opened({"A": given[0], "B": given[1]}, request.repository))
        for side in sides:
            said(f"{side.name}: {side.title}")
        root = request.repository().root if Kind.COMMIT in (given[0].kind, given[1].kind) else None
        folders = [side.kernel_dirs(request.kernel_dirs, root) for side in sides]
        words = [measure_words(request, own) for own in folders]
        planned = plan_sides(sides, request.chip if request.chip != "auto" else chip.name, words, laps_policy(default_policy(chip)))
        pairs, alone = wanted_pairs(planned, chip, request)
        notes = differences(planned[0].facts, planned[1].facts)
        if not pairs:
            return Comparison(
                Answer.SAME,
                NOTHING_CHANGED + (" but what only one side has" if alone else ""),
                (),
                Found(Answer.SAME),
                request.margin,
                alone,
                notes,
            )
        device = stack.enter_context(locked(chip, request.device))
        run_id = new_run_id()
        bench = Bench(device, chip, planned, run_id, kernel_dirs=folders, deadline=request.deadline, said=said, stop=stop)
        if out is not None:
            journal = stack.enter_context(Journal(out, run_id))
            journal.ready()
            bench.told = journal.append
        said(f"{len(pairs)} pairs on {device.name}")
        passes, stopped = run_passes(bench, pairs, most=request.processes)
        return conclude(pairs, alone, notes, passes, stopped)


def measure_words(request: Request, kernel_dirs: Sequence[Path]) -> list[str]:
    """The command line that a side's `klab measure` gets, but for the chip."""
    model = str(request.model)
    named = str(Path(model).resolve()) if Path(model).exists() else model
    return ["--model", named, *request.words, *(word for folder in kernel_dirs for word in ("--kernels", str(folder)))]


def wanted_pairs(planned: Sequence[Planned], chip: Chip, request: Request) -> tuple[list[Pair], list[tuple[str, str]]]:
    """(the pairs that were asked for, what only one side has and why).

    UsageError where there is nothing to compare; no pairs at all mean that only changed ones were asked for, and there is none.
    """
    known = sorted({t.kernel for p in planned for t in p.trials})
    for name in request.kernels:
        if not any(name in (kernel, kernel.split("/")[-1]) for kernel in known):
            raise UsageError(f"--kernel {name}: neither side measures it; there are {', '.join(known)}")
    a, b = (
        dataclasses.replace(p, trials=[t for t in p.trials if asked(t.kernel, f"{t.problem.key} {t.problem.label()}", request)])
        for p in planned
    )
    pairs, alone = chosen_pairs(a, b, chip.name, str(request.model)) if request.chosen else pair_up(a, b)
    if not pairs:
        why = "; ".join(dict.fromkeys(f"{name}: {reason}" for name, reason in alone)) or "no problem has this in its label or key"
        raise UsageError(f"nothing to compare: {why}")
    for pair in pairs:
        pair.question.margin = request.margin
    return [pair for pair in pairs if not (request.changed and pair.same_code)], alone


def asked(kernel: str, problem: str, request: Request) -> bool:
    """Was this kernel on this problem (its key and label) asked for?"""
    return (not request.kernels or any(name in (kernel, kernel.split("/")[-1]) for name in request.kernels)) and (
        not request.problems or any(text in problem for text in request.problems)
    )


@contextmanager
def locked(chip: Chip, only: str | None) -> Iterator[Device]:
    """The first device here that is the chip and that nobody else measures on; CannotMeasure where there is none."""
    reasons: list[str] = []
    for device in devices(chip, [only] if only else None):
        with ExitStack() as stack:
            try:
                stack.enter_context(exclusive(device.id))
            except CannotMeasure as error:
                reasons.append(str(error))
                continue
            yield device
            return
    raise CannotMeasure("; ".join(reasons))


@contextmanager
def gentle() -> Iterator[threading.Event]:
    """The first Ctrl-C sets the event, so that what was measured is told; the second is KeyboardInterrupt. SIGTERM ends the process in
    order (exit code 143): workers and worktrees do not stay behind.
    """
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield stop
        return

    def note(number: int, frame: FrameType | None) -> None:
        if number == signal.SIGTERM:
            raise SystemExit(128 + number)
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()

    before = signal.signal(signal.SIGINT, note), signal.signal(signal.SIGTERM, note)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, before[0])
        signal.signal(signal.SIGTERM, before[1])


def write_out(folder: Path, found: Comparison, given: tuple[Given, Given]) -> None:
    """compare.json (one array of the objects of `to_json`) and summary.md."""
    write_text(
        folder / "compare.json", json.dumps([{"type": "sides", "a": given[0].said, "b": given[1].said}, *found.to_json()], indent=1) + "\n"
    )
    write_text(folder / "summary.md", found.markdown(given[0].said, given[1].said))
