"""Two sets of stored results against each other: what was measured on other days, and so judged with what days differ by."""

from __future__ import annotations

import json
import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

from klab.harness.catalog.chips import find_chip
from klab.harness.measure.anchor import anchored, which_anchor
from klab.harness.measure.stats import FLOOR_ROUNDS, spread
from klab.harness.plan.trial import Policy
from klab.harness.store.paths import folder_to_read
from klab.harness.store.read import ReadReport, iter_results
from klab.harness.store.remote import local_of
from klab.harness.store.result import Result, Status
from klab.harness.watch.compare_rule import Answer, Found, classify, spent
from klab.harness.watch.compare_run import Request, asked
from klab.harness.watch.comparison import Comparison, Line
from klab.kernels.contract import Json, canonical_json
from klab.kernels.discover import operators
from klab.kernels.errors import KlabError, UsageError

# With fewer runs on either side, what runs differ by is not known from them, and is taken from elsewhere: windows in sequence drift by 1-3%
# (helion pull request 3523); over an anchor of the same laps 1% is left (a guess: the anchor's own noise, and that it feels a cooler board
# a little otherwise than the kernel does).
LEAST_RUNS = 3
DRIFT = 0.03
DRIFT_ANCHORED = 0.01
# GPUs of one kind in one machine differ by more than 5%; over an anchor a fifth of it is left (a guess).
DEVICES = 0.05
DEVICES_ANCHORED = 0.01
FAILED = (Status.INCORRECT, Status.CRASHED, Status.TIMEOUT, Status.COMPILE_ERROR, Status.OUT_OF_MEMORY)
TOLD = ("device", "driver", "cuda", "torch", "triton", "cupy", "power_limit_w", "host")


@dataclass(frozen=True)
class Contestant:
    """What rows of two sides must share to be compared: the problem and its conditions, and the kernel."""

    chip: str
    problem_key: str
    conditions: str
    kernel: str


@dataclass
class Held:
    """A side's rows of one contestant and configuration, oldest first: those with a value, and whether the newest of all failed."""

    rows: list[Result] = field(default_factory=list)
    failed: Result | None = None

    @property
    def runs(self) -> dict[tuple[str, str], list[Result]]:
        """By run and device: within one of them, the days do not differ."""
        found: dict[tuple[str, str], list[Result]] = defaultdict(list)
        for row in self.rows:
            found[row.run_id, _device(row)].append(row)
        return found


def compare_results(a: str, b: str, request: Request) -> Comparison:
    """Every kernel of every problem that both sets have, each at its best configuration. UsageError where they share nothing."""
    reports = ReadReport(), ReadReport()
    rows = [iter_results(folder_to_read(local_of(text)), report) for text, report in zip((a, b), reports, strict=True)]
    return compare_rows(rows[0], rows[1], request, reports, names=(a, b))


def compare_rows(
    a: Iterable[Result], b: Iterable[Result], request: Request, reports: tuple[ReadReport, ReadReport], *, names: tuple[str, str]
) -> Comparison:
    """The same of rows that are at hand. names: where they are from, for the error."""
    sides = [_read(rows, Path(name), report, request) for rows, name, report in zip((a, b), names, reports, strict=True)]
    common = [one for one in sides[0] if one in sides[1]]
    if not common:
        read = " and ".join(f"{report.rows} rows in {text}" for text, report in zip(names, reports, strict=True))
        chips = [", ".join(sorted({one.chip for one in side})) or "none" for side in sides]
        why = "".join(f"; {line}" for report in reports for line in report.lines())
        raise UsageError(
            f"nothing to compare: {read} (chips {chips[0]} and {chips[1]}) have no kernel on a problem in common that was asked for{why}"
        )
    questions = len(common) + (len(common) > 1)
    lines = [line for one in common if (line := _line(one, sides[0][one], sides[1][one], questions, request)) is not None]
    if request.changed:
        lines = [line for line in lines if line.differs != "nothing"]
    alone = [
        (f"{_label(here)} {one.kernel.split('/')[-1]}", f"only {name} has it")
        for name, own, other in (("A", sides[0], sides[1]), ("B", sides[1], sides[0]))
        for one, here in own.items()
        if one not in other
    ]
    notes = [*(line for report in reports for line in report.lines()), *_differences(sides[0], sides[1], common)]
    return Comparison.of(
        lines, _mean([line.found for line in lines], request.margin), margin=request.margin, alone=alone, notes=notes, metric=request.metric
    )


Side = dict[Contestant, dict[str, Held]]


