"""A campaign: the most valuable measurements first, for a chip that one has for minutes only."""

from __future__ import annotations

import gzip
import itertools
import json
import os
import shutil
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from klab.harness.catalog import find_model
from klab.harness.plan import plan, scenario_for
from klab.harness.plan.roofline import Roofline
from klab.harness.plan.trial import Trial
from klab.harness.plan.trials import default_policy, safe_unfit, trials
from klab.harness.store.query import age, latest
from klab.harness.store.read import ReadReport, iter_results
from klab.harness.store.result import Result, Status
from klab.harness.tune.allowance import Allowance
from klab.harness.tune.job import CHECK_ONLY, Job, Outcome
from klab.harness.tune.pick import energy_trials
from klab.harness.tune.tuner import Options, Target, Tuned, Tuner
from klab.kernels.contract import Chip, Kernel, Problem
from klab.kernels.discover import Catalogue, operators
from klab.kernels.errors import UsageError

# In order of value: a dense model on one GPU and in fp8, a mixture of experts, the largest model as it is served, attention with sinks and
# windows, linear attention, a large dense one, a diffusion transformer, sparse attention, speech.
MODELS = {
    "cuda": (
        "llama-3.1-8b", "llama-3.1-8b+fp8_row", "qwen3-30b-a3b", "deepseek-v3@8+fp8_block", "gpt-oss-20b", "qwen3-next-80b-a3b@2",
        "llama-3.1-70b@4", "flux.1-dev", "deepseek-v3.2@8", "whisper-large-v3",
    ),
    "cpu": ("qwen3-0.6b",),
}  # fmt: skip
# Of the time, at most so much goes into correctness: what it has not reached is checked before it is timed, as every trial is.
CHECK_SHARE = 0.35
CHECK_LEAST_S = 20.0
# Left for packing the rows after the tuning.
WRAP_UP_S = 1.0
ENERGY_PROBLEMS = 4
COMPACT_FILE = "results.jsonl.gz"


@dataclass(frozen=True)
class Stage:
    """One part of a campaign: its name and its trials, in order."""

    name: str
    trials: list[Trial]


@dataclass(frozen=True)
class Share:
    """A problem of the campaign's models and the roofline time that a step of each spends in it."""

    problem: Problem
    bound_us: float
    where: str


def shares(models: Sequence[str], chip: Chip) -> list[Share]:
    """The problems of these models (`name`, `name@tensor_parallel`, `name@4+quantization`), each once, with what they weigh; in order."""
    found: dict[str, Share] = {}
    for text in models:
        before, _, quantization = text.partition("+")
        name, _, tp = before.partition("@")
        if tp and not tp.isdecimal():
            raise UsageError(f"--model {text}: write name@4 for tensor parallelism over 4, name@4+fp8_block for a format too")
        model = find_model(name)
        made = plan(model, chip, scenario_for(model, chip, tp=int(tp) if tp else None, quantization=quantization or None))
        for row in made.rows:
            if row.problem is None:
                continue
            old = found.get(row.problem.key)
            weight = row.count * row.bound_us + (old.bound_us if old else 0.0)
            found[row.problem.key] = Share(row.problem, weight, old.where if old else f"{text} {row.phase}")
    return list(found.values())


