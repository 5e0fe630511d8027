"""What GPUs send one another: message sizes of a plan, and how long a collective takes, modelled or from what was measured."""

from __future__ import annotations

import bisect
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from klab.harness.plan.rows import Plan
from klab.kernels.contract import Chip, Json
from klab.kernels.errors import UsageError

KINDS = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all")
# Constants of the model. Latencies: NCCL's tuning table (src/graph/tuning.cc: 6.6 us to start a ring with its low-latency protocol, 0.6 us
# per NVLink hop; 8.4 us with the bulk protocol). Bandwidths: a maintainer of NCCL in nccl-tests issue 212: of the 450 GB/s of an H100's
# links 370 remain, and in-switch reduction reaches a "bus" bandwidth of 480. Low-latency messages carry a flag of 4 bytes with every 4.
START_US, BULK_START_US, HOP_US = 6.6, 8.4, 0.6
LINK_SHARE, SWITCH_SHARE, LOW_LATENCY_SHARE = 370 / 450, 480 / 450, 0.5
# In-switch reduction joins in where the group is a whole board.
SWITCH_GPUS = 4
# GPUs of one NVLink board; the constants know no network between boards.
BOARD_GPUS = 8
SCHEMA = 1
# The kind of chip that each backend measures.
BACKENDS = {"nccl": "cuda", "gloo": "cpu"}
# From one token of a small model to a long prefill.
SIZES = (1 << 12, 1 << 15, 1 << 18, 1 << 21, 1 << 24, 1 << 27)


@dataclass(frozen=True)
class Collective:
    """`message_bytes` is the size of the whole tensor: reduced, or gathered from (or scattered to) all `gpus`."""

    kind: str
    gpus: int
    message_bytes: int

    def __post_init__(self) -> None:
        if self.kind not in KINDS or self.gpus < 2 or self.message_bytes < 1:
            raise UsageError(f"a collective is one of {', '.join(KINDS)} over 2 or more GPUs and a byte or more, not {self}")

    @property
    def wire_bytes(self) -> float:
        """Bytes that each GPU sends: (n - 1)/n of the tensor, twice for an all-reduce."""
        return (2 if self.kind == "all_reduce" else 1) * (self.gpus - 1) / self.gpus * self.message_bytes


@dataclass(frozen=True)
class Expected:
    """Microseconds of a collective. `origin` is "measured" (between measured sizes, or at one) or "modelled"; `how` says by what."""

    us: float
    origin: str
    how: str


def modelled(one: Collective, link_gb_per_s: float) -> Expected:
    """The best of low-latency, bulk and in-switch algorithms by NCCL's own constants; `link_gb_per_s` is one way.

    More GPUs than a board has are modelled as if all were on one, and `how` says so.
    """
    link = link_gb_per_s * 1e3  # bytes per microsecond
    hops = (2 if one.kind == "all_reduce" else 1) * (one.gpus - 1)
    choices = {
        "low latency": START_US + HOP_US * min(hops, 2 * math.ceil(math.log2(one.gpus)))
        + one.wire_bytes / (link * LINK_SHARE * LOW_LATENCY_SHARE),
        "bulk": BULK_START_US + HOP_US * hops + one.wire_bytes / (link * LINK_SHARE),
    }  # fmt: skip
    if one.kind == "all_reduce" and one.gpus >= SWITCH_GPUS:
        choices["in the switch"] = BULK_START_US + 2 * HOP_US + one.wire_bytes / (link * SWITCH_SHARE)
    how = min(choices, key=choices.__getitem__)
    beyond = "" if one.gpus <= BOARD_GPUS else ", modelled as if all were on one board"
    return Expected(choices[how], "modelled", how + beyond)


@dataclass(frozen=True)
class Point:
    """A measured collective: median microseconds over rounds (each the slowest GPU's), with its 95% interval."""

    kind: str
    gpus: int
    message_bytes: int
    median_us: float
    ci_low_us: float
    ci_high_us: float
    rounds: int

    def __post_init__(self) -> None:
        """ValueError for what no measurement gives."""
        whole = (self.gpus, self.message_bytes, self.rounds)
        times = (self.ci_low_us, self.median_us, self.ci_high_us)
        if self.kind not in KINDS or any(type(n) is not int or n < 1 for n in whole) or self.gpus < 2:
            raise ValueError(f"not a collective: {self}")
        if any(type(us) not in (int, float) or not (math.isfinite(us) and us > 0) for us in times):
            raise ValueError(f"not times: {self}")
        if sorted(times) != list(times):
            raise ValueError(f"not an interval around its median: {self}")