def _read(results: Iterable[Result], folder: Path, report: ReadReport, request: Request) -> Side:
    found: Side = defaultdict(lambda: defaultdict(Held))
    code: dict[Contestant, str] = {}
    rows = sorted(results, key=lambda row: row.recorded_at)
    for row in rows:
        if row.kind != "measured" or not _asked(row, request):
            continue
        try:
            conditions = conditions_of(row)
        except (KlabError, TypeError, ValueError) as error:
            report.skip(folder, f"the policy of {row.kernel} ({row.run_id}) is not understood: {error}")
            continue
        one = Contestant(row.chip, row.problem_key, conditions, row.kernel)
        if code.setdefault(one, row.source_digest) != row.source_digest:
            code[one] = row.source_digest
            found[one].clear()  # the kernel's code changed within this set: what it is now counts, in every configuration
        held = found[one][canonical_json(row.config)]
        if row.status is Status.OK and _value(row, request.metric) is not None:
            held.rows.append(row)
            held.failed = None
        elif row.status in FAILED:
            held.failed = row
    return {
        one: {c: h for c, h in held.items() if h.rows or h.failed}
        for one, held in found.items()
        if any(h.rows or h.failed for h in held.values())
    }


def conditions_of(row: Result) -> str:
    """The state of the cache, and the clock and limit that were set: what two rows must share. Errors for a policy of another klab."""
    return _conditions(canonical_json(row.policy))


@lru_cache(1000)
def _conditions(policy: str) -> str:
    fields = json.loads(policy)
    # Fields at their default are not in a stored policy.
    return canonical_json([fields.get("l2", Policy().l2), Policy.from_json(fields).setting])


def _asked(row: Result, request: Request) -> bool:
    return request.chip in ("auto", row.chip) and asked(row.kernel, f"{row.problem_key} {row.problem_label}", request)


def _value(row: Result, metric: str) -> float | None:
    value = row.median_us if metric == "time" else row.energy_j
    return value if value is not None and value > 0 else None


def _best(held: Mapping[str, Held], metric: str) -> Held | None:
    """The configuration with the lowest median over its runs; None where none has a value and stands."""
    standing = [one for one in held.values() if one.rows and one.failed is None]
    return min(standing, key=lambda one: statistics.median(_value(row, metric) or math.inf for row in one.rows), default=None)


def _line(one: Contestant, here: Mapping[str, Held], there: Mapping[str, Held], questions: int, request: Request) -> Line | None:
    a, b = _best(here, request.metric), _best(there, request.metric)
    name = f"{_label(here)} {one.kernel.split('/')[-1]}"
    broken = [next((h.failed for h in held.values() if h.failed is not None), None) for held in (here, there)]
    if a is None or b is None:
        row = broken[0] if a is None else broken[1]
        reason = f"{row.status.value}: {row.reason}" if row else "no value"
        if a is not None:
            return Line(name, Found(Answer.BROKEN, reason=reason), _said(a.rows[-1]), {})
        return Line(name, Found(Answer.NOT_COMPARED, reason=f"fails on {'both sides' if b is None else 'A'}: {reason}"))
    return Line(name, _found(a, b, questions, request), _said(a.rows[-1]), _said(b.rows[-1]))


def _found(a: Held, b: Held, questions: int, request: Request) -> Found:
    """The ratio with its interval: from the runs of either side where they are enough, else from single runs with what days differ by."""
    anchor = _anchor(a.rows[-1]) if request.metric == "time" else ""
    use_anchor = bool(anchor) and all(anchored(row, anchor) for held in (a, b) for row in held.rows)
    logs = [[_run_value(rows, request.metric, anchor if use_anchor else "") for rows in held.runs.values()] for held in (a, b)]
    middle = statistics.fmean(logs[1]) - statistics.fmean(logs[0])
    alpha = spent(0, questions, last=True)
    same_device = {_device(row) for row in a.rows} & {_device(row) for row in b.rows}
    allowance = 0.0 if same_device else math.log1p(DEVICES_ANCHORED if use_anchor else DEVICES)
    if min(len(logs[0]), len(logs[1])) >= LEAST_RUNS:
        reach = _welch(logs[0], logs[1], alpha)
        how = f"{len(logs[0])} and {len(logs[1])} runs"
    else:
        reach = _within(a, request.metric) + _within(b, request.metric) + math.log1p(DRIFT_ANCHORED if use_anchor else DRIFT)
        how = f"{len(logs[0])} and {len(logs[1])} runs: {DRIFT_ANCHORED if use_anchor else DRIFT:.0%} is allowed for what days differ by"
    reach += allowance
    how += "" if same_device else f"; on different devices: {DEVICES_ANCHORED if use_anchor else DEVICES:.0%} more"
    how += f"; over the {anchor} anchor" if use_anchor else ""
    cycles = _cycles(a, b) if request.metric == "time" else None
    answer, reason = classify(middle, middle - reach, middle + reach, cycles, request.margin)
    return Found(
        answer,
        math.exp(middle),
        math.exp(middle - reach),
        math.exp(middle + reach),
        min(len(logs[0]), len(logs[1])),
        None if cycles is None else math.exp(cycles),
        "; ".join(filter(None, (reason, how))),
    )


