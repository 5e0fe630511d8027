"""klab's own results as recorded spaces: what was measured of one problem on one chip can be searched again without the chip."""

from __future__ import annotations

import re
import statistics
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from klab.harness.plan.trial import Policy
from klab.harness.store.query import age
from klab.harness.store.result import Result, Status
from klab.harness.tune.replay.assemble import Candidate, assemble
from klab.harness.tune.replay.recorded import RecordedSpace
from klab.harness.tune.space import KERNEL
from klab.kernels.contract import Json, canonical_json, digest
from klab.kernels.errors import UsageError

SCREENED = "screened"
_METRICS = ("ci_low_us", "ci_high_us", "error", "idle_power_w")


@dataclass(frozen=True)
class Recordings:
    """All rows of one problem on one chip."""

    problem_key: str
    label: str
    operator: str
    rows: tuple[Result, ...]

    @property
    def candidates(self) -> int:
        """Distinct kernels and configurations, of whatever epoch and policy."""
        return len({_candidate_key(r) for r in self.rows})

    @property
    def slug(self) -> str:
        """A name for a file: "matmul_16x14336x4096_bf16_h200"."""
        return re.sub(r"[^\w.=-]+", "_", f"{self.label} {self.rows[0].chip}").strip("_")[:120]


def recordings(results: Iterable[Result], chip: str) -> list[Recordings]:
    """By problem, sorted by label. UsageError, naming the chips that there are, when there is no row of this one."""
    by_problem: dict[str, list[Result]] = defaultdict(list)
    chips = set()
    for row in results:
        chips.add(row.chip)
        if row.chip == chip:
            by_problem[row.problem_key].append(row)
    if not by_problem:
        raise UsageError(f"no result of chip {chip!r}; the store has: {', '.join(sorted(chips)) or 'none, it is empty'}")
    found = [Recordings(key, rows[0].problem_label, rows[0].operator, tuple(rows)) for key, rows in by_problem.items()]
    return sorted(found, key=lambda r: (r.label, r.problem_key))


def export(recording: Recordings, *, epoch: str | None = None, policy: str | None = None) -> RecordedSpace:
    """One space of all kernels' candidates, named by the parameter "kernel", failed and screened ones included.

    Rows of one epoch (default: the newest) and one policy (default: the one that timed most candidates; wanting energy is no
    difference) count, and of each kernel the newest source; notes say what was left out. Of a candidate its newest verified or wrong row
    counts, else its newest. `epoch` and `policy` may be given by their beginning. Rounds in which the hardware throttled are left out.
    benchmark_s is warm-up and rounds as the policy and the samples tell; checking and energy are not in it.
    UsageError when nothing is left.
    """
    label = recording.label
    notes: list[str] = []
    on_device = [r for r in recording.rows if r.kind == "measured"]
    measured = [r for r in on_device if r.status is not Status.OK or r.median_us is not None]
    screened = [r for r in recording.rows if r.kind == SCREENED and r.status is not Status.OK]
    _tell(notes, len(recording.rows) - len(on_device) - len(screened), "rows are neither measured nor screened")
    _tell(notes, len(on_device) - len(measured), "rows were checked and not timed")
    measured, one_epoch = _of_one(measured, lambda r: r.epoch, epoch, f"{label}: epoch", notes, newest=True)
    measured, one_policy = _of_one(measured, policy_key, policy, f"{label}: policy", notes, newest=False)
    newest_code: dict[str, str] = {}
    for row in sorted([*measured, *screened], key=age):
        newest_code[row.kernel] = row.source_digest
    current = [r for r in [*measured, *screened] if newest_code[r.kernel] == r.source_digest]
    _tell(notes, len(measured) + len(screened) - len(current), "rows are of a kernel's source that has changed since")
    by_candidate: dict[str, list[Result]] = defaultdict(list)
    for row in sorted(current, key=age):
        by_candidate[_candidate_key(row)].append(row)
    if not by_candidate:
        raise UsageError(f"{label} has no result that can be exported")
    timed = [r for r in current if r.kind == "measured"]
    last = max(timed or current, key=age)
    return assemble(
        (_candidate(rows) for rows in sorted(by_candidate.values(), key=lambda rows: rows[0].kernel)),
        name=recording.slug,
        device=last.device or last.chip,
        kernel=recording.operator,
        kind="measured",
        problem_size=[v for v in last.problem.values() if type(v) is int][:3] or [1],
        about=_about(recording, last, current, one_epoch, one_policy),
        notes=notes,
    )