class Campaign:
    """Stages over one job. `folder` holds part files while it runs and one compact file afterwards; a later campaign continues there."""

    def __init__(self, job: Job, catalogue: Catalogue, models: Sequence[str] = ()) -> None:
        self.job, self.catalogue = job, catalogue
        self.models = tuple(models) or MODELS[job.chip.kind]
        self.shares = shares(self.models, job.chip)
        self.outcomes: dict[str, Outcome] = {}
        self.tuned: Tuned | None = None
        self.notes: list[str] = []

    def stages(self) -> Iterator[Stage]:
        """Correctness, comparison, energy of the heaviest. Later stages look at what earlier ones found."""
        chip, policy = self.job.chip, default_policy(self.job.chip)
        kernels = sorted(self.catalogue.kernels.values(), key=lambda k: (not k.library, k.id))
        yield Stage("correctness", correctness_trials(kernels, chip))
        # The anchor first: what memory-bound kernels are held against.
        anchors = operators()["copy"].at_scale()[:1] if chip.kind == "cuda" else []
        compared = trials([*anchors, *(s.problem for s in self.shares)], kernels, chip, policy).trials
        yield Stage("comparison", compared)
        heavy = [s.problem.key for s in sorted(self.shares, key=lambda s: -s.bound_us)]
        if chip.kind == "cuda":
            first = [t for t in compared if t.problem.key in heavy[:ENERGY_PROBLEMS]]
            yield Stage("energy", energy_trials(first, self.job.stored()))

    def run(self) -> Iterator[tuple[Stage, Outcome]]:
        """Run the stages, then tune, until the deadline or a stop. KeyboardInterrupt passes through; what was finished is stored."""
        for stage in self.stages():
            whole, now = self.job.deadline, time.monotonic()
            checks = stage.name == "correctness" and whole is not None
            if checks and whole is not None:
                self.job.deadline = min(whole, now + max(CHECK_LEAST_S, CHECK_SHARE * (whole - now)))
            outcome = self.job.run(stage.trials, self.catalogue.kernels)
            self.job.deadline = whole
            self.outcomes[stage.name] = outcome
            yield stage, outcome
            cut = outcome.stopped and not (checks and outcome.stopped == "deadline")
            if cut or (self.job.deadline is not None and time.monotonic() >= self.job.deadline):
                return
        yield Stage("tuning", []), self._tune()

    def _tune(self) -> Outcome:
        """Search where it should save most of the models' time, until the deadline.

        The journals of the searches are not kept, for a campaign leaves one file: a later campaign begins new searches, whose prior knows
        all rows of this one and to which its results cost nothing.
        """
        job = self.job
        deadline = None if job.deadline is None else job.deadline - WRAP_UP_S
        bounds = [bound_us(s.problem, job.chip) for s in self.shares]
        # A microsecond of a launch counts as often as the models launch it.
        targets = [Target(s.problem, s.bound_us / bound, bound) for s, bound in zip(self.shares, bounds, strict=True)]
        began = time.monotonic()
        outcome = job.outcome = Outcome()
        with tempfile.TemporaryDirectory(prefix="klab-campaign-") as journals:
            options = Options(allowance=Allowance(deadline=deadline))
            tuner = Tuner(job, list(self.catalogue.kernels.values()), targets, options, journals=Path(journals))
            try:
                self.tuned = tuner.run()
            except UsageError as error:  # too little time is left, or nothing has a space: what was measured stands
                self.notes.append(f"no tuning: {error}")
            finally:
                outcome.seconds = time.monotonic() - began
                outcome.stopped = tuner.tuned.stopped if tuner.tuned.stopped in ("time", "interrupted") else ""
        return outcome


def bound_us(problem: Problem, chip: Chip) -> float:
    """The roofline's time of one launch."""
    return Roofline(chip, problem.dtype).bound(problem.flops(), problem.bytes_moved())[0]


