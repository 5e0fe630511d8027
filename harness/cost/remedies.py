"""Remedies: what would make a scenario possible that is not: another size, format or chip, a weaker promise."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from klab.harness.catalog.chips import load_chips
from klab.harness.cost.estimate import Estimator
from klab.harness.cost.fit import SIZES, holds, least_tp
from klab.harness.cost.serving import OperatingPoint, meets, nearest, operating_points
from klab.harness.cost.steps import Steps
from klab.harness.cost.workload import Workload
from klab.harness.plan.quantization import formats
from klab.kernels.contract import Chip
from klab.kernels.errors import UsageError

if TYPE_CHECKING:
    from klab.harness.cost.answer import Option, Question

# Sizes tried on other chips and in other formats where the question leaves them open.
BOARD = (1, 2, 4, 8)


def to_fit(q: Question, options: Sequence[Option]) -> list[str]:
    """Which sizes, formats, chips and lengths have the memory, where no option has."""
    format = q.formats[0]
    found = []
    tp = least_tp(lambda tp: q.deployment(tp, format), q.workload)
    if tp and q.chip.link_gb_per_s:
        found.append(f"--tp {tp} holds it: the least of {', '.join(map(str, SIZES))}")
    elif q.chip.link_gb_per_s:
        found.append(f"no size up to {SIZES[-1]} GPUs of {q.chip.name} holds it in this format")
    for other in (name for name in formats() if name != format):
        tp = least_tp(lambda tp, other=other: q.deployment(tp, other), q.workload, _sizes(q, q.chip))  # type: ignore[misc]
        if tp:
            found.append(f"--quantization {other} --tp {tp} holds it")
    for chip in _others(q.chip):
        tp = least_tp(lambda tp, chip=chip: q.deployment(tp, format, chip), q.workload, _sizes(q, chip))  # type: ignore[misc]
        if tp:
            found.append(f"--chip {chip.name} --tp {tp} holds it")
    room = max(options, key=lambda o: o.fit.usable_bytes - o.fit.weight_bytes, default=None)
    if room is not None and room.fit.weight_bytes < room.fit.usable_bytes:
        tokens = _most_tokens(q, room)
        if tokens:
            found.append(f"at --tp {room.deployment.tp} a request of up to {tokens:,} tokens (isl + osl) fits")
    return found or ["no format and no chip of the catalog holds it in these sizes"]


def to_meet(q: Question, options: Sequence[Option], estimator: Estimator) -> list[str]:
    """Which SLOs would be met, and which formats and chips meet the ones asked for, where no option does."""
    points = [p for o in options for p in o.points]
    found = []
    close = nearest(points)
    if close is not None:
        found.append(f"{_promise(close)} would be met: at --tp {close.deployment.tp} with {close.concurrency} in flight per replica")
    alone: list[tuple[str, OperatingPoint]] = []
    for name in formats():
        if name != q.formats[0]:
            alone += _tried(q, name, q.chip, estimator, f"--quantization {name}")
    for chip in _others(q.chip):
        alone += _tried(q, q.formats[0], chip, Estimator(chip), f"--chip {chip.name}")
    for how, point in alone:
        times = f"TTFT {_seconds(point.ttft_s.mid)}, TPOT {_seconds(point.tpot_s.mid)}"
        found.append(f"{how} --tp {point.deployment.tp} meets them with one request in flight ({times}, {point.label})")
    if close is not None and not alone:
        found.append("no other format and no other chip of the catalog meets them")
    return found


def _tried(q: Question, format: str, chip: Chip, estimator: Estimator, how: str) -> Iterable[tuple[str, OperatingPoint]]:
    """The smallest replica that meets the SLOs for a single request, if any."""
    for tp in _sizes(q, chip):
        deployment = q.deployment(tp, format, chip)
        try:
            if not holds(deployment, q.workload):
                continue
            steps = Steps(deployment, estimator, q.host_us)
            (point,) = operating_points(steps, q.workload, [1]) or (None,)
        except UsageError:  # this chip has no peak for the dtype, or the size does not divide the model
            continue
        if point is not None and meets(point):
            yield how, point
            return


def _sizes(q: Question, chip: Chip) -> tuple[int, ...]:
    return q.tps or (BOARD if chip.link_gb_per_s else (1,))


def _others(chip: Chip) -> list[Chip]:
    return [
        one for one in load_chips() if one.name != chip.name and one.kind != "cpu" and "prefill" in one.phases and "decode" in one.phases
    ]


def _most_tokens(q: Question, option: Option) -> int:
    """Of prompt and generation, for one request."""
    free = option.fit.usable_bytes - option.fit.weight_bytes
    low, high = 0, q.workload.isl + q.workload.osl
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if option.steps.cache_bytes(middle) <= free else (low, middle)
    return low


def _promise(point: OperatingPoint) -> str:
    """The broken SLOs as the point would keep them, rounded up."""
    w: Workload = point.workload
    words = []
    if w.slo_ttft_s and point.ttft_s.mid > w.slo_ttft_s:
        words.append(f"--slo-ttft {rounded_up(point.ttft_s.mid)}")
    if w.slo_tpot_s and point.tpot_s.mid > w.slo_tpot_s:
        words.append(f"--slo-tpot {rounded_up(point.tpot_s.mid)}")
    return " ".join(words)


def rounded_up(seconds: float) -> str:
    """Two digits, rounded up, as the options read it."""
    step = 10.0 ** (math.floor(math.log10(seconds)) - 1)
    return _seconds(math.ceil(seconds / step - 1e-9) * step)


def _seconds(value: float) -> str:
    return f"{value:.3g}s" if value >= 1 else f"{value * 1e3:.3g}ms"
