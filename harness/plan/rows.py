"""Plan: the operators of a step with their work and their roofline bound, and what they add up to."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from klab.harness.catalog.architecture import Model, Note
from klab.harness.plan.scenario import Scenario
from klab.kernels.contract import Chip, Json, Problem


@dataclass(frozen=True)
class Row:
    """One operator at one shape in one step, on one GPU of the tensor-parallel group.

    `flops`, `bytes_moved` (memory) and `link_bytes` (to other GPUs) are of one launch; `count` launches per step, spread over `layers`
    layers (1 for what runs once). `bound_us` is the roofline's time of one launch and `limit` what sets it: compute, memory or link.
    `problem` is what klab measures, or None, and then `why` says why not.
    """

    phase: str
    batch: int
    role: str
    operator: str
    shape: Mapping[str, Json] = field(hash=False)
    count: int
    layers: int
    flops: float
    bytes_moved: float
    link_bytes: float
    bound_us: float
    limit: str
    problem: Problem | None = None
    why: str = ""

    @property
    def per_layer(self) -> float:
        """Launches per layer that has it."""
        return self.count / self.layers

    @property
    def intensity(self) -> float | None:
        """FLOP per byte of memory, or None for what moves none."""
        return self.flops / self.bytes_moved if self.bytes_moved else None

    def to_json(self) -> dict[str, Json]:
        """One line of `klab plan --json`."""
        return {
            "phase": self.phase,
            "batch": self.batch,
            "role": self.role,
            "operator": self.operator,
            "shape": dict(self.shape),
            "per_layer": self.per_layer,
            "layers": self.layers,
            "count": self.count,
            "flops": self.flops,
            "bytes_moved": self.bytes_moved,
            "link_bytes": self.link_bytes,
            "intensity": self.intensity,
            "bound_us": self.bound_us,
            "limit": self.limit,
            "problem": self.problem.to_json() if self.problem else None,
            "problem_key": self.problem.key if self.problem else None,
            "label": self.problem.label() if self.problem else None,
            "why": self.why,
        }


@dataclass(frozen=True)
class Totals:
    """Sums over one step. The shares are of the rows that have a problem, by flops and by the time that the roofline gives them."""

    phase: str
    batch: int
    flops: float
    bytes_moved: float
    link_bytes: float
    bound_us: float
    covered_flops_share: float
    covered_time_share: float


@dataclass(frozen=True)
class Plan:
    """The steps of a model on a chip: one prefill (or denoising) step and one decode step per batch size."""

    model: Model
    chip: Chip
    scenario: Scenario
    dtype: str
    rows: tuple[Row, ...]
    notes: tuple[Note, ...]
    weight_bytes: float
    kv_bytes_per_token: float

    @property
    def steps(self) -> list[tuple[str, int]]:
        """(phase, batch) of every step, in order."""
        return list(dict.fromkeys((row.phase, row.batch) for row in self.rows))

    def step(self, phase: str, batch: int) -> list[Row]:
        """The rows of one step."""
        return [row for row in self.rows if (row.phase, row.batch) == (phase, batch)]

    def problems(self) -> list[Problem]:
        """Every problem once, in order of first appearance."""
        return list({row.problem.key: row.problem for row in self.rows if row.problem}.values())

    def occurrences(self, problem: Problem) -> list[Row]:
        """The rows in which a problem appears: which step, in what role, how often."""
        return [row for row in self.rows if row.problem == problem]

    @property
    def totals(self) -> list[Totals]:
        """Sums per step, in the order of `steps`."""
        return [_totals(phase, batch, self.step(phase, batch)) for phase, batch in self.steps]


def _totals(phase: str, batch: int, rows: list[Row]) -> Totals:
    def share(parts: Iterator[tuple[float, bool]]) -> float:
        pairs = list(parts)
        whole = sum(part for part, _ in pairs)
        return sum(part for part, covered in pairs if covered) / whole if whole else 0.0

    return Totals(
        phase,
        batch,
        flops=sum(row.count * row.flops for row in rows),
        bytes_moved=sum(row.count * row.bytes_moved for row in rows),
        link_bytes=sum(row.count * row.link_bytes for row in rows),
        bound_us=sum(row.count * row.bound_us for row in rows),
        covered_flops_share=share((row.count * row.flops, row.problem is not None) for row in rows),
        covered_time_share=share((row.count * row.bound_us, row.problem is not None) for row in rows),
    )