def correctness_trials(kernels: Iterable[Kernel], chip: Chip) -> list[Trial]:
    """Every kernel on the examples of its operator that it fits, to be checked and not timed.

    All of them in bf16 (windows, several query tokens, every layout, page size and head dimension are one example each), every other one
    in the second dtype, each with the default; and on every other one a further candidate, since a default may not split, merge or
    specialise. `pytest -m gpu` runs the rest.
    """
    chosen: list[tuple[int, Trial]] = []
    second = "float16" if chip.kind == "cuda" else "float32"
    for kernel in kernels:
        examples = [p for p in kernel.problem_type.examples() if safe_unfit(kernel, p, chip) is None]
        in_second = [p for p in examples if p.dtype == second]
        turns = [p for p in examples if p.dtype == "bfloat16"] + in_second[::2]
        beside_default = False
        for turn, problem in enumerate(turns):
            count = 2 if turn % 2 or (turn == len(turns) - 1 and not beside_default) else 1
            made = trials([problem], [kernel], chip, CHECK_ONLY, f"sample:{count}").trials
            beside_default = beside_default or len(made) > 1
            chosen += [(turn // 2, trial) for trial in made]
    # Two examples of every kernel first; by problem, so that the kernels on one example share its data and its reference.
    return [trial for _, trial in sorted(chosen, key=lambda item: (item[0], item[1].problem.operator, item[1].problem.key))]


def pack(folder: Path, say: Callable[[str], None] = lambda line: None) -> Path | None:
    """Gather every row under `folder` into one compressed file that can be committed, and remove the part files it replaces.

    None when there are no rows. The file appears whole or not at all; a row that could not be read stays where it was: a compressed file
    that has such is kept beside the new one, under another name, and `say` hears of it.
    """
    report = ReadReport()
    rows = sorted(iter_results(folder, report), key=lambda row: (age(row), row.key))
    if not rows:
        return None
    target = folder / COMPACT_FILE
    temporary = folder / f".{COMPACT_FILE}.{os.getpid()}"
    # mtime 0: equal rows make equal bytes, so that git sees a change only where there is one.
    with temporary.open("wb") as raw, gzip.GzipFile(fileobj=raw, mode="wb", mtime=0, filename="") as file:
        for row in rows:
            file.write(json.dumps(row.to_json(), separators=(",", ":")).encode() + b"\n")
    with temporary.open("rb") as written:
        os.fsync(written.fileno())
    if not report.clean(target):
        _keep_aside(target, say)
    temporary.replace(target)
    for part in folder.glob("*.jsonl"):
        if report.clean(part):
            part.unlink()
    return target


def _keep_aside(damaged: Path, say: Callable[[str], None]) -> None:
    """A copy, so that at no moment the rows that can be read are in no file. Its name is none that rows are read from."""
    aside = next(path for n in itertools.count(1) if not (path := damaged.with_name(f"{damaged.name}.damaged-{n}")).exists())
    try:
        shutil.copyfile(damaged, aside)
    except OSError:
        aside.unlink(missing_ok=True)
        raise
    say(f"{damaged} could not be read whole: it is kept as {aside.name}, and what was readable is packed anew")


def winners(results: Iterable[Result], wanted: Sequence[Share]) -> list[dict[str, object]]:
    """Per problem the fastest kernel that is right, and the fastest library: one row for the summary table.

    A plain ranking by medians, for a glance; `klab choose` judges with intervals and tie sets.
    """
    by_problem: dict[str, list[Result]] = defaultdict(list)
    for row in latest(results):
        if row.status is Status.OK and row.median_us is not None:
            by_problem[row.problem_key].append(row)
    found: list[dict[str, object]] = []
    for share in wanted:
        ranked = sorted(by_problem[share.problem.key], key=lambda r: r.median_us or 0.0)
        if not ranked:
            continue
        best, library = ranked[0], next((r for r in ranked if r.library), None)
        found.append(
            {
                "where": share.where,
                "problem": share.problem.label(),
                "kernel": best.kernel.partition("/")[2],
                "median_us": best.median_us,
                "ci_low_us": best.ci_low_us,
                "ci_high_us": best.ci_high_us,
                "library": library.kernel.partition("/")[2] if library else None,
                "library_us": library.median_us if library else None,
                "tflops": best.flops / best.median_us / 1e6 if best.median_us else None,
                "gb_per_s": best.bytes_moved / best.median_us / 1e3 if best.median_us else None,
                "energy_j": next((r.energy_j for r in ranked if r.kernel == best.kernel and r.energy_j is not None), None),
                "candidates": len(ranked),
            }
        )
    return found
