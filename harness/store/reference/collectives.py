"""Collectives between GPUs as published: NCCL's own test and the engines' all-reduce, on the machines of the tables."""

from __future__ import annotations

import bisect
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from klab.harness.plan.communication import Collective
from klab.harness.store.reference.tables import Table, read_rows, require, system_of, tables, usual_version
from klab.harness.store.reference.traps import LAUNCHES, LEAST_SHARE, NOT_A_TIME, TOO_FAST, strange
from klab.kernels.contract import Chip

KINDS = {"all_reduce": "all_reduce", "all_gather": "all_gather", "reduce_scatter": "reduce_scatter", "alltoall": "all_to_all"}
# The tables count elements of 16 bits (nccl-tests' bytes, divided). Those of int8 are left out: GPUs do not send sums of bytes.
ELEMENT_BYTES = {"half": 2, "bfloat16": 2, "float16": 2}
NCCL = "nccl"


@dataclass(frozen=True, slots=True)
class Link:
    """One published collective: microseconds, by which kernel of which engine. `flag`: why it is not to be used."""

    one: Collective
    us: float
    kernel: str
    engine: str
    version: str
    device: str
    table: Table
    flag: str = ""


def links(chip: Chip, *, backend: str | Sequence[str] | None = None, root: Path | None = None, flagged: bool = False) -> Iterator[Link]:
    """The published collectives of a chip: NCCL's, and the all-reduce of these engines (None: all).

    All-reduces that were not replayed from a graph are flagged: their times are those of launches.
    """
    root = require(root)
    system = system_of(chip.name, root)
    engines = [backend] if isinstance(backend, str) else backend
    found = [*tables(root, system, "comm", "nccl_perf", [NCCL]), *tables(root, system, "comm", "custom_allreduce_perf", engines)]
    for table in found:
        for link in _rows(chip, table):
            if flagged or not link.flag:
                yield link


def _rows(chip: Chip, table: Table) -> Iterator[Link]:
    dtype = "nccl_dtype" if table.backend == NCCL else "allreduce_dtype"
    columns = (dtype, "num_gpus", "message_size", "op_name", "framework", "version", "device", "kernel_source", "latency")
    rows = [dict(zip(columns, row, strict=True)) for row in read_rows(table, columns)]
    version = usual_version(table)
    for row in rows:
        kind, size, gpus = KINDS.get(row["op_name"]), ELEMENT_BYTES.get(row[dtype]), row["num_gpus"]
        if kind is None or size is None or gpus < 2 or row["message_size"] < 1:
            continue
        one = Collective(kind, gpus, size * row["message_size"])
        us = 1e3 * (row["latency"] or 0.0)
        engine = "NCCL" if table.backend == NCCL else row["framework"] or ""
        flag = strange(row["device"] or "", row["version"] or "", table.system, version) or _impossible(chip, one, us) or _eager(row)
        yield Link(one, us, row["kernel_source"] or "", engine, row["version"] or table.version, row["device"] or "", table, flag)


def _eager(row: Mapping[str, Any]) -> str:
    return LAUNCHES if str(row["kernel_source"]).endswith("_eager") else ""


def _impossible(chip: Chip, one: Collective, us: float) -> str:
    """Every GPU sends its part at least once: switches may add up for them, and save the second half of an all-reduce."""
    if not (us > 0 and math.isfinite(us)):
        return NOT_A_TIME
    sent = one.wire_bytes / (2 if one.kind == "all_reduce" else 1)
    return TOO_FAST if chip.link_gb_per_s and us < LEAST_SHARE * sent / (chip.link_gb_per_s * 1e3) else ""


class Curves:
    """Microseconds over size, per kind, group and kernel: what a size between the published ones takes with the fastest of the kernels."""

    def __init__(self, found: Iterator[Link] | Sequence[Link]) -> None:
        self._curves: dict[tuple[str, int], dict[tuple[str, str], list[Link]]] = {}
        for link in found:
            curves = self._curves.setdefault((link.one.kind, link.one.gpus), {})
            curves.setdefault((link.table.label, link.kernel), []).append(link)
        for curves in self._curves.values():
            for name, curve in curves.items():
                best: dict[int, Link] = {}
                for link in curve:  # a size that was measured twice counts once
                    other = best.get(link.one.message_bytes)
                    if other is None or link.us < other.us:
                        best[link.one.message_bytes] = link
                curves[name] = [best[size] for size in sorted(best)]

    def fastest(self, one: Collective) -> tuple[float, Link] | None:
        """(microseconds, the published one next below in size) by the fastest kernel; None for a group or a size that nobody measured.

        Between sizes straight in logarithms; below the smallest, as long as that.
        """
        found = [between(curve, one.message_bytes) for curve in self._curves.get((one.kind, one.gpus), {}).values()]
        return min((answer for answer in found if answer), key=lambda answer: answer[0], default=None)


def between(curve: Sequence[Link], message_bytes: int) -> tuple[float, Link] | None:
    """One kernel's time at a size, and the published row at or next below it."""
    at = bisect.bisect_left(curve, message_bytes, key=lambda link: link.one.message_bytes)
    if at == len(curve):
        return None
    high = curve[at]
    if at == 0 or high.one.message_bytes == message_bytes:
        return high.us, high
    low = curve[at - 1]
    share = math.log(message_bytes / low.one.message_bytes) / math.log(high.one.message_bytes / low.one.message_bytes)
    return math.exp((1 - share) * math.log(low.us) + share * math.log(high.us)), low