def _run_value(rows: Sequence[Result], metric: str, anchor: str) -> float:
    """Log of the median over the rows of one run."""
    return math.log(statistics.median(statistics.median(anchored(row, anchor)) if anchor else _value(row, metric) or 1.0 for row in rows))


def _welch(a: Sequence[float], b: Sequence[float], alpha: float) -> float:
    """Half the width of Welch's interval of the difference of two means."""
    from scipy.special import stdtrit

    parts = [statistics.variance(values) / len(values) for values in (a, b)]
    total = sum(parts)
    if total == 0.0:
        return 0.0
    freedom = total**2 / sum(part**2 / (len(values) - 1) for part, values in zip(parts, (a, b), strict=True))
    return float(stdtrit(freedom, 1.0 - alpha)) * math.sqrt(total)


def _within(held: Held, metric: str) -> float:
    """Half the width of the newest row's own interval, as a share."""
    row = held.rows[-1]
    if metric == "energy":
        low, high, middle = row.energy_ci_low_j, row.energy_ci_high_j, row.energy_j
    else:
        low, high, middle = row.ci_low_us, row.ci_high_us, row.median_us
        if (low is None or high is None) and len(row.samples_us) >= FLOOR_ROUNDS:
            found = spread(row.samples_us)
            low, high = found.low, found.high
    # A row without an interval of its own: the allowance for days must do.
    return max(high - middle, middle - low) / middle if low is not None and high is not None and middle else 0.0


def _cycles(a: Held, b: Held) -> float | None:
    """Log of the ratio of time x SM clock, where every row has a clock."""
    means = []
    for held in (a, b):
        known = [math.log(row.median_us * row.sm_clock_mhz) for row in held.rows if row.median_us and row.sm_clock_mhz]
        if len(known) != len(held.rows):
            return None
        means.append(statistics.fmean(known))
    return means[1] - means[0]


def _anchor(row: Result) -> str:
    """The anchor that bounds this row's problem as klab knows it today; "" where it does not know it."""
    try:
        return which_anchor(operators()[row.operator].from_json(row.problem), find_chip(row.chip))
    except (KlabError, KeyError, TypeError, ValueError):
        return ""


def _mean(found: Sequence[Found], margin: float) -> Found:
    """The geometric mean. What days differ by is common to all, so its bounds are the means of theirs: the widest answer."""
    known = [f for f in found if f.ratio and f.low and f.high]
    if not known:
        return Found(Answer.CANNOT_TELL, reason="nothing was compared")
    middle, low, high = (statistics.fmean(math.log(getattr(f, name)) for f in known) for name in ("ratio", "low", "high"))
    answer, reason = classify(middle, low, high, None, margin)
    return Found(answer, math.exp(middle), math.exp(low), math.exp(high), min(f.replicates for f in known), None, reason)


def _device(row: Result) -> str:
    """Which board; of a CPU which host."""
    return row.device_uuid or str(row.environment.get("host", ""))


def _label(held: Mapping[str, Held]) -> str:
    row = next(row for one in held.values() for row in (*one.rows, one.failed) if row is not None)
    return f"{row.chip} {row.problem_label}"


def _said(row: Result) -> dict[str, Json]:
    return {"kernel": row.kernel, "config": dict(row.config), "source_digest": row.source_digest}


def _differences(a: Side, b: Side, common: Iterable[Contestant]) -> list[str]:
    """What differs between the places where the two sets were measured, one line each."""
    kept = list(common)

    def values(side: Side, name: str) -> set[str]:
        rows = [row for one in kept for held in side[one].values() for row in held.rows]
        return {str(row.environment.get(name) or getattr(row, name, "") or "") for row in rows} - {""}

    found = [(name, values(a, name), values(b, name)) for name in TOLD]
    return [f"{name}: {', '.join(sorted(x))} in A, {', '.join(sorted(y))} in B" for name, x, y in found if x and y and x != y]