@dataclass(frozen=True)
class Table:
    """What was measured between the GPUs of one machine."""

    chip: str
    backend: str
    points: tuple[Point, ...]
    environment: Mapping[str, Json]

    def __post_init__(self) -> None:
        """ValueError for what no measurement gives."""
        if self.backend not in BACKENDS or not isinstance(self.chip, str) or not isinstance(self.environment, Mapping):
            raise ValueError(f"not a table: {self.backend!r} on {self.chip!r}")
        keys = [(p.kind, p.gpus, p.message_bytes) for p in self.points]
        if len(set(keys)) < len(keys):
            raise ValueError(f"{max(keys, key=keys.count)} is there twice")

    def require(self, chip: Chip) -> None:
        """UsageError when this was measured on anything but that chip."""
        if self.chip != chip.name:
            raise UsageError(f"the table was measured on {self.chip}, which says nothing of {chip.name}: say -c {self.chip}")
        if BACKENDS[self.backend] != chip.kind:
            raise UsageError(f"the table was measured with {self.backend}, which says nothing of the links of {chip.name}")

    def expected(self, one: Collective, link_gb_per_s: float | None) -> Expected:
        """Interpolated (log-log) between measured sizes of the same kind and group, else modelled. UsageError where neither can be."""
        near = sorted((p for p in self.points if (p.kind, p.gpus) == (one.kind, one.gpus)), key=lambda p: p.message_bytes)
        if near and near[0].message_bytes <= one.message_bytes <= near[-1].message_bytes:
            at = bisect.bisect_left([p.message_bytes for p in near], one.message_bytes)
            high = near[at]
            if high.message_bytes == one.message_bytes or at == 0:
                return Expected(high.median_us, "measured", f"{self.backend}, at this size")
            low = near[at - 1]
            share = math.log(one.message_bytes / low.message_bytes) / math.log(high.message_bytes / low.message_bytes)
            us = math.exp((1 - share) * math.log(low.median_us) + share * math.log(high.median_us))
            return Expected(us, "measured", f"{self.backend}, between {low.message_bytes} and {high.message_bytes} B")
        if link_gb_per_s is None:
            raise UsageError(f"nothing was measured for {one}, and the chip states no link to model it by")
        return modelled(one, link_gb_per_s)

    def to_json(self) -> dict[str, Json]:
        """The file's form."""
        return {"schema": SCHEMA, "chip": self.chip, "backend": self.backend, "environment": dict(self.environment),
                "points": [vars(point) for point in self.points]}  # fmt: skip


def read_table(path: Path) -> Table:
    """A file that `klab communication` wrote; UsageError for anything else."""
    try:
        data = json.loads(path.read_text())
        if data["schema"] != SCHEMA:
            raise UsageError(f"{path} has schema {data['schema']}; this klab reads {SCHEMA}")
        return Table(data["chip"], data["backend"], tuple(Point(**point) for point in data["points"]), data["environment"])
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from None
    except ValueError as error:
        why = str(error).splitlines()[0][:200]
        raise UsageError(f"{path} is not a file that klab communication wrote ({why})") from None
    except (KeyError, TypeError, OverflowError, RecursionError):
        raise UsageError(f"{path} is not a file that klab communication wrote") from None


def messages(plan: Plan) -> dict[tuple[str, int], dict[Collective, int]]:
    """The collectives of each step of a plan, with how often they run; with expert parallelism also the two exchanges of each mixture
    layer that an engine with sharded tokens makes in the place of its all-reduce.
    """
    found: dict[tuple[str, int], dict[Collective, int]] = {}
    for row in plan.rows:
        if row.operator not in KINDS:
            continue
        size = _size(plan)
        one = Collective(row.operator, int(row.shape["gpus"]), int(row.shape["rows"]) * int(row.shape["width"]) * size)
        step = found.setdefault((row.phase, row.batch), {})
        step[one] = step.get(one, 0) + row.count
    return found


def exchanges(plan: Plan) -> dict[tuple[str, int], dict[Collective, int]]:
    """Dispatch and combine of expert parallelism: every token's activations travel to its experts and back (all-to-all, both ways)."""
    found: dict[tuple[str, int], dict[Collective, int]] = {}
    if plan.scenario.tp < 2:
        return found
    for row in plan.rows:
        if row.operator in ("fused_moe", "weight_only_moe") and row.problem is not None:
            fields = row.problem.to_json()
            sent = int(fields["tokens"]) * int(fields["top_k"]) * int(fields["hidden"]) * _size(plan)
            step = found.setdefault((row.phase, row.batch), {})
            one = Collective("all_to_all", plan.scenario.tp, max(1, sent // plan.scenario.tp))
            step[one] = step.get(one, 0) + 2 * row.count
    return found


def total_us(step: Mapping[Collective, int], table: Table | None, link_gb_per_s: float | None) -> tuple[float, float]:
    """(microseconds of all collectives of a step one after another, the share of them that rests on measured ones)."""
    us = measured = 0.0
    for one, count in step.items():
        found = table.expected(one, link_gb_per_s) if table else modelled(one, link_gb_per_s or math.nan)
        us += count * found.us
        measured += count * found.us if found.origin == "measured" else 0.0
    return us, measured / us if us else 0.0


def sweep(gpus: int, sizes: Sequence[int] = SIZES) -> list[Collective]:
    """Every kind at sizes from 4 KiB (one token) to 128 MiB (a prefill)."""
    return [Collective(kind, gpus, size) for kind in KINDS for size in sizes]


def _size(plan: Plan) -> int:
    from klab.kernels.dtypes import SIZE_BYTES

    return SIZE_BYTES[plan.dtype]