def policy_key(row: Result) -> str:
    """Identity of how a row was measured, but for energy: that is taken after the times."""
    return digest({name: value for name, value in row.policy.items() if name not in ("energy", "energy_s")})


def _of_one(
    rows: list[Result], key: Callable[[Result], str], wanted: str | None, what: str, notes: list[str], *, newest: bool
) -> tuple[list[Result], str]:
    """The rows of one group: the wanted, else the newest, else the one with most timed candidates (the newest of equals)."""
    groups: dict[str, list[Result]] = defaultdict(list)
    for row in sorted(rows, key=age):
        groups[key(row)].append(row)
    if not groups:
        return [], ""
    if wanted is not None:
        matching = [name for name in groups if name.startswith(wanted)]
        if len(matching) != 1:
            raise UsageError(f"{what} {wanted!r} matches {len(matching) or 'none'} of {', '.join(groups)}")
        chosen = matching[0]
    elif newest:
        chosen = max(groups, key=lambda name: age(groups[name][-1]))
    else:
        chosen = max(groups, key=lambda name: (len({_candidate_key(r) for r in groups[name] if r.median_us}), age(groups[name][-1])))
    for name, others in groups.items():
        if name != chosen:
            _tell(notes, len(others), f"rows of {what.rpartition(' ')[2]} {name or 'unknown'} (up to {others[-1].recorded_at[:10]})")
    return groups[chosen], chosen


def _tell(notes: list[str], count: int, what: str) -> None:
    if count:
        notes.append(f"left out: {count} {what}")


def _candidate_key(row: Result) -> str:
    return f"{row.kernel} {canonical_json(dict(row.config))}"


def _candidate(rows: Sequence[Result]) -> Candidate:
    """Of all rows of one candidate, oldest first."""
    judged = [r for r in rows if r.kind == "measured" and (r.status is Status.INCORRECT or (r.status is Status.OK and r.median_us))]
    on_device = [r for r in rows if r.kind == "measured"]
    row = (judged or on_device or rows)[-1]
    energy = next((r for r in reversed(rows) if r.energy_j is not None and r.status is Status.OK), None) if judged else None
    counts = [not mark for mark in row.marked] if len(row.marked) == len(row.samples_us) else [True] * len(row.samples_us)
    samples = [us for us, counted in zip(row.samples_us, counts, strict=True) if counted]
    clocks = [mhz for mhz, counted in zip(row.clocks_mhz, counts, strict=False) if counted]
    known = any(mhz is not None for mhz in clocks)
    metrics = {name: value for name in _METRICS if (value := getattr(row, name)) is not None}
    temperatures = [t for t in row.temperatures_c if t is not None]
    if temperatures:
        metrics["temperature_c"] = statistics.median(temperatures)
    if row.launches_per_round:
        metrics["launches_per_round"] = float(row.launches_per_round)
    return Candidate(
        {KERNEL: row.kernel, **row.config},
        row.status,
        row.median_us,
        compile_s=row.compile_s,
        benchmark_s=_benchmark_s(row),
        samples_us=samples,
        clocks_mhz=[float("nan") if mhz is None else mhz for mhz in clocks] if known else (),
        sm_clock_mhz=row.sm_clock_mhz,
        power_w=energy.power_w if energy else None,
        energy_j=energy.energy_j if energy else None,
        reason=row.reason,
        recorded_at=row.recorded_at,
        metrics=metrics,
    )


def _benchmark_s(row: Result) -> float | None:
    """Seconds of the device for warm-up and rounds; None for a row that got no rounds."""
    if not row.samples_us:
        return None
    warmup_ms = row.policy.get("warmup_ms", Policy().warmup_ms)
    return float(warmup_ms) / 1e3 + row.launches_per_round * sum(row.samples_us) / 1e6


def _about(recording: Recordings, last: Result, rows: Sequence[Result], epoch: str, policy: str) -> Mapping[str, Json]:
    return {
        "operator": recording.operator,
        "problem": dict(last.problem),
        "problem_key": recording.problem_key,
        "problem_label": recording.label,
        "chip": last.chip,
        "flops": last.flops,
        "bytes_moved": last.bytes_moved,
        "epoch": epoch,
        "policy": dict(last.policy),
        "policy_key": policy,
        "environment": dict(last.environment),
        "sources": {r.kernel: r.source_digest for r in sorted(rows, key=lambda r: r.kernel)},
        "libraries": sorted({r.kernel for r in rows if r.library}),
        "runs": dict(sorted(Counter(r.run_id for r in rows).items())),
    }
